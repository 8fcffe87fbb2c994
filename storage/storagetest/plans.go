package storagetest

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
)

// What a client gets that keeps to its limit, and one whose limits change.

var everyKind = []law.Kind{law.Replenish, law.Continuous, law.FixedWindow, law.SlidingWindow, law.SlidingLog}

// evenClient takes one token every period/capacity for two and a half periods. It begins at the start of a window, a
// microsecond later, and a third into it, and must never be denied.
func evenClient(t *testing.T, s storage.Storage) {
	const period = 7 * time.Second
	name := newName()
	for _, kind := range everyKind {
		capacities := []int64{1, 2, 3, 10}
		if kind == law.SlidingLog {
			capacities = append(capacities, 257) // from which on it has a grain
		}
		for _, capacity := range capacities {
			for _, phase := range []int64{0, 1, period.Microseconds() / 3} {
				r := rule(t, "even", kind, period, capacity, capacity)
				id := fmt.Sprint(kind, capacity, phase)
				for i := range capacity*5/2 + 2 {
					at := time.Duration(phase+(i*r.Period+capacity-1)/capacity) * time.Microsecond
					v, err := storecheck.Decide(t.Context(), s, request(name, at, storage.Take, storecheck.NewPart(id, []law.Rule{r}, 1)))
					require.NoError(t, err)
					require.True(t, v.Allowed, "%v of %d: call %d at %v is denied for %v", kind, capacity, i, at, v.RetryAfter)
				}
			}
		}
	}
}

// toggledPlans takes what it can get under plans with the same name, kind and period, in random order. At no time may
// that be more than the largest plan alone admits at the same times.
func toggledPlans(t *testing.T, s storage.Storage) {
	name := newName()
	for _, kind := range everyKind {
		for seed := range uint64(2) {
			rnd, id := rand.New(rand.NewPCG(seed, 7)), fmt.Sprint(kind, seed)
			var plans []law.Rule
			for _, capacity := range []int64{20, 10, 3, 1} {
				plans = append(plans, rule(t, "plan", kind, 10*time.Second, capacity, capacity))
			}
			alone, at := make([]law.Draw, 1), time.Duration(0)
			alone[0] = law.Draw{Rule: &plans[0], Cost: 1}
			admitted, most := 0, 0
			for range 150 {
				at += time.Duration(rnd.IntN(900)) * time.Millisecond
				plan := plans[rnd.IntN(len(plans))]
				v, err := storecheck.Decide(t.Context(), s, request(name, at, storage.Take, storecheck.NewPart(id, []law.Rule{plan}, 1)))
				require.NoError(t, err)
				if v.Allowed {
					admitted++
				}
				if law.Decide(storage.Take, at.Microseconds(), alone) {
					most++
				}
				require.LessOrEqual(t, admitted, most, "%v seed %d at %v", kind, seed, at)
			}
		}
	}
}

// otherBuckets uses up a bucket, and then buckets of the same name but another kind or period. They start full, and the
// first stays used up.
func otherBuckets(t *testing.T, s storage.Storage) {
	name := newName()
	for _, kind := range everyKind {
		id, old := fmt.Sprint(kind), rule(t, "b", kind, time.Hour, 3, 3)
		take := func(at time.Duration, r law.Rule, n int64) storecheck.Verdict {
			v, err := storecheck.Decide(t.Context(), s, request(name, at, storage.Take, storecheck.NewPart(id, []law.Rule{r}, n)))
			require.NoError(t, err)
			return v
		}
		require.True(t, take(time.Hour, old, 3).Allowed)
		for _, other := range everyKind {
			for _, period := range []time.Duration{time.Minute, time.Hour} {
				if r := rule(t, "b", other, period, 2, 2); !r.SameBucket(&old) {
					require.True(t, take(time.Hour, r, 2).Allowed, "%v, then %v of %v", kind, other, period)
					require.False(t, take(time.Hour, r, 1).Allowed, "%v, then %v of %v", kind, other, period)
				}
			}
		}
		require.False(t, take(time.Hour, old, 1).Allowed, "%v: it is as it was", kind)
		require.True(t, take(3*time.Hour, old, 3).Allowed)
	}
}
