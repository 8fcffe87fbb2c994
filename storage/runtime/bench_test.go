package runtime_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	memstore "github.com/go-throttler/throttler/storage/runtime"
)

var plans = []struct {
	name    string
	buckets []throttler.Bucket
}{
	{"buckets=1/allowed", []throttler.Bucket{throttler.NewBucket(10*time.Second, 1<<40)}},
	{"buckets=2/allowed", []throttler.Bucket{throttler.NewBucket(10*time.Second, 1<<40), throttler.NewBucket(time.Hour, 1<<40)}},
	{"buckets=1/denied", []throttler.Bucket{throttler.NewBucket(time.Hour, 1)}},
	{"buckets=2/denied", []throttler.Bucket{throttler.NewBucket(time.Hour, 1), throttler.NewBucket(10*time.Hour, 1<<40)}},
	{"buckets=2/continuous", []throttler.Bucket{throttler.NewBucket(time.Second, 1<<30).Continuous(), throttler.NewBucket(10*time.Second, 1<<28).Continuous()}},
	{"buckets=2/sliding", []throttler.Bucket{throttler.NewBucket(time.Second, 1<<30).SlidingWindow(), throttler.NewBucket(10*time.Second, 1<<28).SlidingWindow()}},
	{"buckets=4/allowed", []throttler.Bucket{throttler.NewBucket(time.Second, 1<<40), throttler.NewBucket(10*time.Second, 1<<40), throttler.NewBucket(time.Minute, 1<<40), throttler.NewBucket(time.Hour, 1<<40)}},
}

func made(tb testing.TB, b ...throttler.Bucket) *throttler.Throttler {
	tb.Helper()
	t, err := throttler.New(throttler.Config{Buckets: b})
	require.NoError(tb, err)
	return t
}

// BenchmarkClock is the lower bound: no decision is faster than reading the clock.
func BenchmarkClock(b *testing.B) {
	start := time.Now()
	var sum time.Duration
	for b.Loop() {
		sum += time.Since(start)
	}
	require.Positive(b, sum)
}

func BenchmarkHotKey(b *testing.B) {
	for _, plan := range plans {
		b.Run(plan.name, func(b *testing.B) {
			t := made(b, plan.buckets...)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := t.Consume("user:42"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkHotKeyWithLevels(b *testing.B) {
	t, sum := made(b, plans[1].buckets...), int64(0)
	b.ReportAllocs()
	for b.Loop() {
		v, err := t.Consume("user:42")
		if err != nil {
			b.Fatal(err)
		}
		for _, l := range v.Levels() {
			sum += l.Limit >> 40
		}
	}
	require.Positive(b, sum)
}

func BenchmarkHotKeyOfItsOwnBuckets(b *testing.B) {
	t := made(b)
	require.NoError(b, t.AddBucket("user:42", plans[1].buckets...))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := t.Consume("user:42"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkHotKeyObserved(b *testing.B) {
	t, err := throttler.New(throttler.Config{Buckets: plans[1].buckets, Observe: func(context.Context, *throttler.Event) {}})
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := t.Consume("user:42"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkTwoHotKeys(b *testing.B) {
	t, ctx := made(b, plans[0].buckets...), context.Background()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := t.ConsumeAll(ctx, throttler.For("user:42"), throttler.For("org:7")); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkHotKeyParallel(b *testing.B) {
	t := made(b, plans[1].buckets...)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := t.Consume("user:42"); err != nil {
				b.Error(err)
			}
		}
	})
}

// ids are n identifiers of 16 bytes.
func ids(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("user:%011d", i)
	}
	return out
}

func BenchmarkMillionIdentifiersZipf(b *testing.B) {
	const n = 1_000_000
	all, zipf := ids(n), rand.NewZipf(rand.New(rand.NewPCG(1, 2)), 1.1, 1, n-1)
	drawn := make([]string, 1<<20)
	for i := range drawn {
		drawn[i] = all[zipf.Uint64()]
	}
	for _, parallel := range []bool{false, true} {
		b.Run(fmt.Sprintf("parallel=%v", parallel), func(b *testing.B) {
			t := made(b, throttler.NewBucket(time.Hour, 1<<40), throttler.NewBucket(10*time.Hour, 1<<40))
			for _, id := range all {
				if _, err := t.Consume(id); err != nil {
					b.Fatal(err)
				}
			}
			b.ResetTimer()
			if !parallel {
				for i := range b.N {
					_, _ = t.Consume(drawn[i&(len(drawn)-1)])
				}
				return
			}
			b.RunParallel(func(pb *testing.PB) {
				for i := rand.IntN(len(drawn)); pb.Next(); i++ {
					_, _ = t.Consume(drawn[i&(len(drawn)-1)])
				}
			})
		})
	}
}

// BenchmarkMemory reports the live heap of an identifier of 16 bytes with two buckets.
func BenchmarkMemory(b *testing.B) {
	const n = 1_000_000
	all := ids(n)
	for name, buckets := range map[string][]throttler.Bucket{
		"replenish": {throttler.NewBucket(time.Hour, 10), throttler.NewBucket(10*time.Hour, 100)},
		"sliding":   {throttler.NewBucket(time.Hour, 10).SlidingWindow(), throttler.NewBucket(10*time.Hour, 100).SlidingWindow()},
	} {
		b.Run(name, func(b *testing.B) {
			for range b.N {
				before := heap()
				s := memstore.New(nil)
				t, err := throttler.New(throttler.Config{Storage: s, Buckets: buckets})
				require.NoError(b, err)
				for _, id := range all {
					if _, err := t.ConsumeContext(context.Background(), id); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(heap()-before)/n, "bytes/identifier")
				runtime.KeepAlive(s)
			}
		})
	}
}

// BenchmarkMemoryOfOwnBuckets reports the live heap of an identifier whose two buckets came by
// AddBucket, before its first call.
func BenchmarkMemoryOfOwnBuckets(b *testing.B) {
	const n = 200_000
	all := ids(n)
	for range b.N {
		before := heap()
		t := made(b)
		for _, id := range all {
			for _, bucket := range plans[1].buckets {
				require.NoError(b, t.AddBucket(id, bucket))
			}
		}
		b.ReportMetric(float64(heap()-before)/n, "bytes/identifier")
		runtime.KeepAlive(t)
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
