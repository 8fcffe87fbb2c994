package law_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
)

// The arithmetic between two stores: what one store took is charged to the other (Charge). The other returns its debt
// (Debt), and the first is raised to that (Raise).

var everyKind = []law.Kind{law.Replenish, law.Continuous, law.FixedWindow, law.SlidingWindow, law.SlidingLog}

func rule(t *testing.T, kind law.Kind, period time.Duration, capacity, refill int64) law.Rule {
	t.Helper()
	r, faults := law.NewRule("b", kind, period, capacity, refill)
	require.Empty(t, faults)
	return r
}

// take asks a bucket for n tokens.
func take(s *law.State, r *law.Rule, n, now int64) (bool, law.Count) {
	d := []law.Draw{{Rule: r, Cost: n, State: *s}}
	ok := law.Decide(law.Take, now, d)
	if ok {
		*s = d[0].State
	}
	return ok, d[0].Count
}

// left returns how many tokens may be taken at the time now.
func left(s law.State, r *law.Rule, now int64) int64 {
	_, c := take(&s, r, 0, now)
	return c.Remaining
}

func copied(s law.State) law.State {
	return law.MakeState(s.Law, s.Seen, slices.Clone(s.Holds()))
}

// spend returns a state after greedy random takes, and the time of the last.
func spend(rnd *rand.Rand, r *law.Rule, now int64) (law.State, int64) {
	var s law.State
	for range 30 {
		now += rnd.Int64N(r.Period / 4)
		take(&s, r, 1+rnd.Int64N(max(1, r.Capacity/5)), now)
	}
	return s, now
}

func TestAmountsChargedWithTheTimeTheyHaveLeftMakeTheSameState(t *testing.T) {
	t.Parallel()
	for _, kind := range everyKind {
		for seed := range uint64(50) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			r := rule(t, kind, 10*time.Second, 20, 20)
			var first, second law.State
			type amount struct{ n, back int64 }
			var pending []amount
			now := int64(1_700_000_000_000_000)
			for range 200 {
				now += rnd.Int64N(500_000)
				n := 1 + rnd.Int64N(3)
				if ok, c := take(&first, &r, n, now); ok {
					pending = append(pending, amount{n, now + c.HeldFor})
				}
				if rnd.IntN(4) > 0 {
					continue
				}
				for _, a := range pending {
					second.Charge(&r, law.Amount{N: a.n, In: a.back - now}, now)
				}
				pending = nil
				for _, later := range []int64{0, 1, 999_999, 3_000_000, 5_000_001, 12_000_000} {
					require.InDelta(t, left(first, &r, now+later), left(second, &r, now+later), 0, "%v seed %d: after %d µs", kind, seed, later)
				}
			}
		}
	}
}

func TestRaisingTwiceIsRaisingOnceAndRaisingOwnDebtIsNothing(t *testing.T) {
	t.Parallel()
	for _, kind := range everyKind {
		for seed := range uint64(200) {
			rnd := rand.New(rand.NewPCG(seed, 2))
			r := rule(t, kind, 10*time.Second, 1+rnd.Int64N(500), 1+rnd.Int64N(20))
			own, now := spend(rnd, &r, 1_700_000_000_000_000)
			theirs, later := spend(rnd, &r, now-rnd.Int64N(r.Period))
			now = max(now, later)

			raised := copied(own)
			raised.Raise(&r, own.Debt(&r, now), now)
			assert.Equal(t, own.Debt(&r, now), raised.Debt(&r, now), "%v seed %d: own debt", kind, seed)

			raised.Raise(&r, theirs.Debt(&r, now), now)
			once := raised.Debt(&r, now)
			raised.Raise(&r, theirs.Debt(&r, now), now)
			assert.Equal(t, once, raised.Debt(&r, now), "%v seed %d: twice", kind, seed)
		}
	}
}

func TestRaiseIsThePointwiseMaximumOfTheTwoCurves(t *testing.T) {
	t.Parallel()
	for _, kind := range everyKind {
		for seed := range uint64(200) {
			rnd := rand.New(rand.NewPCG(seed, 3))
			r := rule(t, kind, 10*time.Second, 100, 100)
			own, now := spend(rnd, &r, 1_700_000_000_000_000)
			theirs, later := spend(rnd, &r, now-rnd.Int64N(r.Period))
			now = max(now, later)
			raised := copied(own)
			raised.Raise(&r, theirs.Debt(&r, now), now)
			for at := now; at < now+3*r.Period; at += 123_457 {
				most := min(left(own, &r, at), left(theirs, &r, at))
				got := left(raised, &r, at)
				if kind == law.Replenish { // an end within half a period of the own last hold joins that
					require.LessOrEqual(t, got, left(own, &r, at), "%v seed %d", kind, seed)
					continue
				}
				require.Equal(t, most, got, "%v seed %d: at +%d µs", kind, seed, at-now)
			}
		}
	}
}

func TestRaiseOfNothingOrOfThePastChangesNothing(t *testing.T) {
	t.Parallel()
	for _, kind := range everyKind {
		r := rule(t, kind, 10*time.Second, 10, 10)
		var s law.State
		s.Raise(&r, nil, 5)
		s.Raise(&r, []law.Amount{{N: 5, In: 0}, {N: 0, In: 5}, {N: -5, In: 5}}, 5)
		assert.Empty(t, s.Debt(&r, 5), kind)
		s.Raise(&r, []law.Amount{{N: 1 << 62, In: 1 << 62}}, 5)
		assert.Equal(t, -3*r.Capacity, left(s, &r, 5), kind)
		total := int64(0)
		for _, a := range s.Debt(&r, 5) {
			total += a.N
		}
		assert.Equal(t, 4*r.Capacity, total, "%v: saturated", kind)
	}
}

// TestARelayBetweenHealthyStoresCostsNothing charges another store every 100 ms with what the first one took, and
// raises the first to the debt of the other. Nothing fails, so this may cost nothing: over 40 periods the first store
// admits at least 99 % of what it would admit alone, however far the clocks of the two are apart.
func TestARelayBetweenHealthyStoresCostsNothing(t *testing.T) {
	t.Parallel()
	const start, flush = int64(1_700_000_000_000_000), int64(100_000)
	for _, kind := range everyKind {
		for _, offset := range []int64{0, 3_700_000, -1_234_567, 86_400_000_000} {
			t.Run(fmt.Sprint(kind, " with clocks apart by ", time.Duration(offset)*time.Microsecond), func(t *testing.T) {
				t.Parallel()
				r := rule(t, kind, 10*time.Second, 100, 100)
				var alone, first, ledger law.State
				type amount struct{ n, back int64 }
				var pending []amount
				var admitted, reference int
				for now := start; now < start+40*r.Period; now += 10_000 {
					if ok, _ := take(&alone, &r, 1, now); ok {
						reference++
					}
					if ok, c := take(&first, &r, 1, now); ok {
						admitted++
						pending = append(pending, amount{1, now + c.HeldFor})
					}
					if now%flush != 0 {
						continue
					}
					for _, a := range pending {
						ledger.Charge(&r, law.Amount{N: a.n, In: a.back - now}, now+offset)
					}
					pending = nil
					first.Raise(&r, ledger.Debt(&r, now+offset), now)
				}
				assert.GreaterOrEqual(t, admitted*100, reference*99, "admitted %d of %d", admitted, reference)
				assert.LessOrEqual(t, admitted, reference+1)
			})
		}
	}
}

func TestARefundNeverGivesBackMoreThanWasTakenOrWhatCameBack(t *testing.T) {
	t.Parallel()
	for _, kind := range everyKind {
		for seed := range uint64(300) {
			rnd := rand.New(rand.NewPCG(seed, 4))
			r := rule(t, kind, 10*time.Second, 1+rnd.Int64N(400), 1+rnd.Int64N(20))
			s, now := spend(rnd, &r, 1_700_000_000_000_000)
			n := 1 + rnd.Int64N(r.Capacity)
			before := copied(s)
			ok, c := take(&s, &r, n, now)
			if !ok {
				continue
			}
			at := now
			if rnd.IntN(2) == 0 {
				at += rnd.Int64N(2 * r.Period)
				if ok, _ := take(&s, &r, 1, at); ok {
					take(&before, &r, 1, at)
				}
			}
			had := left(s, &r, at)
			s.Refund(&r, law.Amount{N: n, In: c.ResetAfter - (at - now)}, at)
			got := left(s, &r, at)
			require.GreaterOrEqual(t, got, had, "%v seed %d", kind, seed)
			require.LessOrEqual(t, got-had, n, "%v seed %d", kind, seed)
			most := left(before, &r, at)
			if kind == law.Continuous {
				most = left(before, &r, at+r.Tick)
			}
			require.LessOrEqual(t, got, max(had, most), "%v seed %d: as if it had not been taken, at most", kind, seed)
			if at == now {
				require.Equal(t, left(before, &r, at), got, "%v seed %d: at once, all of it", kind, seed)
			}
		}
	}
}

func TestARefundThatArrivesLateTakesNothingFromTheNextPeriod(t *testing.T) {
	t.Parallel()
	for _, kind := range everyKind {
		r := rule(t, kind, 200*time.Millisecond, 5, 5)
		var s law.State
		start := int64(1_700_000_000_000_000)
		_, c := take(&s, &r, 5, start)
		sent := start + c.ResetAfter - 1_000
		arrived := sent + 3_000
		before := left(s, &r, arrived)
		ok, _ := take(&s, &r, before, arrived)
		require.True(t, ok)
		s.Refund(&r, law.Amount{N: 5, In: c.ResetAfter - (sent - start)}, arrived)
		if kind == law.Continuous { // what had not drained when it was sent, to within a tick
			require.LessOrEqual(t, left(s, &r, arrived), int64(1))
		} else {
			require.Zero(t, left(s, &r, arrived), kind)
		}
	}
}

func TestARefundFindsItsTokensInABusyLogThoughTimePassedOnTheWay(t *testing.T) {
	t.Parallel()
	r := rule(t, law.SlidingLog, time.Hour, 100, 0)
	var s law.State
	_, c := take(&s, &r, 50, 0)
	take(&s, &r, 1, 1)
	s.Refund(&r, law.Amount{N: 50, In: c.ResetAfter}, 1)
	assert.Equal(t, int64(99), left(s, &r, 1))
}

func TestARefundIsWholeThoughItWasOnItsWayForUpToHalfAPeriod(t *testing.T) {
	t.Parallel()
	for _, kind := range []law.Kind{law.Replenish, law.FixedWindow, law.SlidingWindow, law.SlidingLog} {
		r := rule(t, kind, time.Second, 10, 0)
		for _, late := range []int64{0, 1, 3_000, 60_000, 499_999} {
			var s law.State
			start := int64(1_700_000_000_000_000)
			_, c := take(&s, &r, 4, start)
			take(&s, &r, 1, start+late) // of another call
			s.Refund(&r, law.Amount{N: 4, In: c.HeldFor}, start+late)
			require.EqualValues(t, 9, left(s, &r, start+late), "%v, %d µs late", kind, late)
		}
	}
}

func TestARefundAfterTheLawChangedTakesFromTheNewestHold(t *testing.T) {
	t.Parallel()
	old, changed := rule(t, law.Replenish, 10*time.Second, 10, 0), rule(t, law.Replenish, time.Minute, 10, 0)
	var s law.State
	_, c := take(&s, &old, 4, 0)
	take(&s, &changed, 1, 0)
	s.Refund(&old, law.Amount{N: 4, In: c.ResetAfter}, 0)
	assert.Equal(t, int64(9), left(s, &changed, 0))
}

func TestAStateTooFarAheadOfTheClockMayBeForgotten(t *testing.T) {
	t.Parallel()
	r := rule(t, law.Replenish, 10*time.Second, 5, 0)
	var s law.State
	take(&s, &r, 5, 1_000_000_000)
	assert.False(t, s.Full(930_000_000))
	assert.True(t, s.Full(929_999_999))
}

func TestAStateSurvivesItsHolds(t *testing.T) {
	t.Parallel()
	l := rule(t, law.SlidingLog, time.Second, 5, 0).Law
	for n := range 6 {
		var holds []law.Hold
		for i := range n {
			holds = append(holds, law.Hold{End: int64(i + 1), N: 1})
		}
		made, appended := law.MakeState(&l, 7, holds), law.State{Law: &l, Seen: 7}
		for _, h := range holds {
			appended.Append(h)
		}
		assert.Equal(t, holds, append([]law.Hold(nil), made.Holds()...))
		assert.Equal(t, made.Holds(), appended.Holds())
	}
}
