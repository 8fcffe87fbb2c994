package rules_test

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/rules"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// request is what the middleware under test knows of a request.
func request(r *http.Request) []rules.Entry {
	out := []rules.Entry{{Key: "path", Value: r.URL.Path}, {Key: "method", Value: r.Method}}
	if user := r.Header.Get("X-User"); user != "" {
		out = append(out, rules.Entry{Key: "user", Value: user})
	}
	return append(out, rules.Entry{Key: "agent", Value: r.UserAgent()})
}

func get(h http.Handler, path string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodGet, path, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

var ok = http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})

func TestTheMiddlewareAnswersAsThrottlerhttpDoes(t *testing.T) {
	t.Parallel()
	h := engine(t, native).Middleware(request, &rules.MiddlewareOptions{Domain: "api"})(ok)
	for range 5 {
		assert.Equal(t, http.StatusOK, get(h, "/api/x", "X-User", "42").Code)
	}
	w := get(h, "/api/x", "X-User", "42")
	assert.Equal(t, http.StatusTooManyRequests, w.Code)
	assert.Equal(t, "10", w.Header().Get("Retry-After"))
	assert.Equal(t, `"api/10s";r=0;t=10, "api/1h/sliding";r=95;t=3600`, w.Header().Get("RateLimit"))
	assert.Equal(t, `"api/10s";q=5;w=10, "api/1h/sliding";q=100;w=3600`, w.Header().Get("RateLimit-Policy"))
	assert.Contains(t, w.Body.String(), `"violated-policies":["api/10s"]`)
	assert.Equal(t, http.StatusOK, get(h, "/api/x", "X-User", "43").Code)
	assert.Equal(t, http.StatusOK, get(h, "/other").Code)

	w = get(h, "/x", "User-Agent", "curl/8")
	assert.Equal(t, http.StatusForbidden, w.Code, "a limit of 0 admits nothing, and waiting does not help")
	assert.Empty(t, w.Header().Get("Retry-After"))
}

func TestTheMiddlewareTwiceCountsOnce(t *testing.T) {
	t.Parallel()
	limit := engine(t, native).Middleware(request, &rules.MiddlewareOptions{Domain: "api"})
	assert.Equal(t, `"api/10s";r=4;t=10, "api/1h/sliding";r=99;t=3600`, get(limit(limit(ok)), "/api/x", "X-User", "42").Header().Get("RateLimit"))
}

func TestTheMiddlewareHasCostsAndGivesBack(t *testing.T) {
	t.Parallel()
	status := http.StatusOK
	h := engine(t, "rules: [{name: a, limits: [5/1h]}]").Middleware(request, &rules.MiddlewareOptions{
		Cost:     func(*http.Request) int64 { return 2 },
		RefundIf: func(status int) bool { return status >= 400 },
	})(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }))
	assert.Equal(t, `"a/1h";r=3;t=3600`, get(h, "/").Header().Get("RateLimit"))
	status = http.StatusTeapot
	get(h, "/")
	status = http.StatusOK
	assert.Equal(t, `"a/1h";r=1;t=3600`, get(h, "/").Header().Get("RateLimit"))
}

func TestTheMiddlewareIsNotOpenWhenTheStorageFails(t *testing.T) {
	t.Parallel()
	l, err := throttler.New(throttler.Config{Storage: &spy{}, Clock: clock.NewMock()})
	require.NoError(t, err)
	e, err := rules.NewEngine(l, rules.NewMemory(rules.File{Data: limit("5/1h")}), nil)
	require.NoError(t, err)
	defer e.Close()
	var told error
	h := e.Middleware(request, &rules.MiddlewareOptions{
		OnError: func(_ *http.Request, err error) { told = err },
		Fields:  throttlerhttp.NoFields, Refuse: throttlerhttp.JSON,
	})(ok)
	w := get(h, "/")
	assert.Equal(t, http.StatusInternalServerError, w.Code)
	assert.JSONEq(t, `{"error":"Internal Server Error"}`, w.Body.String())
	require.ErrorIs(t, told, errSpy)

	h = engine(t, "rules: [{name: a, limits: [5/1h], cost: user}]").Middleware(request, nil)(ok)
	assert.Equal(t, http.StatusBadRequest, get(h, "/", "X-User", "42x").Code, "a cost that is no number")
	assert.Equal(t, http.StatusRequestEntityTooLarge, get(h, "/", "X-User", "6").Code)
	assert.Equal(t, http.StatusOK, get(h, "/", "X-User", "5").Code)
	assert.Equal(t, http.StatusTooManyRequests, get(h, "/").Code, "without the entry it is 1")
	require.NotErrorIs(t, told, throttler.ErrUnavailable)
}
