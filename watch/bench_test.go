package watch_test

import (
	"context"
	"testing"
	"time"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/watch"
	"github.com/stretchr/testify/require"
)

func BenchmarkObserve(b *testing.B) {
	for name, observe := range map[string]func(context.Context, *throttler.Event){"empty": func(context.Context, *throttler.Event) {}, "watch": watch.New(nil).Observe} {
		b.Run(name, func(b *testing.B) {
			t, err := throttler.New(throttler.Config{Observe: observe, Buckets: []throttler.Bucket{throttler.NewBucket(10*time.Second, 1<<40), throttler.NewBucket(time.Hour, 1<<41)}})
			require.NoError(b, err)
			b.ReportAllocs()
			for b.Loop() {
				_, _ = t.Consume("user:42")
			}
		})
	}
}
