// Package storage is the contract between a Throttler and the place that keeps what has been spent. Read it to write a
// storage of your own; to use one, see the packages storage/runtime, storage/redis, storage/postgres and
// storage/failover.
//
// A storage decides; it is not a key-value store. One call carries identifiers, the rules of their buckets and the
// costs. The storage takes all costs or none, atomically. Which buckets an identifier has is not stored, because the
// rules travel with each call. What is stored is consumption.
//
// A storage has three methods: Decide, Charge and Reset. A storage that keeps its states in Go has a Spent for each
// identifier, and the functions of this package do the arithmetic; the example is a whole storage of this kind. One
// that decides elsewhere, such as in a script of a server, has to repeat the arithmetic of internal/law, whose steps
// are numbered. Either way, test it with storagetest.Run, which every storage of this module passes.
//
// The throttler checks what users give before it asks a storage, so a storage may rely on the following:
//
//   - An identifier has 1 to 1024 bytes of any values.
//   - A request has 1 to 256 parts with different identifiers, and a part 1 to 16 rules with different names.
//   - There is a cost for each rule, and a Count for each in the Answer.
//   - A cost is 0 or more, and at most the capacity unless the Mode is Force or the part is AtMost. Only a Force asks a
//     bucket of capacity 0 for anything.
//   - A time is in the years 1970 to 2184.
package storage

import (
	"context"
	"errors"
	"fmt"

	"github.com/go-throttler/throttler/internal/law"
)

// Storage keeps consumption and decides. All methods are safe for concurrent use.
//
// Errors. If the context is done before a call begins, the call returns the context's error and changes nothing. A
// failure of the storage itself wraps ErrUnavailable, a stored value that cannot be read ErrCorruptState, and a call
// after Close returns ErrClosed. Test for them with errors.Is.
//
// Memory. The bytes of an identifier and of a name belong to the caller, who may reuse them once the call has returned,
// even if it returned because its context ended and the storage is still at work. So a storage copies what it keeps. It
// may replace an identifier in the request by its own copy. Nobody else changes a request, so the rest of it may be
// kept.
//
// State. A storage keeps the state of each bucket of an identifier until it is full, even if calls do not name it. An
// identifier may have 16 buckets that are not full. A call after which it would have more fails with TooManyBuckets and
// changes nothing.
type Storage interface {
	// Decide takes the costs of a request from all buckets of all its parts, or from none, and fills the answer. A
	// denied request changes nothing. After an error the answer means nothing.
	Decide(ctx context.Context, r *Request, a *Answer) error

	// Charge applies the amounts, whatever the buckets have.
	Charge(ctx context.Context, c *Charge) error

	// Reset forgets what the identifier has spent under the given Request.Name. Its buckets are full afterwards.
	Reset(ctx context.Context, name, identifier string) error
}

// Mode says what a decision may do.
type Mode = law.Mode

// The modes of a Request.
const (
	Take  = law.Take  // take if every bucket admits
	Peek  = law.Peek  // answer exactly as Take would, and take nothing
	Force = law.Force // take whatever the answer is; what exceeds 4 capacities or 4 periods' refill is not recorded
)

// Request asks for one decision.
type Request struct {
	Name string // the throttler's name: equal names share consumption, different ones never do
	Mode Mode

	// If Clocked is set, Now is the time of the decision, in microseconds since the epoch by the caller's clock.
	// Otherwise the storage uses its own clock. If that is the monotonic clock of this process and the caller has just
	// read it, Now is its time, so that the storage need not read it again. In all other cases Now is 0.
	Clocked bool
	Now     int64

	// Within, if above 0, makes a Take or a Peek a reservation: a Continuous bucket also gives what comes back within
	// so many microseconds, up to 366 days. The RetryAfter of its Count is the time until that is there.
	Within int64

	Parts []Part
	Costs []int64 // in tokens: one for each rule, through all parts in order
}

// Part is one identifier in a request and the rules of its buckets.
type Part struct {
	Identifier string
	Rules      *RuleSet

	// AtMost lets a Take or a Peek take less than the costs, which then may exceed a capacity. It takes as many tokens
	// as each bucket that is asked for some has, in all parts that are AtMost, but at least one. If a bucket cannot
	// give one, the request is denied.
	AtMost bool
}

// RuleSet is the rules of an identifier's buckets. It never changes. Equal sets are one pointer, so a storage may
// compare sets and cache by pointer.
type RuleSet = law.RuleSet

// Answer is what a storage fills. The caller makes the Counts, one for each rule through all parts in order, and the
// storage sets their elements. It sets the other fields too, but Tokens only if a part is AtMost.
type Answer struct {
	Allowed  bool   // all costs were taken, or would be by the same Take if this was a Peek; if not, nothing was taken
	Source   string // the kind of storage that decided, such as "runtime"
	Degraded bool   // the answer is not the storage's regular one: a fallback gave it

	// At is when the decision was made, in microseconds: Request.Now if that is Clocked, otherwise the time by the
	// monotonic clock of this process, even if the storage decides by another clock. The function Decide sets it. A
	// later refund subtracts the time since then from HeldFor.
	At int64

	// Tokens is how many tokens each bucket of the parts that are AtMost gave. A bucket with a smaller cost gave that.
	Tokens int64

	Counts []Count
}

// Count is what a decision says about one bucket, in tokens and in microseconds from the decision on:
//
//   - Remaining is what may still be taken. Below zero it is owed, or reserved.
//   - ResetAfter is the time until the bucket is full.
//   - NextAfter is the time until one token more may be taken than now.
//   - RetryAfter is the time until the bucket admits the cost that it denied, or has what was reserved.
//   - HeldFor is the time until all that an admitted call took is back by itself.
//
// Each time is 0 if there is nothing to wait for. After a Force, Remaining is what would remain if everything had been
// recorded; what exceeds 4 capacities or 4 periods' refill was not.
type Count = law.Count

// Amount is N tokens of one bucket, all of which are back by themselves In microseconds from now. A negative N gives
// tokens back. Consumption crosses from one store to another in this form, as durations and never as points in time,
// because the clocks of the stores may differ.
type Amount = law.Amount

// Charge applies one amount to each bucket of one identifier. A positive amount may leave a debt. A negative one gives
// back tokens that a decision took. A zero Amount leaves its bucket alone. Name, Clocked and Now are as in Request.
type Charge struct {
	Name       string
	Clocked    bool
	Now        int64
	Identifier string
	Rules      *RuleSet
	Amounts    []Amount // one for each rule
}

// BucketError is a fault in the definition of a bucket, or in the way in which a call uses one.
type BucketError struct {
	Bucket string // the bucket's name
	Field  string // Period, Capacity, Refill, Burst, Elastic, Kind, Name, CostOf or Buckets
	Reason string // what was given and what is allowed
}

func (e *BucketError) Error() string {
	return fmt.Sprintf("throttler: bucket %q: %s %s", e.Bucket, e.Field, e.Reason)
}

// TooManyBuckets returns the *BucketError of a call after which n buckets of an identifier would not be full, or nil if
// n is at most 16. The rules are those of the call for that identifier; the error names the first.
func TooManyBuckets(rules *RuleSet, n int) error {
	if n <= law.MaxBuckets {
		return nil
	}
	return &BucketError{Bucket: rules.Rules[0].Name, Field: "Buckets", Reason: fmt.Sprintf("of the identifier that are not full would be %d with this call, must be at most %d", n, law.MaxBuckets)}
}

// The errors of a storage, usually wrapped with the particulars: test with errors.Is.
var (
	ErrUnavailable  = errors.New("throttler: storage unavailable")   // it does not answer, has no room, or reports a failure
	ErrCorruptState = errors.New("throttler: corrupt state")         // a stored value cannot be read, and was left as it is
	ErrClosed       = errors.New("throttler: the storage is closed") // the call came after Close
)
