package law

import "slices"

// Hold is N tokens that are out until End, in microseconds since the epoch. In a SlidingWindow they fade over one
// period more.
type Hold struct{ End, N int64 }

// State is what has been spent from one bucket. The zero State is that of a bucket never seen.
//
// The same type serves all kinds. A Continuous bucket has at most one hold, which is its level: N units of Law at the
// time Seen. Its End is a mark and usually 0. After a part of a reservation was given back it is the time at which the
// last of the calls behind that reservation has its turn (Refund).
type State struct {
	Law  *Law  // the law of its last change, whose kind and period every rule it is used with has; nil: never seen
	Seen int64 // when it was changed last

	// The holds, ordered by End. Up to two are in the state itself, so that copying a state copies nearly all states in
	// full. If there are more, many has all of them, and copies of the state share it.
	n    int
	few  [2]Hold
	many []Hold
}

// MakeState returns a state of the given holds, which must be ordered by End. More than two are not copied, and may be
// changed in place when something is taken.
func MakeState(law *Law, seen int64, holds []Hold) State {
	s := State{Law: law, Seen: seen}
	if s.n = copy(s.few[:], holds); s.n < len(holds) {
		s.many = holds
	}
	return s
}

// Holds returns the holds, by End. The result is part of the state.
func (s *State) Holds() []Hold {
	if s.many != nil {
		return s.many
	}
	return s.few[:s.n]
}

// Append adds a hold that ends after all others.
func (s *State) Append(h Hold) {
	if s.n < len(s.few) && s.many == nil {
		s.few[s.n] = h
		s.n++
		return
	}
	s.insert(len(s.Holds()), h)
}

// insert makes h hold i. It makes room for 8 holds when it moves from few to many, as a state with three will have
// more.
func (s *State) insert(i int, h Hold) {
	switch {
	case s.many != nil:
		s.many = slices.Insert(s.many, i, h)
	case s.n < len(s.few):
		copy(s.few[i+1:], s.few[i:s.n])
		s.few[i] = h
		s.n++
	default:
		s.many = slices.Insert(append(make([]Hold, 0, 8), s.few[:]...), i, h)
	}
}

// drop removes the holds from i up to but not including j.
func (s *State) drop(i, j int) {
	holds := s.Holds()
	n := i + copy(holds[i:], holds[j:])
	if s.n = n; s.many != nil {
		s.many = s.many[:n]
	}
}

// believable is step 1: it reports whether a state counts. One of another kind or period belongs to another bucket.
func (s *State) believable(l *Law, real int64) bool {
	return s.Law != nil && s.Seen <= real+l.Period+tolerance && s.Law.Same(l)
}

// open makes the state ready for a change under the rule (steps 1, 2 and the dropping of step 5), and returns the
// bucket's own time. It drops what is back already, counts a level in the units of the rule's law as it is now, and
// sets Seen.
func (s *State) open(r *Rule, real int64) (now int64) {
	if !s.believable(&r.Law, real) {
		*s = State{Law: &r.Law, Seen: real}
		return real
	}
	now = max(real, s.Seen)
	if r.Kind == Continuous {
		if s.few[0].N = s.drained(&r.Law, now); s.few[0].N == 0 {
			s.n = 0
		}
		if s.few[0].End <= now || s.n == 0 {
			s.few[0].End = 0
		}
	} else {
		s.dropDead(&r.Law, now)
	}
	s.Law, s.Seen = &r.Law, now
	return now
}

// spent is step 3: how many tokens are not back at the time now.
func (s *State) spent(r *Rule, now int64) (spent int64) {
	switch r.Kind {
	case Continuous:
		return ceil(s.drained(&r.Law, now), r.One)
	case SlidingWindow:
		for _, h := range s.Holds() {
			spent += r.unfaded(h, now)
		}
	case Replenish, FixedWindow, SlidingLog:
		at := int64(0)
		for _, h := range s.Holds() {
			if at = r.returns(h, at); at > now {
				spent += h.N
			}
		}
	}
	return spent
}

// back returns when spent, which is given as it is now, will have fallen to room: now, if it has already.
func (s *State) back(r *Rule, now, room, spent int64) int64 {
	if spent <= room {
		return now
	}
	if r.Kind == Continuous {
		return s.falls(&r.Law, room*r.One)
	}
	left, at := int64(0), int64(0) // what is out, less the holds looked at
	for _, h := range s.Holds() {
		left += h.N
	}
	for _, h := range s.Holds() {
		at = r.returns(h, at)
		if left -= h.N; left > room {
			continue
		}
		if r.Kind == SlidingWindow {
			return r.fades(h, room-left)
		}
		break
	}
	return at
}

// units returns the level at Seen in the units of a law. If that is not the state's own law, whose units may be of
// another size, the level is rounded up, and bounded so that it stays below 2^53.
func (s *State) units(l *Law) int64 {
	if s.n == 0 {
		return 0
	}
	n := s.few[0].N
	if s.Law.One == l.One {
		return n
	}
	whole, rest := n/s.Law.One, n%s.Law.One
	part, more := scale(rest, l.One, s.Law.One)
	if more {
		part++
	}
	if whole > (exact-1-part)/l.One {
		return exact - 1
	}
	return whole*l.One + part
}

// drained returns what is left of the level at the time now, in units of a law. It is 0 if all would be back under the
// law of the last change: a storage may have forgotten the state by then, and one that has not must answer alike.
func (s *State) drained(l *Law, now int64) int64 {
	if s.n > 0 && s.Law != l && *s.Law != *l && s.goneAt(s.Law) <= now {
		return 0
	}
	return l.drained(s.units(l), s.Seen, now)
}

// falls returns when the level will have fallen to so many units of a law.
func (s *State) falls(l *Law, units int64) int64 { return l.falls(s.units(l), s.Seen, units) }

// goneAt returns when the newest tokens that are out are gone under a law, to the last unit, or Seen if none are out. A
// hold of a SlidingWindow may count for no whole token any more before that.
func (s *State) goneAt(l *Law) int64 {
	holds := s.Holds()
	if len(holds) == 0 {
		return s.Seen
	}
	if l.Kind == Continuous {
		return s.falls(l, 0)
	}
	return holds[len(holds)-1].End + l.fade()
}

// dropDead drops the holds that are entirely gone.
func (s *State) dropDead(l *Law, now int64) {
	holds, dead := s.Holds(), 0
	for dead < len(holds) && holds[dead].End+l.fade() <= now {
		dead++
	}
	if dead > 0 {
		s.drop(0, dead)
	}
}

// level adds units to a Continuous state at its Seen.
func (s *State) level(units int64) {
	s.n = 1
	s.few[0].N += units
}

// Full reports whether the bucket is full at the time real, so that the state may be forgotten. A state whose Seen is
// ahead of the clock is not full, unless it counts as empty by step 1.
func (s *State) Full(real int64) bool { return s.FullAt(real) <= real }

// FullAt returns a time from which on the bucket is full if nobody takes, whatever its capacity and refill are by then:
// the last hold is gone, or the level is empty under the state's own law. It returns real if there is nothing to wait
// for.
func (s *State) FullAt(real int64) int64 {
	if s.Law == nil || !s.believable(s.Law, real) {
		return real
	}
	at := s.goneAt(s.Law)
	if len(s.Holds()) == 0 || at <= real {
		return max(real, s.Seen)
	}
	return at
}
