package throttlerprom_test

import (
	"context"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/throttlerprom"
)

// BenchmarkObserve measures a decision on two limits in three ways: with no observer, with an empty function, and
// counted.
func BenchmarkObserve(b *testing.B) {
	m, err := throttlerprom.New(prometheus.NewRegistry(), nil)
	require.NoError(b, err)
	native, err := throttlerprom.New(prometheus.NewRegistry(), &throttlerprom.Options{NativeHistograms: true})
	require.NoError(b, err)
	for _, c := range []struct {
		name    string
		observe func(context.Context, *throttler.Event)
	}{{"nobody", nil}, {"empty", func(context.Context, *throttler.Event) {}}, {"prometheus", m.Observe}, {"native", native.Observe}} {
		b.Run(c.name, func(b *testing.B) {
			t, err := throttler.New(throttler.Config{Name: "api", Observe: c.observe, Buckets: []throttler.Bucket{
				throttler.NewBucket(10*time.Second, 1<<40), throttler.NewBucket(time.Hour, 1<<40),
			}})
			require.NoError(b, err)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := t.Consume("user:42"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
