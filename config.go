// How a Throttler is configured and made.

package throttler

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/lease"
	"github.com/go-throttler/throttler/storage/runtime"
)

// Policy says whether a call that cannot be decided is denied or allowed.
type Policy int

// The policies. Deny, the default, makes the call fail with an error; Allow admits it without a limit.
const (
	Deny Policy = iota
	Allow
)

// Config configures a Throttler. The zero value is valid: consumption stays in this process, and there are no buckets
// until AddBucket or Using brings some.
type Config struct {
	// Name separates the throttlers of one storage: equal names share consumption, different names do not. It has at
	// most 64 characters of A-Z, a-z, 0-9, "_", "." and "-".
	Name string

	// Storage keeps what has been spent. If it is nil, New makes a runtime storage, which keeps it in this process.
	Storage storage.Storage

	// Cost is the cost of a call without a Cost or AtMost option, in tokens. 0 means 1; below 0 is an error of New. If
	// it exceeds a capacity, each such call but Charge is ErrCostExceedsCapacity.
	Cost int64

	// Buckets are the buckets of every identifier that has none of its own: at most 16, of different names; otherwise
	// the error is a *BucketError.
	Buckets []Bucket

	// OnUnknownIdentifier is the policy for an identifier without buckets. Deny returns ErrUnknownIdentifier. Allow
	// returns a Verdict that is Allowed and has no Levels.
	OnUnknownIdentifier Policy

	// OnStorageError is the policy for a decision that failed with ErrUnavailable. Deny returns the error. Allow
	// returns a Verdict that is Allowed and Degraded and has no Levels. Cancelled and invalid calls always fail, and so
	// do Charge, Refund and Reset.
	OnStorageError Policy

	// Clock replaces the storage's own clock, mostly in tests. Throttlers of one Name on one storage must use the same
	// clock. In a testing/synctest bubble none is needed if the Throttler is made in the bubble.
	Clock Clock

	// Load, if not nil, returns the share of their limits that elastic buckets have now (Bucket.Elastic). 1 is the full
	// limit, 0 is the least of each bucket, and values in between are rounded down to a multiple of 1/64. NaN counts as
	// 1. Each decision calls it once or twice for each identifier with elastic buckets, so it must be quick and safe for
	// concurrent use; package load has an implementation. A call that costs more than a shrunk bucket holds is decided
	// by the full limits, and so is a Charge.
	Load func() float64

	// MaxWaiters is how many calls of Wait and WaitAll may wait for one identifier; 0 means any number. A further call
	// gets ErrTooManyWaiters, also if it has buckets of its own (Using) that would admit it, unless nothing limits it.
	MaxWaiters int

	// Observe, if not nil, is called after every decision, Charge, Refund and Reset, successful or not, in the caller's
	// goroutine. A Refund of several parts calls it once per part, and a Wait once per attempt and once at its end. It
	// must be safe for concurrent use. It gets the context of the call, and an Event that is valid until it returns.
	// Observers joins several functions into one.
	Observe func(context.Context, *Event)
}

var validName = regexp.MustCompile(`^[A-Za-z0-9_.-]{0,64}$`)

// New returns a Throttler. Its error joins all faults of the configuration.
func New(c Config) (*Throttler, error) {
	t := &Throttler{
		name: strings.Clone(c.Name), storage: c.Storage, cost: c.Cost, clock: c.Clock, load: c.Load, observe: c.Observe,
		unknown: c.OnUnknownIdentifier, failed: c.OnStorageError,
	}
	t.waiters.most = c.MaxWaiters
	if t.storage == nil {
		t.storage = runtime.New(nil)
	}
	t.memory, _ = t.storage.(*runtime.Storage)
	t.leases, _ = t.storage.(*lease.Storage)
	t.direct = t.memory != nil && t.clock == nil
	if t.cost == 0 {
		t.cost = 1
	}
	var faults []error
	if !validName.MatchString(c.Name) {
		faults = append(faults, fmt.Errorf("throttler: Config.Name is %.80q, must be at most 64 characters of A-Z, a-z, 0-9, '_', '.' and '-'", c.Name))
	}
	if c.Cost < 0 {
		faults = append(faults, fmt.Errorf("%w: Config.Cost is %d, must be 0 or more", ErrInvalidCost, c.Cost))
	}
	if c.MaxWaiters < 0 {
		faults = append(faults, fmt.Errorf("throttler: Config.MaxWaiters is %d, must be 0 or more", c.MaxWaiters))
	}
	if v := reflect.ValueOf(c.Storage); v.Kind() == reflect.Pointer && v.IsNil() {
		faults = append(faults, fmt.Errorf("throttler: Config.Storage is a nil %T, must be one that its package has made, or nil for the memory of this process", c.Storage))
	}
	for _, p := range [...]struct {
		field string
		Policy
	}{{"OnUnknownIdentifier", t.unknown}, {"OnStorageError", t.failed}} {
		if p.Policy != Deny && p.Policy != Allow {
			faults = append(faults, fmt.Errorf("throttler: Config.%s is %d, must be Deny or Allow", p.field, p.Policy))
		}
	}
	if len(c.Buckets) > 0 {
		t.defaults = newSet(slices.Clone(c.Buckets))
		faults = append(faults, t.defaults.err)
	}
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	return t, nil
}
