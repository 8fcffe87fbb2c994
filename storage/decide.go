package storage

import (
	"cmp"
	"math"
	"slices"
)

// The arithmetic. Taking a token is a hold that ends, and five kinds are one table:
//
//	kind           a token's hold ends at            it joins                         then
//	Replenish      now + P                           the last hold while that lives   all back at once
//	FixedWindow    the next multiple of P            the hold of that or a later end  all back at once
//	SlidingWindow  the next multiple of P            the hold of that or a later end  fades evenly over the next P
//	SlidingLog     now + P, rounded up to the grain  the hold of that or a later end  back one by one
//	Continuous     -                                 one level                        drains Refill a P
//
// The steps of a decision are numbered; other implementations (a Lua script, an SQL function)
// carry the same numbers:
//
//  1. No state, or one seen later than the real time by more than one period plus 60 s: empty.
//     A clock that steps back less never refills a state; more costs at most one extra capacity,
//     once. The period is that of the law it was spent under. A storage may have forgotten a full
//     state before the clock stepped back: then it is full.
//  2. now = max(real, seen): time never runs backwards for a bucket.
//  3. Spent, in tokens rounded up, by the law they were spent under.
//  4. Admit if spent + cost <= capacity in every bucket that is asked for more than 0.
//  5. Admitted: in each such bucket convert to the rule's law, drop dead holds, add the cost.
//
// All times are microseconds since the epoch. All numbers are integers below 2^53.
//
// RetryAfter is exact: the same call a microsecond earlier is refused, at it admitted, if nobody else
// takes. One case is left out: several buckets, of which one is empty by step 1 when another refuses.
// As the refusal changes nothing, the first is believed again once the clock has caught up, unless it
// was forgotten meanwhile.

// Hold is N tokens that are out until End, and in a SlidingWindow fade over one more period.
type Hold struct{ End, N int64 }

// State is what has been spent from one bucket. The zero State is that of a bucket never seen.
type State struct {
	Law  *Law  // the law it was spent under, not always that of the latest rule; nil: never seen
	Seen int64 // when it was last changed

	// By End. Continuous: at most one, with N units of Period/Tick a token at Seen. The first two are
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

// clear removes all holds.
func (s *State) clear() { s.n, s.few[0], s.many = 0, Hold{}, nil }

// Draw is one bucket in a decision.
type Draw struct {
	Rule  *Rule
	Cost  int64
	State State // changed when something is taken
	Count Count // set by Decide

	spent int64 // steps 1 to 3
}

// Decide answers one request: whether the buckets of all draws admit their costs at the time
// real. If so, and unless mode is Peek, it takes them all; otherwise it changes no state. The
// counts of a refusal tell what is, those of an admission what is after it. Costs are 0 or more,
// and at most the capacity unless mode is Force.
func Decide(mode Mode, real int64, draws []Draw) bool {
	allowed := true
	for i := range draws {
		d := &draws[i]
		d.spent = 0
		if d.State.believable(real) { // 1
			d.spent = d.State.spent(max(real, d.State.Seen)) // 2, 3
		}
		if d.Cost > d.Rule.Capacity-d.spent && d.Cost > 0 && mode != Force { // 4
			allowed = false
		}
	}
	for i := range draws {
		switch d := &draws[i]; {
		case !allowed || d.Cost == 0:
			d.look(real)
		case mode == Peek:
			peeked := *d
			peeked.State.many = slices.Clone(d.State.many)
			peeked.take(real)
			d.Count = peeked.Count
		default:
			d.take(real)
		}
	}
	return allowed
}

// look counts what is.
func (d *Draw) look(real int64) {
	s := &d.State
	if !s.believable(real) {
		s = &State{Law: &d.Rule.Law, Seen: real}
	}
	now, capacity := max(real, s.Seen), d.Rule.Capacity
	d.Count = Count{Remaining: max(0, capacity-d.spent), ResetAfter: s.back(now, 0, d.spent) - real}
	d.Count.NextAfter = s.next(now, capacity, d.spent) - real
	if d.Cost > 0 && d.Cost > capacity-d.spent {
		d.Count.RetryAfter = s.back(now, capacity-d.Cost, d.spent) - real
	}
}

// take is step 5. What would exceed 4 capacities is not recorded.
func (d *Draw) take(real int64) {
	s, r := &d.State, d.Rule
	now := s.open(r, real)
	cost := min(d.Cost, max(0, 4*r.Capacity-d.spent))
	if r.Kind == Continuous {
		s.level(cost * r.one())
	} else if cost > 0 {
		end, holds := r.end(now), s.Holds()
		if k := len(holds); k > 0 && (r.Kind == Replenish || holds[k-1].End >= end) {
			holds[k-1].N += cost
		} else {
			s.insert(k, Hold{end, cost})
		}
	}
	spent := d.spent + cost
	d.Count = Count{Remaining: max(0, r.Capacity-spent), ResetAfter: s.back(now, 0, spent) - real}
	d.Count.NextAfter = s.next(now, r.Capacity, spent) - real
}

// next is the moment when one token more than now may be taken from a bucket of this capacity, or now if it is full.
func (s *State) next(now, capacity, spent int64) int64 {
	return s.back(now, max(0, min(spent, capacity)-1), spent)
}

// open makes the state ready for a change under the law of r, and returns the bucket's own time.
func (s *State) open(r *Rule, real int64) (now int64) {
	if !s.believable(real) {
		*s = State{Law: &r.Law, Seen: real}
		return real
	}
	now = max(real, s.Seen)
	s.convert(r, now)
	return now
}

// believable is step 1.
func (s *State) believable(real int64) bool {
	return s.Law != nil && s.Seen <= real+s.Law.Period+tolerance
}

// Full reports whether the bucket is full at the time real, so that the state may be forgotten. One
// that is ahead of the clock is not, unless it is empty by step 1.
func (s *State) Full(real int64) bool {
	return !s.believable(real) || s.Seen <= real && s.units(real) == 0
}

// FullAt is when the bucket is full if nobody takes, or the time real if it is.
func (s *State) FullAt(real int64) int64 {
	if !s.believable(real) {
		return real
	}
	now := max(real, s.Seen)
	return s.back(now, 0, s.spent(now))
}

// one is the number of units of a token.
func (l *Law) one() int64 {
	if l.Kind == Continuous || l.Kind == SlidingWindow {
		return l.ticks(l.Period)
	}
	return 1
}

// ticks is floor(t / Tick).
func (l *Law) ticks(t int64) int64 {
	if l.Tick == 1 {
		return t
	}
	return t / l.Tick
}

// fade is how long after its End a hold is gone.
func (l *Law) fade() int64 {
	if l.Kind == SlidingWindow {
		return l.Period
	}
	return 0
}

// end is when the hold of a token taken now ends.
func (l *Law) end(now int64) int64 {
	switch l.Kind {
	case FixedWindow, SlidingWindow:
		return now - now%l.Period + l.Period
	case SlidingLog:
		return roundUp(now+l.Period, l.Grain)
	}
	return now + l.Period
}

// units is what has not come back at now.
func (s *State) units(now int64) int64 {
	l, u := s.Law, int64(0)
	for _, h := range s.Holds() {
		switch {
		case l.Kind == Continuous:
			if dt := l.ticks(now) - l.ticks(s.Seen); dt < ceil(h.N, l.Refill) {
				u = h.N - l.Refill*dt
			}
		case l.Kind == SlidingWindow:
			u += h.N * min(l.one(), max(0, l.ticks(h.End+l.Period)-l.ticks(now)))
		case h.End > now:
			u += h.N
		}
	}
	return u
}

// spent is units in tokens, rounded up.
func (s *State) spent(now int64) int64 { return ceil(s.units(now), s.Law.one()) }

// back is the moment when spent, now as given, will have fallen to room.
func (s *State) back(now, room, spent int64) int64 {
	if spent <= room {
		return now
	}
	l, left := s.Law, int64(0)
	if l.Kind == Continuous {
		return (l.ticks(s.Seen) + ceil(s.few[0].N-room*l.one(), l.Refill)) * l.Tick
	}
	for _, h := range s.Holds() {
		left += h.N
	}
	for _, h := range s.Holds() {
		if left -= h.N; left > room {
			continue
		}
		if l.Kind == SlidingWindow {
			return h.End + l.Period - (room-left)*l.one()/h.N*l.Tick
		}
		return h.End
	}
	return now
}

// convert brings the state to now under the law of a rule. Under its own law dead holds are
// dropped. Under another ("what was spent stays spent") the spent tokens, rounded up, become one
// hold or one level as if taken now, coming back no earlier than before.
//
// A SlidingWindow's holds must end at multiples of the period, and there a hold is rounded down,
// to less than a new period before, but not before that of a token taken now. Rounded up, a caller
// that alternates between periods of 7 s and 10 s would move the end forward with every call.
func (s *State) convert(r *Rule, now int64) {
	law := &r.Law
	same := s.Law == law || *s.Law == *law
	if same && law.Kind != Continuous {
		s.Law, s.Seen = law, now
		s.dropDead(now)
		return
	}
	u, old := s.units(now), s.Law.one()
	var end int64
	if law.Kind != Continuous && u > 0 {
		end = s.back(now, 0, 1)
		if law.Kind == SlidingWindow {
			end = max(0, end-law.Period) / law.Period * law.Period
		}
		end = max(end, law.end(now))
	}
	s.Law, s.Seen = law, now
	s.clear()
	spent := min(ceil(u, old), 4*r.Capacity)
	switch {
	case u == 0:
	case law.Kind != Continuous:
		s.insert(0, Hold{end, spent})
	case same:
		s.level(u)
	case old == law.one():
		s.level(min(u, spent*old))
	default:
		s.level(spent * law.one())
	}
}

func (s *State) dropDead(now int64) {
	l, holds, dead := s.Law, s.Holds(), 0
	for dead < len(holds) && l.ticks(holds[dead].End+l.fade()) <= l.ticks(now) {
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

// Charge adds a.N tokens that come back in a.In by themselves, whatever the state is; both are 0
// or more. Nothing is left of an amount whose time has passed, and consumption saturates at 4
// capacities. An end snaps to the nearest multiple of the period (FixedWindow, SlidingWindow),
// rounds up to the grain (SlidingLog), and within half a period of the last hold joins it
// (Replenish, which therefore may hold a few for a while).
func (s *State) Charge(r *Rule, a Amount, real int64) {
	now := s.open(r, real)
	n := min(a.N, 4*r.Capacity-s.spent(now))
	if n <= 0 || a.In <= 0 {
		return
	}
	if r.Kind == Continuous {
		s.level(r.drained(n, a.In))
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

// drained is how many units a Continuous level has that n tokens left and that is empty in a
// given time: to within a tick's refill, n tokens less what has come back.
func (l *Law) drained(n, in int64) int64 {
	in = min(in, farFuture)
	if all := n * l.one(); ceil(in, l.Tick) >= ceil(all, l.Refill) {
		return all
	}
	return ceil(in, l.Tick) * l.Refill
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

// Refund gives back a.N tokens that a decision by r took and that come back in a.In by themselves:
// from the hold that the decision made, and if that has fewer from the nearest to it. What is farther
// off than the way between two clocks can explain is another's and stays: half a period, in a
// SlidingLog a 256th. Under another law, where the hold was converted, the newest holds give. A
// Continuous bucket gets back what has not drained since, to within a tick's refill.
func (s *State) Refund(r *Rule, a Amount, real int64) {
	if s.Law == nil || a.N <= 0 || a.In <= 0 {
		return
	}
	l, now, n := s.Law, max(real, s.Seen), a.N
	if l.Kind == Continuous {
		n = min(n, math.MaxInt64/2/l.one())
		s.few[0].N -= min(s.units(now), l.drained(n, a.In))
		return
	}
	s.dropDead(now)
	want, far := real+min(a.In, farFuture)-l.fade(), ceil(l.Period, 2)
	switch {
	case *l != r.Law:
		want, far = math.MaxInt64/2, math.MaxInt64
	case l.Kind == SlidingLog:
		far = ceil(l.Period, logEntries) + l.Grain
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

// Debt is everything spent and not yet returned, as the curve of what is still held over the time
// to come, under the law of r: tokens and the time until they are back. Continuous: the level,
// rounded up to tokens, with the time until it is empty, which tells the level to within a tick's
// refill. It is nil for a full bucket.
func (s State) Debt(r *Rule, real int64) []Amount {
	s.many = slices.Clone(s.many)
	now := s.open(r, real)
	if r.Kind == Continuous {
		if n := s.spent(now); n > 0 {
			return []Amount{{n, s.back(now, 0, n) - now}}
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
		a.N = min(a.N, 4*r.Capacity)
		switch {
		case a.N <= 0 || a.In <= 0:
		case r.Kind == Continuous:
			s.level(max(0, r.drained(a.N, a.In)-s.units(now)))
		default:
			if h := s.received(now, a); h.End+r.fade() > now {
				theirs = append(theirs, h)
			}
		}
	}
	if len(theirs) > 0 {
		*s = MakeState(s.Law, s.Seen, highest(s.Holds(), theirs, 4*r.Capacity))
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

func ceil(a, b int64) int64 {
	if b == 1 {
		return a
	}
	return (a + b - 1) / b
}

func roundUp(t, grain int64) int64 { return ceil(t, grain) * grain }

func abs(n int64) int64 { return max(n, -n) }
