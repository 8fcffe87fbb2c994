package storage

// The fast way: Decide for a storage that keeps states in memory. Nearly every bucket has at most one hold or level, or
// two holds in a SlidingWindow, and these fit into three numbers, which need no State around them. All that is here is the
// order of the steps, which have the numbers of Decide; when tokens come back is told by the same functions of Law. Package
// storagetest compares the two.

// Cell is the state of one bucket in three numbers, by the kind of its law:
//
//	Replenish, FixedWindow, SlidingLog  the one hold: A is its End and B its N; B is 0 if there is none
//	Continuous                          B is the level, in units
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

// Decide is the function Decide for the request that v holds, on the cells of the rules of each part, whose laws are those
// of the rules. It fills v. It reports false where the cells cannot tell, the request is not valid, or the clock has stepped
// back; then it has changed no cell and nothing of v that Begin and Set do not set again.
func (v *Verdict) Decide(source string, mode Mode, now int64, cells ...[]Cell) bool {
	if now < 0 || now >= maxClock {
		return false
	}
	v.room()
	allowed, n := true, 0
	for i := range cells {
		p := v.Part(i)
		for j := range p.Rules {
			r, cost := &p.Rules[j], p.Cost(j)
			spent, ok := cells[i][j].spent(r, now) // 1, 2, 3
			if !ok || cost < 0 || cost > r.Capacity && mode != Force {
				return false
			}
			if cost > r.Capacity-spent && cost > 0 && mode != Force { // 4
				allowed = false
			}
			v.count(n).Remaining = r.Capacity - spent
			n++
		}
	}
	n = 0
	for i := range cells {
		p := v.Part(i)
		for j := range p.Rules {
			c, r, cost, count := &cells[i][j], &p.Rules[j], p.Cost(j), v.count(n)
			n++
			spent := r.Capacity - count.Remaining
			if !allowed || cost == 0 {
				c.tell(count, r, spent, now)
				if cost > r.Capacity-spent && cost > 0 {
					count.RetryAfter = c.back(r, r.Capacity-cost) - now
					v.RetryAfter = max(v.RetryAfter, duration(count.RetryAfter))
				}
				continue
			}
			recorded := r.recorded(cost, spent)
			next := *c
			next.take(r, spent, recorded, now) // 5
			next.tell(count, r, spent+recorded, now)
			count.HeldFor = next.goneAt(&r.Law) - now
			count.Remaining -= min(cost, 4*r.Capacity) - recorded
			if mode != Peek {
				*c = next
			}
		}
	}
	v.Allowed = allowed
	v.stamp(source, mode, now)
	return true
}

// spent is steps 1 to 3.
func (c *Cell) spent(r *Rule, now int64) (spent int64, ok bool) {
	if c.Seen > now || c.B == outside {
		return 0, false
	}
	switch r.Kind {
	case Continuous:
		return ceil(r.drained(c.B, c.Seen, now), r.One), true
	case SlidingWindow:
		end := r.end(c.Seen)
		return r.unfaded(Hold{end - r.Period, c.A}, now) + r.unfaded(Hold{end, c.B}, now), true
	}
	if c.B == 0 || c.A <= now {
		return 0, true
	}
	return c.B, r.joins(Hold{c.A, c.B}, now)
}

// take is step 5.
func (c *Cell) take(r *Rule, spent, cost, now int64) {
	switch {
	case r.Kind == Continuous:
		c.B = r.drained(c.B, c.Seen, now) + cost*r.One
	case r.Kind == SlidingWindow:
		c.turn(r.end(now)-r.end(c.Seen), r.Period)
		c.B += cost
	case spent == 0:
		c.A, c.B = r.end(now), cost
	default:
		c.B += cost
	}
	c.Seen = now
}

// turn makes the cell of a SlidingWindow that of a window so much later.
func (c *Cell) turn(later, period int64) {
	switch later {
	case 0:
	case period:
		c.A, c.B = c.B, 0
	default:
		c.A, c.B = 0, 0
	}
}

// tell counts when what is spent comes back.
func (c *Cell) tell(count *Count, r *Rule, spent, now int64) {
	count.Remaining = r.Capacity - spent
	if spent == 0 {
		*count = Count{Remaining: count.Remaining}
		return
	}
	count.ResetAfter = c.back(r, 0) - now
	count.NextAfter = count.ResetAfter
	if !r.atOnce() {
		count.NextAfter = c.back(r, min(spent, r.Capacity)-1) - now
	}
}

// back is when what is spent, which is more than room, will have fallen to it.
func (c *Cell) back(r *Rule, room int64) int64 {
	switch r.Kind {
	case Continuous:
		return r.falls(c.B, c.Seen, room*r.One)
	case SlidingWindow:
		end := r.end(c.Seen)
		if c.B <= room {
			return r.fades(Hold{end - r.Period, c.A}, room-c.B)
		}
		return r.fades(Hold{end, c.B}, room)
	}
	return r.returns(Hold{c.A, c.B}, 0)
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
