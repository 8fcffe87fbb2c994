// Package load lets limits follow the load of this process.
//
//	c, err := load.New(load.Scheduler(20*time.Millisecond), nil)
//	if err != nil { … }
//	defer c.Close()
//	t, err := throttler.New(throttler.Config{
//		Load:    c.Share,
//		Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 50).Continuous().Elastic(2)},
//	})
//
// A Controller asks a Signal once an interval. While that says that the load is too much, the share of their limits that
// elastic buckets have falls by a factor; otherwise it rises by a step, up to 1: additive increase, multiplicative decrease.
// So an overloaded process takes from those who ask for most, and those below the shrunk limits notice nothing.
//
// It fails towards the limits as they are given. A Signal that panics or is NaN counts as no load. One that blocks leaves the
// share as it is, and one that always says too much ends at Options.Least.
package load

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"time"
)

// Options of a Controller. The zero value and nil are the defaults. After a sudden overload these take 4 s from the full
// limits to a 64th, and 10 s back.
type Options struct {
	// Interval is the time between two looks at the Signal, at least 1 ms; 0 is 200 ms. It should be no shorter than the
	// Signal lags behind: with a latency of a second a shorter one overshoots.
	Interval time.Duration

	// Down is the factor by which the share falls, above 0 and below 1; 0 is 0.8. Up is the step by which it rises, above 0
	// and at most 1; 0 is 0.02.
	Down, Up float64

	// Least is the smallest share, 0 to 1. At 0 buckets shrink to what their Elastic says.
	Least float64

	// Observe, if not nil, is called after each look, by the goroutine of the Controller: for metrics.
	Observe func(share, signal float64)
}

// Controller computes a share from a Signal. It is safe for concurrent use, and made by New only. It has one goroutine,
// which Close ends.
type Controller struct {
	options Options
	signal  Signal
	share   atomic.Uint64 // the bits of a float64
	stop    context.CancelFunc
}

// New starts a Controller, whose share is 1 at first, or returns all faults of the options, joined.
func New(s Signal, o *Options) (*Controller, error) {
	c := &Controller{signal: s}
	if o != nil {
		c.options = *o
	}
	if err := errors.Join(c.faults()...); err != nil {
		return nil, err
	}
	c.set(1)
	ctx, stop := context.WithCancel(context.Background())
	c.stop = stop
	go c.run(ctx)
	return c, nil
}

// faults sets the defaults and returns what is wrong.
func (c *Controller) faults() (faults []error) {
	o := &c.options
	if o.Interval == 0 {
		o.Interval = 200 * time.Millisecond
	}
	if o.Down == 0 {
		o.Down = 0.8
	}
	if o.Up == 0 {
		o.Up = 0.02
	}
	fault := func(ok bool, format string, given ...any) {
		if !ok {
			faults = append(faults, fmt.Errorf("load: "+format, given...))
		}
	}
	fault(c.signal != nil, "the Signal is nil, must be a function")
	fault(o.Interval >= time.Millisecond, "Options.Interval is %v, must be at least 1ms", o.Interval)
	fault(o.Down > 0 && o.Down < 1, "Options.Down is %v, must be above 0 and below 1", o.Down)
	fault(o.Up > 0 && o.Up <= 1, "Options.Up is %v, must be above 0 and at most 1", o.Up)
	fault(o.Least >= 0 && o.Least <= 1, "Options.Least is %v, must be 0 to 1", o.Least)
	return faults
}

// Share is for Config.Load of a Throttler: from Options.Least to 1.
func (c *Controller) Share() float64 { return math.Float64frombits(c.share.Load()) }

func (c *Controller) set(share float64) { c.share.Store(math.Float64bits(share)) }

// Close ends the Controller, whose share is 1 afterwards. It waits for nothing: where a Signal is just being asked, that is so
// once it has answered. More than one Close is one.
func (c *Controller) Close() { c.stop() }

func (c *Controller) run(ctx context.Context) {
	defer c.set(1)
	tick := time.NewTicker(c.options.Interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			c.look()
		}
	}
}

// look changes the share by what the signal says.
func (c *Controller) look() {
	signal, share := c.signal.safely(), c.Share()
	if signal > 1 { // NaN is not
		share = max(c.options.Least, share*c.options.Down)
	} else {
		share = min(1, share+c.options.Up)
	}
	c.set(share)
	if c.options.Observe != nil {
		c.options.Observe(share, signal)
	}
}
