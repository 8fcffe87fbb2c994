package runtime

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// call is one decision or charge on its way through the shards. Between begin and end its shards
// are locked and its draws hold the states.
type call struct {
	name    string
	clocked bool
	keep    bool // false: nothing will be written
	now     int64
	draws   []law.Draw
	places  []place // of each identifier
}

// lock locks the shards of all places, each once.
func (c *call) lock(s *Storage) {
	if len(c.places) == 1 {
		c.places[0].shard.mu.Lock()
		return
	}
	for _, i := range c.order() {
		s.shards[i].mu.Lock()
	}
}

func (c *call) unlock(s *Storage) {
	if len(c.places) == 1 {
		c.places[0].shard.mu.Unlock()
		return
	}
	for _, i := range c.order() {
		s.shards[i].mu.Unlock()
	}
}

func (c *call) order() (locked []uint8) {
	locked = make([]uint8, 0, len(c.places))
	for i := range c.places {
		locked = inOrder(locked, uint8(c.places[i].shard.index))
	}
	return locked
}

// inOrder puts the number of a shard among others, unless it is there. All calls lock shards in the order of their numbers,
// so that no two wait for each other.
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

// place is where the state of one identifier is.
type place struct {
	shard *shard
	tag   uint32
	id    string           // that of the entry, once there is one: a copy
	rules *storage.RuleSet // as many of the draws are this identifier's

	entry   *entry // nil when there is none
	counted bool   // there was none, and one more is counted as live
	made    bool   // by this call
}

// place sets where the identifier is, in place of a zero one.
func (s *Storage) place(p *place, name, id string, rules *storage.RuleSet) {
	h := hash(s.seed, name, id)
	p.shard, p.tag, p.id, p.rules = &s.shards[h>>56], uint32(h), id, rules
}

// begin locks the call's shards and loads the states of its draws.
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

// end stores what was taken, if anything, and leaves.
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

// leave gives back the room of identifiers that were not made, unlocks, and sweeps if it is time.
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

// locate finds the entries of the call and counts those that may have to be made. When they exceed
// the limit it counts none, and returns by how many.
func (s *Storage) locate(c *call) (need int64) {
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
	if over := s.live.Add(missing) - s.max; over > 0 && s.max > 0 {
		s.live.Add(-missing)
		return min(over, missing)
	}
	return 0
}

// findRoom looks for identifiers to remove, and reports whether it found as many as are needed.
func (s *Storage) findRoom(c *call, need int64) bool {
	w := s.sweep(c.name, c.clocked, c.now, sweepHalf, sweepHalf)
	s.walk(&w, func(mu *sync.Mutex) bool { mu.Lock(); return true })
	return int64(w.removed) >= need
}

// load reads the states of the place's draws, which begin at number from. It fails when the
// identifier would come to have too many buckets.
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

// store writes the states of the draws that took something. Where the entry has no cell for one,
// or one of another law, the entry gets the cells it needs.
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

// leftover is a bucket that the call does not name and that is not full.
type leftover struct {
	rule  law.Rule
	state law.State
}

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

// oldLaw says that a bucket which is asked for nothing keeps what it has as it was spent.
func oldLaw(d law.Draw) bool { return d.State.Law != nil && *d.State.Law != d.Rule.Law }

// relay lays the entry out anew, or makes it: the call's buckets, then the leftovers.
func (p *place) relay(c *call, from int) {
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
