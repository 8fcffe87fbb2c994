package law

import (
	"cmp"
	"math"
	"slices"
)

// Amount is N tokens of one bucket, all of which are back In microseconds from now by themselves.
// It is how consumption crosses stores: durations do, timestamps never. A negative N gives back.
type Amount struct{ N, In int64 }

// Clamp returns a in the bounds that all storages compute with, 2^53 tokens and 2^50 µs, which are
// more than any bucket holds and any token is out.
func (a Amount) Clamp() Amount {
	return Amount{max(-exact, min(a.N, exact)), max(0, min(a.In, farFuture))}
}

// Apply charges or refunds an amount, and reports whether the state is to be kept: not if there was nothing to do.
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

// Charge adds a.N tokens that come back in a.In by themselves, whatever the state is; both are 0
// or more. Nothing is left of an amount whose time has passed, and consumption saturates at
// Rule.Ceiling. An end snaps to the nearest multiple of the period (FixedWindow, SlidingWindow),
// rounds up to the grain (SlidingLog), and within half a period of the last hold joins it
// (Replenish, which therefore may hold a few for a while).
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

// received is the hold of an amount from another store, whose clock may differ.
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

// Refund gives back a.N tokens that a decision took and that are all gone in a.In by themselves (Count.HeldFor): from
// the hold that the decision made, and if that has fewer from the nearest to it. What is farther
// off than the way between two clocks can explain is another's and stays: half a period, in a
// SlidingLog a 256th. A Continuous bucket gets back what has not drained since, to within a tick's refill; and
// nothing if its refill was raised meanwhile, as it is not known how long that was so.
//
// A reservation that is given back before its time gives less by what was taken after it. Those behind it keep their time,
// so another one in its place could come at the same moment as they. Once such a part was given back, it is not known who is
// behind whom until the last of them has had its turn: until then nothing more is.
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
	want, far := real+min(a.In, farFuture)-r.fade(), ceil(r.Period, 2)
	if r.Kind == SlidingLog {
		far = ceil(r.Period, logEntries) + r.Grain
	}
	for n > 0 && len(s.Holds()) > 0 {
		holds, made := s.Holds(), 0
		for i, h := range holds {
			if abs(h.End-want) <= abs(holds[made].End-want) {
				made = i
			}
		}
		if abs(holds[made].End-want) > far {
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

// giveBack gives a level n tokens back that are all gone in a given time.
func (s *State) giveBack(r *Rule, n, in, now int64) {
	units, level := s.units(&r.Law), s.drained(&r.Law, now)
	s.Law = &r.Law
	left, ticks := r.leftOf(n, in), ceil(min(in, farFuture), r.Tick)
	if ticks >= ceil(r.Capacity*r.One, r.Drain) { // its time has not come
		switch after := r.drained(level, 0, ticks*r.Tick); { // what was taken later, or up to a tick's refill less
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

// Debt is everything spent and not yet returned, as the curve of what is still held over the time
// to come, under the law of r: tokens and the time until they are back. Continuous: the level,
// rounded up to tokens, with the time until it is empty, which tells the level to within a tick's
// refill. It is nil for a full bucket.
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

// Raise lifts what is spent to at least the given debt of another store: the pointwise maximum of
// the two curves, so that raising twice is raising once. Ends arrive as in Charge.
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

// highest walks the ends of two lists of holds downwards. At each, what is held from there on is
// the larger of the two sums; the hold there is what later ends do not already hold.
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
