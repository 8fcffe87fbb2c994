// Package observers measures what observing costs, for the benchmarks and tests of the modules that observe.
package observers

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
)

// Calls is the number of decisions in one turn.
const Calls = 1000

// Observe is a function for throttler.Config.Observe.
type Observe = func(context.Context, *throttler.Event)

// Compare measures a decision on one, two and four buckets: with no observer, with one that does nothing, and with each of
// the given ones, made anew for each number of buckets. All of them make many short turns, one after the other, and the
// shortest turn of each counts. Other programs, and a machine whose speed changes, disturb that least.
//
// It reports the nanoseconds of a decision without observer (ns-nobody), what an empty observer takes beyond that
// (ns-empty-more), and what each of the others takes beyond the empty one.
func Compare(b *testing.B, observers map[string]func() Observe) {
	b.Helper()
	for buckets := 1; buckets <= 4; buckets *= 2 {
		b.Run(fmt.Sprintf("buckets=%d", buckets), func(b *testing.B) { compare(b, buckets, observers) })
	}
}

func compare(b *testing.B, buckets int, observers map[string]func() Observe) {
	b.Helper()
	least := map[string]time.Duration{}
	limiters := map[string]*throttler.Throttler{}
	add := func(name string, observe Observe) {
		c := throttler.Config{Name: "api", Observe: observe}
		for i := range buckets {
			c.Buckets = append(c.Buckets, throttler.NewBucket(time.Hour, 1<<40).Named(fmt.Sprint("bucket ", i)))
		}
		t, err := throttler.New(c)
		require.NoError(b, err)
		limiters[name], least[name] = t, time.Hour
	}
	add("nobody", nil)
	add("empty", func(context.Context, *throttler.Event) {})
	for name, observer := range observers {
		add(name, observer())
	}
	for b.Loop() {
		for name, t := range limiters {
			least[name] = min(least[name], Turn(b, t))
		}
	}
	ns := func(d time.Duration) float64 { return float64(d) / Calls }
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(ns(least["nobody"]), "ns-nobody")
	b.ReportMetric(ns(least["empty"]-least["nobody"]), "ns-empty-more")
	for name := range observers {
		b.ReportMetric(ns(least[name]-least["empty"]), "ns-"+name+"-more")
	}
}

// Turn returns how long one turn of a Throttler takes.
func Turn(t testing.TB, of *throttler.Throttler) time.Duration {
	t.Helper()
	start := time.Now()
	for range Calls {
		if _, err := of.Consume("user:42"); err != nil {
			t.Fatal(err)
		}
	}
	return time.Since(start)
}
