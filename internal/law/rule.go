package law

// The numbers of a bucket, and how they are chosen for a period and a capacity.

import (
	"fmt"
	"time"
)

// Bounds of a rule. Every number of the arithmetic stays below 2^53, so that an int64, a double of Lua and a bigint of
// Postgres hold it exactly.
const (
	exact      = int64(1) << 53
	maxPeriod  = 366 * 24 * time.Hour
	maxName    = 64  // bytes
	logEntries = 256 // a SlidingLog of up to this capacity is exact to the microsecond, and has no more holds
	farFuture  = FarFuture
	maxClock   = exact - 2*farFuture // a time below it, and what is added to it, stays below 2^53: the year 2184
	tolerance  = int64(60_000_000)   // microseconds, beyond one period, that a state may be ahead of the clock
)

// FarFuture is 35 years in microseconds, the longest that anything takes to come back.
const FarFuture = int64(1) << 50

// Rule is one bucket of a request: its name, which finds its state, its law and its capacity. Rules are made by NewRule
// and Shrunk, and never change afterwards.
type Rule struct {
	Name string
	Law
	Capacity int64 // tokens of a full bucket
	Full     int64 // the Capacity before the rule was Shrunk; the same if it was not
	Window   int64 // microseconds in which an empty bucket becomes full: the Period, except with a burst
}

// BucketID finds the state of a bucket among those of an identifier. Capacity and refill are not part of it, so a
// bucket keeps what was spent when only these change.
type BucketID struct {
	Name   string
	Kind   Kind
	Period int64 // microseconds
}

// ID returns the BucketID of the rule's bucket.
func (r *Rule) ID() BucketID { return BucketID{r.Name, r.Kind, r.Period} }

// SameBucket reports whether both rules have the same ID.
func (r *Rule) SameBucket(o *Rule) bool { return r.Name == o.Name && r.Same(&o.Law) }

// Fault is a fault in the definition of a bucket. Package storage makes a BucketError of it.
type Fault struct{ Bucket, Field, Reason string }

// NewRule returns the rule of a bucket that holds capacity tokens. A bucket of capacity 0 admits nothing. If it is
// Continuous, refill tokens come back each period; the other kinds ignore refill.
//
// The name is 1 to 64 printable ASCII characters. The period is from 1 µs to 366 days, and rounded up to a whole number
// of microseconds. Capacity and refill are below 2^51, and smaller for periods that divide badly (measure). All faults
// are returned; if there are any, only the name of the rule is set.
func NewRule(name string, kind Kind, period time.Duration, capacity, refill int64) (Rule, []Fault) {
	var faults []Fault
	fault := func(field, format string, args ...any) {
		faults = append(faults, Fault{name, field, fmt.Sprintf(format, args...)})
	}
	if !validName(name) {
		fault("Name", "must be 1 to %d printable ASCII characters", maxName)
	}
	if kind > SlidingLog {
		fault("Kind", "is %d, must be 0 to %d", kind, SlidingLog)
	}
	if period < time.Microsecond || period > maxPeriod {
		fault("Period", "is %v, must be from 1µs to %d days", period, maxPeriod/(24*time.Hour))
	}
	if capacity < 0 || capacity >= exact/4 {
		fault("Capacity", "is %d, must be from 0 to %d", capacity, exact/4-1)
	}
	law := Law{Kind: kind, Period: int64((period + time.Microsecond - 1) / time.Microsecond), Tick: 1, One: 1, Grain: 1}
	if kind == Continuous {
		if refill != capacity && (refill <= 0 || refill >= exact/4) {
			fault("Refill", "is %d, must be from 1 to %d", refill, exact/4-1)
		}
		law.Refill = max(1, refill) // at capacity 0, where nothing is ever taken, a refill of 0 means nothing
	}
	if len(faults) > 0 {
		return Rule{Name: name}, faults
	}
	if kind == Continuous && ceil(4*capacity, law.Refill) > farFuture/law.Period {
		fault("Burst", "of %d at %d a period of %v takes over 8 years to come back", capacity, refill, period)
		return Rule{Name: name}, faults
	}
	if kind == SlidingLog && capacity > logEntries {
		law.Grain = ceil(law.Period, logEntries)
	}
	if (kind == Continuous || kind == SlidingWindow) && !law.measureFor(capacity) {
		field, given := "Capacity", capacity
		if law.Refill > capacity {
			field, given = "Refill", refill
		}
		fault(field, "of %d is too large for a period of %v%s", given, period, law.advice(capacity))
		return Rule{Name: name}, faults
	}
	return Rule{Name: name, Law: law, Capacity: capacity, Full: capacity, Window: law.window(capacity)}, nil
}

// measureFor sets the Tick and the units of the law of a bucket with this capacity, and reports whether there are any
// in the bounds. Normally they are chosen for the larger of capacity and refill. A small burst at a large refill would
// then get back more than its capacity in one tick, so the units are chosen for the burst.
func (l *Law) measureFor(capacity int64) bool {
	by := *l
	ok := by.measure(max(capacity, l.Refill))
	if l.Kind == Continuous && (!ok || ceil(l.Refill, l.Period/by.Tick) > capacity) {
		if again := *l; again.measure(capacity) {
			by, ok = again, true
		}
	}
	if ok {
		*l = by
	}
	return ok
}

// advice returns the part of an error that says what to change about a bucket that has no Tick in the bounds: the
// capacity or refill, whichever is larger, to the largest number that would fit, or the period. It finds the number by
// bisection.
func (l *Law) advice(capacity int64) string {
	const other = "the period has to be one that divides into equal steps of whole microseconds, such as whole minutes"
	fits := func(n int64) bool {
		by, c := *l, n
		switch {
		case l.Kind == Continuous && l.Refill == capacity:
			by.Refill = n
		case l.Refill > capacity:
			by.Refill, c = n, capacity
		}
		return n > 0 && (l.Kind != Continuous || ceil(4*c, by.Refill) <= farFuture/l.Period) && by.measureFor(c)
	}
	given := max(capacity, l.Refill)
	most := given
	for most > 0 && !fits(most) {
		most /= 2
	}
	for step := most / 2; step > 0; step /= 2 {
		if most+step < given && fits(most+step) {
			most += step
		}
	}
	if most == 0 {
		return ": " + other
	}
	return fmt.Sprintf(": %d would fit, or else %s", most, other)
}

// leastSteps is the fewest ticks that a period may have, unless a tick is a microsecond. With fewer, tokens would come
// back in jumps.
const leastSteps = 16

// measure sets the finest Tick for which 4 times the largest of capacity and refill, in units, stays below 2^53, and
// reports whether there is one. It tries a microsecond, a millisecond and a second first. If none of these will do, it
// divides the period into as many equal steps as the bound allows, if these are at least leastSteps.
func (l *Law) measure(largest int64) bool {
	for _, tick := range [...]int64{1, 1000, 1_000_000} {
		if steps := l.Period / tick; l.Period%tick == 0 && (steps >= leastSteps || tick == 1) && l.divide(steps, largest) {
			return true
		}
	}
	steps := l.steps((exact - 1) / 4 / largest)
	return steps >= leastSteps && l.divide(steps, largest)
}

// steps returns the largest number of equal steps, no more than most, into which the period divides. It looks only at
// numbers without a prime factor above 7, which periods that people use have enough of.
func (l *Law) steps(most int64) (best int64) {
	divisors := []int64{1}
	for _, prime := range [...]int64{2, 3, 5, 7} {
		smaller := divisors
		for power := prime; l.Period%power == 0; power *= prime {
			for _, d := range smaller {
				divisors = append(divisors, d*power)
			}
		}
	}
	for _, d := range divisors {
		if d <= most {
			best = max(best, d)
		}
	}
	return best
}

// divide sets the Tick and the units for so many steps a period, if they are in the bounds. A Continuous bucket gets
// the largest units of which a whole number makes a token and a whole number comes back each step.
func (l *Law) divide(steps, largest int64) bool {
	one, drain := steps, int64(0)
	if l.Kind == Continuous {
		common := gcd(steps, l.Refill)
		one, drain = steps/common, l.Refill/common
	}
	if largest > (exact-1)/4/one {
		return false
	}
	l.Tick, l.One, l.Drain = l.Period/steps, one, drain
	return true
}

// window returns the time in which a whole capacity comes back, in microseconds and rounded up. NewRule keeps it below
// 2^50.
func (l *Law) window(capacity int64) int64 {
	if l.Kind != Continuous {
		return l.Period
	}
	whole, more := scale(capacity, l.Period, l.Refill)
	if more {
		whole++
	}
	return whole
}

// gcd returns the greatest common divisor.
func gcd(a, b int64) int64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// validName reports whether a name is 1 to 64 printable ASCII characters, which every storage and protocol can hold.
func validName(name string) bool {
	for i := range len(name) {
		if name[i] < ' ' || name[i] > '~' {
			return false
		}
	}
	return name != "" && len(name) <= maxName
}
