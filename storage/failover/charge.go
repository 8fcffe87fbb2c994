package failover

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/go-throttler/throttler/storage"
)

// Charge implements storage.Storage.
func (s *Storage) Charge(ctx context.Context, c storage.Charge) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.leave()
	if err := c.Validate(); err != nil {
		return err
	}
	return s.either(ctx, func(began time.Time, again bool) error {
		return s.chargePrimary(ctx, &c, began, s.readTime(again))
	}, func(began time.Time) error {
		return s.chargeLedger(ctx, &c, began)
	})
}

func (s *Storage) chargePrimary(ctx context.Context, c *storage.Charge, began time.Time, read time.Duration) error {
	var late []*storage.Part
	r := storage.Request{Name: c.Name, Clocked: c.Clocked, Now: c.Now, Part: storage.NewPart(c.Identifier, c.Rules, 0)}
	if takes(c) && s.doubt(&r) != 0 { // afterwards the state is young
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
		err := s.primary.Charge(ctx, *c)
		if err == nil {
			s.journal.charged(c)
			s.raiseLater(&r, late)
		}
		return err
	})
}

// beginRefund is the journal's, and takes at most PrimaryTimeout.
func (s *Storage) beginRefund(ctx context.Context, id key) error {
	ctx, cancel := context.WithTimeout(ctx, s.options.PrimaryTimeout)
	defer cancel()
	return s.journal.beginRefund(ctx, id)
}

func (s *Storage) chargeLedger(ctx context.Context, c *storage.Charge, began time.Time) error {
	err := s.onLedger(ctx, began, func(ctx context.Context) error {
		if err := s.settle(ctx, key{c.Name, c.Identifier}); err != nil {
			return err
		}
		return s.ledger.Charge(ctx, *c)
	})
	if err == nil && takes(c) && s.breaker.cause() == nil {
		p := storage.NewPart(c.Identifier, c.Rules, 0)
		s.journal.raiseLater(c.Name, &p, c.Clocked, c.Now)
	}
	return err
}

func takes(c *storage.Charge) bool {
	return slices.ContainsFunc(c.Amounts, func(a storage.Amount) bool { return a.N > 0 })
}

func gives(c *storage.Charge) bool {
	return slices.ContainsFunc(c.Amounts, func(a storage.Amount) bool { return a.N < 0 })
}

// Reset implements storage.Storage. A store that cannot be reached is reset once it can, unless this process ends
// before. It is an error if neither can.
func (s *Storage) Reset(ctx context.Context, name, identifier string) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.leave()
	if err := storage.ValidateIdentifier(identifier); err != nil {
		return err
	}
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

// resetMissed makes up for the resets that the primary has missed.
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
