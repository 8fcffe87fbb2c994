package load_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
)

// BenchmarkTheCostOfALoad decides in turns without a Load and with one, and compares the quickest turn of each, which
// nothing disturbed. On a busy machine the difference of two separate benchmarks would mean nothing.
func BenchmarkTheCostOfALoad(b *testing.B) {
	replenish, continuous := throttler.NewBucket(time.Minute, 1<<40), throttler.NewBucket(time.Second, 1<<30).Continuous()
	for _, c := range []struct {
		name   string
		share  float64
		bucket throttler.Bucket
	}{
		{"replenish/all", 1, replenish}, {"replenish/half", 0.5, replenish},
		{"continuous/all", 1, continuous}, {"continuous/half", 0.5, continuous},
	} {
		b.Run(c.name, func(b *testing.B) {
			share := 1.0
			without, with := decisions(b, nil, c.bucket), decisions(b, func() float64 { return share }, c.bucket)
			with() // most identifiers exist before there is a load
			share = c.share
			b.ReportAllocs()
			quickest, quickestWith := time.Hour, time.Hour
			for b.Loop() {
				quickest, quickestWith = min(quickest, without()), min(quickestWith, with())
			}
			b.ReportMetric(float64(quickest)/turn, "ns/decision")
			b.ReportMetric(float64(quickestWith-quickest)/turn, "ns/Load")
		})
	}
}

// turn is the number of decisions in a turn.
const turn = 1000

// decisions returns a function that makes a turn and returns how long it took.
func decisions(b *testing.B, load func() float64, bucket throttler.Bucket) func() time.Duration {
	t, err := throttler.New(throttler.Config{Load: load, Buckets: []throttler.Bucket{bucket.Elastic(1)}})
	require.NoError(b, err)
	return func() time.Duration {
		start := time.Now()
		for range turn {
			if _, err := t.Consume("user:42"); err != nil {
				b.Fatal(err)
			}
		}
		return time.Since(start)
	}
}
