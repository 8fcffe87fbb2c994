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
	flushAmounts = 2048                   // amounts that are told at once, about
	oldAfter     = int64(1_000_000)       // µs after which levels are not charged, or 2 intervals
	closeTimeout = time.Second            // for the last flush
	longestPause = 250 * time.Millisecond // between tries while the ledger fails
	urgentPause  = 10 * time.Millisecond  // and if somebody waits
	atATime      = 64                     // calls of one store in a flush
)

// flusher tells the ledger what is in the journal, one batch after the other, each until it is known to be told:
// so a sequence number tells the ledger whether it knows a batch already.
type flusher struct {
	origin string
	seq    int64
	batch  []*entry // that is being told, and that the ledger perhaps knows

	mu        sync.Mutex // guards what follows
	failures  int        // in a row
	failure   error      // the last one
	since     int64      // when what could not be told was admitted (Monotonic); 0: everything could
	flushedAt time.Time  // the last time that something was
	relayed   int64      // identifiers to which the primary was raised
}

// flushes tells the ledger what is due, until the storage is closed.
func (s *Storage) flushLoop(ctx context.Context) {
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
		case <-s.journal.work:
		case <-timer.C:
			s.flush(ctx)
		}
	}
}

// flushIn is how long until a flush is due, negative if there is nothing to tell.
func (s *Storage) flushIn() time.Duration {
	since, pending, urgent := s.journal.due()
	if len(s.flusher.batch) > 0 {
		since = s.flusher.batch[0].since
	} else if pending == 0 && len(s.journal.missed()) > 0 && s.breaker.cause() == nil {
		return s.options.FlushInterval
	} else if pending == 0 {
		return -1
	}
	s.flusher.mu.Lock()
	failures := s.flusher.failures
	s.flusher.mu.Unlock()
	switch {
	case urgent && failures > 0:
		return urgentPause
	case urgent:
		return 0
	case failures > 0:
		return min(s.options.FlushInterval<<min(failures-1, 10), max(longestPause, s.options.FlushInterval))
	case pending > s.options.MaxPending/2:
		return 0
	}
	return max(0, s.options.FlushInterval-time.Duration(storage.Monotonic()-since)*time.Microsecond)
}

// flush tells the ledger one batch. If it refuses, it is told the entries one by one, and those that it refuses are lost.
func (s *Storage) flush(ctx context.Context) {
	f := &s.flusher
	if f.batch = s.journal.nextBatch(f.batch); len(f.batch) == 0 {
		if s.breaker.cause() == nil {
			_ = s.resetMissed(ctx)
		}
		return
	}
	since, relayed, rejected := f.batch[0].since, 0, error(nil)
	for size := len(f.batch); len(f.batch) > 0; {
		raised, err := s.flushSome(ctx, f.batch[:size])
		if err != nil && (errors.Is(err, storage.ErrUnavailable) || ctx.Err() != nil) {
			s.flushFailed(err)
			return
		}
		f.seq++
		if err != nil && size > 1 {
			size = 1
			continue
		}
		if err != nil {
			rejected = err
		}
		for _, e := range f.batch[:size] {
			s.journal.finish(e, err)
		}
		f.batch, relayed = f.batch[size:], relayed+raised
	}
	s.flushed(rejected, storage.Monotonic()-since, relayed)
}

// flushSome tells the ledger some entries, and raises the primary to what it answers.
func (s *Storage) flushSome(ctx context.Context, some []*entry) (relayed int, err error) {
	asked := storage.Monotonic()
	debts, err := s.write(ctx, some)
	if err != nil {
		return 0, err
	}
	return s.relay(ctx, some, debts, asked), nil
}

func (s *Storage) flushFailed(err error) {
	f := &s.flusher
	f.mu.Lock()
	f.failures++
	f.failure, f.since = err, f.batch[0].since
	f.mu.Unlock()
	s.journal.failed(err)
	s.notify(Event{Kind: FlushFailed, Err: err, Lag: micros(storage.Monotonic() - f.batch[0].since)})
}

func (s *Storage) flushed(err error, lag int64, relayed int) {
	f := &s.flusher
	f.mu.Lock()
	f.failures, f.failure, f.since, f.flushedAt = 0, nil, 0, time.Now()
	f.relayed += int64(relayed)
	f.mu.Unlock()
	s.notify(Event{Kind: Flushed, Err: err, Lag: micros(lag), Relayed: relayed})
}

// tell has the ledger know a batch, and returns what each entry's buckets owe there afterwards.
func (s *Storage) write(ctx context.Context, batch []*entry) ([]storage.Debt, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	now := storage.Monotonic()
	if err := s.prepare(ctx, batch, now); err != nil {
		return nil, err
	}
	var charges []storage.Charge
	ends := make([]int, len(batch)) // of each entry's charges
	for i, e := range batch {
		charges = e.charges(charges, now)
		ends[i] = len(charges)
	}
	debts := make([]storage.Debt, len(batch))
	if len(charges) == 0 {
		return debts, nil
	}
	answers, err := s.ledger.Record(ctx, s.flusher.origin, s.flusher.seq, charges)
	if err != nil {
		return nil, err
	}
	from := 0
	for i, e := range batch {
		debts[i] = e.debt(answers[from:ends[i]])
		from = ends[i]
	}
	return debts, nil
}

// prepare tells the ledger what is not a charge: resets, and the levels of entries that are old.
func (s *Storage) prepare(ctx context.Context, batch []*entry, now int64) error {
	old := max(oldAfter, 2*s.options.FlushInterval.Microseconds())
	return each(batch, func(e *entry) error {
		if e.reset {
			if err := s.ledger.Reset(ctx, e.name, e.identifier); err != nil {
				return err
			}
			e.reset = false
		}
		if now-e.since > old {
			return s.raiseLevels(ctx, e)
		}
		return nil
	})
}

// charges appends what the ledger is charged for an entry: first a charge for each MaxBuckets of its buckets, then more
// of those that have several amounts.
func (e *entry) charges(out []storage.Charge, now int64) []storage.Charge {
	if e.clocked {
		now = e.now
	}
	rules, amounts := rulesOf(e.buckets), make([][]storage.Amount, len(e.buckets))
	rounds := 1
	for i := range e.buckets {
		amounts[i] = e.buckets[i].left(now)
		rounds = max(rounds, len(amounts[i]))
	}
	for k := range rounds {
		for from := 0; from < len(rules); from += storage.MaxBuckets {
			to := min(from+storage.MaxBuckets, len(rules))
			if c, any := e.charge(rules[from:to], amounts[from:to], k); any || k == 0 {
				out = append(out, c)
			}
		}
	}
	return out
}

// charge charges some buckets with amount k of each that has so many, and reports whether one has.
func (e *entry) charge(rules []storage.Rule, amounts [][]storage.Amount, k int) (c storage.Charge, any bool) {
	c = storage.Charge{Name: e.name, Identifier: e.identifier, Clocked: e.clocked, Now: e.now, Rules: rules, Amounts: make([]storage.Amount, len(rules))}
	for i, all := range amounts {
		if k < len(all) {
			c.Amounts[i], any = all[k], true
		}
	}
	return c, any
}

// debt is what the ledger answered to the entry's charges.
func (e *entry) debt(answers []storage.Debt) storage.Debt {
	d := storage.Debt{Name: e.name, Identifier: e.identifier, Clocked: e.clocked, Now: e.now, Rules: rulesOf(e.buckets), Amounts: make([][]storage.Amount, len(e.buckets))}
	for from := 0; from < len(d.Rules); from += storage.MaxBuckets {
		copy(d.Amounts[from:], answers[from/storage.MaxBuckets].Amounts)
	}
	return d
}

func rulesOf(buckets []bucket) []storage.Rule {
	rules := make([]storage.Rule, len(buckets))
	for i := range buckets {
		rules[i] = *buckets[i].rule
	}
	return rules
}

// raiseLevels raises the ledger to the levels that the primary has shown of an entry that is old: in the amounts that it
// was to be charged, what has drained since would count again. The time until a level is empty tells how high it is.
func (s *Storage) raiseLevels(ctx context.Context, e *entry) error {
	d := storage.Debt{Name: e.name, Identifier: e.identifier, Clocked: e.clocked, Now: e.now}
	var raised []*bucket
	for i := range e.buckets {
		b := &e.buckets[i]
		if b.rule.Kind != storage.Continuous || len(b.taken) == 0 || b.unshown || len(d.Rules) == storage.MaxBuckets {
			continue
		}
		raised = append(raised, b)
		d.Rules = append(d.Rules, *b.rule)
		d.Amounts = append(d.Amounts, []storage.Amount{{N: 4 * b.rule.Capacity, In: max(0, b.resetAt-e.time())}})
	}
	if len(raised) == 0 {
		return nil
	}
	if err := s.ledger.Raise(ctx, d); errors.Is(err, storage.ErrUnavailable) {
		return err
	}
	for _, b := range raised {
		b.taken, b.refunded = nil, nil
	}
	return nil
}

// relay raises the primary where the ledger knows of more than it has shown, and returns for how many identifiers.
func (s *Storage) relay(ctx context.Context, batch []*entry, debts []storage.Debt, asked int64) (n int) {
	if s.breaker.cause() != nil {
		return 0
	}
	_ = s.resetMissed(ctx)
	var higher []storage.Debt
	for i, e := range batch {
		raise := s.journal.mustRaise(e)
		if (raise || !e.clocked) && e.behind(&debts[i], s.options.FlushInterval, raise) {
			higher = append(higher, debts[i])
		}
	}
	_ = each(higher, func(d storage.Debt) error {
		_ = s.raise(ctx, d, asked)
		return s.breaker.cause() // and then all are doubted
	})
	return len(higher)
}

// raise raises the primary to a debt that was asked for at a time, unless tokens have been given back there of which the
// ledger does not know. It is tried again with the next flush.
func (s *Storage) raise(ctx context.Context, d storage.Debt, asked int64) error {
	id, err := key{d.Name, d.Identifier}, errGivenBack
	if may, own := s.journal.beginRaise(id); may {
		age(&d, asked)
		err = s.primary.Raise(ctx, d)
		if own {
			s.journal.endRaise(id)
		}
	}
	if errors.Is(err, errGivenBack) || errors.Is(err, storage.ErrUnavailable) || err != nil && ctx.Err() != nil {
		s.journal.raiseAgain(&d)
		return err
	}
	return nil
}

// age takes the way off the times of a debt, which else would grow with each relay.
func age(d *storage.Debt, asked int64) {
	if d.Clocked {
		return
	}
	way := storage.Monotonic() - asked
	for _, amounts := range d.Amounts {
		for i := range amounts {
			amounts[i].In = max(0, amounts[i].In-way)
		}
	}
}

var errGivenBack = errors.New("tokens are being given back")

// behind reports whether the ledger knows of more than the primary has shown. In buckets of a period shorter than an
// interval it never does, as what it knows has come back by then.
func (e *entry) behind(d *storage.Debt, interval time.Duration, raise bool) bool {
	now := e.time()
	for i, debt := range d.Amounts {
		if len(debt) == 0 || micros(d.Rules[i].Period) < interval && !raise {
			continue
		}
		b := &e.buckets[i]
		n, last := held(&d.Rules[i], debt)
		switch {
		case raise, now >= b.resetAt:
			return true
		case b.rule.Kind == storage.Continuous:
			if last > b.resetAt-now+drains(b.rule, 1)+1000 { // a token, and the way
				return true
			}
		case n > b.spent:
			return true
		}
	}
	return false
}

// settle waits until the ledger knows everything that this process admitted of an identifier.
func (s *Storage) settle(ctx context.Context, id key) error {
	w := s.journal.await(id)
	if w == nil {
		return nil
	}
	select {
	case err := <-w.done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("what is pending could not be told the ledger: %w", ctx.Err())
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
