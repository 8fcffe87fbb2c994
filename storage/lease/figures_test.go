package lease_test

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage/lease"
)

// TestCallsToTheSharedStorageAreFew checks the number of calls to the shared storage per decision that docs/lease.md states,
// for four processes with a round trip of 1 ms. They must also admit about as much as the shared storage alone would.
func TestCallsToTheSharedStorageAreFew(t *testing.T) {
	t.Parallel()
	const seconds = 3
	for _, c := range []struct {
		name     string
		kind     law.Kind
		capacity int64   // also the refill per second
		rate     float64 // calls per second
		most     float64 // upper bound of calls to the shared storage per decision
		least    int     // lower bound of admitted calls
	}{
		{"half the limit", law.Continuous, 10_000, 5_000, 0.02, 5_000 * seconds * 97 / 100},
		{"200 times the limit", law.Continuous, 100, 20_000, 0.15, 100 + 100*seconds*98/100},
		{"200 times the limit, all at once", law.FixedWindow, 100, 20_000, 0.15, 100 * seconds},
		{"twice the limit", law.Continuous, 1_000, 2_000, 0.7, 1_000 + 1_000*seconds*95/100},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, 1)
				w.options, w.shortest = lease.Options{}, time.Millisecond
				w.server.ahead, w.server.drift = 0, 0
				w.rules = []law.Rule{w.rule("limit", c.kind, time.Second, c.capacity, c.capacity)}
				<-time.After(time.Duration(1_000_000-law.Monotonic()%1_000_000) * time.Microsecond)
				for range 4 {
					p, rnd := w.steady(), rand.New(rand.NewPCG(w.rnd.Uint64(), 1))
					w.load.Go(func() {
						for began := time.Now(); ; {
							<-time.After(time.Duration(rnd.ExpFloat64() * 4 / c.rate * float64(time.Second)))
							if time.Since(began) >= seconds*time.Second {
								return
							}
							w.load.Go(func() { w.asks(p, 1) })
						}
					})
				}
				w.end()
				w.check()
				admitted := len(w.admitted["id"])
				calls := float64(w.server.calls.Load()) / float64(admitted+w.denied)
				t.Logf("%.4f calls a decision, %d admitted of %d", calls, admitted, admitted+w.denied)
				assert.LessOrEqual(t, calls, c.most)
				assert.GreaterOrEqual(t, admitted, c.least)
			})
		})
	}
}
