package failover

// Rule 8: charges, refunds and resets reach both stores.
//
// A charge or a refund takes the path of a call: one store executes it, and the next flush brings it to the other. The
// exception is a refund that Postgres executes. Raising lowers nothing, so Redis counts these tokens until they are
// back by themselves, which errs on the strict side.
//
// A refund must not meet a raise of the same identifier in Redis. The debt that the raise carries was read before the
// refund, so the raise would take the refunded tokens again. The journal therefore has a lock for each identifier,
// which refunds share and a raise has alone: see the locks at journal, beginRefund and beginRaise.
// A refund may also begin and end between the reading of a debt and the raise: see reading.
//
// A reset is a refund of everything, and follows the same rule.

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/go-throttler/throttler/storage"
)

// Charge implements storage.Storage. A negative amount is a refund. As with a decision, a charge whose answer was lost
// may have been executed by Redis, and then is executed by Postgres too.
func (s *Storage) Charge(ctx context.Context, c *storage.Charge) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.leave()
	return s.either(ctx, func(began time.Time, again bool) error {
		return s.chargePrimary(ctx, c, began, s.readTime(again))
	}, func(began time.Time) error {
		return s.chargeLedger(ctx, c, began)
	})
}

// chargePrimary charges Redis, and makes what was charged pending. A charge that takes tokens changes the state in
// Redis, so it would make stale state look fresh, and the next decision would trust it. Where Redis is doubted it is
// therefore raised first (Rule 7).
func (s *Storage) chargePrimary(ctx context.Context, c *storage.Charge, began time.Time, read time.Duration) error {
	var late []*storage.Part
	r := storage.Request{Name: c.Name, Clocked: c.Clocked, Now: c.Now, Parts: []storage.Part{{Identifier: c.Identifier, Rules: c.Rules}}}
	if takes(c) && s.doubt(&r) != 0 {
		var err error
		began = began.Add(read)
		if late, err = s.readThrough(ctx, &r, began); err != nil {
			return err
		}
	}
	return s.onPrimary(ctx, began, func(ctx context.Context) error {
		if gives(c) {
			id := key{c.Name, c.Identifier}
			if err := s.beginRefund(ctx, id); err != nil {
				return err
			}
			defer s.journal.endRefund(id)
		}
		err := s.primary.Charge(ctx, c)
		if err == nil {
			s.journal.charged(c)
			s.raiseLater(&r, late)
		}
		return err
	})
}

// beginRefund waits until no raise of the identifier is in progress, for at most PrimaryTimeout. If that is not enough
// the refund goes to Postgres, like a call that Redis did not answer in time.
func (s *Storage) beginRefund(ctx context.Context, id key) error {
	ctx, cancel := context.WithTimeout(ctx, s.options.PrimaryTimeout)
	defer cancel()
	return s.journal.beginRefund(ctx, id)
}

// chargeLedger charges Postgres, as Rule 4 has it: first with what is pending of the identifier, as a refund must find
// the tokens that it gives back there. If tokens were taken while the breaker is closed, Redis is raised with the next
// flush, because other calls still ask it. A refund is not brought to Redis: no raise lowers what Redis has.
func (s *Storage) chargeLedger(ctx context.Context, c *storage.Charge, began time.Time) error {
	err := s.onLedger(ctx, began, func(ctx context.Context) error {
		if err := s.settle(ctx, key{c.Name, c.Identifier}); err != nil {
			return err
		}
		return s.ledger.Charge(ctx, c)
	})
	if err == nil && takes(c) && s.breaker.cause() == nil {
		s.journal.raiseLater(c.Name, &storage.Part{Identifier: c.Identifier, Rules: c.Rules}, c.Clocked, c.Now)
	}
	return err
}

// takes reports whether a charge takes tokens from any bucket.
func takes(c *storage.Charge) bool {
	return slices.ContainsFunc(c.Amounts, func(a storage.Amount) bool { return a.N > 0 })
}

// gives reports whether a charge refunds tokens to any bucket.
func gives(c *storage.Charge) bool {
	return slices.ContainsFunc(c.Amounts, func(a storage.Amount) bool { return a.N < 0 })
}

// Reset implements storage.Storage (Rule 8). A store that cannot be reached is reset once it can be, unless this
// process ends before. It is an error only if neither can be reached now, or the
// program has closed one. What other processes have pending is charged
// after the reset, and counts as spent then.
//
// The reset of the ledger is an entry of the journal, as amounts are, so it keeps its place in the order of events: it
// comes after what was admitted before, which it drops, and before what is admitted later. Reset waits for this entry
// as a call waits for what is pending (settle).
func (s *Storage) Reset(ctx context.Context, name, identifier string) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.leave()
	id := key{name, identifier}
	cause := s.resetPrimary(ctx, id)
	if errors.Is(cause, storage.ErrUnavailable) {
		s.journal.resetPrimaryLater(id)
	}
	err := s.onLedger(ctx, time.Now(), func(ctx context.Context) error { return s.settle(ctx, id) })
	switch {
	case ctx.Err() != nil && err != nil:
		return ctx.Err()
	case cause != nil && err != nil:
		return unavailable(cause, err)
	case errors.Is(cause, storage.ErrCorruptState), errors.Is(cause, storage.ErrClosed):
		return cause
	case errors.Is(err, storage.ErrClosed):
		return err
	}
	return nil
}

// resetPrimary queues the reset of the ledger and resets Redis. A reset is a refund of everything, so it waits for a
// raise as a refund does. From then on the queued reset keeps Redis from being raised until the ledger is reset too
// (beginRaise). The reset of the ledger is queued even if Redis fails.
func (s *Storage) resetPrimary(ctx context.Context, id key) error {
	return s.onPrimary(ctx, time.Now(), func(ctx context.Context) error {
		err := s.journal.beginRefund(ctx, id)
		s.journal.resetLedgerLater(id)
		if err != nil {
			return err
		}
		defer s.journal.endRefund(id)
		if cause := s.breaker.cause(); cause != nil {
			return cause
		}
		return s.primary.Reset(ctx, id.name, id.identifier)
	})
}

// resetMissed makes up for the resets that Redis has missed (Rule 8). It runs with each flush while Redis decides, and
// before Redis decides again after an outage. A reset that fails with another error than ErrUnavailable, such as a
// state that Redis cannot read, is not tried again: that would not help.
func (s *Storage) resetMissed(ctx context.Context) error {
	return each(s.journal.missed(), func(id key) error {
		err := s.primary.Reset(ctx, id.name, id.identifier)
		if !errors.Is(err, storage.ErrUnavailable) {
			s.journal.wasReset(id)
			err = nil
		}
		return err
	})
}
