package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/ratelimit"
	"golang.org/x/time/rate"

	"github.com/go-throttler/throttler"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
)

// BenchmarkWait measures how much of the rate of a leaky bucket its waiters get, in percent. Each contender runs for a second in
// each round; the result is the median of the rounds. It fails if any call is admitted earlier than the rate allows, counted
// from the beginning of the run. A waiter that wakes up late makes the next ones seem early: early-ms is the largest such
// difference in any part of the run.
//
//	cd benchmarks && go test -run xxx -bench 'Wait/' -benchtime 5x .
func BenchmarkWait(b *testing.B) {
	for _, s := range storages(b) {
		for _, perSecond := range []int64{100, 1000, 10_000} {
			if s.name != "process" && perSecond > 1000 {
				continue
			}
			for _, waiters := range []int{16, 100} {
				b.Run(fmt.Sprintf("%s/rate=%d/waiters=%d", s.name, perSecond, waiters), func(b *testing.B) {
					parts, early := map[string][]float64{}, map[string]time.Duration{}
					for range b.N {
						for name, wait := range leaky(b, s, perSecond) {
							start, log := logOf(waiters, wait)
							p, e := judge(b, perSecond, start, log)
							parts[name], early[name] = append(parts[name], p), max(early[name], e)
						}
					}
					for name, all := range parts {
						slices.Sort(all)
						b.ReportMetric(100*all[len(all)/2], "%:"+name)
						b.ReportMetric(early[name].Seconds()*1000, "early-ms:"+name)
					}
				})
			}
		}
	}
}

// BenchmarkWaitWithTokens compares 1,000 concurrent calls of Wait with 1,000 of Consume if there are tokens for all. It reports
// the minimum of all rounds, and fails if Wait takes more than twice as long.
//
//	cd benchmarks && go test -run xxx -bench WaitWithTokens -benchtime 20x .
func BenchmarkWaitWithTokens(b *testing.B) {
	const calls = 1000
	ctx := context.Background()
	for _, s := range storages(b) {
		for _, bucket := range []throttler.Bucket{throttler.NewBucket(time.Hour, 1e9).Continuous().Named("continuous"), throttler.NewBucket(time.Hour, 1e9).Named("replenish")} {
			b.Run(s.name+"/"+bucket.Name(), func(b *testing.B) {
				t := s.throttler(b, bucket)
				ways := map[string]func() error{
					"Wait":    func() error { _, err := t.Wait(ctx, "a"); return err },
					"Consume": func() error { _, err := t.ConsumeContext(ctx, "a"); return err },
				}
				least := map[string]time.Duration{}
				for range 1 + b.N {
					for name, call := range ways {
						took := atOnce(b, calls, call)
						if before, ok := least[name]; !ok || took < before {
							least[name] = took
						}
					}
				}
				for name, took := range least {
					b.ReportMetric(took.Seconds()*1e6, "µs:"+name)
				}
				times := float64(least["Wait"]) / float64(least["Consume"])
				b.ReportMetric(times, "times")
				if b.N > 1 && times > 2 {
					b.Errorf("%d calls of Wait take %.1f times as long as of Consume", calls, times)
				}
			})
		}
	}
}

// atOnce returns how long that many calls take if they begin together.
func atOnce(b *testing.B, calls int, call func() error) time.Duration {
	b.Helper()
	begin := make(chan struct{})
	var done sync.WaitGroup
	for range calls {
		done.Go(func() {
			<-begin
			if err := call(); err != nil {
				b.Error(err)
			}
		})
	}
	start := time.Now()
	close(begin)
	done.Wait()
	return time.Since(start)
}

// store is a storage that a Throttler is measured with.
type store struct {
	name string
	open func() (throttler.Config, func(), error)
}

// storages returns the storage in the process, and a Redis and a Postgres. The servers run until the end of the benchmark.
func storages(b *testing.B) []store {
	b.Helper()
	redis, err := startRedis(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(redis.close)
	postgres, err := startPostgres(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(postgres.close)
	return []store{
		{"process", func() (throttler.Config, func(), error) { return throttler.Config{}, func() {}, nil }},
		{"redis", throttlerOnRedis(redis.url)},
		{"postgres", throttlerOnPostgres(postgres.url, pgstore.Options{})},
	}
}

// throttler returns a Throttler on the storage. Its identifier "a" has a full bucket.
func (s store) throttler(b *testing.B, bucket throttler.Bucket) *throttler.Throttler {
	b.Helper()
	c, done, err := s.open()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(done)
	c.Buckets = []throttler.Bucket{bucket}
	t, err := throttler.New(c)
	if err != nil {
		b.Fatal(err)
	}
	if err := t.Reset(context.Background(), "a"); err != nil {
		b.Fatal(err)
	}
	return t
}

// leaky returns the Wait of each contender for a leaky bucket. The peers have one only in the process.
func leaky(b *testing.B, s store, perSecond int64) map[string]func(context.Context) error {
	b.Helper()
	t := s.throttler(b, throttler.NewBucket(time.Second, perSecond).Continuous().Burst(1))
	all := map[string]func(context.Context) error{
		"throttler": func(ctx context.Context) error { _, err := t.Wait(ctx, "a"); return err },
	}
	if s.name == "process" {
		uber := ratelimit.New(int(perSecond), ratelimit.WithoutSlack)
		all["x/time"] = rate.NewLimiter(rate.Limit(perSecond), 1).Wait
		all["uber"] = func(ctx context.Context) error { uber.Take(); return ctx.Err() }
	}
	return all
}

// logOf lets that many waiters call wait in a loop for a second, and returns when each call was admitted, in order.
func logOf(waiters int, wait func(context.Context) error) (start time.Time, log []time.Time) {
	var mu sync.Mutex
	var done sync.WaitGroup
	start = time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for range waiters {
		done.Go(func() {
			for wait(ctx) == nil {
				now := time.Now()
				mu.Lock()
				log = append(log, now)
				mu.Unlock()
			}
		})
	}
	done.Wait()
	slices.SortFunc(log, time.Time.Compare)
	return start, log
}

// judge returns how much of the rate a log has used, from 0 to 1, and by how much a call was early at most in relation to any
// call before it.
func judge(b *testing.B, perSecond int64, start time.Time, log []time.Time) (part float64, early time.Duration) {
	b.Helper()
	if len(log) == 0 {
		b.Fatal("nobody was admitted")
	}
	latest := time.Duration(-1 << 62)
	for i, at := range log {
		late := at.Sub(start) - time.Duration(i)*time.Second/time.Duration(perSecond)
		if late < -time.Millisecond { // a tolerance, since the servers have clocks of their own
			b.Errorf("call %d of %d a second was admitted %v after the beginning, %v early", i, perSecond, at.Sub(start), -late)
		}
		latest = max(latest, late)
		early = max(early, latest-late)
	}
	return float64(len(log)-1) / (log[len(log)-1].Sub(start).Seconds() * float64(perSecond)), early
}
