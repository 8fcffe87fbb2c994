package watch

// What happened when: by second for five minutes, and by ten seconds for an hour.

import (
	"time"

	"github.com/go-throttler/throttler"
)

const (
	fine      = 300 // seconds that are kept one by one
	step      = 10  // seconds of a step of the hour
	steps     = 360 // of the hour
	spikeOver = 3   // times the hour
	spikeFrom = 100 // calls in ten seconds: fewer are no spike
	nearOf    = 5   // what leaves less than this part of the limit is near it
)

// outcome is what came of a decision.
type outcome int

const (
	allowed outcome = iota
	denied
	bypassed
	failed
	outcomes
)

func outcomeOf(e *throttler.Event) outcome {
	if e.Verdict.Allowed && !e.Bypassed() && e.Err == nil {
		return allowed // as Result says, which takes longer
	}
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

// counts is what happened in some time.
type counts struct {
	calls          [outcomes]int64
	degraded, near int64 // of these calls
	tokens         int64 // taken, without those given back
	peak           int64 // the most decisions in one second: known of a step only
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

// ring has the counts of the newest slots, each of so many seconds.
type ring struct {
	seconds int64
	newest  int64 // the number of the newest slot
	slots   []counts
}

// add adds to the slot of a second, and returns it: nil if that is forgotten already.
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

// at is the slot of this number, or nil if there is none.
func (r *ring) at(n int64) *counts {
	if n < 0 || n > r.newest || n <= r.newest-int64(len(r.slots)) {
		return nil
	}
	return &r.slots[n%int64(len(r.slots))]
}

// sum adds up the slots from one to before another.
func (r *ring) sum(from, to int64) (sum counts) {
	for n := from; n < to; n++ {
		if c := r.at(n); c != nil {
			sum.add(c)
		}
	}
	return sum
}

// series is the history of one source, of one bucket or of all.
type series struct {
	fine, hour ring
	limit      int64 // of a bucket, as last seen
	period     time.Duration
}

func newSeries() *series {
	return &series{fine: ring{seconds: 1, slots: make([]counts, fine)}, hour: ring{seconds: step, slots: make([]counts, steps)}}
}

func (s *series) add(second int64, c *counts) {
	in, of := s.fine.add(second, c), s.hour.add(second, c)
	if in != nil && of != nil {
		of.peak = max(of.peak, in.decisions())
	}
}

// rate is how much happens before the second now, which is not over and does not count.
func (s *series) rate(now int64) Rate {
	last := s.fine.sum(now-step, now)
	to := max(0, now-step) / step // the first step of the hour that is not wholly before those seconds
	from := max(0, to-steps+1)
	r := Rate{Now: float64(last.decisions()) / step, Peak: s.hour.sum(from, now/step+1).peak}
	if to > from {
		before := s.hour.sum(from, to)
		r.Hour = float64(before.decisions()) / float64((to-from)*step)
		r.Spike = last.decisions() >= spikeFrom && r.Now > spikeOver*r.Hour
	}
	return r
}
