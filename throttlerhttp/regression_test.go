// Faults that this package once had, each with the smallest test that shows it.
package throttlerhttp_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/throttlerhttp"
)

func TestConnectToAPathBelowAWildcardDoesNotPanic(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9)),
		Routes: []throttlerhttp.Route{{Pattern: "/users/{id}/", Buckets: buckets(perHour(1))}}}, ok)
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader("CONNECT /users/42 HTTP/1.1\r\nHost: example.com\r\n\r\n")))
	require.NoError(t, err)
	assert.NotPanics(t, func() { h.ServeHTTP(httptest.NewRecorder(), r) })
}

func TestAnEncodedSlashDoesNotEvadeARoute(t *testing.T) {
	t.Parallel()
	byPath := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { // as gin, httprouter, gorilla/mux and most code do
		if r.URL.Path != "/api/search" {
			http.NotFound(w, r)
		}
	})
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(1000)),
		Routes: []throttlerhttp.Route{{Pattern: "/api/search", Adds: true, Buckets: buckets(perHour(1))}}}, byPath)
	assert.Equal(t, 1, admitted(h, 1, "GET /api/search")+admitted(h, 5, "GET /api%2Fsearch"))
}

func TestEncodedDotsDoNotMakeAPathFree(t *testing.T) {
	t.Parallel()
	dir := http.FS(memFS{})
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(1)),
		Routes: []throttlerhttp.Route{{Pattern: "/static/", Free: true}}}, http.FileServer(dir))
	assert.Equal(t, 1, admitted(h, 1, "GET /big")+admitted(h, 5, "GET /static/%2e%2e/big"))
}

func TestTheCaseOfTheHostDoesNotEvadeARoute(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(1000)),
		Routes: []throttlerhttp.Route{{Pattern: "example.com/api/", Buckets: buckets(perHour(1))}}}, ok)
	count := 0
	for _, host := range []string{"example.com", "EXAMPLE.com", "example.com."} {
		r := httptest.NewRequest(http.MethodGet, "/api/x", nil)
		r.Host = host
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code == http.StatusOK {
			count++
		}
	}
	assert.Equal(t, 1, count)
}

func TestAddsWithTiersKeepsTheLimitsOfTheThrottler(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{Buckets: buckets(perHour(1))})
	require.NoError(t, err)
	limit, err := throttlerhttp.New(limiter, &throttlerhttp.Options{Key: whoever,
		Tier:   func(*http.Request) string { return "" },
		Tiers:  map[string][]throttler.Bucket{"premium": buckets(perHour(50))},
		Routes: []throttlerhttp.Route{{Pattern: "/search", Adds: true, Buckets: buckets(perHour(100))}}})
	if err != nil {
		return // an error of New is as good: it names the fault
	}
	assert.Equal(t, 1, admitted(limit(ok), 5, "GET /search"))
}

func TestATierWithoutBucketsIsAFault(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	_, err = throttlerhttp.New(limiter, &throttlerhttp.Options{Buckets: buckets(perHour(1)),
		Tier: func(*http.Request) string { return "free" }, Tiers: map[string][]throttler.Bucket{"free": nil}})
	assert.Error(t, err)
}

func TestATierWithoutANameIsAFault(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	_, err = throttlerhttp.New(limiter, &throttlerhttp.Options{Buckets: buckets(perHour(1)),
		Tier: func(*http.Request) string { return "" }, Tiers: map[string][]throttler.Bucket{"": buckets(perHour(9))}})
	assert.ErrorContains(t, err, `Options.Tiers[""]`, "an empty name means Options.Buckets")
}

func never(int) bool { return false }

func TestAHandlerMayHijackUnderRefundIf(t *testing.T) {
	t.Parallel()
	is := make(chan bool, 1)
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9)), RefundIf: never},
		http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, hijacker := w.(http.Hijacker); is <- hijacker }))
	server := httptest.NewServer(h)
	defer server.Close()
	r, err := server.Client().Get(server.URL)
	require.NoError(t, err)
	require.NoError(t, r.Body.Close())
	assert.True(t, <-is, "gorilla/websocket asks like that")
}

func TestAHijackedAnswerIsNotA200(t *testing.T) {
	t.Parallel()
	told := make(chan int, 1)
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9)), RefundIf: func(s int) bool { told <- s; return false }},
		http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				_, _ = io.WriteString(conn, "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
				_ = conn.Close()
			}
		}))
	server := httptest.NewServer(h)
	defer server.Close()
	r, err := server.Client().Get(server.URL)
	require.NoError(t, err)
	require.NoError(t, r.Body.Close())
	require.Equal(t, http.StatusUnauthorized, r.StatusCode)
	assert.NotEqual(t, http.StatusOK, <-told)
}

type plain struct{ http.ResponseWriter }

func TestFlushTellsItsErrorUnderRefundIf(t *testing.T) {
	t.Parallel()
	var err error
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9)), RefundIf: never},
		http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { err = http.NewResponseController(w).Flush() }))
	h.ServeHTTP(plain{httptest.NewRecorder()}, httptest.NewRequest(http.MethodGet, "/", nil))
	assert.ErrorIs(t, err, http.ErrNotSupported)
}

func TestAClientThatHangsUpPays(t *testing.T) {
	t.Parallel()
	served := 0
	var hangUp context.CancelFunc
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(1)), RefundIf: func(s int) bool { return s != http.StatusUnauthorized && s < 499 }},
		http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			served++ // bcrypt
			hangUp()
			<-r.Context().Done()
		}))
	for range 3 {
		var ctx context.Context
		ctx, hangUp = context.WithCancel(t.Context())
		defer hangUp()
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, "/", nil).WithContext(ctx))
	}
	assert.Equal(t, 1, served)
}

func TestAPanicIsNotThe200ThatWasBuffered(t *testing.T) {
	t.Parallel()
	told := 0
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9)), RefundIf: func(s int) bool { told = s; return false }},
		http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusOK)
			panic(http.ErrAbortHandler)
		}))
	assert.Panics(t, func() { ask(h, "GET /") })
	assert.NotEqual(t, http.StatusOK, told, "net/http sends nothing of it")
}

func TestThePolicyOfABurstIsExact(t *testing.T) {
	t.Parallel()
	b := throttler.NewBucket(1100*time.Millisecond, 1).Continuous().Burst(50).Named("b")
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(b)}, ok)
	assert.Equal(t, map[string]map[string]int64{"b": {"q": 50, "w": 55}}, parsed(t, ask(h, "GET /"), "RateLimit-Policy"))
}

// stalled is a body from which nothing can be read until it is closed.
type stalled struct {
	closed chan struct{}
	close  func()
}

func newStalled() stalled {
	closed := make(chan struct{})
	return stalled{closed, sync.OnceFunc(func() { close(closed) })}
}

func (b stalled) Read([]byte) (int, error) { <-b.closed; return 0, errors.New("closed") }
func (b stalled) Close() error             { b.close(); return nil }

type tripper func(*http.Request) (*http.Response, error)

func (f tripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestTransportIsNotHeldUpByABodyThatStalls(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sent, body := 0, newStalled()
		tr := throttlerhttp.NewTransport(tripper(func(*http.Request) (*http.Response, error) {
			if sent++; sent == 1 {
				return &http.Response{StatusCode: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {"1"}}, Body: body}, nil
			}
			return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
		}), nil)
		done := make(chan struct{})
		go func() {
			defer close(done)
			r, _ := http.NewRequest(http.MethodGet, "http://example.com/", nil)
			if resp, err := tr.RoundTrip(r); err == nil {
				_ = resp.Body.Close()
			}
		}()
		select {
		case <-done:
		case <-time.After(time.Hour):
			t.Error("held for an hour, with a MaxWait of a minute")
			_ = body.Close()
			<-done
		}
	})
}

func TestTransportKnowsTheDefaultPort(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		tr := throttlerhttp.NewTransport(tripper(func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Ratelimit": {`"a";r=0;t=10`}}, Body: http.NoBody}, nil
		}), nil)
		start := time.Now()
		for _, url := range []string{"https://example.com/", "https://example.com:443/"} {
			r, err := http.NewRequest(http.MethodGet, url, nil)
			require.NoError(t, err)
			resp, err := tr.RoundTrip(r)
			require.NoError(t, err)
			require.NoError(t, resp.Body.Close())
		}
		assert.GreaterOrEqual(t, time.Since(start), 10*time.Second)
	})
}

type memFS struct{}

func (memFS) Open(name string) (fs.File, error) {
	return fstest.MapFS{"big": {Data: []byte("big")}}.Open(name)
}
