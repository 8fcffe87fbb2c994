package throttler_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
)

// reserver returns a Throttler with the given buckets, or with one of 10 tokens a second, 2 at once.
func reserver(t *testing.T, b ...throttler.Bucket) *throttler.Throttler {
	t.Helper()
	if b == nil {
		b = []throttler.Bucket{throttler.NewBucket(time.Second, 10).Continuous().Burst(2).Named("b")}
	}
	th, err := throttler.New(throttler.Config{Buckets: b})
	require.NoError(t, err)
	return th
}

// reserves makes a reservation of n tokens within a minute, and returns when they are due.
func reserves(t *testing.T, th *throttler.Throttler, n int64) (throttler.Verdict, time.Duration) {
	t.Helper()
	v, err := th.Reserve(t.Context(), "a", time.Minute, throttler.Cost(n))
	require.NoError(t, err)
	require.True(t, v.Allowed)
	return v, v.Delay
}

const step = 100 * time.Millisecond // the time in which one token is refilled

func TestReserveTellsWhenItsTokensMayBeUsed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th := reserver(t)
		_, d := reserves(t, th, 2)
		assert.Zero(t, d)
		_, d = reserves(t, th, 2)
		assert.Equal(t, 2*step, d)
		<-time.After(3 * step)
		_, d = reserves(t, th, 2)
		assert.Equal(t, step, d)
	})
}

func TestADeniedReserveChangesNothingAndIsAdmittedAfterRetryAfter(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th := reserver(t)
		reserves(t, th, 2)
		for range 3 {
			v, err := th.Reserve(t.Context(), "a", step, throttler.Cost(2))
			require.NoError(t, err)
			require.False(t, v.Allowed)
			require.Equal(t, step, v.RetryAfter)
			require.Zero(t, v.Delay)
			require.Zero(t, v.Tokens())
		}
		<-time.After(step)
		v, err := th.Reserve(t.Context(), "a", step, throttler.Cost(2))
		require.NoError(t, err)
		assert.True(t, v.Allowed)
		assert.Equal(t, step, v.Delay)
		assert.False(t, allowed(t, th, "a"), "nobody overtakes what is reserved")
	})
}

func TestReserveWithinNothingIsConsume(t *testing.T) {
	t.Parallel()
	th := reserver(t, throttler.NewBucket(time.Hour, 2).Continuous())
	for i := range 3 {
		v, err := th.Reserve(t.Context(), "a", 999*time.Nanosecond)
		require.NoError(t, err)
		require.Equal(t, i < 2, v.Allowed)
	}
}

func TestReserveWithinAWrongTimeIsAnError(t *testing.T) {
	t.Parallel()
	th := reserver(t)
	for _, most := range []time.Duration{-1, -time.Hour, 366*24*time.Hour + time.Microsecond, 1<<63 - 1} {
		v, err := th.Reserve(t.Context(), "a", most)
		require.ErrorIs(t, err, throttler.ErrInvalidReserve, most)
		require.False(t, v.Allowed)
	}
	_, err := th.Reserve(t.Context(), "a", time.Minute, throttler.Cost(3))
	require.ErrorIs(t, err, throttler.ErrCostExceedsCapacity)
}

func TestOtherBucketsAdmitAReserveAsAConsume(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th := reserver(t, throttler.NewBucket(time.Second, 10).Continuous().Burst(1), throttler.NewBucket(time.Minute, 3))
		for i := range 3 {
			_, d := reserves(t, th, 1)
			require.Equal(t, time.Duration(i)*step, d)
		}
		v, err := th.Reserve(t.Context(), "a", time.Hour)
		require.NoError(t, err)
		assert.False(t, v.Allowed)
		assert.Equal(t, time.Minute, v.RetryAfter)
	})
}

// What other libraries promise about their reservations, for 10 tokens a second and 2 at once. The time of each step is in
// tenths of a second.
func TestCancellingAReservation(t *testing.T) {
	t.Parallel()
	for name, story := range map[string]func(t *testing.T, th *throttler.Throttler){
		"the last one gives its place to the next": func(t *testing.T, th *throttler.Throttler) {
			reserves(t, th, 2)
			v, _ := reserves(t, th, 2)
			<-time.After(step)
			require.NoError(t, th.Refund(t.Context(), v))
			_, d := reserves(t, th, 2)
			assert.Equal(t, step, d)
		},
		"one that was denied gives nothing": func(t *testing.T, th *throttler.Throttler) {
			reserves(t, th, 2)
			v, err := th.Reserve(t.Context(), "a", step, throttler.Cost(2))
			require.NoError(t, err)
			require.NoError(t, th.Refund(t.Context(), v))
			_, d := reserves(t, th, 2)
			assert.Equal(t, 2*step, d)
		},
		"one before another gives what that does not stand for": func(t *testing.T, th *throttler.Throttler) {
			reserves(t, th, 2)
			v, _ := reserves(t, th, 2)
			_, d := reserves(t, th, 1)
			require.Equal(t, 3*step, d)
			<-time.After(2 * step)
			require.NoError(t, th.Refund(t.Context(), v))
			_, d = reserves(t, th, 2)
			assert.InDelta(t, 2*step, d, float64(3*time.Microsecond))
		},
		"with as many behind it, it gives nothing": func(t *testing.T, th *throttler.Throttler) {
			reserves(t, th, 2)
			v, _ := reserves(t, th, 1)
			reserves(t, th, 1)
			require.NoError(t, th.Refund(t.Context(), v))
			_, d := reserves(t, th, 1)
			assert.Equal(t, 3*step, d)
		},
		"of nothing gives nothing": func(t *testing.T, th *throttler.Throttler) {
			v, _ := reserves(t, th, 0)
			require.NoError(t, th.Refund(t.Context(), v))
			reserves(t, th, 2)
			_, d := reserves(t, th, 1)
			assert.Equal(t, step, d)
		},
		"long afterwards gives nothing": func(t *testing.T, th *throttler.Throttler) {
			reserves(t, th, 2)
			v, _ := reserves(t, th, 2)
			<-time.After(10 * step)
			reserves(t, th, 2)
			require.NoError(t, th.Refund(t.Context(), v))
			_, d := reserves(t, th, 1)
			assert.Equal(t, step, d)
		},
		"after its time gives what has not come back since": func(t *testing.T, th *throttler.Throttler) {
			reserves(t, th, 2)
			v, _ := reserves(t, th, 2)
			<-time.After(3 * step)
			require.NoError(t, th.Refund(t.Context(), v))
			_, d := reserves(t, th, 2)
			assert.Zero(t, d)
			_, d = reserves(t, th, 1)
			assert.Equal(t, step, d, "one had come back by itself")
		},
		"that could act at once gives what has not come back, though others are behind it": func(t *testing.T, th *throttler.Throttler) {
			v, _ := reserves(t, th, 2)
			_, d := reserves(t, th, 2)
			require.Equal(t, 2*step, d)
			<-time.After(step / 2)
			require.NoError(t, th.Refund(t.Context(), v))
			_, d = reserves(t, th, 2)
			assert.InDelta(t, 2*step, d, float64(3*time.Microsecond), "half a step after the other, not two")
		},
		"of all but one of three lets the others move up": func(t *testing.T, th *throttler.Throttler) {
			reserves(t, th, 2)
			second, _ := reserves(t, th, 2)
			third, d := reserves(t, th, 2)
			require.Equal(t, 4*step, d)
			require.NoError(t, th.Refund(t.Context(), third))
			require.NoError(t, th.Refund(t.Context(), second))
			_, d = reserves(t, th, 2)
			assert.InDelta(t, 2*step, d, float64(3*time.Microsecond))
		},
		"after another limit gives its place back": func(t *testing.T, th *throttler.Throttler) {
			reserves(t, th, 2)
			v, _ := reserves(t, th, 2)
			require.NoError(t, th.AddBucket("a", throttler.NewBucket(time.Second, 5).Continuous().Burst(2).Named("b")))
			_, d := reserves(t, th, 1)
			require.Equal(t, 6*step, d, "3 tokens over the burst, at 5 a second")
			<-time.After(6 * step)
			require.NoError(t, th.Refund(t.Context(), v))
			_, d = reserves(t, th, 1)
			assert.LessOrEqual(t, d, 2*step)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { story(t, reserver(t)) })
		})
	}
}

func TestARaisedLimitCountsForWhatIsReservedNext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th := reserver(t, throttler.NewBucket(time.Second, 1).Continuous().Named("b"))
		for i := range 4 {
			_, d := reserves(t, th, 1)
			require.Equal(t, time.Duration(i)*time.Second, d)
		}
		require.NoError(t, th.AddBucket("a", throttler.NewBucket(time.Second, 10).Continuous().Burst(1).Named("b")))
		_, d := reserves(t, th, 1)
		assert.Equal(t, 4*step, d)
	})
}

func TestAnotherBurstCountsForWhatIsReservedNext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th := reserver(t)
		reserves(t, th, 2)
		_, d := reserves(t, th, 2)
		require.Equal(t, 2*step, d)
		require.NoError(t, th.AddBucket("a", throttler.NewBucket(time.Second, 10).Continuous().Burst(4).Named("b")))
		_, d = reserves(t, th, 4)
		assert.Equal(t, 4*step, d)
		_, err := th.Reserve(t.Context(), "a", time.Minute, throttler.Cost(5))
		assert.ErrorIs(t, err, throttler.ErrCostExceedsCapacity)
	})
}

func TestAClockThatStepsBackGivesNoReservationTwice(t *testing.T) {
	t.Parallel()
	mock := clock.NewMock()
	mock.Set(time.Unix(1000, 0))
	th, err := throttler.New(throttler.Config{Clock: mock, Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 10).Continuous().Burst(2)}})
	require.NoError(t, err)
	reserves(t, th, 2)
	v, d := reserves(t, th, 1)
	require.Equal(t, step, d)
	mock.Set(time.Unix(1000, 0).Add(-step))
	_, d = reserves(t, th, 1)
	assert.Equal(t, 3*step, d, "by the clock that stepped back, so 2 after the first")
	require.NoError(t, th.Refund(t.Context(), v))
	_, d = reserves(t, th, 1)
	assert.Equal(t, 4*step, d, "one is behind it")
}

func TestAtMostTakesWhatIsThere(t *testing.T) {
	t.Parallel()
	th := reserver(t, throttler.NewBucket(time.Hour, 10), throttler.NewBucket(time.Minute, 7).SlidingLog())
	v, err := th.Consume("a", throttler.AtMost(5))
	require.NoError(t, err)
	assert.EqualValues(t, 5, v.Tokens())
	p, err := th.Peek(t.Context(), "a", throttler.AtMost(1000))
	require.NoError(t, err)
	assert.EqualValues(t, 2, p.Tokens())
	v, err = th.Consume("a", throttler.AtMost(1000))
	require.NoError(t, err)
	assert.EqualValues(t, 2, v.Tokens())
	assert.EqualValues(t, 3, v.Levels()[0].Remaining)
	none, err := th.Consume("a", throttler.AtMost(1000))
	require.NoError(t, err)
	assert.False(t, none.Allowed)
	assert.Zero(t, none.Tokens())
	assert.InDelta(t, time.Minute, none.RetryAfter, float64(5*time.Second))
	require.NoError(t, th.Refund(t.Context(), v))
	v, err = th.Consume("a", throttler.AtMost(1000))
	require.NoError(t, err)
	assert.EqualValues(t, 2, v.Tokens(), "what was taken was given back")
	_, err = th.Consume("a", throttler.AtMost(-1))
	require.ErrorIs(t, err, throttler.ErrInvalidCost)
}

func TestAtMostOfSeveralIdentifiersTakesWhatAllHave(t *testing.T) {
	t.Parallel()
	th := reserver(t, throttler.NewBucket(time.Hour, 10))
	_, err := th.Consume("org", throttler.Cost(4))
	require.NoError(t, err)
	v, err := th.ConsumeAll(t.Context(), throttler.For("user", throttler.AtMost(8)), throttler.For("org", throttler.AtMost(8)))
	require.NoError(t, err)
	assert.EqualValues(t, 6, v.Tokens())
	assert.EqualValues(t, 4, v.Levels()[0].Remaining)
	v, err = th.ConsumeAll(t.Context(), throttler.For("user", throttler.AtMost(8)), throttler.For("other", throttler.Cost(10)))
	require.NoError(t, err)
	assert.EqualValues(t, 10, v.Tokens())
	assert.Equal(t, []int64{0, 0}, []int64{v.Levels()[0].Remaining, v.Levels()[1].Remaining})
	require.NoError(t, th.Refund(t.Context(), v))
	v, err = th.Consume("user", throttler.AtMost(8))
	require.NoError(t, err)
	assert.EqualValues(t, 4, v.Tokens())
}

func TestAtMostOfWhatNothingLimitsIsAllOfIt(t *testing.T) {
	t.Parallel()
	free := reserver(t, throttler.Unlimited())
	unknown, err := throttler.New(throttler.Config{OnUnknownIdentifier: throttler.Allow})
	require.NoError(t, err)
	failed, err := throttler.New(throttler.Config{
		Storage: failing{err: throttler.ErrUnavailable}, OnStorageError: throttler.Allow, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 2)},
	})
	require.NoError(t, err)
	for _, th := range []*throttler.Throttler{free, unknown, failed} {
		v, err := th.Consume("a", throttler.AtMost(500))
		require.NoError(t, err)
		assert.EqualValues(t, 500, v.Tokens())
		v, err = th.ConsumeAll(t.Context(), throttler.For("a"), throttler.For("b", throttler.AtMost(7)))
		require.NoError(t, err)
		assert.EqualValues(t, 7, v.Tokens())
	}
	v, err := free.Consume("a", throttler.CostOf(throttler.Unlimited().Name(), 9))
	require.NoError(t, err)
	assert.EqualValues(t, 9, v.Tokens())
}

func TestBucketsYieldWhatAtMostTook(t *testing.T) {
	t.Parallel()
	var costs []int64
	th, err := throttler.New(throttler.Config{
		Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 3)},
		Observe: func(_ context.Context, e *throttler.Event) {
			for _, cost := range e.Buckets() {
				costs = append(costs, cost)
			}
		},
	})
	require.NoError(t, err)
	v, err := th.Consume("a", throttler.AtMost(500))
	require.NoError(t, err)
	require.NoError(t, th.Refund(t.Context(), v))
	_, err = th.Consume("a", throttler.Cost(3))
	require.NoError(t, err)
	_, err = th.Consume("a", throttler.AtMost(500))
	require.NoError(t, err)
	assert.Equal(t, []int64{3, 3, 3, 500}, costs, "taken, given back, taken, asked for and denied")
}

func TestALaterOptionReplacesAtMost(t *testing.T) {
	t.Parallel()
	th := reserver(t, throttler.NewBucket(time.Hour, 3))
	_, err := th.Consume("a", throttler.AtMost(5), throttler.Cost(5))
	require.ErrorIs(t, err, throttler.ErrCostExceedsCapacity)
}

// waits records the results of calls of Wait, and when they came.
type waits struct {
	mu    sync.Mutex
	start time.Time
	log   []string
}

func (w *waits) note(what any, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	text := "ok"
	if err != nil {
		text = "left"
	}
	w.log = append(w.log, fmt.Sprint(what, " ", text, " at ", time.Since(w.start)))
}

// said returns the results so far, once all goroutines of the bubble are blocked.
func (w *waits) said() []string {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.log)
}

func (w *waits) last() string {
	all := w.said()
	return all[len(all)-1]
}

func (w *waits) begin(ctx context.Context, th *throttler.Throttler, id string, what any) {
	go func() {
		_, err := th.Wait(ctx, id)
		w.note(what, err)
	}()
	synctest.Wait()
}
