package lease_test

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
)

// TestTheBoundHolds checks the safety of the protocol: whatever the traffic, no kind of bucket exceeds its bound.
func TestTheBoundHolds(t *testing.T) {
	t.Parallel()
	from, to := storecheck.Seeds(t, 60)
	local, shared, denied := 0, 0, 0
	for seed := from; seed < to; seed++ {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, seed)
			w.random(law.Kind(seed % 5))
			w.hostile()
			w.end()
			w.check()
			local, shared, denied = local+w.local(), shared+len(w.admitted["id"])-w.local(), denied+w.denied
		})
		if t.Failed() {
			t.Fatalf("again: THROTTLER_SEED=%d go test -run %s ./storage/lease", seed, t.Name())
		}
	}
	t.Logf("admitted %d by leases and %d by the shared storage, denied %d", local, shared, denied)
	if to-from >= 20 {
		require.Greater(t, local, shared/2, "what was not leased proves nothing")
	}
}

// hostile starts up to four processes with bursts of calls and pauses. In half of the worlds the bursts lie around the ends of
// periods, where all tokens are refilled. Some of the processes crash.
func (w *world) hostile() {
	period := time.Duration(w.rules[0].Period) * time.Microsecond
	edge := w.rnd.IntN(2) == 0
	for range 1 + w.rnd.IntN(4) {
		p, rnd := w.start(), rand.New(rand.NewPCG(w.rnd.Uint64(), 2))
		crash := time.Duration(-1)
		if w.rnd.IntN(4) == 0 {
			crash = time.Duration(w.rnd.Int64N(int64(2 * period)))
		}
		w.load.Go(func() {
			for range 3 {
				if edge {
					now := w.server.clock(law.Monotonic())
					until := time.Duration(w.rules[0].Period-now%w.rules[0].Period)*time.Microsecond - time.Duration(rnd.IntN(150))*time.Millisecond
					<-time.After(max(0, until))
				} else if rnd.IntN(2) == 0 {
					<-time.After(time.Duration(rnd.IntN(400)) * time.Millisecond)
				}
				for range 3 {
					w.storm(p, rnd, 1+rnd.IntN(250), time.Duration(1+rnd.IntN([]int{100, 1000, 5000}[rnd.IntN(3)]))*time.Microsecond)
				}
			}
		})
		if crash >= 0 {
			w.load.Go(func() {
				<-time.After(crash)
				w.crash(p)
			})
		}
	}
}
