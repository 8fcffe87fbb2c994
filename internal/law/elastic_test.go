package law_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
)

// Whatever a rule shrinks to, it keeps its Tick, and every number of the arithmetic stays below 2^53.
func TestAShrunkRuleStaysInItsBounds(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(5, 5))
	made := 0
	for range 20_000 {
		period := []time.Duration{time.Second, time.Minute, time.Hour, 24 * time.Hour, time.Duration(1 + rnd.Int64N(int64(366*24*time.Hour)))}[rnd.IntN(5)]
		capacity, refill := 1+rnd.Int64N(1<<(1+rnd.IntN(48))), 1+rnd.Int64N(1<<(1+rnd.IntN(48)))
		if rnd.IntN(2) == 0 {
			refill = capacity
		}
		r, faults := law.NewRule("b", law.Continuous, period, capacity, refill)
		if faults != nil {
			continue
		}
		made++
		n := 1 + rnd.Int64N(refill)
		s := r.Shrunk(n)
		require.Equal(t, r.Tick, s.Tick)
		require.Equal(t, r.Capacity, s.Full)
		require.Positive(t, s.Capacity)
		require.Positive(t, s.Drain)
		require.LessOrEqual(t, s.Capacity, r.Capacity)
		require.LessOrEqual(t, s.Refill, r.Refill)
		require.Equal(t, s.Refill*s.One, s.Drain*(s.Period/s.Tick), "a tick refills a whole number of units")
		require.Less(t, 4*float64(s.Capacity)*float64(s.One), float64(1<<53), "%v %d %d %d", period, capacity, refill, n)
	}
	require.Greater(t, made, 5000)
}

func TestALargeRefillShrinksInSmallSteps(t *testing.T) {
	t.Parallel()
	r := rule(t, law.Continuous, 24*time.Hour, 100_000, 100_000)
	for _, n := range []int64{98_437, 50_001, 1_003, 17} {
		s := r.Shrunk(n)
		assert.InDelta(t, n, s.Refill, 4)
		assert.LessOrEqual(t, s.Refill, n)
	}
}
