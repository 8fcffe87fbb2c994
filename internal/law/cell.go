package law

// The fast way: Decide for a storage that keeps states in memory. Nearly every bucket has at most one hold or level, or
// two holds if it is a SlidingWindow. These fit into three numbers, which are decided on where they are, without a
// State.
//
// Only the order of the steps is repeated here, under the numbers that they have at Decide. When tokens come back is
// computed by the same functions of Law. Package storagetest compares the two ways.

// Cell is the state of one bucket in three numbers. What they mean depends on the kind of its law:
//
//	Replenish, FixedWindow, SlidingLog  the one hold: A is its End and B its N; B is 0 if there is none
//	Continuous                          B is the level, in units, and A the End of its hold
//	SlidingWindow                       B tokens are held to the end of the window of Seen, A to the end of the one before
//
// A cell does not know its law. The storage keeps that beside it.
type Cell struct {
	Seen int64 // when the bucket was changed last; -1: never
	A, B int64
}

// NewCell returns the cell of a bucket that was never charged.
func NewCell() Cell { return Cell{Seen: never} }

const (
	never   = -1 // Seen of a cell that was never charged
	outside = -1 // B of a cell whose holds do not fit; the storage keeps them elsewhere
)

// State returns the state of a cell of the given law. It returns false if the holds are kept elsewhere; then only the
// Seen of the state is right.
func (c *Cell) State(law *Law) (s State, ok bool) {
	if c.Seen == never {
		return s, true
	}
	s = State{Law: law, Seen: c.Seen}
	if law.Kind != SlidingWindow {
		s.appendSome(Hold{c.A, c.B})
		return s, c.B != outside
	}
	end := law.end(c.Seen)
	s.appendSome(Hold{end - law.Period, c.A})
	s.appendSome(Hold{end, c.B})
	return s, c.B != outside
}

// appendSome appends a hold, unless it has no tokens.
func (s *State) appendSome(h Hold) {
	if h.N > 0 {
		s.Append(h)
	}
}

// Set makes s the state of the cell. It returns false if the holds do not fit: then they have to be kept elsewhere.
func (c *Cell) Set(s *State) (ok bool) {
	*c = Cell{Seen: s.Seen}
	holds := s.Holds()
	if s.Law.Kind == SlidingWindow {
		return c.setWindows(s.Law, holds)
	}
	switch len(holds) {
	case 0:
	case 1:
		c.A, c.B = holds[0].End, holds[0].N
	default:
		c.B = outside
	}
	return c.B != outside
}

// setWindows is Set for a SlidingWindow, whose holds fit if they end with the window of Seen or with the one before.
func (c *Cell) setWindows(law *Law, holds []Hold) (ok bool) {
	end := law.end(c.Seen)
	for _, h := range holds {
		switch h.End {
		case end - law.Period:
			c.A = h.N
		case end:
			c.B = h.N
		default:
			c.B = outside
			return false
		}
	}
	return true
}

// Asked is one identifier in a decision on cells: its rules, the cost for each, and the cell of each, whose law must be
// that of the rule.
type Asked struct {
	Rules *RuleSet
	Costs []int64
	Cells []Cell
}

// DecideCells is Decide on the cells of all parts. It sets the counts, one for each bucket through all parts in order.
// If known is false it cannot decide: holds do not fit into a cell, a cost is not valid, a reservation is denied, or
// the clock has stepped back. Then it has changed no cell, and the caller has to use Decide.
//
// Nearly all calls are admitted. So each bucket takes at once, as if all others admitted too, and if one does not, the
// cells before it get back what they had. The caller holds a lock on all cells, so nobody sees that.
func DecideCells(mode Mode, now, within int64, counts []Count, parts []Asked) (allowed, known bool) {
	if !Clocked(now) {
		return false, false
	}
	if len(counts) <= OneBuckets {
		var before [OneBuckets]Cell
		return decideCells(mode, now, within, counts, parts, before[:])
	}
	var room [MaxBuckets]Cell
	before := room[:]
	if len(counts) > len(room) {
		before = make([]Cell, len(counts))
	}
	return decideCells(mode, now, within, counts, parts, before)
}

// decideCells is DecideCells with room for a copy of each cell.
func decideCells(mode Mode, now, within int64, counts []Count, parts []Asked, before []Cell) (allowed, known bool) {
	n, did := 0, taken
	for i := 0; i < len(parts) && did == taken; i++ {
		took := 0
		did, took = parts[i].take(mode, now, within, counts[n:], before[n:])
		n += took
	}
	if did == taken && mode != Peek {
		return true, true
	}
	putBack(before[:n], parts)
	switch did {
	case taken:
		return true, true
	case denied:
		return false, lookAll(counts, n-1, parts, now)
	}
	return false, false
}

// DecideOne is DecideCells for nearly all decisions: those on one part with up to OneBuckets buckets. It repeats the
// loop of Asked.take so that an admission need not build an Asked.
func DecideOne(mode Mode, now, within int64, counts []Count, set *RuleSet, costs []int64, cells []Cell) (allowed, known bool) {
	var before [OneBuckets]Cell
	if !Clocked(now) || len(costs) > len(before) {
		return false, false
	}
	did, n, rules := taken, 0, set.Rules
	for did == taken && n < len(costs) {
		before[n] = cells[n]
		did = cells[n].take(&counts[n], &rules[n], costs[n], mode, now, within)
		n++
	}
	if did == taken && mode != Peek {
		return true, true
	}
	if did != taken {
		n-- // that cell has not changed
	}
	for i := range n {
		cells[i] = before[i]
	}
	switch did {
	case taken:
		return true, true
	case denied:
		known = true
		for i := range costs {
			known = known && (i == n || cells[i].look(&counts[i], &rules[i], costs[i], now))
		}
	}
	return false, known
}

// OneBuckets is the most buckets that DecideOne decides on.
const OneBuckets = 4

// take takes from the cells of a part until one does not admit. It returns the outcome of that one, or taken, and how
// many it has asked. It copies each of these cells to before, as it was.
func (p *Asked) take(mode Mode, now, within int64, counts []Count, before []Cell) (did outcome, n int) {
	rules, costs, cells := p.Rules.Rules, p.Costs, p.Cells
	for did == taken && n < len(costs) {
		before[n] = cells[n]
		did = cells[n].take(&counts[n], &rules[n], costs[n], mode, now, within)
		n++
	}
	return did, n
}

// putBack gives the first len(before) cells of the parts back what they had.
func putBack(before []Cell, parts []Asked) {
	for i := range parts {
		before = before[copy(parts[i].Cells, before):]
	}
}

// outcome is the answer of one bucket.
type outcome uint8

const (
	taken outcome = iota
	denied
	unknown // the cell cannot tell
)

// take is all steps for one bucket, as if it were the only one. Unless the outcome is taken, the cell has not changed.
// The kinds whose tokens come back at once are handled here, because nearly all buckets are of these.
//
// A bucket of capacity 0, of which a Force may record nothing, is left to Decide too.
// Steps 1 and 2 are left to Decide if the clock has stepped back, to a time before Seen. Every clock is ahead of the
// Seen of a cell that was never charged, which is -1.
func (c *Cell) take(count *Count, r *Rule, cost int64, mode Mode, now, within int64) outcome {
	if c.Seen > now || c.B == outside || cost < 0 || cost > r.Capacity && (mode != Force || r.Capacity == 0) { // 1, 2
		return unknown
	}
	switch r.Kind {
	case Continuous:
		return c.takeLevel(count, r, cost, mode, now, within)
	case SlidingWindow:
		return c.takeWindows(count, r, cost, mode, now, within)
	}
	spent, end := int64(0), c.A // 3
	if end > now {
		if spent = c.B; !r.joins(Hold{end, spent}, now) {
			return unknown
		}
	}
	if cost == 0 || cost > r.Capacity-spent && mode != Force { // 4
		return c.leave(count, r, spent, cost, now, within)
	}
	if spent == 0 { // 5
		end = r.end(now)
	}
	c.Seen, c.A, c.B = now, end, spent+r.recorded(cost, spent)
	back := r.returns(Hold{c.A, c.B}, 0) - now
	*count = Count{Remaining: r.left(spent, cost), ResetAfter: back, NextAfter: back, HeldFor: end - now}
	return taken
}

// takeLevel is steps 3 to 5 for a Continuous bucket, which also admits reservations. The mark A ends with its time, or
// when the level is empty: nobody is waiting for a turn then (State.Refund).
func (c *Cell) takeLevel(count *Count, r *Rule, cost int64, mode Mode, now, within int64) outcome {
	level := r.drained(c.B, c.Seen, now) // 3
	spent := ceil(level, r.One)
	reserved := cost > r.Capacity-spent && mode != Force
	if cost == 0 || reserved && (within == 0 || cost > r.Capacity-ceil(r.drained(c.B, c.Seen, now+within), r.One) || cost > r.Ceiling()-spent) { // 4
		return c.leave(count, r, spent, cost, now, within)
	}
	recorded := r.recorded(cost, spent) // 5
	if c.B = level + recorded*r.One; c.A <= now || level == 0 {
		c.A = 0
	}
	c.Seen = now
	c.count(count, r, spent+recorded, now)
	count.Remaining, count.HeldFor = r.left(spent, cost), count.ResetAfter
	if reserved {
		count.RetryAfter = c.back(r, r.Capacity) - now
	}
	return taken
}

// takeWindows is steps 3 to 5 for a SlidingWindow.
func (c *Cell) takeWindows(count *Count, r *Rule, cost int64, mode Mode, now, within int64) outcome {
	spent := c.unfaded(r, now)                                 // 3
	if cost == 0 || cost > r.Capacity-spent && mode != Force { // 4
		return c.leave(count, r, spent, cost, now, within)
	}
	recorded := r.recorded(cost, spent) // 5
	c.A, c.B = c.turned(r.end(now)-r.end(c.Seen), r.Period)
	c.B += recorded
	c.Seen = now
	c.count(count, r, spent+recorded, now)
	count.Remaining, count.HeldFor = r.left(spent, cost), c.goneAt(&r.Law)-now
	return taken
}

// leave sets the count of a bucket from which nothing is taken, as it is not asked for anything or denies. A bucket
// that denies a reservation has another RetryAfter, which is left to Decide.
func (c *Cell) leave(count *Count, r *Rule, spent, cost, now, within int64) outcome {
	switch {
	case cost == 0:
		c.count(count, r, spent, now)
		return taken
	case within > 0:
		return unknown
	}
	c.deny(count, r, spent, cost, now)
	return denied
}

// deny sets the count of a bucket that denies a cost.
func (c *Cell) deny(count *Count, r *Rule, spent, cost, now int64) {
	c.count(count, r, spent, now)
	if count.RetryAfter = count.ResetAfter; !r.atOnce() {
		count.RetryAfter = c.back(r, r.Capacity-cost) - now
	}
}

// lookAll sets the counts of all buckets of a call that was denied, but for the one that denied first, number first, which
// has its count already. It returns false if a cell cannot tell.
func lookAll(counts []Count, first int, parts []Asked, now int64) bool {
	n := 0
	for i := range parts {
		p := &parts[i]
		for j := range p.Costs {
			if n != first && !p.Cells[j].look(&counts[n], &p.Rules.Rules[j], p.Costs[j], now) {
				return false
			}
			n++
		}
	}
	return true
}

// look sets the count of a bucket as it is, for a call that was denied by another one. It returns false if the cell cannot
// tell.
func (c *Cell) look(count *Count, r *Rule, cost, now int64) bool {
	if cost < 0 || cost > r.Capacity || c.take(count, r, 0, Peek, now, 0) != taken {
		return false
	}
	if cost > count.Remaining && cost > 0 {
		c.deny(count, r, r.Capacity-count.Remaining, cost, now)
	}
	return true
}

// count sets the Count of a bucket that has spent so many tokens.
func (c *Cell) count(count *Count, r *Rule, spent, now int64) {
	if spent == 0 {
		*count = Count{Remaining: r.Capacity}
		return
	}
	back := int64(0)
	if r.atOnce() {
		back = r.returns(Hold{c.A, c.B}, 0) - now
	} else {
		back = c.back(r, 0) - now
	}
	*count = Count{Remaining: r.Capacity - spent, ResetAfter: back, NextAfter: back}
	if !r.atOnce() && spent > 1 {
		count.NextAfter = c.back(r, max(0, min(spent, r.Capacity)-1)) - now
	}
}

// unfaded returns how many tokens of a SlidingWindow are out, in both windows.
func (c *Cell) unfaded(r *Rule, now int64) int64 {
	end := r.end(c.Seen)
	return r.unfaded(Hold{end - r.Period, c.A}, now) + r.unfaded(Hold{end, c.B}, now)
}

// turned returns the counts of a SlidingWindow in a window that ends so much later than that of Seen. After one period
// the present window is the one before, and after more nothing is left.
func (c *Cell) turned(later, period int64) (before, within int64) {
	switch later {
	case 0:
		return c.A, c.B
	case period:
		return c.B, 0
	}
	return 0, 0
}

// back returns when what is spent of a level or a SlidingWindow will have fallen to room, which is less than it is now.
// A SlidingWindow falls below what the present window has only after that window has ended.
func (c *Cell) back(r *Rule, room int64) int64 {
	if r.Kind == Continuous {
		return r.falls(c.B, c.Seen, room*r.One)
	}
	end := r.end(c.Seen)
	if c.B <= room {
		return r.fades(Hold{end - r.Period, c.A}, room-c.B)
	}
	return r.fades(Hold{end, c.B}, room)
}

// Full is State.Full. Known is false if the clock has stepped back or the holds are kept outside of the cell.
func (c *Cell) Full(law *Law, now int64) (full, known bool) {
	return c.A == 0 && c.B == 0 || c.goneAt(law) <= now, c.Seen <= now && c.B != outside
}

// goneAt returns when the newest tokens that are out are gone, to the last unit.
func (c *Cell) goneAt(law *Law) int64 {
	switch law.Kind {
	case Continuous:
		return law.falls(c.B, c.Seen, 0)
	case SlidingWindow:
		end := law.end(c.Seen)
		if c.B == 0 {
			end -= law.Period
		}
		return end + law.fade()
	}
	return c.A
}
