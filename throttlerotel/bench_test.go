package throttlerotel_test

import (
	"testing"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/sdk/metric"

	"github.com/go-throttler/throttler/internal/observers"
	"github.com/go-throttler/throttler/throttlerotel"
)

func BenchmarkObserve(b *testing.B) {
	observers.Compare(b, map[string]func() observers.Observe{"otel": func() observers.Observe {
		m, err := throttlerotel.New(&throttlerotel.Options{MeterProvider: metric.NewMeterProvider(metric.WithReader(metric.NewManualReader()))})
		require.NoError(b, err)
		return m.Observe
	}})
}
