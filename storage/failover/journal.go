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
	kick chan struct{} // has room for the one token that says that there is something to do

	// mu guards what follows, and all entries that are not flying. The keys of all maps are copies.
	mu      sync.Mutex
	entries map[key]*entry
	line    []*entry // all entries by age, some of which have flown meanwhile
	urgent  []*entry // those that somebody waits for
	flying  map[key]*entry
	hurry   bool                  // somebody waits for what is flying
	resets  map[key]bool          // that the primary has missed
	giving  map[key]*int          // calls that give tokens back to the primary, if there are any
	raising map[key]chan struct{} // identifiers to which the primary is being raised; closed when it was
	lost    int64                 // identifiers of which something was not remembered
}

// key is an identifier under a throttler's name.
type key struct{ name, identifier string }

// copied is for what outlasts the call: its caller may use the memory of the strings again.
func (k key) copied() key { return key{strings.Clone(k.name), strings.Clone(k.identifier)} }

// entry is what is to be told of one identifier.
type entry struct {
	key
	clocked bool
	now     int64 // the latest time of a caller whose clock is injected
	since   int64 // Monotonic when the entry was made
	reset   bool  // before the amounts
	raise   bool  // the primary, whatever it has shown
	hold    bool  // and until then nothing is given back to it
	buckets []bucket
	inline  [2]bucket
	waiting []*waiter
	flown   bool
}

// waiter waits until an entry has been told.
type waiter struct {
	told  chan error // has room for one
	tries int        // that have failed
}

func newJournal(most int) journal {
	return journal{most: most, kick: make(chan struct{}, 1), entries: make(map[key]*entry), flying: make(map[key]*entry),
		resets: make(map[key]bool), giving: make(map[key]*int), raising: make(map[key]chan struct{})}
}

// find returns the entry of an identifier, and makes one if need be. It is nil if there are too many, and the identifier
// need not have one. The caller holds mu.
func (j *journal) find(id key, must bool) *entry {
	e := j.entries[id]
	if e != nil {
		return e
	}
	if len(j.entries)+len(j.flying) >= j.most && !must {
		j.lost++
		return nil
	}
	e = &entry{key: id.copied(), since: storage.Monotonic()}
	e.buckets = e.inline[:0]
	j.entries[e.key] = e
	j.line = append(j.line, e)
	if len(j.entries) == 1 || len(j.entries) == j.most/2+1 {
		j.wake()
	}
	return e
}

func (j *journal) wake() {
	select {
	case j.kick <- struct{}{}:
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
			b.add(&b.given, -a.N, at)
			continue
		}
		b.add(&b.taken, a.N, at)
		b.unshown, b.spent, b.resetAt = true, b.spent+a.N, max(b.resetAt, at)
	}
}

// touch has the primary raised to what the ledger has of an identifier.
func (j *journal) touch(name string, p *storage.Part, clocked bool, now int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.touched(name, p, clocked, now)
}

func (j *journal) touched(name string, p *storage.Part, clocked bool, now int64) *entry {
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
func (j *journal) again(d *storage.Debt) {
	j.mu.Lock()
	defer j.mu.Unlock()
	p := storage.NewPart(d.Identifier, d.Rules, 0)
	e := j.touched(d.Name, &p, d.Clocked, d.Now)
	if e == nil || e.hold {
		return
	}
	if flying := j.flying[e.key]; flying != nil && flying.hold {
		flying.hold = false // e goes on with it
	} else if j.raising[e.key] != nil {
		return
	} else {
		j.raising[e.key] = make(chan struct{})
	}
	e.hold = true
	j.urgent = append(j.urgent, e)
	j.wake()
}

// reset forgets what was to be told, and remembers that the identifier was reset.
func (j *journal) reset(id key) {
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

// giveBack waits until the primary is not being raised, as that would take again what is given back, and keeps it
// from being so until gaveBack is called.
func (j *journal) giveBack(ctx context.Context, id key) error {
	for {
		j.mu.Lock()
		raising := j.raising[id]
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
	n := j.giving[id]
	if n == nil {
		n = new(int)
		j.giving[id.copied()] = n
	}
	*n++
}

func (j *journal) gaveBack(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := j.giving[id]
	if *n--; *n == 0 {
		delete(j.giving, id)
	}
}

// raise says that the primary is going to be raised, and own that raised has to be called afterwards. It may not be
// while tokens have been given back there of which the ledger does not know.
func (j *journal) raise(id key) (may, own bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	flying := j.flying[id]
	held := flying != nil && flying.hold
	if j.giving[id] != nil || j.raising[id] != nil && !held || j.entries[id] != nil && j.entries[id].givesBack() {
		return false, false
	}
	if !held {
		j.raising[id.copied()] = make(chan struct{})
	}
	return true, !held
}

func (j *journal) raised(id key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.release(id)
}

func (j *journal) release(id key) {
	close(j.raising[id])
	delete(j.raising, id)
}

func (e *entry) givesBack() bool {
	for i := range e.buckets {
		if len(e.buckets[i].given) > 0 {
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
	for _, e := range []*entry{j.entries[id], j.flying[id]} {
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
		if len(e.waiting) == 0 {
			j.urgent = append(j.urgent, e)
			j.wake()
		}
	} else if e = j.flying[id]; e == nil {
		return nil
	} else {
		j.hurry = true
		j.wake()
	}
	w := &waiter{told: make(chan error, 1)}
	e.waiting = append(e.waiting, w)
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
	for _, e := range j.flying {
		oldest(e)
	}
	for _, e := range j.line {
		if !e.flown {
			oldest(e)
			break
		}
	}
	return len(j.entries) + len(j.flying), since
}

// due is the time since which the ledger could be told something, how many identifiers there are, and whether
// somebody waits for it.
func (j *journal) due() (since int64, pending int, urgent bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for len(j.line) > 0 && j.line[0].flown {
		j.line = j.line[1:]
	}
	if len(j.line) > 0 {
		since = j.line[0].since
	}
	return since, len(j.entries), j.hurry || len(j.urgent) > 0
}

// board returns the entries that are to be told next: those that could not be told the last time, else first
// those that somebody waits for, then the oldest.
func (j *journal) board(batch []*entry) []*entry {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.hurry = false
	if len(batch) > 0 {
		return batch
	}
	amounts := 0
	for _, line := range []*[]*entry{&j.urgent, &j.line} {
		for len(*line) > 0 && len(batch) < flushSize && amounts < flushAmounts {
			e := (*line)[0]
			*line = (*line)[1:]
			if !e.flown {
				amounts += e.amounts()
				e.flown = true
				delete(j.entries, e.key)
				j.flying[e.key] = e
				batch = append(batch, e)
			}
		}
	}
	return batch
}

// land lets those go who waited for an entry, which has been told, or never will be because of an error.
func (j *journal) land(e *entry, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	delete(j.flying, e.key)
	if e.release(err); e.hold {
		j.release(e.key)
	}
	if err != nil {
		j.lost++
	}
}

// failed lets those go who have seen the telling of an entry fail twice, and those who wait for later ones.
func (j *journal) failed(err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, e := range j.flying {
		j.fail(e, err)
		j.hurry = j.hurry || len(e.waiting) > 0
	}
	for _, e := range j.urgent {
		j.fail(e, err)
	}
	j.urgent = slices.DeleteFunc(j.urgent, func(e *entry) bool { return e.flown || len(e.waiting) == 0 })
}

func (e *entry) release(err error) {
	for _, w := range e.waiting {
		w.told <- err
	}
	e.waiting = nil
}

func (j *journal) fail(e *entry, err error) {
	if e.hold {
		e.hold = false
		j.release(e.key)
	}
	e.waiting = slices.DeleteFunc(e.waiting, func(w *waiter) bool {
		w.tries++
		if w.tries == 2 {
			w.told <- err
		}
		return w.tries == 2
	})
}

// amounts is how many charges an entry makes, at least.
func (e *entry) amounts() (n int) {
	for i := range e.buckets {
		n = max(n, len(e.buckets[i].taken)+len(e.buckets[i].given))
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
