package throttlerotel_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/sdk/metric"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/throttlerotel"
)

// BenchmarkObserve measures a decision on two limits: without an Observe, with an empty function, and with metrics.
func BenchmarkObserve(b *testing.B) {
	m, err := throttlerotel.New(&throttlerotel.Options{MeterProvider: metric.NewMeterProvider(metric.WithReader(metric.NewManualReader()))})
	require.NoError(b, err)
	for _, c := range []struct {
		name    string
		observe func(context.Context, *throttler.Event)
	}{{"nobody", nil}, {"empty", func(context.Context, *throttler.Event) {}}, {"otel", m.Observe}} {
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
