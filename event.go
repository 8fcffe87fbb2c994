// What Observe is told.

package throttler

import (
	"context"
	"time"

	"github.com/go-throttler/throttler/storage"
)

// Op names what an Event is about.
type Op string

// The values of Op. Each try of a Wait is an OpConsume, after an OpPeek when it has to queue.
const (
	OpConsume Op = "consume"
	OpPeek    Op = "peek"
	OpCharge  Op = "charge"
	OpRefund  Op = "refund"
	OpReset   Op = "reset"
)

func opOf(m storage.Mode) Op {
	return [...]Op{storage.Take: OpConsume, storage.Peek: OpPeek, storage.Force: OpCharge}[m]
}

// Event is what Observe is told of a call. The identifiers in it may be the caller's strings: where callers use their
// memory again, as on fasthttp, an Observe that keeps one clones it.
type Event struct {
	Op         Op
	Identifier string        // of several parts the first, or the one that refused; Levels names all
	Cost       int64         // the largest cost asked of a bucket, or given back to one
	Bucket     string        // refused: the bucket with the longest RetryAfter
	Verdict    Verdict       // as the caller got it: Allowed, Levels, Source, Degraded; of OpRefund the refunded one
	Err        error         // also when a policy allowed the call
	Duration   time.Duration // of the call, storage included
}

// first is the identifier of the first part, if there is one.
func first(v *Verdict) string {
	if parts := v.parts(); len(parts) > 0 {
		return parts[0].Identifier
	}
	return ""
}

// largestCost is the most that v was asked of one bucket.
func largestCost(v *Verdict) (cost int64) {
	for _, c := range v.asked() {
		cost = max(cost, c)
	}
	return cost
}

// refusedBy is the identifier and the bucket with the longest RetryAfter, if any has one.
func refusedBy(v *Verdict) (id, bucket string) {
	for _, l := range v.Levels() {
		if l.RetryAfter > 0 && l.RetryAfter == v.RetryAfter {
			id, bucket = l.Identifier, l.Bucket
		}
	}
	return id, bucket
}

// Report tells Observe of a call that was denied before the Throttler was asked, and why: for middleware that does not know
// whom a request counts for. The Event is an OpConsume with this Err.
func (t *Throttler) Report(ctx context.Context, id string, err error) {
	t.rejected(ctx, OpConsume, id, err)
}

// rejected observes a call that was wrong.
func (t *Throttler) rejected(ctx context.Context, op Op, id string, err error) {
	t.tidy()
	if t.observe != nil {
		t.observe(ctx, Event{Op: op, Identifier: id, Err: err})
	}
}
