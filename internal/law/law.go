package law

import (
	"fmt"
	"math/bits"
)

// The arithmetic. A taken token is a hold, a number of tokens that are out until an end. All five kinds follow one
// table, where P is the period:
//
//	kind           a token's hold ends at            it joins                         then
//	Replenish      now + P                           the last hold while that lives   all back at once
//	FixedWindow    the next multiple of P            the hold of that or a later end  all back at once
//	SlidingWindow  the next multiple of P            the hold of that or a later end  fades evenly over the next P
//	SlidingLog     now + P, rounded up to the grain  the hold of that or a later end  back one by one
//	Continuous     -                                 one level                        drains Refill a P
//
// The even client. A client that takes one token every Period/Capacity is never denied, by any kind. This promise
// decides how step 3 of a decision rounds:
//
//   - At the time x after a window began, a SlidingWindow of capacity C holds what the even client took since then, and
//     C·(1 - x/P) of the window before. Rounded up, or with the present tick counted as not yet over, the sum would be
//     C at each call, and the call would be denied. So the second term is rounded down.
//   - The grain of a large SlidingLog returns a token up to P/256 late. To make up for that, a hold of no more tokens
//     than the even client takes in one grain returns one grain early. About one 256th of the capacity may therefore be
//     admitted beyond it in a period. A hold that does not end at a multiple of the grain was taken under a smaller
//     capacity and is exact.
//
// Changed limits. A bucket is its name, kind and period. Another capacity or refill counts at once and changes nothing
// that was spent. Holds stay as they are. A level is counted in the new units, rounded up, and drains by the new refill
// from its last change on. If the level would have been empty under the old refill it counts as empty, because a
// storage may have forgotten it. So a caller that toggles between plans gets no more than the most generous one admits.

// Kind names one of the five ways in which the tokens of a bucket come back.
type Kind uint8

// The five kinds. A taken token is a hold that ends:
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

// String returns the kind's word in the default name of a bucket, such as "fixed".
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Law says how the tokens of a bucket come back. All times are in microseconds.
//
// A Continuous bucket and a SlidingWindow divide tokens into units, chosen so that a whole number of them comes back
// each Tick. No smaller part of a token is ever counted, so nothing is rounded as time passes.
type Law struct {
	Kind   Kind
	Period int64
	Refill int64 // Continuous: tokens that come back each Period; else 0
	Tick   int64 // Continuous and SlidingWindow: time passes in steps of it, which divide the Period; else 1
	One    int64 // Continuous and SlidingWindow: units a token has; else 1
	Drain  int64 // Continuous: units that come back each Tick; else 0
	Grain  int64 // SlidingLog of a capacity above 256: tokens come back at multiples of it; else 1
}

// Same reports whether a state under one law is one under the other too. Refill and capacity do not matter: a bucket is
// its name, kind and period.
func (l *Law) Same(o *Law) bool { return l == o || l.Kind == o.Kind && l.Period == o.Period }

// ticks returns floor(t / Tick), how many ticks are over at the time t. The test for 1 saves a division.
func (l *Law) ticks(t int64) int64 {
	if l.Tick == 1 {
		return t
	}
	return t / l.Tick
}

// end returns when the hold of a token taken now ends.
func (l *Law) end(now int64) int64 {
	switch l.Kind {
	case FixedWindow, SlidingWindow:
		return now - now%l.Period + l.Period
	case SlidingLog:
		return roundUp(now+l.Period, l.Grain)
	}
	return now + l.Period
}

// joins reports whether a token taken now joins the last hold, which is alive. Otherwise it makes a hold of its own.
// Ends never run backwards: a token joins a hold with a later end, which an earlier clock or another grain may have
// made.
func (l *Law) joins(last Hold, now int64) bool { return l.Kind == Replenish || last.End >= l.end(now) }

// atOnce reports whether all tokens of a hold come back at the same moment.
func (l *Law) atOnce() bool { return l.Kind != Continuous && l.Kind != SlidingWindow }

// fade returns how long after its End a hold is entirely gone. Only a SlidingWindow fades. Its last tick counts as
// over.
func (l *Law) fade() int64 {
	if l.Kind == SlidingWindow {
		return l.Period - l.Tick
	}
	return 0
}

// returns is when the tokens of a hold are back, but not before those of the previous hold, which are back at
// before. In a large SlidingLog that is one grain before the End, if the hold has no more tokens than the even client
// takes in a grain: C/256, and C/Period more because a grain is rounded up to whole microseconds.
func (r *Rule) returns(h Hold, before int64) int64 {
	if r.Grain > 1 && h.End%r.Grain == 0 && h.N <= ceil(r.Capacity, logEntries)+ceil(r.Capacity, r.Period) {
		return max(before, h.End-r.Grain)
	}
	return h.End
}

// unfaded returns how many tokens are left of a hold of a SlidingWindow, rounded down, with the present tick counted as
// over: both for the even client.
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

// fades returns when no more than room tokens of a hold of a SlidingWindow will be left. It is the inverse of unfaded,
// for room below h.N: the first tick at which h.N·left/One is below room+1.
func (l *Law) fades(h Hold, room int64) int64 {
	return h.End + l.Period - ceil((room+1)*l.One, h.N)*l.Tick
}

// drained returns what is left now of a level that had so many units at seen: nothing after 35 years, as falls has it.
// The product has 128 bits, since a drain and the ticks of a long time may both be large.
func (l *Law) drained(units, seen, now int64) int64 {
	passed := l.ticks(now) - l.ticks(seen)
	hi, out := bits.Mul64(uint64(l.Drain), uint64(passed))
	if hi > 0 || out >= uint64(units) || (passed+1)*l.Tick > farFuture {
		return 0
	}
	return units - int64(out)
}

// falls returns when a level that had so many units at seen will have fallen to the lower level to. That is at most 35
// years after seen: what was spent under a faster refill might otherwise take longer than times below 2^53 can tell.
func (l *Law) falls(units, seen, to int64) int64 {
	return (l.ticks(seen) + min(ceil(units-to, l.Drain), farFuture/l.Tick)) * l.Tick
}

// leftOf returns how many units are left of n tokens of a Continuous level that are all back in the time in: as many as
// drain in that time, to within a tick's refill, and no more than n tokens have.
func (l *Law) leftOf(n, in int64) int64 {
	in = min(in, farFuture)
	if all := n * l.One; ceil(in, l.Tick) >= ceil(all, l.Drain) {
		return all
	}
	return ceil(in, l.Tick) * l.Drain
}

// Ceiling returns the most tokens of the bucket that are ever out: 4 capacities, or what comes back in 4 periods if
// that is more. The second lets a small burst be reserved for some periods ahead. It is bounded by the units below
// 2^53.
func (r *Rule) Ceiling() int64 {
	if r.Refill <= r.Capacity {
		return 4 * r.Capacity
	}
	return max(4*r.Capacity, min(4*r.Refill, (exact-1)/r.One))
}

// recorded returns how much of a cost is recorded beside what is spent: all of it if it fits into the capacity,
// otherwise as much as fits below the ceiling.
func (r *Rule) recorded(cost, spent int64) int64 {
	if cost <= r.Capacity-spent {
		return cost
	}
	return min(cost, max(0, r.Ceiling()-spent))
}

// left returns what remains of the capacity after a cost was taken beside what was spent; below zero it is a debt. It
// counts tokens that recorded leaves out, but of one cost no more than the ceiling, so that it cannot overflow.
func (r *Rule) left(spent, cost int64) int64 {
	if cost > r.Capacity {
		cost = min(cost, r.Ceiling())
	}
	return r.Capacity - spent - cost
}

// scale returns n·a/b rounded down, and whether the division left a rest. N and a must be 0 or more, and n·a/b below
// 2^63; the product may be larger.
func scale(n, a, b int64) (quotient int64, more bool) {
	hi, lo := bits.Mul64(uint64(n), uint64(a))
	q, rest := bits.Div64(hi, lo, uint64(b))
	return int64(q), rest > 0
}

// ceil returns a/b rounded up, for a of 0 or more.
func ceil(a, b int64) int64 {
	if b == 1 {
		return a
	}
	return (a + b - 1) / b
}

// roundUp returns the next multiple of a grain from t on.
func roundUp(t, grain int64) int64 { return ceil(t, grain) * grain }

func abs(n int64) int64 { return max(n, -n) }
