// How a Throttler is made.

package throttler

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/runtime"
)

// Policy chooses what happens to a call that cannot be decided.
type Policy int

// The policies. Deny, the default, makes the call fail with an error.
const (
	Deny Policy = iota
	Allow
)

// Config of a Throttler. The zero value limits nobody yet and keeps consumption in this process.
type Config struct {
	// Name separates the consumption of throttlers that share a storage; equal names share it. At
	// most 64 characters of A-Z, a-z, 0-9, "_", "." and "-".
	Name string

	// Storage keeps what has been spent. Nil is a new runtime storage.
	Storage storage.Storage

	// Cost of a call that has no Cost option, in tokens. 0 is 1; below 0 is an error of New; above a
	// capacity each call but Charge is ErrCostExceedsCapacity.
	Cost int64

	// Buckets are for every identifier that has none of its own: at most 16 for an identifier, of
	// different names; more are a *BucketError.
	Buckets []Bucket

	// OnUnknownIdentifier is for an identifier without any buckets: Deny returns
	// ErrUnknownIdentifier, Allow a Verdict that is Allowed and has no Levels.
	OnUnknownIdentifier Policy

	// OnStorageError is for a decision that failed with ErrUnavailable: Deny returns the error,
	// Allow a Verdict that is Allowed and Degraded and has no Levels. Cancelled and invalid calls
	// always fail, and so do Charge, Refund and Reset.
	OnStorageError Policy

	// Clock replaces the storage's own clock, mostly in tests. Throttlers of one Name on one
	// storage use the same clock. In a testing/synctest bubble none is needed, if the Throttler is
	// made in the bubble.
	Clock Clock

	// Load, if not nil, tells what share of their limits elastic buckets have now (Bucket.Elastic): 1 all, 0 the least of
	// each, in steps of a 64th, rounded down. NaN is 1. It is called in each decision, once for an identifier with such
	// buckets, and must be quick and safe for concurrent use: package load has one. A call that costs more than a shrunk
	// bucket holds is decided by the full limits, and so is a Charge.
	Load func() float64

	// MaxWaiters is how many calls of Wait and WaitAll may wait for one identifier; 0 sets no limit. One more gets
	// ErrTooManyWaiters unless it is admitted at once.
	MaxWaiters int

	// Observe, if not nil, is called once after each decision and change of what is spent, also one that failed (a
	// Refund of several parts makes a change each), by the goroutine of the call, and must be safe for
	// concurrent use. It gets the context of the call, and an Event that is valid until it returns. Observers joins several.
	Observe func(context.Context, *Event)
}

var validName = regexp.MustCompile(`^[A-Za-z0-9_.-]{0,64}$`)

// New returns a Throttler, or all faults of the configuration joined.
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
	t.quick, _ = t.storage.(quick)
	t.direct = t.memory != nil && t.clock == nil && t.observe == nil
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
	for _, p := range [...]Policy{t.unknown, t.failed} {
		if p != Deny && p != Allow {
			faults = append(faults, fmt.Errorf("throttler: a policy is %d, must be Deny or Allow", p))
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
