package runtime

import (
	"slices"

	"github.com/go-throttler/throttler/storage"
)

// cell is the state of one bucket in three numbers, by the kind of its law:
//
//	Replenish, FixedWindow, SlidingLog  the one hold (a its End, b its N), or none (b is 0)
//	Continuous                          b is the level
//	SlidingWindow                       b ends at the first multiple of the period after seen, a one before
//
// A cell never charged has seen -1; one whose holds do not fit has b -1, and they are in more.
type cell struct{ seen, a, b int64 }

const (
	never   = -1
	outside = -1
)

func (e *entry) cell(i int) *cell {
	if i < len(e.cells) {
		return &e.cells[i]
	}
	return &e.more.cells[i-len(e.cells)]
}

// resize gives the entry n cells that were never charged.
func (e *entry) resize(n int) {
	e.more = nil
	if n > len(e.cells) {
		e.more = &more{cells: make([]cell, n-len(e.cells))}
	}
	for i := range n {
		*e.cell(i) = cell{seen: never}
	}
}

// state reads cell i, in place of a zero State.
func (e *entry) state(i int, s *storage.State) {
	c, law := e.cell(i), &e.layout.rules[i].Law
	if c.seen == never {
		return
	}
	s.Law, s.Seen = law, c.seen
	switch {
	case c.b == outside:
		*s = storage.MakeState(law, c.seen, e.more.holds[i])
	case law.Kind == storage.SlidingWindow:
		end := c.seen - c.seen%law.Period + law.Period
		if c.a > 0 {
			s.Append(storage.Hold{End: end - law.Period, N: c.a})
		}
		if c.b > 0 {
			s.Append(storage.Hold{End: end, N: c.b})
		}
	case c.b > 0:
		s.Append(storage.Hold{End: c.a, N: c.b})
	}
}

// set makes s the state of cell i, whose law is that of the layout.
func (e *entry) set(i int, s *storage.State) {
	c, law, holds := e.cell(i), &e.layout.rules[i].Law, s.Holds()
	*c = cell{seen: s.Seen}
	switch {
	case law.Kind == storage.SlidingWindow:
		end := s.Seen - s.Seen%law.Period + law.Period
		for _, h := range holds {
			switch h.End {
			case end - law.Period:
				c.a = h.N
			case end:
				c.b = h.N
			default:
				e.spill(i, c, holds)
				return
			}
		}
	case len(holds) == 1:
		c.a, c.b = holds[0].End, holds[0].N
	case len(holds) > 1:
		e.spill(i, c, holds)
	}
}

// spill keeps the holds of cell i outside of it. There is room for one more, so that a log seldom
// allocates.
func (e *entry) spill(i int, c *cell, holds []storage.Hold) {
	c.b = outside
	if e.more == nil {
		e.more = &more{}
	}
	for len(e.more.holds) <= i {
		e.more.holds = append(e.more.holds, nil)
	}
	kept := append(e.more.holds[i][:0], holds...)
	if len(kept) == cap(kept) {
		kept = append(kept, storage.Hold{})[:len(kept)]
	}
	e.more.holds[i] = kept
}

// full reports whether all buckets of the entry are full, so that it may be forgotten.
func (e *entry) full(now int64) bool {
	for i := range e.layout.rules {
		var s storage.State
		if e.state(i, &s); !s.Full(now) {
			return false
		}
	}
	return true
}

// find is the cell of the bucket of that name, or -1. The guess is nearly always right.
func (l *layout) find(r *storage.Rule, guess int) int {
	if guess < len(l.rules) && (&l.rules[guess] == r || l.rules[guess].Name == r.Name) {
		return guess
	}
	for i := range l.rules {
		if l.rules[i].Name == r.Name {
			return i
		}
	}
	return -1
}

// is reports whether the cells are those of the rules, by the same laws and in their order.
func (l *layout) is(rules []storage.Rule) bool {
	if len(l.rules) != len(rules) {
		return false
	}
	for i := range rules {
		if own, r := &l.rules[i], &rules[i]; own != r && (own.Name != r.Name || own.Law != r.Law) {
			return false
		}
	}
	return true
}

// load reads the states of the place's draws, which begin at number from. It fails when the
// identifier would come to have too many buckets.
func (p *place) load(c *call, from int) error {
	if p.entry == nil {
		return nil
	}
	e, extra := p.entry, 0
	for j := range p.rules {
		d := &c.draws[from+j]
		if i := e.layout.find(d.Rule, j); i >= 0 {
			e.state(i, &d.State)
		} else {
			extra++
		}
	}
	if extra > 0 && extra+len(e.layout.rules) > storage.MaxBuckets {
		return storage.TooManyBuckets(p.rules, len(p.rules)+len(p.leftovers(c, from)))
	}
	return nil
}

// store writes the states of the draws that took something. Where the entry has no cell for one,
// or one of another law, the entry gets the cells it needs.
func (p *place) store(c *call, from int) {
	for j := range p.rules {
		d := &c.draws[from+j]
		if d.Cost == 0 || d.State.Law == nil {
			continue
		}
		if p.entry == nil {
			p.relay(c, from)
			return
		}
		i := p.entry.layout.find(d.Rule, j)
		if i < 0 || &p.entry.layout.rules[i].Law != d.State.Law && p.entry.layout.rules[i].Law != *d.State.Law {
			p.relay(c, from)
			return
		}
		p.entry.set(i, &d.State)
	}
}

// leftover is a bucket that the call does not name and that is not full.
type leftover struct {
	rule  storage.Rule
	state storage.State
}

func (p *place) leftovers(c *call, from int) (out []leftover) {
	if p.entry == nil {
		return nil
	}
next:
	for i := range p.entry.layout.rules {
		rule := p.entry.layout.rules[i]
		for j := range p.rules {
			if c.draws[from+j].Rule.Name == rule.Name {
				continue next
			}
		}
		var s storage.State
		if p.entry.state(i, &s); !s.Full(c.now) {
			out = append(out, leftover{rule, s})
		}
	}
	return out
}

// oldLaw says that a bucket which is asked for nothing keeps what it has as it was spent.
func oldLaw(d storage.Draw) bool { return d.State.Law != nil && *d.State.Law != d.Rule.Law }

// relay lays the entry out anew, or makes it: the call's buckets, then the leftovers.
func (p *place) relay(c *call, from int) {
	rules, rest := p.rules, p.leftovers(c, from)
	if len(rest) > 0 || slices.ContainsFunc(c.draws[from:from+len(p.rules)], oldLaw) {
		rules = slices.Clone(p.rules)
		for j := range rules {
			if d := &c.draws[from+j]; oldLaw(*d) {
				rules[j].Law = *d.State.Law
			}
		}
		for _, l := range rest {
			rules = append(rules, l.rule)
		}
	}
	l := p.shard.use(c.name, c.clocked, rules)
	if p.entry == nil {
		p.entry, p.made = p.shard.add(p.tag, p.id, l), true
	} else {
		p.shard.release(p.entry.layout)
		p.entry.layout = l
		p.entry.resize(len(l.rules))
	}
	for j := range p.rules {
		if d := &c.draws[from+j]; d.State.Law != nil {
			p.entry.set(j, &d.State)
		}
	}
	for k := range rest {
		p.entry.set(len(p.rules)+k, &rest[k].state)
	}
}
