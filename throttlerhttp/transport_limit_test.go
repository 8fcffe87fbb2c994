package throttlerhttp_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
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

// late is a storage whose decisions take a while. A decision ends early if its context does.
type late struct {
	storage.Storage

	takes time.Duration
}

func (l late) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	select {
	case <-time.After(l.takes):
		return l.Storage.Decide(ctx, r, a)
	case <-ctx.Done():
		return ctx.Err()
	}
}

func TestARequestThatMayNotWaitIsSentAtOnceOrFailsAtOnce(t *testing.T) {
	t.Parallel()
	const takes = 5 * time.Millisecond
	for _, maxWait := range []time.Duration{-1, 1, time.Microsecond} {
		synctest.Test(t, func(t *testing.T) {
			s := newFakeServer(served)
			tr, _ := limitedBy(t, s, throttlerhttp.TransportOptions{MaxWait: maxWait}, throttler.Config{
				Storage: late{memstore.New(nil), takes}, Buckets: buckets(perHour(3)),
			})
			for range 3 {
				_, err := get(t.Context(), tr, api)
				require.NoError(t, err)
			}
			waits(t, s, takes, takes, takes)
			_, err := get(t.Context(), tr, api)
			var unsent *throttlerhttp.NotSentError
			require.ErrorAs(t, err, &unsent)
			assert.Equal(t, "http://api.test", unsent.Limit)
			assert.Equal(t, s.start.Add(takes+time.Hour), unsent.At, "the first request began the hour")
			assert.Equal(t, time.Now(), unsent.Until)
			assert.ErrorContains(t, err, `not sent: the limit of "http://api.test" may be asked again at 2000-01-01T01:00:00.005Z`)
			assert.Len(t, s.at, 3)
		})
	}
}

func TestTheTimeOfTheLimitIsNoWaitOfARequestThatMayNotWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newFakeServer(limits(`"a";r=0;t=60`))
		tr, _ := limitedBy(t, s, throttlerhttp.TransportOptions{MaxWait: -1}, throttler.Config{
			Storage: late{memstore.New(nil), 5 * time.Millisecond}, Buckets: buckets(perHour(3)),
		})
		_, err := get(t.Context(), tr, api)
		require.NoError(t, err)
		s.takes = time.Second
		var wait sync.WaitGroup
		for range 2 { // both are in flight though nothing remains: neither could wait for the other's answer
			wait.Go(func() {
				_, err := get(t.Context(), tr, api)
				assert.NoError(t, err)
			})
		}
		wait.Wait()
		waits(t, s, 5*time.Millisecond, 5*time.Millisecond, 0)
	})
}

func TestTransportDoesNotNameATimeThatIsTooEarly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		start, s := time.Now(), newFakeServer(served)
		tr, _ := limitedBy(t, s, throttlerhttp.TransportOptions{}, throttler.Config{
			Storage: late{memstore.New(nil), 5 * time.Millisecond}, Buckets: buckets(perHour(1)),
		})
		_, err := get(t.Context(), tr, api)
		require.NoError(t, err)
		_, err = get(t.Context(), tr, api)
		var unsent *throttlerhttp.NotSentError
		require.ErrorAs(t, err, &unsent)
		assert.Equal(t, start.Add(5*time.Millisecond+time.Hour), unsent.At)
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

func TestTransportTakesNothingForWhatItCannotSendAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, gone := newFakeServer(limitedFor("1")), errors.New("gone")
		tr, th := limitedBy(t, s, throttlerhttp.TransportOptions{}, throttler.Config{Buckets: buckets(perHour(10))})
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, api, strings.NewReader("cargo"))
		require.NoError(t, err)
		r.GetBody = func() (io.ReadCloser, error) { return nil, gone }
		_, err = send(tr, r)
		require.ErrorIs(t, err, gone)
		v, err := th.Peek(t.Context(), "http://api.test", throttler.Cost(0))
		require.NoError(t, err)
		assert.EqualValues(t, 9, v.Levels()[0].Remaining, "it was sent once")
	})
}

func TestTransportClosesTheNewBodyOfWhatItDoesNotSendAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		tr := throttlerhttp.NewTransport(newFakeServer(limitedFor("1")), nil)
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, api, strings.NewReader("cargo"))
		require.NoError(t, err)
		body := &closedBody{Reader: strings.NewReader("cargo")}
		r.GetBody = func() (io.ReadCloser, error) { return body, nil }
		time.AfterFunc(time.Millisecond, cancel)
		_, err = send(tr, r)
		require.ErrorIs(t, err, context.Canceled)
		assert.True(t, body.closed)
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

func TestALimitThatDoesNotAnswerInTimeIsNamed(t *testing.T) {
	t.Parallel()
	for _, broken := range []error{nil, throttler.ErrUnavailable} {
		synctest.Test(t, func(t *testing.T) {
			start, s := time.Now(), newFakeServer(served)
			tr, _ := limitedBy(t, s, throttlerhttp.TransportOptions{MaxWait: 100 * time.Millisecond}, throttler.Config{
				Storage: slow{memstore.New(nil), make(chan struct{}, 1), broken}, Buckets: buckets(perHour(3)),
			})
			_, err := get(t.Context(), tr, api)
			assert.Equal(t, 100*time.Millisecond, time.Since(start))
			assert.Empty(t, s.at)
			var unsent *throttlerhttp.NotSentError
			if broken != nil {
				require.ErrorIs(t, err, broken)
				require.NotErrorAs(t, err, &unsent, "the error of the storage says more")
				return
			}
			require.ErrorAs(t, err, &unsent)
			assert.Zero(t, unsent.At, "nobody knows")
			assert.EqualError(t, err, `throttlerhttp: not sent: the limit of "http://api.test" has not answered, this request can wait until 2000-01-01T00:00:00.1Z`)
		})
	}
}

func TestALimitThatAdmitsOthersFirstSaysSo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newFakeServer(served)
		tr, th := limitedBy(t, s, throttlerhttp.TransportOptions{MaxWait: time.Second}, throttler.Config{Buckets: buckets(perHour(3))})
		own := throttler.Using(perHour(1).Named("own"))
		_, err := th.Wait(t.Context(), "http://api.test", own)
		require.NoError(t, err)
		ctx, leave := context.WithCancel(t.Context())
		defer leave()
		go func() { _, _ = th.Wait(ctx, "http://api.test", own) }()
		synctest.Wait() // it is in the line now, an hour ahead of the request
		_, err = get(t.Context(), tr, api)
		assert.EqualError(t, err, `throttlerhttp: not sent: the limit of "http://api.test" admits other requests first, this request can wait until 2000-01-01T00:00:01Z`)
		var unsent *throttlerhttp.NotSentError
		require.ErrorAs(t, err, &unsent)
		assert.False(t, unsent.At.IsZero() || unsent.At.After(unsent.Until))
	})
}
