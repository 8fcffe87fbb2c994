package watch_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/watch"
)

// BenchmarkObserve reports what a watch costs beyond an observer that does nothing. Both make many short runs in turns
// and the shortest of each counts, which other programs disturb least.
func BenchmarkObserve(b *testing.B) {
	for buckets := 1; buckets <= 4; buckets *= 2 {
		b.Run(fmt.Sprintf("buckets=%d", buckets), func(b *testing.B) {
			var c throttler.Config
			for i := range buckets {
				c.Buckets = append(c.Buckets, throttler.NewBucket(time.Hour, 1<<40).Named(fmt.Sprint("bucket ", i)))
			}
			some := observed(b, watch.New(nil), c)
			c.Observe = func(context.Context, *throttler.Event) {}
			none, err := throttler.New(c)
			require.NoError(b, err)
			watched, nothing := time.Hour, time.Hour
			for b.Loop() {
				nothing, watched = min(nothing, decisions(b, none)), min(watched, decisions(b, some))
			}
			b.ReportMetric(float64(nothing)/calls, "ns-observed-by-nothing")
			b.ReportMetric(float64(watched-nothing)/calls, "ns-beyond")
			b.ReportMetric(0, "ns/op")
		})
	}
}
