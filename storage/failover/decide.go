package failover

// The path of a call: Redis, then Postgres, then this process. These rules are kept here:
//
//	1  Redis decides                               either, decideOnPrimary
//	4  Postgres decides a call that Redis fails    either, decideOnLedger, settle in flush.go
//	5  a denial by Redis is final                  either
//	9  neither store answers                       either, unavailable, isolated, decideLocally
//
// The time of a call is bounded by PrimaryTimeout for Redis, to which New has lowered the timeout of the Redis storage
// itself, and then by LedgerTimeout for Postgres: see onPrimary and onLedger.

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

// Decide implements storage.Storage. The answer is Degraded unless Redis gave it in its regular place: answers of
// Postgres, of this process and of a Redis that was asked last are.
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

// either asks the two stores in their order, each at most once. Primary and ledger are the call on either store; again
// tells primary that Postgres has failed already.
//
//   - Rule 1: Redis decides while the breaker is closed.
//   - Rule 4: Postgres decides if Redis fails, or while the breaker is open.
//   - Rule 5: whatever Redis answers is final, even a denial. Postgres may lag behind Redis and could still admit.
//   - Rule 9: if Postgres fails while the breaker is open, Redis gets the call after all: it may be well again although
//     the breaker has not closed yet. If Redis fails too, the error has both causes.
//
// If the answer of Redis was lost, Redis may have executed the call, and then Postgres executes it as well. Nothing is
// given back to Redis, because nobody knows whether it took anything. That costs others at most the tokens of this
// call, while giving back tokens that were never taken would admit as many once more.
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

// readTime returns how long after it began a call may spend reading the ledger where Redis is doubted (Rule 7). It is
// half of LedgerTimeout, which leaves the other half for Postgres to decide should Redis fail after the read.
func (s *Storage) readTime(again bool) time.Duration {
	if again {
		return 0 // Postgres has just failed
	}
	return s.options.LedgerTimeout / 2
}

// decideOnPrimary keeps Rule 1, Redis decides, and Rule 7 where Redis is doubted: Redis answers ErrStale instead of an
// admission that rests on doubted state. What Redis admits becomes pending. A denial stands even if it rests on doubted
// state, because spending that Redis lacks could only be one more reason to deny.
func (s *Storage) decideOnPrimary(ctx context.Context, r *storage.Request, a *storage.Answer, began time.Time, read time.Duration) (err error) {
	if err := s.isolated(); err != nil {
		return err
	}
	since := s.doubt(r)
	err = s.primary.DecideFresh(ctx, r, a, since)
	if errors.Is(err, redis.ErrRestarted) && !r.Clocked { // the server may have lost all that was spent up to now
		since = law.Monotonic()
		s.doubted.Store(since)
	}
	if errors.Is(err, redis.ErrStale) {
		if since == 0 { // a restart under an injected clock is no reason for doubt (see doubt): only the script is missing
			read = 0
		}
		err = s.decideStale(ctx, r, a, began.Add(read), since != 0)
	}
	if err == nil && taken(r, a) {
		s.journal.took(r, a)
	}
	return err
}

// decideStale asks Redis once more, after it was raised to the ledger's debt if it is doubted (Rule 7). If the ledger
// has not answered by the time read, Redis decides without it and is raised with the next flush: a call that waited
// longer would exceed its own time. The second question is a plain Decide, which trusts all state and sends the script.
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

// decideOnLedger keeps Rule 4, Postgres decides a call that Redis fails. What this process has pending of the
// identifiers is charged first, so that Postgres decides with all that Redis has admitted to this process.
//
// Redis does not see what Postgres admits. While the breaker is closed other calls still ask Redis, so Redis is raised
// with the next flush. While it is open nothing needs to be done: Redis will be doubted when it is back (Rule 7).
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

// taken reports whether an answer says that the costs were taken.
func taken(r *storage.Request, a *storage.Answer) bool { return a.Allowed && r.Mode != storage.Peek }

// onPrimary calls f with a context that ends PrimaryTimeout after the given time: the time at which the call began, or
// at which its read of the ledger had to be done.
func (s *Storage) onPrimary(ctx context.Context, after time.Time, f func(context.Context) error) error {
	return within(ctx, after.Add(s.options.PrimaryTimeout), "Redis", f)
}

// onLedger calls f with a context that ends after LedgerTimeout, or when both timeouts have passed since the call
// began, whichever is earlier. The second bound counts if the call has already read the ledger for Rule 7, which took
// some of the time that Postgres has.
func (s *Storage) onLedger(ctx context.Context, began time.Time, f func(context.Context) error) error {
	left := s.options.PrimaryTimeout - time.Since(began)
	return within(ctx, time.Now().Add(s.options.LedgerTimeout+min(0, left)), "Postgres", f)
}

// within calls f with a context that ends at a deadline. If the caller's context has ended, its error is returned and
// the other store is not asked. If only the deadline has passed, the store was too slow, and the error wraps
// ErrUnavailable.
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

// fails reports whether the other store is to be asked after an error: the store does not answer, or it cannot read the
// identifier's state. Any other error is a fault of the call itself, and the other store would return it too.
func fails(err error) bool {
	return errors.Is(err, storage.ErrUnavailable) || errors.Is(err, storage.ErrCorruptState)
}

// silent reports whether a store does not answer, or never will because the program has closed it too early. Whatever
// it was to be told is not known to it.
func silent(err error) bool {
	return errors.Is(err, storage.ErrUnavailable) || errors.Is(err, storage.ErrClosed)
}

// unavailable returns the error of Rule 9, neither store answers, with the causes of both.
func unavailable(primary, ledger error) error {
	return fmt.Errorf("%w: neither Redis (%w) nor Postgres (%w)", storage.ErrUnavailable, primary, ledger)
}

// isolated returns the error of Options.MaxIsolation if that time has passed, otherwise nil. The time counts from the
// admission of the batch that could not be written, not from the first failure, so it bounds how much the ledger lacks.
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

// decideLocally keeps Rule 9 with Options.Local: buckets in the memory of this process decide, which hold its share of
// each capacity. What they admit is never recorded in Redis or Postgres. A cost above the share is an error, because
// waiting would not help; it may still be below the capacity that the caller knows.
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

// share returns rules with this process's share of the capacities, at least 1 unless there is nothing to share. A
// Continuous bucket gets its share of the refill by a longer period, because the refill must remain a whole number.
// Buckets of the other kinds keep their period.
func (s *Storage) share(of *storage.RuleSet) (*storage.RuleSet, error) {
	rules := make([]law.Rule, len(of.Rules))
	for i := range of.Rules {
		r, faults := &of.Rules[i], []law.Fault(nil)
		capacity, period := max(min(1, r.Capacity), int64(float64(r.Capacity)*s.options.Local.Share)), r.Period
		if r.Kind == law.Continuous {
			period = rounded(int64(float64(r.Period) / s.options.Local.Share))
		}
		if rules[i], faults = law.NewRule(r.Name, r.Kind, micros(period), capacity, r.Refill); len(faults) > 0 {
			return nil, (*storage.BucketError)(&faults[0])
		}
	}
	return law.NewRuleSet(rules...), nil
}

// rounded returns n rounded up to four significant digits. A large bucket needs a period with many divisors
// (law.NewRule), which the quotient of a division rarely has.
func rounded(n int64) int64 {
	step := int64(1)
	for n/step >= 10_000 {
		step *= 10
	}
	return (n + step - 1) / step * step
}
