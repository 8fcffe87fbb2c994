package throttlerotel_test

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/sdk/metric"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/observers"
	"github.com/go-throttler/throttler/throttlerotel"
)

func BenchmarkObserve(b *testing.B) {
	m, err := throttlerotel.New(&throttlerotel.Options{MeterProvider: metric.NewMeterProvider(metric.WithReader(metric.NewManualReader()))})
	require.NoError(b, err)
	observers.Compare(b, map[string]func(context.Context, *throttler.Event){"otel": m.Observe})
}
