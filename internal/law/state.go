package law

import "slices"

// Hold is N tokens that are out until End, and in a SlidingWindow fade over one more period.
type Hold struct{ End, N int64 }

// State is what has been spent from one bucket. The zero State is that of a bucket never seen.
type State struct {
	Law  *Law  // by which it was changed last: of the kind and period of every rule that it is used with; nil: never seen
	Seen int64 // when it was changed last

	// By End. Continuous: at most one, with N units of Law at Seen; its End is 0, or when the last turn comes of those who were
	// behind a reservation that was given back in part. The first two are
	// in the state itself, which so can be copied; more are all in many.
	n    int
	few  [2]Hold
	many []Hold
}

// MakeState returns a state of the given holds, ordered by End. More than two are not copied, and
// may be changed in place when something is taken.
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

// Append adds the hold that ends last.
func (s *State) Append(h Hold) {
	if s.n < len(s.few) && s.many == nil {
		s.few[s.n] = h
		s.n++
		return
	}
	s.insert(len(s.Holds()), h)
}

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

// drop removes holds i to j.
func (s *State) drop(i, j int) {
	holds := s.Holds()
	n := i + copy(holds[i:], holds[j:])
	if s.n = n; s.many != nil {
		s.many = s.many[:n]
	}
}

// believable is step 1. A state of another kind or period is another bucket's.
func (s *State) believable(l *Law, real int64) bool {
	return s.Law != nil && s.Seen <= real+l.Period+tolerance && s.Law.Same(l)
}

// open makes the state ready for a change by the rule, and returns the bucket's own time.
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

// spent is step 3: what has not come back at now.
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

// back is the moment when spent, now as given, will have fallen to room.
func (s *State) back(r *Rule, now, room, spent int64) int64 {
	if spent <= room {
		return now
	}
	if r.Kind == Continuous {
		return s.falls(&r.Law, room*r.One)
	}
	left, at := int64(0), int64(0)
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

// units is the level at Seen in the units of a law. Under another law than that of the state it is rounded up.
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

// drained is what is left of the level at now: nothing, if all had come back by the law under which it was changed last.
func (s *State) drained(l *Law, now int64) int64 {
	if s.n > 0 && s.Law != l && *s.Law != *l && s.goneAt(s.Law) <= now {
		return 0
	}
	return l.drained(s.units(l), s.Seen, now)
}

// falls is when the level will have fallen to so many units.
func (s *State) falls(l *Law, units int64) int64 { return l.falls(s.units(l), s.Seen, units) }

// goneAt is when the newest of what is out is gone, to the last unit.
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

// Full reports whether the bucket is full at the time real, so that the state may be forgotten. One
// that is ahead of the clock is not, unless it is empty by step 1.
func (s *State) Full(real int64) bool { return s.FullAt(real) <= real }

// FullAt is a time at which the bucket is full if nobody takes, whatever its capacity and refill are by then: the last
// hold is gone, or the level by the law that it has. It is the time real if there is nothing to wait for.
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
