package law_test

import (
	"math/rand/v2"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
)

// The suite of storagetest plays a few even clients on every storage. Here many are played on the arithmetic alone.
func TestTheEvenClientIsNeverDenied(t *testing.T) {
	t.Parallel()
	for _, kind := range everyKind {
		for _, period := range []time.Duration{time.Microsecond, 7 * time.Microsecond, time.Millisecond, time.Second, 7 * time.Second, 1001 * time.Millisecond, time.Hour, 30 * 24 * time.Hour} {
			for _, capacity := range []int64{1, 2, 3, 5, 7, 10, 100, 256, 257, 1000} {
				r := rule(t, kind, period, capacity, capacity)
				for phase := range int64(3) {
					for _, up := range []int64{0, capacity - 1} { // whether times are rounded down or up
						start := phase * (r.Period/4 + phase)
						draws := []law.Draw{{Rule: &r, Cost: 1}}
						for i := range capacity*2 + capacity/3 + 2 {
							at := start + (i*r.Period+up)/capacity
							if !law.Decide(law.Take, at, draws) { // and no require.True, which takes longer than all else here
								require.FailNow(t, "denied", "%v of %d per %v: call %d, %d µs after %d", kind, capacity, period, i, at-start, start)
							}
						}
					}
				}
			}
		}
	}
}

func TestByteQuotasOfTheRealWorldFit(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(3, 3))
	for range 20_000 {
		capacity := 1 + rnd.Int64N(10_000_000_000_000)
		if rnd.IntN(2) == 0 {
			capacity = []int64{1_000_000_000, 30_000_000_000, 1_000_000_000_000, 10_000_000_000_000, 1 << 30, 5 << 40}[rnd.IntN(6)]
		}
		period := time.Duration(1+rnd.Int64N(366*24*3600)) * time.Second
		if rnd.IntN(2) == 0 {
			period = []time.Duration{time.Second, time.Minute, time.Hour, 24 * time.Hour, 30 * 24 * time.Hour, 31 * 24 * time.Hour, 366 * 24 * time.Hour}[rnd.IntN(7)]
		}
		for _, kind := range everyKind {
			rule(t, kind, period, capacity, capacity)
		}
	}
}

// A small burst needs ticks so short that no more than the burst comes back in one, however large the refill is.
func TestASmallBurstGetsItsLargeRefill(t *testing.T) {
	t.Parallel()
	r := rule(t, law.Continuous, 30*24*time.Hour, 100, 999_999_937)
	draws := []law.Draw{{Rule: &r, Cost: 1}}
	for i := range int64(20_000) {
		require.True(t, law.Decide(law.Take, 1_700_000_000_000_000+i*2593, draws), i)
	}
}

// A log of a capacity up to 256 is exact, and above that it has a grain. What was taken under the smaller capacity must
// not come back early under the larger one.
func TestALogThatGrowsBeyondItsGrainAdmitsNoMoreThanTheLargerAlone(t *testing.T) {
	t.Parallel()
	small, large := rule(t, law.SlidingLog, 256*time.Second, 256, 0), rule(t, law.SlidingLog, 256*time.Second, 257, 0)
	const start, second = 256_000_000 * 6_000_000, 1_000_000
	draws, admitted := []law.Draw{{Cost: 1}}, 0
	take := func(r *law.Rule, from int64) {
		draws[0].Rule = r
		for i := range int64(300) {
			if law.Decide(law.Take, from+i, draws) {
				admitted++
			}
		}
	}
	take(&small, start+1)
	take(&large, start+255*second+500)
	assert.LessOrEqual(t, admitted, 257+257/256+2)
}

func TestAChargeUnderFinerTicksForgetsNothing(t *testing.T) {
	t.Parallel()
	const day = 24 * 3600 * 1_000_000
	many, few := rule(t, law.SlidingWindow, 24*time.Hour, 1_000_000_000, 0), rule(t, law.SlidingWindow, 24*time.Hour, 100, 0)
	draws := []law.Draw{{Rule: &many, Cost: 1_000_000_000}}
	require.True(t, law.Decide(law.Take, 19_700*day, draws))
	late := int64(19_702*day - 500_000)
	before := left(draws[0].State, &few, late)
	draws[0].State.Charge(&few, law.Amount{N: 1, In: day}, late)
	assert.Equal(t, before, left(draws[0].State, &few, late))
	assert.Negative(t, before)
}

func TestARefundAfterARaisedRefillGivesNothingOfOthers(t *testing.T) {
	t.Parallel()
	slow, fast := rule(t, law.Continuous, time.Hour, 10, 10), rule(t, law.Continuous, time.Hour, 10, 3600)
	var s law.State
	_, first := take(&s, &slow, 9, 0)
	ok, _ := take(&s, &fast, 1, 0)
	require.True(t, ok)
	const minute = 60_000_000
	ok, _ = take(&s, &fast, 10, minute)
	require.True(t, ok)
	s.Refund(&slow, law.Amount{N: 9, In: first.HeldFor - minute}, minute)
	assert.Zero(t, left(s, &fast, minute))
}

// The number that an error names can be used, and is less than what was given.
func TestAFaultNamesANumberThatFits(t *testing.T) {
	t.Parallel()
	named := regexp.MustCompile(`: (\d+) would fit`)
	rnd := rand.New(rand.NewPCG(8, 8))
	found := 0
	for range 20_000 {
		kind := []law.Kind{law.Continuous, law.SlidingWindow}[rnd.IntN(2)]
		period := time.Duration(1+rnd.Int64N(366*24*3600*1_000_000)) * time.Microsecond
		capacity := int64(1) << rnd.IntN(50)
		refill := capacity
		if rnd.IntN(2) == 0 {
			refill = 1 + rnd.Int64N(1<<rnd.IntN(50))
		}
		_, faults := law.NewRule("b", kind, period, capacity, refill)
		if len(faults) == 0 {
			continue
		}
		fault := faults[0]
		said := named.FindStringSubmatch(fault.Reason)
		if said == nil {
			continue
		}
		found++
		n, err := strconv.ParseInt(said[1], 10, 64)
		require.NoError(t, err)
		given := capacity
		switch {
		case fault.Field == "Refill":
			given, refill = refill, n
		case refill == capacity:
			capacity, refill = n, n
		default:
			capacity = n
		}
		require.Less(t, n, given, fault)
		_, faults = law.NewRule("b", kind, period, capacity, refill)
		require.Empty(t, faults, fault)
	}
	assert.Positive(t, found)
}
