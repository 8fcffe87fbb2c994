package watch

// The history: by second for five minutes, and by ten seconds for an hour.

import (
	"time"

	"github.com/go-throttler/throttler"
)

const (
	fine      = 300 // seconds that are kept one by one
	step      = 10  // seconds in one step of the hour
	steps     = 360 // in the hour
	spikeOver = 3   // a spike is over this many times the rate of the hour
	spikeFrom = 100 // calls in ten seconds; fewer are never a spike
	nearOf    = 5   // a call that leaves less than one in this many tokens of the limit is near it
)

// outcome is the result of a decision.
type outcome int

const (
	allowed outcome = iota
	denied
	bypassed
	failed
	outcomes
)

// outcomeOf is Result as an index.
func outcomeOf(e *throttler.Event) outcome {
	switch e.Result() {
	case "allowed":
		return allowed
	case "denied":
		return denied
	case "bypassed":
		return bypassed
	}
	return failed
}

// counts holds what happened in some span of time.
type counts struct {
	calls          [outcomes]int64
	degraded, near int64 // how many of these calls
	tokens         int64 // taken, minus refunded
	peak           int64 // the most decisions in one second; set only for a step of the hour
}

func (c *counts) decisions() (sum int64) {
	for _, n := range c.calls {
		sum += n
	}
	return sum
}

func (c *counts) add(d *counts) {
	for i, n := range d.calls {
		c.calls[i] += n
	}
	c.degraded += d.degraded
	c.near += d.near
	c.tokens += d.tokens
	c.peak = max(c.peak, d.peak)
}

// ring holds the counts of the newest slots. Each slot spans the given number of seconds.
type ring struct {
	seconds int64
	newest  int64 // number of the newest slot
	slots   []counts
}

// add adds c to the slot of a second and returns the slot, or nil if the ring no longer has it. It clears the slots
// between the newest and this one, which it reuses.
func (r *ring) add(second int64, c *counts) *counts {
	n, size := second/r.seconds, int64(len(r.slots))
	for i := max(r.newest, n-size) + 1; i <= n; i++ {
		r.slots[i%size] = counts{}
	}
	r.newest = max(r.newest, n)
	slot := r.at(n)
	if slot != nil {
		slot.add(c)
	}
	return slot
}

// at returns the slot of number n, or nil if the ring does not have it.
func (r *ring) at(n int64) *counts {
	if n < 0 || n > r.newest || n <= r.newest-int64(len(r.slots)) {
		return nil
	}
	return &r.slots[n%int64(len(r.slots))]
}

// sum adds up the slots of [from, to).
func (r *ring) sum(from, to int64) (sum counts) {
	for n := from; n < to; n++ {
		if c := r.at(n); c != nil {
			sum.add(c)
		}
	}
	return sum
}

// series is the history of one source, of one bucket, or of everything.
type series struct {
	fine, hour ring
	limit      int64 // of a bucket, as last seen
	period     time.Duration
}

func newSeries() *series {
	// One slot more than is shown: the newest is not over, and must not take the place of the oldest that is shown.
	return &series{fine: ring{seconds: 1, slots: make([]counts, fine+1)}, hour: ring{seconds: step, slots: make([]counts, steps+1)}}
}

func (s *series) add(second int64, c *counts) {
	in, of := s.fine.add(second, c), s.hour.add(second, c)
	if in != nil && of != nil {
		of.peak = max(of.peak, in.decisions())
	}
}

// rate returns the rates before the second now, which is not over and does not count.
func (s *series) rate(now int64) Rate {
	last := s.fine.sum(now-step, now)
	to := max(0, now-step) / step // first step of the hour that is not wholly before the last ten seconds
	from := max(0, to-steps+1)
	r := Rate{Now: float64(last.decisions()) / step, Peak: s.hour.sum(from, now/step+1).peak}
	if to > from {
		before := s.hour.sum(from, to)
		r.Hour = float64(before.decisions()) / float64((to-from)*step)
		r.Spike = last.decisions() >= spikeFrom && r.Now > spikeOver*r.Hour
	}
	return r
}
