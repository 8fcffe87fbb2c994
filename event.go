// Events: what Config.Observe gets.

package throttler

import (
	"context"
	"errors"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// Op names the operation that an Event reports.
type Op string

// The values of Op. A Wait is reported as one OpWait, at its end. Each of its attempts is reported before that, with an
// Attempt above 0: as OpConsume, or as OpPeek when it only looks how long it would have to queue.
const (
	OpConsume Op = "consume"
	OpPeek    Op = "peek"
	OpWait    Op = "wait"
	OpCharge  Op = "charge"
	OpRefund  Op = "refund"
	OpReset   Op = "reset"
)

func opOf(m storage.Mode) Op {
	return [...]Op{storage.Take: OpConsume, storage.Peek: OpPeek, storage.Force: OpCharge}[m]
}

// Event is what Observe gets about one call. It is reused after Observe has returned, so an Observe that keeps an Event
// must copy *e. Its identifiers may share the caller's memory. Where callers reuse that memory, as on fasthttp, an Observe
// that keeps an identifier must clone it.
type Event struct {
	Name string // Config.Name of the Throttler
	Op   Op

	// Attempt counts the attempts of a Wait from 1. An attempt is not a call of its own. For all other events, also for
	// the OpWait at the end, it is 0.
	Attempt int

	// Identifier is the one whose bucket denied with the longest RetryAfter, otherwise that of the first part. Buckets
	// yields all of them.
	Identifier string

	Cost   int64  // the largest cost asked of one bucket, or given back to one, in tokens; Buckets yields all
	Bucket string // the bucket that denied with the longest RetryAfter, empty if none did; Buckets yields all

	// Verdict is the caller's. It is empty after an error. For OpRefund it is the refunded one, and for a GiveBack a Peek.
	Verdict Verdict

	Err      error         // the failure, also if a policy then allowed the call
	Duration time.Duration // of the call, storage included; of OpWait from its beginning

	// Time is when the call ended. It comes from the monotonic clock that measures Duration, which ignores changes of
	// the system's time. So compare it only with other such times of this process.
	Time time.Time

	refund *storage.Charge // of OpRefund
}

// Buckets yields each bucket that answered, with the tokens that Verdict.All has. A bucket that denied has a RetryAfter above
// 0. After an error it yields nothing, except for a Wait that gave up, and after a *DebtError: then the tokens are those that
// were recorded. For OpRefund it yields the buckets of Identifier, with their levels before the refund and the tokens to be
// given back. It allocates no more than All does.
func (e *Event) Buckets() iter.Seq2[*Level, int64] {
	return func(yield func(*Level, int64) bool) {
		for l, cost := range e.Verdict.All() {
			if e.refund != nil {
				if l.Identifier != e.Identifier {
					continue
				}
				cost = e.givenBack(l.Bucket)
			}
			if !yield(l, cost) {
				return
			}
		}
	}
}

func (e *Event) givenBack(bucket string) int64 {
	for j := range e.refund.Amounts {
		if e.refund.Rules.Rules[j].Name == bucket {
			return -e.refund.Amounts[j].N
		}
	}
	return 0
}

// Bypassed reports whether the call was allowed without asking a bucket, by Config.OnUnknownIdentifier or
// Config.OnStorageError. In the second case Err is the failure, except for OpWait: there the attempts have it.
func (e *Event) Bypassed() bool { return e.Verdict.Allowed && e.Verdict.empty() }

// Result is "allowed", "denied", "bypassed" or "error", for the labels of metrics. A Wait that gave up because its context
// ended, or would have ended before its turn, is "denied". A Charge, Refund or Reset without an error is "allowed".
func (e *Event) Result() string {
	switch {
	case e.Bypassed():
		return "bypassed"
	case e.Op == OpWait && endOfContext(e.Err):
		return "denied"
	case e.Err != nil:
		return "error"
	case e.Verdict.Allowed || e.Op == OpCharge || e.Op == OpRefund || e.Op == OpReset:
		return "allowed"
	}
	return "denied"
}

// ErrorType classifies Err for the labels of metrics. It is "unavailable", "corrupt", "closed", "cancelled",
// "unknown_identifier", "debt_limit" or "cost_exceeds_capacity", which is also what a bucket of capacity 0 refuses; "invalid"
// for an invalid identifier, cost, clock or bucket; and "other" for anything else. It is empty if there is no Err.
func (e *Event) ErrorType() string {
	if e.Err == nil {
		return ""
	}
	for _, t := range errorTypes {
		if errors.Is(e.Err, t.err) {
			return t.name
		}
	}
	var faulty *BucketError
	switch {
	case endOfContext(e.Err):
		return "cancelled"
	case errors.As(e.Err, &faulty):
		return "invalid"
	}
	return "other"
}

var errorTypes = [...]struct {
	err  error
	name string
}{
	{ErrUnavailable, "unavailable"}, // first, since the end of a context may be its cause
	{ErrCorruptState, "corrupt"}, {ErrClosed, "closed"}, {ErrUnknownIdentifier, "unknown_identifier"}, {ErrDebtLimit, "debt_limit"},
	{ErrInvalidIdentifier, "invalid"}, {ErrInvalidCost, "invalid"}, {ErrCostExceedsCapacity, "cost_exceeds_capacity"}, {ErrInvalidClock, "invalid"},
	{ErrInvalidReserve, "invalid"},
}

func endOfContext(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// Observers returns a function for Config.Observe that calls each of o in order. Nil functions are left out; if all are
// nil the result is nil.
func Observers(o ...func(context.Context, *Event)) func(context.Context, *Event) {
	o = slices.DeleteFunc(slices.Clone(o), func(f func(context.Context, *Event)) bool { return f == nil })
	switch len(o) {
	case 0:
		return nil
	case 1:
		return o[0]
	}
	return func(ctx context.Context, e *Event) {
		for _, f := range o {
			f(ctx, e)
		}
	}
}

// first returns the identifier of the first part. In a request without parts this is an unknown identifier that the policy
// allows, which Throttler.add left there.
func first(v *Verdict) string {
	if v.more != nil {
		return v.more.parts[0].Identifier
	}
	return v.few[0].Identifier
}

// largestCost returns the largest cost that v was asked of one bucket.
func largestCost(v *Verdict) (cost int64) {
	for _, c := range v.asked() {
		cost = max(cost, c)
	}
	return cost
}

// deniedBy returns the bucket with the longest RetryAfter and its identifier, or empty strings if no bucket denied.
func deniedBy(v *Verdict) (id, bucket string) {
	for l := range v.All() {
		if l.RetryAfter > 0 && l.RetryAfter == v.RetryAfter {
			id, bucket = l.Identifier, l.Bucket
		}
	}
	return id, bucket
}

// events are reused: an Event passed to a user's function escapes, so each would be an allocation.
var events = sync.Pool{New: func() any { return new(Event) }}

// event returns an event to fill. Only the fields that tell does not set are set here: clearing the whole takes longer.
func (t *Throttler) event(op Op, attempt int, id string, cost int64) *Event {
	e := events.Get().(*Event)
	e.Name, e.Op, e.Attempt, e.Identifier, e.Cost, e.Bucket, e.refund = t.name, op, attempt, id, cost, "", nil
	return e
}

// tell passes an event and its verdict to Observe. The call lasted from start to end, both by law.Elapsed.
func (t *Throttler) tell(ctx context.Context, e *Event, v *Verdict, err error, start, end time.Duration) {
	e.Verdict, e.Err, e.Duration, e.Time = *v, err, end-start, law.TimeAt(end)
	if v.RetryAfter > 0 {
		if id, bucket := deniedBy(v); bucket != "" {
			e.Identifier, e.Bucket = id, bucket
		}
	}
	t.observe(ctx, e)
	events.Put(e)
}

// Report passes a call to Observe that was denied, for the reason err, before the Throttler was asked. It is for middleware
// that cannot tell which identifier a request counts for. The Event is an OpConsume with this Err.
func (t *Throttler) Report(ctx context.Context, id string, err error) {
	t.rejected(ctx, OpConsume, 0, id, err)
}

// rejected observes a call that was wrong and never reached the storage.
func (t *Throttler) rejected(ctx context.Context, op Op, attempt int, id string, err error) {
	t.tidy()
	if t.observe != nil {
		now := law.Elapsed() // the call is reported with a Duration of 0
		t.tell(ctx, t.event(op, attempt, id, 0), &Verdict{}, err, now, now)
	}
}
