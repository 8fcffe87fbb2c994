package law

import (
	"cmp"
	"math"
	"slices"
)

// Amount is N tokens of one bucket, all of which are back by themselves In microseconds from now. A negative N gives
// tokens back. Consumption crosses from one store to another in this form, as durations and never as points in time,
// because the clocks of the stores may differ.
type Amount struct{ N, In int64 }

// Clamp returns a within the bounds in which all storages compute: 2^53 tokens either way, and 0 to 2^50 µs. No bucket
// holds more tokens, and no token is out longer.
func (a Amount) Clamp() Amount {
	return Amount{max(-exact, min(a.N, exact)), max(0, min(a.In, farFuture))}
}

// Apply charges or refunds an amount. It returns false if there was nothing to do, and then the state need not be
// stored.
func (s *State) Apply(r *Rule, a Amount, real int64) bool {
	switch {
	case a.N > 0:
		s.Charge(r, a, real)
		return true
	case a.N < 0 && s.Law != nil:
		s.Refund(r, Amount{-a.Clamp().N, a.In}, real)
		return true
	}
	return false
}

// Charge adds a.N tokens that come back by themselves in a.In, whatever the state is; both are 0 or more. Nothing is
// left of an amount whose time has passed, and no more than Rule.Ceiling is ever out.
//
// The ends of amounts from another store do not quite fit those of this one, because they took time to arrive. So an
// end is moved to the nearest multiple of the period (FixedWindow, SlidingWindow), is rounded up to the grain
// (SlidingLog), or is that of the last hold if it is within half a period of it (Replenish, which may have several
// holds for a while if not).
func (s *State) Charge(r *Rule, a Amount, real int64) {
	now := s.open(r, real)
	n := min(a.N, r.Ceiling()-s.spent(r, now))
	if n <= 0 || a.In <= 0 {
		return
	}
	if r.Kind == Continuous {
		s.level(r.leftOf(n, a.In))
		return
	}
	if h := s.received(now, Amount{n, a.In}); h.End+r.fade() > now {
		holds, i := s.Holds(), 0
		for i < len(holds) && holds[i].End < h.End {
			i++
		}
		if i < len(holds) && holds[i].End == h.End {
			holds[i].N += n
		} else {
			s.insert(i, h)
		}
	}
}

// received returns the hold of an amount from another store, whose clock may differ: its End, moved as Charge says.
func (s *State) received(now int64, a Amount) Hold {
	l := s.Law
	end := now + min(a.In, farFuture) - l.fade()
	switch l.Kind {
	case FixedWindow, SlidingWindow:
		end = max(0, end+l.Period/2) / l.Period * l.Period
	case SlidingLog:
		end = roundUp(end, l.Grain)
	case Replenish:
		holds := s.Holds()
		if k := len(holds); k > 0 && abs(holds[k-1].End-end) < ceil(l.Period, 2) {
			end = holds[k-1].End
		}
	}
	return Hold{end, a.N}
}

// Refund gives back a.N tokens that a decision took and that are all gone by themselves in a.In, which is Count.HeldFor
// less the time since then.
//
// It takes them from the hold that the decision made, and if that has fewer, from the nearest holds. A refund takes time
// on its way, so its hold ends at the time that is looked for or earlier. One that ends over half a period earlier
// belongs to another call and is left alone. So is one that ends over half a period later, which skew of clocks could
// explain, and in a SlidingLog over a 256th of it and a grain. In a busy log another call's hold may be the nearest. Its
// end is off by at most twice the time on the way.
//
// A Continuous bucket gets back what has not drained since, to within a tick's refill. It gets nothing back if its refill
// was raised in the meantime, because nobody knows since when.
//
// A reservation that is given back before its time gives back less, by what was taken after it. The calls behind it
// keep their times, so another reservation in its place could be used at the same moment as one of these. Once a part
// was given back in this way, nobody knows which call is behind which until the last of them has had its turn. Until
// then no further reservation is given back.
func (s *State) Refund(r *Rule, a Amount, real int64) {
	if a.N <= 0 || a.In <= 0 || s.Law == nil || !s.Law.Same(&r.Law) {
		return
	}
	now, n := max(real, s.Seen), a.N
	if r.Kind == Continuous {
		if s.Law.Refill > r.Refill {
			return
		}
		s.giveBack(r, min(n, (exact-1)/r.One), a.In, now)
		return
	}
	s.dropDead(&r.Law, now)
	want, before := real+min(a.In, farFuture)-r.fade(), ceil(r.Period, 2)
	after := before
	if r.Kind == SlidingLog {
		after = ceil(r.Period, logEntries) + r.Grain
	}
	for n > 0 {
		holds, made := s.Holds(), -1
		for i, h := range holds {
			if d := h.End - want; -d <= before && d <= after && (made < 0 || abs(d) <= abs(holds[made].End-want)) {
				made = i
			}
		}
		if made < 0 {
			return
		}
		if n < holds[made].N {
			holds[made].N -= n
			return
		}
		n -= holds[made].N
		s.drop(made, made+1)
	}
}

// giveBack gives a level back n tokens that are all gone in the time in. Tokens drain in the order in which they were
// taken. So whatever is left of the level when these n are gone was taken after them.
func (s *State) giveBack(r *Rule, n, in, now int64) {
	units, level := s.units(&r.Law), s.drained(&r.Law, now)
	s.Law = &r.Law
	left, ticks := r.leftOf(n, in), ceil(min(in, farFuture), r.Tick)
	if ticks >= ceil(r.Capacity*r.One, r.Drain) { // more than a full bucket: a reservation whose time has not come
		switch after := r.drained(level, 0, ticks*r.Tick); { // what was taken after it, or up to a tick's refill less
		case s.few[0].End > now:
			left = 0
		case after > 0:
			if left = max(0, left-after-2*r.Drain); left > 0 {
				s.few[0].End = r.falls(units, s.Seen, r.Capacity*r.One)
			}
		}
	}
	s.few[0].N = units - min(level, left)
}

// Debt returns everything that is spent and not back at the time real, under the law of r: amounts of tokens, each with
// the time until it is back. Together they are the curve of what is still out as time passes. A Continuous bucket has
// one amount: its level, rounded up to tokens, with the time until it is empty, which tells the level to within a
// tick's refill. Debt is nil for a full bucket. It does not change the state.
func (s State) Debt(r *Rule, real int64) []Amount {
	s.many = slices.Clone(s.many)
	now := s.open(r, real)
	if r.Kind == Continuous {
		if n := s.spent(r, now); n > 0 {
			return []Amount{{n, s.back(r, now, 0, n) - now}}
		}
		return nil
	}
	var out []Amount
	for _, h := range s.Holds() {
		out = append(out, Amount{h.N, h.End + r.fade() - now})
	}
	return out
}

// Raise increases what is spent to at least the debt of another store. The result is the maximum of the two curves at
// each point in time, so raising twice is raising once, and nothing is lowered. Ends are moved as Charge moves them.
func (s *State) Raise(r *Rule, debt []Amount, real int64) {
	now := s.open(r, real)
	var theirs []Hold
	for _, a := range debt {
		a.N = min(a.N, r.Ceiling())
		switch {
		case a.N <= 0 || a.In <= 0:
		case r.Kind == Continuous:
			s.level(max(0, r.leftOf(a.N, a.In)-s.units(&r.Law)))
		default:
			if h := s.received(now, a); h.End+r.fade() > now {
				theirs = append(theirs, h)
			}
		}
	}
	if len(theirs) > 0 {
		*s = MakeState(s.Law, s.Seen, highest(s.Holds(), theirs, r.Ceiling()))
	}
}

// highest returns the maximum of two lists of holds; it counts no more than most tokens of theirs. It walks the ends of
// both lists from the last to the first. At each end, what is out until then is the larger of the two sums so far, and
// the hold with that end has what the holds with later ends do not account for already.
func highest(own, theirs []Hold, most int64) []Hold {
	slices.SortFunc(theirs, func(a, b Hold) int { return cmp.Compare(a.End, b.End) })
	var out []Hold
	var held, ours, others int64
	for i, j := len(own)-1, len(theirs)-1; i >= 0 || j >= 0; {
		end := int64(math.MinInt64)
		if i >= 0 {
			end = own[i].End
		}
		if j >= 0 {
			end = max(end, theirs[j].End)
		}
		for ; i >= 0 && own[i].End == end; i-- {
			ours += own[i].N
		}
		for ; j >= 0 && theirs[j].End == end; j-- {
			others = min(most, others+theirs[j].N)
		}
		if n := max(ours, others) - held; n > 0 {
			out = append(out, Hold{end, n})
			held += n
		}
	}
	slices.Reverse(out)
	return out
}
