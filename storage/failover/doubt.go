package failover

// Rule 7: a doubted Redis is raised before it admits.
//
// Redis may come back from an outage empty, with an old snapshot, or intact while Postgres admitted in the meantime.
// Nothing in Redis tells which. But each state in Redis has the time of its last change, and that is enough. A process
// that changed the state after the doubt began has read the ledger before, or will have it read with the next flush, so
// newer state is trusted. Older state is stale, and so is an identifier without any.
//
// Redis itself compares the times as part of the decision (redis.Storage.DecideFresh), so Rule 7 costs no round trip
// where nothing is stale. The first call that finds an identifier stale reads through: it reads the ledger's debt,
// raises Redis to it, and asks for the decision again. Later calls find fresh state.
//
// A restart of Redis is noticed even if no call fails because of it: the server has forgotten its scripts, so the
// storage returns ErrRestarted.

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

// doubt returns the time, by law.Monotonic, up to which state of the request's buckets is stale, or 0 if Redis is not
// doubted for this request. The doubt ends for a bucket when all that was spent before the doubt began is back: then
// the ledger has nothing to add. It lasts as long as any bucket of the request needs.
//
// With an injected clock no state has a time that can be compared with this process's. All state is stale then while
// Redis is doubted, and each admission reads the ledger. That is worth its price after an outage, because Postgres has
// decided in the meantime, but not after each restart, so only outage counts.
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

// longest returns an upper bound, in microseconds, of the time that tokens taken by decisions need to come back. For a
// level it is the time that the ceiling takes to drain. For all other kinds it is the two periods that a SlidingWindow
// takes, and one more for a server's clock that has stepped back. A test compares it with law.Decide.
func longest(r *law.Rule) int64 {
	if r.Kind == law.Continuous {
		return drains(r, r.Ceiling())
	}
	return 3 * r.Period
}

// handBack ends an outage: it lets Redis decide again, and begins the doubt of Rule 7, since this process and others
// have used Postgres meanwhile. It returns false, and the probes go on, if Redis still fails or it is too early.
//
// The order matters. Resets that Redis has missed come first, because a raise could not lower what they should have
// erased. The doubt begins before the breaker closes, so no call can trust a Redis that lacks spending. If the breaker
// then does not close, the doubt does no harm: nobody asks Redis yet, and the next try begins a later one.
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

// readThrough keeps Rule 7: it raises Redis to the ledger's debt of each identifier of a request. It returns the parts
// for which this was not done by the time end; the caller has these raised with the next flush. An error means that
// Redis does not answer, so Postgres should decide.
//
// While the ledger fails it is not asked at all: each call would wait for it in vain. An identifier without any debt
// needs no raise.
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
		done, err := s.readOne(ctx, r, p)
		if !done {
			mu.Lock()
			late = append(late, p)
			mu.Unlock()
		}
		return err
	})
	return late, err
}

// readOne is readThrough for one identifier. It reports whether Redis has all of the debt. What this process has pending
// of the identifier is written first, because Redis may have lost that too. The debt ages from the time before it was
// asked for.
func (s *Storage) readOne(ctx context.Context, r *storage.Request, p *storage.Part) (done bool, err error) {
	id := key{r.Name, p.Identifier}
	reading := s.journal.beginRead(id)
	defer s.journal.endRead(id, reading)
	if s.settle(ctx, id) != nil {
		return false, nil
	}
	asked := law.Monotonic()
	d, err := s.ledger.Debt(ctx, replica.Debt{Name: r.Name, Clocked: r.Clocked, Now: r.Now, Identifier: p.Identifier, Rules: p.Rules})
	if err != nil {
		return false, nil
	}
	if !slices.ContainsFunc(d.Amounts, func(a []storage.Amount) bool { return len(a) > 0 }) {
		return true, nil
	}
	if err = s.raise(ctx, d, asked, reading); ctx.Err() == nil && errors.Is(err, storage.ErrUnavailable) {
		return false, err
	}
	return err == nil, nil
}

// ledgerFails reports whether the last flush failed. That is at most as long ago as the pause between two tries
// (flushIn).
func (s *Storage) ledgerFails() bool {
	s.flusher.mu.Lock()
	defer s.flusher.mu.Unlock()
	return s.flusher.failures > 0
}

// raiseLater asks for Redis to be raised to the ledger's debt of parts of a request, with the next flush.
func (s *Storage) raiseLater(r *storage.Request, parts []*storage.Part) {
	for _, p := range parts {
		s.journal.raiseLater(r.Name, p, r.Clocked, r.Now)
	}
}
