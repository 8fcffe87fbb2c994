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

// Decide implements storage.Storage.
func (s *Storage) Decide(ctx context.Context, r storage.Request) (v storage.Verdict, err error) {
	if !r.Clocked {
		r.Now = storage.Monotonic()
	}
	if err = ctx.Err(); err == nil {
		err = r.Validate()
	}
	if err != nil {
		s.sweepSome(r.Name, r.Clocked, r.Now)
		return v, err
	}
	v.Begin(&r, Source, r.Now)
	err = s.DecideInto(ctx, &v, r.Name, r.Mode, r.Clocked, r.Now)
	return v, err
}

// DecideInto is Decide without copies: it answers the parts that v was asked (Verdict.Ask), at a time that is Monotonic
// unless it is clocked. Copies of a Request and a Verdict would be most of what a decision in memory costs. Asked nothing,
// it only takes its share in removing full identifiers, as every call does. After an error v is zero.
func (s *Storage) DecideInto(ctx context.Context, v *storage.Verdict, name string, mode storage.Mode, clocked bool, now int64) error {
	if ctx.Err() == nil && s.again(v, name, mode, clocked, now) {
		return nil
	}
	return s.decide(ctx, v, v.Request(name, mode, clocked, now))
}

// again is the short way for nearly all calls: one identifier that is there, or a few, with the buckets of the request and
// states that fit into cells. It reports false, and has done nothing, when that is not so.
func (s *Storage) again(v *storage.Verdict, name string, mode storage.Mode, clocked bool, now int64) bool {
	p := v.Part(0)
	if n := v.Parts(); n > 1 {
		return n <= inline && s.together(v, name, mode, clocked, now)
	}
	h := hash(s.seed, name, p.Identifier)
	sh := &s.shards[h>>56]
	sh.mu.Lock()
	i := sh.number(uint32(h), name, p.Identifier)
	if i < 0 {
		sh.mu.Unlock()
		return false
	}
	e := sh.entry(i)
	if !e.layout.is(p.Rules) || !v.Decide(Source, mode, now, e.all(len(p.Rules))) {
		sh.mu.Unlock()
		return false
	}
	p.Identifier = e.id // a copy: the caller's may be in memory that it uses again
	due := sh.due(clocked, 1)
	sh.mu.Unlock()
	if due {
		s.tidy(name, clocked, now, s.most)
	}
	return true
}

// together is again for a few identifiers.
func (s *Storage) together(v *storage.Verdict, name string, mode storage.Mode, clocked bool, now int64) (done bool) {
	var places [inline]place
	var few [inline]*shard
	n := v.Parts()
	for i := range n {
		s.place(&places[i], name, v.Part(i).Identifier, v.Part(i).Rules)
		few[i] = places[i].shard
	}
	locked := ordered(few[:n])
	for _, sh := range locked {
		sh.mu.Lock()
	}
	done = decideAt(places[:n], v, name, mode, now)
	due := done && locked[0].due(clocked, n)
	for _, sh := range locked {
		sh.mu.Unlock()
	}
	if due {
		s.tidy(name, clocked, now, s.most)
	}
	return done
}

// decideAt decides in the cells of all places, whose shards are locked.
func decideAt(places []place, v *storage.Verdict, name string, mode storage.Mode, now int64) bool {
	var few [inline][]storage.Cell
	for i := range places {
		p := &places[i]
		p.entry = p.shard.find(p.tag, name, p.id)
		if p.entry == nil || !p.entry.layout.is(p.rules) {
			return false
		}
		for j := range i {
			if places[j].entry == p.entry { // an identifier stands in two parts
				return false
			}
		}
		few[i] = p.entry.all(len(p.rules))
	}
	if !v.Decide(Source, mode, now, few[:len(places)]...) {
		return false
	}
	for i := range places {
		v.Part(i).Identifier = places[i].entry.id
	}
	return true
}

// decide is the long way. Only a call that asks nothing has no rules.
func (s *Storage) decide(ctx context.Context, v *storage.Verdict, r storage.Request) error {
	err := ctx.Err()
	if err == nil && r.Part.Rules != nil {
		err = r.Validate()
	}
	if err != nil || r.Part.Rules == nil {
		*v = storage.Verdict{}
		s.sweepSome(r.Name, r.Clocked, r.Now)
		return err
	}
	c := call{name: r.Name, clocked: r.Clocked, now: r.Now, keep: r.Mode != storage.Peek}
	if n := len(r.Part.Rules); len(r.More) == 0 && n <= inline {
		var few [inline]storage.Draw
		var one [1]place
		for i := range n {
			few[i].Rule, few[i].Cost = &r.Part.Rules[i], r.Part.Cost(i)
		}
		s.place(&one[0], r.Name, r.Part.Identifier, r.Part.Rules)
		c.draws, c.places = few[:n], one[:]
		return s.answer(&c, &r, v)
	}
	c.draws, c.places = s.spread(&r)
	return s.answer(&c, &r, v)
}

func (s *Storage) answer(c *call, r *storage.Request, v *storage.Verdict) error {
	if err := s.begin(c); err != nil {
		*v = storage.Verdict{}
		return err
	}
	v.Begin(r, Source, c.now)
	v.Allowed = storage.Decide(r.Mode, c.now, c.draws)
	s.end(c, v.Allowed)
	for i := range c.places {
		p := &c.places[i]
		if p.entry == nil { // nobody keeps it but the caller, whose memory may be used again
			p.id = strings.Clone(p.id)
		}
		v.Part(i).Identifier = p.id
	}
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
	if !ch.Clocked {
		ch.Now = storage.Monotonic()
	}
	err := ctx.Err()
	if err == nil {
		err = ch.Validate()
	}
	if err != nil {
		s.sweepSome(ch.Name, ch.Clocked, ch.Now)
		return err
	}
	n := len(ch.Rules)
	c := call{name: ch.Name, clocked: ch.Clocked, now: ch.Now, keep: true, draws: make([]storage.Draw, n), places: make([]place, 1)}
	s.place(&c.places[0], ch.Name, ch.Identifier, ch.Rules)
	for i := range c.draws {
		c.draws[i].Rule = &ch.Rules[i]
		c.draws[i].Cost = max(0, ch.Amounts[i].N)
	}
	if err := s.begin(&c); err != nil {
		return err
	}
	for i, a := range ch.Amounts {
		d := &c.draws[i]
		if a.N > 0 {
			d.State.Charge(d.Rule, a, c.now)
		} else if a.N < 0 {
			d.Cost = 1 // to be stored
			d.State.Refund(d.Rule, storage.Amount{N: -max(a.N, -1<<62), In: a.In}, c.now)
		}
	}
	s.end(&c, true)
	return nil
}

// Reset implements storage.Storage.
func (s *Storage) Reset(ctx context.Context, name, identifier string) error {
	defer s.sweepSome("", false, storage.Monotonic())
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
	if i := p.shard.number(p.tag, name, identifier); i >= 0 {
		p.shard.remove(i)
		s.live.Add(-1)
	}
	return nil
}
