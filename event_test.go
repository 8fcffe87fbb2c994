package throttler_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	memstore "github.com/go-throttler/throttler/storage/runtime"
)

// watched returns a Throttler and the events that it has reported.
func watched(t *testing.T, c throttler.Config) (*throttler.Throttler, *[]throttler.Event) {
	t.Helper()
	var mu sync.Mutex
	seen := new([]throttler.Event)
	c.Observe = func(_ context.Context, e *throttler.Event) {
		mu.Lock()
		defer mu.Unlock()
		*seen = append(*seen, *e)
	}
	th, err := throttler.New(c)
	require.NoError(t, err)
	return th, seen
}

// told returns each event in a few words.
func told(events []throttler.Event) (out []string) {
	for _, e := range events {
		s := fmt.Sprint(e.Op, " ", e.Attempt, " ", e.Identifier, " cost ", e.Cost, " allowed ", e.Verdict.Allowed)
		if e.Bucket != "" {
			s += " denied by " + e.Bucket
		}
		if e.Err != nil {
			s += " failed"
		}
		out = append(out, s)
	}
	return out
}

func TestObserveIsToldEachDecisionOnce(t *testing.T) {
	t.Parallel()
	th, seen := watched(t, throttler.Config{
		Name: "api", Clock: clock.NewMock(),
		Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 3).Named("short"), throttler.NewBucket(time.Hour, 4).Named("long")},
	})
	v, _ := th.Consume("a", throttler.CostOf("long", 2))
	_, _ = th.Consume("a", throttler.Cost(3))
	_, _ = th.Peek(t.Context(), "a")
	_ = th.Charge(t.Context(), "a")
	_ = th.Refund(t.Context(), v)
	_ = th.Refund(t.Context(), v, throttler.Cost(9))
	_ = th.Reset(t.Context(), "a")
	_, _ = th.Consume("")
	_, _ = th.Consume("a", throttler.Cost(-1))
	_, _ = th.ConsumeAll(t.Context(), throttler.For("a", throttler.Cost(3)), throttler.For("b"))
	_, _ = th.ConsumeAll(t.Context(), throttler.For("b"), throttler.For("a"))
	for _, e := range *seen {
		assert.Equal(t, "api", e.Name)
		assert.GreaterOrEqual(t, e.Duration, time.Duration(0))
	}
	assert.Equal(t, []string{
		"consume 0 a cost 2 allowed true",
		"consume 0 a cost 3 allowed false denied by long",
		"peek 0 a cost 1 allowed true",
		"charge 0 a cost 1 allowed true",
		"refund 0 a cost 2 allowed true",
		"refund 0 a cost 0 allowed false failed",
		"reset 0 a cost 0 allowed false",
		"consume 0  cost 0 allowed false failed",
		"consume 0 a cost 0 allowed false failed",
		"consume 0 a cost 3 allowed true",
		"consume 0 a cost 1 allowed false denied by short",
	}, told(*seen))
	assert.Equal(t, memstore.Source, (*seen)[0].Verdict.Source())
}

func TestAWaitIsToldOnceBesideItsAttempts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, seen := watched(t, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 1).Named("b")}})
		require.True(t, allowed(t, th, "a"))
		_, err := th.Wait(t.Context(), "a")
		require.NoError(t, err)
		assert.Equal(t, []string{
			"consume 0 a cost 1 allowed true",
			"consume 1 a cost 1 allowed false denied by b",
			"consume 2 a cost 1 allowed true",
			"wait 0 a cost 1 allowed true",
		}, told(*seen))
		assert.Zero(t, (*seen)[2].Duration)
		assert.Equal(t, time.Second, (*seen)[3].Duration, "from the beginning")
	})
}

func TestAWaitThatGivesUpIsToldWithTheDenial(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, seen := watched(t, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 1).Named("b")}})
		require.True(t, allowed(t, th, "a"))
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, err := th.Wait(ctx, "a")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		_, err = th.Wait(t.Context(), "")
		require.ErrorIs(t, err, throttler.ErrInvalidIdentifier)
		assert.Equal(t, []string{
			"consume 1 a cost 1 allowed false denied by b",
			"wait 0 a cost 1 allowed false denied by b failed",
			"consume 1  cost 0 allowed false failed",
			"wait 0  cost 0 allowed false failed",
		}, told((*seen)[1:]))
		require.ErrorIs(t, (*seen)[2].Err, context.DeadlineExceeded)
	})
}

// A gauge of those who wait counts the first attempt up and the end down.
func TestAWaitThatFindsTheLineFullHasAnAttemptThatSaysSo(t *testing.T) {
	t.Parallel()
	for _, b := range []throttler.Bucket{throttler.NewBucket(time.Hour, 1).Named("b"), throttler.NewBucket(time.Hour, 1).Continuous().Named("b")} {
		synctest.Test(t, func(t *testing.T) {
			th, seen := watched(t, throttler.Config{MaxWaiters: 1, Buckets: []throttler.Bucket{b}})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			require.True(t, allowed(t, th, "a"))
			go func() { _, _ = th.Wait(ctx, "a") }()
			synctest.Wait()
			before := len(*seen)
			_, err := th.Wait(t.Context(), "a")
			require.ErrorIs(t, err, throttler.ErrTooManyWaiters)
			assert.Equal(t, []string{"consume 1 a cost 0 allowed false failed", "wait 0 a cost 0 allowed false failed"}, told((*seen)[before:]))
			before = len(*seen)
			_, err = th.WaitAll(t.Context(), throttler.For("b"), throttler.For("a"))
			require.ErrorIs(t, err, throttler.ErrTooManyWaiters)
			assert.Equal(t, []string{"consume 1 a cost 0 allowed false failed", "wait 0 b cost 0 allowed false failed"}, told((*seen)[before:]))
			cancel()
			synctest.Wait()
		})
	}
}

func TestTheLookOfAWaitThatQueuesIsItsFirstAttempt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, seen := watched(t, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 1).Named("b")}})
		require.True(t, allowed(t, th, "a"))
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second) // without a deadline a Wait does not peek
		defer cancel()
		for range 2 {
			go func() { _, _ = th.Wait(ctx, "a") }()
			synctest.Wait()
		}
		<-time.After(2 * time.Second)
		synctest.Wait()
		assert.Equal(t, []string{
			"consume 1 a cost 1 allowed false denied by b",
			"peek 1 a cost 1 allowed false denied by b",
		}, told((*seen)[1:3]))
		var waits []time.Duration
		for _, e := range *seen {
			if e.Op == throttler.OpWait {
				waits = append(waits, e.Duration)
			}
		}
		assert.Equal(t, []time.Duration{time.Second, 2 * time.Second}, waits)
		assert.Equal(t, "consume 3 a cost 1 allowed true", told(*seen)[len(*seen)-2], "after the look and a denial")
	})
}

// buckets returns what an event says about each bucket.
func buckets(e *throttler.Event) (out []string) {
	for l, cost := range e.Buckets() {
		s := fmt.Sprint(l.Identifier, " ", l.Bucket, " asked ", cost)
		if l.RetryAfter > 0 {
			s += fmt.Sprint(" denied for ", l.RetryAfter)
		}
		out = append(out, s)
	}
	return out
}

func TestAnEventTellsEachBucketThatDeniedAndAllCosts(t *testing.T) {
	t.Parallel()
	th, seen := watched(t, throttler.Config{Clock: clock.NewMock(), Buckets: []throttler.Bucket{
		throttler.NewBucket(time.Second, 1).Named("s"), throttler.NewBucket(time.Minute, 2).Named("m"), throttler.NewBucket(time.Hour, 9).Named("h"),
	}})
	_, _ = th.Consume("a", throttler.CostOf("m", 2), throttler.CostOf("h", 5))
	_, _ = th.ConsumeAll(t.Context(), throttler.For("b", throttler.Cost(0)), throttler.For("a", throttler.CostOf("h", 4)))
	assert.Equal(t, []string{"a s asked 1", "a m asked 2", "a h asked 5"}, buckets(&(*seen)[0]))
	assert.Equal(t, []string{
		"b s asked 0", "b m asked 0", "b h asked 0", "a s asked 1 denied for 1s", "a m asked 1 denied for 1m0s", "a h asked 4",
	}, buckets(&(*seen)[1]))
}

func TestARefundIsToldForEachIdentifierWithWhatWasGivenBack(t *testing.T) {
	t.Parallel()
	th, seen := watched(t, throttler.Config{Clock: clock.NewMock(), Buckets: []throttler.Bucket{
		throttler.NewBucket(time.Minute, 9).Named("m"), throttler.NewBucket(time.Hour, 9).Named("h"),
	}})
	v, err := th.ConsumeAll(t.Context(), throttler.For("a", throttler.Cost(5)), throttler.For("b", throttler.Cost(4)))
	require.NoError(t, err)
	require.NoError(t, th.Refund(t.Context(), v, throttler.CostOf("h", 3)))
	require.Len(t, *seen, 3)
	assert.Equal(t, []string{"a m asked 0", "a h asked 3"}, buckets(&(*seen)[1]))
	assert.Equal(t, []string{"b m asked 0", "b h asked 3"}, buckets(&(*seen)[2]))
}

func TestWhatAPolicyLetsPassIsBypassed(t *testing.T) {
	t.Parallel()
	down := failing{err: throttler.ErrUnavailable}
	b := []throttler.Bucket{throttler.NewBucket(time.Hour, 9)}
	for name, c := range map[string]struct {
		config           throttler.Config
		bypassed, failed bool
	}{
		"nobody knows it":          {throttler.Config{OnUnknownIdentifier: throttler.Allow}, true, false},
		"the storage is down":      {throttler.Config{Storage: down, Buckets: b, OnStorageError: throttler.Allow}, true, true},
		"down, and it is denied":   {throttler.Config{Storage: down, Buckets: b}, false, true},
		"nobody, and it is denied": {throttler.Config{}, false, true},
		"a bucket admits":          {throttler.Config{Buckets: b}, false, false},
	} {
		th, seen := watched(t, c.config)
		_, _ = th.Consume("a")
		require.Len(t, *seen, 1, name)
		assert.Equal(t, c.bypassed, (*seen)[0].Bypassed(), name)
		assert.Equal(t, c.failed, (*seen)[0].Err != nil, name)
		_, _ = th.Wait(t.Context(), "a")
		assert.Equal(t, c.bypassed, (*seen)[2].Bypassed(), name)
	}
}

func TestTheResultAndTheErrorTypeOfAnEvent(t *testing.T) {
	t.Parallel()
	unanswered := throttler.Config{Storage: failing{err: fmt.Errorf("%w: %w", throttler.ErrUnavailable, context.DeadlineExceeded)}}
	allowing := throttler.Config{OnUnknownIdentifier: throttler.Allow}
	one := throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1)}, Clock: clock.NewMock()}
	unanswered.Buckets = one.Buckets
	over, charged := &throttler.DebtError{}, throttler.Cost(9)
	for want, c := range map[string]struct {
		config throttler.Config
		call   func(*throttler.Throttler)
	}{
		"allowed ":                    {one, func(l *throttler.Throttler) { _, _ = l.Consume("a") }},
		"denied ":                     {one, func(l *throttler.Throttler) { _, _ = l.Consume("a"); _, _ = l.Consume("a") }},
		"bypassed ":                   {allowing, func(l *throttler.Throttler) { _, _ = l.Consume("a") }},
		"allowed  of a reset":         {one, func(l *throttler.Throttler) { _ = l.Reset(t.Context(), "a") }},
		"allowed  of a charge":        {one, func(l *throttler.Throttler) { _ = l.Charge(t.Context(), "a", throttler.Cost(2)) }},
		"denied cancelled":            {one, func(l *throttler.Throttler) { _, _ = l.Wait(canceled(t), "a") }},
		"error cancelled":             {one, func(l *throttler.Throttler) { _, _ = l.ConsumeContext(canceled(t), "a") }},
		"error unavailable":           {unanswered, func(l *throttler.Throttler) { _, _ = l.Consume("a") }},
		"error unknown_identifier":    {throttler.Config{}, func(l *throttler.Throttler) { _, _ = l.Consume("a") }},
		"error debt_limit":            {one, func(l *throttler.Throttler) { assert.ErrorAs(t, l.Charge(t.Context(), "a", charged), &over) }},
		"error invalid":               {one, func(l *throttler.Throttler) { _, _ = l.Consume("a", throttler.Cost(-1)) }},
		"error invalid of CostOf":     {one, func(l *throttler.Throttler) { _, _ = l.Consume("a", throttler.CostOf("none", 1)) }},
		"error invalid of Reserve":    {one, func(l *throttler.Throttler) { _, _ = l.Reserve(t.Context(), "a", -1) }},
		"error cost_exceeds_capacity": {one, func(l *throttler.Throttler) { _, _ = l.Consume("a", throttler.Cost(2)) }},
		"error other":                 {one, func(l *throttler.Throttler) { l.Report(t.Context(), "a", errors.New("nobody")) }},
	} {
		th, seen := watched(t, c.config)
		c.call(th)
		e := (*seen)[len(*seen)-1]
		want, _, _ = strings.Cut(want, " of ")
		assert.Equal(t, want, e.Result()+" "+e.ErrorType())
	}
}

func TestAnEventHasNothingOfTheOneBefore(t *testing.T) {
	th, seen := watched(t, throttler.Config{Clock: clock.NewMock(), Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 5)}})
	full := func() {
		v, err := th.Consume("a", throttler.Cost(5))
		require.NoError(t, err)
		_, _ = th.Wait(canceled(t), "a")
		_, _ = th.Consume("a")
		require.NoError(t, th.Refund(t.Context(), v))
	}
	other, of := watched(t, throttler.Config{Name: "other", OnUnknownIdentifier: throttler.Allow})
	for range 20 { // the pool reuses a processor's last event for its next one, except under the race detector
		full()
		require.NoError(t, other.Reset(t.Context(), "b"))
		full()
		_, _ = other.Consume("b")
		full()
		other.Report(t.Context(), "b", errors.New("no"))
	}
	require.NotEmpty(t, *seen)
	for i, e := range *of {
		e.Duration, e.Time = 0, time.Time{}
		if e.Verdict.Allowed {
			require.EqualValues(t, 1, e.Verdict.Tokens(), "without a limit it is the cost")
			e.Verdict = throttler.Verdict{Allowed: true}
		}
		want := []throttler.Event{
			{Name: "other", Op: throttler.OpReset, Identifier: "b"},
			{Name: "other", Op: throttler.OpConsume, Identifier: "b", Verdict: throttler.Verdict{Allowed: true}},
			{Name: "other", Op: throttler.OpConsume, Identifier: "b", Err: errors.New("no")},
		}[i%3]
		require.Equal(t, want, e)
	}
}

func canceled(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

func TestObserversAreCalledInOrder(t *testing.T) {
	t.Parallel()
	var calls []string
	observer := func(name string) func(context.Context, *throttler.Event) {
		return func(_ context.Context, e *throttler.Event) { calls = append(calls, name+" "+e.Identifier) }
	}
	for _, observe := range []func(context.Context, *throttler.Event){
		throttler.Observers(observer("1"), nil, observer("2")), throttler.Observers(nil, observer("3")),
	} {
		th, err := throttler.New(throttler.Config{Observe: observe, OnUnknownIdentifier: throttler.Allow})
		require.NoError(t, err)
		_, err = th.Consume("a")
		require.NoError(t, err)
	}
	assert.Equal(t, []string{"1 a", "2 a", "3 a"}, calls)
	assert.Nil(t, throttler.Observers())
	assert.Nil(t, throttler.Observers(nil, nil))
}

func TestAnObservedDecisionAllocatesNothing(t *testing.T) {
	var denials, tokens int64
	th, err := throttler.New(throttler.Config{
		Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 500).Named("a"), throttler.NewBucket(time.Hour, 700).Named("b"), throttler.NewBucket(time.Hour, 1<<40).Named("c")},
		Observe: func(_ context.Context, e *throttler.Event) {
			for l, cost := range e.Buckets() {
				if tokens += cost; l.RetryAfter > 0 {
					denials++
				}
			}
		},
	})
	require.NoError(t, err)
	assert.Zero(t, testing.AllocsPerRun(1000, func() { _, _ = th.Consume("user:42") }))
	assert.Zero(t, testing.AllocsPerRun(1000, func() { _, _ = th.Consume("user:42", throttler.CostOf("b", 500)) }))
	assert.Positive(t, denials)
	assert.Positive(t, tokens)
}

func TestAnEventHasTheTimeAtItsEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var ended []time.Time
		one, err := throttler.New(throttler.Config{
			Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 1)},
			Observe: func(_ context.Context, e *throttler.Event) { ended = append(ended, e.Time.Add(-e.Duration), e.Time) },
		})
		require.NoError(t, err)
		start := time.Now()
		for range 2 {
			_, err = one.Wait(t.Context(), "a")
			require.NoError(t, err)
		}
		_, err = one.Consume("") // rejected before it is asked
		require.Error(t, err)
		var after []time.Duration
		for _, at := range ended {
			after = append(after, at.Sub(start))
		}
		second := time.Second
		require.Equal(t, []time.Duration{0, 0, 0, 0, 0, 0, second, second, 0, second, second, second}, after)
	})
}
