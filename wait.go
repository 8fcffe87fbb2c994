// Wait and WaitAll. line.go has the queue of denied callers, turns.go the callers that hold a reservation, and resets.go
// keeps these from holding one that a Reset made void.

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

// Wait blocks until the call is admitted and takes the cost. It returns a denied Verdict only together with an error.
// Without a deadline it waits as long as necessary. Time passes by Config.Clock.
//
// If all buckets are Continuous, Wait reserves (see Reserve) and sleeps until the reserved moment. Calls are admitted in the
// order of their arrival, across all processes. With Continuous().Burst(1) this is a leaky bucket. If the context ends
// first, the tokens are given back as by Refund.
//
// In all other cases denied calls wait in a line: for other buckets, with AtMost, and if no more can be reserved. Each
// Throttler has one line for each identifier. The first call in the line asks again after RetryAfter. Once tokens are
// refilled, as many calls as there are tokens for ask at the same time. Lines of different processes are not ordered among
// each other.
//
// A Reset, an AddBucket or a RemoveBucket of this Throttler takes effect at once: callers with a reservation ask again, in
// no particular order. For a line, a Refund or a Charge of this Throttler takes effect at once too. A line notices within a
// second what other processes do. Callers with a reservation notice within a second that a Refund has freed tokens, or that
// another process has called Reset. They miss a Reset if other callers have taken as many tokens again since; then those
// callers act in addition to them.
//
// If the context's deadline comes before RetryAfter, or before the calls ahead in the line can be admitted, Wait returns
// the denied Verdict at once, with an error that wraps context.DeadlineExceeded. If the context ends later, Wait returns the
// context's error; a caller that leaves delays nobody. With Config.Clock the deadline must be by that clock too. If
// Config.MaxWaiters callers are already waiting for the identifier, the error is ErrTooManyWaiters.
func (t *Throttler) Wait(ctx context.Context, id string, o ...Option) (v Verdict, err error) {
	if t.observe != nil {
		return t.WaitAll(ctx, For(id, slices.Clone(o)...))
	}
	before, nobody := t.waiters.moment(), t.waiters.none(id)
	if nobody { // the fast path for the usual case: nobody waits, and the call is admitted at once
		if err = t.aheadOne(ctx, &v, id, o); err != nil || v.Allowed && v.Delay == 0 {
			return v, err
		}
	}
	err = t.wait(ctx, &v, nobody, before, []Part{For(id, slices.Clone(o)...)})
	return v, err
}

// aheadOne does what ahead does, for one identifier and without the allocations.
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
	before := t.waiters.moment()
	nobody := !slices.ContainsFunc(parts, func(p Part) bool { return !t.waiters.none(p.id) })
	if nobody {
		if err = t.ahead(ctx, nil, &v, parts); err != nil || v.Allowed && v.Delay == 0 {
			return v, err
		}
	}
	err = t.wait(ctx, &v, nobody, before, parts)
	return v, err
}

// wait makes the call a waiter and returns once it is admitted or has failed. If asked is set, the call was decided already and
// v is the answer, asked for after the moment before. If there is no room for another waiter, a reservation in v is
// given back.
func (t *Throttler) wait(ctx context.Context, v *Verdict, asked bool, before moment, parts []Part) error {
	if !asked { // a call that is wrong or that nothing limits has nothing to wait for, and no others wait for it
		if err := t.addAll(ctx, v, storage.Take, 1, parts); err != nil {
			return err
		}
		if v.empty() {
			return t.ask(ctx, v, storage.Take, 1)
		}
		*v = Verdict{}
	}
	w, full := t.waiters.enter(parts, t.least(parts))
	if w == nil {
		if v.Allowed {
			if !t.waiters.resets.since(before.resets, v.parts()) {
				t.giveBack(ctx, v, 1)
			}
			denied(v)
		}
		err, attempt := fmt.Errorf("%w: %d wait for %.64q", ErrTooManyWaiters, t.waiters.most, full), 1
		if asked {
			attempt = 2
		}
		t.rejected(ctx, OpConsume, attempt, full, err) // every Wait that is told has a first attempt, and one that has its error
		return err
	}
	defer t.leave(ctx, w)
	if asked {
		w.attempts, w.before = 1, before
		asked = v.Delay == 0 || t.waiters.reserved(w, v, before.resets)
	}
	for again := true; again; asked = false {
		if !asked {
			*v = Verdict{} // not what was voided
		}
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

// ahead asks once. If the buckets allow it, it reserves up to the deadline. If w is a waiter, it then joins those with a
// reservation.
//
// A reservation that a Reset may have voided meanwhile is dropped, and ahead asks again.
func (t *Throttler) ahead(ctx context.Context, w *waiter, v *Verdict, parts []Part) error {
	if w == nil || w.home == nil {
		*v = Verdict{}
		return t.decideAll(ctx, v, storage.Take, t.within(ctx), w.again(), parts)
	}
	for {
		t.waiters.resets.settle(ctx, parts) // without giving, which those who leave need
		if valid, err := t.askAhead(ctx, w, v, parts); valid || err != nil {
			return err
		}
	}
}

// askAhead asks once for a waiter, and reports whether the answer holds. It holds giving for reading from the decision until
// the reservation is registered. So end and flush, which hold it for writing, never give reservations back between the two.
func (t *Throttler) askAhead(ctx context.Context, w *waiter, v *Verdict, parts []Part) (valid bool, err error) {
	w.home.giving.RLock()
	defer w.home.giving.RUnlock()
	*v = Verdict{}
	w.news.Store(int32(nothing)) // the answer will include what happened so far
	w.before = t.waiters.moment()
	err = t.decideAll(ctx, v, storage.Take, t.within(ctx), w.again(), parts)
	return v.Delay == 0 || t.waiters.reserved(w, v, w.before.resets), err
}

// within returns how far ahead to reserve, in microseconds: until the deadline, but at most law.MaxWithin.
func (t *Throttler) within(ctx context.Context) int64 {
	if left, ok := t.left(ctx); ok {
		return max(0, min(left.Microseconds(), law.MaxWithin))
	}
	return law.MaxWithin
}

// admit asks until the call is admitted. It asks at once if nobody is in line before it; otherwise it queues. If asked is set,
// v is already the answer.
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

// queue waits in a line until the call is admitted. It asks when it is the waiter's turn, and leaves the line only when it is
// admitted: after an error, exit takes the waiter out.
func (t *Throttler) queue(ctx context.Context, w *waiter, l *line, v *Verdict, parts []Part, asked bool) error {
	ahead, mine := l.join(w)
	if err := t.inTime(ctx, w, v, parts, ahead, asked); err != nil {
		return err
	}
	// Nobody told the call what happened before it joined. If there was something, also for others, it asks at once.
	for asked = asked && mine && t.waiters.told.Load() == w.before.told; ; asked = false {
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
			// The lower bound prevents a busy loop with a storage that breaks the contract and returns no RetryAfter.
			retry := min(max(v.RetryAfter, time.Millisecond/8), notice)
			if _, err := t.sleep(ctx, w, t.micros()+retry.Microseconds()); err != nil {
				return err
			}
		}
	}
}

// notice is how long it takes waiters at most to notice what other processes do.
const notice = time.Second

// inTime fails if the call cannot be admitted before its deadline, given that the calls ahead of it take that many tokens.
// If asked is set, v is the answer to the call. Afterwards v says how long the call would have to wait.
//
// inTime peeks if the call has not asked yet, or if it has tried to reserve. In the latter case RetryAfter says when the
// reservation would succeed, which may be earlier than the moment when the call could act.
func (t *Throttler) inTime(ctx context.Context, w *waiter, v *Verdict, parts []Part, ahead int64, asked bool) error {
	left, ok := t.left(ctx)
	if !ok && (asked || t.observe == nil) { // Observe gets the levels of every waiting call, so those need a Peek
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

// least returns a lower bound of the tokens that a call takes from each bucket of its identifiers. It is 0 for a call with its
// own buckets (Using), since that takes nothing from the buckets of the other calls.
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

// earliest returns a lower bound of the wait: until then the buckets cannot have refilled the tokens that the calls ahead take,
// plus one.
func earliest(v *Verdict, ahead int64) (wait time.Duration) {
	n := 0
	for _, p := range v.parts() {
		for j := range p.Rules.Rules {
			r, c := &p.Rules.Rules[j], v.all()[n]
			if v.asked()[n] > 0 {
				wait = max(wait, duration(comesBack(r, &c, ahead+1)))
			}
			n++
		}
	}
	return wait
}

// comesBack returns how many microseconds a bucket needs, at least, until it has refilled n tokens in all, with those that it
// has now. A debt is refilled first by a Continuous bucket, and forgiven by the others. A line may be so long that the time of
// its end is no int64, so it is at most law.FarFuture after the first refill. The capacity is above 0: where it is not, a call
// that costs anything is refused before it waits.
func comesBack(r *law.Rule, c *storage.Count, n int64) int64 {
	if r.Kind == law.Continuous {
		return int64(min(float64(max(0, n-c.Remaining-1))/float64(r.Refill)*float64(r.Period), float64(law.FarFuture)))
	}
	if n -= max(0, c.Remaining); n <= 0 {
		return 0
	}
	periods := (n - 1) / r.Capacity // after the first refill, which may be of the whole capacity
	switch r.Kind {
	case law.SlidingWindow, law.SlidingLog: // they may refill nearly twice the capacity within a period, and a grain too early
		periods = max(0, periods-1)
	}
	return c.NextAfter + min(periods, law.FarFuture/r.Period)*r.Period
}

// leastLeft returns the smallest number of tokens left in any bucket that the call took from.
func leastLeft(v *Verdict) int64 {
	least := int64(math.MaxInt64)
	for n, cost := range v.asked() {
		if cost > 0 {
			least = min(least, v.all()[n].Remaining)
		}
	}
	return least
}

// micros returns the time in microseconds by the Throttler's clock, which is also the clock of Verdict.at.
func (t *Throttler) micros() int64 {
	if now, clocked, err := t.now(); clocked && err == nil {
		return now
	}
	return law.Monotonic()
}

// sleep sleeps until a time of micros, which may be never. It returns earlier if the context ends or there is news for w.
func (t *Throttler) sleep(ctx context.Context, w *waiter, until int64) (news, error) {
	for {
		now := t.micros()
		if now >= until {
			return nothing, nil
		}
		over, stop := t.timer(until, now)
		// The clock may have been moved after it was read and before the timer was made. Then the duration is too long.
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

// movedAtOnce is in microseconds. If an injected clock advances this much while a timer is being made, somebody has moved it,
// and the timer may fire too late.
const movedAtOnce = 1000

// timer returns a channel that receives at a time of micros, and a function that stops the timer if its clock can do that.
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
