package failover

// The path of a call: Redis, then Postgres, then this process. Rules 1, 4, 5 and 9.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/redis"
)

// Decide implements storage.Storage. Its answer is Degraded unless Redis answered in its regular place.
func (s *Storage) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.leave()
	err := s.either(ctx, func(began time.Time, again bool) error {
		err := s.decideOnPrimary(ctx, r, a, began, s.readTime(again))
		a.Degraded = again
		return err
	}, func(began time.Time) error {
		return s.decideOnLedger(ctx, r, a, began)
	})
	if s.local != nil && fails(err) && ctx.Err() == nil && s.decideLocally(ctx, r, a) == nil { // Rule 9
		return nil
	}
	return err
}

// either is the order in which the stores are asked. Each is asked at most once.
//
//   - Rule 1: Redis decides while the breaker is closed.
//   - Rule 4: Postgres decides if Redis fails, or while the breaker is open.
//   - Rule 5: whatever Redis answers is final, a denial too. Postgres may lag behind Redis and could still admit.
//   - Rule 9: if Postgres fails while the breaker is open, Redis gets the call after all. It may be well again though
//     the breaker has not closed yet. Otherwise the error has both causes.
//
// A call whose answer was lost may have been executed by Redis, and then is executed by Postgres too. Nothing is given
// back to Redis, as nobody knows. It costs others at most the tokens of this call, while giving back could admit it
// twice.
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

// readTime is how long after its begin a call may read the ledger, where Redis is doubted (Rule 7). Half of Postgres's
// time leaves the other half for Postgres to decide, should Redis then fail.
func (s *Storage) readTime(again bool) time.Duration {
	if again {
		return 0 // Postgres has just failed
	}
	return s.options.LedgerTimeout / 2
}

// decideOnPrimary keeps Rule 1, and Rule 7 where Redis is doubted: Redis answers ErrStale in place of an admission that
// rests on doubted state. What Redis admits becomes pending. A denial needs no doubt: spending that Redis lacks could
// only be one more reason to deny.
func (s *Storage) decideOnPrimary(ctx context.Context, r *storage.Request, a *storage.Answer, began time.Time, read time.Duration) (err error) {
	if err := s.isolated(); err != nil {
		return err
	}
	since := s.doubt(r)
	err = s.primary.DecideFresh(ctx, r, a, since)
	if errors.Is(err, redis.ErrRestarted) && !r.Clocked { // the server may have lost everything up to now
		since = law.Monotonic()
		s.doubted.Store(since)
	}
	if errors.Is(err, redis.ErrStale) {
		if since == 0 { // an injected clock after a restart: only the script is missing
			read = 0
		}
		err = s.decideStale(ctx, r, a, began.Add(read), since != 0)
	}
	if err == nil && taken(r, a) {
		s.journal.took(r, a)
	}
	return err
}

// decideStale asks Redis once more, after raising it to the ledger's debt. If the ledger has not answered at the time
// read, Redis decides without it and is raised afterwards: a call that waited for longer would miss its own time.
func (s *Storage) decideStale(ctx context.Context, r *storage.Request, a *storage.Answer, read time.Time, doubted bool) (err error) {
	var late []*storage.Part
	if doubted {
		if late, err = s.readThrough(ctx, r, read); err != nil {
			return err
		}
	}
	err = s.onPrimary(ctx, read, func(ctx context.Context) error { return s.primary.Decide(ctx, r, a) })
	if err == nil {
		s.raiseLater(r, late)
	}
	return err
}

// decideOnLedger keeps Rule 4: what this process has pending of the identifiers is charged first, so that Postgres
// decides with all that Redis has admitted here. Redis did not see what Postgres admits. While the breaker is closed,
// others still ask Redis, so it is raised with the next flush; if it is open, Redis is doubted when it is back.
func (s *Storage) decideOnLedger(ctx context.Context, r *storage.Request, a *storage.Answer, began time.Time) error {
	err := s.onLedger(ctx, began, func(ctx context.Context) error {
		for _, p := range r.Parts {
			if err := s.settle(ctx, key{r.Name, p.Identifier}); err != nil {
				return err
			}
		}
		return s.ledger.Decide(ctx, r, a)
	})
	if err != nil {
		return err
	}
	a.Degraded = true
	if taken(r, a) && s.breaker.cause() == nil {
		for i := range r.Parts {
			s.journal.raiseLater(r.Name, &r.Parts[i], r.Clocked, r.Now)
		}
	}
	return nil
}

// taken reports whether an answer says that costs were taken.
func taken(r *storage.Request, a *storage.Answer) bool { return a.Allowed && r.Mode != storage.Peek }

// onPrimary calls f with a context that ends PrimaryTimeout after a time: the begin of the call, or the end of its time
// to read the ledger.
func (s *Storage) onPrimary(ctx context.Context, after time.Time, f func(context.Context) error) error {
	return within(ctx, after.Add(s.options.PrimaryTimeout), "Redis", f)
}

// onLedger calls f with a context that ends after LedgerTimeout, or both timeouts after the begin of the call if that
// is earlier: a read of the ledger may have used time of Postgres already.
func (s *Storage) onLedger(ctx context.Context, began time.Time, f func(context.Context) error) error {
	left := s.options.PrimaryTimeout - time.Since(began)
	return within(ctx, time.Now().Add(s.options.LedgerTimeout+min(0, left)), "Postgres", f)
}

// within calls f with a context that ends at a deadline. The caller's own end is the caller's error, and makes nobody
// ask the other store. The deadline's is ErrUnavailable.
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

// fails reports whether the other store is asked after an error: the store does not answer, or cannot read the
// identifier's state. Other errors are faults of the call, and would be the same there.
func fails(err error) bool {
	return errors.Is(err, storage.ErrUnavailable) || errors.Is(err, storage.ErrCorruptState)
}

// unavailable is the error of Rule 9.
func unavailable(primary, ledger error) error {
	return fmt.Errorf("%w: neither Redis (%w) nor Postgres (%w)", storage.ErrUnavailable, primary, ledger)
}

// isolated is the error of Options.MaxIsolation. The time counts from the oldest admission that could not be written,
// so it bounds how much the ledger may lack.
func (s *Storage) isolated() error {
	if s.options.MaxIsolation == 0 {
		return nil
	}
	f := &s.flusher
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.since == 0 || micros(law.Monotonic()-f.since) <= s.options.MaxIsolation {
		return nil
	}
	return fmt.Errorf("%w: Postgres could not be charged for over %v: %w", storage.ErrUnavailable, s.options.MaxIsolation, f.failure)
}

// decideLocally keeps Rule 9 with Options.Local: buckets of this process, which hold its share of each capacity,
// decide. What they admit is recorded nowhere.
func (s *Storage) decideLocally(ctx context.Context, r *storage.Request, a *storage.Answer) (err error) {
	own, n := *r, 0
	own.Parts = slices.Clone(r.Parts)
	for i := range own.Parts {
		p := &own.Parts[i]
		if p.Rules, err = s.share(p.Rules); err != nil {
			return err
		}
		for j := range p.Rules.Rules {
			if rule := &p.Rules.Rules[j]; r.Costs[n] > rule.Capacity && r.Mode != storage.Force && !p.AtMost {
				return fmt.Errorf("%d tokens of bucket %q are more than the share of this process, %d", r.Costs[n], rule.Name, rule.Capacity)
			}
			n++
		}
	}
	err = s.local.Decide(ctx, &own, a)
	a.Degraded = true
	return err
}

// share is rules with this process's share of the capacities. A Continuous bucket gets its share of the refill by a
// longer period, as the refill has to remain a whole number.
func (s *Storage) share(of *storage.RuleSet) (*storage.RuleSet, error) {
	rules := make([]law.Rule, len(of.Rules))
	for i := range of.Rules {
		r, faults := &of.Rules[i], []law.Fault(nil)
		capacity, period := max(1, int64(float64(r.Capacity)*s.options.Local.Share)), r.Period
		if r.Kind == law.Continuous {
			period = rounded(int64(float64(r.Period) / s.options.Local.Share))
		}
		if rules[i], faults = law.NewRule(r.Name, r.Kind, micros(period), capacity, r.Refill); len(faults) > 0 {
			return nil, (*storage.BucketError)(&faults[0])
		}
	}
	return law.NewRuleSet(rules...), nil
}

// rounded is n rounded up to four digits. A large bucket needs a period with many divisors (law.NewRule), which
// the quotient of a division rarely is.
func rounded(n int64) int64 {
	step := int64(1)
	for n/step >= 10_000 {
		step *= 10
	}
	return (n + step - 1) / step * step
}
