// Waiting until a call is admitted. line.go has the queue of denied callers, turns.go the callers with a reservation.

package throttler

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// Wait blocks until the call is admitted and takes the cost. It returns an error, never a denied Verdict
// without one. Without a deadline it waits as long as it must. It waits by Config.Clock.
//
// If all buckets are Continuous, Wait reserves (see Reserve) and sleeps until the reserved moment. Calls are admitted in the
// order of their arrival, including those of other processes. With Continuous().Burst(1) this is a leaky bucket. If the
// context ends first, the tokens are given back as by Refund.
//
// Other buckets, calls with AtMost, and calls that find no more to reserve use a line: denied calls queue up, one line for
// each identifier and Throttler. The first in the line asks again after RetryAfter. When tokens are back, as many calls as
// there are tokens ask together. The lines of several processes are not ordered.
//
// A Reset, an AddBucket and a RemoveBucket of this Throttler take effect at once; so do its Refund and Charge for a line. A
// line notices within a second what other processes do. Callers with a reservation notice within a second that a Refund has
// freed tokens, and that another process has called Reset. They cannot notice a Reset if others have taken as much again
// since: then those act beside them.
//
// If the context's deadline comes before RetryAfter, or before the calls ahead in the line can be admitted, Wait returns
// the denied Verdict at once, with an error that wraps context.DeadlineExceeded. If the context ends later, Wait returns the
// context's error; a caller that leaves delays nobody. With Config.Clock the deadline must be by that clock too. If
// Config.MaxWaiters callers wait for the identifier already, the error is ErrTooManyWaiters.
func (t *Throttler) Wait(ctx context.Context, id string, o ...Option) (v Verdict, err error) {
	if t.observe != nil {
		return t.WaitAll(ctx, For(id, slices.Clone(o)...))
	}
	nobody := t.waiters.none(id)
	if nobody { // the usual case: nobody waits, and the call is admitted at once
		if err = t.aheadOne(ctx, &v, id, o); err != nil || v.Allowed && v.Delay == 0 {
			return v, err
		}
	}
	err = t.wait(ctx, &v, nobody, []Part{For(id, slices.Clone(o)...)})
	return v, err
}

// aheadOne is ahead for one identifier, without its allocations.
func (t *Throttler) aheadOne(ctx context.Context, v *Verdict, id string, o []Option) error {
	if err := t.add(v, storage.Take, id, o); err != nil {
		return t.wrong(ctx, v, storage.Take, 1, id, o, err)
	}
	if reservable(v) {
		v.within = t.within(ctx)
	}
	return t.ask(ctx, v, storage.Take, 1)
}

// WaitAll is Wait for several identifiers: it takes from all buckets of all parts, or from none. It waits in the line of the
// identifier that denied it first.
func (t *Throttler) WaitAll(ctx context.Context, parts ...Part) (v Verdict, err error) {
	if t.observe == nil || len(parts) == 0 {
		return t.waitAll(ctx, parts)
	}
	start := law.Elapsed()
	v, err = t.waitAll(ctx, parts)
	t.tell(ctx, t.event(OpWait, 0, parts[0].id, largestCost(&v)), &v, err, start, law.Elapsed())
	return v, err
}

func (t *Throttler) waitAll(ctx context.Context, parts []Part) (v Verdict, err error) {
	nobody := !slices.ContainsFunc(parts, func(p Part) bool { return !t.waiters.none(p.id) })
	if nobody {
		if err = t.ahead(ctx, nil, &v, parts); err != nil || v.Allowed && v.Delay == 0 {
			return v, err
		}
	}
	err = t.wait(ctx, &v, nobody, parts)
	return v, err
}

// wait makes the call a waiter. If asked, the call was decided already and v is the answer.
func (t *Throttler) wait(ctx context.Context, v *Verdict, asked bool, parts []Part) error {
	w, full := t.waiters.enter(parts, t.least(parts))
	if w == nil {
		if v.Allowed {
			t.giveBack(ctx, v, 1)
			denied(v)
		}
		return fmt.Errorf("%w: %d wait for %.64q", ErrTooManyWaiters, t.waiters.most, full)
	}
	defer t.leave(ctx, w)
	if asked {
		w.attempts = 1
		if v.Delay > 0 {
			w.reserved(v)
		}
	}
	for again := true; again; asked = false {
		err := t.admit(ctx, w, v, parts, asked)
		if err == nil {
			again, err = t.due(ctx, w, v, parts)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// ahead asks once. Where that is possible it reserves, as far ahead as the deadline, and puts w among those who wait for their
// turn.
func (t *Throttler) ahead(ctx context.Context, w *waiter, v *Verdict, parts []Part) error {
	*v = Verdict{}
	within := t.within(ctx)
	if w == nil || len(w.lines) == 0 {
		return t.decideAll(ctx, v, storage.Take, within, w.again(), parts)
	}
	w.news.Store(int32(nothing)) // the answer will know of it
	w.lines[0].giving.RLock()
	defer w.lines[0].giving.RUnlock()
	err := t.decideAll(ctx, v, storage.Take, within, w.again(), parts)
	if err == nil && v.Delay > 0 {
		w.reserved(v)
	}
	return err
}

// within is how far ahead to reserve, in microseconds: until the deadline, but at most law.MaxWithin.
func (t *Throttler) within(ctx context.Context) int64 {
	if left, ok := t.left(ctx); ok {
		return max(0, min(left.Microseconds(), law.MaxWithin))
	}
	return law.MaxWithin
}

// admit asks until the call is admitted. It asks at once if nobody is in line before it. If asked, v is already the answer.
func (t *Throttler) admit(ctx context.Context, w *waiter, v *Verdict, parts []Part, asked bool) error {
	l := w.behind()
	if l == nil && !asked {
		if err := t.ahead(ctx, w, v, parts); err != nil {
			return err
		}
		asked = true
	}
	if asked && v.Allowed {
		return nil
	}
	if l == nil {
		id, _ := deniedBy(v)
		l = w.lineOf(id)
	}
	return t.queue(ctx, w, l, v, parts, asked)
}

// queue waits in a line until the call is admitted.
func (t *Throttler) queue(ctx context.Context, w *waiter, l *line, v *Verdict, parts []Part, asked bool) error {
	ahead, mine := l.join(w)
	if err := t.inTime(ctx, w, v, parts, ahead, asked); err != nil {
		return err
	}
	for asked = asked && mine; ; asked = false {
		if !mine {
			select {
			case <-w.turn:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if !asked {
			if err := t.ahead(ctx, w, v, parts); err != nil {
				return err
			}
			if v.Allowed {
				l.admitted(w, leastLeft(v))
				return nil
			}
			if err := t.inTime(ctx, w, v, parts, 0, true); err != nil {
				return err
			}
		}
		if mine = l.denied(w); mine {
			// The lower bound is for a storage that breaks the contract and names no time: it is not asked in a busy loop.
			retry := min(max(v.RetryAfter, time.Millisecond/8), notice)
			if _, err := t.sleep(ctx, w, t.micros()+retry.Microseconds()); err != nil {
				return err
			}
		}
	}
}

// notice is within what time waiters notice what other processes do.
const notice = time.Second

// inTime fails if the call cannot be admitted before its deadline, given that the calls ahead of it take so many tokens. If
// asked, v is the answer to the call. Afterwards v says how long the call would have to wait.
func (t *Throttler) inTime(ctx context.Context, w *waiter, v *Verdict, parts []Part, ahead int64, asked bool) error {
	left, ok := t.left(ctx)
	if !ok && (asked || t.observe == nil) { // Observe is told the levels of each call that waits
		return ctx.Err()
	}
	if !asked || reservable(v) {
		var now Verdict
		if err := t.decideAll(ctx, &now, storage.Peek, 0, w.again(), parts); err != nil {
			return err
		}
		now.Allowed = false
		*v = now
	}
	if wait := max(v.RetryAfter, earliest(v, ahead)); ok && wait > left {
		return fmt.Errorf("throttler: %.64q has to wait for %v: %w", parts[0].id, wait, context.DeadlineExceeded)
	}
	return nil
}

// least is how many tokens a call takes, at least, from each bucket of its identifiers. It is 0 for a call that brings its
// own buckets, since it takes nothing from those of the others.
func (t *Throttler) least(parts []Part) (n int64) {
	n = math.MaxInt32
	for i := range parts {
		_, cost := t.setOf(parts[i].id, parts[i].options)
		n = min(n, cost)
		for _, o := range parts[i].options {
			switch o.kind {
			case usingOption:
				return 0
			case costOfOption:
				n = min(n, o.n)
			case atMostOption:
				n = min(n, 1)
			}
		}
	}
	return max(n, 0)
}

// left returns the time until the deadline, if there is one.
func (t *Throttler) left(ctx context.Context) (time.Duration, bool) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return 0, false
	}
	if t.clock != nil {
		return deadline.Sub(t.clock.Now()), true
	}
	return time.Until(deadline), true
}

// earliest is a lower bound of the wait: before it, the buckets cannot have refilled what the calls ahead take and one token.
func earliest(v *Verdict, ahead int64) (wait time.Duration) {
	n := 0
	for _, p := range v.parts() {
		for j := range p.Rules.Rules {
			r, c := &p.Rules.Rules[j], v.all()[n]
			if v.asked()[n] > 0 {
				wait = max(wait, duration(comesBack(r, &c, ahead+1-c.Remaining)))
			}
			n++
		}
	}
	return wait
}

// comesBack is how many microseconds a bucket needs, at least, to refill n tokens more than it has.
func comesBack(r *law.Rule, c *storage.Count, n int64) int64 {
	if n <= 0 {
		return 0
	}
	periods := (n - 1) / r.Capacity // after the first refill, which may be of the whole capacity
	switch r.Kind {
	case law.Continuous:
		return int64(float64(n-1) / float64(r.Refill) * float64(r.Period))
	case law.SlidingWindow, law.SlidingLog: // these may refill nearly twice the capacity within a period, or a grain early
		periods = max(0, periods-1)
	}
	return c.NextAfter + min(periods, math.MaxInt32)*r.Period
}

// leastLeft is the smallest number of tokens left in the buckets that the call took from.
func leastLeft(v *Verdict) int64 {
	least := int64(math.MaxInt64)
	for n, cost := range v.asked() {
		if cost > 0 {
			least = min(least, v.all()[n].Remaining)
		}
	}
	return least
}

// micros is the time by the Throttler's clock, the same clock as Verdict.at.
func (t *Throttler) micros() int64 {
	if now, clocked, err := t.now(); clocked && err == nil {
		return now
	}
	return law.Monotonic()
}

// sleep sleeps until the time of micros, which may be never. The end of the context and news for w wake it earlier.
func (t *Throttler) sleep(ctx context.Context, w *waiter, until int64) (news, error) {
	for {
		now := t.micros()
		if now >= until {
			return nothing, nil
		}
		over, stop := t.timer(until, now)
		if t.clock != nil && t.micros()-now >= movedAtOnce {
			continue
		}
		select {
		case <-over:
		case <-ctx.Done():
			stop()
			return nothing, ctx.Err()
		case <-w.poke:
			stop()
			if n := news(w.news.Swap(int32(nothing))); n != nothing { // nothing: an earlier poke has delivered it
				return n, nil
			}
		}
	}
}

// movedAtOnce is a jump in microseconds. An injected clock that advances this much while a timer is made was moved, so the timer
// may be too late.
const movedAtOnce = 1000

func (t *Throttler) timer(until, now int64) (over <-chan time.Time, stop func() bool) {
	d := time.Duration(until-now) * time.Microsecond
	switch {
	case until == never:
		return nil, func() bool { return false }
	case t.clock != nil:
		return t.clock.After(d), func() bool { return false }
	}
	timer := time.NewTimer(d)
	return timer.C, timer.Stop
}
