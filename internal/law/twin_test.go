package law_test

import (
	"math"
	"math/big"
	"slices"

	"github.com/go-throttler/throttler/internal/law"
)

// The twin is the arithmetic a second time, slow and obvious: rational numbers, a plain list of what was taken, and
// every moment found by bisection. It shares nothing with Decide but the rules, so that both hardly have the same
// fault.

// lot is a number of tokens that were taken together. All times are whole microseconds.
type lot struct {
	end    int64
	tokens *big.Rat
}

// twin is one bucket. It is a value: nothing reachable from it is ever changed.
type twin struct {
	known bool
	seen  int64
	lots  []lot
	level *big.Rat  // Continuous: the tokens that were out at seen
	last  *law.Rule // Continuous: the rule of the last change
}

// ask is one bucket in a decision of the twin.
type ask struct {
	rule   *law.Rule
	cost   int64
	within int64
	atMost bool
	twin   twin
}

// decideDumbly is Decide on twins.
func decideDumbly(mode law.Mode, real int64, asks []ask) (bool, []law.Count) {
	allowed := true
	for i := range asks {
		if mode == law.Force {
			asks[i].within = 0
		}
		allowed = allowed && (mode == law.Force || asks[i].fits(real))
	}
	if allowed && mode != law.Force {
		lower(asks, real)
	}
	counts := make([]law.Count, len(asks))
	for i := range asks {
		a := &asks[i]
		switch {
		case !allowed: // A denial counts what is there, and takes nothing.
			counts[i] = a.refused(real)
		case a.cost == 0: // A bucket that is asked for nothing does not change.
			w, now := a.twin.believed(a.rule, real)
			counts[i] = w.count(a.rule, now, real)
		default: // An admission counts what is there afterwards.
			w, now := a.twin.believed(a.rule, real)
			w, forgotten := w.take(a.rule, a.cost, now)
			counts[i] = w.count(a.rule, now, real)
			counts[i].HeldFor = w.gone(a.rule, now) - real
			counts[i].Remaining -= forgotten
			if a.within > 0 { // until it no longer owes
				counts[i].RetryAfter = w.first(a.rule, now, a.rule.Capacity) - now
			}
			if counts[i].RetryAfter > 0 {
				counts[i].RetryAfter += now - real
			}
			if mode != law.Peek {
				a.twin = w
			}
		}
	}
	return allowed, counts
}

// least returns the fewest tokens with which the call is admitted.
func (a *ask) least() int64 {
	if a.atMost {
		return min(a.cost, 1)
	}
	return a.cost
}

// fits reports whether the bucket admits the call. A cost of 0 always fits. Another fits if no more than the capacity
// is out with it: now or, of a level, when the time of the reservation is over, but never more than the ceiling.
func (a *ask) fits(real int64) bool {
	w, now := a.twin.believed(a.rule, real)
	return a.cost == 0 || w.room(a, now, real) >= 0
}

// room returns how many tokens more than the least could be taken; below 0 it is how many are in the way.
func (w twin) room(a *ask, now, real int64) int64 {
	r, spent := a.rule, w.spent(a.rule, now)
	if until := real + a.within; r.Kind == law.Continuous && until > now {
		return min(r.Capacity-w.spent(r, until), most(r)-spent) - a.least()
	}
	return r.Capacity - spent - a.least()
}

// most returns the ceiling: 4 capacities or 4 refills, bounded by the units below 2^53.
func most(r *law.Rule) int64 {
	out := 4 * r.Capacity
	if r.Kind == law.Continuous {
		out = max(out, whole(atMost(rat(4*r.Refill), floor(quotient(rat(exact-1), rat(r.One))))))
	}
	return out
}

// lower lowers the costs of the draws that are AtMost to the largest number that all of them have now.
func lower(asks []ask, real int64) {
	have := func(n int64) bool {
		for i := range asks {
			a := &asks[i]
			w, now := a.twin.believed(a.rule, real)
			if a.atMost && a.cost > 0 && w.spent(a.rule, now)+min(a.cost, n) > a.rule.Capacity {
				return false
			}
		}
		return true
	}
	low, high := int64(1), exact // at least one, which a reservation may get later
	for high-low > 1 {
		if middle := low + (high-low)/2; have(middle) {
			low = middle
		} else {
			high = middle
		}
	}
	if have(math.MaxInt64 / 4) {
		return
	}
	for i := range asks {
		if a := &asks[i]; a.atMost {
			a.cost = min(a.cost, low)
		}
	}
}

// refused returns the count for a call that some bucket denied, perhaps not this one.
func (a *ask) refused(real int64) law.Count {
	w, now := a.twin.believed(a.rule, real)
	c := w.count(a.rule, now, real)
	if !a.fits(real) {
		c.RetryAfter = w.retry(a, now) - real
	}
	return c
}

// retry returns when the bucket admits what it denied: when there is room for it, a reservation earlier by its time,
// but not before so little is out that it stays below the ceiling.
func (w twin) retry(a *ask, now int64) int64 {
	r, at := a.rule, w.first(a.rule, now, a.rule.Capacity-a.least())
	if r.Kind == law.Continuous {
		at -= a.within
	}
	if room := most(r) - a.least(); w.spent(r, now) > room {
		at = max(at, w.first(r, now, room))
	}
	return at
}

// count returns what is left of the capacity, when everything is back, and when one token more may be taken than now.
func (w twin) count(r *law.Rule, now, real int64) law.Count {
	left := r.Capacity - w.spent(r, now)
	more := max(0, left) + 1
	return law.Count{
		Remaining:  left,
		ResetAfter: w.first(r, now, 0) - real,
		NextAfter:  w.first(r, now, max(0, r.Capacity-more)) - real,
	}
}

// believed returns the bucket as it counts at the time real, and its own time.
func (w twin) believed(r *law.Rule, real int64) (twin, int64) {
	if !w.believable(r, real) {
		return twin{known: true, seen: real, level: rat(0)}, real // It counts as a full one.
	}
	now := max(real, w.seen) // Its time never runs backwards.
	if w.changed(r) && w.undrained(w.last, now).Sign() == 0 {
		w.level = rat(0) // All was back under the rule before.
	}
	return w, now
}

// believable reports whether the state counts: it was seen, and no later than one period and a minute from now.
func (w twin) believable(r *law.Rule, real int64) bool {
	return w.known && w.seen <= real+r.Period+60_000_000
}

// changed reports whether the level was spent under another rule.
func (w twin) changed(r *law.Rule) bool { return w.last != nil && w.last.Law != r.Law }

// spent returns how many tokens are out.
func (w twin) spent(r *law.Rule, t int64) int64 {
	switch r.Kind {
	case law.Continuous: // What is left of a token counts as a whole one.
		return whole(ceiling(w.undrained(r, t)))
	case law.SlidingWindow: // What is left of a token does not count.
		return whole(floor(w.sum(func(l lot) *big.Rat { return unfaded(r, l, t) })))
	}
	out := rat(0)
	for i, at := range w.returned(r) {
		if at > t {
			out.Add(out, w.lots[i].tokens)
		}
	}
	return whole(out)
}

// returned returns when each lot comes back. That is at its end or, in a large log, one grain earlier, if all lots with
// this end together are no more than the even client takes in a grain. No lot comes back before one with an earlier
// end.
func (w twin) returned(r *law.Rule) (at []int64) {
	even := plus(ceiling(quotient(rat(r.Capacity), rat(256))), ceiling(quotient(rat(r.Capacity), rat(r.Period))))
	before := int64(0)
	for _, l := range w.lots {
		end := l.end
		if r.Grain > 1 && end%r.Grain == 0 && w.sum(func(o lot) *big.Rat { return pick(o.end == end, o.tokens, rat(0)) }).Cmp(even) <= 0 {
			end = max(before, end-r.Grain)
		}
		before = end
		at = append(at, end)
	}
	return at
}

func (w twin) sum(of func(lot) *big.Rat) *big.Rat {
	out := rat(0)
	for _, l := range w.lots {
		out.Add(out, of(l))
	}
	return out
}

// undrained returns what is left of the level: each tick since the last change has returned its part of the refill,
// until nothing was out or 35 years had passed.
func (w twin) undrained(r *law.Rule, t int64) *big.Rat {
	passed := rat(ticks(r, t) - ticks(r, w.seen))
	if passed.Cmp(floor(quotient(rat(exact/8), rat(r.Tick)))) >= 0 {
		return rat(0)
	}
	perTick := quotient(rat(r.Refill), ticksOfPeriod(r))
	return atLeast(minus(w.counted(r), product(perTick, passed)), rat(0))
}

// counted returns the level rounded up to the units of a rule: the parts of a token of which each tick returns a whole
// number.
func (w twin) counted(r *law.Rule) *big.Rat {
	unit := rat(1).Quo(rat(1), rat(r.One))
	return atMost(product(ceiling(quotient(w.level, unit)), unit), product(rat(exact-1), unit))
}

// unfaded returns what is out of a lot: from its end on, every tick of one period takes away the same part. The present
// tick counts as over.
func unfaded(r *law.Rule, l lot, t int64) *big.Rat {
	left := ticks(r, l.end+r.Period) - ticks(r, t) - 1
	share := quotient(rat(left), ticksOfPeriod(r))
	return product(l.tokens, atMost(atLeast(share, rat(0)), rat(1)))
}

// ticks returns how many ticks of the clock are over at t.
func ticks(r *law.Rule, t int64) int64 {
	return new(big.Int).Div(big.NewInt(t), big.NewInt(r.Tick)).Int64()
}

func ticksOfPeriod(r *law.Rule) *big.Rat { return quotient(rat(r.Period), rat(r.Tick)) }

// first returns the first microsecond from now on at which no more than room is out. What is out only falls, as nobody
// takes.
func (w twin) first(r *law.Rule, now, room int64) int64 {
	return w.inTime(r, bisected(now, func(t int64) bool { return w.spent(r, t) <= room }))
}

// gone returns the first microsecond from now on at which nothing is out, not even a part of a token.
func (w twin) gone(r *law.Rule, now int64) int64 {
	if r.Kind == law.Continuous {
		return w.inTime(r, bisected(now, func(t int64) bool { return w.undrained(r, t).Sign() == 0 }))
	}
	last := now
	for _, l := range w.lots {
		last = l.end
		if r.Kind == law.SlidingWindow {
			last += r.Period - r.Tick // The present tick counts as over.
		}
	}
	return last
}

// inTime returns a time, or that of 35 years after the last change if it is earlier.
func (w twin) inTime(r *law.Rule, t int64) int64 {
	if r.Kind != law.Continuous {
		return t
	}
	return min(t, (ticks(r, w.seen)+exact/8/r.Tick)*r.Tick)
}

// bisected returns the first time from now on at which is returns true. From then on it must stay true.
func bisected(now int64, is func(t int64) bool) int64 {
	if is(now) {
		return now
	}
	step := int64(1)
	for !is(now + step) {
		if step *= 32; step > 4*exact {
			return math.MaxInt64
		}
	}
	low, high := now, now+step // Not true at low, true at high.
	for high-low > 1 {
		if middle := low + (high-low)/2; is(middle) {
			high = middle
		} else {
			low = middle
		}
	}
	return high
}

// take returns the bucket after an admission, and how much of that was not recorded: no more than the ceiling is ever
// out.
func (w twin) take(r *law.Rule, asked, now int64) (out twin, forgotten int64) {
	cost := min(asked, max(0, most(r)-w.spent(r, now)))
	w = w.under(r, now)
	switch {
	case cost == 0:
	case r.Kind == law.Continuous:
		w.level = plus(w.level, rat(cost))
	default:
		w.lots = append(slices.Clone(w.lots), lot{w.joined(r, now), rat(cost)})
	}
	return w, min(asked, most(r)) - cost
}

// joined returns the end of the hold that a token taken now joins or makes.
func (w twin) joined(r *law.Rule, now int64) int64 {
	end := tokenEnd(r.Law, now)
	for _, l := range w.lots {
		if r.Kind == law.Replenish {
			return l.end // The one hold there is: all its tokens come back at once.
		}
		end = max(end, l.end) // Ends never run backwards: an earlier clock or another grain may have made a later one.
	}
	return end
}

// tokenEnd returns the end of a token that is taken from a full bucket.
func tokenEnd(l law.Law, now int64) int64 {
	switch l.Kind {
	case law.FixedWindow, law.SlidingWindow: // At the next multiple of the period.
		return multiple(floor, now, l.Period) + l.Period
	case law.SlidingLog: // One period from now, or at the next multiple of the grain.
		return multiple(ceiling, now+l.Period, l.Grain)
	}
	return now + l.Period // One period from now.
}

// multiple returns t rounded to a multiple of n.
func multiple(round func(*big.Rat) *big.Rat, t, n int64) int64 {
	return whole(product(round(quotient(rat(t), rat(n))), rat(n)))
}

// under returns the bucket as the rule counts it now, without what is back.
func (w twin) under(r *law.Rule, now int64) twin {
	out := twin{known: true, seen: now, level: rat(0)}
	if r.Kind == law.Continuous { // Drained up to now.
		out.level, out.last = w.undrained(r, now), r
		return out
	}
	for _, l := range w.lots { // Those that are not entirely gone.
		if back := l.end; back > now || r.Kind == law.SlidingWindow && back+r.Period-r.Tick > now {
			out.lots = append(out.lots, l)
		}
	}
	return out
}

func rat(n int64) *big.Rat               { return new(big.Rat).SetInt64(n) }
func plus(a, b *big.Rat) *big.Rat        { return new(big.Rat).Add(a, b) }
func minus(a, b *big.Rat) *big.Rat       { return new(big.Rat).Sub(a, b) }
func product(a, b *big.Rat) *big.Rat     { return new(big.Rat).Mul(a, b) }
func quotient(a, b *big.Rat) *big.Rat    { return new(big.Rat).Quo(a, b) }
func ceiling(a *big.Rat) *big.Rat        { return minus(rat(0), floor(minus(rat(0), a))) }
func atLeast(a, least *big.Rat) *big.Rat { return pick(a.Cmp(least) < 0, least, a) }
func atMost(a, most *big.Rat) *big.Rat   { return pick(a.Cmp(most) > 0, most, a) }

// floor rounds down, as Div does because the denominator of a Rat is above 0.
func floor(a *big.Rat) *big.Rat {
	return new(big.Rat).SetInt(new(big.Int).Div(a.Num(), a.Denom()))
}

func pick(first bool, a, b *big.Rat) *big.Rat {
	if first {
		return a
	}
	return b
}

func whole(a *big.Rat) int64 {
	if !a.IsInt() || !a.Num().IsInt64() {
		panic("not a whole number: " + a.String())
	}
	return a.Num().Int64()
}
