package throttler

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/period"
)

// Bucket is the definition of one limit. It is a value, made by [NewBucket] and its modifiers. The modifiers apply in
// any order; if several choose a kind, the last one counts. A faulty bucket may be passed around: New, AddBucket or the
// call that uses it returns its faults as [*BucketError].
type Bucket struct {
	period   time.Duration
	tokens   int64 // the capacity as given to NewBucket
	burst    int64
	hasBurst bool
	least    int64
	elastic  bool
	kind     law.Kind
	name     string
	named    bool
	free     bool // made by Unlimited

	rule   law.Rule // computed from all fields above
	faults []error
}

// NewBucket returns a bucket that holds capacity tokens and starts full. All of its tokens are returned at once, one
// period after the first of them was taken. This kind is called Replenish; the modifiers choose another. In the worst
// window of one period, around the moment of the refill, it admits nearly twice the capacity.
//
// The period is from 1 µs to 366 days; a fraction of a microsecond is rounded up. The capacity is from 0 to below 2^51.
// A bucket of capacity 0 admits nothing, since every cost exceeds it (ErrCostExceedsCapacity). Continuous and
// SlidingWindow divide the period into steps, which bounds the capacity further: 10^13 tokens fit if the period is a
// whole number of milliseconds. The error of a capacity that does not fit names one that does.
func NewBucket(period time.Duration, capacity int64) Bucket {
	return Bucket{period: period, tokens: capacity}.made()
}

// Unlimited returns a bucket that admits everything and has no Level. It is for plans and identifiers that have no limit
// where others have one. A call whose buckets are all Unlimited does not ask the storage. The bucket's name is
// "unlimited" unless Named gives it another; no other modifier changes it.
func Unlimited() Bucket { return Bucket{free: true}.made() }

// Continuous makes the bucket a token bucket: its tokens are refilled evenly, NewBucket's capacity of them per period.
// In the worst window of one period it admits what it holds when full (see Burst) plus a period's refill.
func (b Bucket) Continuous() Bucket { b.kind = law.Continuous; return b.made() }

// FixedWindow makes all tokens return at each multiple of the period since the Unix epoch. In the worst window of one
// period, around such a multiple, it admits twice the capacity.
func (b Bucket) FixedWindow() Bucket { b.kind = law.FixedWindow; return b.made() }

// SlidingWindow makes the bucket a sliding window counter. Windows begin at the multiples of the period. The tokens
// taken in the present window count in full, and those of the window before fade evenly. After a burst just before a
// multiple of the period it admits twice the capacity within one period, but the second half evenly. Within times much
// shorter than the period it admits little more than the capacity.
func (b Bucket) SlidingWindow() Bucket { b.kind = law.SlidingWindow; return b.made() }

// SlidingLog makes each token return one period after it was taken. Up to a capacity of 256 it never admits more than
// the capacity in any window of one period.
//
// A larger log counts in steps of period/256, so that it stores at most about 256 entries. Tokens taken at once then
// return up to a step late, and tokens taken evenly up to a step early. A window of one period therefore admits up to
// capacity/256 + 2 tokens more than the capacity.
func (b Bucket) SlidingLog() Bucket { b.kind = law.SlidingLog; return b.made() }

// Burst makes a Continuous bucket hold n tokens instead of NewBucket's capacity, which remains the refill per period. The
// range of n is 1 to what is refilled in 8.9 years. With Burst(1) calls are spaced evenly.
func (b Bucket) Burst(n int64) Bucket { b.burst, b.hasBurst = n, true; return b.made() }

// Elastic lets the bucket shrink when Config.Load reports that the process is loaded, down to least tokens. Like the
// capacity given to NewBucket, least counts the tokens of a full bucket, or those refilled per period if the bucket is
// Continuous. Its range is 1 to that capacity. A Burst shrinks in proportion, to at least one token. What is spent stays
// spent, and RetryAfter is exact as long as the share does not change. Without a Config.Load nothing changes.
//
// Elastic is for limits that protect this process, not for quotas that were promised to somebody.
func (b Bucket) Elastic(least int64) Bucket { b.least, b.elastic = least, true; return b.made() }

// Named gives the bucket a name of 1 to 64 printable ASCII characters. The storage finds what an identifier has spent by
// the bucket's name, kind and period. So name the buckets of plans and tiers: the count then continues under another
// capacity. The default name is "<capacity>/<period>" as given to NewBucket ("5/10s", "100/1h"), followed by
// "/continuous", "/fixed", "/sliding" or "/log" for those kinds.
func (b Bucket) Named(name string) Bucket {
	b.name, b.named = strings.Clone(name), true
	return b.made()
}

// Name returns the name given by Named, or the default name.
func (b Bucket) Name() string { return b.rule.Name }

// Period returns the period in whole microseconds, rounded up. For an Unlimited bucket it is 0.
func (b Bucket) Period() time.Duration {
	if b.rule.Period == 0 || b.free {
		return b.period
	}
	return time.Duration(b.rule.Period) * time.Microsecond
}

// Kind names how the tokens are refilled: "replenish", "continuous", "fixed", "sliding" or "log". It has no meaning for
// an Unlimited bucket.
func (b Bucket) Kind() string { return b.kind.String() }

// Unlimited reports whether the bucket was made by Unlimited.
func (b Bucket) Unlimited() bool { return b.free }

// Capacity returns how many tokens a full bucket holds: the n of Burst, or NewBucket's capacity if there is no Burst. For
// an Unlimited bucket it is math.MaxInt64.
func (b Bucket) Capacity() int64 {
	if b.free {
		return math.MaxInt64
	}
	if b.hasBurst {
		return b.burst
	}
	return b.tokens
}

// made computes the rule and the faults from the other fields. Every modifier ends with it, so that the order of modifiers
// does not matter and a call has nothing left to compute.
func (b Bucket) made() Bucket {
	if b.free {
		return b.freed()
	}
	name := b.name
	if !b.named {
		name = fmt.Sprintf("%d/%s", b.tokens, period.Format(b.period))
		if b.kind != law.Replenish {
			name += "/" + b.kind.String()
		}
	}
	var faults []law.Fault
	b.rule, faults = law.NewRule(name, b.kind, b.period, b.Capacity(), b.tokens)
	b.faults = nil
	for _, fault := range faults {
		b.faults = append(b.faults, b.inUserWords(fault))
	}
	if b.hasBurst && b.burst == 0 {
		b.faults = append(b.faults, &BucketError{Bucket: name, Field: "Burst", Reason: "is 0, must be at least 1; a bucket that admits nothing is NewBucket(period, 0)"})
	}
	if b.hasBurst && b.kind != law.Continuous {
		b.faults = append(b.faults, &BucketError{Bucket: name, Field: "Burst", Reason: fmt.Sprintf("of %d is for a Continuous bucket only", b.burst)})
	}
	if b.elastic && (b.least < 1 || b.least > b.tokens) {
		b.faults = append(b.faults, &BucketError{Bucket: name, Field: "Elastic", Reason: fmt.Sprintf("of %d must be from 1 to %d, the capacity of NewBucket", b.least, b.tokens)})
	}
	return b
}

// freed is made for an Unlimited bucket. Only the name of its rule counts; the other numbers are valid ones, so that
// only the name can be faulty.
func (b Bucket) freed() Bucket {
	name := b.name
	if !b.named {
		name = unlimited
	}
	var faults []law.Fault
	b.rule, faults = law.NewRule(name, law.Replenish, time.Hour, 1, 1)
	b.faults = nil
	for i := range faults {
		b.faults = append(b.faults, (*BucketError)(&faults[i]))
	}
	return b
}

// inUserWords renames the faulty field to the one that the user set: a rule's capacity comes from Burst if there is one,
// and a rule's refill comes from NewBucket's capacity.
func (b Bucket) inUserWords(fault law.Fault) error {
	switch {
	case fault.Field == "Capacity" && b.hasBurst:
		fault.Field = "Burst"
	case fault.Field == "Refill":
		fault.Field = "Capacity"
	}
	return (*BucketError)(&fault)
}
