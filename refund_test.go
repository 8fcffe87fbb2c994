package throttler_test

import (
	"context"
	"fmt"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
	memstore "github.com/go-throttler/throttler/storage/runtime"
)

// kinds has a modifier for each kind of bucket.
var kinds = []func(throttler.Bucket) throttler.Bucket{
	func(b throttler.Bucket) throttler.Bucket { return b },
	throttler.Bucket.Continuous, throttler.Bucket.FixedWindow, throttler.Bucket.SlidingWindow, throttler.Bucket.SlidingLog,
}

// callOfAModel is a call of a language model: it takes 1 request, 4,000 tokens and 4 cents.
func callOfAModel(t *testing.T) (*throttler.Throttler, throttler.Verdict) {
	t.Helper()
	th, _ := throttled(t,
		throttler.NewBucket(time.Minute, 10).Named("requests"),
		throttler.NewBucket(time.Minute, 10_000).Continuous().Named("tokens"),
		throttler.NewBucket(24*time.Hour, 100).SlidingWindow().Named("cents"))
	v, err := th.Consume("user:42", throttler.CostOf("tokens", 4000), throttler.CostOf("cents", 4))
	require.NoError(t, err)
	require.True(t, v.Allowed)
	require.Equal(t, []int64{9, 6000, 96}, left(t, th, "user:42"))
	return th, v
}

func TestARefundWithOptionsGivesBackWhatTheyName(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		options []throttler.Option
		left    []int64
	}{
		{nil, []int64{10, 10_000, 100}},
		{[]throttler.Option{throttler.CostOf("tokens", 1000)}, []int64{9, 7000, 96}},
		{[]throttler.Option{throttler.CostOf("tokens", 1000), throttler.CostOf("cents", 1)}, []int64{9, 7000, 97}},
		{[]throttler.Option{throttler.CostOf("tokens", 0)}, []int64{9, 6000, 96}},
		{[]throttler.Option{throttler.Cost(1)}, []int64{10, 6001, 97}},
		{[]throttler.Option{throttler.Cost(0), throttler.CostOf("cents", 4)}, []int64{9, 6000, 100}},
		{[]throttler.Option{throttler.CostOf("cents", 4), throttler.Cost(1)}, []int64{10, 6001, 100}},
	} {
		th, v := callOfAModel(t)
		require.NoError(t, th.Refund(t.Context(), v, test.options...))
		assert.Equal(t, test.left, left(t, th, "user:42"), "%+v", test.options)
	}
}

func TestAChargeThatIsNotRecordedWholeSaysSo(t *testing.T) {
	t.Parallel()
	for _, kind := range kinds {
		th, _ := throttled(t, kind(throttler.NewBucket(time.Minute, 10_000)).Named("tokens"), throttler.NewBucket(time.Hour, 1_000_000).Named("hourly"))
		err := th.Charge(t.Context(), "user:42", throttler.Cost(200_000))
		var debt *throttler.DebtError
		require.ErrorAs(t, err, &debt)
		require.ErrorIs(t, err, throttler.ErrDebtLimit)
		assert.Equal(t, throttler.DebtError{Identifier: "user:42", Bucket: "tokens", Asked: 200_000, Recorded: 40_000, Limit: 40_000}, *debt)
		assert.Contains(t, err.Error(), `40000 are recorded`)
		assert.Equal(t, []int64{0, 800_000}, left(t, th, "user:42"))

		v, err := th.Peek(t.Context(), "user:42")
		require.NoError(t, err)
		assert.Equal(t, int64(30_000), v.Levels()[0].Debt, "the level tells the debt")
		assert.Zero(t, v.Levels()[1].Debt)

		err = th.Charge(t.Context(), "user:42", throttler.CostOf("hourly", 0))
		require.ErrorAs(t, err, &debt)
		assert.Zero(t, debt.Recorded, "there is no room left")
		require.NoError(t, th.Charge(t.Context(), "user:42", throttler.CostOf("tokens", 0)), "the other bucket has room")
	}
}

func TestAChargeThatFitsExactlyIsNoError(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(time.Minute, 10))
	require.NoError(t, th.Charge(t.Context(), "user:42", throttler.Cost(39)))
	require.NoError(t, th.Charge(t.Context(), "user:42"))
	var debt *throttler.DebtError
	require.ErrorAs(t, th.Charge(t.Context(), "user:42", throttler.Cost(2)), &debt)
	assert.Zero(t, debt.Recorded)
}

func TestAChargeUnderASmallerLimitForgetsNothing(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(time.Minute, 100).Named("b"))
	_, err := th.Consume("user:42", throttler.Cost(100))
	require.NoError(t, err)
	small := throttler.Using(throttler.NewBucket(time.Minute, 10).Named("b"))
	var debt *throttler.DebtError
	require.ErrorAs(t, th.Charge(t.Context(), "user:42", throttler.Cost(5), small), &debt)
	assert.Zero(t, debt.Recorded)
	v, err := th.Peek(t.Context(), "user:42", throttler.Cost(0), small)
	require.NoError(t, err)
	assert.Equal(t, int64(90), v.Levels()[0].Debt)
	assert.Equal(t, []int64{0}, left(t, th, "user:42"))
}

// A sliding window's tokens are refunded in full, although the bucket is full before they have faded completely.
func TestARefundFindsTheHoldOfItsKind(t *testing.T) {
	t.Parallel()
	for _, kind := range kinds {
		th, clock := throttled(t, kind(throttler.NewBucket(10*time.Second, 1000)))
		clock.Add(7 * time.Second)
		v, err := th.Consume("user:42")
		require.NoError(t, err)
		other, err := th.Consume("user:42", throttler.Cost(2))
		require.NoError(t, err)
		clock.Add(2 * time.Second)
		require.NoError(t, th.Refund(t.Context(), other))
		require.NoError(t, th.Refund(t.Context(), v))
		assert.Equal(t, []int64{1000}, left(t, th, "user:42"))
	}
}

func TestACostAboveACapacityComesWithTheLevels(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(time.Minute, 10))
	v, err := th.Consume("user:42", throttler.Cost(11))
	require.ErrorIs(t, err, throttler.ErrCostExceedsCapacity)
	require.ErrorContains(t, err, `"user:42"`)
	require.False(t, v.Allowed)
	require.Len(t, v.Levels(), 1)
	assert.Equal(t, int64(10), v.Levels()[0].Remaining)
	v, err = th.ConsumeAll(t.Context(), throttler.For("user:42", throttler.Cost(3)), throttler.For("org:7", throttler.Cost(11)))
	require.ErrorIs(t, err, throttler.ErrCostExceedsCapacity)
	require.Len(t, v.Levels(), 2)
	assert.Equal(t, "org:7", v.Levels()[1].Identifier)
	assert.Equal(t, []int64{10}, left(t, th, "user:42"))
}

// asked is a storage that remembers whom it was asked about.
type asked struct {
	*memstore.Storage
	about []string
}

func (s *asked) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	for _, p := range r.Parts {
		s.about = append(s.about, p.Identifier)
	}
	return s.Storage.Decide(ctx, r, a)
}

func TestACostAboveACapacityBesideAWrongIdentifierAsksNoStorage(t *testing.T) {
	t.Parallel()
	for _, wrong := range []string{"", strings.Repeat("x", 1025)} {
		store := &asked{Storage: memstore.New(nil)}
		th, err := throttler.New(throttler.Config{Storage: store, Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 1)}})
		require.NoError(t, err)
		v, err := th.ConsumeAll(t.Context(), throttler.For("a", throttler.Cost(2)), throttler.For(wrong))
		require.ErrorIs(t, err, throttler.ErrCostExceedsCapacity)
		assert.Empty(t, v.Levels())
		assert.Empty(t, store.about)
	}
}

func TestWhatIsGivenBackWithoutAVerdictIsAtMostWhatWasSpent(t *testing.T) {
	t.Parallel()
	for _, kind := range kinds {
		th, _ := throttled(t, kind(throttler.NewBucket(time.Hour, 10)).Named("a"), kind(throttler.NewBucket(2*time.Hour, 20)).Named("b"))
		require.NoError(t, th.GiveBack(t.Context(), "user:42", throttler.Cost(3)))
		assert.Equal(t, []int64{10, 20}, left(t, th, "user:42"), "nothing was spent")
		for range 3 {
			_, err := th.Consume("user:42", throttler.Cost(2))
			require.NoError(t, err)
		}
		require.NoError(t, th.GiveBack(t.Context(), "user:42", throttler.Cost(3), throttler.CostOf("b", 1)))
		assert.Equal(t, []int64{7, 15}, left(t, th, "user:42"))
		require.NoError(t, th.GiveBack(t.Context(), "user:7", throttler.Cost(3)))
		assert.Equal(t, []int64{7, 15}, left(t, th, "user:42"), "it was of somebody else")
		require.NoError(t, th.GiveBack(t.Context(), "user:42", throttler.Cost(math.MaxInt64)))
		assert.Equal(t, []int64{10, 20}, left(t, th, "user:42"), "a bucket is never more than full")
		require.NoError(t, th.Charge(t.Context(), "user:42", throttler.Cost(15)))
		require.NoError(t, th.GiveBack(t.Context(), "user:42", throttler.Cost(6)))
		assert.Equal(t, []int64{1, 11}, left(t, th, "user:42"), "of a debt too")
		require.ErrorIs(t, th.GiveBack(t.Context(), "user:42", throttler.Cost(-1)), throttler.ErrInvalidCost)
		require.ErrorIs(t, th.GiveBack(t.Context(), ""), throttler.ErrInvalidIdentifier)
	}
}

func TestWhatIsGivenBackWithoutAVerdictHasNotComeBackByItself(t *testing.T) {
	t.Parallel()
	for i, kind := range kinds {
		th, clock := throttled(t, kind(throttler.NewBucket(time.Hour, 10)))
		_, err := th.Consume("user:42", throttler.Cost(4))
		require.NoError(t, err)
		clock.Add(3*time.Hour + 7*time.Minute)
		for _, n := range []int64{1, 9} {
			_, err = th.Consume("user:42", throttler.Cost(n))
			require.NoError(t, err)
			require.NoError(t, th.GiveBack(t.Context(), "user:42", throttler.Cost(9)))
			require.Equal(t, []int64{10}, left(t, th, "user:42"), i)
		}
	}
}

func TestWhatIsGivenBackIsFoundThoughTheAnswerOfTheLookIsLate(t *testing.T) {
	t.Parallel()
	for i, kind := range kinds {
		synctest.Test(t, func(t *testing.T) {
			store := &late{Storage: memstore.New(nil)}
			store.takes.Store(int64(10 * time.Millisecond))
			th, err := throttler.New(throttler.Config{Storage: store, Buckets: []throttler.Bucket{kind(throttler.NewBucket(time.Second, 10))}})
			require.NoError(t, err)
			_, err = th.Consume("user:42", throttler.Cost(8))
			require.NoError(t, err)
			require.NoError(t, th.GiveBack(t.Context(), "user:42", throttler.Cost(3)))
			assert.Equal(t, []int64{5}, left(t, th, "user:42"), i)
		})
	}
}

func TestWhatIsGivenBackIsTold(t *testing.T) {
	t.Parallel()
	var told []string
	th, err := throttler.New(throttler.Config{
		Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 10)},
		Observe: func(_ context.Context, e *throttler.Event) {
			for l, cost := range e.Buckets() {
				told = append(told, fmt.Sprint(e.Op, " ", e.Cost, " ", l.Remaining, " ", cost, " ", e.Err))
			}
		},
	})
	require.NoError(t, err)
	_, err = th.Consume("user:42", throttler.Cost(4))
	require.NoError(t, err)
	require.NoError(t, th.GiveBack(t.Context(), "user:42", throttler.Cost(3)))
	assert.Equal(t, []string{"consume 4 6 4 <nil>", "refund 3 6 3 <nil>"}, told)
}

func TestAGiveBackThatFailsIsToldWithItsTokens(t *testing.T) {
	t.Parallel()
	th, seen := watched(t, throttler.Config{
		Storage: failing{err: throttler.ErrUnavailable}, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 10)},
	})
	require.ErrorIs(t, th.GiveBack(t.Context(), "user:42", throttler.Cost(3)), throttler.ErrUnavailable)
	require.Len(t, *seen, 1)
	assert.Equal(t, int64(3), (*seen)[0].Cost)
	assert.Equal(t, "error", (*seen)[0].Result())
}
