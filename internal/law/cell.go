package law

// The fast way: Decide for a storage that keeps states in memory. Nearly every bucket has at most one hold or level, or
// two holds in a SlidingWindow, and these fit into three numbers, which need no State around them. All that is here is the
// order of the steps, which have the numbers of Decide; when tokens come back is told by the same functions of Law. Package
// storagetest compares the two.

// Cell is the state of one bucket in three numbers, by the kind of its law:
//
//	Replenish, FixedWindow, SlidingLog  the one hold: A is its End and B its N; B is 0 if there is none
//	Continuous                          B is the level, in units, and A the End of its hold
//	SlidingWindow                       B tokens are held to the end of the window of Seen, A to the end of the one before
type Cell struct {
	Seen int64 // when the bucket was changed last; -1: never
	A, B int64
}

// NewCell is the cell of a bucket that was never charged.
func NewCell() Cell { return Cell{Seen: never} }

const (
	never   = -1
	outside = -1 // B of a cell whose holds do not fit
)

// State returns the state of a cell of the given law. It is false if the cell does not have it.
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

func (s *State) appendSome(h Hold) {
	if h.N > 0 {
		s.Append(h)
	}
}

// Set makes s the state of the cell. It is false if the holds do not fit: then they have to be kept elsewhere.
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

// Asked is one identifier in a decision on cells: its rules, what each is asked for, and the cell of each, whose law is
// that of the rule.
type Asked struct {
	Rules *RuleSet
	Costs []int64
	Cells []Cell
}

// DecideCells is Decide on the cells of all parts, whose counts it sets. It is not known where the cells cannot tell, a cost
// is not valid, a reservation is denied or the clock has stepped back. Then it has changed no cell.
//
// Nearly all calls are admitted, so each bucket takes at once, as if all others admitted too, and what was before is put
// back if one does not.
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

// decideCells is DecideCells with room for a cell of each bucket.
func decideCells(mode Mode, now, within int64, counts []Count, parts []Asked, before []Cell) (allowed, known bool) {
	n, did := 0, taken
	for i := 0; i < len(parts) && did == taken; i++ {
		took := 0
		did, took = parts[i].take(mode, now, within, counts[n:], before[n:])
		n += took
	}
	if did != taken || mode == Peek {
		putBack(before[:n], parts)
	}
	return did.of(counts, n-1, parts, now)
}

// DecideOne is DecideCells for nearly all decisions: one part of up to OneBuckets buckets.
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
	copy(cells, before[:n])
	return did.of(counts, n-1, []Asked{{set, costs, cells}}, now)
}

// OneBuckets is how many buckets DecideOne decides on.
const OneBuckets = 4

// take takes from the cells of a part until one does not admit, and returns what that one said and how many it has asked.
// It remembers what they were before.
func (p *Asked) take(mode Mode, now, within int64, counts []Count, before []Cell) (did outcome, n int) {
	rules, costs, cells := p.Rules.Rules, p.Costs, p.Cells
	for did == taken && n < len(costs) {
		before[n] = cells[n]
		did = cells[n].take(&counts[n], &rules[n], costs[n], mode, now, within)
		n++
	}
	return did, n
}

// of is what all buckets say together, where the last one that was asked said did.
func (did outcome) of(counts []Count, last int, parts []Asked, now int64) (allowed, known bool) {
	if did == unknown || did == denied && !look(counts, last, parts, now) {
		return false, false
	}
	return did == taken, true
}

func putBack(before []Cell, parts []Asked) {
	for i := range parts {
		before = before[copy(parts[i].Cells, before):]
	}
}

// outcome is what one bucket says.
type outcome uint8

const (
	taken outcome = iota
	denied
	unknown // the cell cannot tell
)

// take is all steps for one bucket, as if it were the only one. If it is not taken nothing has changed. The kinds whose
// tokens come back at once are here, as nearly all buckets are of them.
func (c *Cell) take(count *Count, r *Rule, cost int64, mode Mode, now, within int64) outcome {
	if c.Seen > now || c.B == outside || cost < 0 || cost > r.Capacity && mode != Force { // 1, 2
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

// takeLevel is steps 3 to 5 for a Continuous bucket, whose level may be reserved ahead.
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

// leave counts what is, in a bucket from which nothing is taken: it is not asked for anything, or it denies. What denies a
// reservation tells another time, which is left to Decide.
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

// deny counts what is, in a bucket that denies a cost.
func (c *Cell) deny(count *Count, r *Rule, spent, cost, now int64) {
	c.count(count, r, spent, now)
	if count.RetryAfter = count.ResetAfter; !r.atOnce() {
		count.RetryAfter = c.back(r, r.Capacity-cost) - now
	}
}

// look counts what is, in all buckets but the one that denied first, whose count is there. It is false where a cell cannot
// tell.
func look(counts []Count, first int, parts []Asked, now int64) bool {
	n := 0
	for i := range parts {
		p := &parts[i]
		for j := range p.Rules.Rules {
			c, r, cost, count := &p.Cells[j], &p.Rules.Rules[j], p.Costs[j], &counts[n]
			if n++; n-1 != first {
				if cost < 0 || cost > r.Capacity || c.take(count, r, 0, Peek, now, 0) != taken {
					return false
				}
				if cost > count.Remaining && cost > 0 {
					c.deny(count, r, r.Capacity-count.Remaining, cost, now)
				}
			}
		}
	}
	return true
}

// count tells what is spent and when it comes back.
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
		count.NextAfter = c.back(r, min(spent, r.Capacity)-1) - now
	}
}

// unfaded is what is out of a SlidingWindow.
func (c *Cell) unfaded(r *Rule, now int64) int64 {
	end := r.end(c.Seen)
	return r.unfaded(Hold{end - r.Period, c.A}, now) + r.unfaded(Hold{end, c.B}, now)
}

// turned are the counts of a SlidingWindow in a window that ends so much later.
func (c *Cell) turned(later, period int64) (before, within int64) {
	switch later {
	case 0:
		return c.A, c.B
	case period:
		return c.B, 0
	}
	return 0, 0
}

// back is when what is spent of a level or a SlidingWindow, which is more than room, will have fallen to it.
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

// Full is State.Full. It is not known if the clock has stepped back or the cell does not have the state.
func (c *Cell) Full(law *Law, now int64) (full, known bool) {
	return c.A == 0 && c.B == 0 || c.goneAt(law) <= now, c.Seen <= now && c.B != outside
}

// goneAt is when the newest of what is out is gone, to the last unit.
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
