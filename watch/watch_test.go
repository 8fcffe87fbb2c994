package watch_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/observers"
	"github.com/go-throttler/throttler/watch"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var ctx = context.Background()

// plenty is a bucket that never denies in these tests.
var plenty = throttler.NewBucket(time.Hour, 1_000_000)

// observed returns a Throttler that a Watch observes.
func observed(t testing.TB, w *watch.Watch, c throttler.Config) *throttler.Throttler {
	c.Observe = w.Observe
	out, err := throttler.New(c)
	require.NoError(t, err)
	return out
}

// consume calls Consume n times.
func consume(t testing.TB, from *throttler.Throttler, n int, id string, o ...throttler.Option) {
	for range n {
		_, err := from.Consume(id, o...)
		require.NoError(t, err)
	}
}

// inABubble runs a test in a synctest bubble, where sleeping moves the time.
func inABubble(t *testing.T, test func(*testing.T)) {
	t.Parallel()
	synctest.Test(t, test)
}

func TestEachCallCountsForWhatCameOfIt(t *testing.T) {
	inABubble(t, func(t *testing.T) {
		w := watch.New(nil)
		limited := observed(t, w, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 3)}})
		free := observed(t, w, throttler.Config{OnUnknownIdentifier: throttler.Allow})
		unknown := observed(t, w, throttler.Config{})
		consume(t, limited, 5, "a")
		consume(t, free, 4, "a")
		_, err := unknown.Consume("a")
		require.ErrorIs(t, err, throttler.ErrUnknownIdentifier)
		_, err = limited.Peek(ctx, "a")
		require.NoError(t, err)
		require.NoError(t, limited.Reset(ctx, "a"))

		require.Zero(t, w.Snapshot().Minute, "the present second is not over")
		<-time.After(time.Second)
		require.Equal(t, watch.Calls{Allowed: 3, Denied: 2, Bypassed: 4, Failed: 1}, w.Snapshot().Minute)
		<-time.After(time.Minute)
		require.Zero(t, w.Snapshot().Minute)
	})
}

func TestTheAttemptsOfAWaitAreNoDenials(t *testing.T) {
	inABubble(t, func(t *testing.T) {
		w := watch.New(nil)
		one := observed(t, w, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 1)}})
		var callers sync.WaitGroup
		for range 5 {
			callers.Go(func() {
				_, err := one.Wait(ctx, "a")
				require.NoError(t, err)
			})
		}
		callers.Wait()
		soon, cancel := context.WithTimeout(ctx, time.Millisecond)
		defer cancel()
		_, err := one.Wait(soon, "a")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		<-time.After(time.Second)
		s := w.Snapshot()
		require.Equal(t, watch.Calls{Allowed: 5, Denied: 1}, s.Minute)
		require.EqualValues(t, 5, s.Buckets[0].Allowed)
		require.EqualValues(t, 1, s.Buckets[0].Denied)
		require.Greater(t, s.Sources[0].Calls, int64(6), "the storage has decided each attempt")
	})
}

func TestSecondsAreKeptForFiveMinutesAndTensForAnHour(t *testing.T) {
	inABubble(t, func(t *testing.T) {
		w := watch.New(nil)
		all := observed(t, w, throttler.Config{Buckets: []throttler.Bucket{plenty}})
		consume(t, all, 70, "a")
		sum := func(seconds []watch.Second) (sum float64) {
			for _, s := range seconds {
				sum += s.Allowed
			}
			return sum
		}
		seen := func() []float64 {
			s := w.Snapshot()
			require.Len(t, s.Seconds, 300)
			require.Len(t, s.Hour, 360)
			return []float64{sum(s.Seconds), sum(s.Hour)}
		}
		<-time.After(300 * time.Second)
		require.Equal(t, []float64{70, 7}, seen())
		<-time.After(time.Second)
		consume(t, all, 10, "a")
		<-time.After(10 * time.Second)
		require.Equal(t, []float64{10, 8}, seen())
		<-time.After(time.Hour - 311*time.Second)
		require.Equal(t, []float64{0, 8}, seen())
		<-time.After(10 * time.Second)
		require.Equal(t, []float64{0, 1}, seen())
		<-time.After(time.Hour)
		require.Equal(t, []float64{0, 0}, seen())
	})
}

func TestThePeakIsTheMostOfOneSecondOfTheHour(t *testing.T) {
	inABubble(t, func(t *testing.T) {
		w := watch.New(nil)
		all := observed(t, w, throttler.Config{Buckets: []throttler.Bucket{plenty}})
		for _, n := range []int{3, 50, 7} {
			for i := range n {
				consume(t, all, 1, fmt.Sprint(i)) // in all shards
			}
			w.Snapshot() // a look at the page changes nothing
			<-time.After(time.Second)
		}
		peaks := func() []int64 { s := w.Snapshot(); return []int64{s.Rate.Peak, s.Buckets[0].Rate.Peak} }
		require.Equal(t, []int64{50, 50}, peaks())
		<-time.After(50 * time.Minute)
		require.Equal(t, []int64{50, 50}, peaks())
		<-time.After(11 * time.Minute)
		require.Equal(t, []int64{0, 0}, peaks())
	})
}

func TestASpikeIsOverThreeTimesTheHour(t *testing.T) {
	for name, c := range map[string]struct {
		before, then int // calls a second
		after        time.Duration
		want         bool
	}{
		"four times":               {before: 10, then: 40, after: time.Hour, want: true},
		"three times":              {before: 10, then: 30, after: time.Hour},
		"after ten seconds":        {before: 10, then: 40, after: 10 * time.Second, want: true},
		"nothing to compare with":  {before: 10, then: 40, after: 9 * time.Second},
		"after silence":            {before: 0, then: 10, after: time.Minute, want: true},
		"too few to be of concern": {before: 0, then: 9, after: time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			inABubble(t, func(t *testing.T) {
				w := watch.New(nil)
				all := observed(t, w, throttler.Config{Buckets: []throttler.Bucket{plenty}})
				each := func(n int, d time.Duration) {
					for range d / time.Second {
						consume(t, all, n, "a")
						<-time.After(time.Second)
					}
				}
				each(c.before, c.after)
				each(c.then, 10*time.Second)
				s := w.Snapshot()
				require.InDelta(t, c.then, s.Rate.Now, 0.001)
				require.Equal(t, c.want, s.Rate.Spike)
				require.Equal(t, s.Rate, s.Buckets[0].Rate)
			})
		})
	}
}

func TestABucketCountsItsTokens(t *testing.T) {
	inABubble(t, func(t *testing.T) {
		w := watch.New(nil)
		short, long := throttler.NewBucket(time.Minute, 10), throttler.NewBucket(time.Hour, 100)
		api := observed(t, w, throttler.Config{Name: "api", Buckets: []throttler.Bucket{short, long}})
		v, err := api.Consume("a", throttler.Cost(9))
		require.NoError(t, err)
		consume(t, api, 3, "a", throttler.Cost(2)) // one of the buckets denies
		require.NoError(t, api.Refund(ctx, v, throttler.Cost(4)))
		require.NoError(t, api.Charge(ctx, "b", throttler.Cost(3)))
		<-time.After(time.Second)
		rate := watch.Rate{Now: 0.4, Peak: 4}
		require.Equal(t, watch.Bucket{Throttler: "api", Bucket: "10/1m", Limit: 10, Period: time.Minute, Rate: rate, Allowed: 1, Denied: 3, Near: 1, Tokens: 8}, w.Snapshot().Buckets[0])
		rate = watch.Rate{Now: 0.1, Peak: 1}
		require.Equal(t, watch.Bucket{Throttler: "api", Bucket: "100/1h", Limit: 100, Period: time.Hour, Rate: rate, Allowed: 1, Tokens: 8}, w.Snapshot().Buckets[1])
	})
}

func TestBucketsBeyondTheFirstAreOthers(t *testing.T) {
	inABubble(t, func(t *testing.T) {
		w := watch.New(nil)
		all := observed(t, w, throttler.Config{})
		for i := range 500 {
			name := fmt.Sprintf("bucket of user %d", i)
			consume(t, all, 2, name, throttler.Using(plenty.Named(name)))
		}
		<-time.After(time.Second)
		buckets, sum := w.Snapshot().Buckets, int64(0)
		require.Len(t, buckets, 65)
		for _, b := range buckets {
			sum += b.Allowed
		}
		require.EqualValues(t, 1000, sum)
		require.Equal(t, "other", buckets[64].Bucket)
	})
}

func TestLatenciesAreTrueWithinAQuarter(t *testing.T) {
	t.Parallel()
	w := watch.New(nil)
	e := event(t, "a", 1)
	for n := range 1000 {
		e.Duration = time.Duration(n+1) * time.Millisecond
		w.Observe(ctx, e)
	}
	s := w.Snapshot().Sources[0]
	require.Equal(t, "runtime", s.Source)
	require.InDelta(t, 1.125, float64(s.P50)/float64(500*time.Millisecond), 0.125)
	require.InDelta(t, 1.125, float64(s.P99)/float64(990*time.Millisecond), 0.125)
}

// event returns the event of a call that this many buckets allowed.
func event(t testing.TB, id string, buckets int) *throttler.Event {
	kept := new(throttler.Event)
	c := throttler.Config{Observe: func(_ context.Context, e *throttler.Event) { *kept = *e }}
	for i := range buckets {
		c.Buckets = append(c.Buckets, plenty.Named(fmt.Sprint("bucket ", i)))
	}
	one, err := throttler.New(c)
	require.NoError(t, err)
	consume(t, one, 1, id)
	return kept
}

func TestAnyLatencyIsCounted(t *testing.T) {
	t.Parallel()
	for _, d := range []time.Duration{-1, 0, 1, 5, 1<<63 - 1} {
		w, e := watch.New(nil), event(t, "a", 1)
		e.Duration = d
		w.Observe(ctx, e)
		require.Positive(t, w.Snapshot().Sources[0].P99)
	}
}

func TestConcurrentCallsAreAllCounted(t *testing.T) {
	inABubble(t, func(t *testing.T) {
		w := watch.New(nil)
		all := observed(t, w, throttler.Config{Buckets: []throttler.Bucket{plenty}})
		var callers sync.WaitGroup
		for i := range 8 {
			callers.Go(func() {
				for n := range 300 {
					if _, err := all.Consume(fmt.Sprint("user:", i)); err != nil {
						panic(err)
					}
					if n%50 == 0 {
						w.Snapshot()
						<-time.After(time.Second)
					}
				}
			})
		}
		callers.Wait()
		<-time.After(time.Second)
		s := w.Snapshot()
		require.EqualValues(t, 2400, s.Minute.Allowed)
		require.EqualValues(t, 2400, s.Buckets[0].Tokens)
		require.EqualValues(t, 2400, s.Sources[0].Calls)
		require.Len(t, s.MostAsked, 8)
		require.EqualValues(t, 300, s.MostAsked[7].AskedLeast)
	})
}

func TestObservingAllocatesNothing(t *testing.T) {
	w := watch.New(nil)
	some := observed(t, w, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, observers.Calls/2), plenty}})
	before, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, observers.Calls/2), plenty}})
	require.NoError(t, err)
	allocs := func(one *throttler.Throttler) float64 {
		return testing.AllocsPerRun(observers.Calls, func() { _, _ = one.Consume("user:42") })
	}
	require.LessOrEqual(t, allocs(some), allocs(before), "half of them denied")
}

// TestObservingIsAPartOfADecision measures both in turns, because the machine may be busy. Observing takes about 0.4 of
// the time of a decision on two buckets.
func TestObservingIsAPartOfADecision(t *testing.T) {
	c := throttler.Config{Buckets: []throttler.Bucket{plenty, throttler.NewBucket(time.Minute, 1_000_000)}}
	some := observed(t, watch.New(nil), c)
	c.Observe = func(context.Context, *throttler.Event) {}
	none, err := throttler.New(c)
	require.NoError(t, err)
	var took, least []time.Duration
	for range 20 {
		took, least = append(took, observers.Turn(t, some)), append(least, observers.Turn(t, none))
	}
	require.Less(t, median(took), 3*median(least))
}

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}

func TestAChargeInPartCountsWhatWasRecorded(t *testing.T) {
	inABubble(t, func(t *testing.T) {
		w := watch.New(nil)
		th := observed(t, w, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 10)}})
		require.NoError(t, th.Charge(ctx, "a", throttler.Cost(13)))
		require.ErrorIs(t, th.Charge(ctx, "a", throttler.Cost(100)), throttler.ErrDebtLimit)
		<-time.After(time.Second)
		require.EqualValues(t, 40, w.Snapshot().Buckets[0].Tokens)
	})
}

func TestTheOldestSecondAndStepAreWholeWhileTheNewestBegins(t *testing.T) {
	inABubble(t, func(t *testing.T) {
		w := watch.New(nil)
		th := observed(t, w, throttler.Config{Buckets: []throttler.Bucket{plenty}})
		for range 4000 {
			consume(t, th, 10, "a")
			<-time.After(time.Second)
		}
		consume(t, th, 10, "a")
		s := w.Snapshot()
		require.Equal(t, watch.Second{Allowed: 10}, s.Seconds[0])
		require.Equal(t, watch.Second{Allowed: 10}, s.Hour[0])
		require.Equal(t, watch.Rate{Now: 10, Hour: 10, Peak: 10}, s.Rate)
	})
}

func TestTheBucketOfManyHasNoLimit(t *testing.T) {
	inABubble(t, func(t *testing.T) {
		w := watch.New(nil)
		th := observed(t, w, throttler.Config{})
		for i := range int64(70) {
			consume(t, th, 1, fmt.Sprint(i), throttler.Using(throttler.NewBucket(time.Hour, i+5).Named(fmt.Sprint("b", i))))
		}
		<-time.After(time.Second)
		all := w.Snapshot().Buckets
		i := slices.IndexFunc(all, func(b watch.Bucket) bool { return b.Bucket == "other" })
		require.Equal(t, watch.Bucket{Bucket: "other", Rate: watch.Rate{Now: 0.6, Peak: 6}, Allowed: 6, Tokens: 6}, all[i])
	})
}
