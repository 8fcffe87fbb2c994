// Package storage is the contract between a Throttler and the place that keeps what has been spent.
//
// A storage decides; it is not a key-value store. One call carries identifiers, the rules of their
// buckets and the costs, and takes all of them or nothing, atomically. Which buckets an identifier
// has is not stored: the rules travel with each call. What is stored is consumption.
//
// A storage of one's own has three methods. One that keeps its states in Go has a Spent for each
// identifier, and Decide does the arithmetic: the example of this package is a whole storage. Package
// storagetest proves an implementation: every storage of this module passes its Run.
//
// The throttler checks what users give before it asks a storage, so a storage may trust it:
// identifiers of 1 to 1024 bytes, of any values; 1 to 256 parts of different
// identifiers; 1 to 16 rules a part, of different names; costs of 0 or more, at most the
// capacity unless the Mode is Force; a time between the years 1970 and 2184.
package storage

import (
	"context"
	"errors"
	"fmt"

	"github.com/go-throttler/throttler/internal/law"
)

// Storage keeps consumption and decides. All methods are safe for concurrent use.
//
// A call returns its context's error when the context is done before it begins, and then changes
// nothing. A failure of the storage itself wraps ErrUnavailable, a stored value that cannot be read
// ErrCorruptState, and a call after Close ErrClosed.
//
// The memory of an identifier and of a name is the caller's, who may use it again after the call,
// also after one that its context ended: a storage copies what it keeps, and may put its own copy of
// an identifier into the request. Nobody else changes a request, so the rest of it may be kept.
//
// An identifier keeps the states of all its buckets until they are full, also of those that a call
// does not name, up to 16. One more is refused with TooManyBuckets.
type Storage interface {
	// Decide takes the costs of a request from all buckets of all its parts, or from none, and
	// fills the answer. A denied request changes nothing. After an error the answer means nothing.
	Decide(ctx context.Context, r *Request, a *Answer) error

	// Charge applies amounts unconditionally.
	Charge(ctx context.Context, c *Charge) error

	// Reset forgets what the identifier has spent under the given Request.Name.
	Reset(ctx context.Context, name, identifier string) error
}

// Mode says what a decision may do.
type Mode = law.Mode

// The modes of a Request.
const (
	Take  = law.Take  // take if every bucket admits
	Peek  = law.Peek  // answer exactly as Take would, and take nothing
	Force = law.Force // take whatever the answer is; no more than the law allows is ever out
)

// Request asks for one decision.
type Request struct {
	Name string // the throttler's name: equal names share consumption, others never meet
	Mode Mode

	// Clocked says that Now is the time, in microseconds since the epoch by the caller's clock.
	// Else the storage's own clock is used. If that is the monotonic one of this process, and the
	// caller has just read it, Now is its time; otherwise Now is 0.
	Clocked bool
	Now     int64

	// Within makes a Take or a Peek a reservation: a Continuous bucket also gives what comes back in
	// so many microseconds, up to 366 days. Its Count tells when that is there.
	Within int64

	Parts []Part
	Costs []int64 // tokens: one for each bucket, through all parts in order
}

// Part is one identifier in a request and the rules of its buckets.
type Part struct {
	Identifier string
	Rules      *RuleSet

	// AtMost lets a Take or a Peek take less than the costs, which may be above a capacity: as many
	// tokens as all buckets have of the parts that are AtMost, and at least one.
	AtMost bool
}

// RuleSet is the rules of an identifier's buckets. It never changes, and equal sets are one pointer.
type RuleSet = law.RuleSet

// Answer is what a storage fills. Its Counts are made by the caller: one for each bucket, through
// all parts in order.
type Answer struct {
	Allowed  bool   // the cost was taken from every bucket, or would be by Peek; else nothing was taken
	Source   string // the kind of storage that decided, such as "runtime"
	Degraded bool   // the answer is not the storage's regular one: a fallback gave it

	// At is when the decision was made, in microseconds: Request.Now if that is Clocked, else
	// by the monotonic clock of this process, which Decide reads. A later refund takes the time
	// since then off what it gives back.
	At int64

	Tokens int64 // of the parts that are AtMost: what each bucket gave, if its cost is not less

	Counts []Count
}

// Count is what a decision says of one bucket, in tokens and microseconds from the decision:
// Remaining may still be taken, and is a debt below zero; ResetAfter is until the bucket is full,
// NextAfter until one token more may be taken than now, RetryAfter until the bucket admits the cost
// that it denied, or has what was reserved, and HeldFor until all has come back by itself that an admitted call took. Each is
// 0 where there is nothing to wait for. By Force Remaining is what would remain if nothing were
// forgotten: what exceeds 4 capacities or 4 periods' refill was not recorded.
type Count = law.Count

// Amount is N tokens of one bucket, all of which come back In microseconds from now by themselves.
// A negative N gives back. Consumption crosses stores as durations and never as points in time.
type Amount = law.Amount

// Charge applies one amount to each bucket of one identifier: a positive one may leave a debt, a
// negative one gives tokens back that a decision took, and a zero Amount leaves its bucket alone.
// Name, Clocked and Now are those of Request.
type Charge struct {
	Name       string
	Clocked    bool
	Now        int64
	Identifier string
	Rules      *RuleSet
	Amounts    []Amount // one for each rule
}

// BucketError is a fault in the definition of a bucket, or in the way a call uses one.
type BucketError struct {
	Bucket string // its name
	Field  string // Period, Capacity, Refill, Burst, Elastic, Kind, Name, CostOf or Buckets
	Reason string // what was given and what is allowed
}

func (e *BucketError) Error() string {
	return fmt.Sprintf("throttler: bucket %q: %s %s", e.Bucket, e.Field, e.Reason)
}

// TooManyBuckets returns the BucketError of a call after which n buckets of an identifier would not
// be full, or nil if n is at most 16.
func TooManyBuckets(rules *RuleSet, n int) error {
	if n <= law.MaxBuckets {
		return nil
	}
	return &BucketError{Bucket: rules.Rules[0].Name, Field: "Buckets", Reason: fmt.Sprintf("of the identifier that are not full would be %d with this call, must be at most %d", n, law.MaxBuckets)}
}

// The errors of a storage, always wrapped with the particulars: test with errors.Is.
var (
	ErrUnavailable  = errors.New("throttler: storage unavailable")
	ErrCorruptState = errors.New("throttler: corrupt state")
	ErrClosed       = errors.New("throttler: closed")
)
