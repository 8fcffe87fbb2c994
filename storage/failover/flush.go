package failover

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/go-throttler/throttler/storage"
)

const (
	flushSize    = 512                    // identifiers that are told at once
	oldAfter     = int64(1_000_000)       // µs after which levels are not charged
	readTimeout  = 20 * time.Millisecond  // for the ledger's debt in a call that Redis answers
	closeTimeout = time.Second            // for the last flush
	longestPause = 250 * time.Millisecond // between tries while the ledger fails
	atATime      = 64                     // calls of one store in a flush
)

// flusher tells the ledger what is in the journal, one batch after the other, each until it is known to be told:
// so a sequence number tells the ledger whether it knows a batch already.
type flusher struct {
	origin string
	seq    int64
	batch  []*entry // that is being told, and that the ledger perhaps knows

	mu       sync.Mutex // guards what follows
	failures int        // in a row
	failure  error      // the last one
	since    int64      // when what could not be told was admitted (Monotonic); 0: everything could
	told     time.Time  // the last time that something was
	relayed  int64      // identifiers to which the primary was raised
}

// flushes tells the ledger what is due, until the storage is closed.
func (s *Storage) flushes() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		if d := s.flushIn(); d < 0 {
			timer.Stop()
		} else {
			timer.Reset(d)
		}
		select {
		case <-s.closing:
			return
		case <-s.journal.kick:
		case <-timer.C:
			ctx, cancel := context.WithCancel(context.Background())
			s.flush(ctx)
			cancel()
		}
	}
}

// flushIn is how long until a flush is due, negative if there is nothing to tell.
func (s *Storage) flushIn() time.Duration {
	since, pending, urgent := s.journal.due()
	if len(s.flusher.batch) > 0 {
		since = s.flusher.batch[0].since
	} else if pending == 0 {
		return -1
	}
	s.flusher.mu.Lock()
	failures := s.flusher.failures
	s.flusher.mu.Unlock()
	switch {
	case urgent:
		return 0
	case failures > 0:
		return min(s.options.FlushInterval<<min(failures-1, 10), max(longestPause, s.options.FlushInterval))
	case pending > s.options.MaxPending/2:
		return 0
	}
	return max(0, s.options.FlushInterval-time.Duration(storage.Monotonic()-since)*time.Microsecond)
}

// flush tells the ledger one batch.
func (s *Storage) flush(ctx context.Context) {
	f := &s.flusher
	if f.batch = s.journal.board(f.batch); len(f.batch) == 0 {
		return
	}
	debts, err := s.tell(ctx, f.batch)
	if errors.Is(err, storage.ErrUnavailable) || err != nil && ctx.Err() != nil {
		s.flushFailed(err)
		return
	}
	lag := storage.Monotonic() - f.batch[0].since
	relayed := 0
	if err == nil {
		f.seq++
		relayed = s.relay(ctx, f.batch, debts)
	}
	s.journal.land(f.batch)
	f.batch = nil
	s.flushed(err, lag, relayed)
}

func (s *Storage) flushFailed(err error) {
	f := &s.flusher
	f.mu.Lock()
	f.failures++
	f.failure, f.since = err, f.batch[0].since
	f.mu.Unlock()
	s.journal.failed(err)
	s.tellObserver(Event{Kind: FlushFailed, Err: err, Lag: micros(storage.Monotonic() - f.batch[0].since)})
}

func (s *Storage) flushed(err error, lag int64, relayed int) {
	f := &s.flusher
	f.mu.Lock()
	f.failures, f.failure, f.since, f.told = 0, nil, 0, time.Now()
	f.relayed += int64(relayed)
	f.mu.Unlock()
	s.tellObserver(Event{Kind: Flushed, Err: err, Lag: micros(lag), Relayed: relayed})
}

// tell has the ledger know a batch, and returns what each entry's buckets owe there afterwards.
func (s *Storage) tell(ctx context.Context, batch []*entry) ([]storage.Debt, error) {
	now := storage.Monotonic()
	err := each(batch, func(e *entry) error {
		if e.reset {
			if err := s.ledger.Reset(ctx, e.name, e.identifier); err != nil {
				return err
			}
			e.reset = false
		}
		if now-e.since > oldAfter {
			return s.raiseLevels(ctx, e)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var charges []storage.Charge
	var last []int // the place of each entry's last charge, or -1
	for _, e := range batch {
		charges = e.charges(charges, now)
		last = append(last, len(charges)-1)
		if len(e.buckets) == 0 {
			last[len(last)-1] = -1
		}
	}
	if len(charges) == 0 {
		return make([]storage.Debt, len(batch)), nil
	}
	answers, err := s.ledger.Record(ctx, s.flusher.origin, s.flusher.seq, charges)
	if err != nil {
		return nil, err
	}
	debts := make([]storage.Debt, len(batch))
	for i, at := range last {
		if at >= 0 {
			debts[i] = answers[at]
		}
	}
	return debts, nil
}

// charges appends what the ledger is charged for an entry: as many charges as a bucket has amounts, and at least
// one if there are buckets.
func (e *entry) charges(out []storage.Charge, now int64) []storage.Charge {
	if e.clocked {
		now = e.now
	}
	rules := e.rules()
	for k, more := 0, len(e.buckets) > 0; more; k++ {
		c := storage.Charge{Name: e.name, Identifier: e.identifier, Clocked: e.clocked, Now: e.now, Rules: rules, Amounts: make([]storage.Amount, len(rules))}
		more = false
		for i := range e.buckets {
			if amounts := e.buckets[i].amounts; k < len(amounts) {
				c.Amounts[i] = amounts[k].left(now)
				more = more || k+1 < len(amounts)
			}
		}
		out = append(out, c)
	}
	return out
}

func (e *entry) rules() []storage.Rule {
	rules := make([]storage.Rule, len(e.buckets))
	for i := range e.buckets {
		rules[i] = *e.buckets[i].rule
	}
	return rules
}

// raiseLevels raises the ledger to the levels that the primary showed last, of an entry that is old: in the amounts
// that it was to be charged, what has drained since would count again.
func (s *Storage) raiseLevels(ctx context.Context, e *entry) error {
	d := storage.Debt{Name: e.name, Identifier: e.identifier, Clocked: e.clocked, Now: e.now, Rules: e.rules(), Amounts: make([][]storage.Amount, len(e.buckets))}
	old := false
	for i := range e.buckets {
		if b := &e.buckets[i]; b.rule.Kind == storage.Continuous && len(b.amounts) > 0 {
			d.Amounts[i] = []storage.Amount{{N: b.spent, In: max(0, b.resetAt-e.time())}}
			old = true
		}
	}
	if !old {
		return nil
	}
	if err := s.ledger.Raise(ctx, d); fails(err) {
		return err
	}
	for i, raised := range d.Amounts {
		if raised != nil {
			e.buckets[i].amounts = nil
		}
	}
	return nil
}

// relay raises the primary where the ledger knows of more than it has shown, and returns for how many identifiers.
func (s *Storage) relay(ctx context.Context, batch []*entry, debts []storage.Debt) (n int) {
	if s.breaker.cause() != nil {
		return 0
	}
	if err := s.resetPrimary(ctx); err != nil {
		return 0
	}
	var higher []storage.Debt
	for i, e := range batch {
		if (e.raise || !e.clocked) && e.behind(&debts[i]) {
			higher = append(higher, debts[i])
		}
	}
	_ = each(higher, func(d storage.Debt) error { return s.raise(ctx, d) })
	return len(higher)
}

// raise raises the primary to a debt, unless tokens have been given back there that the ledger does not know of. It is
// tried again with the next flush.
func (s *Storage) raise(ctx context.Context, d storage.Debt) (err error) {
	id := key{d.Name, d.Identifier}
	if s.journal.raise(id) {
		defer s.journal.raised(id)
		if err = s.primary.Raise(ctx, d); !errors.Is(err, storage.ErrUnavailable) {
			return nil
		}
	}
	p := storage.NewPart(d.Identifier, d.Rules, 0)
	s.journal.touch(d.Name, &p, d.Clocked, d.Now)
	return err
}

// behind reports whether the ledger knows of more than the primary has shown.
func (e *entry) behind(d *storage.Debt) bool {
	now := e.time()
	for i, debt := range d.Amounts {
		if len(debt) == 0 {
			continue
		}
		b := &e.buckets[i]
		n, last := held(&d.Rules[i], debt)
		switch {
		case e.raise, now >= b.resetAt:
			return true
		case b.rule.Kind == storage.Continuous:
			if last > b.resetAt-now+b.rule.Period/b.rule.Refill+1000 { // a token, and the way
				return true
			}
		case n > b.spent:
			return true
		}
	}
	return false
}

// held is how many tokens a debt has, and when the last of them comes back.
func held(r *storage.Rule, debt []storage.Amount) (n, last int64) {
	for _, a := range debt {
		if r.Kind == storage.SlidingWindow && a.In < r.Period { // it fades
			a.N = int64(float64(a.N) * float64(a.In) / float64(r.Period))
		}
		n, last = n+a.N, max(last, a.In)
	}
	return n, last
}

// resetPrimary makes up for the resets that the primary has missed.
func (s *Storage) resetPrimary(ctx context.Context) error {
	return each(s.journal.missed(), func(id key) error {
		err := s.primary.Reset(ctx, id.name, id.identifier)
		if !errors.Is(err, storage.ErrUnavailable) {
			s.journal.wasReset(id)
			err = nil
		}
		return err
	})
}

// settle waits until the ledger knows everything that this process admitted of an identifier.
func (s *Storage) settle(ctx context.Context, id key) error {
	w := s.journal.await(id)
	if w == nil {
		return nil
	}
	select {
	case err := <-w.told:
		return err
	case <-ctx.Done():
		return fmt.Errorf("what is pending could not be told the ledger: %w", ctx.Err())
	}
}

// readThrough raises Redis to what the ledger has of a request's identifiers. When that takes long it comes
// afterwards.
func (s *Storage) readThrough(ctx context.Context, r *storage.Request) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	for i := range r.Parts() {
		s.journal.touch(r.Name, r.At(i), r.Clocked, r.Now)
	}
	if s.ledgerFails() {
		return
	}
	for i := range r.Parts() {
		if s.settle(ctx, key{r.Name, r.At(i).Identifier}) != nil {
			return
		}
	}
}

func (s *Storage) ledgerFails() bool {
	s.flusher.mu.Lock()
	defer s.flusher.mu.Unlock()
	return s.flusher.failures > 0
}

// doubt is how long ago the primary may have missed something of a request's buckets, negative if it has not, or if
// it would have come back since.
func (s *Storage) doubt(r *storage.Request) time.Duration {
	since := s.doubted.Load()
	if r.Clocked { // to which it does not matter whether a server has restarted
		since = s.outage.Load()
	}
	if since == 0 {
		return -1
	}
	age := storage.Monotonic() - since
	for i := range r.Parts() {
		rules := r.At(i).Rules
		for j := range rules {
			if age <= longest(&rules[j]) {
				return micros(age)
			}
		}
	}
	return -1
}

// longest is at least how long anything of a rule's bucket takes to come back.
func longest(r *storage.Rule) int64 {
	if r.Kind == storage.Continuous {
		return int64(min(4*float64(r.Capacity)/float64(r.Refill)*float64(r.Period)+1, 1<<52))
	}
	return 3 * r.Period
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

// end ends the goroutines and tells the ledger what is left.
func (s *Storage) end(ctx context.Context) error {
	s.breaker.end()
	close(s.closing)
	ended := make(chan struct{})
	go func() {
		s.running.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		_, pending, _ := s.journal.due()
		if pending == 0 && len(s.flusher.batch) == 0 {
			return nil
		}
		s.flush(ctx)
		if err := s.flusher.failure; err != nil {
			return err
		}
	}
}

// each calls f for all, some at a time, and returns an error if one did.
func each[T any](all []T, f func(T) error) (err error) {
	if len(all) == 1 {
		return f(all[0])
	}
	var mu sync.Mutex
	var wait sync.WaitGroup
	next := 0
	for range min(len(all), atATime) {
		wait.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				failed := err != nil
				mu.Unlock()
				if i >= len(all) || failed {
					return
				}
				if e := f(all[i]); e != nil {
					mu.Lock()
					err = e
					mu.Unlock()
				}
			}
		})
	}
	wait.Wait()
	return err
}

func micros(n int64) time.Duration { return time.Duration(n) * time.Microsecond }
