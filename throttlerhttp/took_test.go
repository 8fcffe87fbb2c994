package throttlerhttp_test

import (
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/load"
	"github.com/go-throttler/throttler/throttlerhttp"
)

func TestTookIsToldHowLongTheHandlerTookToBegin(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var took []time.Duration
		h := serve(t, throttler.Config{}, throttlerhttp.Options{
			Buckets: buckets(perHour(3)),
			Routes:  []throttlerhttp.Route{{Pattern: "/free", Free: true}},
			Took:    func(d time.Duration) { took = append(took, d) },
		}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			<-time.After(time.Second)
			switch r.URL.Path {
			case "/streams":
				w.WriteHeader(http.StatusAccepted)
				<-time.After(time.Minute)
			case "/panics":
				panic("a fault of the handler")
			}
		}))
		ask(h, "GET /free")
		ask(h, "GET /silent")
		ask(h, "GET /streams")
		assert.Panics(t, func() { ask(h, "GET /panics") })
		assert.Equal(t, http.StatusTooManyRequests, ask(h, "GET /refused").StatusCode)
		assert.Equal(t, []time.Duration{time.Second, time.Second, time.Second}, took)
	})
}

func TestLimitsFollowTheLatencyOfTheHandler(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var latency load.Latency
		c, err := load.New(latency.Signal(100*time.Millisecond), nil)
		if !assert.NoError(t, err) {
			return
		}
		defer c.Close()
		slow := true
		h := serve(t, throttler.Config{Load: c.Share}, throttlerhttp.Options{
			Buckets: buckets(perHour(1000).Elastic(10)), Took: latency.Took,
		}, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			if slow {
				<-time.After(time.Second)
			}
		}))
		for range 10 {
			ask(h, "GET /")
		}
		assert.Less(t, c.Share(), 1.0)
		slow = false
		<-time.After(time.Minute)
		assert.InDelta(t, 1, c.Share(), 0)
	})
}
