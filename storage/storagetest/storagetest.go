// Package storagetest tests that a storage keeps the contract of package storage: that it decides exactly as law.Decide
// does, atomically, and keeps nothing that belongs to its caller.
//
// The author of a storage calls Run from a test:
//
//	func TestMyStorage(t *testing.T) {
//		storagetest.Run(t, func(tb testing.TB) storage.Storage { return mystorage.New(…) })
//	}
//
// The files in testdata are the specification of the arithmetic, to read and to run. Their language is described in
// vectors.go. Model is the simplest correct storage, with which the random tests compare.
package storagetest

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
)

// Run tests the storages that open returns. Open is called once for each test, and the tests run in parallel. It may
// return the same storage each time, or several that share their data, because each test uses a Config.Name of its own.
// It cleans up with tb.Cleanup. Run the tests with the race detector, which finds faults that no answer shows.
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
		{"agrees with Decide while rules shrink and grow", shrunkRules},
		{"keeps a bucket while the identifier uses another of its name", otherBuckets},
		{"admits exactly the limit to 200 goroutines", exactlyTheLimit},
		{"charges the second limit as often as the first admits", bothOrNeither},
		{"transfers in opposite orders without deadlock or partial charge", transfers},
		{"is linearizable", linearizable},
		{"takes any bytes as an identifier", identifierZoo},
		{"keeps no identifier in the memory of its caller", reusedMemory},
		{"reads no memory of a caller that has left", reusedMemoryEarly},
		{"keeps names apart", namesApart},
		{"returns the error of a finished context and changes nothing", finishedContext},
		{"holds sixteen buckets of an identifier and no more", sixteenBuckets},
		{"uses a clock of its own when none is injected", ownClock},
		{"gives back by that clock while others take", refundsByOwnClock},
		{"admits exactly the limit to a crowd by that clock", crowdByOwnClock},
		{"agrees with Decide by that clock", sequenceByOwnClock},
		{"takes from several by that clock", jointByOwnClock},
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

// newName returns a Config.Name that no other test has used, in this process or in an earlier run on the same server.
func newName() string { return fmt.Sprintf("test-%x-%d", run, names.Add(1)) }

// rule returns a rule that must be valid.
func rule(t testing.TB, name string, kind law.Kind, period time.Duration, capacity, refill int64) law.Rule {
	t.Helper()
	r, faults := law.NewRule(name, kind, period, capacity, refill)
	require.Empty(t, faults)
	return r
}

// request returns a request for one part, at a time since the epoch by an injected clock.
func request(name string, at time.Duration, mode storage.Mode, p storecheck.Part) storecheck.Request {
	return storecheck.Request{Name: name, Mode: mode, Clocked: true, Now: at.Microseconds(), Parts: []storecheck.Part{p}}
}

// remaining returns what remains in each bucket, by a Peek that asks for nothing.
func remaining(t testing.TB, s storage.Storage, name, id string, rules ...law.Rule) []int64 {
	t.Helper()
	v, err := storecheck.Decide(t.Context(), s, request(name, 0, storage.Peek, storecheck.NewPart(id, rules, 0)))
	require.NoError(t, err)
	var out []int64
	for _, l := range v.Levels() {
		out = append(out, l.Remaining)
	}
	return out
}

// identifierZoo uses identifiers that a storage may confuse, cut or misread: control characters, invalid UTF-8, letters
// that look alike, the longest ones, and what is special in Redis, in SQL and in formats. Each has a bucket of its own.
func identifierZoo(t *testing.T, s storage.Storage) {
	name, five := newName(), rule(t, "five", law.Replenish, 10*time.Second, 5, 0)
	ids := []string{
		"\x00", "a\x00", "a\x00b", "\xff\xfe", "\xc3\x28", "{}:*", "{a}b", "{a}c", "a:b", "a", "b:a", ":", " ", "\n", "a\nb", "a\r\n",
		"%s", "'; DROP TABLE x; --", "日本", "\u00e9", "e\u0301", "A", strings.Repeat("x", law.MaxIdentifier), strings.Repeat("x", law.MaxIdentifier-1),
	}
	for i, id := range ids {
		_, err := storecheck.Decide(t.Context(), s, request(name, 0, storage.Take, storecheck.NewPart(id, []law.Rule{five}, int64(i%5+1))))
		require.NoError(t, err, "%q", id)
	}
	for i, id := range ids {
		assert.Equal(t, []int64{5 - int64(i%5+1)}, remaining(t, s, name, id, five), "%q met another identifier", id)
		require.NoError(t, s.Reset(t.Context(), name, id))
		assert.Equal(t, []int64{5}, remaining(t, s, name, id, five), "%q after Reset", id)
	}
}

// namesApart uses one identifier under two names, which share nothing.
func namesApart(t *testing.T, s storage.Storage) {
	one, two := newName(), newName()
	five := rule(t, "five", law.Replenish, 10*time.Second, 5, 0)
	_, err := storecheck.Decide(t.Context(), s, request(one, 0, storage.Take, storecheck.NewPart("a", []law.Rule{five}, 3)))
	require.NoError(t, err)
	assert.Equal(t, []int64{2}, remaining(t, s, one, "a", five))
	assert.Equal(t, []int64{5}, remaining(t, s, two, "a", five))
	require.NoError(t, s.Reset(t.Context(), two, "a"))
	assert.Equal(t, []int64{2}, remaining(t, s, one, "a", five))
}

// finishedContext calls each method with a context that has ended.
func finishedContext(t *testing.T, s storage.Storage) {
	name, five := newName(), rule(t, "five", law.Replenish, 10*time.Second, 5, 0)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := storecheck.Decide(ctx, s, request(name, 0, storage.Take, storecheck.NewPart("a", []law.Rule{five}, 3)))
	require.ErrorIs(t, err, context.Canceled)
	err = s.Charge(ctx, &storage.Charge{Name: name, Clocked: true, Identifier: "a", Rules: law.NewRuleSet([]law.Rule{five}...), Amounts: []storage.Amount{{N: 1, In: 1}}})
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorIs(t, s.Reset(ctx, name, "a"), context.Canceled)
	assert.Equal(t, []int64{5}, remaining(t, s, name, "a", five))
}

// sixteenBuckets fills an identifier with 16 buckets over several calls. One more is denied with an error, in a request
// of several parts too, until the others are full.
func sixteenBuckets(t *testing.T, s storage.Storage) {
	name := newName()
	take := func(at time.Duration, from, to int) (storecheck.Verdict, error) {
		var rules []law.Rule
		for i := from; i < to; i++ {
			rules = append(rules, rule(t, fmt.Sprint("b", i), law.Replenish, 10*time.Second, int64(i+1), 0))
		}
		return storecheck.Decide(t.Context(), s, request(name, at, storage.Take, storecheck.NewPart("a", rules, 1)))
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
	joint := request(name, 0, storage.Take, storecheck.NewPart("b", []law.Rule{rule(t, "of b", law.Replenish, time.Second, 1, 0)}, 1))
	joint.Parts = append(joint.Parts, storecheck.NewPart("a", []law.Rule{rule(t, "of a", law.Replenish, time.Second, 1, 0)}, 1))
	_, err = storecheck.Decide(t.Context(), s, joint)
	require.ErrorAs(t, err, &bucketError)
	assert.Equal(t, "of a", bucketError.Bucket, "the error names a bucket of the identifier that has too many")
	v, err = take(0, 0, 1)
	require.NoError(t, err)
	assert.False(t, v.Allowed, "the first bucket was kept by calls that do not name it")
	v, err = take(10*time.Second, 16, 17)
	require.NoError(t, err, "full buckets make room")
	assert.True(t, v.Allowed)
}

// ownClock makes requests that are not Clocked, over so little time that nothing comes back.
func ownClock(t *testing.T, s storage.Storage) {
	hour := rule(t, "hour", law.Replenish, time.Hour, 2, 0)
	r := storecheck.Request{Name: newName(), Parts: []storecheck.Part{storecheck.NewPart("a", []law.Rule{hour}, 1)}}
	for i, want := range []bool{true, true, false} {
		v, err := storecheck.Decide(t.Context(), s, r)
		require.NoError(t, err)
		assert.Equal(t, want, v.Allowed, "call %d", i)
		assert.InDelta(t, time.Hour, v.Levels()[0].ResetAfter, float64(time.Minute))
		assert.NotEmpty(t, v.Source())
		assert.False(t, v.Degraded())
	}
	err := s.Charge(t.Context(), &storage.Charge{Name: r.Name, Identifier: "a", Rules: law.NewRuleSet([]law.Rule{hour}...), Amounts: []storage.Amount{{N: -1, In: time.Hour.Microseconds()}}})
	require.NoError(t, err)
	v, err := storecheck.Decide(t.Context(), s, r)
	require.NoError(t, err)
	assert.True(t, v.Allowed, "after a refund")
}

// refundsByOwnClock refunds decisions after time has passed and another call has been made. Each refund must find the
// hold of its own decision, so that at the end only the tokens of the other calls are out.
func refundsByOwnClock(t *testing.T, s storage.Storage) {
	for _, kind := range []law.Kind{law.Replenish, law.FixedWindow, law.SlidingWindow, law.SlidingLog} {
		year := rule(t, "year", kind, 366*24*time.Hour, 256, 0)
		r := storecheck.Request{Name: newName(), Parts: []storecheck.Part{storecheck.NewPart("a", []law.Rule{year}, 50)}}
		for range 20 {
			v, err := storecheck.Decide(t.Context(), s, r)
			require.NoError(t, err)
			require.True(t, v.Allowed, "%v: what was given back may be taken again", kind)
			other := r
			other.Parts = []storecheck.Part{storecheck.NewPart("a", r.Parts[0].Rules.Rules, 1)}
			_, err = storecheck.Decide(t.Context(), s, other)
			require.NoError(t, err)
			back := storage.Amount{N: -50, In: v.Count(0).HeldFor - (law.Monotonic() - v.At())}
			require.NoError(t, s.Charge(t.Context(), &storage.Charge{Name: r.Name, Identifier: "a", Rules: r.Parts[0].Rules, Amounts: []storage.Amount{back}}))
		}
		r.Mode, r.Parts = storage.Peek, []storecheck.Part{storecheck.NewPart("a", r.Parts[0].Rules.Rules, 0)}
		v, err := storecheck.Decide(t.Context(), s, r)
		require.NoError(t, err)
		require.Equal(t, int64(236), v.Levels()[0].Remaining, "%v", kind)
	}
}
