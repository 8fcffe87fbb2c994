package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/ratelimit"
	"golang.org/x/time/rate"

	"github.com/go-throttler/throttler"
)

// BenchmarkWait measures what part of the rate of a leaky bucket its waiters get, in a turn of a second for each contender.
//
//	cd benchmarks && go test -run xxx -bench Wait -benchtime 5x .
func BenchmarkWait(b *testing.B) {
	for _, perSecond := range []int64{100, 1000, 10_000} {
		for _, waiters := range []int{16, 100} {
			b.Run(fmt.Sprintf("rate=%d/waiters=%d", perSecond, waiters), func(b *testing.B) {
				got := map[string]float64{}
				for range b.N {
					for name, wait := range leaky(b, perSecond) {
						got[name] += part(perSecond, waiters, wait)
					}
				}
				for name, sum := range got {
					b.ReportMetric(100*sum/float64(b.N), "%:"+name)
				}
			})
		}
	}
}

// leaky returns a leaky bucket of each contender.
func leaky(b *testing.B, perSecond int64) map[string]func(context.Context) error {
	t, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, perSecond).Continuous().Burst(1)}})
	if err != nil {
		b.Fatal(err)
	}
	x, uber := rate.NewLimiter(rate.Limit(perSecond), 1), ratelimit.New(int(perSecond), ratelimit.WithoutSlack)
	return map[string]func(context.Context) error{
		"throttler": func(ctx context.Context) error { _, err := t.Wait(ctx, "printer"); return err },
		"x/time":    x.Wait,
		"uber":      func(ctx context.Context) error { uber.Take(); return ctx.Err() },
	}
}

// part returns what part of the rate the waiters get, from the first admission to the last.
func part(perSecond int64, waiters int, wait func(context.Context) error) float64 {
	start := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var admitted, last atomic.Int64
	var done sync.WaitGroup
	for range waiters {
		done.Go(func() {
			for wait(ctx) == nil {
				last.Store(int64(time.Since(start)))
				admitted.Add(1)
			}
		})
	}
	done.Wait()
	return float64(admitted.Load()-1) / (time.Duration(last.Load()).Seconds() * float64(perSecond))
}
