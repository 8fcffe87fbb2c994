package failover

// Two rules are kept here, both by one goroutine, the flusher:
//
//	2  the ledger is charged, and once    flush, write, prepare, charges, raiseLevels
//	3  Redis is raised to the ledger      relay, raise, behind
//
// The flusher writes what is pending in numbered batches. The ledger answers each batch with the debt of every
// identifier in it, so finding out whether Redis has to be raised costs no further round trip.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/storage"
)

const (
	flushSize    = 512                    // identifiers in a batch, which is one transaction
	flushAmounts = 2048                   // amounts in a batch, about
	oldAfter     = int64(1_000_000)       // µs, or 2 intervals if that is longer: older levels are raised, not charged
	longestPause = 250 * time.Millisecond // between two tries while the ledger fails
	urgentPause  = 10 * time.Millisecond  // between two tries while a caller waits
	atATime      = 64                     // concurrent calls to one store
)

var errRefunds = errors.New("tokens are being refunded")

// flusher writes the journal to the ledger in numbered batches (Rule 2).
//
// If the answer to a commit is lost, the commit may have happened or not. The flusher therefore repeats a batch, the
// same entries under the same number, until the ledger confirms or rejects it. The number lets the ledger ignore a
// batch that it already has: it keeps the last number of each origin, and takes every number up to that one as written.
// This is why the next batch has to wait: a batch overtaken by a later one would count as written and be lost.
type flusher struct {
	// The goroutine of flushLoop owns these three. After it has ended Close does.
	origin string   // how the ledger knows this process; random
	seq    int64    // the number of the batch
	batch  []*entry // what is in flight; the ledger may have it

	mu        sync.Mutex // guards what follows
	failures  int        // in a row
	failure   error      // the last one; nil after a success
	since     int64      // when the first entry of the failed batch was queued, by law.Monotonic; 0 after a success
	flushedAt time.Time  // the last success
	relayed   int64      // how often an identifier was raised in Redis, in all
}

// flushLoop is the flusher: it flushes whenever a batch is due, until the storage is closed.
func (s *Storage) flushLoop(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		// A token of journal.work leads back to here, where the time of the next flush is computed anew.
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

// flushIn returns how long until a flush is due, negative if there is nothing to write.
//
// A batch is due one interval after its oldest admission. It is due at once if a caller waits for it (Rule 4), or if
// more than half of MaxPending is used. While the ledger fails the pauses double from one try to the next, up to
// longestPause or the interval if that is longer. If a caller waits they stay at urgentPause, as the caller has little
// time.
func (s *Storage) flushIn() time.Duration {
	since, pending, urgent := s.journal.due()
	if len(s.flusher.batch) > 0 { // the last flush failed
		since = s.flusher.batch[0].since
	} else if pending == 0 && len(s.journal.missed()) > 0 && s.breaker.cause() == nil { // open: handBack does them
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
	return max(0, s.options.FlushInterval-time.Duration(law.Monotonic()-since)*time.Microsecond)
}

// flush keeps Rules 2 and 3 for one batch.
//
// There are three outcomes. If the ledger confirms the batch, its entries are finished. If the ledger is silent, the
// batch stays in flight under its number and is repeated. With any other error the ledger has rejected the batch
// and charged nothing of it. Then each entry is written as a batch of its own, under a new number, to find the faulty
// ones. An entry that is rejected alone is forgotten: one faulty entry must not hold up the rest.
//
// A batch without entries means that the flush was due only for the resets that Redis has missed.
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
		if err != nil && (silent(err) || ctx.Err() != nil) {
			s.flushFailed(err)
			return
		}
		f.seq++ // confirmed or rejected, this number is used up: only an unavailable ledger gets it again

		if err != nil && size > 1 { // find out which entry is at fault
			size = 1
			continue
		}
		for _, e := range f.batch[:size] {
			fault := err
			if fault == nil {
				fault = e.fault
			}
			if fault != nil {
				rejected = fault
			}
			s.journal.finish(e, fault)
		}
		f.batch, relayed = f.batch[size:], relayed+raised
	}
	s.flushed(rejected, law.Monotonic()-since, relayed)
}

// flushSome writes some entries (Rule 2) and raises Redis to the debts in the answer (Rule 3). It returns for how many
// identifiers Redis had to be raised. The debts age from the time before the ledger was asked, so they come out a
// little too short rather than too long.
func (s *Storage) flushSome(ctx context.Context, some []*entry) (relayed int, err error) {
	asked := law.Monotonic()
	debts, err := s.write(ctx, some)
	if err != nil {
		return 0, err
	}
	return s.relay(ctx, some, debts, asked), nil
}

// flushFailed keeps the batch for the next try and tells the waiting callers.
func (s *Storage) flushFailed(err error) {
	f := &s.flusher
	f.mu.Lock()
	f.failures++
	f.failure, f.since = err, f.batch[0].since
	f.mu.Unlock()
	s.journal.failed(err)
	s.notify(Event{Kind: FlushFailed, Err: err, Lag: micros(law.Monotonic() - f.batch[0].since)})
}

// flushed notes that nothing of a batch is in flight any more. The error is that of an entry that was rejected, if any.
func (s *Storage) flushed(err error, lag int64, relayed int) {
	f := &s.flusher
	f.mu.Lock()
	f.failures, f.failure, f.since, f.flushedAt = 0, nil, 0, time.Now()
	f.relayed += int64(relayed)
	f.mu.Unlock()
	s.notify(Event{Kind: Flushed, Err: err, Lag: micros(lag), Relayed: relayed})
}

// write charges the ledger with a batch, once (Rule 2), and returns the debt of each entry afterwards. If the ledger
// leaves out an entry, the answer has no amounts for it. The others are charged, and the entry has a fault.
func (s *Storage) write(ctx context.Context, batch []*entry) ([]replica.Debt, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	now := law.Monotonic()
	if err := s.prepare(ctx, batch, now); err != nil {
		return nil, err
	}
	var charges []storage.Charge
	ends := make([]int, len(batch)) // where each entry's charges end
	for i, e := range batch {
		charges = e.charges(charges, now)
		ends[i] = len(charges)
	}
	debts := make([]replica.Debt, len(batch))
	if len(charges) == 0 { // only resets, of entries without buckets
		return debts, nil
	}
	answers, err := s.ledger.Record(ctx, s.flusher.origin, s.flusher.seq, charges)
	if err != nil {
		return nil, err
	}
	from := 0
	for i, e := range batch {
		debts[i] = e.debt(answers[from:ends[i]])
		if slices.ContainsFunc(answers[from:ends[i]], func(d replica.Debt) bool { return d.Amounts == nil }) {
			e.fault = fmt.Errorf("%w: the ledger left out identifier %.64q: its row cannot be read, or would have too many buckets", storage.ErrCorruptState, e.identifier)
		}
		from = ends[i]
	}
	return debts, nil
}

// prepare writes what is not a charge: resets (Rule 8), and the levels of old entries (Rule 2). Both may be repeated,
// so they need no number. A reset that is known to be done is not repeated with the batch, though: it would erase what
// others were charged since.
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

// charges appends what the ledger is charged for an entry (Rule 2).
//
// A storage.Charge has one amount for each of at most MaxBuckets buckets. An entry whose buckets owe several amounts
// therefore makes several charges, in rounds; round k has amount k of each bucket. The charges of the first round are
// made even if nothing is left of the amounts, because their answers are the debt.
func (e *entry) charges(out []storage.Charge, now int64) []storage.Charge {
	if e.clocked { // the amounts have times by the caller's clock
		now = e.now
	}
	amounts := make([][]storage.Amount, len(e.buckets))
	rounds := 1
	for i := range e.buckets {
		amounts[i] = e.buckets[i].left(now)
		rounds = max(rounds, len(amounts[i]))
	}
	var rules []*storage.RuleSet
	for some := range slices.Chunk(e.buckets, law.MaxBuckets) {
		rules = append(rules, e.rulesOf(some))
	}
	for k := range rounds {
		for i, some := range slices.Collect(slices.Chunk(amounts, law.MaxBuckets)) {
			if c, any := e.charge(rules[i], some, k); any || k == 0 {
				out = append(out, c)
			}
		}
	}
	return out
}

// charge returns the charge of each bucket with its amount k, and whether any bucket has that many.
func (e *entry) charge(rules *storage.RuleSet, amounts [][]storage.Amount, k int) (c storage.Charge, any bool) {
	c = storage.Charge{Name: e.name, Identifier: e.identifier, Clocked: e.clocked, Now: e.now, Rules: rules, Amounts: make([]storage.Amount, len(amounts))}
	for i, all := range amounts {
		if k < len(all) {
			c.Amounts[i], any = all[k], true
		}
	}
	return c, any
}

// debt joins the answers to the charges of an entry's first round, one for each MaxBuckets buckets. Each has the debt
// after the whole batch, so the answers of later rounds say nothing more.
func (e *entry) debt(answers []replica.Debt) replica.Debt {
	d := replica.Debt{Name: e.name, Identifier: e.identifier, Clocked: e.clocked, Now: e.now, Rules: e.rulesOf(e.buckets), Amounts: make([][]storage.Amount, len(e.buckets))}
	for from := 0; from < len(d.Amounts); from += law.MaxBuckets {
		copy(d.Amounts[from:], answers[from/law.MaxBuckets].Amounts)
	}
	return d
}

// rulesOf returns the rules of some of the entry's buckets. Nearly always they are those of the last call, whose set is
// returned then without making a new one.
func (e *entry) rulesOf(buckets []bucket) *storage.RuleSet {
	same := e.rules != nil && len(e.rules.Rules) == len(buckets)
	rules := make([]law.Rule, len(buckets))
	for i := range buckets {
		rules[i] = *buckets[i].rule
		same = same && buckets[i].rule == &e.rules.Rules[i]
	}
	if same {
		return e.rules
	}
	return law.NewRuleSet(rules...)
}

// raiseLevels handles the Continuous buckets of an entry that is too old to charge amount by amount (Rule 2): tokens
// that drained in the meantime would be counted again. Instead it raises the ledger to the level that Redis last
// reported. The time until a level is empty says how high it is, so the number of tokens may be the ceiling.
//
// Two kinds of buckets are charged after all: those of which a Charge took or gave back tokens, as Redis reports no level
// after a Charge and a raise gives nothing back, and those beyond the MaxBuckets that one raise can name.
func (s *Storage) raiseLevels(ctx context.Context, e *entry) error {
	d := replica.Debt{Name: e.name, Identifier: e.identifier, Clocked: e.clocked, Now: e.now}
	var raised []*bucket
	var rules []law.Rule
	for i := range e.buckets {
		b := &e.buckets[i]
		if b.rule.Kind != law.Continuous || len(b.taken) == 0 || b.unshown || len(rules) == law.MaxBuckets {
			continue
		}
		raised = append(raised, b)
		rules = append(rules, *b.rule)
		d.Amounts = append(d.Amounts, []storage.Amount{{N: b.rule.Ceiling(), In: max(0, b.resetAt-e.time())}})
	}
	if len(raised) == 0 {
		return nil
	}
	d.Rules = law.NewRuleSet(rules...)
	if err := s.ledger.Raise(ctx, d); silent(err) {
		return err
	} // any other error is about this row alone, and must not hold up the batch
	for _, b := range raised {
		b.taken = nil
	}
	return nil
}

// relay keeps Rule 3, Redis is raised to the ledger: it raises Redis where the ledger knows of more than Redis has
// shown, because other processes were served by Postgres or because Redis has lost something. It returns for how many
// identifiers that was so. While the breaker is open it does nothing: Redis is doubted when it is back, and Rule 7
// raises it then.
//
// Under an injected clock nobody knows how old a debt is, so Redis is raised only where that was asked for.
func (s *Storage) relay(ctx context.Context, batch []*entry, debts []replica.Debt, asked int64) (n int) {
	if s.breaker.cause() != nil {
		return 0
	}
	_ = s.resetMissed(ctx) // must come first: a reset after the raise would erase what was raised
	var higher []replica.Debt
	for i, e := range batch {
		raise := s.journal.mustRaise(e)
		if (raise || !e.clocked) && e.behind(&debts[i], s.options.FlushInterval, raise) {
			higher = append(higher, debts[i])
		}
	}
	_ = each(higher, func(d replica.Debt) error {
		_ = s.raise(ctx, d, asked, nil)
		return s.breaker.cause() // once Redis is lost the other raises are not tried
	})
	return len(higher)
}

// raise raises Redis to a debt that the ledger was asked for at the time asked. If refunds hold the lock of the
// identifier (Rule 8), or Redis fails, the error is returned and Redis is raised with the next flush. Another error of
// Redis, such as a state that it cannot read, is not returned: trying again would not help.
func (s *Storage) raise(ctx context.Context, d replica.Debt, asked int64, read *reading) error {
	id, err := key{d.Name, d.Identifier}, errRefunds
	if may, own := s.journal.beginRaise(id, read); may {
		age(&d, asked)
		err = s.primary.Raise(ctx, d)
		if own { // otherwise an entry in flight has the lock and keeps it until it is finished
			s.journal.endRaise(id)
		}
	}
	if errors.Is(err, errRefunds) || silent(err) || err != nil && ctx.Err() != nil {
		s.journal.raiseAgain(&d)
		return err
	}
	return nil
}

// age subtracts from a debt the time that has passed since it was asked for. Without it every raise would lengthen the
// debt. Under an injected clock no time passes between the two.
func age(d *replica.Debt, asked int64) {
	if d.Clocked {
		return
	}
	way := law.Monotonic() - asked
	for _, amounts := range d.Amounts {
		for i := range amounts {
			amounts[i].In = max(0, amounts[i].In-way)
		}
	}
}

// behind reports whether Redis has to be raised to a debt: whether the ledger has more of any bucket than Redis has
// shown, or anything at all if raise was asked for (Rule 3).
//
// What Redis has shown is from its last admission to this process. If all of that is back by now, any debt is more. A
// level is compared by the time until it is empty, with a tolerance of one token and a millisecond for rounding and for
// the time that the answer took; without it each flush would raise Redis by a little. The other kinds are compared by
// their tokens. Buckets whose period is shorter than a flush interval are left alone, unless raise was asked for: their
// debt has come back before Redis could be raised.
func (e *entry) behind(d *replica.Debt, interval time.Duration, raise bool) bool {
	now := e.time()
	for i, debt := range d.Amounts {
		if len(debt) == 0 || micros(d.Rules.Rules[i].Period) < interval && !raise {
			continue
		}
		b := &e.buckets[i]
		n, last := held(&d.Rules.Rules[i], debt)
		switch {
		case raise, now >= b.resetAt:
			return true
		case b.rule.Kind == law.Continuous:
			if last > b.resetAt-now+drains(b.rule, 1)+1000 {
				return true
			}
		case n > b.spent:
			return true
		}
	}
	return false
}

// settle waits until nothing is pending of an identifier (Rule 4). The caller does not write the entry itself. It
// leaves that to the flusher, which writes it at once as part of a batch, so that everything is charged in order and
// once.
func (s *Storage) settle(ctx context.Context, id key) error {
	w := s.journal.await(id)
	if w == nil {
		return nil
	}
	select {
	case err := <-w.done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("what is pending could not be written: %w", ctx.Err())
	}
}

// each calls f for all items, up to atATime of them concurrently, and waits for the calls. After an error it begins no
// more calls, and it returns one of the errors.
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

// micros returns n microseconds.
func micros(n int64) time.Duration { return time.Duration(n) * time.Microsecond }
