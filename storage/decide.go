package storage

import (
	"cmp"
	"math"
	"math/bits"
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
// The steps of a decision are numbered; other implementations (the Lua scripts, the fast way of the runtime storage)
// carry the same numbers:
//
//  1. No state, or one seen later than the real time by more than one period plus 60 s: empty.
//     A clock that steps back less never refills a state; more costs at most one extra capacity,
//     once. A storage may have forgotten a full state before the clock stepped back: then it is full.
//  2. now = max(real, seen): time never runs backwards for a bucket.
//  3. Spent, in whole tokens. What is left of a token that drains (Continuous) counts as a whole one. What is left of
//     a hold that fades (SlidingWindow) is rounded down, with the present tick counted as over.
//  4. Admit if spent + cost <= capacity in every bucket that is asked for more than 0.
//  5. Admitted: in each such bucket drop dead holds, add the cost.
//
// All times are microseconds since the epoch. All numbers are integers below 2^53.
//
// RetryAfter is exact: the same call a microsecond earlier is denied, at it admitted, if nobody else
// takes. One case is left out: several buckets, of which one is empty by step 1 when another denies.
// As the denial changes nothing, the first is believed again once the clock has caught up, unless it
// was forgotten meanwhile.
//
// The even client: who takes one token every Period/Capacity is never denied, by any kind. This decides how step 3 rounds:
//
//   - A SlidingWindow of C holds, x after a window began, what its client took since then and C·(1 - x/P) of the window
//     before. Rounded up, or with the tick not yet over, that is C at each call of the client.
//   - The grain of a large SlidingLog returns a token up to P/256 late. So a hold of no more tokens than the client takes
//     in one grain returns a grain early: one 256th of the capacity, about, may be admitted beyond it in a period.
//
// A bucket is its name, kind and period. Another capacity or refill counts at once and changes nothing that was spent:
// holds stay as they are, and a level is counted in the new units, rounded up, and drains by the new refill from the
// time on at which it was changed last; a storage may have forgotten it if it was full by its own. Who toggles between
// plans gets no more than the most generous one admits.

// Hold is N tokens that are out until End, and in a SlidingWindow fade over one more period.
type Hold struct{ End, N int64 }

// State is what has been spent from one bucket. The zero State is that of a bucket never seen.
type State struct {
	Law  *Law  // by which it was changed last: of the kind and period of every rule that it is used with; nil: never seen
	Seen int64 // when it was changed last

	// By End. Continuous: at most one, with N units of Law at Seen. The first two are
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
// counts of a denial tell what is, those of an admission what is after it. Costs are 0 or more,
// and at most the capacity unless mode is Force.
func Decide(mode Mode, real int64, draws []Draw) bool {
	allowed := true
	for i := range draws {
		d := &draws[i]
		d.spent = 0
		if d.State.believable(&d.Rule.Law, real) { // 1
			d.spent = d.State.spent(d.Rule, max(real, d.State.Seen)) // 2, 3
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
	s, capacity := &d.State, d.Rule.Capacity
	if !s.believable(&d.Rule.Law, real) {
		s = &State{Seen: real}
	}
	d.count(s, max(real, s.Seen), real, d.spent)
	if d.Cost > 0 && d.Cost > capacity-d.spent {
		d.Count.RetryAfter = s.back(d.Rule, max(real, s.Seen), capacity-d.Cost, d.spent) - real
	}
}

// count sets what a state that has spent so much says of its bucket.
func (d *Draw) count(s *State, now, real, spent int64) {
	c := d.Rule.Capacity
	d.Count = Count{
		Remaining:  c - spent,
		ResetAfter: s.back(d.Rule, now, 0, spent) - real,
		NextAfter:  s.back(d.Rule, now, max(0, min(spent, c)-1), spent) - real,
	}
}

// take is step 5. What would exceed 4 capacities is not recorded, but counted.
func (d *Draw) take(real int64) {
	s, r := &d.State, d.Rule
	now := s.open(r, real)
	cost := min(d.Cost, max(0, 4*r.Capacity-d.spent))
	if r.Kind == Continuous {
		s.level(cost * r.One)
	} else if cost > 0 {
		end, holds := r.end(now), s.Holds()
		if k := len(holds); k > 0 && (r.Kind == Replenish || holds[k-1].End >= end) {
			holds[k-1].N += cost
		} else {
			s.insert(k, Hold{end, cost})
		}
	}
	d.count(s, now, real, d.spent+cost)
	d.Count.HeldFor = s.goneAt(&r.Law) - real
	d.Count.Remaining -= min(d.Cost, 4*r.Capacity) - cost
}

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
	} else {
		s.dropDead(now)
	}
	s.Law, s.Seen = &r.Law, now
	return now
}

// believable is step 1. A state of another kind or period is another bucket's.
func (s *State) believable(l *Law, real int64) bool {
	return s.Law != nil && s.Seen <= real+l.Period+tolerance && s.Law.Same(l)
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
		return l.Period - l.Tick
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

// drained is what is left of the level at now.
func (s *State) drained(l *Law, now int64) int64 {
	n := s.units(l)
	if dt := l.ticks(now) - l.ticks(s.Seen); dt < ceil(n, l.Drain) { // else the product may be too large
		return n - l.Drain*dt
	}
	return 0
}

// falls is when the level will have fallen to so many units, at most 35 years after Seen: what was spent under a faster
// refill may take longer than time can be counted.
func (s *State) falls(l *Law, units int64) int64 {
	return (l.ticks(s.Seen) + min(ceil(s.units(l)-units, l.Drain), farFuture/l.Tick)) * l.Tick
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

// returns is when the tokens of a hold come back, not before those of the hold before. In a large SlidingLog that is a
// grain early for as few tokens as the even client takes in a grain.
func (r *Rule) returns(h Hold, before int64) int64 {
	if r.Grain > 1 && h.N <= ceil(r.Capacity, logEntries)+ceil(r.Capacity, r.Period) {
		return max(before, h.End-r.Grain)
	}
	return h.End
}

// unfaded is what is left of a hold of a SlidingWindow.
func (l *Law) unfaded(h Hold, now int64) int64 {
	left := l.ticks(h.End+l.Period) - l.ticks(now) - 1
	switch {
	case left >= l.One:
		return h.N
	case left <= 0:
		return 0
	}
	part, _ := scale(h.N, left, l.One)
	return part
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
			return h.End + r.Period - ceil((room-left+1)*r.One, h.N)*r.Tick
		}
		break
	}
	return at
}

func (s *State) dropDead(now int64) {
	l, holds, dead := s.Law, s.Holds(), 0
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

// Charge adds a.N tokens that come back in a.In by themselves, whatever the state is; both are 0
// or more. Nothing is left of an amount whose time has passed, and consumption saturates at 4
// capacities. An end snaps to the nearest multiple of the period (FixedWindow, SlidingWindow),
// rounds up to the grain (SlidingLog), and within half a period of the last hold joins it
// (Replenish, which therefore may hold a few for a while).
func (s *State) Charge(r *Rule, a Amount, real int64) {
	now := s.open(r, real)
	n := min(a.N, 4*r.Capacity-s.spent(r, now))
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

// leftOf is how many units are left of n tokens of a Continuous level which are all back in a given time: to within
// a tick's refill.
func (l *Law) leftOf(n, in int64) int64 {
	in = min(in, farFuture)
	if all := n * l.One; ceil(in, l.Tick) >= ceil(all, l.Drain) {
		return all
	}
	return ceil(in, l.Tick) * l.Drain
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
// SlidingLog a 256th. A Continuous bucket gets back what has not drained since, to within a tick's refill.
func (s *State) Refund(r *Rule, a Amount, real int64) {
	if a.N <= 0 || a.In <= 0 || s.Law == nil || !s.Law.Same(&r.Law) {
		return
	}
	now, n := max(real, s.Seen), a.N
	if r.Kind == Continuous {
		n = min(n, (exact-1)/r.One)
		s.few[0].N = s.units(&r.Law) - min(s.drained(&r.Law, now), r.leftOf(n, a.In))
		s.Law = &r.Law
		return
	}
	s.dropDead(now)
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
		a.N = min(a.N, 4*r.Capacity)
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

// scale is n·a/b rounded down, and whether that left something, for n and a from 0 on and n·a/b below 2^63.
func scale(n, a, b int64) (quotient int64, more bool) {
	hi, lo := bits.Mul64(uint64(n), uint64(a))
	q, rest := bits.Div64(hi, lo, uint64(b))
	return int64(q), rest > 0
}

func ceil(a, b int64) int64 {
	if b == 1 {
		return a
	}
	return (a + b - 1) / b
}

func roundUp(t, grain int64) int64 { return ceil(t, grain) * grain }

func abs(n int64) int64 { return max(n, -n) }
