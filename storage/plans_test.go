package storage_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/storage"
)

// The suite plays a few even clients on every storage; here are many on the arithmetic alone.
func TestTheEvenClientIsNeverDenied(t *testing.T) {
	t.Parallel()
	for _, kind := range everyKind {
		for _, period := range []time.Duration{time.Microsecond, 7 * time.Microsecond, time.Millisecond, time.Second, 7 * time.Second, 1001 * time.Millisecond, time.Hour, 30 * 24 * time.Hour} {
			for _, capacity := range []int64{1, 2, 3, 5, 7, 10, 100, 256, 257, 1000} {
				r := rule(t, kind, period, capacity, capacity)
				for phase := range int64(3) {
					for _, up := range []int64{0, capacity - 1} { // whether times are rounded down or up
						start := phase * (r.Period/4 + phase)
						draws := []storage.Draw{{Rule: &r, Cost: 1}}
						for i := range capacity*2 + capacity/3 + 2 {
							at := start + (i*r.Period+up)/capacity
							require.True(t, storage.Decide(storage.Take, at, draws), "%v of %d per %v: call %d, %d µs after %d", kind, capacity, period, i, at-start, start)
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
