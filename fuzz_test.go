package throttler_test

import (
	"errors"
	"math"
	"math/big"
	"testing"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
)

// shaped returns a bucket made by fuzzed modifiers, applied in either order.
func shaped(period, capacity, burst int64, name string, shape uint8) throttler.Bucket {
	b := throttler.NewBucket(time.Duration(period), capacity)
	if shape&8 != 0 {
		b = b.Burst(burst)
	}
	switch shape & 7 {
	case 1:
		b = b.Continuous()
	case 2:
		b = b.FixedWindow()
	case 3:
		b = b.SlidingWindow()
	case 4:
		b = b.SlidingLog()
	}
	if shape&16 != 0 {
		b = b.Burst(burst)
	}
	if shape&32 != 0 {
		b = b.Named(name)
	}
	return b
}

// FuzzBucket checks that any modifiers make either a bucket that works or a BucketError.
func FuzzBucket(f *testing.F) {
	f.Add(int64(10*time.Second), int64(5), int64(1), "b", uint8(0))
	f.Add(int64(time.Second), int64(10), int64(20), "", uint8(1|8))
	f.Add(int64(366*24*time.Hour), int64(math.MaxInt64), int64(math.MinInt64), "a\x00", uint8(3|32))
	f.Add(int64(999), int64(0), int64(1<<51), "\xff", uint8(4|16|32))
	f.Add(int64(1500), int64(1<<51-1), int64(0), "5/10s", uint8(2))
	f.Add(int64(1148), int64(0), int64(0), "0", uint8(32))
	f.Fuzz(func(t *testing.T, period, capacity, burst int64, name string, shape uint8) {
		b := shaped(period, capacity, burst, name, shape)
		th, err := throttler.New(throttler.Config{Clock: clock.NewMock(), Buckets: []throttler.Bucket{b}})
		if err != nil {
			var fault *throttler.BucketError
			require.ErrorAs(t, err, &fault)
			require.NotEmpty(t, fault.Field)
			require.NotEmpty(t, fault.Reason)
			return
		}
		v, err := th.Consume("a", throttler.Cost(b.Capacity()))
		require.NoError(t, err)
		require.True(t, v.Allowed, "a new bucket is full")
		require.Zero(t, v.Levels()[0].Remaining)
		require.Equal(t, b.Capacity(), v.Levels()[0].Limit)
		if b.Capacity() == 0 {
			_, err = th.Consume("a")
			require.ErrorIs(t, err, throttler.ErrCostExceedsCapacity)
			return
		}
		require.GreaterOrEqual(t, v.Levels()[0].ResetAfter, time.Microsecond)
		require.NoError(t, th.Refund(t.Context(), v))
		v, err = th.Peek(t.Context(), "a", throttler.Cost(0))
		require.NoError(t, err)
		require.Equal(t, b.Capacity(), v.Levels()[0].Remaining, "all of it was given back")
	})
}

// FuzzConsume checks that any costs and identifiers are decided or give a typed error, that never more than the capacity is
// taken at one moment, and that nothing panics.
func FuzzConsume(f *testing.F) {
	f.Add("user:42", int64(1), int64(1), int64(5), uint8(0))
	f.Add("", int64(-1), int64(math.MaxInt64), int64(math.MaxInt64), uint8(1))
	f.Add("\x00\xff{}:*", int64(math.MaxInt64), int64(0), int64(1<<51-1), uint8(4))
	f.Add("a", int64(math.MinInt64), int64(3), int64(2), uint8(3))
	f.Fuzz(func(t *testing.T, id string, cost, costOf, capacity int64, shape uint8) {
		a, b := shaped(int64(time.Second), capacity, 1, "", shape&7).Named("a"), throttler.NewBucket(time.Hour, 1<<50).Named("b")
		th, err := throttler.New(throttler.Config{Clock: clock.NewMock(), Buckets: []throttler.Bucket{a, b}})
		if err != nil {
			return
		}
		taken := new(big.Int)
		for range 3 {
			v, err := th.Consume(id, throttler.Cost(cost), throttler.CostOf("b", costOf))
			typed := errors.Is(err, throttler.ErrInvalidIdentifier) || errors.Is(err, throttler.ErrInvalidCost) || errors.Is(err, throttler.ErrCostExceedsCapacity)
			require.True(t, err == nil || typed, "%v", err)
			if v.Allowed {
				taken.Add(taken, big.NewInt(cost))
			}
			if err := th.Charge(t.Context(), id, throttler.Cost(0), throttler.CostOf("b", costOf)); err != nil {
				require.True(t, errors.Is(err, throttler.ErrInvalidIdentifier) || errors.Is(err, throttler.ErrInvalidCost), "%v", err)
			}
		}
		require.LessOrEqual(t, taken.Cmp(big.NewInt(capacity)), 0)
	})
}
