package main

import (
	"context"
	"runtime"
	"runtime/metrics"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-throttler/throttler"
)

const leavers = 100_000

// BenchmarkLeave measures how long 100,000 waiters take to leave when their context is canceled (ms), and how late a Wait of one
// millisecond for another identifier ends meanwhile (late-ms). For comparison it measures two floors in turn with it: as many
// goroutines that only select on the same context and a timer, on stacks of the size with which Go starts goroutines (floor),
// and on stacks as large as a decision makes them (deep-floor).
//
// It reports the minimum of all rounds. It fails if the waiters take more than 3 times as long as the floor.
//
//	cd benchmarks && go test -run xxx -bench Leave -benchtime 5x .
func BenchmarkLeave(b *testing.B) {
	for name, bucket := range map[string]throttler.Bucket{
		"reserved": throttler.NewBucket(time.Hour, 2*leavers).Continuous().Burst(1),
		"in line":  throttler.NewBucket(time.Hour, 1),
	} {
		b.Run(name, func(b *testing.B) {
			least := map[string]float64{}
			for range b.N {
				for name, w := range map[string]waiting{"": waits(b, bucket), "floor-": floor(0), "deep-floor-": floor(1)} {
					all, late := leave(w)
					for metric, d := range map[string]time.Duration{"ms": all, "late-ms": late} {
						ms := d.Seconds() * 1000
						if before, ok := least[name+metric]; !ok || ms < before {
							least[name+metric] = ms
						}
					}
				}
			}
			for name, ms := range least {
				b.ReportMetric(ms, name)
			}
			b.ReportMetric(least["ms"]/least["floor-ms"], "floors")
			if b.N > 2 && least["ms"] > 3*least["floor-ms"] {
				b.Errorf("they left in %.0f ms, and goroutines that only wait in %.0f", least["ms"], least["floor-ms"])
			}
		})
	}
}

// waiting has two ways to wait: crowd until its context ends, and other for a millisecond.
type waiting struct {
	crowd func(context.Context)
	other func()
}

// waits returns the waiting of Wait for a bucket, with another bucket that admits a call per millisecond.
func waits(b *testing.B, bucket throttler.Bucket) waiting {
	b.Helper()
	t, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{bucket}})
	if err != nil {
		b.Fatal(err)
	}
	if err := t.AddBucket("other", throttler.NewBucket(time.Second, 1000).Continuous().Burst(1)); err != nil {
		b.Fatal(err)
	}
	if _, err := t.Consume("crowd"); err != nil {
		b.Fatal(err)
	}
	return waiting{
		crowd: func(ctx context.Context) { _, _ = t.Wait(ctx, "crowd") },
		other: func() { _, _ = t.Wait(context.Background(), "other") },
	}
}

// floor returns the waiting of goroutines that only select. For a deep above 0 their stacks have grown before, as those of a
// decision do, and they select that many KiB deep.
func floor(deep int) waiting {
	return waiting{
		crowd: func(ctx context.Context) {
			for range deep {
				descend(4)
			}
			onStack(ctx, deep)
		},
		other: func() { <-time.After(time.Millisecond) },
	}
}

// descend makes the stack grow: it recurses deep times, with a frame of a KiB each.
func descend(deep int) byte {
	var frame [1024]byte
	if deep > 0 {
		frame[deep] = descend(deep - 1)
	}
	return frame[deep]
}

// onStack waits for ctx in a frame below that many others of a KiB each.
func onStack(ctx context.Context, deep int) byte {
	var frame [1024]byte
	if deep > 0 {
		frame[deep] = onStack(ctx, deep-1)
		return frame[deep]
	}
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
	return frame[0]
}

// untilAllWait returns when no goroutine is ready to run, so that all that were started wait, or after a minute.
func untilAllWait() {
	ready := []metrics.Sample{{Name: "/sched/goroutines/runnable:goroutines"}}
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); runtime.Gosched() {
		if metrics.Read(ready); ready[0].Value.Uint64() == 0 {
			return
		}
	}
}

// leave returns how long a crowd takes to leave, and how late the other waits ended at most in the meantime.
func leave(w waiting) (all, late time.Duration) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var begun, left, others sync.WaitGroup
	for range leavers {
		begun.Add(1)
		left.Go(func() {
			begun.Done()
			w.crowd(ctx)
		})
	}
	begun.Wait()
	untilAllWait()
	stop, first := make(chan struct{}), make(chan struct{})
	var lates []time.Duration
	others.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				start := time.Now()
				w.other()
				if lates = append(lates, time.Since(start)-time.Millisecond); len(lates) == 1 {
					close(first)
				}
			}
		}
	})
	<-first
	start := time.Now()
	cancel()
	left.Wait()
	all = time.Since(start)
	close(stop)
	others.Wait()
	return all, slices.Max(lates)
}
