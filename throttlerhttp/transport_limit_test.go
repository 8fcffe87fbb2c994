package throttlerhttp_test

import (
	"context"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	memstore "github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// limitedBy returns a Transport with a client-side limit, and that limit.
func limitedBy(t *testing.T, s http.RoundTripper, o throttlerhttp.TransportOptions, c throttler.Config) (*throttlerhttp.Transport, *throttler.Throttler) {
	t.Helper()
	th, err := throttler.New(c)
	require.NoError(t, err)
	o.Limit = th
	return throttlerhttp.NewTransport(s, &o), th
}

var twoASecond = throttler.NewBucket(time.Second, 2).Continuous().Burst(1)

func TestTransportKeepsALimitOfItsOwn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newFakeServer(limits(`"5/1s";r=5;t=1`))
		tr, _ := limitedBy(t, s, throttlerhttp.TransportOptions{}, throttler.Config{Buckets: []throttler.Bucket{twoASecond}})
		for range 4 {
			status, err := get(t.Context(), tr, "http://api.example/")
			require.NoError(t, err)
			require.Equal(t, http.StatusOK, status)
		}
		status, err := get(t.Context(), tr, "http://other.example/")
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, status)
		waits(t, s, 0, 500*time.Millisecond, 500*time.Millisecond, 500*time.Millisecond, 0)
	})
}

func TestTransportsOfSeveralProcessesShareALimit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store, s := memstore.New(nil), newFakeServer(answer{http.StatusOK, nil})
		var wait sync.WaitGroup
		var sent [5]int
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Second)
		defer cancel()
		for i := range sent {
			tr, _ := limitedBy(t, s, throttlerhttp.TransportOptions{}, throttler.Config{
				Storage: store, Buckets: []throttler.Bucket{twoASecond, throttler.NewBucket(time.Minute, 100).Continuous().Burst(1)},
			})
			wait.Go(func() {
				for {
					if _, err := get(ctx, tr, "http://api.example/"); err != nil {
						return
					}
					sent[i]++
				}
			})
		}
		wait.Wait()
		total := 0
		for _, n := range sent {
			total += n
			assert.InDelta(t, 17, n, 2, "%v", sent)
		}
		assert.InDelta(t, 84, total, 1, "100 a minute are 83 in 50 s, and the first")
	})
}

func TestTransportSendsNothingThatItsLimitCannotAdmitInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newFakeServer(answer{http.StatusOK, nil})
		tr, th := limitedBy(t, s, throttlerhttp.TransportOptions{MaxWait: 10 * time.Second}, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1)}})
		_, err := get(t.Context(), tr, "http://api.example/")
		require.NoError(t, err)
		start := time.Now()
		_, err = get(t.Context(), tr, "http://api.example/")
		var unsent *throttlerhttp.NotSentError
		require.ErrorAs(t, err, &unsent)
		assert.Equal(t, start.Add(time.Hour), unsent.At)
		assert.Equal(t, start.Add(10*time.Second), unsent.Until)
		assert.Zero(t, time.Since(start))
		waits(t, s, 0)
		v, err := th.Peek(t.Context(), "http://api.example", throttler.Cost(0))
		require.NoError(t, err)
		assert.Zero(t, v.Levels()[0].Remaining)
	})
}

func TestTransportGivesBackWhatARequestTookThatTheServerHolds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newFakeServer(limitedFor("30"))
		tr, th := limitedBy(t, s, throttlerhttp.TransportOptions{MaxWait: 5 * time.Second}, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 10)}})
		_, err := get(t.Context(), tr, "http://api.example/")
		require.NoError(t, err, "it is told the denial")
		_, err = get(t.Context(), tr, "http://api.example/")
		var unsent *throttlerhttp.NotSentError
		require.ErrorAs(t, err, &unsent)
		v, err := th.Peek(t.Context(), "http://api.example", throttler.Cost(0))
		require.NoError(t, err)
		assert.EqualValues(t, 9, v.Levels()[0].Remaining)
	})
}

func TestTransportCountsARequestForItsKeyOrForNone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newFakeServer(answer{http.StatusOK, nil})
		tr, th := limitedBy(t, s, throttlerhttp.TransportOptions{Key: func(r *http.Request) string { return r.URL.Query().Get("account") }},
			throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 10)}})
		for _, url := range []string{"http://a.example/?account=7", "http://b.example/?account=7", "http://b.example/"} {
			_, err := get(t.Context(), tr, url)
			require.NoError(t, err)
		}
		v, err := th.Peek(t.Context(), "7", throttler.Cost(0))
		require.NoError(t, err)
		assert.EqualValues(t, 8, v.Levels()[0].Remaining)
	})
}
