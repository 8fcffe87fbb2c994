package failover

// Rule 7: a doubted Redis is raised before it admits.
//
// Redis may come back from an outage empty, with an old snapshot, or intact while Postgres admitted meanwhile. Nothing
// in Redis tells which. But each state says when it was changed last, and that is enough: whoever changed it since the
// doubt began has read the ledger before, or has it read with the next flush. Older state, and none at all, is stale.
// Redis itself compares the times in the decision, so where nothing is stale Rule 7 costs no round trip
// (redis.Storage.DecideFresh).
//
// The first call that finds an identifier stale reads through: it reads the ledger's debt, raises Redis to it, and
// decides again. Later calls find fresh state.
//
// A restart is found even if no call has failed by it: the server has forgotten its scripts, and answers ErrRestarted.

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/storage"
)

// doubt is the time before which state of the request's buckets is stale, 0 for none. The doubt ends for a bucket when
// all that was spent before it began has come back: then the ledger has nothing to add.
//
// By an injected clock no state has a time that compares with this process's. Then all state is stale while Redis is
// doubted, and each admission reads the ledger. That is worth it after an outage, as Postgres has decided meanwhile,
// and not after each restart.
func (s *Storage) doubt(r *storage.Request) (since int64) {
	if since = s.doubted.Load(); r.Clocked {
		since = s.outage.Load()
	}
	if since == 0 {
		return 0
	}
	age := law.Monotonic() - since
	for _, p := range r.Parts {
		for j := range p.Rules.Rules {
			if age <= longest(&p.Rules.Rules[j]) {
				return since
			}
		}
	}
	return 0
}

// longest is at least how long what decisions took needs to come back: for a level all that is recorded at most; else the two periods of a SlidingWindow, and one more for a server's clock that has stepped back. A test
// compares it with law.Decide.
func longest(r *law.Rule) int64 {
	if r.Kind == law.Continuous {
		return drains(r, r.Ceiling())
	}
	return 3 * r.Period
}

// handBack begins Rule 7: it lets Redis decide again, and begins the doubt: this process and others have used Postgres.
// The doubt begins before the breaker closes, so no call finds Redis trusted and lacking. Resets that Redis has missed
// come first, as raising lowers nothing.
func (s *Storage) handBack(ctx context.Context) bool {
	if s.resetMissed(ctx) != nil {
		return false
	}
	now := law.Monotonic()
	s.doubted.Store(now)
	s.outage.Store(now)
	if !s.breaker.close() {
		return false
	}
	s.notify(Event{Kind: PrimaryBack})
	return true
}

// readThrough keeps Rule 7: it raises Redis to what the ledger has of a request's identifiers. It returns the parts for
// which that was not done at the time end; the caller has them raised later. While the ledger fails it is not asked, or
// each call would wait for it. The error is that of a Redis that does not answer: Postgres decides then.
func (s *Storage) readThrough(ctx context.Context, r *storage.Request, end time.Time) (late []*storage.Part, err error) {
	ctx, cancel := context.WithDeadline(ctx, end)
	defer cancel()
	parts := make([]*storage.Part, len(r.Parts))
	for i := range parts {
		parts[i] = &r.Parts[i]
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

// read returns the ledger's debt of an identifier, and when it was asked. What this process has pending is written
// first: Redis may have lost that too.
func (s *Storage) read(ctx context.Context, r *storage.Request, p *storage.Part) (d replica.Debt, asked int64, err error) {
	if err := s.settle(ctx, key{r.Name, p.Identifier}); err != nil {
		return d, 0, err
	}
	asked = law.Monotonic()
	d, err = s.ledger.Debt(ctx, replica.Debt{Name: r.Name, Clocked: r.Clocked, Now: r.Now, Identifier: p.Identifier, Rules: p.Rules})
	return d, asked, err
}

// ledgerFails reports whether the last flush failed.
func (s *Storage) ledgerFails() bool {
	s.flusher.mu.Lock()
	defer s.flusher.mu.Unlock()
	return s.flusher.failures > 0
}

// raiseLater has Redis raised, with the next flush, to what the ledger has of parts of a request.
func (s *Storage) raiseLater(r *storage.Request, parts []*storage.Part) {
	for _, p := range parts {
		s.journal.raiseLater(r.Name, p, r.Clocked, r.Now)
	}
}
