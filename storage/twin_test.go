package storage_test

import (
	"math/big"
	"slices"

	"github.com/go-throttler/throttler/storage"
)

// The twin is the law a second time, slow and dumb: rational numbers, a plain list of what was
// taken, and every moment found by bisection. It shares nothing with Decide but the rules.

// lot is some tokens that were taken together. All times are whole microseconds.
type lot struct {
	end    int64
	tokens *big.Rat
}

// twin is one bucket. It is a value: nothing reachable from it is ever changed.
type twin struct {
	known bool
	law   storage.Law
	seen  int64
	lots  []lot
	level *big.Rat // Continuous: the tokens that were out at seen
}

// ask is one bucket in a decision of the twin.
type ask struct {
	rule *storage.Rule
	cost int64
	twin twin
}

// decideDumbly is Decide.
func decideDumbly(mode storage.Mode, real int64, asks []ask) (bool, []storage.Count) {
	allowed := true
	for _, a := range asks {
		allowed = allowed && (mode == storage.Force || a.fits(real))
	}
	counts := make([]storage.Count, len(asks))
	for i := range asks {
		a := &asks[i]
		switch {
		case !allowed: // A refusal tells what is, and takes nothing.
			counts[i] = a.refused(real)
		case a.cost == 0: // Who asks for nothing changes nothing.
			w, now := a.twin.believed(a.rule, real)
			counts[i] = w.count(a.rule, now, real)
		default: // An admission tells what is after it.
			w, now := a.twin.believed(a.rule, real)
			w = w.take(a.rule, a.cost, now)
			counts[i] = w.count(a.rule, now, real)
			if mode != storage.Peek {
				a.twin = w
			}
		}
	}
	return allowed, counts
}

// fits: a cost of 0 always, any other if with it no more than the capacity is out.
func (a *ask) fits(real int64) bool {
	w, now := a.twin.believed(a.rule, real)
	return a.cost == 0 || w.spent(now)+a.cost <= a.rule.Capacity
}

// refused is the count of a call that some bucket refused, perhaps not this one.
func (a *ask) refused(real int64) storage.Count {
	w, now := a.twin.believed(a.rule, real)
	c := w.count(a.rule, now, real)
	if !a.fits(real) {
		c.RetryAfter = w.first(now, a.rule.Capacity-a.cost) - real
	}
	return c
}

// count: what is left of the capacity, and when everything is back.
func (w twin) count(r *storage.Rule, now, real int64) storage.Count {
	return storage.Count{
		Remaining:  max(0, r.Capacity-w.spent(now)),
		ResetAfter: w.first(now, 0) - real,
	}
}

// believed is the bucket and its own time.
func (w twin) believed(r *storage.Rule, real int64) (twin, int64) {
	if !w.believable(real) {
		return twin{known: true, law: r.Law, seen: real, level: rat(0)}, real // It is a full one, never used.
	}
	return w, max(real, w.seen) // Its time never runs backwards.
}

// believable: seen before, and not later than one period and a minute from now.
func (w twin) believable(real int64) bool {
	return w.known && w.seen <= real+w.law.Period+60_000_000
}

// spent is what is out, in tokens, of which a started one counts as a whole one.
func (w twin) spent(t int64) int64 { return whole(ceiling(w.held(t))) }

// held is what is out.
func (w twin) held(t int64) *big.Rat {
	if w.law.Kind == storage.Continuous {
		return w.undrained(t)
	}
	sum := rat(0)
	for _, l := range w.lots {
		sum.Add(sum, w.heldOf(l, t))
	}
	return sum
}

// undrained: each tick since the last change returns its part of the refill, until nothing is out.
func (w twin) undrained(t int64) *big.Rat {
	passed := rat(w.ticks(t) - w.ticks(w.seen))
	perTick := quotient(rat(w.law.Refill), w.ticksOfPeriod())
	return atLeast(minus(w.level, product(perTick, passed)), rat(0))
}

// heldOf is what is out of a lot: all of it or nothing, but in a SlidingWindow it fades from its
// end on, by the same part in every tick of one period.
func (w twin) heldOf(l lot, t int64) *big.Rat {
	if w.law.Kind == storage.SlidingWindow {
		left := w.ticks(l.end+w.law.Period) - w.ticks(t)
		share := quotient(rat(left), w.ticksOfPeriod())
		return product(l.tokens, atMost(atLeast(share, rat(0)), rat(1)))
	}
	if l.end > t {
		return l.tokens
	}
	return rat(0)
}

// ticks is how many ticks of the clock are over at t.
func (w twin) ticks(t int64) int64 {
	return new(big.Int).Div(big.NewInt(t), big.NewInt(w.law.Tick)).Int64()
}

func (w twin) ticksOfPeriod() *big.Rat { return quotient(rat(w.law.Period), rat(w.law.Tick)) }

// first is the first microsecond from now on when no more than room is out. As nobody takes, what
// is out only falls.
func (w twin) first(now, room int64) int64 {
	fits := func(t int64) bool { return w.held(t).Cmp(rat(room)) <= 0 }
	if fits(now) {
		return now
	}
	step := int64(1)
	for !fits(now + step) {
		if step *= 32; step > 4*exact {
			panic("never comes back")
		}
	}
	low, high := now, now+step // it does not fit at low, it does at high
	for high-low > 1 {
		if middle := low + (high-low)/2; fits(middle) {
			high = middle
		} else {
			low = middle
		}
	}
	return high
}

// take is an admission.
func (w twin) take(r *storage.Rule, cost, now int64) twin {
	w = w.under(r, now)
	cost = min(cost, max(0, 4*r.Capacity-w.spent(now))) // No more than 4 capacities are ever out.
	switch {
	case cost == 0:
	case r.Kind == storage.Continuous:
		w.level = plus(w.level, rat(cost))
	default:
		w.lots = append(slices.Clone(w.lots), lot{w.joined(now), rat(cost)})
	}
	return w
}

// joined is when the hold ends that a token taken now joins.
func (w twin) joined(now int64) int64 {
	end := tokenEnd(w.law, now)
	for _, l := range w.lots {
		if w.law.Kind == storage.Replenish {
			return l.end // The one that lives: all its tokens come back at once.
		}
		end = max(end, l.end) // Ends never run backwards: one that a rule change made may be later.
	}
	return end
}

// tokenEnd is when a token ends that is taken from a full bucket.
func tokenEnd(l storage.Law, now int64) int64 {
	switch l.Kind {
	case storage.FixedWindow, storage.SlidingWindow: // At the next multiple of the period.
		return multiple(floor, now, l.Period) + l.Period
	case storage.SlidingLog: // One period from now, or at the next multiple of the grain.
		return multiple(ceiling, now+l.Period, l.Grain)
	}
	return now + l.Period // One period from now.
}

// multiple is t, rounded to a multiple of n.
func multiple(round func(*big.Rat) *big.Rat, t, n int64) int64 {
	return whole(product(round(quotient(rat(t), rat(n))), rat(n)))
}

// under is the bucket now and by the law of r.
func (w twin) under(r *storage.Rule, now int64) twin {
	if w.law != r.Law {
		return w.converted(r, now)
	}
	out := twin{known: true, law: w.law, seen: now, level: rat(0)}
	if w.law.Kind == storage.Continuous { // Drained up to now.
		out.level = w.held(now)
	}
	for _, l := range w.lots { // Those that are not all back yet.
		if w.heldOf(l, now).Sign() > 0 {
			out.lots = append(out.lots, l)
		}
	}
	return out
}

// converted is the bucket by another law: what was spent stays spent.
func (w twin) converted(r *storage.Rule, now int64) twin {
	out := twin{known: true, law: r.Law, seen: now, level: rat(0)}
	held := w.held(now)
	if held.Sign() == 0 { // Nothing is.
		return out
	}
	if r.Kind != storage.Continuous || w.unit().Cmp(out.unit()) != 0 {
		held = ceiling(held) // A started token is a whole one, unless both count in the same parts of it.
	}
	held = atMost(held, rat(4*r.Capacity)) // No more than 4 capacities are ever out.
	if r.Kind == storage.Continuous {
		out.level = held
	} else {
		out.lots = []lot{{w.moved(r.Law, now), held}}
	}
	return out
}

// unit is the smallest part of a token that comes back by itself.
func (w twin) unit() *big.Rat {
	if w.law.Kind == storage.Continuous || w.law.Kind == storage.SlidingWindow {
		return quotient(rat(1), w.ticksOfPeriod())
	}
	return rat(1)
}

// moved is when the hold ends under another law that has everything that is out: as if taken now,
// and not back before it would have been.
func (w twin) moved(l storage.Law, now int64) int64 {
	back := w.first(now, 0)
	if l.Kind == storage.SlidingWindow { // It has a period to fade after its end, which is a multiple.
		back = multiple(floor, back-l.Period, l.Period)
	}
	return max(back, tokenEnd(l, now))
}

func rat(n int64) *big.Rat               { return new(big.Rat).SetInt64(n) }
func plus(a, b *big.Rat) *big.Rat        { return new(big.Rat).Add(a, b) }
func minus(a, b *big.Rat) *big.Rat       { return new(big.Rat).Sub(a, b) }
func product(a, b *big.Rat) *big.Rat     { return new(big.Rat).Mul(a, b) }
func quotient(a, b *big.Rat) *big.Rat    { return new(big.Rat).Quo(a, b) }
func ceiling(a *big.Rat) *big.Rat        { return minus(rat(0), floor(minus(rat(0), a))) }
func atLeast(a, least *big.Rat) *big.Rat { return pick(a.Cmp(least) < 0, least, a) }
func atMost(a, most *big.Rat) *big.Rat   { return pick(a.Cmp(most) > 0, most, a) }

// floor: Div rounds down, as the denominator of a Rat is above 0.
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
