package law

import (
	"fmt"
	"math/bits"
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
// The even client: who takes one token every Period/Capacity is never denied, by any kind. This decides how step 3 rounds:
//
//   - A SlidingWindow of C holds, x after a window began, what its client took since then and C·(1 - x/P) of the window
//     before. Rounded up, or with the tick not yet over, that is C at each call of the client.
//   - The grain of a large SlidingLog returns a token up to P/256 late. So a hold of no more tokens than the client takes
//     in one grain returns a grain early: one 256th of the capacity, about, may be admitted beyond it in a period. A hold
//     that does not end with a grain was taken under a smaller capacity, and is exact.
//
// A bucket is its name, kind and period. Another capacity or refill counts at once and changes nothing that was spent:
// holds stay as they are, and a level is counted in the new units, rounded up, and drains by the new refill from the
// time on at which it was changed last. If it was empty by then under the refill before it stays so, as a storage may
// have forgotten it. Who toggles between plans gets no more than the most generous one admits.

// Kind names one of the five ways in which the tokens of a bucket come back.
type Kind uint8

// The five kinds. A token that is taken is a hold that ends:
//
//	Replenish      all tokens come back at once, one period after the first of them was taken
//	Continuous     the token bucket: tokens come back evenly, Refill of them a period
//	FixedWindow    all tokens come back at the next multiple of the period since the epoch
//	SlidingWindow  held to that multiple, then fading evenly over one more period
//	SlidingLog     each token comes back one period after it was taken
const (
	Replenish Kind = iota
	Continuous
	FixedWindow
	SlidingWindow
	SlidingLog
)

var kindNames = [...]string{"replenish", "continuous", "fixed", "sliding", "log"}

// String is the kind's word in a bucket's default name.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Law says how the tokens of a bucket come back. All times are in microseconds.
//
// A Continuous bucket and a SlidingWindow count in units, One of them a token: the parts of a token that come back
// in one Tick. So all that comes back in a tick is a whole number of units.
type Law struct {
	Kind   Kind
	Period int64
	Refill int64 // Continuous: tokens that come back each Period; else 0
	Tick   int64 // Continuous and SlidingWindow: time passes in steps of it, which divide the Period; else 1
	One    int64 // units a token; 1 but for Continuous and SlidingWindow
	Drain  int64 // Continuous: units that come back each Tick; else 0
	Grain  int64 // SlidingLog: tokens come back at multiples of it; else 1
}

// Same reports whether states under one law are states under the other. A bucket is its name, kind and period: with
// another refill or capacity it is the same bucket.
func (l *Law) Same(o *Law) bool { return l == o || l.Kind == o.Kind && l.Period == o.Period }

// ticks is floor(t / Tick).
func (l *Law) ticks(t int64) int64 {
	if l.Tick == 1 {
		return t
	}
	return t / l.Tick
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

// joins reports whether a token taken now joins the last hold, which is alive: else it makes one of its own.
func (l *Law) joins(last Hold, now int64) bool { return l.Kind == Replenish || last.End >= l.end(now) }

// atOnce reports whether all tokens of a hold come back at the same moment.
func (l *Law) atOnce() bool { return l.Kind != Continuous && l.Kind != SlidingWindow }

// fade is how long after its End a hold is gone.
func (l *Law) fade() int64 {
	if l.Kind == SlidingWindow {
		return l.Period - l.Tick
	}
	return 0
}

// returns is when the tokens of a hold come back, not before those of the hold before. In a large SlidingLog that is a
// grain early for as few tokens as the even client takes in a grain.
func (r *Rule) returns(h Hold, before int64) int64 {
	if r.Grain > 1 && h.End%r.Grain == 0 && h.N <= ceil(r.Capacity, logEntries)+ceil(r.Capacity, r.Period) {
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

// fades is when no more than room of the tokens of a hold of a SlidingWindow will be left.
func (l *Law) fades(h Hold, room int64) int64 {
	return h.End + l.Period - ceil((room+1)*l.One, h.N)*l.Tick
}

// drained is what is left now of a level that had so many units at seen: nothing after 35 years, as falls says.
func (l *Law) drained(units, seen, now int64) int64 {
	passed := l.ticks(now) - l.ticks(seen)
	hi, out := bits.Mul64(uint64(l.Drain), uint64(passed))
	if hi > 0 || out >= uint64(units) || (passed+1)*l.Tick > farFuture {
		return 0
	}
	return units - int64(out)
}

// falls is when a level that had so many units at seen will have fallen to others, at most 35 years after seen: what was
// spent under a faster refill may take longer than time can be counted.
func (l *Law) falls(units, seen, to int64) int64 {
	return (l.ticks(seen) + min(ceil(units-to, l.Drain), farFuture/l.Tick)) * l.Tick
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

// Ceiling is how many tokens of the bucket are ever out: 4 capacities, or what comes back in 4 periods if that is more. So a
// small burst can be reserved for some periods ahead.
func (r *Rule) Ceiling() int64 {
	if r.Refill <= r.Capacity {
		return 4 * r.Capacity
	}
	return max(4*r.Capacity, min(4*r.Refill, (exact-1)/r.One))
}

// recorded is how much of a cost is recorded beside what is spent.
func (r *Rule) recorded(cost, spent int64) int64 {
	if cost <= r.Capacity-spent {
		return cost
	}
	return min(cost, max(0, r.Ceiling()-spent))
}

// left is what remains of the capacity when a cost is taken beside what is spent: below zero it is a debt.
func (r *Rule) left(spent, cost int64) int64 {
	if cost > r.Capacity {
		cost = min(cost, r.Ceiling())
	}
	return r.Capacity - spent - cost
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
