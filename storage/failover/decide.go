package failover

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/redis"
)

// Decide implements storage.Storage. The Verdict of a call that Redis did not answer is Degraded.
func (s *Storage) Decide(ctx context.Context, r storage.Request) (v storage.Verdict, err error) {
	if err := s.enter(ctx); err != nil {
		return v, err
	}
	defer s.leave()
	if err := r.Validate(); err != nil {
		return v, err
	}
	err = s.either(ctx, func(began time.Time, again bool) (err error) {
		if v, err = s.decideOnPrimary(ctx, &r, began, s.readTime(again)); again {
			v.Degrade()
		}
		return err
	}, func(began time.Time) (err error) {
		v, err = s.decideOnLedger(ctx, r, began)
		return err
	})
	if s.local != nil && fails(err) && ctx.Err() == nil {
		if v, err := s.decideLocally(ctx, r); err == nil {
			return v, nil
		}
	}
	return v, err
}

// either is the path of a call: Redis, then Postgres. While the breaker is open it is Postgres, and then Redis again,
// which perhaps is well by then.
func (s *Storage) either(ctx context.Context, primary func(began time.Time, again bool) error, ledger func(began time.Time) error) error {
	began, cause := time.Now(), s.breaker.cause()
	asked := cause == nil
	if asked {
		if cause = primary(began, false); !fails(cause) {
			return cause
		}
	}
	err := ledger(began)
	if err == nil || ctx.Err() != nil || !fails(err) {
		return err
	}
	if !asked {
		if cause = primary(time.Now(), true); !fails(cause) {
			return cause
		}
	}
	return unavailable(cause, err)
}

// readTime is how long after it began a call may read the ledger before Redis decides.
func (s *Storage) readTime(again bool) time.Duration {
	if again {
		return 0 // Postgres has just failed
	}
	return s.options.LedgerTimeout / 2
}

// decideOnPrimary asks Redis. Where Redis is doubted and would admit, it is first raised to what the ledger has. That may
// last until read after the call began; what is not done by then is done afterwards.
func (s *Storage) decideOnPrimary(ctx context.Context, r *storage.Request, began time.Time, read time.Duration) (v storage.Verdict, err error) {
	if err := s.isolated(); err != nil {
		return v, err
	}
	since := s.doubt(r)
	v, err = s.primary.DecideFresh(ctx, *r, since)
	if errors.Is(err, redis.ErrRestarted) && !r.Clocked {
		since = storage.Monotonic()
		s.doubted.Store(since)
	}
	if errors.Is(err, redis.ErrStale) {
		if since == 0 {
			read = 0
		}
		v, err = s.decideStale(ctx, *r, began.Add(read), since != 0)
	}
	if err == nil && v.Taken() {
		s.journal.took(r, &v)
	}
	return v, err
}

func (s *Storage) decideStale(ctx context.Context, r storage.Request, read time.Time, doubted bool) (v storage.Verdict, err error) {
	var late []*storage.Part
	if doubted {
		if late, err = s.readThrough(ctx, &r, read); err != nil {
			return v, err
		}
	}
	err = s.onPrimary(ctx, read, func(ctx context.Context) error {
		v, err = s.primary.Decide(ctx, r)
		return err
	})
	if err == nil {
		s.raiseLater(&r, late)
	}
	return v, err
}

// decideOnLedger asks Postgres, after it was charged what this process owes it for the identifiers.
func (s *Storage) decideOnLedger(ctx context.Context, r storage.Request, began time.Time) (v storage.Verdict, err error) {
	err = s.onLedger(ctx, began, func(ctx context.Context) error {
		for i := range r.Parts() {
			if err := s.settle(ctx, key{r.Name, r.At(i).Identifier}); err != nil {
				return err
			}
		}
		v, err = s.ledger.Decide(ctx, r)
		return err
	})
	if err != nil {
		return storage.Verdict{}, err
	}
	v.Degrade()
	if v.Taken() && s.breaker.cause() == nil {
		for i := range r.Parts() { // others ask Redis
			s.journal.raiseLater(r.Name, r.At(i), r.Clocked, r.Now)
		}
	}
	return v, nil
}

// onPrimary calls f with a context that ends PrimaryTimeout after a time: when the call began, or when its read of the
// ledger had to be done.
func (s *Storage) onPrimary(ctx context.Context, after time.Time, f func(context.Context) error) error {
	return within(ctx, after.Add(s.options.PrimaryTimeout), "Redis", f)
}

// onLedger calls f with a context that ends after LedgerTimeout, and at the latest both timeouts after the call began.
func (s *Storage) onLedger(ctx context.Context, began time.Time, f func(context.Context) error) error {
	left := s.options.PrimaryTimeout - time.Since(began)
	return within(ctx, time.Now().Add(s.options.LedgerTimeout+min(0, left)), "Postgres", f)
}

// within calls f with a context that ends at a deadline, and returns the caller's error if the caller's has ended.
func within(ctx context.Context, deadline time.Time, who string, f func(context.Context) error) error {
	given := time.Until(deadline)
	limited, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	err := f(limited)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case limited.Err() != nil && !fails(err):
		return fmt.Errorf("%w: no answer from %s within %v", storage.ErrUnavailable, who, max(0, given).Round(time.Millisecond))
	}
	return err
}

// fails tells of an error after which the other store is asked.
func fails(err error) bool {
	return errors.Is(err, storage.ErrUnavailable) || errors.Is(err, storage.ErrCorruptState)
}

func unavailable(primary, ledger error) error {
	return fmt.Errorf("%w: neither Redis (%w) nor Postgres (%w)", storage.ErrUnavailable, primary, ledger)
}

// isolated is the error of a call while the ledger has not been told for too long.
func (s *Storage) isolated() error {
	if s.options.MaxIsolation == 0 {
		return nil
	}
	f := &s.flusher
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.since == 0 || micros(storage.Monotonic()-f.since) <= s.options.MaxIsolation {
		return nil
	}
	return fmt.Errorf("%w: Postgres could not be told for over %v: %w", storage.ErrUnavailable, s.options.MaxIsolation, f.failure)
}

// decideLocally is for when neither store can decide.
func (s *Storage) decideLocally(ctx context.Context, r storage.Request) (v storage.Verdict, err error) {
	own := r
	if own.Part, err = s.share(&r.Part); err != nil {
		return v, err
	}
	own.More = nil
	for i := range r.More {
		p, err := s.share(&r.More[i])
		if err != nil {
			return v, err
		}
		own.More = append(own.More, p)
	}
	v, err = s.local.Decide(ctx, own)
	v.Degrade()
	return v, err
}

// share is a part with this process's share of the capacities.
func (s *Storage) share(p *storage.Part) (storage.Part, error) {
	rules := make([]storage.Rule, len(p.Rules))
	for i := range p.Rules {
		r, faults := &p.Rules[i], []error(nil)
		capacity, period := max(1, int64(float64(r.Capacity)*s.options.Local.Share)), r.Period
		if r.Kind == storage.Continuous { // the refill has to remain a whole number
			period = rounded(int64(float64(r.Period) / s.options.Local.Share))
		}
		if rules[i], faults = storage.NewRule(r.Name, r.Kind, micros(period), capacity, r.Refill); len(faults) > 0 {
			return storage.Part{}, errors.Join(faults...)
		}
	}
	out := storage.NewPart(p.Identifier, rules, 0)
	for i := range rules {
		out.SetCost(i, p.Cost(i))
	}
	return out, nil
}

// rounded is n, rounded up to four digits: a large bucket needs a period of many divisors.
func rounded(n int64) int64 {
	step := int64(1)
	for n/step >= 10_000 {
		step *= 10
	}
	return (n + step - 1) / step * step
}
