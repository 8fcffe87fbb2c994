package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/storage/failover"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

const (
	who      = "demo"
	callers  = 16
	attempts = 400 // calls per second of all callers together
	rate     = 100 // tokens per second, and the capacity
)

// demo is one run of the demonstration.
type demo struct {
	plan
	redis     *servers.Server
	store     *failover.Storage
	throttler *throttler.Throttler
	stdout    io.Writer
	began     time.Time

	mu       sync.Mutex // guards what follows
	second   counts     // counts of the present second
	all      counts
	admitted []call
	failure  error // the first error that a caller got
}

// counts are the results of one second, or of the whole run.
type counts struct {
	redis, postgres, denied, errors int
	longest                         time.Duration
	events                          []string
}

// run prints a line each second until the load has ended. It fails if Redis cannot be killed or started.
func (d *demo) run(ctx context.Context) error {
	load, stop := context.WithTimeout(ctx, d.end)
	defer stop()
	d.began = time.Now()
	var running sync.WaitGroup
	for i := range callers {
		running.Go(func() { d.calls(load, i) })
	}
	var failed error
	running.Go(func() {
		if failed = d.faults(load); failed != nil {
			stop()
		}
	})
	d.head()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	last := int((d.end + time.Second - 1) / time.Second)
	for n := 1; n < last && load.Err() == nil; n++ {
		select {
		case <-tick.C:
			d.line(n)
		case <-load.Done():
		}
	}
	<-load.Done()
	running.Wait()
	if ctx.Err() != nil {
		return errInterrupted
	}
	d.line(last)
	return failed
}

// calls makes the calls of one caller until the load ends. The end lets a call that has begun finish, so that it is counted.
func (d *demo) calls(load context.Context, i int) {
	const pause = callers * time.Second / attempts
	sleep(load, time.Duration(i)*pause/callers)
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for {
		select {
		case <-load.Done():
			return
		case <-tick.C:
			began := time.Since(d.began)
			v, err := d.throttler.Consume(who)
			d.count(&v, err, call{began, time.Since(d.began)})
		}
	}
}

func (d *demo) count(v *throttler.Verdict, err error, c call) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err == nil && v.Allowed {
		d.admitted = append(d.admitted, c)
	} else if err != nil && d.failure == nil {
		d.failure = err
	}
	for _, n := range []*counts{&d.second, &d.all} {
		n.longest = max(n.longest, c.ended-c.began)
		switch {
		case err != nil:
			n.errors++
		case !v.Allowed:
			n.denied++
		case v.Source() == redisstore.Source:
			n.redis++
		default:
			n.postgres++
		}
	}
}

// faults kills Redis and starts it again.
func (d *demo) faults(load context.Context) error {
	if !sleep(load, d.kill) {
		return nil
	}
	d.happens("Redis is killed")
	if err := d.redis.Kill(); err != nil {
		return err
	}
	if !sleep(load, d.restart-time.Since(d.began)) {
		return nil
	}
	d.happens("Redis starts, empty")
	return d.redis.Start()
}

// observe notes who decides, as the storage reports it.
func (d *demo) observe(e failover.Event) {
	switch e.Kind {
	case failover.PrimaryLost:
		d.happens("Postgres decides")
	case failover.PrimaryBack:
		d.happens("Redis decides again")
	}
}

func (d *demo) happens(event string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.second.events = append(d.second.events, event)
}

func (d *demo) head() {
	d.print("%d are allowed a second, and %d at once; %d a second are asked for.\n\n", rate, rate, attempts)
	d.row("s", "Redis", "Postgres", "denied", "errors", "longest", "pending", "state", "what happens")
}

// line prints the counts of the present second and begins the next one.
func (d *demo) line(n int) {
	d.mu.Lock()
	c := d.second
	d.second = counts{}
	d.mu.Unlock()
	now, state := d.store.State(), "normal"
	if now.Degraded {
		state = "degraded"
	}
	longest := fmt.Sprintf("%.1f ms", float64(c.longest.Microseconds())/1000)
	d.row(n, c.redis, c.postgres, c.denied, c.errors, longest, now.Pending, state, strings.Join(c.events, "; "))
}

func (d *demo) row(columns ...any) {
	line := fmt.Sprintf("%2v %5v %8v %6v %6v %8v %7v  %-8v  %v", columns...)
	d.print("%s\n", strings.TrimRight(line, " "))
}

func (d *demo) print(format string, args ...any) {
	_, _ = fmt.Fprintf(d.stdout, format, args...) // fails if nobody reads the output; the run ends as planned all the same
}

// judge prints what was admitted and what the limit allows in that time. It fails if more was admitted than the documented
// bound, or if a caller got an error.
func (d *demo) judge(ctx context.Context) error {
	v, err := d.throttler.Peek(ctx, who, throttler.Cost(0))
	if err != nil {
		return fmt.Errorf("a look at what is left: %w", err)
	}
	counted := int64(0)
	for _, l := range v.Levels() {
		if l.Bucket == "hour" {
			counted = l.Limit - l.Remaining
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	c, n, took := &d.all, len(d.admitted), span(d.admitted)
	over, bound := max(excess(d.admitted), n-int(counted)), most(d.admitted, margin)
	d.print("\nAdmitted: %d in %.2f s, %d by Redis and %d by Postgres. The hourly limit has counted %d.\n", n, took.Seconds(), c.redis, c.postgres, counted)
	d.print("Allowed in this time: %d, which is %d at once and %d a second.\n", rate+int(rate*took.Seconds()), rate, rate)
	held := "The limit held, in all and in each interval"
	if over > 0 {
		held = fmt.Sprintf("The limit was exceeded by %d; the bound is %d", over, bound)
	}
	d.print("%s. Callers saw %d errors.\n", held, c.errors)
	var faults []error
	if over > bound {
		faults = append(faults, fmt.Errorf("%d too many were admitted, more than %d", over, bound))
	}
	if c.errors > 0 {
		faults = append(faults, fmt.Errorf("%d callers saw an error: %w", c.errors, d.failure))
	}
	return errors.Join(faults...)
}

// sleep reports whether the time passed before the context was done.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
