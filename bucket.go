package throttler

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/period"
)

// Bucket is the definition of one limit. It is a value, made by NewBucket and its modifiers,
// which apply in any order; of two that choose a kind the later one counts. A faulty bucket may be
// passed around: it is reported, as *BucketError, by New, AddBucket or the call that uses it.
type Bucket struct {
	period   time.Duration
	tokens   int64 // as given to NewBucket
	burst    int64
	hasBurst bool
	least    int64
	elastic  bool
	kind     law.Kind
	name     string
	named    bool
	free     bool // of Unlimited

	rule   law.Rule // made of all above
	faults []error
}

// NewBucket returns a bucket of capacity tokens, which starts full. One period after the first
// token was taken all of them come back at once (Replenish); the modifiers choose otherwise. In the
// worst window of one period, around that moment, it admits nearly twice the capacity.
//
// The period is from 1 µs to 366 days; a part of a microsecond counts as a whole one. The capacity
// is from 0 to below 2^51. A bucket of capacity 0 admits nothing: each cost exceeds it (ErrCostExceedsCapacity). Continuous and SlidingWindow count in steps of the period: up to 10^13 tokens fit if the
// period is a whole number of milliseconds. An error names a number that does.
func NewBucket(period time.Duration, capacity int64) Bucket {
	return Bucket{period: period, tokens: capacity}.made()
}

// Unlimited returns a bucket that admits everything and has no Level: for plans and identifiers without a limit, where
// others have one. A call whose buckets are all Unlimited does not ask the storage. Its name is "unlimited", unless Named
// gives it another; no other modifier changes it.
func Unlimited() Bucket { return Bucket{free: true}.made() }

// Continuous makes tokens come back evenly, NewBucket's capacity of them each period: the token
// bucket. In the worst window of one period it admits the burst and a period's refill.
func (b Bucket) Continuous() Bucket { b.kind = law.Continuous; return b.made() }

// FixedWindow makes all tokens come back at each multiple of the period since the Unix epoch. In
// the worst window of one period, around such a moment, it admits twice the capacity.
func (b Bucket) FixedWindow() Bucket { b.kind = law.FixedWindow; return b.made() }

// SlidingWindow counts the tokens of the present window, of one period since a multiple of it, and
// those of the one before, fading evenly: the sliding window counter. After a burst just before a
// multiple of the period it admits twice the capacity within one period, but the second half
// evenly; short bursts stay near the capacity.
func (b Bucket) SlidingWindow() Bucket { b.kind = law.SlidingWindow; return b.made() }

// SlidingLog makes each token come back one period after it was taken: up to a capacity of 256 it never admits more than
// the capacity in any window of one period. A larger log counts in steps of period/256, so that admitted calls make at most
// about 256 entries: what is taken at once comes back up to a step late, and what is taken evenly up to a step early, so
// that it admits up to capacity/256 + 2 tokens more.
func (b Bucket) SlidingLog() Bucket { b.kind = law.SlidingLog; return b.made() }

// Burst makes a Continuous bucket hold n tokens in place of NewBucket's capacity, which remains the
// refill of a period. It is at least 1, and at most what comes back in 8.9 years. With 1 calls are
// spaced evenly.
func (b Bucket) Burst(n int64) Bucket { b.burst, b.hasBurst = n, true; return b.made() }

// Elastic lets the bucket shrink to at least so many tokens when Config.Load says that the process is loaded. They are those
// of NewBucket, 1 to its capacity: the capacity, or with Continuous what comes back each period. A Burst shrinks in
// proportion, to at least one token. What is spent stays spent, and RetryAfter is exact as long as the share stays the
// same. Without a Config.Load nothing changes.
//
// It is for limits that protect this process. Quotas that were promised to somebody are not elastic.
func (b Bucket) Elastic(least int64) Bucket { b.least, b.elastic = least, true; return b.made() }

// Named gives the bucket a name of 1 to 64 printable ASCII characters. What an identifier has
// spent is found by the bucket's name, kind and period: name the buckets of plans and tiers, so that the
// count continues under another capacity. The default is "<capacity>/<period>" as given to
// NewBucket ("5/10s", "100/1h"), followed by "/continuous", "/fixed", "/sliding" or "/log".
func (b Bucket) Named(name string) Bucket {
	b.name, b.named = strings.Clone(name), true
	return b.made()
}

// Name is the name that was given, or the default.
func (b Bucket) Name() string { return b.rule.Name }

// Period is the period, in whole microseconds. That of Unlimited is 0.
func (b Bucket) Period() time.Duration {
	if b.rule.Period == 0 || b.free {
		return b.period
	}
	return time.Duration(b.rule.Period) * time.Microsecond
}

// Kind is the word for how its tokens come back: "replenish", "continuous", "fixed", "sliding" or "log".
func (b Bucket) Kind() string { return b.kind.String() }

// Unlimited reports whether the bucket was made by Unlimited.
func (b Bucket) Unlimited() bool { return b.free }

// Capacity is how many tokens a full bucket holds: those of Burst, if there is one. That of Unlimited is math.MaxInt64.
func (b Bucket) Capacity() int64 {
	if b.free {
		return math.MaxInt64
	}
	if b.hasBurst {
		return b.burst
	}
	return b.tokens
}

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

// freed is made for Unlimited. Its rule, of which only the name counts, is one that cannot be faulty otherwise.
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

// inUserWords names the field that the user gave: a rule's capacity is that of Burst, if there is one,
// and its refill that of NewBucket.
func (b Bucket) inUserWords(fault law.Fault) error {
	switch {
	case fault.Field == "Capacity" && b.hasBurst:
		fault.Field = "Burst"
	case fault.Field == "Refill":
		fault.Field = "Capacity"
	}
	return (*BucketError)(&fault)
}
