// Waiting until a call is admitted. Who was denied is in line.go, who has reserved in turns.go.

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
// Where all buckets are Continuous it reserves (see Reserve) and sleeps until that moment: calls are admitted in the order
// of their arrival, also those of other processes. With Continuous().Burst(1) it is a leaky bucket. If the context ends
// first, the tokens are given back as by Refund. For other buckets, with AtMost, and where no more can be reserved, calls
// that were denied form a line, one an identifier and Throttler. The first in it asks again when RetryAfter has passed, and
// as many as there are tokens for ask together. Nothing orders the lines of several processes.
//
// A Reset, an AddBucket and a RemoveBucket of this Throttler count at once for those who wait, a Refund and a Charge for the
// line. A line notices within a second what others do.
//
// When the context's deadline is nearer than RetryAfter, or than those before it in the line allow, it returns at once
// the denied Verdict and an error that wraps context.DeadlineExceeded. A context that ends later
// returns its own error; leaving holds up nobody. With Config.Clock the deadline must be by that clock too. If
// Config.MaxWaiters wait for the identifier it returns ErrTooManyWaiters.
func (t *Throttler) Wait(ctx context.Context, id string, o ...Option) (v Verdict, err error) {
	if t.observe != nil {
		return t.WaitAll(ctx, For(id, slices.Clone(o)...))
	}
	nobody := t.waiters.none(id)
	if nobody { // nearly always, nobody waits and nobody has to
		if err = t.aheadOne(ctx, &v, id, o); err != nil || v.Allowed && v.Delay == 0 {
			return v, err
		}
	}
	err = t.wait(ctx, &v, nobody, []Part{For(id, slices.Clone(o)...)})
	return v, err
}

// aheadOne is ahead for one identifier, without what that allocates.
func (t *Throttler) aheadOne(ctx context.Context, v *Verdict, id string, o []Option) error {
	if err := t.add(v, storage.Take, id, o); err != nil {
		return t.wrong(ctx, v, storage.Take, 1, id, o, err)
	}
	if reservable(v) {
		v.within = t.within(ctx)
	}
	return t.ask(ctx, v, storage.Take, 1)
}

// WaitAll is Wait until all buckets of all parts admit: it takes from all of them, or from none. It waits in the line of the
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

// wait is a call that may have to wait. If it was asked v is the answer.
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

// ahead asks once, and reserves up to the deadline where it may. A waiter then is among those who wait for their turn.
func (t *Throttler) ahead(ctx context.Context, w *waiter, v *Verdict, parts []Part) error {
	*v = Verdict{}
	within := t.within(ctx)
	if w == nil || len(w.lines) == 0 {
		return t.decideAll(ctx, v, storage.Take, within, w.again(), parts)
	}
	w.lines[0].giving.RLock()
	defer w.lines[0].giving.RUnlock()
	err := t.decideAll(ctx, v, storage.Take, within, w.again(), parts)
	if err == nil && v.Delay > 0 {
		w.reserved(v)
	}
	return err
}

// within is the time until the deadline, as far as it may be reserved ahead.
func (t *Throttler) within(ctx context.Context) int64 {
	if left, ok := t.left(ctx); ok {
		return max(0, min(left.Microseconds(), law.MaxWithin))
	}
	return law.MaxWithin
}

// admit asks until the call is admitted: at once, if nobody is in line before it. If it was asked v is the answer.
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
			// A storage that says no time, against the contract, is not asked without end.
			retry := min(max(v.RetryAfter, time.Millisecond/8), notice)
			if _, err := t.sleep(ctx, w, t.micros()+retry.Microseconds()); err != nil {
				return err
			}
		}
	}
}

// notice is how long a line does not notice what others do.
const notice = time.Second

// inTime fails if the deadline is nearer than the call can be admitted, after those ahead in the line have taken so many
// tokens. V is the answer to the call, if it was asked; then it tells how long it would have to wait.
func (t *Throttler) inTime(ctx context.Context, w *waiter, v *Verdict, parts []Part, ahead int64, asked bool) error {
	left, ok := t.left(ctx)
	if !ok && (asked || t.observe == nil) { // Observe is told of each call that waits
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

// least is how many tokens a call asks of each bucket that others of its identifiers ask too: none, if it has buckets of
// its own.
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

// left is the time until the deadline, if there is one.
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

// earliest is a time before which a bucket cannot have given what those ahead and then the call take.
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

// comesBack is how many microseconds so many tokens more than a bucket has take to come back, at least.
func comesBack(r *law.Rule, c *storage.Count, n int64) int64 {
	if n <= 0 {
		return 0
	}
	periods := (n - 1) / r.Capacity // after the first tokens that come back, which may be all
	switch r.Kind {
	case law.Continuous:
		return int64(float64(n-1) / float64(r.Refill) * float64(r.Period))
	case law.SlidingWindow, law.SlidingLog: // around a moment they give nearly twice as much, or a grain early
		periods = max(0, periods-1)
	}
	return c.NextAfter + min(periods, math.MaxInt32)*r.Period
}

// leastLeft is how many tokens the buckets had left, of those that were asked.
func leastLeft(v *Verdict) int64 {
	least := int64(math.MaxInt64)
	for n, cost := range v.asked() {
		if cost > 0 {
			least = min(least, v.all()[n].Remaining)
		}
	}
	return least
}

// micros is the time by the Throttler's clock, by which a verdict's at is too.
func (t *Throttler) micros() int64 {
	if now, clocked, err := t.now(); clocked && err == nil {
		return now
	}
	return law.Monotonic()
}

// sleep sleeps until a time of micros, which may be never, the end of the context, or news for the waiter.
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
			if n := news(w.news.Swap(int32(nothing))); n != nothing { // else it was heard already
				return n, nil
			}
		}
	}
}

// movedAtOnce is by how many microseconds an injected clock was moved, and did not go, while a timer was made.
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
