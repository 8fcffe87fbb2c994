// Package storagetest proves a storage: that it decides as storage.Decide does, atomically.
//
// An author of a storage calls Run from a test of theirs:
//
//	func TestMyStorage(t *testing.T) {
//		storagetest.Run(t, func(tb testing.TB) storage.Storage { return mystorage.New(…) })
//	}
//
// The files in testdata are the specification of the arithmetic, to read and to run; their language
// is described in vectors.go.
package storagetest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/storage"
)

// Run tests the storages that open returns. It may return the same one each time, or several that
// share their data: each test keeps to a Config.Name of its own. Open cleans up by tb.Cleanup. Run it
// with the race detector, which finds what no answer shows.
func Run(t *testing.T, open func(testing.TB) storage.Storage) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, storage.Storage)
	}{
		{"decides every step of the vectors", vectors},
		{"agrees with Decide over random sequences", randomSequences},
		{"agrees with Decide when the clock goes back", randomClock},
		{"agrees with Decide over random charges and refunds", randomChanges},
		{"never denies the even client", evenClient},
		{"admits to who toggles plans what the largest admits", toggledPlans},
		{"keeps a bucket while the identifier uses another of its name", otherBuckets},
		{"admits exactly the limit to 200 goroutines", exactlyTheLimit},
		{"charges the second limit as often as the first admits", bothOrNeither},
		{"transfers in opposite orders without deadlock or partial charge", transfers},
		{"is linearizable", linearizable},
		{"takes any bytes as an identifier", identifierZoo},
		{"keeps no identifier in the memory of its caller", reusedMemory},
		{"reads no memory of a caller that has left", reusedMemoryEarly},
		{"refuses bad input and changes nothing", badInput},
		{"keeps names apart", namesApart},
		{"returns the error of a finished context and changes nothing", finishedContext},
		{"holds sixteen buckets of an identifier and no more", sixteenBuckets},
		{"uses a clock of its own when none is injected", ownClock},
		{"gives back by that clock while others take", refundsByOwnClock},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			test.run(t, open(t))
		})
	}
}

var (
	names atomic.Int64
	run   = time.Now().UnixNano()
)

// newName is a Config.Name that no other test has used, in this process or another.
func newName() string { return fmt.Sprintf("test-%x-%d", run, names.Add(1)) }

func rule(t testing.TB, name string, kind storage.Kind, period time.Duration, capacity, refill int64) storage.Rule {
	t.Helper()
	r, faults := storage.NewRule(name, kind, period, capacity, refill)
	require.NoError(t, errors.Join(faults...))
	return r
}

// request is for one part at a time by an injected clock.
func request(name string, at time.Duration, mode storage.Mode, p storage.Part) storage.Request {
	return storage.Request{Name: name, Mode: mode, Clocked: true, Now: at.Microseconds(), Part: p}
}

// remaining is what a Peek that asks for nothing tells of the first bucket.
func remaining(t testing.TB, s storage.Storage, name, id string, rules ...storage.Rule) []int64 {
	t.Helper()
	v, err := s.Decide(t.Context(), request(name, 0, storage.Peek, storage.NewPart(id, rules, 0)))
	require.NoError(t, err)
	var out []int64
	for _, l := range v.Levels() {
		out = append(out, l.Remaining)
	}
	return out
}

func identifierZoo(t *testing.T, s storage.Storage) {
	name, five := newName(), rule(t, "five", storage.Replenish, 10*time.Second, 5, 0)
	ids := []string{
		"\x00", "a\x00", "a\x00b", "\xff\xfe", "\xc3\x28", "{}:*", "{a}b", "{a}c", "a:b", "a", "b:a", ":", " ", "\n", "a\nb", "a\r\n",
		"%s", "'; DROP TABLE x; --", "日本", "\u00e9", "e\u0301", "A", strings.Repeat("x", storage.MaxIdentifier), strings.Repeat("x", storage.MaxIdentifier-1),
	}
	for i, id := range ids {
		_, err := s.Decide(t.Context(), request(name, 0, storage.Take, storage.NewPart(id, []storage.Rule{five}, int64(i%5+1))))
		require.NoError(t, err, "%q", id)
	}
	for i, id := range ids {
		assert.Equal(t, []int64{5 - int64(i%5+1)}, remaining(t, s, name, id, five), "%q met another identifier", id)
		require.NoError(t, s.Reset(t.Context(), name, id))
		assert.Equal(t, []int64{5}, remaining(t, s, name, id, five), "%q after Reset", id)
	}
}

func badInput(t *testing.T, s storage.Storage) {
	name, five := newName(), rule(t, "five", storage.Replenish, 10*time.Second, 5, 0)
	rules := []storage.Rule{five}
	var bucketError *storage.BucketError
	many := make([]storage.Rule, storage.MaxBuckets+1)
	for i := range many {
		many[i] = rule(t, fmt.Sprint("b", i), storage.Replenish, time.Second, 5, 0)
	}
	for _, bad := range []struct {
		part storage.Part
		is   error
	}{
		{storage.NewPart("", rules, 1), storage.ErrInvalidIdentifier},
		{storage.NewPart(strings.Repeat("x", storage.MaxIdentifier+1), rules, 1), storage.ErrInvalidIdentifier},
		{storage.NewPart("a", rules, -1), storage.ErrInvalidCost},
		{storage.NewPart("a", rules, -1<<63), storage.ErrInvalidCost},
		{storage.NewPart("a", rules, 6), storage.ErrCostExceedsCapacity},
		{storage.NewPart("a", rules, 1<<63-1), storage.ErrCostExceedsCapacity},
		{storage.NewPart("a", nil, 1), nil},
		{storage.NewPart("a", many, 1), nil},
	} {
		for _, mode := range []storage.Mode{storage.Take, storage.Peek} {
			_, err := s.Decide(t.Context(), request(name, 0, mode, bad.part))
			if bad.is != nil {
				require.ErrorIs(t, err, bad.is)
			} else {
				require.ErrorAs(t, err, &bucketError)
			}
		}
	}
	for _, now := range []int64{-1, -1 << 63, 1<<63 - 1} {
		_, err := s.Decide(t.Context(), storage.Request{Name: name, Clocked: true, Now: now, Part: storage.NewPart("a", rules, 1)})
		require.ErrorIs(t, err, storage.ErrInvalidClock)
		err = s.Charge(t.Context(), storage.Charge{Name: name, Clocked: true, Now: now, Identifier: "a", Rules: rules, Amounts: []storage.Amount{{N: 1, In: 1}}})
		require.ErrorIs(t, err, storage.ErrInvalidClock)
	}
	twice := request(name, 0, storage.Take, storage.NewPart("a", rules, 1))
	twice.More = []storage.Part{storage.NewPart("b", rules, 1), storage.NewPart("a", rules, 1)}
	_, err := s.Decide(t.Context(), twice)
	require.ErrorIs(t, err, storage.ErrInvalidIdentifier)
	crowd := request(name, 0, storage.Take, storage.NewPart("a", rules, 1))
	for i := range storage.MaxParts {
		crowd.More = append(crowd.More, storage.NewPart(fmt.Sprint("crowd", i), rules, 1))
	}
	_, err = s.Decide(t.Context(), crowd)
	require.ErrorIs(t, err, storage.ErrInvalidIdentifier)
	require.ErrorIs(t, s.Charge(t.Context(), storage.Charge{Name: name, Rules: rules, Amounts: make([]storage.Amount, 1)}), storage.ErrInvalidIdentifier)
	require.ErrorAs(t, s.Charge(t.Context(), storage.Charge{Name: name, Identifier: "a", Rules: rules}), &bucketError)
	require.ErrorIs(t, s.Reset(t.Context(), name, ""), storage.ErrInvalidIdentifier)
	assert.Equal(t, []int64{5}, remaining(t, s, name, "a", five))
	assert.Equal(t, []int64{5}, remaining(t, s, name, "b", five))
}

func namesApart(t *testing.T, s storage.Storage) {
	one, two := newName(), newName()
	five := rule(t, "five", storage.Replenish, 10*time.Second, 5, 0)
	_, err := s.Decide(t.Context(), request(one, 0, storage.Take, storage.NewPart("a", []storage.Rule{five}, 3)))
	require.NoError(t, err)
	assert.Equal(t, []int64{2}, remaining(t, s, one, "a", five))
	assert.Equal(t, []int64{5}, remaining(t, s, two, "a", five))
	require.NoError(t, s.Reset(t.Context(), two, "a"))
	assert.Equal(t, []int64{2}, remaining(t, s, one, "a", five))
}

func finishedContext(t *testing.T, s storage.Storage) {
	name, five := newName(), rule(t, "five", storage.Replenish, 10*time.Second, 5, 0)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Decide(ctx, request(name, 0, storage.Take, storage.NewPart("a", []storage.Rule{five}, 3)))
	require.ErrorIs(t, err, context.Canceled)
	err = s.Charge(ctx, storage.Charge{Name: name, Clocked: true, Identifier: "a", Rules: []storage.Rule{five}, Amounts: []storage.Amount{{N: 1, In: 1}}})
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorIs(t, s.Reset(ctx, name, "a"), context.Canceled)
	assert.Equal(t, []int64{5}, remaining(t, s, name, "a", five))
}

func sixteenBuckets(t *testing.T, s storage.Storage) {
	name := newName()
	take := func(at time.Duration, from, to int) (storage.Verdict, error) {
		var rules []storage.Rule
		for i := from; i < to; i++ {
			rules = append(rules, rule(t, fmt.Sprint("b", i), storage.Replenish, 10*time.Second, int64(i+1), 0))
		}
		return s.Decide(t.Context(), request(name, at, storage.Take, storage.NewPart("a", rules, 1)))
	}
	_, err := take(0, 0, 6)
	require.NoError(t, err)
	v, err := take(0, 4, 16)
	require.NoError(t, err)
	assert.Equal(t, int64(3), v.Levels()[0].Remaining, "a bucket that both calls name")
	assert.Equal(t, int64(15), v.Levels()[11].Remaining)
	var bucketError *storage.BucketError
	_, err = take(0, 16, 17)
	require.ErrorAs(t, err, &bucketError, "16 buckets are not full: one more is refused with TooManyBuckets")
	joint := request(name, 0, storage.Take, storage.NewPart("b", []storage.Rule{rule(t, "of b", storage.Replenish, time.Second, 1, 0)}, 1))
	joint.More = []storage.Part{storage.NewPart("a", []storage.Rule{rule(t, "of a", storage.Replenish, time.Second, 1, 0)}, 1)}
	_, err = s.Decide(t.Context(), joint)
	require.ErrorAs(t, err, &bucketError)
	assert.Equal(t, "of a", bucketError.Bucket, "the error names a bucket of the identifier that has too many")
	v, err = take(0, 0, 1)
	require.NoError(t, err)
	assert.False(t, v.Allowed, "the first bucket was kept by calls that do not name it")
	v, err = take(10*time.Second, 16, 17)
	require.NoError(t, err, "full buckets make room")
	assert.True(t, v.Allowed)
}

func ownClock(t *testing.T, s storage.Storage) {
	hour := rule(t, "hour", storage.Replenish, time.Hour, 2, 0)
	r := storage.Request{Name: newName(), Part: storage.NewPart("a", []storage.Rule{hour}, 1)}
	for i, want := range []bool{true, true, false} {
		v, err := s.Decide(t.Context(), r)
		require.NoError(t, err)
		assert.Equal(t, want, v.Allowed, "call %d", i)
		assert.InDelta(t, time.Hour, v.Levels()[0].ResetAfter, float64(time.Minute))
		assert.NotEmpty(t, v.Source())
		assert.False(t, v.Degraded())
	}
	err := s.Charge(t.Context(), storage.Charge{Name: r.Name, Identifier: "a", Rules: []storage.Rule{hour}, Amounts: []storage.Amount{{N: -1, In: time.Hour.Microseconds()}}})
	require.NoError(t, err)
	v, err := s.Decide(t.Context(), r)
	require.NoError(t, err)
	assert.True(t, v.Allowed, "after a refund")
}

// refundsByOwnClock has time pass between a decision and its refund, in which another call is made.
func refundsByOwnClock(t *testing.T, s storage.Storage) {
	for _, kind := range []storage.Kind{storage.Replenish, storage.FixedWindow, storage.SlidingWindow, storage.SlidingLog} {
		year := rule(t, "year", kind, 366*24*time.Hour, 256, 0)
		r := storage.Request{Name: newName(), Part: storage.NewPart("a", []storage.Rule{year}, 50)}
		for range 20 {
			v, err := s.Decide(t.Context(), r)
			require.NoError(t, err)
			require.True(t, v.Allowed, "%v: what was given back may be taken again", kind)
			other := r
			other.Part = storage.NewPart("a", r.Part.Rules, 1)
			_, err = s.Decide(t.Context(), other)
			require.NoError(t, err)
			back := storage.Amount{N: -50, In: v.Count(0).HeldFor - (storage.Monotonic() - v.At())}
			require.NoError(t, s.Charge(t.Context(), storage.Charge{Name: r.Name, Identifier: "a", Rules: r.Part.Rules, Amounts: []storage.Amount{back}}))
		}
		r.Mode, r.Part = storage.Peek, storage.NewPart("a", r.Part.Rules, 0)
		v, err := s.Decide(t.Context(), r)
		require.NoError(t, err)
		require.Equal(t, int64(236), v.Levels()[0].Remaining, "%v", kind)
	}
}
