package law_test

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
)

// reserve asks a bucket for n tokens within a time, and returns when they may be used.
func reserve(s *law.State, r *law.Rule, n, within, now int64) (at int64, ok bool, c law.Count) {
	d := []law.Draw{{Rule: r, Cost: n, Within: within, State: *s}}
	ok = law.Decide(law.Take, now, d)
	if ok {
		*s = d[0].State
	}
	return now + d[0].Count.RetryAfter, ok, d[0].Count
}

// use is n tokens that are used at the time at.
type use struct{ at, n int64 }

// TestWhatIsReservedIsNeverUsedFasterThanTheLimit reserves and cancels at random, and looks at the moments at which
// what was not cancelled is used.
func TestWhatIsReservedIsNeverUsedFasterThanTheLimit(t *testing.T) {
	t.Parallel()
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 5))
		r := rule(t, law.Continuous, time.Duration(1+rnd.IntN(20))*time.Second, 1+rnd.Int64N(20), 1+rnd.Int64N(50))
		type reservation struct {
			use
			made, heldFor int64
		}
		var s law.State
		var uses []use
		var waiting []reservation
		now := int64(1_700_000_000_000_000)
		for range 300 {
			now += rnd.Int64N(2 * r.Period / max(1, r.Refill))
			n := 1 + rnd.Int64N(r.Capacity)
			if at, ok, c := reserve(&s, &r, n, rnd.Int64N(4)*r.Period/2, now); ok {
				waiting = append(waiting, reservation{use{at, n}, now, c.HeldFor})
			}
			if i := rnd.IntN(len(waiting) + 1); i < len(waiting) && rnd.IntN(3) == 0 && waiting[i].at > now {
				s.Refund(&r, law.Amount{N: waiting[i].n, In: waiting[i].heldFor - (now - waiting[i].made)}, now)
				waiting = slices.Delete(waiting, i, i+1)
			}
		}
		for _, w := range waiting {
			uses = append(uses, w.use)
		}
		requireWithin(t, &r, uses, seed)
	}
}

// requireWithin fails if, between any two moments, more was used than the capacity and what comes back in that time.
// Each moment is rounded up to a tick.
func requireWithin(t *testing.T, r *law.Rule, uses []use, seed uint64) {
	t.Helper()
	slices.SortStableFunc(uses, func(a, b use) int { return cmp.Compare(a.at, b.at) })
	for i, first := range uses {
		used := int64(0)
		for _, last := range uses[i:] {
			used += last.n
			back := (last.at - first.at + r.Tick) / r.Tick * r.Drain
			if used*r.One <= r.Capacity*r.One+back { // without require.LessOrEqual, which takes longer than all else here
				continue
			}
			require.FailNow(t, "used too fast", "seed %d: %d tokens from %d to %d by %+v", seed, used, first.at, last.at, *r)
		}
	}
}

func TestAReservationThatIsCancelledLastGivesItsPlaceToTheNext(t *testing.T) {
	t.Parallel()
	r := rule(t, law.Continuous, time.Second, 1, 10)
	var s law.State
	take(&s, &r, 1, 0)
	at, ok, c := reserve(&s, &r, 1, 1_000_000, 0)
	require.True(t, ok)
	s.Refund(&r, law.Amount{N: 1, In: c.HeldFor - 50_000}, 50_000)
	again, ok, _ := reserve(&s, &r, 1, 1_000_000, 50_000)
	require.True(t, ok)
	assert.Equal(t, at, again)
}

func TestABurstOfOneIsReservedFourPeriodsAhead(t *testing.T) {
	t.Parallel()
	r := rule(t, law.Continuous, time.Second, 1, 10)
	var s law.State
	for i := range int64(40) {
		at, ok, _ := reserve(&s, &r, 1, law.MaxWithin, 0)
		require.True(t, ok)
		require.Equal(t, i*100_000, at)
	}
	_, ok, c := reserve(&s, &r, 1, law.MaxWithin, 0)
	require.False(t, ok)
	assert.Equal(t, int64(100_000), c.RetryAfter)
}

func TestTheCeilingStaysBelow2To53Units(t *testing.T) {
	t.Parallel()
	for _, refill := range []int64{1, 1000, 1 << 30, 1 << 40, exact/4 - 1} {
		for _, capacity := range []int64{1, 7, 1 << 20, 1 << 40} {
			r, faults := law.NewRule("b", law.Continuous, time.Second, capacity, refill)
			if faults != nil {
				continue
			}
			assert.LessOrEqual(t, r.Ceiling(), (exact-1)/r.One, "%+v", r)
			assert.GreaterOrEqual(t, r.Ceiling(), 4*capacity, "%+v", r)
		}
	}
}
