package failover

import (
	"context"
	"slices"
	"strings"
	"sync"

	"github.com/go-throttler/throttler/storage"
)

// journal is what this process has to tell the ledger: what the primary admitted, and which identifiers were reset.
// All times are in microseconds, by Monotonic or the caller's injected clock.
type journal struct {
	most int           // identifiers
	work chan struct{} // has room for the one token that says that there is something to do

	// mu guards what follows, and all entries that are not in flight. The keys of all maps are copies.
	mu        sync.Mutex
	entries   map[key]*entry
	queue     []*entry // all entries by age, some of which are dequeued
	urgent    []*entry // those that somebody waits for
	inFlight  map[key]*entry
	awaited   bool                  // somebody waits for an entry in flight
	resets    map[key]bool          // that the primary has missed
	refunds   map[key]*int          // calls that give tokens back to the primary, if there are any
	raises    map[key]chan struct{} // identifiers to which the primary is being raised; closed when it was
	forgotten int64                 // identifiers of which something was not remembered
}

// key is an identifier under a throttler's name.
type key struct{ name, identifier string }

// copied is for what outlasts the call: its caller may use the memory of the strings again.
func (k key) copied() key { return key{strings.Clone(k.name), strings.Clone(k.identifier)} }

// entry is what is to be told of one identifier.
type entry struct {
	key
	clocked  bool
	now      int64 // the latest time of a caller whose clock is injected
	since    int64 // Monotonic when the entry was made
	reset    bool  // before the amounts
	raise    bool  // the primary, whatever it has shown
	blocks   bool  // and until then nothing is given back to it
	buckets  []bucket
	inline   [2]bucket
	waiters  []*waiter
	dequeued bool
}

// waiter waits until an entry has been told.
type waiter struct {
	done     chan error // has room for one
	failures int        // that have failed
}

func newJournal(most int) journal {
	return journal{most: most, work: make(chan struct{}, 1), entries: make(map[key]*entry), inFlight: make(map[key]*entry),
		resets: make(map[key]bool), refunds: make(map[key]*int), raises: make(map[key]chan struct{})}
}

// find returns the entry of an identifier, and makes one if need be. It is nil if there are too many, and the identifier
// need not have one. The caller holds mu.
func (j *journal) find(id key, must bool) *entry {
	e := j.entries[id]
	if e != nil {
		return e
	}
	if len(j.entries)+len(j.inFlight) >= j.most && !must {
		j.forgotten++
		return nil
	}
	e = &entry{key: id.copied(), since: storage.Monotonic()}
	e.buckets = e.inline[:0]
	j.entries[e.key] = e
	j.queue = append(j.queue, e)
	if len(j.entries) == 1 || len(j.entries) == j.most/2+1 {
		j.wake()
	}
	return e
}

func (j *journal) wake() {
	select {
	case j.work <- struct{}{}:
	default:
	}
}

// took remembers what the primary has admitted.
func (j *journal) took(r *storage.Request, v *storage.Verdict) {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := 0
	for i := range r.Parts() {
		p := r.At(i)
		e := j.find(key{r.Name, p.Identifier}, false)
		if e == nil {
			n += len(p.Rules)
			continue
		}
		e.clock(r.Clocked, r.Now)
		for k := range p.Rules {
			rule, c := &p.Rules[k], v.Count(n)
			n++
			if p.Cost(k) == 0 {
				continue
			}
			b, at := e.bucket(rule, k), v.At()+c.HeldFor
			b.spent, b.resetAt = rule.Capacity-c.Remaining, max(b.resetAt, at)
			b.add(&b.taken, min(p.Cost(k), 4*rule.Capacity), at)
		}
	}
}

// charged remembers what the primary was charged.
func (j *journal) charged(c *storage.Charge) {
	j.mu.Lock()
	defer j.mu.Unlock()
	e := j.find(key{c.Name, c.Identifier}, false)
	if e == nil {
		return
	}
	e.clock(c.Clocked, c.Now)
	for i := range c.Rules {
		a, at := c.Amounts[i].Clamp(), int64(0)
		if a.N == 0 {
			continue
		}
		b := e.bucket(&c.Rules[i], i)
		if at = e.time() + a.In; a.N < 0 {
			b.add(&b.refunded, -a.N, at)
			continue
		}
		b.add(&b.taken, a.N, at)
		b.unshown, b.spent, b.resetAt = true, b.spent+a.N, max(b.resetAt, at)
	}
}

// touch has the primary raised to what the ledger has of an identifier.
func (j *journal) raiseLater(name string, p *storage.Part, clocked bool, now int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.markRaise(name, p, clocked, now)
}

func (j *journal) markRaise(name string, p *storage.Part, clocked bool, now int64) *entry {
	e := j.find(key{name, p.Identifier}, false)
	if e != nil {
		e.clock(clocked, now)
		e.raise = true
		for i := range p.Rules {
			e.bucket(&p.Rules[i], i)
		}
	}
	return e
}

// again is touch for a primary that could not be raised. Until it is, nothing more is given back to it, as that could
// go on for ever.
func (j *journal) raiseAgain(d *storage.Debt) {
	j.mu.Lock()
	defer j.mu.Unlock()
	p := storage.NewPart(d.Identifier, d.Rules, 0)
	e := j.markRaise(d.Name, &p, d.Clocked, d.Now)
	if e == nil || e.blocks {
		return
	}
	if inFlight := j.inFlight[e.key]; inFlight != nil && inFlight.blocks {
		inFlight.blocks = false // e goes on with it
	} else if j.raises[e.key] != nil {
		return
	} else {
		j.raises[e.key] = make(chan struct{})
	}
	e.blocks = true
	j.urgent = append(j.urgent, e)
	j.wake()
}

// reset forgets what was to be told, and remembers that the identifier was reset.
func (j *journal) resetLedgerLater(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	e := j.find(id, true)
	e.reset, e.buckets = true, e.inline[:0]
}

func (j *journal) resetPrimaryLater(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.resets[id.copied()] = true
	j.wake()
}

// beginRefund waits until the primary is not being raised, as that would take again what is given back, and keeps it
// from being so until endRefund is called.
func (j *journal) beginRefund(ctx context.Context, id key) error {
	for {
		j.mu.Lock()
		raising := j.raises[id]
		if raising == nil {
			j.give(id)
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

// give counts a call that gives back. The caller holds mu.
func (j *journal) give(id key) {
	n := j.refunds[id]
	if n == nil {
		n = new(int)
		j.refunds[id.copied()] = n
	}
	*n++
}

func (j *journal) endRefund(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := j.refunds[id]
	if *n--; *n == 0 {
		delete(j.refunds, id)
	}
}

// raise says that the primary is going to be raised, and own that raised has to be called afterwards. It may not be
// while tokens have been given back there of which the ledger does not know.
func (j *journal) beginRaise(id key) (may, own bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	inFlight := j.inFlight[id]
	held := inFlight != nil && inFlight.blocks
	if j.refunds[id] != nil || j.raises[id] != nil && !held || j.entries[id] != nil && j.entries[id].hasRefunds() {
		return false, false
	}
	if !held {
		j.raises[id.copied()] = make(chan struct{})
	}
	return true, !held
}

func (j *journal) endRaise(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.releaseRefunds(id)
}

func (j *journal) releaseRefunds(id key) {
	close(j.raises[id])
	delete(j.raises, id)
}

func (e *entry) hasRefunds() bool {
	for i := range e.buckets {
		if len(e.buckets[i].refunded) > 0 {
			return true
		}
	}
	return e.reset
}

// missed are the resets that the primary has missed.
func (j *journal) missed() (ids []key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for id := range j.resets {
		ids = append(ids, id)
	}
	return ids
}

func (j *journal) wasReset(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	delete(j.resets, id)
	for _, e := range []*entry{j.entries[id], j.inFlight[id]} {
		if e != nil {
			e.raise = true // to what was admitted after it
		}
	}
}

// mustRaise reports whether the primary has to be raised whatever it has shown. A reset by another goroutine may say so
// while the entry is in flight.
func (j *journal) mustRaise(e *entry) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return e.raise
}

// await returns who waits until what there is of an identifier has been told, or nil if there is nothing.
func (j *journal) await(id key) *waiter {
	j.mu.Lock()
	defer j.mu.Unlock()
	e := j.entries[id]
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

// pending is how many identifiers have not been told, and since when (Monotonic) the oldest has to be.
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
	return len(j.entries) + len(j.inFlight), since
}

// due is the time since which the ledger could be told something, how many identifiers there are, and whether
// somebody waits for it.
func (j *journal) due() (since int64, pending int, urgent bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for len(j.queue) > 0 && j.queue[0].dequeued {
		j.queue = j.queue[1:]
	}
	if len(j.queue) > 0 {
		since = j.queue[0].since
	}
	return since, len(j.entries), j.awaited || len(j.urgent) > 0
}

// nextBatch returns the entries that are to be told next: those that could not be told the last time, else first
// those that somebody waits for, then the oldest.
func (j *journal) nextBatch(batch []*entry) []*entry {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.awaited = false
	if len(batch) > 0 {
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
				delete(j.entries, e.key)
				j.inFlight[e.key] = e
				batch = append(batch, e)
			}
		}
	}
	return batch
}

// land lets those go who waited for an entry, which has been told, or never will be because of an error.
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

// failed lets those go who have seen the telling of an entry fail twice, and those who wait for later ones.
func (j *journal) failed(err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, e := range j.inFlight {
		j.fail(e, err)
		j.awaited = j.awaited || len(e.waiters) > 0
	}
	for _, e := range j.urgent {
		j.fail(e, err)
	}
	j.urgent = slices.DeleteFunc(j.urgent, func(e *entry) bool { return e.dequeued || len(e.waiters) == 0 })
}

func (e *entry) wakeAll(err error) {
	for _, w := range e.waiters {
		w.done <- err
	}
	e.waiters = nil
}

func (j *journal) fail(e *entry, err error) {
	if e.blocks {
		e.blocks = false
		j.releaseRefunds(e.key)
	}
	e.waiters = slices.DeleteFunc(e.waiters, func(w *waiter) bool {
		w.failures++
		if w.failures == 2 {
			w.done <- err
		}
		return w.failures == 2
	})
}

// amounts is how many charges an entry makes, at least.
func (e *entry) amounts() (n int) {
	for i := range e.buckets {
		n = max(n, len(e.buckets[i].taken)+len(e.buckets[i].refunded))
	}
	return n
}

func (e *entry) clock(clocked bool, now int64) {
	e.clocked, e.now = clocked, max(e.now, now)
}

// time is the present in that of the entry's amounts.
func (e *entry) time() int64 {
	if e.clocked {
		return e.now
	}
	return storage.Monotonic()
}

// bucket is that of a rule, probably at a place.
func (e *entry) bucket(r *storage.Rule, place int) *bucket {
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
