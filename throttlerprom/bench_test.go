package throttlerprom_test

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/observers"
	"github.com/go-throttler/throttler/throttlerprom"
)

func BenchmarkObserve(b *testing.B) {
	observer := func(o *throttlerprom.Options) func() observers.Observe {
		return func() observers.Observe {
			m, err := throttlerprom.New(prometheus.NewRegistry(), o)
			require.NoError(b, err)
			return m.Observe
		}
	}
	observers.Compare(b, map[string]func() observers.Observe{
		"prometheus": observer(nil),
		"native":     observer(&throttlerprom.Options{NativeHistograms: true}),
	})
}
