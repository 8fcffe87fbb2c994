package storage

import (
	"fmt"
	"time"
)

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

// Bounds of a rule. Every number of the arithmetic stays below 2^53, so that an int64, a Lua
// double and a bigint hold the same bits.
const (
	exact      = int64(1) << 53
	maxPeriod  = 366 * 24 * time.Hour
	maxName    = 64
	logEntries = 256            // a log of at most this capacity is exact to the microsecond
	farFuture  = int64(1) << 50 // 35 years in microseconds: the longest that anything takes to come back
	maxClock   = exact - 2*farFuture
	tolerance  = int64(60_000_000) // microseconds, beyond one period, that a state may be ahead of the clock
)

// Law says how the tokens of a bucket come back. Capacity is not part of it: changing only a
// limit converts no state. All times are in microseconds.
type Law struct {
	Kind   Kind
	Period int64
	Refill int64 // Continuous: tokens that come back each Period; else 0
	Tick   int64 // Continuous and SlidingWindow measure time in ticks of 1 µs, 1 ms or 1 s; else 1
	Grain  int64 // SlidingLog: tokens come back at multiples of it; else 1
}

// Rule is one bucket of a request: its name, which finds its state, its law and its capacity.
// Rules are made by NewRule and never change afterwards.
type Rule struct {
	Name string
	Law
	Capacity int64 // tokens of a full bucket
}

// BucketError is a fault in the definition of a bucket, or in the way a call uses one.
type BucketError struct {
	Bucket string // its name
	Field  string // Period, Capacity, Refill, Burst, Kind, Name, CostOf or Buckets
	Reason string // what was given and what is allowed
}

func (e *BucketError) Error() string {
	return fmt.Sprintf("throttler: bucket %q: %s %s", e.Bucket, e.Field, e.Reason)
}

// NewRule makes the rule of a bucket that holds capacity tokens. Of them, refill come back each
// period if it is Continuous; the other kinds ignore refill. A period that is not a whole number
// of microseconds is rounded up. All faults are returned, each as a *BucketError.
func NewRule(name string, kind Kind, period time.Duration, capacity, refill int64) (Rule, []error) {
	var faults []error
	fault := func(field, format string, args ...any) {
		faults = append(faults, &BucketError{Bucket: name, Field: field, Reason: fmt.Sprintf(format, args...)})
	}
	if !validName(name) {
		fault("Name", "must be 1 to %d printable ASCII characters", maxName)
	}
	if kind > SlidingLog {
		fault("Kind", "is %d, must be 0 to %d", kind, SlidingLog)
	}
	if period < time.Microsecond || period > maxPeriod {
		fault("Period", "is %v, must be from 1µs to %v", period, maxPeriod)
	}
	if capacity <= 0 || capacity >= exact/4 {
		fault("Capacity", "is %d, must be from 1 to %d", capacity, exact/4-1)
	}
	law := Law{Kind: kind, Period: int64((period + time.Microsecond - 1) / time.Microsecond), Tick: 1, Grain: 1}
	largest := capacity
	if kind == Continuous {
		if refill != capacity && (refill <= 0 || refill >= exact/4) {
			fault("Refill", "is %d, must be from 1 to %d", refill, exact/4-1)
		}
		law.Refill = refill
		largest = max(capacity, refill)
	}
	if len(faults) > 0 {
		return Rule{Name: name}, faults
	}
	if kind == Continuous && ceil(4*capacity, refill) > farFuture/law.Period {
		fault("Burst", "of %d at %d a period of %v takes over 8 years to come back", capacity, refill, period)
		return Rule{Name: name}, faults
	}
	if kind == SlidingLog && capacity > logEntries {
		law.Grain = ceil(law.Period, logEntries)
	}
	if kind == Continuous || kind == SlidingWindow {
		for law.Period%law.Tick != 0 || largest > (exact-1)/4/(law.Period/law.Tick) {
			if law.Tick *= 1000; law.Tick > 1_000_000 {
				fault(largestField(capacity, refill, kind), "of %d is too large for a period of %v: in ticks of 1µs, 1ms or 1s that divide the period, 4 times capacity times ticks must stay below 2^53", largest, period)
				return Rule{Name: name}, faults
			}
		}
	}
	return Rule{Name: name, Law: law, Capacity: capacity}, nil
}

func largestField(capacity, refill int64, kind Kind) string {
	if kind == Continuous && refill > capacity {
		return "Refill"
	}
	return "Capacity"
}

func validName(name string) bool {
	for i := range len(name) {
		if name[i] < ' ' || name[i] > '~' {
			return false
		}
	}
	return name != "" && len(name) <= maxName
}
