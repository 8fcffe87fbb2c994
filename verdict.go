// What a call answers: the Verdict and its Levels, or an error.

package throttler

import (
	"errors"
	"fmt"

	"github.com/go-throttler/throttler/storage"
)

// Verdict is the answer to a call: Allowed bool; RetryAfter time.Duration, exact to 1 µs, 0 if allowed;
// Levels() []Level; Source() string, "runtime", "redis" or "postgres", or "" if no storage answered;
// Degraded() and Taken() bool. The methods have pointer receivers. See storage.Verdict.
type Verdict = storage.Verdict

// Level is the state of one bucket right after a decision: Identifier and Bucket, string; Limit, Remaining
// and Debt, int64, in tokens; Period, ResetAfter until full, NextAfter until one token more may be taken, and
// RetryAfter until this bucket admits the denied cost, 0 if it did, each a time.Duration. See storage.Level.
type Level = storage.Level

// Clock tells the time and waits: github.com/benbjohnson/clock has some.
type Clock = storage.Clock

// BucketError is a fault in the definition of a bucket, or in the way a call uses one: the Bucket, the
// Field and the Reason. See storage.BucketError.
type BucketError = storage.BucketError

// The errors, always wrapped with the particulars: test with errors.Is. A faulty bucket is a
// *BucketError.
var (
	ErrUnknownIdentifier   = storage.ErrUnknownIdentifier        // it has no buckets, and Config has none for it
	ErrInvalidIdentifier   = storage.ErrInvalidIdentifier        // empty, over 1024 bytes, twice in one call, or over 256 of them
	ErrInvalidCost         = storage.ErrInvalidCost              // below zero, or a refund above what was taken
	ErrCostExceedsCapacity = storage.ErrCostExceedsCapacity      // waiting never helps; the Verdict beside it has the Levels
	ErrDebtLimit           = errors.New("throttler: debt limit") // a Charge that was recorded in part: a *DebtError
	ErrInvalidClock        = storage.ErrInvalidClock             // Config.Clock reads a time outside 1970 to 2184
	ErrUnavailable         = storage.ErrUnavailable              // the storage could not decide
	ErrCorruptState        = storage.ErrCorruptState             // the storage holds a value that is not ours; never the runtime storage
	ErrClosed              = storage.ErrClosed                   // the storage was closed; never the runtime storage
)

// ErrLimited is what a LimitedError is, for errors.Is.
var ErrLimited = errors.New("throttler: limited")

// LimitedError is a denial for callers that want an error: return &LimitedError{Verdict: v} when v is not
// Allowed. Consume itself never returns it.
type LimitedError struct{ Verdict Verdict }

// Error says who was limited, by which bucket and for how long.
func (e *LimitedError) Error() string {
	id, bucket := refusedBy(&e.Verdict)
	return fmt.Sprintf("%v: %.64q by bucket %q, retry after %v", ErrLimited, id, bucket, e.Verdict.RetryAfter)
}

// Unwrap returns ErrLimited.
func (e *LimitedError) Unwrap() error { return ErrLimited }

// DebtError is what a Charge returns for a bucket that owes too much: at most 4 capacities are ever out of one.
type DebtError struct {
	Identifier, Bucket string
	Asked, Recorded    int64 // tokens
	Limit              int64 // tokens that may be out: 4 capacities
}

// Error says how much of the charge was recorded.
func (e *DebtError) Error() string {
	return fmt.Sprintf("%v: of %d tokens charged to bucket %q of %.64q, %d are recorded, as no more than %d may be out", ErrDebtLimit, e.Asked, e.Bucket, e.Identifier, e.Recorded, e.Limit)
}

// Unwrap returns ErrDebtLimit.
func (e *DebtError) Unwrap() error { return ErrDebtLimit }

// unrecorded is the error of a Charge that some buckets did not take whole, of which the counts then tell what is.
func unrecorded(v *Verdict) error {
	var faults []error
	n := 0
	for i := range v.Parts() {
		p := v.Part(i)
		for j := range p.Rules {
			r, c, asked := &p.Rules[j], v.Count(n), p.Cost(j)
			if over := -c.Remaining - 3*r.Capacity; over > 0 && asked > 0 {
				most := min(asked, 4*r.Capacity)
				recorded := max(0, most-over)
				c.Remaining += most - recorded
				v.Set(n, c)
				faults = append(faults, &DebtError{p.Identifier, r.Name, asked, recorded, 4 * r.Capacity})
			} else if asked > 4*r.Capacity {
				faults = append(faults, &DebtError{p.Identifier, r.Name, asked, 4 * r.Capacity, 4 * r.Capacity})
			}
			n++
		}
	}
	return errors.Join(faults...)
}
