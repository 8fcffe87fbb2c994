package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"
)

const (
	many, few = 95, 5 // users
	patience  = time.Second
)

// demo sends the load to one server.
type demo struct {
	url    string
	client *http.Client
	stdout io.Writer
	most   float64 // answers that the server can give per second

	mu  sync.Mutex // guards now
	now counts
}

// counts are the results of one second, or of several.
type counts struct {
	good         [2]int // good answers: to the 95 users, and to the 5
	late, denied int
	took         []time.Duration // time of each admitted request
	failed       error
}

// result has the good answers per second in the overload, and the time within which 99 % of the admitted requests were
// answered, before the overload and in it.
type result struct {
	good         [2]float64
	calm, loaded time.Duration
}

func newDemo(url string, stdout io.Writer) *demo {
	return &demo{url: url, stdout: stdout, client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1000}, Timeout: patience}}
}

// measure finds out how many answers per second the server can give. Two callers send one request after the other, each as
// a new user, so that no limit denies any.
func (d *demo) measure(ctx context.Context) error {
	const length, callers = 2 * time.Second, 2
	brief, stop := context.WithTimeout(ctx, length)
	defer stop()
	var running sync.WaitGroup
	for range callers {
		running.Go(func() {
			for brief.Err() == nil {
				d.ask(brief, 0, fmt.Sprint("first:", rand.Uint64()))
			}
		})
	}
	running.Wait()
	c := d.take()
	d.most = float64(c.good[0]) / length.Seconds()
	if ctx.Err() == nil && d.most == 0 {
		return errors.Join(errors.New("the server does not answer"), c.failed)
	}
	return ctx.Err()
}

// run sends the normal load, the overload and the normal load again, and prints a line each second.
func (d *demo) run(ctx context.Context, calm, overload time.Duration) (r result, err error) {
	_, _ = fmt.Fprintf(d.stdout, "It can give %.0f answers a second.\n", d.most)
	_, _ = fmt.Fprintf(d.stdout, "%6s %18s %18s %8s %8s %12s\n", "second", "95 users, good/s", "5 users, good/s", "late", "denied", "99 % within")
	var running sync.WaitGroup
	defer running.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	for i := range many {
		running.Go(func() { d.user(ctx, 0, i, 0.4*d.most/many, 2) })
	}
	for i := range few {
		running.Go(func() {
			loaded, end := context.WithTimeout(ctx, calm+overload)
			defer end()
			sleep(loaded, calm)
			d.user(loaded, 1, many+i, 1.1*d.most/few, 0)
		})
	}
	return d.seconds(ctx, int(calm/time.Second), int(overload/time.Second))
}

// seconds prints a line each second and returns the result.
func (d *demo) seconds(ctx context.Context, calm, overload int) (r result, err error) {
	var before, loaded counts
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for n := 1; n <= 2*calm+overload; n++ {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return r, context.Cause(ctx)
		}
		c := d.take()
		if c.failed != nil {
			return r, c.failed
		}
		_, _ = fmt.Fprintf(d.stdout, "%6d %18d %18d %8d %8d %12s\n", n, c.good[0], c.good[1], c.late, c.denied, told(c.p99()))
		switch {
		case n <= calm:
			before.add(&c)
		case n <= calm+overload:
			loaded.add(&c)
		}
	}
	seconds := float64(overload)
	return result{[2]float64{float64(loaded.good[0]) / seconds, float64(loaded.good[1]) / seconds}, before.p99(), loaded.p99()}, nil
}

// user sends requests at random moments, without waiting for the answers of earlier ones. A request without an answer is
// sent again up to retries times.
func (d *demo) user(ctx context.Context, class, number int, rate float64, retries int) {
	var running sync.WaitGroup
	defer running.Wait()
	key := fmt.Sprint("user:", number)
	for sleep(ctx, time.Duration(rand.ExpFloat64()/rate*float64(time.Second))) {
		running.Go(func() {
			for range 1 + retries {
				if d.ask(ctx, class, key) {
					return
				}
			}
		})
	}
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

// ask sends one request. It returns false if it should be tried again.
func (d *demo) ask(ctx context.Context, class int, key string) bool {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, d.url, http.NoBody)
	if err != nil {
		return d.count(class, 0, 0, err)
	}
	r.Header.Set("X-API-Key", key)
	began, status := time.Now(), 0
	res, err := d.client.Do(r)
	if err == nil {
		status = res.StatusCode
		_, err = io.Copy(io.Discard, res.Body)
		_ = res.Body.Close()
	}
	if ctx.Err() != nil { // the run has ended: this request does not count
		return true
	}
	return d.count(class, status, time.Since(began), err)
}

func (d *demo) count(class, status int, took time.Duration, err error) (done bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := &d.now
	switch {
	case err == nil && status == http.StatusOK:
		c.good[class]++
	case err == nil && status == http.StatusTooManyRequests:
		c.denied++
		return true
	case err == nil:
		c.failed = fmt.Errorf("the server answered %d", status)
	case !os.IsTimeout(err):
		c.failed = err
	default:
		c.late++
		took = patience
	}
	c.took = append(c.took, took)
	return err == nil
}

// take returns the counts since the last call, and starts over.
func (d *demo) take() counts {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.now
	d.now = counts{}
	return c
}

func (c *counts) add(o *counts) {
	c.good[0] += o.good[0]
	c.good[1] += o.good[1]
	c.took = append(c.took, o.took...)
}

// p99 returns the time within which 99 % of the admitted requests were answered.
func (c *counts) p99() time.Duration {
	if len(c.took) == 0 {
		return 0
	}
	slices.Sort(c.took)
	return c.took[len(c.took)*99/100]
}
