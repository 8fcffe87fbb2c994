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

// BenchmarkObserve puts a watch beside a function that does nothing, by the number of buckets of a call.
func BenchmarkObserve(b *testing.B) {
	for _, buckets := range []int{1, 2} {
		for name, observe := range map[string]func(context.Context, *throttler.Event){
			"nothing": func(context.Context, *throttler.Event) {},
			"watch":   watch.New(nil).Observe,
		} {
			b.Run(fmt.Sprintf("buckets=%d/%s", buckets, name), func(b *testing.B) {
				c := throttler.Config{Observe: observe, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1<<40), throttler.NewBucket(time.Minute, 1<<40)}[:buckets]}
				one, err := throttler.New(c)
				require.NoError(b, err)
				b.ReportAllocs()
				for b.Loop() {
					_, _ = one.Consume("user:42")
				}
			})
		}
	}
}
