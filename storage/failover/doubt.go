package failover

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/go-throttler/throttler/storage"
)

// doubt is since when the primary may have missed something of a request's buckets, 0 if it has not, or if that would
// have come back since.
func (s *Storage) doubt(r *storage.Request) (since int64) {
	if since = s.doubted.Load(); r.Clocked { // to which it does not matter whether a server has restarted
		since = s.outage.Load()
	}
	if since == 0 {
		return 0
	}
	age := storage.Monotonic() - since
	for i := range r.Parts() {
		rules := r.At(i).Rules
		for j := range rules {
			if age <= longest(&rules[j]) {
				return since
			}
		}
	}
	return 0
}

// longest is at least how long anything of a rule's bucket takes to come back.
func longest(r *storage.Rule) int64 {
	if r.Kind == storage.Continuous {
		return drains(r, 4*r.Capacity)
	}
	return 3 * r.Period
}

// handBack lets Redis decide again. From now on it is doubted: other processes may have used Postgres too.
func (s *Storage) handBack(ctx context.Context) bool {
	if s.resetMissed(ctx) != nil {
		return false
	}
	now := storage.Monotonic()
	s.doubted.Store(now)
	s.outage.Store(now)
	if !s.breaker.close() {
		return false
	}
	s.notify(Event{Kind: PrimaryBack})
	return true
}

// readThrough raises Redis to what the ledger has of a request's identifiers, and returns those for which that was not
// done in time: they are to be touched once Redis has decided. It is an error if Redis does not answer.
func (s *Storage) readThrough(ctx context.Context, r *storage.Request, end time.Time) (late []*storage.Part, err error) {
	ctx, cancel := context.WithDeadline(ctx, end)
	defer cancel()
	parts := make([]*storage.Part, r.Parts())
	for i := range parts {
		parts[i] = r.At(i)
	}
	if s.ledgerFails() {
		return parts, nil
	}
	var mu sync.Mutex
	err = each(parts, func(p *storage.Part) error {
		d, asked, err := s.read(ctx, r, p)
		if err == nil && slices.ContainsFunc(d.Amounts, func(a []storage.Amount) bool { return len(a) > 0 }) {
			if err = s.raise(ctx, d, asked); ctx.Err() == nil && errors.Is(err, storage.ErrUnavailable) {
				return err
			}
		}
		if err != nil {
			mu.Lock()
			late = append(late, p)
			mu.Unlock()
		}
		return nil
	})
	return late, err
}

// read asks what the ledger has of an identifier, once it knows what this process admitted, and returns when that was.
func (s *Storage) read(ctx context.Context, r *storage.Request, p *storage.Part) (d storage.Debt, asked int64, err error) {
	if err := s.settle(ctx, key{r.Name, p.Identifier}); err != nil {
		return d, 0, err
	}
	asked = storage.Monotonic()
	d, err = s.ledger.Debt(ctx, storage.Debt{Name: r.Name, Clocked: r.Clocked, Now: r.Now, Identifier: p.Identifier, Rules: p.Rules})
	return d, asked, err
}

func (s *Storage) ledgerFails() bool {
	s.flusher.mu.Lock()
	defer s.flusher.mu.Unlock()
	return s.flusher.failures > 0
}

// touch has Redis raised to what the ledger has of parts of a request.
func (s *Storage) raiseLater(r *storage.Request, parts []*storage.Part) {
	for _, p := range parts {
		s.journal.raiseLater(r.Name, p, r.Clocked, r.Now)
	}
}
