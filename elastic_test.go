package throttler_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	memstore "github.com/go-throttler/throttler/storage/runtime"
)

// share is a Load that a test sets.
type share struct{ bits atomic.Uint64 }

func (s *share) set(f float64) { s.bits.Store(math.Float64bits(f)) }
func (s *share) load() float64 { return math.Float64frombits(s.bits.Load()) }

// elastic returns a Throttler with a mock clock and a Load, which is 1.
func elastic(t testing.TB, b ...throttler.Bucket) (*throttler.Throttler, *share, *clock.Mock) {
	t.Helper()
	s, mock := &share{}, clock.NewMock()
	s.set(1)
	th, err := throttler.New(throttler.Config{Load: s.load, Clock: mock, Buckets: b})
	require.NoError(t, err)
	return th, s, mock
}

func levels(t *testing.T, th *throttler.Throttler, id string, o ...throttler.Option) []throttler.Level {
	t.Helper()
	v, err := th.Peek(t.Context(), id, append(o, throttler.Cost(0))...)
	require.NoError(t, err)
	return v.Levels()
}

func TestAnElasticBucketHasItsShare(t *testing.T) {
	t.Parallel()
	second := throttler.NewBucket(time.Second, 100)
	for name, b := range map[string]throttler.Bucket{
		"replenish": second, "continuous": second.Continuous(), "fixed": second.FixedWindow(), "sliding": second.SlidingWindow(), "log": second.SlidingLog(),
	} {
		th, s, _ := elastic(t, b.Elastic(5), throttler.NewBucket(time.Hour, 1000))
		for share, want := range map[float64]int64{
			1: 100, 0.5: 50, 0.51: 50, 0.25: 25, 0.02: 5, 0: 5, 63.99 / 64: 98,
			2: 100, -1: 5, math.NaN(): 100, math.Inf(1): 100, math.Inf(-1): 5,
		} {
			s.set(share)
			got := levels(t, th, "user:42")
			assert.Equal(t, want, got[0].Limit, "%s at %v", name, share)
			assert.Equal(t, want, got[0].Remaining, "%s at %v", name, share)
			assert.EqualValues(t, 100, got[0].Full, "%s at %v", name, share)
			assert.EqualValues(t, 1000, got[1].Limit, "a bucket that is not elastic")
			assert.EqualValues(t, 1000, got[1].Full, "a bucket that is not elastic")
		}
	}
}

func TestARefillShrinksWithItsBucket(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		burst, least, share, perSecond, limit int64
	}{
		{100, 1, 32, 50, 50},
		{1, 1, 32, 50, 1}, // evenly spaced
		{200, 1, 16, 25, 50},
		{200, 30, 0, 30, 60},
		{100, 100, 0, 100, 100},
	} {
		th, s, mock := elastic(t, throttler.NewBucket(time.Second, 100).Continuous().Burst(c.burst).Elastic(c.least))
		s.set(float64(c.share) / 64)
		limit := levels(t, th, "user:42")[0].Limit
		require.Equal(t, c.limit, limit, c)
		require.True(t, allowed(t, th, "user:42", throttler.Cost(limit)), c)
		v, err := th.Consume("user:42")
		require.NoError(t, err)
		require.False(t, v.Allowed)
		assert.Equal(t, (time.Second/time.Duration(c.perSecond) + time.Microsecond - 1).Truncate(time.Microsecond), v.RetryAfter, c)
		mock.Add(v.RetryAfter - time.Microsecond)
		require.False(t, allowed(t, th, "user:42"), c)
		mock.Add(time.Microsecond)
		require.True(t, allowed(t, th, "user:42"), c)
	}
}

func TestWhatWasSpentStaysSpentWhileSharesChange(t *testing.T) {
	t.Parallel()
	for _, b := range []throttler.Bucket{throttler.NewBucket(time.Hour, 100), throttler.NewBucket(time.Hour, 100).Continuous(), throttler.NewBucket(time.Hour, 100).SlidingLog()} {
		th, s, _ := elastic(t, b.Elastic(1))
		require.True(t, allowed(t, th, "user:42", throttler.Cost(60)))
		s.set(0.75)
		assert.Equal(t, []int64{15}, left(t, th, "user:42"))
		s.set(0.5)
		assert.Equal(t, []int64{0}, left(t, th, "user:42"))
		assert.False(t, allowed(t, th, "user:42"))
		s.set(1)
		assert.Equal(t, []int64{40}, left(t, th, "user:42"))
	}
}

func TestElasticBucketsShrinkWhereverTheyAreFrom(t *testing.T) {
	t.Parallel()
	b := throttler.NewBucket(time.Second, 64).Elastic(1)
	th, s, _ := elastic(t, b)
	require.NoError(t, th.AddBucket("own", b.Named("api")))
	require.NoError(t, th.AddBucket("rigid", throttler.NewBucket(time.Second, 64).Named("api")), "of the same rules, and not elastic")
	require.NoError(t, th.AddBucket("small", throttler.NewBucket(time.Second, 32).Named("api")), "as the others are when they have shrunk")
	assert.EqualValues(t, 32, levels(t, th, "small")[0].Full)
	s.set(0.5)
	assert.EqualValues(t, 64, levels(t, th, "own")[0].Full)
	assert.EqualValues(t, 32, levels(t, th, "user:42")[0].Limit)
	assert.EqualValues(t, 32, levels(t, th, "own")[0].Limit)
	assert.EqualValues(t, 32, levels(t, th, "user:43", throttler.Using(b.Named("plan")))[0].Limit)
	assert.EqualValues(t, 64, levels(t, th, "rigid")[0].Limit)
	v, err := th.ConsumeAll(t.Context(), throttler.For("own"), throttler.For("user:44"))
	require.NoError(t, err)
	for _, l := range v.Levels() {
		assert.EqualValues(t, 32, l.Limit)
	}
}

func TestWithoutALoadNothingShrinks(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(time.Second, 64).Elastic(1))
	assert.EqualValues(t, 64, levels(t, th, "user:42")[0].Limit)
}

func TestACostAboveAShrunkCapacityIsDecidedByTheFullOne(t *testing.T) {
	t.Parallel()
	two := throttler.NewBucket(time.Hour, 64).Named("two").Elastic(1)
	th, s, _ := elastic(t, throttler.NewBucket(time.Hour, 100).Elastic(10), two)
	s.set(0)
	require.True(t, allowed(t, th, "user:42", throttler.Cost(10), throttler.CostOf("two", 1)), "by what it has")
	require.False(t, allowed(t, th, "user:42", throttler.Cost(10), throttler.CostOf("two", 0)))
	require.True(t, allowed(t, th, "user:42", throttler.Cost(11), throttler.CostOf("two", 0)), "by the full one")
	require.True(t, allowed(t, th, "user:42", throttler.Cost(10), throttler.CostOf("two", 2)), "all by the full ones")
	v, err := th.Consume("user:42", throttler.Cost(101), throttler.CostOf("two", 0))
	require.ErrorIs(t, err, throttler.ErrCostExceedsCapacity)
	assert.EqualValues(t, 100, v.Levels()[0].Limit)
}

func TestAChargeIsRecordedWholeWhileSharesAreSmall(t *testing.T) {
	t.Parallel()
	th, s, _ := elastic(t, throttler.NewBucket(time.Hour, 100).Continuous().Elastic(1))
	require.True(t, allowed(t, th, "user:42", throttler.Cost(80)))
	s.set(0)
	require.NoError(t, th.Charge(t.Context(), "user:42"))
	s.set(1)
	assert.Equal(t, []int64{19}, left(t, th, "user:42"))
}

func TestARefundOfAShrunkBucketGivesBackWhatItTook(t *testing.T) {
	t.Parallel()
	for _, b := range []throttler.Bucket{throttler.NewBucket(time.Hour, 100), throttler.NewBucket(time.Hour, 100).Continuous()} {
		th, s, _ := elastic(t, b.Elastic(1))
		s.set(0.5)
		v, err := th.Consume("user:42", throttler.Cost(20))
		require.NoError(t, err)
		s.set(1)
		require.NoError(t, th.Refund(t.Context(), v))
		assert.Equal(t, []int64{100}, left(t, th, "user:42"))
	}
}

func TestAnElasticBucketOfWrongLeastIsAFault(t *testing.T) {
	t.Parallel()
	for _, least := range []int64{-1, 0, 101} {
		_, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 100).Elastic(least).Continuous().Burst(1000)}})
		var fault *throttler.BucketError
		require.ErrorAs(t, err, &fault)
		assert.Equal(t, "Elastic", fault.Field)
		assert.Contains(t, err.Error(), fmt.Sprintf("of %d must be from 1 to 100", least))
	}
}

// Every call that is admitted while the share changes at random is also admitted by the full limits alone.
func TestTogglingSharesNeverAdmitsMoreThanTheFullLimits(t *testing.T) {
	t.Parallel()
	kinds := []func(throttler.Bucket) throttler.Bucket{
		func(b throttler.Bucket) throttler.Bucket { return b }, throttler.Bucket.Continuous, throttler.Bucket.FixedWindow,
		throttler.Bucket.SlidingWindow, throttler.Bucket.SlidingLog,
		func(b throttler.Bucket) throttler.Bucket { return b.Continuous().Burst(b.Capacity()/3 + 1) },
	}
	limits := []struct {
		period   time.Duration
		capacity int64
	}{{time.Second, 50}, {time.Second, 7}, {time.Minute, 1000}, {24 * time.Hour, 100_000}, {time.Hour, 1_000_003}, {1001 * time.Millisecond, 300}}
	for i, kind := range kinds {
		for j, l := range limits {
			rnd := rand.New(rand.NewPCG(uint64(i), uint64(j)))
			b := kind(throttler.NewBucket(l.period, l.capacity))
			s, now := &share{}, &setClock{now: time.Unix(1_700_000_000, 0)}
			th, err := throttler.New(throttler.Config{Load: s.load, Clock: now, Buckets: []throttler.Bucket{b.Elastic(1 + rnd.Int64N(l.capacity)/4)}})
			require.NoError(t, err)
			full, err := throttler.New(throttler.Config{Clock: now, Buckets: []throttler.Bucket{b}})
			require.NoError(t, err)
			admitted := 0
			for range 2000 {
				now.now = now.now.Add(time.Duration(rnd.Int64N(int64(l.period) / 20)))
				if rnd.IntN(3) == 0 {
					s.set(rnd.Float64() * 1.2)
				}
				cost := throttler.Cost(1 + rnd.Int64N(1+b.Capacity()/10))
				if rnd.IntN(20) == 0 {
					cost = throttler.Cost(b.Capacity())
				}
				if allowed(t, th, "user:42", cost) {
					admitted++
					require.True(t, allowed(t, full, "user:42", cost), "%s: call %d", b.Name(), admitted)
				}
			}
			require.Greater(t, admitted, 100, b.Name())
		}
	}
}

func TestADecisionByAShareAllocatesNothing(t *testing.T) {
	s := &share{}
	th, err := throttler.New(throttler.Config{Load: s.load, Buckets: []throttler.Bucket{
		throttler.NewBucket(time.Hour, 1<<40).Elastic(1), throttler.NewBucket(time.Hour, 1<<18).Continuous().Elastic(1),
	}})
	require.NoError(t, err)
	for _, share := range []float64{1, 0.5, 0} {
		s.set(share)
		assert.Equal(t, share > 0, allowed(t, th, "user:42"), share) // makes the rules of this share
		assert.Zero(t, testing.AllocsPerRun(1000, func() { _, _ = th.Consume("user:42") }), share)
	}
}

// Two processes share one state, and one of them is loaded and has half of the limits. Together they admit the full limits;
// the loaded one admits less of them, or nothing. docs/load.md has the figures.
func TestALoadedProcessLeavesASharedLimitToTheOthers(t *testing.T) {
	t.Parallel()
	second := throttler.NewBucket(time.Second, 100)
	for name, c := range map[string]struct {
		bucket throttler.Bucket
		loaded float64 // admissions a second, out of 100 for both
	}{
		"replenish": {second, 25}, "fixed": {second.FixedWindow(), 25},
		"continuous": {second.Continuous(), 0}, "sliding": {second.SlidingWindow(), 0}, "log": {second.SlidingLog(), 0},
	} {
		store, now, rnd := memstore.New(nil), &setClock{now: time.Unix(1_700_000_000, 0)}, rand.New(rand.NewPCG(1, 1))
		var processes [2]*throttler.Throttler
		for i, load := range []float64{1, 0.5} {
			th, err := throttler.New(throttler.Config{Storage: store, Clock: now, Load: func() float64 { return load }, Buckets: []throttler.Bucket{c.bucket.Elastic(1)}})
			require.NoError(t, err)
			processes[i] = th
		}
		const seconds = 20
		var admitted [2]float64
		for end := now.now.Add(seconds * time.Second); now.now.Before(end); now.now = now.now.Add(time.Duration(1+rnd.IntN(3000)) * time.Microsecond) {
			if i := rnd.IntN(2); allowed(t, processes[i], "user:42") {
				admitted[i] += 1.0 / seconds
			}
		}
		assert.InDelta(t, 100, admitted[0]+admitted[1], 5, name)
		assert.InDelta(t, c.loaded, admitted[1], 5, name)
	}
}

func TestAnUnlimitedBucketBesideAnElasticOneStaysOutOfIt(t *testing.T) {
	t.Parallel()
	th, s, _ := elastic(t, throttler.Unlimited(), throttler.NewBucket(time.Minute, 100).Elastic(10), throttler.NewBucket(time.Hour, 7).Named("fixed"))
	s.set(0.5)
	got := levels(t, th, "a")
	require.Len(t, got, 2)
	assert.Equal(t, int64(50), got[0].Limit)
	assert.Equal(t, int64(7), got[1].Limit)
}

func TestABucketOfNothingStaysThatBesideAnElasticOne(t *testing.T) {
	t.Parallel()
	second := throttler.NewBucket(time.Second, 64)
	none := throttler.NewBucket(time.Hour, 0)
	for _, b := range []throttler.Bucket{none, none.Continuous(), none.SlidingLog(), none.FixedWindow(), none.SlidingWindow()} {
		th, s, _ := elastic(t, second.Elastic(1), b)
		s.set(0.5)
		got := levels(t, th, "user:42")
		assert.EqualValues(t, 32, got[0].Limit)
		assert.EqualValues(t, 0, got[1].Limit, b.Name())
	}
}

func TestAtMostTakesNoMoreThanAShrunkBucketHas(t *testing.T) {
	t.Parallel()
	th, err := throttler.New(throttler.Config{
		Load: func() float64 { return 0 }, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 100).Elastic(10)},
	})
	require.NoError(t, err)
	v, err := th.Consume("a", throttler.AtMost(100))
	require.NoError(t, err)
	assert.EqualValues(t, 10, v.Tokens())
	v, err = th.Consume("a", throttler.AtMost(11))
	require.NoError(t, err)
	assert.False(t, v.Allowed)
	v, err = th.Consume("b", throttler.Cost(100))
	require.NoError(t, err)
	assert.True(t, v.Allowed, "a cost that only the full bucket can hold is not refused")
}

// The level that they have reserved drains faster then. That is neither a Reset nor a Refund by another process.
func TestWhoHasReservedKeepsItsTurnWhenTheShareGrows(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &share{}
		bucket := throttler.NewBucket(time.Minute, 60).Continuous().Burst(1).Elastic(30)
		th, err := throttler.New(throttler.Config{Load: s.load, Buckets: []throttler.Bucket{bucket}})
		require.NoError(t, err)
		w := &waits{start: time.Now()}
		for i := range 10 { // one every 2 s
			w.begin(t.Context(), th, "a", i)
		}
		s.set(1)
		for i := range 5 {
			<-time.After(time.Until(w.start.Add(time.Duration(2*i)*time.Second + time.Millisecond)))
			require.Len(t, w.said(), 1+i)
		}
		<-time.After(time.Until(w.start.Add(14 * time.Second)))
		assert.Len(t, w.said(), 10, "once the level is empty the rest asks by the larger limit")
	})
}
