// Refund and Reset.

package throttler

import (
	"context"
	"errors"
	"fmt"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// Refund gives back the tokens that v took. With options it gives back only what they name: Cost(n) gives n tokens back to
// every bucket, and CostOf(bucket, n) gives n back to that bucket. More than v took is ErrInvalidCost. Tokens that have been
// refilled already are not given back. How much of a Continuous bucket's share has drained is known to a tick, nearly always
// one microsecond.
//
// Refund also cancels a Reserve. Calls that reserved later keep their turns, and correspondingly fewer tokens are given back.
// The refund of a call that could act at once is not reduced. If other calls hold reservations, its tokens may be used at
// about the same time as those. That exceeds the burst by the refunded tokens, once; in the long run the rate is kept.
//
// The verdict must come from a Throttler with the same Name and storage. Refund each verdict only once: Refund does not
// remember verdicts. A verdict that took nothing, such as a denial or a Peek, gives nothing back. If the storage fails, some
// of several parts may have been refunded; do not retry.
func (t *Throttler) Refund(ctx context.Context, v Verdict, o ...Option) error {
	if !v.Taken() {
		return nil
	}
	if err := refundable(&v, o); err != nil {
		t.rejected(ctx, OpRefund, 0, v.parts()[0].Identifier, err)
		return err
	}
	charges, err := t.refunds(&v, o)
	if err != nil {
		t.rejected(ctx, OpRefund, 0, v.parts()[len(charges)].Identifier, err)
		return err
	}
	var failed []error
	for i := range charges {
		failed = append(failed, t.change(ctx, &v, &charges[i]))
	}
	return errors.Join(failed...)
}

// refunds returns the charges of all parts. If one is invalid, it returns the error and the charges before it.
func (t *Throttler) refunds(v *Verdict, options []Option) (charges []storage.Charge, err error) {
	n := 0
	for i, p := range v.parts() {
		var c storage.Charge
		if err := t.refund(&c, v, i, n, options); err != nil {
			return charges, err
		}
		charges = append(charges, c)
		n += len(p.Rules.Rules)
	}
	return charges, nil
}

// change makes a charge that gives tokens back, reports it to Observe, and wakes the first of the waiters.
func (t *Throttler) change(ctx context.Context, v *Verdict, c *storage.Charge) error {
	start := law.Elapsed()
	err := t.storage.Charge(ctx, c)
	if t.observe != nil {
		e := t.event(OpRefund, 0, c.Identifier, 0)
		e.refund = c
		for _, a := range c.Amounts {
			e.Cost = max(e.Cost, -a.N)
		}
		t.tell(ctx, e, v, err, start, law.Elapsed())
	}
	t.waiters.tell(c.Identifier, freed)
	return err
}

// refund fills c with the charge of part i of v. The costs and counts of the part begin at index from.
//
// HeldFor counts from the decision, so the time since then is subtracted.
func (t *Throttler) refund(c *storage.Charge, v *Verdict, i, from int, options []Option) error {
	p := v.parts()[i]
	c.Name, c.Identifier, c.Rules = t.name, p.Identifier, p.Rules
	passed, err := t.since(c, v.at)
	if err != nil {
		return err
	}
	for j := range p.Rules.Rules {
		bucket, taken := p.Rules.Rules[j].Name, v.took(i, from+j)
		n := refundOf(bucket, taken, options)
		if n < 0 || n > taken {
			return fmt.Errorf("%w: a refund of %d tokens to bucket %q, must be 0 to the %d that were taken", ErrInvalidCost, n, bucket, taken)
		}
		c.Amounts = append(c.Amounts, storage.Amount{N: -n, In: v.all()[from+j].HeldFor - passed})
	}
	return nil
}

// since sets the time of a charge and returns how many microseconds have passed since a decision at the time at, or 0 if the
// clock has stepped back.
func (t *Throttler) since(c *storage.Charge, at int64) (passed int64, err error) {
	if c.Now, c.Clocked, err = t.now(); err != nil {
		return 0, err
	}
	now := c.Now
	if !c.Clocked {
		now = law.Monotonic()
	}
	return max(0, now-at), nil
}

// refundable checks that each CostOf names a bucket of v.
func refundable(v *Verdict, options []Option) error {
options:
	for _, o := range options {
		if o.kind != costOfOption {
			continue
		}
		var names []string
		for _, p := range v.parts() {
			if p.Rules.Find(o.bucket) >= 0 {
				continue options
			}
			for i := range p.Rules.Rules {
				names = append(names, p.Rules.Rules[i].Name)
			}
		}
		return noSuchBucket(o.bucket, v.parts()[0].Identifier, names)
	}
	return nil
}

// refundOf returns how many tokens the options give back to one bucket: all that were taken if they name no cost. CostOf takes
// precedence over Cost, and a CostOf for another bucket alone means none for this one.
func refundOf(bucket string, taken int64, options []Option) int64 {
	n := taken
	for _, o := range options {
		if o.kind == costOfOption {
			n = 0
		}
	}
	for _, o := range options {
		if o.kind == costOption || o.kind == atMostOption {
			n = o.n
		}
	}
	for _, o := range options {
		if o.kind == costOfOption && o.bucket == bucket {
			n = o.n
		}
	}
	return n
}

// GiveBack gives back tokens that an identifier has spent, for callers who do not have the Verdict that took them: Refund
// is exact, so use that if you have it. Cost and CostOf say how many, as for Charge. A bucket gets back at most what is
// spent of it, and so is never more than full.
//
// What was taken last is given back first, and nothing that was taken more than half a period before it. Nobody knows who
// took it: trust the caller to give back only what is its own. Behind package storage/lease, what a process has taken
// ahead counts as spent. It takes two calls of the storage, of which the first only looks.
func (t *Throttler) GiveBack(ctx context.Context, id string, o ...Option) error {
	var v Verdict
	start := law.Elapsed()
	err := t.add(&v, storage.Force, id, o)
	if err != nil && !errors.Is(err, ErrCostExceedsCapacity) {
		t.rejected(ctx, OpRefund, 0, id, err)
		return err
	}
	if v.empty() {
		t.tidy()
		return nil
	}
	c := storage.Charge{Name: t.name, Identifier: id, Rules: v.parts()[0].Rules}
	for _, n := range v.asked() {
		c.Amounts = append(c.Amounts, storage.Amount{N: -n})
	}
	given := largestCost(&v)
	clear(v.asked())
	v.parts()[0].AtMost = false
	passed := int64(0)
	if err = t.answer(ctx, &v, storage.Peek, 0); err == nil {
		passed, err = t.since(&c, v.at)
	}
	if err != nil {
		if t.observe != nil {
			t.tell(ctx, t.event(OpRefund, 0, id, given), &Verdict{}, err, start, law.Elapsed())
		}
		return err
	}
	for i := range c.Amounts {
		c.Amounts[i].In = heldFor(&c.Rules.Rules[i], &v.all()[i]) - passed
	}
	return t.change(ctx, &v, &c)
}

// heldFor returns how long what was taken last is held, of a bucket that has been looked at. A SlidingWindow is full up to
// a period before its last hold has faded, by how few tokens that has: the middle is nearer to it than to any other.
func heldFor(r *law.Rule, c *storage.Count) int64 {
	if r.Kind == law.SlidingWindow && c.ResetAfter > 0 {
		return c.ResetAfter + r.Period/2
	}
	return c.ResetAfter
}

// Reset makes all buckets of an identifier full. It forgets all tokens that were spent, including reserved ones. Callers of Wait
// on this Throttler ask again at once.
func (t *Throttler) Reset(ctx context.Context, id string) error {
	err := validIdentifier(id)
	start := law.Elapsed()
	if err == nil {
		err = ctx.Err()
	}
	if err == nil {
		err = t.waiters.whileReset(id, func() error { return t.storage.Reset(ctx, t.name, id) })
	}
	t.tidy()
	if t.observe != nil {
		t.tell(ctx, t.event(OpReset, 0, id, 0), &Verdict{}, err, start, law.Elapsed())
	}
	return err
}
