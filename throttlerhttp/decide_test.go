package throttlerhttp_test

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/throttlerhttp"
)

func TestDecideReplacesTheKeyAndTheBuckets(t *testing.T) {
	t.Parallel()
	l, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	one := throttler.Using(throttler.NewBucket(time.Hour, 1))
	limit, err := throttlerhttp.New(l, &throttlerhttp.Options{
		Decide: func(r *http.Request) (throttler.Verdict, error) {
			return l.ConsumeAll(r.Context(), throttler.For("user", one), throttler.For(r.URL.Path, one))
		},
	})
	require.NoError(t, err)
	h := limit(limit(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})))
	for _, want := range []int{http.StatusOK, http.StatusTooManyRequests} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/a", nil))
		assert.Equal(t, want, w.Code)
		assert.NotEmpty(t, w.Header().Get("RateLimit"))
	}
}

func TestABucketOfCapacityZeroForbids(t *testing.T) {
	t.Parallel()
	l, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	limit, err := throttlerhttp.New(l, &throttlerhttp.Options{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 0)}})
	require.NoError(t, err)
	w := httptest.NewRecorder()
	limit(http.NotFoundHandler()).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	assert.Equal(t, http.StatusForbidden, w.Code)
	assert.Empty(t, w.Header().Get("Retry-After"))
}

func TestATierWithoutALimitStillHasTheLimitsOfRoutes(t *testing.T) {
	t.Parallel()
	l, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	limit, err := throttlerhttp.New(l, &throttlerhttp.Options{
		Buckets:  []throttler.Bucket{throttler.NewBucket(time.Hour, 1).Named("calls")},
		Tier:     func(*http.Request) string { return "enterprise" },
		Tiers:    map[string][]throttler.Bucket{"enterprise": {throttler.Unlimited().Named("calls")}},
		Routes:   []throttlerhttp.Route{{Pattern: "/a", Adds: true, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 2)}}},
		RefundIf: func(status int) bool { return status >= 400 },
	})
	require.NoError(t, err)
	status := http.StatusTeapot
	h := limit(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }))
	for i, want := range []int{http.StatusTeapot, http.StatusOK, http.StatusOK, http.StatusTooManyRequests} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/a", nil))
		status = http.StatusOK
		assert.Equal(t, want, w.Code, i)
		assert.Contains(t, w.Header().Get("RateLimit"), `"/a 2/1h";r=`+[]string{"2", "1", "0", "0"}[i])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/b", nil))
	assert.Equal(t, http.StatusOK, w.Code)
	assert.Empty(t, w.Header().Get("RateLimit"))
}

func TestAfterDecideTheFieldsTellWhatWasLeftBeforeARefund(t *testing.T) {
	t.Parallel()
	l, err := throttler.New(throttler.Config{Buckets: buckets(perHour(3))})
	require.NoError(t, err)
	limit, err := throttlerhttp.New(l, &throttlerhttp.Options{
		Decide:   func(r *http.Request) (throttler.Verdict, error) { return l.ConsumeContext(r.Context(), "user:42") },
		RefundIf: func(int) bool { return true },
	})
	require.NoError(t, err)
	for range 2 {
		w := httptest.NewRecorder()
		limit(ok).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
		assert.Equal(t, `"3/1h";r=2;t=3600`, w.Header().Get("RateLimit"), "and after the refund 3 remain")
	}
}
