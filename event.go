// What Observe is told.

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

// Op names what an Event is about.
type Op string

// The values of Op. A Wait is one OpWait at its end; each of its attempts is an OpConsume before, or an OpPeek when it has
// to queue, with an Attempt above 0.
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

// Event is what Observe is told of a call. It is used again when Observe has returned: an Observe that keeps one copies
// *e. The identifiers in it may be the caller's strings: where callers use their memory again, as on fasthttp, an
// Observe that keeps one clones it.
type Event struct {
	Name       string        // Config.Name of the Throttler
	Op         Op            // of the call
	Attempt    int           // 1, 2, … for the attempts of a Wait, which are no calls of their own; else 0, also for OpWait
	Identifier string        // of several parts the first, or the one that denied; Buckets names all
	Cost       int64         // the largest cost asked of a bucket, or given back to one, in tokens; Buckets has all
	Bucket     string        // denied: the bucket with the longest RetryAfter; Buckets has all that denied
	Verdict    Verdict       // as the caller got it; empty after an error; of OpRefund the refunded one
	Err        error         // also when a policy allowed the call
	Duration   time.Duration // of the call, storage included; of OpWait from its beginning
	Time       time.Time     // when the call ended, by the clock that measures Duration: it is never set, so compare it with others of the process

	refund *storage.Charge // of OpRefund
}

// Buckets yields each bucket that answered, and what it was asked for, in tokens. A bucket that denied has a RetryAfter
// above 0. After an error there are none, but for a *DebtError and a Wait that gave up. For OpRefund they are those of
// Identifier, with their levels before the refund and what was to be given back. It allocates nothing.
func (e *Event) Buckets() iter.Seq2[Level, int64] {
	return func(yield func(Level, int64) bool) {
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

// Bypassed says that the call was allowed and no bucket asked, as Config.OnUnknownIdentifier or Config.OnStorageError has
// it. Of OnStorageError Err is the failure, but for OpWait, whose attempts have it.
func (e *Event) Bypassed() bool { return e.Verdict.Allowed && len(e.Verdict.parts()) == 0 }

// Result is "allowed", "denied", "bypassed" or "error", for the labels of metrics. A Wait that gave up, as its context
// ended or would have, is denied. A Charge, a Refund and a Reset that did not fail are allowed.
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

// ErrorType is the kind of Err, for the labels of metrics: "unavailable", "corrupt", "closed", "cancelled",
// "unknown_identifier", "debt_limit", "invalid" for all other errors of a call that was wrong, or "other". It is empty
// without an Err.
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
	{ErrUnavailable, "unavailable"}, // before the end of a context, which may be its cause
	{ErrCorruptState, "corrupt"}, {ErrClosed, "closed"}, {ErrUnknownIdentifier, "unknown_identifier"}, {ErrDebtLimit, "debt_limit"},
	{ErrInvalidIdentifier, "invalid"}, {ErrInvalidCost, "invalid"}, {ErrCostExceedsCapacity, "invalid"}, {ErrInvalidClock, "invalid"},
}

func endOfContext(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// Observers returns a function for Config.Observe that calls each of o, in order. Those that are nil are left out; it is
// nil if all are.
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

// first is the identifier of the first part. Of a request without parts it is one that is unknown and allowed.
func first(v *Verdict) string {
	if v.more != nil {
		return v.more.parts[0].Identifier
	}
	return v.few[0].Identifier
}

// largestCost is the most that v was asked of one bucket.
func largestCost(v *Verdict) (cost int64) {
	for _, c := range v.asked() {
		cost = max(cost, c)
	}
	return cost
}

// deniedBy is the identifier and the bucket with the longest RetryAfter, if any has one.
func deniedBy(v *Verdict) (id, bucket string) {
	for l := range v.All() {
		if l.RetryAfter > 0 && l.RetryAfter == v.RetryAfter {
			id, bucket = l.Identifier, l.Bucket
		}
	}
	return id, bucket
}

// events are used again, as each that is handed to a function of the user would be allocated.
var events = sync.Pool{New: func() any { return new(Event) }}

// event is one to tell. It is set field by field, as tell sets the rest: to clear it takes longer.
func (t *Throttler) event(op Op, attempt int, id string, cost int64) *Event {
	e := events.Get().(*Event)
	e.Name, e.Op, e.Attempt, e.Identifier, e.Cost, e.Bucket, e.refund = t.name, op, attempt, id, cost, "", nil
	return e
}

// tell hands an event with its answer to Observe. The call began at start and ended at end, by law.Elapsed.
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

// Report tells Observe of a call that was denied before the Throttler was asked, and why: for middleware that does not know
// whom a request counts for. The Event is an OpConsume with this Err.
func (t *Throttler) Report(ctx context.Context, id string, err error) {
	t.rejected(ctx, OpConsume, 0, id, err)
}

// rejected observes a call that was wrong.
func (t *Throttler) rejected(ctx context.Context, op Op, attempt int, id string, err error) {
	t.tidy()
	if t.observe != nil {
		now := law.Elapsed() // it took no time that is worth to be counted
		t.tell(ctx, t.event(op, attempt, id, 0), &Verdict{}, err, now, now)
	}
}
