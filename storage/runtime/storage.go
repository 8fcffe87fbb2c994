// Package runtime keeps consumption in the memory of this process: the default storage.
//
// An identifier with up to two buckets takes about 110 bytes and no garbage collector work beyond
// its name; a decision allocates nothing (a SlidingLog's entries aside) and locks only one of 256
// shards. Identifiers whose buckets are all full again are removed as further calls write, a
// bounded number a call; there is no background goroutine and nothing to close.
//
// Import it as memstore: the plain name is the standard library's.
package runtime

import (
	"cmp"
	"context"
	"fmt"
	"hash/maphash"
	"slices"
	"sync/atomic"

	"github.com/go-throttler/throttler/storage"
)

// Source is what Verdict.Source says of this storage's answers.
const Source = "runtime"

// Options of a Storage. The zero value and nil are the defaults.
type Options struct {
	// MaxIdentifiers is the most identifiers with buckets that are not full; 0 sets no limit. One
	// more gets ErrUnavailable: none that is not full is ever evicted.
	MaxIdentifiers int
}

// Storage is safe for concurrent use.
type Storage struct {
	seed   maphash.Seed
	max    int64
	live   atomic.Int64  // identifiers in all shards, and those about to be
	hand   atomic.Uint32 // the shard where the next search for room begins
	shards [shards]shard
}

var _ storage.Storage = (*Storage)(nil)

// New returns an empty storage.
func New(o *Options) *Storage {
	s := &Storage{seed: maphash.MakeSeed()}
	for i := range s.shards {
		s.shards[i].index, s.shards[i].seed = i, s.seed
	}
	if o != nil {
		s.max = int64(o.MaxIdentifiers)
	}
	return s
}

// Len is the number of identifiers held, full ones not yet removed among them.
func (s *Storage) Len() int { return int(s.live.Load()) }

// Decide implements storage.Storage.
func (s *Storage) Decide(ctx context.Context, r storage.Request) (v storage.Verdict, err error) {
	err = s.DecideInto(ctx, &r, &v)
	return v, err
}

// DecideInto is Decide that answers in place of a zero Verdict: copies of the two are most of what a
// decision in memory would cost.
func (s *Storage) DecideInto(ctx context.Context, r *storage.Request, v *storage.Verdict) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := r.Validate(); err != nil {
		return err
	}
	now := r.Now
	if !r.Clocked {
		now = storage.Monotonic()
	}
	if len(r.More) == 0 && len(r.Part.Rules) <= 2 && s.again(r, v, now) {
		return nil
	}
	c := call{name: r.Name, clocked: r.Clocked, now: now, keep: r.Mode != storage.Peek}
	if n := len(r.Part.Rules); len(r.More) == 0 && n <= inline {
		var few [inline]storage.Draw
		var one [1]place
		for i := range n {
			few[i].Rule, few[i].Cost = &r.Part.Rules[i], r.Part.Cost(i)
		}
		s.place(&one[0], r.Name, r.Part.Identifier, r.Part.Rules)
		c.draws, c.places = few[:n], one[:]
		return s.answer(&c, r, v)
	}
	c.draws, c.places = s.spread(r)
	return s.answer(&c, r, v)
}

// again is the short way for nearly all calls: an identifier that is there, with the one or two
// buckets of the request. It reports false, and has done nothing, when that is not so.
func (s *Storage) again(r *storage.Request, v *storage.Verdict, now int64) bool {
	h := hash(s.seed, r.Name, r.Part.Identifier)
	sh := &s.shards[h>>56]
	sh.mu.Lock()
	i := sh.find(uint32(h), r.Name, r.Part.Identifier)
	if i < 0 || !sh.entry(i).layout.is(r.Part.Rules) {
		sh.mu.Unlock()
		return false
	}
	e := sh.entry(i)
	var few [2]storage.Draw
	draws := few[:len(r.Part.Rules)]
	for j := range draws {
		draws[j].Rule, draws[j].Cost = &r.Part.Rules[j], r.Part.Cost(j)
		e.state(j, &draws[j].State)
	}
	v.Begin(r, Source, now)
	v.Allowed = storage.Decide(r.Mode, now, draws)
	if v.Allowed && r.Mode != storage.Peek {
		for j := range draws {
			if draws[j].Cost > 0 {
				e.set(j, &draws[j].State)
			}
		}
		if sh.writes++; sh.writes%8 == 0 {
			s.live.Add(-int64(sh.sweep(r.Name, r.Clocked, now, 8)))
		}
	}
	sh.mu.Unlock()
	for j := range draws {
		v.Set(j, draws[j].Count)
	}
	return true
}

func (s *Storage) answer(c *call, r *storage.Request, v *storage.Verdict) error {
	if err := s.begin(c); err != nil {
		return err
	}
	v.Begin(r, Source, c.now)
	v.Allowed = storage.Decide(r.Mode, c.now, c.draws)
	s.end(c, v.Allowed)
	for i := range c.draws {
		v.Set(i, c.draws[i].Count)
	}
	return nil
}

// spread lays out a request of many buckets or parts.
func (s *Storage) spread(r *storage.Request) (draws []storage.Draw, places []place) {
	places = make([]place, r.Parts())
	for i := range r.Parts() {
		p := r.At(i)
		for j := range p.Rules {
			draws = append(draws, storage.Draw{Rule: &p.Rules[j], Cost: p.Cost(j)})
		}
		s.place(&places[i], r.Name, p.Identifier, p.Rules)
	}
	return draws, places
}

// Charge implements storage.Storage.
func (s *Storage) Charge(ctx context.Context, ch storage.Charge) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := ch.Validate(); err != nil {
		return err
	}
	n := len(ch.Rules)
	c := call{name: ch.Name, clocked: ch.Clocked, now: ch.Now, keep: true, draws: make([]storage.Draw, n), places: make([]place, 1)}
	s.place(&c.places[0], ch.Name, ch.Identifier, ch.Rules)
	if !ch.Clocked {
		c.now = storage.Monotonic()
	}
	for i := range c.draws {
		c.draws[i].Rule = &ch.Rules[i]
		if ch.Amounts[i].N != 0 {
			c.draws[i].Cost = 1
		}
	}
	if err := s.begin(&c); err != nil {
		return err
	}
	for i, a := range ch.Amounts {
		d := &c.draws[i]
		if a.N > 0 {
			d.State.Charge(d.Rule, a, c.now)
		} else if a.N < 0 {
			d.State.Refund(-max(a.N, -1<<62), a.In, c.now)
		}
	}
	s.end(&c, true)
	return nil
}

// Reset implements storage.Storage.
func (s *Storage) Reset(ctx context.Context, name, identifier string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := storage.ValidateIdentifier(identifier); err != nil {
		return err
	}
	var p place
	s.place(&p, name, identifier, nil)
	p.shard.mu.Lock()
	defer p.shard.mu.Unlock()
	if i := p.shard.find(p.tag, name, identifier); i >= 0 {
		p.shard.remove(i)
		s.live.Add(-1)
	}
	return nil
}

// inline is how many buckets a call handles without allocating.
const inline = 4

// call is one decision or charge on its way through the shards. Between begin and end its shards
// are locked and its draws hold the states.
type call struct {
	name    string
	clocked bool
	keep    bool // false: nothing will be written
	now     int64
	draws   []storage.Draw
	places  []place // of each identifier
}

// lock locks the shards of all places, each once and in the order of their indexes, so that no two calls wait for each other.
func (c *call) lock() {
	if len(c.places) == 1 {
		c.places[0].shard.mu.Lock()
		return
	}
	for _, sh := range c.order() {
		sh.mu.Lock()
	}
}

func (c *call) unlock() {
	if len(c.places) == 1 {
		c.places[0].shard.mu.Unlock()
		return
	}
	for _, sh := range c.order() {
		sh.mu.Unlock()
	}
}

func (c *call) order() []*shard {
	out := make([]*shard, len(c.places))
	for i := range c.places {
		out[i] = c.places[i].shard
	}
	slices.SortFunc(out, func(a, b *shard) int { return cmp.Compare(a.index, b.index) })
	return slices.Compact(out)
}

// place is where the state of one identifier is.
type place struct {
	shard *shard
	tag   uint32
	id    string
	rules []storage.Rule // as many of the draws are this identifier's

	entry   *entry // nil when there is none
	counted bool   // there was none, and one more is counted as live
	made    bool   // by this call
}

// place sets where the identifier is, in place of a zero one.
func (s *Storage) place(p *place, name, id string, rules []storage.Rule) {
	h := hash(s.seed, name, id)
	p.shard, p.tag, p.id, p.rules = &s.shards[h>>56], uint32(h), id, rules
}

// begin locks the call's shards and loads the states of its draws.
func (s *Storage) begin(c *call) error {
	for tried := false; ; tried = true {
		c.lock()
		if s.locate(c) {
			break
		}
		c.unlock()
		if tried || !s.findRoom(c) {
			return fmt.Errorf("%w: all %d identifiers of the runtime storage have buckets that are not full", storage.ErrUnavailable, s.max)
		}
	}
	n := 0
	for i := range c.places {
		p := &c.places[i]
		if err := p.load(c, n); err != nil {
			s.leave(c)
			return err
		}
		n += len(p.rules)
	}
	return nil
}

// end stores what was taken, if anything, and unlocks.
func (s *Storage) end(c *call, taken bool) {
	if taken && c.keep {
		n := 0
		for i := range c.places {
			c.places[i].store(c, n)
			n += len(c.places[i].rules)
		}
		for i := range c.places {
			if removed := c.places[i].shard.tidy(c, c.places[i].made); removed > 0 {
				s.live.Add(-int64(removed))
			}
		}
	}
	s.leave(c)
}

// leave gives back the room of identifiers that were not made, and unlocks.
func (s *Storage) leave(c *call) {
	for i := range c.places {
		if p := &c.places[i]; p.counted && !p.made {
			s.live.Add(-1)
		}
	}
	c.unlock()
}

// locate finds the entries of the call and counts those that may have to be made. It reports
// false, and counts none, when they exceed the limit.
func (s *Storage) locate(c *call) bool {
	for i := range c.places {
		p := &c.places[i]
		if at := p.shard.find(p.tag, c.name, p.id); at >= 0 {
			p.entry = p.shard.entry(at)
			continue
		}
		p.entry, p.counted = nil, false
		if !c.keep {
			continue
		}
		if s.live.Add(1) > s.max && s.max > 0 {
			for ; i >= 0; i-- {
				if c.places[i].counted || &c.places[i] == p {
					s.live.Add(-1)
					c.places[i].counted = false
				}
			}
			return false
		}
		p.counted = true
	}
	return true
}

// findRoom looks for an identifier to remove: in all shards, but at no more than visits entries.
func (s *Storage) findRoom(c *call) bool {
	budget, hand := visits, s.hand.Add(1)
	for i := range uint32(shards) {
		sh := &s.shards[(hand+i)%shards]
		sh.mu.Lock()
		n := min(budget, sh.n)
		removed := sh.sweep(c.name, c.clocked, c.now, n)
		sh.mu.Unlock()
		if removed > 0 {
			s.live.Add(-int64(removed))
			return true
		}
		if budget -= n; budget == 0 {
			return false
		}
	}
	return false
}
