package runtime

import "github.com/go-throttler/throttler/storage"

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

// find is the cell of the rule's bucket, or -1. The guess is nearly always right.
func (l *layout) find(r *storage.Rule, guess int) int {
	if guess < len(l.rules) && (&l.rules[guess] == r || l.rules[guess].SameBucket(r)) {
		return guess
	}
	for i := range l.rules {
		if l.rules[i].SameBucket(r) {
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
