package failover

import (
	"context"
	"math"
	"slices"
	"strings"
	"sync"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/storage"
)

// journal holds what is pending: the tokens that Redis has admitted and the resets that were asked for, until the
// ledger has recorded them. It is in memory only, so what is pending is lost if the process is killed.
//
// An entry holds what is pending for one identifier. Its states:
//
//	state      is in                        becomes    by         when
//	queued     j.queued and j.queue; also   in flight  nextBatch  it is urgent, or the oldest
//	           j.urgent if a caller waits
//	           or it blocks refunds
//	in flight  j.inFlight, flusher.batch    in flight  failed     the ledger has not answered: the batch is repeated
//	                                        recorded   finish     the ledger has confirmed the batch
//	                                        forgotten  finish     the ledger has rejected the entry alone
//
// Any goroutine may queue an entry, with find. Only the flusher moves it on. An identifier has at most one entry queued
// and one in flight. Whatever is admitted while its entry is in flight goes to a new entry. So nothing is ever added to
// an entry that the ledger may have recorded already, and a repeated batch means the same as its first try (Rule 2).
//
// The locks, and their order:
//
//   - Journal.mu guards the journal and its entries. An entry in flight is the exception, because the flusher reads it
//     during I/O: the flusher owns all of its fields except waiters, raise and blocks, which mu still guards. The key,
//     since and dequeued of an entry in flight no longer change, so anyone may read them.
//   - Journal.mu, flusher.mu and breaker.mu are held briefly, never during I/O, and never two of them at once. They
//     therefore need no order among themselves.
//   - Storage.observe comes before these three: Options.Observe runs under it and may call State, which takes them in
//     turn. No goroutine calls Observe while it holds one of the three.
//   - Each identifier has one more lock, which keeps refunds and raises apart in Redis (Rule 8). It is held during
//     calls to Redis, either by any number of refunds (counted in refunds) or by a single raise (noted in raises). A
//     refund waits for a raise. A raise never waits for refunds but is put off to the next flush, so no two goroutines
//     can wait for each other. Until that flush the entry itself holds the lock, as the raise would have (blocks).
//     Otherwise a stream of new refunds could put the raise off forever.
type journal struct {
	most int           // the most entries, Options.MaxPending
	work chan struct{} // has room for one token, which says that a flush may be due earlier than it was

	mu        sync.Mutex // guards what follows; the keys of all maps are copies
	queued    map[key]*entry
	queue     []*entry // the queued entries, oldest first, and some that were dequeued early because they were urgent
	urgent    []*entry // the queued entries for which a caller waits, or which hold the lock of their identifier
	inFlight  map[key]*entry
	awaited   bool                  // a caller waits for an entry in flight
	resets    map[key]bool          // resets that Redis has missed
	refunds   map[key]*int          // how many refunds hold the lock of an identifier; absent if none does
	raises    map[key]chan struct{} // the identifiers whose lock a raise holds; the channel is closed when it ends
	readings  map[key]*reading      // of debts that calls read from the ledger (Rule 7), but for the stale ones
	forgotten int64                 // admissions that will never be recorded
}

// key is an identifier under a throttler's name: equal identifiers of different throttlers are kept apart.
type key struct{ name, identifier string }

// copied returns a key that may outlast the call. The caller may reuse the memory of its own strings afterwards.
func (k key) copied() key { return key{strings.Clone(k.name), strings.Clone(k.identifier)} }

// entry holds what is pending for one identifier. Its states and its lock are described at journal.
type entry struct {
	key
	since    int64            // when it was queued, by law.Monotonic
	clocked  bool             // the caller's clock is injected
	now      int64            // the latest time by that clock
	reset    bool             // the ledger is reset before it is charged
	lowers   bool             // it lowers what the ledger has as spent: by a refund or by a reset
	rules    *storage.RuleSet // those of the last call
	buckets  []bucket         // one for each bucket that any call of the entry named
	inline   [2]bucket        // the first memory of buckets: most identifiers need no more
	dequeued bool             // it is in flight or finished; the queue may still contain it
	fault    error            // why the ledger left the entry out of a batch that it has recorded, or nil

	waiters []*waiter
	raise   bool // Redis is raised to the ledger's debt, whatever Redis has shown
	blocks  bool // it holds the lock of the identifier against refunds
}

// waiter is a caller waiting until an entry is recorded.
type waiter struct {
	done     chan error // has room for the one result, so the flusher never waits for the caller
	failures int        // failed flushes since the wait began
}

func newJournal(most int) journal {
	return journal{most: most, work: make(chan struct{}, 1), queued: make(map[key]*entry), inFlight: make(map[key]*entry),
		resets: make(map[key]bool), refunds: make(map[key]*int), raises: make(map[key]chan struct{}), readings: make(map[key]*reading)}
}

// find returns the queued entry of an identifier, and queues a new one if there is none. If the journal is full it
// returns nil and counts one more admission as forgotten, unless the caller must have an entry. The caller holds mu.
func (j *journal) find(id key, must bool) *entry {
	e := j.queued[id]
	if e != nil {
		return e
	}
	if len(j.queued)+len(j.inFlight) >= j.most && !must {
		j.forgotten++
		return nil
	}
	e = &entry{key: id.copied(), since: law.Monotonic()}
	e.buckets = e.inline[:0]
	j.queued[e.key] = e
	j.queue = append(j.queue, e)
	if len(j.queued) == 1 || len(j.queued) == j.most/2+1 { // flushIn looks at these numbers
		j.wake()
	}
	return e
}

// wake makes the flusher compute anew when the next flush is due. One token in the channel is enough for any number of
// reasons, because the flusher looks at all of them.
func (j *journal) wake() {
	select {
	case j.work <- struct{}{}:
	default:
	}
}

// took makes pending what Redis has admitted (Rule 1). Every admission of the process holds mu for this, so it does
// little: one lookup in a map for each identifier and one addition for each bucket. The level of a Continuous bucket is
// therefore computed with a formula here (drains) and not with a law.State.
func (j *journal) took(r *storage.Request, a *storage.Answer) {
	j.mu.Lock()
	defer j.mu.Unlock()
	from := 0
	for _, p := range r.Parts {
		to := from + len(p.Rules.Rules)
		if e := j.find(key{r.Name, p.Identifier}, false); e != nil {
			e.clock(r.Clocked, r.Now)
			most := int64(math.MaxInt64)
			if p.AtMost {
				most = a.Tokens
			}
			e.took(p.Rules, r.Costs[from:to], most, a.Counts[from:to], a.At)
		}
		from = to
	}
}

// took adds one admission at the time at: of each bucket its cost, but not over most. The counts say when the tokens
// are back, and what Redis has shown as spent.
func (e *entry) took(rules *storage.RuleSet, costs []int64, most int64, counts []storage.Count, at int64) {
	e.rules = rules
	for i, cost := range costs {
		if cost == 0 {
			continue
		}
		rule, c := &rules.Rules[i], &counts[i]
		b, back := e.bucket(rule, i), at+c.HeldFor
		b.spent, b.resetAt = rule.Capacity-c.Remaining, max(b.resetAt, back)
		b.add(&b.taken, min(cost, most, rule.Ceiling()), back)
	}
}

// charged makes pending what Redis was charged or refunded (Rule 8). Redis reports no level after a Charge, so its
// tokens are simply added to what Redis has shown. Without that the next flush would find the ledger ahead and raise
// Redis to tokens that it already has.
func (j *journal) charged(c *storage.Charge) {
	j.mu.Lock()
	defer j.mu.Unlock()
	e := j.find(key{c.Name, c.Identifier}, false)
	if e == nil {
		return
	}
	e.clock(c.Clocked, c.Now)
	e.rules = c.Rules
	if gives(c) {
		j.lower(e)
	}
	for i := range c.Amounts {
		a, at := c.Amounts[i].Clamp(), int64(0)
		if a.N == 0 {
			continue
		}
		b := e.bucket(&c.Rules.Rules[i], i)
		if at = e.time() + a.In; a.N < 0 {
			b.add(&b.refunded, -a.N, at)
			b.unshown = true
			continue
		}
		b.add(&b.taken, a.N, at)
		b.unshown, b.spent, b.resetAt = true, b.spent+a.N, max(b.resetAt, at)
	}
}

// raiseLater asks for Redis to be raised to the ledger's debt of an identifier with the next flush (Rule 3).
func (j *journal) raiseLater(name string, p *storage.Part, clocked bool, now int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.markRaise(name, p, clocked, now)
}

// markRaise queues an entry that owes nothing but names all buckets of a part: the ledger answers it with the debt of
// each. It returns nil if the journal is full. The caller holds mu.
func (j *journal) markRaise(name string, p *storage.Part, clocked bool, now int64) *entry {
	e := j.find(key{name, p.Identifier}, false)
	if e != nil {
		e.clock(clocked, now)
		e.raise = true
		for i := range p.Rules.Rules {
			e.bucket(&p.Rules.Rules[i], i)
		}
		e.rules = p.Rules
	}
	return e
}

// raiseAgain asks for another raise after one could not be made. The new entry takes the lock of the identifier and so
// blocks refunds to Redis until it is recorded or a flush fails; otherwise refunds could put the raise off forever.
//
// The lock may be taken already. An entry in flight that has it passes it on to the new entry. A raise that is in
// progress keeps it, and the new entry goes without. Refunds that hold the lock just now may end, but no new one
// begins.
func (j *journal) raiseAgain(d *replica.Debt) {
	j.mu.Lock()
	defer j.mu.Unlock()
	e := j.markRaise(d.Name, &storage.Part{Identifier: d.Identifier, Rules: d.Rules}, d.Clocked, d.Now)
	if e == nil || e.blocks {
		return
	}
	if inFlight := j.inFlight[e.key]; inFlight != nil && inFlight.blocks {
		inFlight.blocks = false // e has the lock now
	} else if j.raises[e.key] != nil {
		return // another raise has it
	} else { // refunds that hold the lock end, and new ones wait
		j.raises[e.key] = make(chan struct{})
	}
	e.blocks = true // until finish, or until fail
	j.urgent = append(j.urgent, e)
	j.wake()
}

// resetLedgerLater makes a reset pending (Rule 8). What was queued for the identifier before the reset is dropped,
// since the reset would erase it from the ledger anyway. The reset is queued even beyond MaxPending: a user who was
// told that an identifier is free again must not find it denied after an outage.
func (j *journal) resetLedgerLater(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	e := j.find(id, true)
	e.reset, e.buckets = true, e.inline[:0]
	j.lower(e)
}

// lower notes that Redis has a refund or a reset that the ledger lacks until the entry is recorded. The debts that are
// being read just now may contain what it frees. The caller holds mu.
func (j *journal) lower(e *entry) {
	e.lowers = true
	if r := j.readings[e.key]; r != nil {
		r.stale = true
		delete(j.readings, e.key)
	}
}

// reading is what the calls share that read the debt of an identifier at the same time.
type reading struct {
	calls int
	stale bool // the debt may contain what a refund or a reset has freed in Redis
}

// beginRead begins the reading of a debt that Redis is to be raised to. It comes before settle, which has the refunds
// recorded that are pending already, and endRead comes after the raise.
func (j *journal) beginRead(id key) *reading {
	j.mu.Lock()
	defer j.mu.Unlock()
	r := j.readings[id]
	if r == nil {
		r = &reading{}
		j.readings[id.copied()] = r
	}
	r.calls++
	return r
}

// endRead ends what beginRead has begun.
func (j *journal) endRead(id key, r *reading) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if r.calls--; r.calls == 0 && j.readings[id] == r {
		delete(j.readings, id)
	}
}

// resetPrimaryLater remembers that Redis has missed a reset (Rule 8). resetMissed makes up for it.
func (j *journal) resetPrimaryLater(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.resets[id.copied()] = true
	j.wake()
}

// beginRefund takes the lock of an identifier for a refund (Rule 8). While a raise holds the lock it waits, because the
// debt of that raise was read before the refund and would take the refunded tokens again. It returns the error of the
// context if that ends first; if it returns nil the caller must call endRefund.
func (j *journal) beginRefund(ctx context.Context, id key) error {
	for {
		j.mu.Lock()
		raising := j.raises[id]
		if raising == nil {
			j.countRefund(id)
		}
		j.mu.Unlock()
		if raising == nil {
			return nil
		}
		select {
		case <-raising:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// countRefund counts one more refund that holds the lock. The counter is behind a pointer because an assignment to a
// map may replace its key by an equal one, which here would be in the caller's memory. The caller holds mu.
func (j *journal) countRefund(id key) {
	n := j.refunds[id]
	if n == nil {
		n = new(int)
		j.refunds[id.copied()] = n
	}
	*n++
}

// endRefund releases the lock that beginRefund has taken.
func (j *journal) endRefund(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := j.refunds[id]
	if *n--; *n == 0 {
		delete(j.refunds, id)
	}
}

// beginRaise reports whether the caller may raise Redis now (Rule 8). It may not in three cases: refunds are in
// progress, another raise is, or Redis has refunds or a reset that the ledger had not recorded when the debt was read.
// The debt would contain the refunded tokens then.
//
// A call passes the reading of its debt, which knows of all refunds since. The flusher passes nil: its debt is the answer
// to the entry in flight, so it lacks only what is queued.
//
// If own is true the caller must call endRaise afterwards. If it is false an entry in flight holds the lock on behalf
// of this raise and of any other, until it is recorded: raising twice is raising once, so several may use it.
func (j *journal) beginRaise(id key, r *reading) (may, own bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	inFlight := j.inFlight[id]
	held := inFlight != nil && inFlight.blocks
	if j.refunds[id] != nil || j.raises[id] != nil && !held || j.queued[id] != nil && j.queued[id].lowers || r != nil && r.stale {
		return false, false
	}
	if !held {
		j.raises[id.copied()] = make(chan struct{})
	}
	return true, !held
}

// endRaise releases the lock that beginRaise has taken.
func (j *journal) endRaise(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.releaseRefunds(id)
}

// releaseRefunds ends the lock of a raise and wakes the refunds that wait for it. The caller holds mu.
func (j *journal) releaseRefunds(id key) {
	close(j.raises[id])
	delete(j.raises, id)
}

// missed returns the identifiers whose reset Redis has missed.
func (j *journal) missed() (ids []key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for id := range j.resets {
		ids = append(ids, id)
	}
	return ids
}

// wasReset marks a missed reset as done. The reset came late, and therefore also erased what Redis had admitted since
// the user asked for it. That is still in the entries of the identifier, so these raise Redis to the ledger's debt.
func (j *journal) wasReset(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	delete(j.resets, id)
	for _, e := range []*entry{j.queued[id], j.inFlight[id]} {
		if e != nil {
			e.raise = true
		}
	}
}

// mustRaise reports whether Redis must be raised whatever it has shown. It takes mu although the entry is in flight:
// the goroutine that probes Redis may set raise at any time, after a late reset (wasReset).
func (j *journal) mustRaise(e *entry) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return e.raise
}

// await returns a waiter for what is pending of an identifier, or nil if nothing is (Rule 4). If the identifier has two
// entries it waits for the queued one: entries are recorded in order, so the one in flight is recorded before. A queued
// entry becomes urgent and is flushed at once. For an entry in flight, awaited shortens the pause before the flusher
// repeats its batch.
func (j *journal) await(id key) *waiter {
	j.mu.Lock()
	defer j.mu.Unlock()
	e := j.queued[id]
	if e != nil {
		if len(e.waiters) == 0 {
			j.urgent = append(j.urgent, e)
			j.wake()
		}
	} else if e = j.inFlight[id]; e == nil {
		return nil
	} else {
		j.awaited = true
		j.wake()
	}
	w := &waiter{done: make(chan error, 1)}
	e.waiters = append(e.waiters, w)
	return w
}

// pending returns how many entries there are, queued and in flight, and when the oldest of them was queued, by
// law.Monotonic; 0 if there is none.
func (j *journal) pending() (n int, since int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	oldest := func(e *entry) {
		if since == 0 || e.since < since {
			since = e.since
		}
	}
	for _, e := range j.inFlight {
		oldest(e)
	}
	for _, e := range j.queue {
		if !e.dequeued {
			oldest(e)
			break
		}
	}
	return len(j.queued) + len(j.inFlight), since
}

// due returns when the oldest queued entry was queued, how many are queued, and whether one is urgent or a caller waits
// for an entry in flight. It drops dequeued entries from the front of the queue: urgent entries leave from the middle,
// and without this the queue would grow with each of them.
func (j *journal) due() (since int64, pending int, urgent bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for len(j.queue) > 0 && j.queue[0].dequeued {
		j.queue = j.queue[1:]
	}
	if len(j.queue) > 0 {
		since = j.queue[0].since
	}
	return since, len(j.queued), j.awaited || len(j.urgent) > 0
}

// nextBatch returns the batch that failed the last time, unchanged. If there is none it takes a new one from the queue,
// the urgent entries first and then the oldest, up to flushSize entries and about flushAmounts amounts. From then on
// these entries are in flight.
func (j *journal) nextBatch(batch []*entry) []*entry {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.awaited = false
	if len(batch) > 0 { // the ledger may have it already, so nothing may be added to it (Rule 2)
		return batch
	}
	amounts := 0
	for _, from := range []*[]*entry{&j.urgent, &j.queue} {
		for len(*from) > 0 && len(batch) < flushSize && amounts < flushAmounts {
			e := (*from)[0]
			*from = (*from)[1:]
			if !e.dequeued {
				amounts += e.amounts()
				e.dequeued = true
				delete(j.queued, e.key)
				j.inFlight[e.key] = e
				batch = append(batch, e)
			}
		}
	}
	return batch
}

// finish ends an entry in flight and gives its waiters their result. A nil error says that the ledger has recorded the
// entry. With any other the ledger has rejected it, and it is forgotten.
func (j *journal) finish(e *entry, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	delete(j.inFlight, e.key)
	if e.wakeAll(err); e.blocks {
		j.releaseRefunds(e.key)
	}
	if err != nil {
		j.forgotten++
	}
}

// failed tells the waiters that a flush has failed, those of entries in flight and those of urgent entries queued
// behind them. A waiter gives up after its second failure. One failure may be bad luck, such as a connection that the
// server had closed. Waiting for a third would use up the time of the call, and its caller would only get a later
// error.
func (j *journal) failed(err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, e := range j.inFlight {
		j.fail(e, err)
		j.awaited = j.awaited || len(e.waiters) > 0
	}
	for _, e := range j.urgent {
		if !e.dequeued {
			j.fail(e, err)
		}
	}
	j.urgent = slices.DeleteFunc(j.urgent, func(e *entry) bool { return e.dequeued || len(e.waiters) == 0 })
}

// wakeAll gives all waiters of an entry the same result. The caller holds mu.
func (e *entry) wakeAll(err error) {
	for _, w := range e.waiters {
		w.done <- err
	}
	e.waiters = nil
}

// fail counts a failed flush for each waiter of an entry and ends the wait of those that have seen two. It also gives
// up the entry's lock against refunds: nobody knows when the ledger is back, and a refund must not wait that long. The
// caller holds mu.
func (j *journal) fail(e *entry, err error) {
	if e.blocks {
		e.blocks = false
		j.releaseRefunds(e.key)
	}
	e.waiters = slices.DeleteFunc(e.waiters, func(w *waiter) bool {
		w.failures++
		if w.failures == 2 { // never more, as the waiter is removed
			w.done <- err
		}
		return w.failures == 2
	})
}

// amounts returns about how many charges an entry makes: each charge has one amount a bucket, so the longest list
// counts.
func (e *entry) amounts() (n int) {
	for i := range e.buckets {
		n = max(n, len(e.buckets[i].taken)+len(e.buckets[i].refunded))
	}
	return n
}

// clock notes the time of a call by an injected clock. It keeps the latest one, because a call may reach the journal
// before an earlier call does.
func (e *entry) clock(clocked bool, now int64) {
	e.clocked, e.now = clocked, max(e.now, now)
}

// time returns the present, in microseconds, by the clock of the entry's amounts: the last time of the injected clock,
// or this process's monotonic clock.
func (e *entry) time() int64 {
	if e.clocked {
		return e.now
	}
	return law.Monotonic()
}

// bucket returns the entry's bucket of a rule, and adds one if there is none. Nearly always the rules are those of the
// call before, so place, the index of the rule in its set, is the index of the bucket too. A rule with another limit
// but the same name, kind and period has the same bucket.
func (e *entry) bucket(r *law.Rule, place int) *bucket {
	if place < len(e.buckets) && e.buckets[place].rule == r {
		return &e.buckets[place]
	}
	for i := range e.buckets {
		if e.buckets[i].rule.SameBucket(r) {
			e.buckets[i].use(r)
			return &e.buckets[i]
		}
	}
	e.buckets = append(e.buckets, bucket{})
	b := &e.buckets[len(e.buckets)-1]
	b.use(r)
	return b
}
