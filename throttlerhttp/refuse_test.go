package throttlerhttp_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
	memstore "github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/throttlerhttp"
)

func TestRetryAfterSecondsIsRoundedUpOnce(t *testing.T) {
	t.Parallel()
	for after, want := range map[time.Duration]int64{
		0: 1, 1: 1, time.Microsecond: 1, time.Second: 1, time.Second + 1: 2, 8 * time.Second: 8, 8*time.Second + time.Microsecond: 9,
		7500 * time.Millisecond: 8, -time.Hour: 1, math.MaxInt64: math.MaxInt64/int64(time.Second) + 1, 366 * 24 * time.Hour: 366 * 24 * 3600,
	} {
		assert.Equal(t, want, throttlerhttp.RetryAfterSeconds(throttler.Verdict{RetryAfter: after}), after)
	}
	assert.Zero(t, throttlerhttp.RetryAfterSeconds(throttler.Verdict{Allowed: true}))
}

func TestSetFieldsSaysWhatTheMiddlewareSays(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{Clock: clock.NewMock(), Buckets: buckets(throttler.NewBucket(10*time.Second, 1).Named("short"))})
	require.NoError(t, err)
	limit, err := throttlerhttp.New(limiter, &throttlerhttp.Options{Decide: func(r *http.Request) (throttler.Verdict, error) { return limiter.Consume(r.URL.Path) }})
	require.NoError(t, err)
	for _, status := range []int{http.StatusOK, http.StatusTooManyRequests} {
		w := httptest.NewRecorder()
		limit(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/middleware", nil))
		require.Equal(t, status, w.Code)
		want, have := http.Header{}, http.Header{}
		for _, name := range []string{"Ratelimit", "Ratelimit-Policy", "Retry-After"} {
			if values := w.Header().Values(name); values != nil {
				want[name] = values
			}
		}
		v, err := limiter.Consume("alone")
		require.NoError(t, err)
		throttlerhttp.SetFields(have, v)
		assert.Equal(t, want, have)
	}
	h := http.Header{"Ratelimit": {`"theirs";r=1;t=2`}, "Ratelimit-Policy": {`"theirs";q=1;w=2`}}
	v, err := limiter.Consume("alone")
	require.NoError(t, err)
	throttlerhttp.SetFields(h, v)
	assert.Equal(t, http.Header{"Ratelimit": {`"theirs";r=1;t=2, "short";r=0;t=10`}, "Ratelimit-Policy": {`"theirs";q=1;w=2, "short";q=1;w=10`}, "Retry-After": {"10"}}, h)
	none := http.Header{}
	throttlerhttp.SetFields(none, throttler.Verdict{})
	assert.Empty(t, none)
}

// asks returns a handler that asks a Throttler itself.
func asks(t testing.TB, c throttler.Config) http.Handler {
	t.Helper()
	limiter, err := throttler.New(c)
	require.NoError(t, err)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, err := limiter.ConsumeContext(r.Context(), "user:42")
		if assert.NoError(t, err) && !v.Allowed {
			throttlerhttp.Refuse(w, r, v)
		}
	})
}

func TestRefuseAnswersAsTheMiddlewareDoes(t *testing.T) {
	t.Parallel()
	c := func() throttler.Config {
		return throttler.Config{Clock: clock.NewMock(), Buckets: buckets(throttler.NewBucket(10*time.Second, 1).Named("short"), perHour(9).Named("long"))}
	}
	plenty := buckets(perHour(100).Named("outer"))
	for name, o := range map[string]throttlerhttp.Options{
		"defaults": {}, "JSON": {Refuse: throttlerhttp.JSON}, "X": {Fields: throttlerhttp.XSeconds}, "both": {Fields: throttlerhttp.XSeconds | throttlerhttp.Draft10, RefundIf: never},
		"none": {Fields: throttlerhttp.NoFields}, "of a route": {Routes: []throttlerhttp.Route{{Pattern: "/", Refuse: throttlerhttp.JSON, Buckets: plenty}}},
	} {
		direct := o
		if direct.Routes != nil {
			direct.Routes, direct.Refuse = nil, throttlerhttp.JSON
		}
		middleware := serve(t, c(), direct, ok)
		o.Buckets = plenty
		handler := asks(t, c())
		byHandler := inside(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler.ServeHTTP(outer{w}, r) }), o)
		ask(middleware, "GET /")
		ask(byHandler, "GET /")
		want, got := ask(middleware, "GET /"), ask(byHandler, "GET /")
		require.Equal(t, http.StatusTooManyRequests, got.StatusCode, name)
		assert.Equal(t, want.Body.String(), got.Body.String(), name)
		if want.Header.Get("RateLimit") != "" {
			list := parsed(t, got, "RateLimit")
			assert.Len(t, list, 3, "that of the middleware too")
			delete(list, "outer")
			delete(list, "/ outer")
			assert.Equal(t, parsed(t, want, "RateLimit"), list)
			want.Header.Del("RateLimit")
			want.Header.Del("RateLimit-Policy")
		}
		got.Header.Del("RateLimit")
		got.Header.Del("RateLimit-Policy")
		assert.Equal(t, want.Header, got.Header, name)
	}
}

func TestRefuseWithoutAMiddlewareHasTheDefaults(t *testing.T) {
	t.Parallel()
	c := func() throttler.Config {
		return throttler.Config{Clock: clock.NewMock(), Buckets: buckets(throttler.NewBucket(10*time.Second, 1), perHour(9))}
	}
	middleware, handler := serve(t, c(), throttlerhttp.Options{}, ok), asks(t, c())
	ask(middleware, "GET /")
	ask(handler, "GET /")
	want, got := ask(middleware, "GET /"), ask(handler, "GET /")
	assert.Equal(t, want.Header, got.Header)
	assert.Equal(t, want.Body.String(), got.Body.String())
	assert.Equal(t, "10", got.Header.Get("Retry-After"))
	assert.Equal(t, "no-store", got.Header.Get("Cache-Control"))
}

func TestRefuseTakesAnyVerdict(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{Clock: clock.NewMock(), Buckets: buckets(perHour(2).Named("b"), perHour(9).Named("c"))})
	require.NoError(t, err)
	var parts []throttler.Part
	for i, id := range []string{"user", "org"} {
		parts = append(parts, throttler.For(id, throttler.Cost(int64(2-i))))
	}
	_, err = limiter.ConsumeAll(t.Context(), parts...)
	require.NoError(t, err)
	several, err := limiter.ConsumeAll(t.Context(), parts...)
	require.NoError(t, err)
	for _, v := range []throttler.Verdict{several, {}, {Allowed: true}, {RetryAfter: -1}} {
		w := httptest.NewRecorder()
		throttlerhttp.Refuse(w, httptest.NewRequest(http.MethodGet, "/", nil), v)
		assert.Equal(t, http.StatusTooManyRequests, w.Code)
		assert.NotEmpty(t, w.Header().Get("Retry-After"))
		if len(v.Levels()) > 0 {
			assert.Equal(t, map[string]map[string]int64{"b": {"r": 0, "t": 3600}, "c": {"r": 7, "t": 3600}}, parsed(t, reply{Header: w.Header()}, "RateLimit"), "of two of one name the smaller")
		}
	}
}

func TestARefusalForgetsWhatWasSaidOfAnotherBody(t *testing.T) {
	t.Parallel()
	stale := []string{
		"Content-Length", "Content-Encoding", "ETag", "Last-Modified", "Content-Range", "Accept-Ranges", "Content-Disposition", "Content-Language",
		"Content-Location", "Content-MD5", "Digest", "Content-Digest", "Repr-Digest", "Transfer-Encoding", "Trailer", "Expires", "Age", "Pragma",
		"CDN-Cache-Control", "Surrogate-Control",
	}
	for name, refuse := range map[string]func(http.ResponseWriter, *http.Request, throttlerhttp.Refusal){
		"Problem": nil, "JSON": throttlerhttp.JSON,
		"own": func(w http.ResponseWriter, _ *http.Request, why throttlerhttp.Refusal) {
			http.Error(w, "no", why.Status)
		},
	} {
		for _, o := range []throttlerhttp.Options{{Buckets: buckets(perHour(1).Named("b"))}, {Buckets: buckets(perHour(1).Named("b")), Cost: func(*http.Request) int64 { return 2 }}} {
			o.Refuse = refuse
			limit := serve(t, throttler.Config{}, o, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { clear(w.Header()) }))
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				for _, field := range stale {
					w.Header().Set(field, "3")
				}
				w.Header().Set("Cache-Control", "public, max-age=3600")
				w.Header().Set("Vary", "Origin")
				w.Header().Set("Access-Control-Allow-Origin", "*")
				limit.ServeHTTP(w, r)
			}))
			defer server.Close()
			var r reply
			for range 2 {
				res, err := server.Client().Get(server.URL)
				require.NoError(t, err)
				r = reply{res.StatusCode, res.Header, &bytes.Buffer{}}
				_, err = r.Body.ReadFrom(res.Body)
				require.NoError(t, err, "it is not truncated")
				require.NoError(t, res.Body.Close())
			}
			require.GreaterOrEqual(t, r.StatusCode, 400)
			if name != "own" {
				assert.True(t, json.Valid(r.Body.Bytes()), "%s: %q", name, r.Body)
			}
			for _, field := range stale[1:] {
				assert.Empty(t, r.Header.Get(field), "%s: %s", name, field)
			}
			assert.Equal(t, "no-store", r.Header.Get("Cache-Control"))
			assert.Equal(t, []string{"Origin", "*"}, []string{r.Header.Get("Vary"), r.Header.Get("Access-Control-Allow-Origin")})
		}
	}
}

// compressed is a ResponseWriter that compresses all that is written.
type compressed struct {
	http.ResponseWriter
	to io.Writer
}

func (c compressed) Write(b []byte) (int, error) { return c.to.Write(b) }

func TestARefusalInsideOfACompressionCanBeRead(t *testing.T) {
	t.Parallel()
	for _, refuse := range []bool{false, true} {
		limit := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(1).Named("b"))}, ok)
		if refuse {
			limit = inside(t, asks(t, throttler.Config{Buckets: buckets(perHour(1))}), throttlerhttp.Options{Buckets: buckets(perHour(9))})
		}
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			to := gzip.NewWriter(w)
			limit.ServeHTTP(compressed{w, to}, r)
			_ = to.Close()
		}))
		defer server.Close()
		for _, status := range []int{200, 429} {
			r, err := server.Client().Get(server.URL)
			require.NoError(t, err)
			body, err := io.ReadAll(r.Body)
			require.NoError(t, err)
			require.NoError(t, r.Body.Close())
			require.Equal(t, status, r.StatusCode)
			assert.True(t, status == 200 || json.Valid(body), "%q", body)
		}
	}
}

func TestACostAboveACapacityTellsTheLimits(t *testing.T) {
	t.Parallel()
	var why throttlerhttp.Refusal
	h := serve(t, throttler.Config{Clock: clock.NewMock()}, throttlerhttp.Options{
		Buckets: buckets(perHour(5).Named("b"), perHour(100).Named("c")), Fields: throttlerhttp.Draft10 | throttlerhttp.XSeconds,
		Tier: func(*http.Request) string { return "big" }, Tiers: map[string][]throttler.Bucket{"big": buckets(perHour(7).Named("b"), perHour(100).Named("c"))},
		Cost: func(r *http.Request) int64 { return int64(len(r.URL.Path)) },
		Refuse: func(w http.ResponseWriter, r *http.Request, refusal throttlerhttp.Refusal) {
			why = refusal
			throttlerhttp.Problem(w, r, refusal)
		},
	}, ok)
	ask(h, "GET /3")
	for range 2 {
		r := ask(h, "GET /3456789")
		assert.Equal(t, http.StatusRequestEntityTooLarge, r.StatusCode)
		assert.Equal(t, []string{`"b";q=7;w=3600, "c";q=100;w=3600`}, r.Header.Values("RateLimit-Policy"))
		assert.Equal(t, []string{`"b";r=5;t=3600, "c";r=98;t=3600`}, r.Header.Values("RateLimit"), "nothing was taken")
		assert.Equal(t, []string{"7", "5", "3600"}, []string{r.Header.Get("X-RateLimit-Limit"), r.Header.Get("X-RateLimit-Remaining"), r.Header.Get("X-RateLimit-Reset")})
		assert.Empty(t, r.Header.Get("Retry-After"))
		assert.False(t, why.Verdict.Allowed)
		assert.Len(t, why.Verdict.Levels(), 2)
		assert.ErrorContains(t, why.Err, `"user:42"`)
		assert.ErrorContains(t, why.Err, `"b"`)
	}
}

// closed is a storage whose Peeks fail with ErrClosed.
type closed struct{ storage.Storage }

func (c closed) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	if r.Mode == storage.Peek {
		return throttler.ErrClosed
	}
	return c.Storage.Decide(ctx, r, a)
}

func TestACostAboveACapacityIsA413WhateverTheStorageSays(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{Storage: closed{memstore.New(nil)}}, throttlerhttp.Options{Buckets: buckets(perHour(5)), Cost: func(*http.Request) int64 { return 6 }}, ok)
	r := ask(h, "GET /")
	assert.Equal(t, http.StatusRequestEntityTooLarge, r.StatusCode)
	assert.Empty(t, r.Header.Get("RateLimit"))
}

func TestErrorsOfCostsNameTheIdentifier(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{Buckets: buckets(perHour(5))})
	require.NoError(t, err)
	for _, cost := range []int64{-1, 6} {
		for _, id := range []string{"user:42", strings.Repeat("x", 1024)} {
			_, err = limiter.Consume(id, throttler.Cost(cost))
			assert.ErrorContains(t, err, `identifier "`+id[:min(len(id), 64)]+`"`)
			_, err = limiter.ConsumeAll(t.Context(), throttler.For("other"), throttler.For(id, throttler.Cost(cost)))
			assert.ErrorContains(t, err, `identifier "`+id[:min(len(id), 64)]+`"`)
		}
	}
}

func TestA413NamesTheBucketThatCannotHoldTheCostAlsoOfARouteThatAdds(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{
		Key: whoever, Cost: func(*http.Request) int64 { return 11 }, Buckets: buckets(throttler.NewBucket(time.Minute, 10).Named("all")),
		Routes: []throttlerhttp.Route{{Pattern: "/up", Adds: true, Buckets: buckets(throttler.NewBucket(time.Minute, 100).Named("up"))}},
	}, ok)
	r := ask(h, "GET /up")
	require.Equal(t, http.StatusRequestEntityTooLarge, r.StatusCode)
	assert.Equal(t, `"all";r=10, "/up up";r=100`, r.Header.Get("RateLimit"))
}
