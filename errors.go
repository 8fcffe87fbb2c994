// The errors of this package.

package throttler

import (
	"errors"
	"fmt"

	"github.com/go-throttler/throttler/storage"
)

// BucketError is a fault in the definition of a bucket, or in the way a call uses one. Its fields are the Bucket's name,
// the faulty Field, and the Reason: what was given and what is allowed. See [storage.BucketError].
type BucketError = storage.BucketError

// The errors of this package. They are always wrapped with the particulars, so compare with errors.Is. A faulty bucket is
// a [*BucketError] instead.
var (
	// ErrUnknownIdentifier means that the identifier has no buckets, and Config has none for it.
	ErrUnknownIdentifier = errors.New("throttler: unknown identifier")

	// ErrInvalidIdentifier means that an identifier is empty, has over 1024 bytes or appears twice in one call, or the
	// call has over 256 identifiers.
	ErrInvalidIdentifier = errors.New("throttler: invalid identifier")

	// ErrInvalidCost means that a cost is below zero, or a refund is above what was taken.
	ErrInvalidCost = errors.New("throttler: invalid cost")

	// ErrCostExceedsCapacity means that a cost is above the capacity of a bucket, so waiting never helps.
	// The Verdict returned with it has the Levels.
	ErrCostExceedsCapacity = errors.New("throttler: cost exceeds capacity")

	// ErrDebtLimit means that a Charge was recorded only in part. The error joins a *DebtError for each bucket
	// concerned.
	ErrDebtLimit = errors.New("throttler: debt limit")

	// ErrInvalidReserve means that the time within which to reserve is below 0 or over 366 days.
	ErrInvalidReserve = errors.New("throttler: invalid time to reserve within")

	// ErrTooManyWaiters means that Config.MaxWaiters calls wait for the identifier already.
	ErrTooManyWaiters = errors.New("throttler: too many waiters")

	// ErrInvalidClock means that Config.Clock reads a time outside the years 1970 to 2184.
	ErrInvalidClock = errors.New("throttler: the injected clock is outside the years 1970 to 2184")

	// ErrUnavailable means that the storage could not decide.
	ErrUnavailable = storage.ErrUnavailable

	// ErrCorruptState means that the storage holds a value that this module did not write. The runtime
	// storage never returns it.
	ErrCorruptState = storage.ErrCorruptState

	// ErrClosed means that the storage was closed. The runtime storage never returns it.
	ErrClosed = storage.ErrClosed
)

// ErrLimited is what errors.Is finds in a [LimitedError].
var ErrLimited = errors.New("throttler: limited")

// LimitedError is a denial for callers that want an error: return &LimitedError{Verdict: v} if v is not Allowed. Consume
// itself never returns it.
type LimitedError struct{ Verdict Verdict }

// Error names the identifier that was denied and the bucket that denied it, and says for how long.
func (e *LimitedError) Error() string {
	id, bucket := deniedBy(&e.Verdict)
	return fmt.Sprintf("%v: %.64q by bucket %q, retry after %v", ErrLimited, id, bucket, e.Verdict.RetryAfter)
}

// Unwrap returns ErrLimited.
func (e *LimitedError) Unwrap() error { return ErrLimited }

// DebtError reports a bucket that did not record all of a Charge. At most 4 capacities of a bucket can be outstanding, or
// what is refilled in 4 periods if that is more.
type DebtError struct {
	Identifier, Bucket string
	Asked, Recorded    int64 // tokens of the Charge
	Limit              int64 // tokens that may be outstanding
}

// Error says how much of the charge was recorded.
func (e *DebtError) Error() string {
	return fmt.Sprintf("%v: of %d tokens charged to bucket %q of %.64q, %d are recorded, as no more than %d may be outstanding", ErrDebtLimit, e.Asked, e.Bucket, e.Identifier, e.Recorded, e.Limit)
}

// Unwrap returns ErrDebtLimit.
func (e *DebtError) Unwrap() error { return ErrDebtLimit }

// unrecorded returns a DebtError for each bucket that recorded only a part of a Charge. For such a bucket the storage
// counts Remaining as if the whole charge, up to the limit, were recorded (see storage.Count); unrecorded corrects it to
// what is recorded, and the cost too.
func unrecorded(v *Verdict) error {
	var faults []error
	n := 0
	for _, p := range v.parts() {
		for j := range p.Rules.Rules {
			r, c, cost := &p.Rules.Rules[j], &v.all()[n], &v.asked()[n]
			asked, limit := *cost, r.Ceiling()
			n++
			if over := r.Capacity - c.Remaining - limit; over > 0 && asked > 0 {
				most := min(asked, limit)
				recorded := max(0, most-over)
				c.Remaining += most - recorded
				*cost = recorded
				faults = append(faults, &DebtError{p.Identifier, r.Name, asked, recorded, limit})
			} else if asked > limit {
				*cost = limit
				faults = append(faults, &DebtError{p.Identifier, r.Name, asked, limit, limit})
			}
		}
	}
	return errors.Join(faults...)
}
