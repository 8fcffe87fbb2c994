package runtime

import "github.com/go-throttler/throttler/storage"

// quick is storage.Decide, in the cells, for nearly all entries: their buckets are Replenish or FixedWindow and have one
// hold or none, or Continuous. It reports false, and has done nothing, where that is not so or the clock has stepped
// back. The steps have the numbers of package storage, whose suite compares the two.
func (e *entry) quick(r *storage.Request, v *storage.Verdict, now int64) bool {
	allowed := true
	for i := range r.Part.Rules {
		rule := &r.Part.Rules[i]
		h, ok := e.cell(i).hold(rule, now)
		if !ok {
			return false
		}
		if cost := r.Part.Cost(i); cost > rule.Capacity-h.spent && cost > 0 && r.Mode != storage.Force { // 4
			allowed = false
		}
	}
	v.Begin(r, Source, now)
	v.Allowed = allowed
	for i := range r.Part.Rules {
		c, rule, cost := e.cell(i), &r.Part.Rules[i], r.Part.Cost(i)
		h, _ := c.hold(rule, now)
		var count storage.Count
		switch {
		case allowed && cost > 0: // 5
			next := h.take(rule, now, min(cost, max(0, 4*rule.Capacity-h.spent)))
			count = storage.Count{Remaining: max(0, rule.Capacity-next.spent), ResetAfter: next.end - now}
			if r.Mode != storage.Peek {
				*c = next.cell(rule, now)
			}
		case h.spent > 0:
			count = storage.Count{Remaining: max(0, rule.Capacity-h.spent), ResetAfter: h.end - now}
			if cost > rule.Capacity-h.spent && cost > 0 {
				count.RetryAfter = c.room(rule, &h, rule.Capacity-cost) - now
			}
		default:
			count.Remaining = rule.Capacity
		}
		v.Set(i, count)
	}
	return true
}

// hold is what is out of a bucket: tokens, and when they, or what is taken now, are all back.
type hold struct{ spent, end, level int64 }

// hold is steps 1 to 3.
func (c *cell) hold(r *storage.Rule, now int64) (h hold, ok bool) {
	if c.seen > now || c.b == outside {
		return h, false
	}
	switch r.Kind {
	case storage.Continuous:
		if c.b > 0 {
			if gone := now/r.Tick - c.seen/r.Tick; gone < ceil(c.b, r.Refill) {
				h.level = c.b - gone*r.Refill
				h.spent, h.end = ceil(h.level, r.Period/r.Tick), c.empty(r)
			}
		}
		return h, true
	case storage.Replenish:
		h.end = now + r.Period
	case storage.FixedWindow:
		h.end = now - now%r.Period + r.Period
	default:
		return h, false
	}
	if c.b == 0 || c.a <= now {
		return h, true
	}
	ok = r.Kind == storage.Replenish || c.a >= h.end
	h.spent, h.end = c.b, c.a
	return h, ok
}

func (h hold) take(r *storage.Rule, now, n int64) hold {
	h.spent += n
	if r.Kind == storage.Continuous {
		h.level += n * (r.Period / r.Tick)
		h.end = (&cell{seen: now, b: h.level}).empty(r)
	}
	return h
}

func (h *hold) cell(r *storage.Rule, now int64) cell {
	if r.Kind == storage.Continuous {
		return cell{seen: now, b: h.level}
	}
	return cell{now, h.end, h.spent}
}

// room is when there will be so many tokens.
func (c *cell) room(r *storage.Rule, h *hold, n int64) int64 {
	if r.Kind == storage.Continuous {
		return (&cell{seen: c.seen, b: c.b - n*(r.Period/r.Tick)}).empty(r)
	}
	return h.end
}

// empty is when a level will have drained.
func (c *cell) empty(r *storage.Rule) int64 { return (c.seen/r.Tick + ceil(c.b, r.Refill)) * r.Tick }

func ceil(a, b int64) int64 { return (a + b - 1) / b }
