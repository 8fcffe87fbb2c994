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

// journal is what is pending: what Redis has admitted and which identifiers were reset, until the ledger has recorded
// it.
//
// An entry is what is pending of one identifier. Its states:
//
//	state      is in                        becomes    by         when
//	queued     j.queued and j.queue, and    in flight  nextBatch  it is urgent, or the oldest
//	           j.urgent if a caller waits
//	in flight  j.inFlight, flusher.batch    in flight  failed     the ledger has not answered: the batch is repeated
//	                                        recorded   finish     the ledger has confirmed the batch
//	                                        forgotten  finish     the ledger has rejected the entry alone
//
// Any goroutine queues an entry, by find. Only the flusher moves it on. An identifier has at most one entry queued and
// one in flight: what is admitted while its entry is in flight goes to a new one, so a repeated batch has the same
// amounts.
//
// The locks:
//
//   - Journal.mu guards the journal and its entries. The exception is an entry in flight: the flusher, which reads it
//     during I/O, owns all of it but waiters, raise and blocks. What names it (key, since, dequeued) changes no more.
//   - Journal.mu, flusher.mu and breaker.mu are held for a short time, never during I/O and never two at once.
//   - Storage.observe is taken before any of these: Options.Observe runs under it and may call State. Nobody calls
//     Observe while holding one of them.
//   - Refunds and raises are one more lock for each identifier. It is held during calls to Redis, by any number of
//     refunds or by one raise (Rule 8). A refund waits for a raise. A raise never waits but is put off to the next
//     flush, so nobody waits in a circle. Until then the entry holds the lock as the raise would (blocks), or new
//     refunds could put it off forever.
type journal struct {
	most int           // entries
	work chan struct{} // has room for one token, which says that a flush may be due earlier than it was

	mu        sync.Mutex // guards what follows; the keys of all maps are copies
	queued    map[key]*entry
	queue     []*entry // the queued by age, and some that were dequeued as urgent
	urgent    []*entry // the queued for which a caller waits, or which hold the lock of their identifier
	inFlight  map[key]*entry
	awaited   bool                  // a caller waits for an entry in flight
	resets    map[key]bool          // resets that Redis has missed
	refunds   map[key]*int          // how many refunds hold the lock of the identifier, if any do
	raises    map[key]chan struct{} // the identifiers whose lock a raise holds; closed when it ends
	forgotten int64                 // admissions that will never be recorded
}

// key is an identifier under a throttler's name.
type key struct{ name, identifier string }

// copied is for what outlasts the call, whose caller may use the memory of the strings again.
func (k key) copied() key { return key{strings.Clone(k.name), strings.Clone(k.identifier)} }

// entry is what is pending of one identifier.
type entry struct {
	key
	since    int64            // by Monotonic, when it was queued
	clocked  bool             // the caller's clock is injected
	now      int64            // the latest time by that clock
	reset    bool             // the ledger is reset before it is charged
	rules    *storage.RuleSet // of the last call
	buckets  []bucket
	inline   [2]bucket // room for buckets, as few identifiers have more
	dequeued bool      // it is not queued any more

	waiters []*waiter
	raise   bool // Redis is raised to the ledger's debt, whatever it has shown
	blocks  bool // it holds the lock of the identifier against refunds
}

// waiter is a caller who waits until an entry is recorded.
type waiter struct {
	done     chan error // has room for the one result
	failures int        // failed flushes that the waiter has seen
}

func newJournal(most int) journal {
	return journal{most: most, work: make(chan struct{}, 1), queued: make(map[key]*entry), inFlight: make(map[key]*entry),
		resets: make(map[key]bool), refunds: make(map[key]*int), raises: make(map[key]chan struct{})}
}

// find returns the queued entry of an identifier, and queues one if there is none. With too many entries it returns nil
// and counts what is forgotten, unless the identifier must have one. The caller holds mu.
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

// wake has the flusher look again when the next flush is due. One token is enough for any number of reasons.
func (j *journal) wake() {
	select {
	case j.work <- struct{}{}:
	default:
	}
}

// took makes pending what Redis has admitted (Rule 1). Every admission of the process takes mu for this, so it does
// little: a look at a map, and an addition for each bucket.
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

// took adds what was taken at a time, of each bucket at most so many, of which the counts tell when it comes back.
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

// charged makes pending what Redis was charged or refunded (Rule 8). Redis reports no level after a charge. The tokens
// count as shown, or Redis would be raised to what it has.
func (j *journal) charged(c *storage.Charge) {
	j.mu.Lock()
	defer j.mu.Unlock()
	e := j.find(key{c.Name, c.Identifier}, false)
	if e == nil {
		return
	}
	e.clock(c.Clocked, c.Now)
	e.rules = c.Rules
	for i := range c.Amounts {
		a, at := c.Amounts[i].Clamp(), int64(0)
		if a.N == 0 {
			continue
		}
		b := e.bucket(&c.Rules.Rules[i], i)
		if at = e.time() + a.In; a.N < 0 {
			b.add(&b.refunded, -a.N, at)
			continue
		}
		b.add(&b.taken, a.N, at)
		b.unshown, b.spent, b.resetAt = true, b.spent+a.N, max(b.resetAt, at)
	}
}

// raiseLater has Redis raised, with the next flush, to what the ledger has of an identifier.
func (j *journal) raiseLater(name string, p *storage.Part, clocked bool, now int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.markRaise(name, p, clocked, now)
}

// markRaise queues an entry that asks for the debt of all rules of a part. The caller holds mu.
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

// raiseAgain schedules another raise after one failed, and blocks refunds to Redis until it succeeds; otherwise refunds
// could put it off forever. An entry in flight passes the lock of the identifier on to the new one. A raise that is in
// progress keeps it.
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
	e.blocks = true // until finish, or until a flush fails
	j.urgent = append(j.urgent, e)
	j.wake()
}

// resetLedgerLater makes a reset pending in place of what was (Rule 8). It is queued even beyond MaxPending, as a reset
// that was promised must not be forgotten.
func (j *journal) resetLedgerLater(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	e := j.find(id, true)
	e.reset, e.buckets = true, e.inline[:0]
}

// resetPrimaryLater remembers that Redis has missed a reset.
func (j *journal) resetPrimaryLater(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.resets[id.copied()] = true
	j.wake()
}

// beginRefund takes the lock of an identifier for a refund. It waits while a raise holds it: the raise would take the
// refunded tokens again. If there is no error the caller calls endRefund.
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

// countRefund counts one more refund that holds the lock. The caller holds mu.
func (j *journal) countRefund(id key) {
	n := j.refunds[id]
	if n == nil {
		n = new(int)
		j.refunds[id.copied()] = n
	}
	*n++
}

// endRefund ends what beginRefund has begun.
func (j *journal) endRefund(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := j.refunds[id]
	if *n--; *n == 0 {
		delete(j.refunds, id)
	}
}

// beginRaise reports whether the caller may raise Redis now. It may not while Redis holds refunds the ledger has not
// recorded, or another raise is in progress. If own is true the caller calls endRaise afterwards. Else an entry in
// flight holds the lock for it, until it is recorded.
func (j *journal) beginRaise(id key) (may, own bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	inFlight := j.inFlight[id]
	held := inFlight != nil && inFlight.blocks // raising twice is raising once, so any may use it
	if j.refunds[id] != nil || j.raises[id] != nil && !held || j.queued[id] != nil && j.queued[id].hasRefunds() {
		return false, false
	}
	if !held {
		j.raises[id.copied()] = make(chan struct{})
	}
	return true, !held
}

// endRaise ends what beginRaise has begun.
func (j *journal) endRaise(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.releaseRefunds(id)
}

// releaseRefunds lets refunds go on that wait for a raise. The caller holds mu.
func (j *journal) releaseRefunds(id key) {
	close(j.raises[id])
	delete(j.raises, id)
}

// hasRefunds reports whether an entry lowers what is spent: by a refund or a reset.
func (e *entry) hasRefunds() bool {
	for i := range e.buckets {
		if len(e.buckets[i].refunded) > 0 {
			return true
		}
	}
	return e.reset
}

// missed returns the resets that Redis has missed.
func (j *journal) missed() (ids []key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for id := range j.resets {
		ids = append(ids, id)
	}
	return ids
}

// wasReset ends a reset that Redis had missed. The reset came late, and dropped what Redis admitted since the call. So
// Redis is raised to what the ledger has of that.
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

// mustRaise reports whether Redis has to be raised whatever it has shown. A late reset by the goroutine that probes may
// set this while the entry is in flight.
func (j *journal) mustRaise(e *entry) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return e.raise
}

// await returns a waiter for what is pending of an identifier, or nil if nothing is. It waits for the later entry if
// there are two, as entries are recorded in order. A queued entry becomes urgent. For one in flight the flusher need
// not pause as long before it repeats the batch.
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

// pending is how many entries there are, and since when (by Monotonic) there is the oldest; 0 if there is none.
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

// due returns since when the oldest entry is queued, how many are, and whether a caller waits. It drops
// dequeued entries from the front of the queue, so that the queue does not grow.
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

// nextBatch returns the batch that failed the last time, or else takes a new one from the queue: first the urgent
// entries, then the oldest.
func (j *journal) nextBatch(batch []*entry) []*entry {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.awaited = false
	if len(batch) > 0 { // the ledger may have it already, so nothing joins it
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

// finish ends an entry that the ledger has recorded, or rejected with an error, and wakes its waiters.
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

// failed wakes every waiter who has seen two flushes fail, whether the entry was in flight or queued behind. One
// failure may be bad luck, such as a connection that was closed. Waiting for more would use up the time of the call.
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

// wakeAll gives the waiters their result. The caller holds mu.
func (e *entry) wakeAll(err error) {
	for _, w := range e.waiters {
		w.done <- err
	}
	e.waiters = nil
}

// fail counts a failure for the waiters of an entry. Refunds need not wait for a ledger that is away. The caller holds
// mu.
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

// amounts is about how many charges an entry makes.
func (e *entry) amounts() (n int) {
	for i := range e.buckets {
		n = max(n, len(e.buckets[i].taken)+len(e.buckets[i].refunded))
	}
	return n
}

// clock remembers the time of a call, which is the latest one: calls may overtake each other.
func (e *entry) clock(clocked bool, now int64) {
	e.clocked, e.now = clocked, max(e.now, now)
}

// time is the present by the clock of the entry's amounts.
func (e *entry) time() int64 {
	if e.clocked {
		return e.now
	}
	return law.Monotonic()
}

// bucket returns the bucket of a rule, and adds it if it is new. Nearly always the rules of a call are those of the
// call before, so the bucket is at the rule's own place.
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
