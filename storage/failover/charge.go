package failover

// Rule 8: charges, refunds and resets reach both stores.
//
// A charge or a refund goes the path of a call: one store executes it, and the flush brings it to the other. A refund
// must not meet a raise of the same identifier in Redis. The debt that the raise carries was read before the refund, so
// the raise would take the refunded tokens again. The journal keeps the two apart, by identifier: see beginRefund and
// beginRaise.

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/go-throttler/throttler/storage"
)

// Charge implements storage.Storage. A negative amount is a refund.
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

// chargePrimary charges Redis, and makes what it charged pending. A charge that takes tokens makes old state look
// fresh: the next decision would no longer find it stale. So where Redis is doubted it is raised first (Rule 7).
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

// beginRefund waits until no raise of the identifier is in progress, for at most PrimaryTimeout. After that the refund
// goes to Postgres.
func (s *Storage) beginRefund(ctx context.Context, id key) error {
	ctx, cancel := context.WithTimeout(ctx, s.options.PrimaryTimeout)
	defer cancel()
	return s.journal.beginRefund(ctx, id)
}

// chargeLedger charges Postgres, after what is pending of the identifier: a refund there must find what it gives back.
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

// takes reports whether a charge takes tokens from a bucket.
func takes(c *storage.Charge) bool {
	return slices.ContainsFunc(c.Amounts, func(a storage.Amount) bool { return a.N > 0 })
}

// gives reports whether a charge refunds tokens to a bucket.
func gives(c *storage.Charge) bool {
	return slices.ContainsFunc(c.Amounts, func(a storage.Amount) bool { return a.N < 0 })
}

// Reset implements storage.Storage. A store that cannot be reached is reset once it can be, unless this process ends
// before. It is an error if neither can be reached now.
//
// The reset of the ledger is an entry of the journal, like an amount, so it keeps its place: after what was admitted
// before, which it drops, and before what is admitted later. Reset waits for it as a call waits for what is pending.
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
	case errors.Is(cause, storage.ErrCorruptState):
		return cause
	}
	return nil
}

// resetPrimary resets Redis and queues the reset of the ledger, also where Redis fails. It is a refund of everything,
// so it waits for a raise as a refund does, and nothing is raised until the ledger is reset too.
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

// resetMissed makes up for the resets that Redis has missed. It runs with each flush, and before Redis decides again
// after an outage. A Redis that cannot read the state is done with: trying again would not help.
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
