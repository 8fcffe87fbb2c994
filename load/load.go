// Package load lets the limits of a Throttler follow the load of this process.
//
//	c, err := load.New(load.Scheduler(20*time.Millisecond), nil)
//	if err != nil { … }
//	defer c.Close()
//	t, err := throttler.New(throttler.Config{
//		Load:    c.Share,
//		Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 50).Continuous().Elastic(2)},
//	})
//
// A [Controller] asks a [Signal] once per interval. While the signal reports too much load, the share of their limits that
// elastic buckets have is multiplied by Options.Down; otherwise it rises by Options.Up, to at most 1. This is additive
// increase, multiplicative decrease. An overloaded process thus takes from the clients that ask for most, and clients that
// stay below the shrunk limits notice nothing.
//
// A faulty Signal does little harm. One that panics or returns NaN counts as no load. One that blocks leaves the share as
// it is. One that always reports too much ends at Options.Least.
package load

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"time"
)

// Options configures a Controller. The zero value and nil mean the defaults. With these an overload takes the share from 1
// to 1/64 in about 4 s, and from 0 it is back at 1 after 10 s without one.
type Options struct {
	// Interval is the time between two calls of the Signal, at least 1 ms; 0 means 200 ms. It should not be shorter than
	// the Signal's delay: if requests take a second, a latency signal is a second late, and a shorter interval overshoots.
	Interval time.Duration

	// Down is the factor by which the share falls, above 0 and below 1; 0 means 0.8. Up is the step by which it rises,
	// above 0 and at most 1; 0 means 0.02.
	Down, Up float64

	// Least is the smallest share, 0 to 1. At a share of 0 a bucket has the tokens given to its Elastic.
	Least float64

	// Observe, if not nil, is called after each call of the Signal, in the goroutine of the Controller. It is for metrics.
	Observe func(share, signal float64)
}

// Controller computes a share from a Signal. It is safe for concurrent use and must be made by New. It has one goroutine,
// which Close ends.
type Controller struct {
	options Options
	signal  Signal
	share   atomic.Uint64 // a float64, by math.Float64bits
	stop    context.CancelFunc
}

// New starts a Controller, whose share is 1 at first. Its error joins all faults of the options.
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

// faults sets the defaults and returns the faults of the options.
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

// Share returns the present share, from Options.Least to 1. It is the Config.Load of a Throttler.
func (c *Controller) Share() float64 { return math.Float64frombits(c.share.Load()) }

func (c *Controller) set(share float64) { c.share.Store(math.Float64bits(share)) }

// Close ends the Controller, and its share becomes 1 again. Close does not wait: if the Signal is being called, the share
// becomes 1 once that call has returned. Further calls of Close do nothing.
func (c *Controller) Close() { c.stop() }

func (c *Controller) run(ctx context.Context) {
	defer c.set(1) // limits must not stay shrunk when nothing measures the load any more
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

// look calls the Signal and changes the share accordingly.
func (c *Controller) look() {
	signal, share := c.signal.safely(), c.Share()
	if signal > 1 { // false for NaN
		share = max(c.options.Least, share*c.options.Down)
	} else {
		share = min(1, share+c.options.Up)
	}
	c.set(share)
	if c.options.Observe != nil {
		c.options.Observe(share, signal)
	}
}
