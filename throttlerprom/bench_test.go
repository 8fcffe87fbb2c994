package throttlerprom_test

import (
	"context"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/observers"
	"github.com/go-throttler/throttler/throttlerprom"
)

func BenchmarkObserve(b *testing.B) {
	m, err := throttlerprom.New(prometheus.NewRegistry(), nil)
	require.NoError(b, err)
	native, err := throttlerprom.New(prometheus.NewRegistry(), &throttlerprom.Options{NativeHistograms: true})
	require.NoError(b, err)
	observers.Compare(b, map[string]func(context.Context, *throttler.Event){"prometheus": m.Observe, "native": native.Observe})
}
