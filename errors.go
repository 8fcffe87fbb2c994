// The errors of this package.

package throttler

import (
	"errors"
	"fmt"

	"github.com/go-throttler/throttler/storage"
)

// BucketError is a fault in the definition of a bucket, or in the way a call uses one: the Bucket, the
// Field and the Reason. See storage.BucketError.
type BucketError = storage.BucketError

// The errors, always wrapped with the particulars: test with errors.Is. A faulty bucket is a
// *BucketError.
var (
	ErrUnknownIdentifier   = errors.New("throttler: unknown identifier")                                   // it has no buckets, and Config has none for it
	ErrInvalidIdentifier   = errors.New("throttler: invalid identifier")                                   // empty, over 1024 bytes, twice in one call, or over 256 of them
	ErrInvalidCost         = errors.New("throttler: invalid cost")                                         // below zero, or a refund above what was taken
	ErrCostExceedsCapacity = errors.New("throttler: cost exceeds capacity")                                // waiting never helps; the Verdict beside it has the Levels
	ErrDebtLimit           = errors.New("throttler: debt limit")                                           // a Charge that was recorded in part: a *DebtError
	ErrInvalidReserve      = errors.New("throttler: invalid time to reserve within")                       // below 0, or over 366 days
	ErrTooManyWaiters      = errors.New("throttler: too many waiters")                                     // of a Wait: Config.MaxWaiters wait for the identifier
	ErrInvalidClock        = errors.New("throttler: the injected clock is outside the years 1970 to 2184") // Config.Clock reads a time outside 1970 to 2184
	ErrUnavailable         = storage.ErrUnavailable                                                        // the storage could not decide
	ErrCorruptState        = storage.ErrCorruptState                                                       // the storage holds a value that is not ours; never the runtime storage
	ErrClosed              = storage.ErrClosed                                                             // the storage was closed; never the runtime storage
)

// ErrLimited is what a LimitedError is, for errors.Is.
var ErrLimited = errors.New("throttler: limited")

// LimitedError is a denial for callers that want an error: return &LimitedError{Verdict: v} when v is not
// Allowed. Consume itself never returns it.
type LimitedError struct{ Verdict Verdict }

// Error says who was limited, by which bucket and for how long.
func (e *LimitedError) Error() string {
	id, bucket := deniedBy(&e.Verdict)
	return fmt.Sprintf("%v: %.64q by bucket %q, retry after %v", ErrLimited, id, bucket, e.Verdict.RetryAfter)
}

// Unwrap returns ErrLimited.
func (e *LimitedError) Unwrap() error { return ErrLimited }

// DebtError is what a Charge returns for a bucket that owes too much: at most 4 capacities are ever out of one, or what
// comes back in 4 periods if that is more.
type DebtError struct {
	Identifier, Bucket string
	Asked, Recorded    int64 // tokens
	Limit              int64 // tokens that may be out
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
	for _, p := range v.parts() {
		for j := range p.Rules.Rules {
			r, c, asked := &p.Rules.Rules[j], &v.all()[n], v.asked()[n]
			limit := r.Ceiling()
			n++
			if over := r.Capacity - c.Remaining - limit; over > 0 && asked > 0 {
				most := min(asked, limit)
				recorded := max(0, most-over)
				c.Remaining += most - recorded
				faults = append(faults, &DebtError{p.Identifier, r.Name, asked, recorded, limit})
			} else if asked > limit {
				faults = append(faults, &DebtError{p.Identifier, r.Name, asked, limit, limit})
			}
		}
	}
	return errors.Join(faults...)
}
