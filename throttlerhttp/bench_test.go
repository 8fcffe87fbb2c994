package throttlerhttp_test

import (
	"math"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// blank answers nothing, so that only the middleware is measured.
type blank struct{ header http.Header }

func (b *blank) Header() http.Header         { return b.header }
func (b *blank) Write(p []byte) (int, error) { return len(p), nil }
func (b *blank) WriteHeader(int)             {}

// again serves a request with a writer that was used before, whose header is empty again, as that of a new one.
func again(h http.Handler, w http.ResponseWriter, r *http.Request) {
	clear(w.Header())
	h.ServeHTTP(w, r)
}

func limitedByAddress(t testing.TB, n int64, routes ...throttlerhttp.Route) (http.Handler, *http.Request) {
	two := buckets(throttler.NewBucket(10*time.Second, n), throttler.NewBucket(time.Hour, n))
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Key: throttlerhttp.Address(nil), Buckets: two, Routes: routes},
		http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	return h, httptest.NewRequest(http.MethodGet, "/api/data", nil)
}

// BenchmarkMiddleware measures what the middleware adds to a request, with two buckets, the runtime storage and the default
// fields.
func BenchmarkMiddleware(b *testing.B) {
	for name, routes := range map[string][]throttlerhttp.Route{
		"plain":  nil,
		"routes": {{Pattern: "GET /api/data", Adds: true, Buckets: buckets(throttler.NewBucket(time.Minute, 1<<40))}, {Pattern: "/health", Free: true}},
	} {
		b.Run(name, func(b *testing.B) {
			h, r := limitedByAddress(b, 1<<40, routes...)
			w := &blank{http.Header{}}
			b.ReportAllocs()
			for b.Loop() {
				again(h, w, r)
			}
		})
	}
}

func TestRequestsOfManySharesAddNoMoreAllocations(t *testing.T) {
	share := 0.0
	h := serve(t, throttler.Config{Load: func() float64 { return share }},
		throttlerhttp.Options{Buckets: buckets(throttler.NewBucket(time.Minute, 1<<40).Elastic(1))}, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	w, r := &blank{http.Header{}}, httptest.NewRequest(http.MethodGet, "/", nil)
	next := func() {
		share = math.Mod(share, 1) + 1.0/64
		again(h, w, r)
	}
	for range 64 { // makes the rules before anything is measured
		next()
	}
	assert.LessOrEqual(t, testing.AllocsPerRun(1000, next), 3.0)
}

func TestTheMiddlewareAddsThreeAllocationsToARequestAndFourOnARoute(t *testing.T) {
	minutely := buckets(throttler.NewBucket(time.Minute, 1<<40))
	for most, routes := range map[float64][]throttlerhttp.Route{
		3:  nil,                                                         // the key, and a string and a slice for the fields
		4:  {{Pattern: "GET /api/data", Buckets: minutely}},             // and the identifier of the route
		12: {{Pattern: "GET /api/data", Adds: true, Buckets: minutely}}, // and a decision about two identifiers
	} {
		h, r := limitedByAddress(t, 1<<40, routes...)
		w := &blank{http.Header{}}
		assert.LessOrEqual(t, testing.AllocsPerRun(1000, func() { again(h, w, r) }), most)
	}
}
