package runtime

import "github.com/go-throttler/throttler/internal/law"

// all are the cells of the entry's n buckets.
func (e *entry) all(n int) []law.Cell {
	if n <= len(e.cells) {
		return e.cells[:n]
	}
	return e.more.cells
}

// resize gives the entry n cells that were never charged.
func (e *entry) resize(n int) {
	e.more = nil
	if n > len(e.cells) {
		e.more = &more{cells: make([]law.Cell, n)}
	}
	for i := range e.all(n) {
		e.all(n)[i] = law.NewCell()
	}
}

func (e *entry) cell(i int) *law.Cell { return &e.all(len(e.layout.rules.Rules))[i] }

// state reads cell i, into a zero State.
func (e *entry) state(i int, s *law.State) {
	c, l := e.cell(i), &e.layout.rules.Rules[i].Law
	var ok bool
	if *s, ok = c.State(l); !ok {
		*s = law.MakeState(l, c.Seen, e.more.holds[i])
	}
}

// set makes s the state of cell i, by the law of the layout.
func (e *entry) set(i int, s *law.State) {
	if !e.cell(i).Set(s) {
		e.spill(i, s.Holds())
	}
}

// spill keeps the holds of cell i outside of it. There is room for one more, so that a log seldom
// allocates.
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

// full reports whether all buckets of the entry are full, so that it may be forgotten.
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

// find is the cell of the rule's bucket, or -1. The guess is nearly always right.
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

// is reports whether the cells are those of the rules, by the same laws and in their order.
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
