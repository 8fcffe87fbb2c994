package runtime

import "github.com/go-throttler/throttler/storage"

// quick is storage.Decide, in the cells, for nearly all entries: all of their buckets come back at once and have one hold
// or none, or all are Continuous. It reports false, and has done nothing, where that is not so or the clock has stepped
// back. The steps have the numbers of package storage, whose suite compares the two.
func (e *entry) quick(r *storage.Request, v *storage.Verdict, now int64) bool {
	if r.Part.Rules[0].Kind == storage.Continuous {
		return e.decideLevels(r, v, now)
	}
	return e.decideHolds(r, v, now)
}

func (e *entry) decideHolds(r *storage.Request, v *storage.Verdict, now int64) bool {
	allowed := true
	for i := range r.Part.Rules {
		rule := &r.Part.Rules[i]
		spent, _, ok := e.cell(i).hold(rule, now)
		if !ok {
			return false
		}
		if cost := r.Part.Cost(i); cost > rule.Capacity-spent && cost > 0 && r.Mode != storage.Force { // 4
			allowed = false
		}
	}
	v.Begin(r, Source, now)
	v.Part(0).Identifier = e.id // a copy: the caller's may be in memory that it uses again
	v.Allowed = allowed
	for i := range r.Part.Rules {
		c, rule, cost := e.cell(i), &r.Part.Rules[i], r.Part.Cost(i)
		spent, end, _ := c.hold(rule, now)
		var count storage.Count
		switch {
		case allowed && cost > 0: // 5
			cost = min(cost, 4*rule.Capacity)
			count.Remaining = -cost
			if r.Mode != storage.Peek {
				*c = cell{now, end, spent + min(cost, max(0, 4*rule.Capacity-spent))}
			}
			count.ResetAfter, count.NextAfter, count.HeldFor = end-now, end-now, end-now
		case spent > 0:
			count.ResetAfter, count.NextAfter = end-now, end-now
			if cost > rule.Capacity-spent && cost > 0 {
				count.RetryAfter = end - now
			}
		}
		count.Remaining += rule.Capacity - spent
		v.Set(i, count)
	}
	return true
}

// hold is what is out now, and when that comes back together with a token that is taken now. It is not ok where one hold
// cannot tell: another kind, holds outside of the cell, a clock that stepped back, or a hold of a FixedWindow that ends
// before the window does.
func (c *cell) hold(r *storage.Rule, now int64) (spent, end int64, ok bool) {
	if c.seen > now || c.b == outside { // 1, 2
		return 0, 0, false
	}
	if end = now + r.Period; r.Kind == storage.FixedWindow {
		end -= now % r.Period
	} else if r.Kind != storage.Replenish {
		return 0, 0, false
	}
	if c.b == 0 || c.a <= now { // 3
		return 0, end, true
	}
	return c.b, c.a, r.Kind == storage.Replenish || c.a >= end
}

func (e *entry) decideLevels(r *storage.Request, v *storage.Verdict, now int64) bool {
	allowed := true
	for i := range r.Part.Rules {
		c, rule := e.cell(i), &r.Part.Rules[i]
		if rule.Kind != storage.Continuous || c.seen > now { // 1, 2
			return false
		}
		spent := ceil(c.level(rule, now), rule.One)                                                    // 3
		if cost := r.Part.Cost(i); cost > rule.Capacity-spent && cost > 0 && r.Mode != storage.Force { // 4
			allowed = false
		}
	}
	v.Begin(r, Source, now)
	v.Part(0).Identifier = e.id // a copy: the caller's may be in memory that it uses again
	v.Allowed = allowed
	for i := range r.Part.Rules {
		c, rule, cost := e.cell(i), &r.Part.Rules[i], r.Part.Cost(i)
		level := c.level(rule, now)
		spent := ceil(level, rule.One)
		var count storage.Count
		switch {
		case allowed && cost > 0: // 5
			cost = min(cost, 4*rule.Capacity)
			count.Remaining = rule.Capacity - spent - cost
			cost = min(cost, max(0, 4*rule.Capacity-spent))
			next := cell{seen: now, b: level + cost*rule.One}
			next.tell(rule, spent+cost, now, &count)
			count.HeldFor = count.ResetAfter
			if r.Mode != storage.Peek {
				*c = next
			}
		default:
			count.Remaining = rule.Capacity - spent
			c.tell(rule, spent, now, &count)
			if cost > rule.Capacity-spent && cost > 0 {
				count.RetryAfter = c.falls(rule, rule.Capacity-cost) - now
			}
		}
		v.Set(i, count)
	}
	return true
}

// tell counts when a level comes back of which so many tokens are out.
func (c *cell) tell(r *storage.Rule, spent, now int64, count *storage.Count) {
	if spent > 0 {
		count.ResetAfter = c.falls(r, 0) - now
		count.NextAfter = c.falls(r, min(spent, r.Capacity)-1) - now
	}
}

// level is how many units are out.
func (c *cell) level(r *storage.Rule, now int64) int64 {
	drained := now/r.Tick - c.seen/r.Tick
	if drained >= ceil(c.b, r.Drain) { // else the product may be too large
		return 0
	}
	return c.b - drained*r.Drain
}

// falls is when the level will have fallen to so many tokens.
func (c *cell) falls(r *storage.Rule, tokens int64) int64 {
	return (c.seen/r.Tick + min(ceil(c.b-tokens*r.One, r.Drain), storage.FarFuture/r.Tick)) * r.Tick
}

func ceil(a, b int64) int64 { return (a + b - 1) / b }
