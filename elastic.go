// Limits that follow load: the implementation of Bucket.Elastic and Config.Load.

package throttler

import (
	"errors"
	"slices"
	"sync/atomic"

	"github.com/go-throttler/throttler/storage"
)

// shares is the number of steps between the least and the full limit.
const shares = 64

// elastic caches the rules of a set for each share below 1. Each is made when it is first needed.
type elastic struct {
	full   *set
	shrunk [shares]atomic.Pointer[storage.RuleSet]
}

// newElastic returns nil if no bucket of the set is elastic.
func newElastic(s *set) *elastic {
	if !slices.ContainsFunc(s.buckets, func(b Bucket) bool { return b.elastic }) {
		return nil
	}
	return &elastic{full: s}
}

// at returns the rules for a share, which is rounded down to a step.
func (e *elastic) at(share float64) *storage.RuleSet {
	if !(share < 1) { // also true for NaN, which counts as 1
		return e.full.rules
	}
	n := 0
	if share > 0 {
		n = int(share * shares)
	}
	if rules := e.shrunk[n].Load(); rules != nil {
		return rules
	}
	return e.make(n)
}

// make makes the rules for n of the shares. Concurrent calls may make the same ones; that does no harm.
func (e *elastic) make(n int) *storage.RuleSet {
	tokens := make([]int64, 0, len(e.full.buckets))
	for _, b := range e.full.buckets {
		switch {
		case b.free: // has no rule
		case b.elastic:
			tokens = append(tokens, max(b.least, b.tokens*int64(n)/shares))
		default:
			tokens = append(tokens, b.tokens)
		}
	}
	rules := e.full.rules.Shrunk(tokens) // equal rule sets are one pointer, so it does not matter who stores it
	e.shrunk[n].Store(rules)
	return rules
}

// validCosts checks the costs of the part that was added last. If a cost exceeds a shrunk capacity, the part is decided by
// the full limits instead: a call that the full bucket can serve must not fail only because of the load.
func (s *set) validCosts(v *Verdict, costs []int64, id string) error {
	last := &v.parts()[len(v.parts())-1]
	err := validCosts(costs, last.AtMost, last.Rules, id)
	if last.Rules != s.rules && errors.Is(err, ErrCostExceedsCapacity) {
		last.Rules = s.rules
		err = validCosts(costs, last.AtMost, s.rules, id)
	}
	return err
}
