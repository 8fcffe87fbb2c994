package failover_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/failover"
)

// What the failover computes without a State, for speed, is what package law says.

// anyRules calls test with rules of a kind, from small to as large as they can be.
func anyRules(t *testing.T, kind law.Kind, test func(rnd *rand.Rand, r *law.Rule)) {
	t.Helper()
	rnd := rand.New(rand.NewPCG(1, uint64(kind)))
	valid := 0
	for valid < 2000 {
		period := time.Microsecond << rnd.IntN(40) * time.Duration(1+rnd.IntN(9))
		r, faults := law.NewRule("any", kind, period, 1+rnd.Int64N(1<<rnd.IntN(40)), 1+rnd.Int64N(1<<rnd.IntN(40)))
		if len(faults) == 0 {
			valid++
			test(rnd, &r)
		}
	}
}

func TestALevelDrainsAsTheLawSays(t *testing.T) {
	t.Parallel()
	anyRules(t, law.Continuous, func(rnd *rand.Rand, r *law.Rule) {
		n := 1 + rnd.Int64N(r.Ceiling())
		var s law.State
		s.Charge(r, storage.Amount{N: n, In: law.FarFuture}, 0)
		require.Equal(t, s.FullAt(0), failover.Drains(r, n), "%d of %+v", n, r)
		require.Equal(t, failover.Drains(r, r.Ceiling()), failover.Drains(r, 1<<53), "no bucket owes more than the ceiling")
	})
}

func TestADebtHasTheTokensOfTheLaw(t *testing.T) {
	t.Parallel()
	for _, kind := range storecheck.Kinds {
		anyRules(t, kind, func(rnd *rand.Rand, r *law.Rule) {
			var s law.State
			now := rnd.Int64N(1 << 40)
			for range 1 + rnd.IntN(4) {
				draws := []law.Draw{{Rule: r, Cost: 1 + rnd.Int64N(r.Capacity), State: s}}
				law.Decide(storage.Force, now, draws)
				s, now = draws[0].State, now+rnd.Int64N(r.Period)
			}
			look := []law.Draw{{Rule: r, State: s}}
			law.Decide(storage.Peek, now, look)
			n, last := failover.Held(r, s.Debt(r, now))
			require.Equal(t, r.Capacity-look[0].Count.Remaining, n, "%+v", r)
			require.LessOrEqual(t, look[0].Count.ResetAfter, last)
		})
	}
}

func TestNothingTakesLongerThanTheLongest(t *testing.T) {
	t.Parallel()
	for _, kind := range storecheck.Kinds {
		anyRules(t, kind, func(rnd *rand.Rand, r *law.Rule) {
			all := []law.Draw{{Rule: r, Cost: r.Ceiling()}}
			law.Decide(storage.Force, rnd.Int64N(1<<40), all)
			assert.LessOrEqual(t, all[0].Count.HeldFor, failover.Longest(r), "%+v", r)
		})
	}
}
