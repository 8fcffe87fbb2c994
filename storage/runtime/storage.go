// Package runtime keeps consumption in the memory of this process: the default storage.
//
// An identifier of 16 bytes with up to two buckets takes less than 120 bytes. A decision on one identifier with up to four
// buckets locks only one of 256 shards and allocates nothing, except for a SlidingLog's entries and an identifier's first
// call. Later calls remove identifiers whose buckets are all full again, a bounded number a call. There is no background
// goroutine, and Close does nothing.
//
// Import it as memstore: the plain name is the standard library's.
package runtime

import (
	"context"
	"hash/maphash"
	"math/rand/v2"
	"strings"
	"sync/atomic"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// Source is what Verdict.Source says of this storage's answers.
const Source = "runtime"

// inline is how many buckets a call handles without allocating.
const inline = 4

// Options of a Storage. The zero value and nil are the defaults.
type Options struct {
	// MaxIdentifiers is the most identifiers that are held; 0 sets no limit. One more gets
	// ErrUnavailable unless a short search finds one to remove that is full: none that is not full is
	// ever evicted. A search goes on after the last one.
	MaxIdentifiers int
}

// Storage is safe for concurrent use. It is made by New only.
type Storage struct {
	shards [shards]shard // first, so that they begin at a cache line
	seed   maphash.Seed
	max    int64
	most   int                        // entries that a call looks at beside a search for room
	held   [shards / 64]atomic.Uint64 // a bit for each shard that has entries; changed under its lock
	_      [8]byte                    // what follows changes more often than it is read
	live   atomic.Int64               // identifiers in all shards, and those about to be
	hand   atomic.Uint32              // the shard where the next walk begins
	rich   atomic.Bool                // the last call that swept found some to remove
}

var _ storage.Storage = (*Storage)(nil)

// New returns an empty storage.
func New(o *Options) *Storage {
	s := &Storage{seed: maphash.MakeSeed(), most: sweepMost}
	for i := range s.shards {
		s.shards[i] = shard{index: i, storage: s, turn: uint32(i) << 24, chance: rand.Uint64()}
	}
	if o != nil && o.MaxIdentifiers > 0 {
		s.max, s.most = int64(o.MaxIdentifiers), sweepHalf
	}
	return s
}

// Close does nothing, and never fails: there is nothing to wait for. It is there so that programs close every storage
// alike.
func (s *Storage) Close(context.Context) error { return nil }

// Len is the number of identifiers held, full ones not yet removed among them.
func (s *Storage) Len() int { return int(s.live.Load()) }

// Decide implements storage.Storage. It puts copies in place of the identifiers, so that the caller need not make any. Asked
// nothing, it only takes its share in removing full identifiers, as every call does.
func (s *Storage) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	now := r.Now
	if !r.Clocked && now == 0 {
		now = law.Monotonic()
	}
	a.Source, a.Degraded, a.At = Source, false, now
	if ctx.Err() == nil && s.again(now, r, a) {
		return nil
	}
	return s.decide(ctx, now, r, a)
}

// again is the short way for nearly all calls: one identifier that is there, or a few, with the buckets of the request and
// states that fit into cells. It reports false, and has done nothing, when that is not so.
func (s *Storage) again(now int64, r *storage.Request, a *storage.Answer) (done bool) {
	switch n := len(r.Parts); {
	case n == 1 && len(r.Costs) <= inline:
		a.Allowed, done = s.DecideOne(r.Name, r.Mode, now, r.Within, r.Clocked, &r.Parts[0], r.Costs, a.Counts)
	case n > 0 && n <= inline:
		done = s.together(now, r, a)
	}
	return done
}

// DecideOne is Decide for nearly all calls, from what a throttler has without a Request: one identifier that is there, with
// up to four buckets, which are those of the part and whose states fit into cells. Now is the time by the clock of the
// request, or of this process. It reports that it is not done, and has done nothing, when that is not so.
func (s *Storage) DecideOne(name string, mode storage.Mode, now, within int64, clocked bool, p *storage.Part, costs []int64, counts []storage.Count) (allowed, done bool) {
	h := maphash.String(s.seed, p.Identifier) // as hash does, which is not inlined
	if name != "" {
		h = hash(s.seed, name, p.Identifier)
	}
	sh := &s.shards[h>>56]
	sh.mu.Lock()
	e := sh.find(uint32(h), name, p.Identifier)
	if e != nil && !p.AtMost && (e.layout.rules.SameLaws(p.Rules) || e.layout.is(p.Rules)) {
		allowed, done = law.DecideOne(mode, now, within, counts, p.Rules, costs, e.all(len(costs)))
	}
	if !done {
		sh.mu.Unlock()
		return false, false
	}
	p.Identifier = e.id
	due := sh.due(clocked, 1)
	sh.mu.Unlock()
	if due {
		s.tidy(name, clocked, now, s.most)
	}
	return allowed, true
}

// together is again for a few identifiers, or more buckets.
func (s *Storage) together(now int64, r *storage.Request, a *storage.Answer) (done bool) {
	var tags [inline]uint32
	var all, order [inline]uint8
	locked := order[:0]
	for i := range r.Parts {
		h := hash(s.seed, r.Name, r.Parts[i].Identifier)
		tags[i], all[i] = uint32(h), uint8(h>>56)
		locked = inOrder(locked, all[i])
	}
	for _, i := range locked {
		s.shards[i].mu.Lock()
	}
	var entries [inline]*entry
	for i := range r.Parts {
		entries[i] = s.shards[all[i]].find(tags[i], r.Name, r.Parts[i].Identifier)
	}
	done = decideIn(entries[:len(r.Parts)], now, r, a)
	due := done && s.shards[locked[0]].due(r.Clocked, len(r.Parts))
	for _, i := range locked {
		s.shards[i].mu.Unlock()
	}
	if due {
		s.tidy(r.Name, r.Clocked, now, s.most)
	}
	return done
}

// decideIn decides in the cells of the entries of all parts, whose shards are locked. One that is not there is nil.
func decideIn(entries []*entry, now int64, r *storage.Request, a *storage.Answer) (done bool) {
	var few [inline]law.Asked
	n := 0
	for i, e := range entries {
		p := &r.Parts[i]
		if e == nil || p.AtMost || !e.layout.rules.SameLaws(p.Rules) && !e.layout.is(p.Rules) {
			return false
		}
		from := n
		n += len(p.Rules.Rules)
		few[i].Rules, few[i].Costs, few[i].Cells = p.Rules, r.Costs[from:n], e.all(n-from)
	}
	if a.Allowed, done = law.DecideCells(r.Mode, now, r.Within, a.Counts, few[:len(entries)]); !done {
		return false
	}
	for i, e := range entries {
		r.Parts[i].Identifier = e.id
	}
	return true
}

// decide is the long way.
func (s *Storage) decide(ctx context.Context, now int64, r *storage.Request, a *storage.Answer) error {
	if err := ctx.Err(); err != nil || len(r.Parts) == 0 {
		s.sweepSome(r.Name, r.Clocked, now)
		return err
	}
	c := call{name: r.Name, clocked: r.Clocked, now: now, keep: r.Mode != storage.Peek} // no pointer: what it refers to stays on the stack
	if p, n := &r.Parts[0], len(r.Costs); len(r.Parts) == 1 && n <= inline {
		var few [inline]law.Draw
		var one [1]place
		for i, cost := range r.Costs {
			few[i].Rule, few[i].Cost, few[i].Within, few[i].AtMost = &p.Rules.Rules[i], cost, r.Within, p.AtMost
		}
		s.place(&one[0], c.name, p.Identifier, p.Rules)
		c.draws, c.places = few[:n], one[:]
		return s.answer(&c, r, a)
	}
	c.draws, c.places = s.spread(r)
	return s.answer(&c, r, a)
}

func (s *Storage) answer(c *call, r *storage.Request, a *storage.Answer) error {
	if err := s.begin(c); err != nil {
		return err
	}
	a.Allowed = law.Decide(r.Mode, c.now, c.draws)
	a.Tokens = law.Taken(c.draws)
	s.end(c, a.Allowed)
	for i := range c.places {
		p := &c.places[i]
		if p.entry == nil { // nobody keeps it but the caller, whose memory may be used again
			p.id = strings.Clone(p.id)
		}
		r.Parts[i].Identifier = p.id
	}
	for i := range c.draws {
		a.Counts[i] = c.draws[i].Count
	}
	return nil
}

// spread lays out a request of many buckets or parts.
func (s *Storage) spread(r *storage.Request) (draws []law.Draw, places []place) {
	places = make([]place, len(r.Parts))
	for i, p := range r.Parts {
		for j := range p.Rules.Rules {
			draws = append(draws, law.Draw{Rule: &p.Rules.Rules[j], Cost: r.Costs[len(draws)], Within: r.Within, AtMost: p.AtMost})
		}
		s.place(&places[i], r.Name, p.Identifier, p.Rules)
	}
	return draws, places
}

// Charge implements storage.Storage.
func (s *Storage) Charge(ctx context.Context, ch *storage.Charge) error {
	c := call{name: ch.Name, clocked: ch.Clocked, now: ch.Now, keep: true}
	if !c.clocked {
		c.now = law.Monotonic()
	}
	if err := ctx.Err(); err != nil {
		s.sweepSome(c.name, c.clocked, c.now)
		return err
	}
	c.draws, c.places = make([]law.Draw, len(ch.Amounts)), make([]place, 1)
	s.place(&c.places[0], ch.Name, ch.Identifier, ch.Rules)
	for i := range c.draws {
		c.draws[i].Rule = &ch.Rules.Rules[i]
		c.draws[i].Cost = max(0, ch.Amounts[i].N)
	}
	if err := s.begin(&c); err != nil {
		return err
	}
	for i, a := range ch.Amounts {
		if d := &c.draws[i]; d.State.Apply(d.Rule, a, c.now) {
			d.Cost = 1 // to be stored
		}
	}
	s.end(&c, true)
	return nil
}

// Reset implements storage.Storage.
func (s *Storage) Reset(ctx context.Context, name, identifier string) error {
	defer s.sweepSome("", false, law.Monotonic())
	if err := ctx.Err(); err != nil {
		return err
	}
	var p place
	s.place(&p, name, identifier, nil)
	p.shard.mu.Lock()
	defer p.shard.mu.Unlock()
	if e, i := p.shard.lookup(p.tag, name, identifier); e != nil {
		p.shard.remove(i)
		s.live.Add(-1)
	}
	return nil
}
