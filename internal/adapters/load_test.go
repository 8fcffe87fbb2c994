package adapters_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/failsafe-go/failsafe-go/adaptivelimiter"
	"github.com/failsafe-go/failsafe-go/failsafehttp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/load"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// both puts a limit of what is inside at once behind elastic limits: code of docs/load.md.
func both(t *throttler.Throttler, took func(time.Duration), mux http.Handler) (http.Handler, error) {
	inside := adaptivelimiter.NewBuilder[*http.Response]().WithLimits(1, 200, 20).Build()
	limit, err := throttlerhttp.New(t, &throttlerhttp.Options{
		Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 50).Continuous().Elastic(2)},
		Took:    took,
	})
	if err != nil {
		return nil, err
	}
	return limit(failsafehttp.NewHandler(mux, inside)), nil // who asks for too much is refused before anybody else is
}

func TestALimitOfConcurrencyStandsBehindElasticLimits(t *testing.T) {
	t.Parallel()
	var latency load.Latency
	limiter, err := throttler.New(throttler.Config{Load: func() float64 { return 0 }})
	require.NoError(t, err)
	entered, leave := make(chan struct{}), make(chan struct{})
	h, err := both(limiter, latency.Took, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		entered <- struct{}{}
		<-leave
	}))
	require.NoError(t, err)
	ask := func(address string) *httptest.ResponseRecorder {
		w, r := httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil)
		r.RemoteAddr = address + ":1234"
		h.ServeHTTP(w, r)
		return w
	}
	answers := make(chan *httptest.ResponseRecorder)
	for i := range 20 {
		go func() { answers <- ask(fmt.Sprint("192.0.2.", i)) }()
		select {
		case <-entered:
		case refused := <-answers:
			require.Fail(t, "it is not inside", refused.Body)
		}
	}
	refusedInside := ask("198.51.100.1")
	assert.Equal(t, http.StatusTooManyRequests, refusedInside.Code)
	assert.Empty(t, refusedInside.Header().Get("Retry-After"), "the limit of concurrency knows no time")
	assert.Equal(t, http.StatusTooManyRequests, ask("198.51.100.1").Code)
	refused := ask("198.51.100.1")
	assert.Equal(t, "1", refused.Header().Get("Retry-After"), "2 a second are left of 50")
	close(leave)
	for range 20 {
		assert.Equal(t, http.StatusOK, (<-answers).Code)
	}
	assert.NotZero(t, latency.Signal(time.Nanosecond)())
}
