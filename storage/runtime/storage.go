// Package runtime keeps consumption in the memory of this process: the default storage.
//
// An identifier of 16 bytes with up to two buckets takes less than 120 bytes. A decision on one identifier with up to
// four buckets locks only one of 256 shards and allocates nothing, except for a SlidingLog's entries and an
// identifier's first call. Identifiers whose buckets are all full again are removed by the calls that follow, a bounded
// number by each. There is no background goroutine, and Close does nothing.
//
// Import it as memstore, because the standard library has a package runtime too.
package runtime

// How it is built. A call takes one of two ways:
//
//   - The short way (again, DecideOne, together) is for nearly all calls: the identifiers are there, with the buckets
//     of the request, and each state fits into the three numbers of a law.Cell. It decides in the cells where they are,
//     so it neither copies states nor allocates. If any of this is not so it changes nothing and reports false.
//   - The long way (decide, and call.go) can do everything. It reads the states out of the cells (begin), decides,
//     writes them back (end), and makes entries or lays them out anew.
//
// Both lock the shards of their identifiers for the whole decision, which makes it atomic.
//
//	table.go   a shard: the hash table of identifiers, and why it is made by hand
//	entry.go   what an identifier has: its cells, and the layout that tells their buckets
//	call.go    the long way, and the order in which shards are locked
//	sweep.go   how calls remove identifiers whose buckets are full

import (
	"context"
	"hash/maphash"
	"math/rand/v2"
	"strings"
	"sync/atomic"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// Source is the Verdict.Source of this storage's answers.
const Source = "runtime"

// inline is how many buckets, and how many identifiers, a call handles in arrays on its stack. More allocate.
const inline = 4

// Options of a Storage. The zero value and nil stand for the defaults.
type Options struct {
	// MaxIdentifiers is the most identifiers that are held; 0 or less sets no limit. If it is reached, a call on
	// another identifier searches for some to remove, whose buckets are all full. The search is short and goes on
	// where the last one ended. If it finds none the call fails with ErrUnavailable: an identifier that is not full is
	// never evicted, as that would hand out its limit once more.
	MaxIdentifiers int
}

// Storage keeps consumption in memory. New makes it; it is safe for concurrent use.
type Storage struct {
	shards [shards]shard // first, so that they begin at a cache line and no two of them share one
	seed   maphash.Seed  // random, so that nobody can choose identifiers that all fall into one shard
	max    int64         // Options.MaxIdentifiers; 0: no limit
	most   int           // entries that a call may look at beside a search for room

	// A bit for each shard that has entries. Each is changed under the lock of its shard, and read without it by
	// walks, which would otherwise have to look at 256 shards to find that most are empty.
	held [shards / 64]atomic.Uint64
	_    [8]byte       // what follows is written often, what precedes hardly ever: they must not share a cache line
	live atomic.Int64  // identifiers in all shards, and those that calls in progress may be about to make
	hand atomic.Uint32 // the shard at which the next walk begins
	rich atomic.Bool   // the last call that swept found something to remove
}

var _ storage.Storage = (*Storage)(nil)

// New returns an empty storage. Nil options are the defaults.
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

// Close does nothing and never fails, because there is nothing to wait for. It exists so that programs can close every
// storage alike.
func (s *Storage) Close(context.Context) error { return nil }

// Len returns the number of identifiers held. It includes those whose buckets are full and that no call has removed
// yet, and for a moment those that a call in progress may make.
func (s *Storage) Len() int { return int(s.live.Load()) }

// Decide implements storage.Storage. It replaces the identifiers in the request by copies of its own, so that a caller
// who keeps the request need not copy them. A request without parts only does its share of removing full identifiers,
// as every call does.
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

// again is the short way. It decides if the request has up to four identifiers, all of which are there, with the
// buckets of the request and states that fit into cells. Otherwise it has done nothing and returns false.
func (s *Storage) again(now int64, r *storage.Request, a *storage.Answer) (done bool) {
	switch n := len(r.Parts); {
	case n == 1 && len(r.Costs) <= inline:
		a.Allowed, done = s.DecideOne(r.Name, r.Mode, now, r.Within, r.Clocked, &r.Parts[0], r.Costs, a.Counts)
	case n > 0 && n <= inline:
		done = s.together(now, r, a)
	}
	return done
}

// DecideOne is Decide for nearly all calls: one identifier that is there, with up to four buckets, which are those of
// the part and whose states fit into cells. A throttler calls it directly with what it has, since a Request and an
// Answer would cost about a fifth of the decision. If the call is not of this kind, done is false, nothing has changed,
// and the caller calls Decide.
//
// Now is the time in microseconds since the epoch: by the caller's clock if clocked, otherwise law.Monotonic. Counts
// must have one element for each cost. It replaces p.Identifier by a copy that outlasts the call.
func (s *Storage) DecideOne(name string, mode storage.Mode, now, within int64, clocked bool, p *storage.Part, costs []int64, counts []storage.Count) (allowed, done bool) {
	// This is what hash does, repeated for the empty name because the compiler does not inline hash.
	h := maphash.String(s.seed, p.Identifier)
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

// together is the short way for up to four identifiers with any number of buckets. It locks the shards of all of them
// before it looks at any entry: a decision on several identifiers takes from all or from none. The sweep comes after
// they are unlocked, since it locks other shards.
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

// decideIn decides in the cells of the entries, one for each part and nil for an identifier that is not there. The
// caller holds the locks of all their shards. If a part needs the long way it returns false and nothing has changed.
//
// The rules of a part fit an entry if both have the same buckets and laws. SameLaws finds that by comparing pointers in
// nearly all cases; layout.is compares the numbers.
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

// decide is the long way, for every request. The common sizes use arrays on the stack, so that a decision which comes
// here only because a state does not fit into its cell still allocates little.
func (s *Storage) decide(ctx context.Context, now int64, r *storage.Request, a *storage.Answer) error {
	if err := ctx.Err(); err != nil || len(r.Parts) == 0 {
		s.sweepSome(r.Name, r.Clocked, now)
		return err
	}
	// c is a value and not a pointer, so that the arrays it refers to stay on the stack.
	c := call{name: r.Name, clocked: r.Clocked, now: now, keep: r.Mode != storage.Peek}
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

// answer decides the laid-out call and fills the answer. Between begin and end the shards are locked.
func (s *Storage) answer(c *call, r *storage.Request, a *storage.Answer) error {
	if err := s.begin(c); err != nil {
		return err
	}
	a.Allowed = law.Decide(r.Mode, c.now, c.draws)
	a.Tokens = law.Taken(c.draws)
	s.end(c, a.Allowed)
	for i := range c.places {
		p := &c.places[i]
		if p.entry == nil { // no entry keeps a copy, and the request may outlast the memory of its identifier
			p.id = strings.Clone(p.id)
		}
		r.Parts[i].Identifier = p.id
	}
	for i := range c.draws {
		a.Counts[i] = c.draws[i].Count
	}
	return nil
}

// spread lays out a request of several parts or many buckets: one draw for each bucket and one place for each part.
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

// Charge implements storage.Storage. A draw with a cost above 0 is stored, and locate makes room for its identifier, so
// the costs first say which amounts take, and then which have changed anything.
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
			d.Cost = 1 // end stores it
		}
	}
	s.end(&c, true)
	return nil
}

// Reset implements storage.Storage. It removes the entry, which is the same as filling all its buckets.
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
