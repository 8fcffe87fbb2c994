package runtime

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// call is one decision or charge on the long way. Between begin and end the shards of its identifiers are locked, and
// its draws hold copies of the states.
type call struct {
	name    string
	clocked bool
	keep    bool // false for a Peek: nothing will be written, and no entry made
	now     int64
	draws   []law.Draw // of all places, in order: each has as many as its rules
	places  []place    // one for each identifier
}

// lock locks the shards of all places, each once, in the order of their numbers.
func (c *call) lock(s *Storage) {
	if len(c.places) == 1 {
		c.places[0].shard.mu.Lock()
		return
	}
	for _, i := range c.order() {
		s.shards[i].mu.Lock()
	}
}

// unlock unlocks the shards that lock has locked.
func (c *call) unlock(s *Storage) {
	if len(c.places) == 1 {
		c.places[0].shard.mu.Unlock()
		return
	}
	for _, i := range c.order() {
		s.shards[i].mu.Unlock()
	}
}

// order returns the numbers of the shards of all places, each once, in the order in which they are locked.
func (c *call) order() (locked []uint8) {
	locked = make([]uint8, 0, len(c.places))
	for i := range c.places {
		locked = inOrder(locked, uint8(c.places[i].shard.index))
	}
	return locked
}

// inOrder inserts the number of a shard into a sorted list, unless it is there already: two identifiers may be in one
// shard, and its mutex must not be locked twice. All calls lock shards in the order of their numbers. So no two calls
// wait for each other, in whatever order they name their identifiers. Sweeps hold one lock at a time.
func inOrder(locked []uint8, shard uint8) []uint8 {
	i := len(locked)
	for i > 0 && locked[i-1] >= shard {
		i--
	}
	if i < len(locked) && locked[i] == shard {
		return locked
	}
	locked = append(locked, 0)
	copy(locked[i+1:], locked[i:])
	locked[i] = shard
	return locked
}

// place is where the state of one identifier is, or would be.
type place struct {
	shard *shard
	tag   uint32
	id    string           // the caller's; once there is an entry, the entry's copy
	rules *storage.RuleSet // this identifier's; it has one draw for each

	entry   *entry // nil if there is none
	counted bool   // there was no entry, and one more identifier is counted as live
	made    bool   // this call has made the entry
}

// place fills in the zero *p: where the identifier is.
func (s *Storage) place(p *place, name, id string, rules *storage.RuleSet) {
	h := hash(s.seed, name, id)
	p.shard, p.tag, p.id, p.rules = &s.shards[h>>56], uint32(h), id, rules
}

// begin locks the call's shards and loads the states of its draws. If there is no room for a new identifier it searches
// once for some to remove. It unlocks for that, because the search locks other shards, and then looks for the entries
// again: they may have been made or removed meanwhile. After an error nothing is locked.
func (s *Storage) begin(c *call) error {
	for searched := false; ; searched = true {
		c.lock(s)
		need := s.locate(c)
		if need == 0 {
			break
		}
		c.unlock(s)
		if searched || !s.findRoom(c, need) {
			return fmt.Errorf("%w: no room for %.64q: the runtime storage may hold %d identifiers, and of those looked at too few are full", storage.ErrUnavailable, strings.Clone(c.places[0].id), s.max)
		}
	}
	n := 0
	for i := range c.places {
		p := &c.places[i]
		if err := p.load(c, n); err != nil {
			s.leave(c)
			return err
		}
		n += len(p.rules.Rules)
	}
	return nil
}

// end stores what was taken, if anything, and unlocks the shards.
func (s *Storage) end(c *call, taken bool) {
	if taken && c.keep {
		n := 0
		for i := range c.places {
			c.places[i].store(c, n)
			n += len(c.places[i].rules.Rules)
		}
	}
	s.leave(c)
}

// leave gives back the room that was reserved for identifiers and not used, because the call was denied or failed. Then
// it unlocks the shards, and sweeps if a sweep is due.
func (s *Storage) leave(c *call) {
	for i := range c.places {
		if p := &c.places[i]; p.counted && !p.made {
			s.live.Add(-1)
		}
	}
	due := c.places[0].shard.due(c.clocked, len(c.places))
	c.unlock(s)
	if due {
		s.tidy(c.name, c.clocked, c.now, s.most)
	}
}

// locate finds the entries of the call and reserves room for those that it may have to make: they count as live at
// once, so that calls in other shards cannot use the same room. If they exceed MaxIdentifiers it reserves none, and
// returns how many identifiers have to be removed.
func (s *Storage) locate(c *call) (need int64) {
	// A call that costs nothing makes no entry: a full bucket that is not there answers the same.
	missing, n := int64(0), 0
	for i := range c.places {
		p := &c.places[i]
		p.counted = false
		if p.entry = p.shard.find(p.tag, c.name, p.id); p.entry != nil {
			p.id = p.entry.id
		} else if c.keep && slices.ContainsFunc(c.draws[n:n+len(p.rules.Rules)], func(d law.Draw) bool { return d.Cost > 0 }) {
			p.counted = true
			missing++
		}
		n += len(p.rules.Rules)
	}
	if missing == 0 {
		return 0
	}
	// Adding first and looking then is one atomic step: two calls cannot both find the last room free.
	if over := s.live.Add(missing) - s.max; over > 0 && s.max > 0 {
		s.live.Add(-missing)
		return min(over, missing)
	}
	return 0
}

// findRoom removes identifiers whose buckets are full, and reports whether it has removed as many as are needed. Unlike
// a sweep that is merely due, it waits for locks: a shard that is busy must not make the call fail. The caller holds
// none.
func (s *Storage) findRoom(c *call, need int64) bool {
	w := s.sweep(c.name, c.clocked, c.now, sweepHalf, sweepHalf)
	s.walk(&w, func(mu *sync.Mutex) bool { mu.Lock(); return true })
	return int64(w.removed) >= need
}

// load reads the states of the place's draws, the first of which is number from. It fails with TooManyBuckets if the
// identifier would come to have more than MaxBuckets buckets that are not full. Counting those takes time, so it is
// only done if the entry would have too many cells.
func (p *place) load(c *call, from int) error {
	if p.entry == nil {
		return nil
	}
	e, extra := p.entry, 0
	for j := range p.rules.Rules {
		d := &c.draws[from+j]
		if i := e.layout.find(d.Rule, j); i >= 0 {
			e.state(i, &d.State)
		} else {
			extra++
		}
	}
	if extra > 0 && extra+len(e.layout.rules.Rules) > law.MaxBuckets {
		return storage.TooManyBuckets(p.rules, len(p.rules.Rules)+len(p.leftovers(c, from)))
	}
	return nil
}

// store writes the states of the draws that took something. If there is no entry, or if it has no cell for one of them
// or one of another law, it calls relay, which writes all of them.
func (p *place) store(c *call, from int) {
	for j := range p.rules.Rules {
		d := &c.draws[from+j]
		if d.Cost == 0 || d.State.Law == nil {
			continue
		}
		if p.entry == nil {
			p.relay(c, from)
			return
		}
		i := p.entry.layout.find(d.Rule, j)
		if i < 0 || &p.entry.layout.rules.Rules[i].Law != d.State.Law && p.entry.layout.rules.Rules[i].Law != *d.State.Law {
			p.relay(c, from)
			return
		}
		p.entry.set(i, &d.State)
	}
}

// leftover is a bucket of the identifier that the call does not name and that is not full.
type leftover struct {
	rule  law.Rule
	state law.State
}

// leftovers returns the buckets that have to be kept though the call does not name them. They are full if their plan
// has not been used for a while, and only then are they dropped.
func (p *place) leftovers(c *call, from int) (out []leftover) {
	if p.entry == nil {
		return nil
	}
next:
	for i := range p.entry.layout.rules.Rules {
		rule := p.entry.layout.rules.Rules[i]
		for j := range p.rules.Rules {
			if c.draws[from+j].Rule.SameBucket(&rule) {
				continue next
			}
		}
		var s law.State
		if p.entry.state(i, &s); !s.Full(c.now) {
			out = append(out, leftover{rule, s})
		}
	}
	return out
}

// oldLaw reports that a state was spent under another law than the rule's, and has not changed since. That is so if the
// call asks the bucket for nothing: a state is converted only when something is taken.
func oldLaw(d law.Draw) bool { return d.State.Law != nil && *d.State.Law != d.Rule.Law }

// relay lays the entry out anew, or makes it, and writes all states: first those of the call's buckets, then the
// leftovers.
//
// Nearly always the layout is that of the request's rules, which the entry shares with all others of the same limits.
// An entry with leftovers, or with states under old laws, gets a set of rules of its own, and is decided on the long
// way.
func (p *place) relay(c *call, from int) {
	// The leftovers have to be read before the cells are made anew.
	rules, rest := p.rules, p.leftovers(c, from)
	if len(rest) > 0 || slices.ContainsFunc(c.draws[from:from+len(p.rules.Rules)], oldLaw) {
		mixed := slices.Clone(p.rules.Rules)
		for j := range mixed {
			if d := &c.draws[from+j]; oldLaw(*d) {
				mixed[j].Law = *d.State.Law
			}
		}
		for _, l := range rest {
			mixed = append(mixed, l.rule)
		}
		rules = law.NewRuleSet(mixed...)
	}
	// The new layout is counted before the old one is released: they may be the same, which must not be dropped.
	l := p.shard.use(c.name, c.clocked, rules)
	if p.entry == nil {
		p.entry, p.made = p.shard.add(p.tag, p.id, l), true
		p.id = p.entry.id
	} else {
		p.shard.release(p.entry.layout)
		p.entry.layout = l
		p.entry.resize(len(l.rules.Rules))
	}
	for j := range p.rules.Rules {
		if d := &c.draws[from+j]; d.State.Law != nil {
			p.entry.set(j, &d.State)
		}
	}
	for k := range rest {
		p.entry.set(len(p.rules.Rules)+k, &rest[k].state)
	}
}
