package runtime

import "github.com/go-throttler/throttler/internal/law"

// The cells of an entry. The layout, which many entries share, says which bucket and law each cell has. So an entry
// itself is only 80 bytes: its identifier, the layout, two cells, and a pointer to more.

// all returns the cells of an entry that has n buckets: its own two, or all of them in more.
func (e *entry) all(n int) []law.Cell {
	if n <= len(e.cells) {
		return e.cells[:n]
	}
	return e.more.cells
}

// resize gives the entry n cells that were never charged, in place of all that it had.
func (e *entry) resize(n int) {
	e.more = nil
	if n > len(e.cells) {
		e.more = &more{cells: make([]law.Cell, n)}
	}
	for i := range e.all(n) {
		e.all(n)[i] = law.NewCell()
	}
}

// cell returns cell i.
func (e *entry) cell(i int) *law.Cell { return &e.all(len(e.layout.rules.Rules))[i] }

// state reads the state of cell i into the zero *s. If its holds do not fit into a cell they are in more, and the state
// shares their memory.
func (e *entry) state(i int, s *law.State) {
	c, l := e.cell(i), &e.layout.rules.Rules[i].Law
	var ok bool
	if *s, ok = c.State(l); !ok {
		*s = law.MakeState(l, c.Seen, e.more.holds[i])
	}
}

// set makes s the state of cell i. The state's law must be that of the layout.
func (e *entry) set(i int, s *law.State) {
	if !e.cell(i).Set(s) {
		e.spill(i, s.Holds())
	}
}

// spill keeps the holds of cell i outside of it. It leaves room for one more, in which the next decision inserts its
// hold in place. So a log that grows seldom allocates.
func (e *entry) spill(i int, holds []law.Hold) {
	if e.more == nil {
		e.more = &more{}
	}
	for len(e.more.holds) <= i {
		e.more.holds = append(e.more.holds, nil)
	}
	kept := append(e.more.holds[i][:0], holds...)
	if len(kept) == cap(kept) {
		kept = append(kept, law.Hold{})[:len(kept)]
	}
	e.more.holds[i] = kept
}

// full reports whether all buckets of the entry are full at the time now, so that it may be forgotten. A cell that
// cannot tell, because of a clock that stepped back or of holds outside of it, is read as a State.
func (e *entry) full(now int64) bool {
	for i := range e.layout.rules.Rules {
		full, known := e.cell(i).Full(&e.layout.rules.Rules[i].Law, now)
		if !known {
			var s law.State
			e.state(i, &s)
			full = s.Full(now)
		}
		if !full {
			return false
		}
	}
	return true
}

// find returns the number of the cell of the rule's bucket, or -1. The guess is the rule's own place in its request,
// which is nearly always right.
func (l *layout) find(r *law.Rule, guess int) int {
	own := l.rules.Rules
	if guess < len(own) && own[guess].SameBucket(r) {
		return guess
	}
	for i := range own {
		if own[i].SameBucket(r) {
			return i
		}
	}
	return -1
}

// is reports whether the cells are those of the rules, under the same laws and in the same order. Capacities may
// differ: they are not part of what is stored.
func (l *layout) is(rules *law.RuleSet) bool {
	if len(l.rules.Rules) != len(rules.Rules) {
		return false
	}
	for i := range rules.Rules {
		if own, r := &l.rules.Rules[i], &rules.Rules[i]; own.Name != r.Name || own.Law != r.Law {
			return false
		}
	}
	return true
}
