package throttler_test

import (
	"testing"
	"time"

	"github.com/go-throttler/throttler"
)

func BenchmarkConsume(b *testing.B) {
	for _, bench := range []struct {
		name    string
		buckets []throttler.Bucket
	}{
		{"allowed/1", []throttler.Bucket{throttler.NewBucket(time.Hour, 1<<40)}},
		{"allowed/2", []throttler.Bucket{throttler.NewBucket(10*time.Second, 1<<40), throttler.NewBucket(time.Hour, 1<<40)}},
		{"allowed/2continuous", []throttler.Bucket{throttler.NewBucket(10*time.Second, 1<<20).Continuous().Burst(1 << 22), throttler.NewBucket(time.Second, 1<<24).Continuous()}},
		{"denied/2", []throttler.Bucket{throttler.NewBucket(time.Hour, 1), throttler.NewBucket(10*time.Hour, 1<<40)}},
	} {
		t, _ := throttler.New(throttler.Config{Buckets: bench.buckets})
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := t.Consume("user:42"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("clock", func(b *testing.B) {
		base := time.Now()
		for b.Loop() {
			_ = time.Since(base)
		}
	})
}
