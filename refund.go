// Giving back what a call took, and forgetting all that was spent.

package throttler

import (
	"context"
	"errors"
	"fmt"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// Refund gives back what v took. With options it gives back what they name and nothing else: Cost(n) n to every bucket,
// CostOf(bucket, n) n to that one. More than was taken is ErrInvalidCost. Tokens that have already come back by themselves
// are not given back; a Continuous bucket's share that drained in the meantime is known to a tick, nearly always one
// microsecond.
//
// Refund also cancels a Reserve. Those who have reserved after it keep their turns, so as much less is given back. A call
// that could act at once does not give less: if others hold reservations, its tokens may be used at about the same time as
// those, and the burst is exceeded by what was given back, once. In the long run the rate is kept.
//
// The verdict must come from a Throttler of this Name and storage; refund each once: it does not remember.
// A verdict that took nothing, a denial or a Peek, gives nothing back. After an error of the storage some of several parts
// may have been given back: do not try again.
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

// refunds are the charges of all parts, up to the first that is wrong.
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

// change gives back, observes, and tells those who wait.
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

// refund makes the charge of part i, whose costs and counts begin at number from.
func (t *Throttler) refund(c *storage.Charge, v *Verdict, i, from int, options []Option) error {
	p := v.parts()[i]
	c.Name, c.Identifier, c.Rules = t.name, p.Identifier, p.Rules
	var err error
	if c.Now, c.Clocked, err = t.now(); err != nil {
		return err
	}
	now := c.Now
	if !c.Clocked {
		now = law.Monotonic()
	}
	for j := range p.Rules.Rules {
		bucket, taken := p.Rules.Rules[j].Name, v.took(i, from+j)
		n := refundOf(bucket, taken, options)
		if n < 0 || n > taken {
			return fmt.Errorf("%w: a refund of %d tokens to bucket %q, must be 0 to the %d that were taken", ErrInvalidCost, n, bucket, taken)
		}
		c.Amounts = append(c.Amounts, storage.Amount{N: -n, In: v.all()[from+j].HeldFor - max(0, now-v.at)})
	}
	return nil
}

// refundable checks that each CostOf names a bucket of v.
func refundable(v *Verdict, options []Option) error {
options:
	for _, o := range options {
		if o.kind != costOfOption {
			continue
		}
		for _, p := range v.parts() {
			if p.Rules.Find(o.bucket) >= 0 {
				continue options
			}
		}
		return noSuchBucket(o.bucket, v.parts()[0].Identifier)
	}
	return nil
}

// refundOf is what the options ask to give back to one bucket: everything if they name no cost.
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

// Reset forgets what the identifier has spent, from all of its buckets.
func (t *Throttler) Reset(ctx context.Context, id string) error {
	err := validIdentifier(id)
	start := law.Elapsed()
	if err == nil {
		err = t.storage.Reset(ctx, t.name, id)
	}
	t.waiters.tell(id, wasReset)
	t.tidy()
	if t.observe != nil {
		t.tell(ctx, t.event(OpReset, 0, id, 0), &Verdict{}, err, start, law.Elapsed())
	}
	return err
}
