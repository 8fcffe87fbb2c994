// Limits that follow load: what Bucket.Elastic and Config.Load do.

package throttler

import (
	"errors"
	"slices"
	"sync/atomic"

	"github.com/go-throttler/throttler/storage"
)

// shares is the number of steps in which limits shrink.
const shares = 64

// elastic is the rules of a set at each share below 1, made when first needed.
type elastic struct {
	full   *set
	shrunk [shares]atomic.Pointer[storage.RuleSet]
}

// newElastic is nil if no bucket of the set is elastic.
func newElastic(s *set) *elastic {
	if !slices.ContainsFunc(s.buckets, func(b Bucket) bool { return b.elastic }) {
		return nil
	}
	return &elastic{full: s}
}

// at returns the rules that hold a share.
func (e *elastic) at(share float64) *storage.RuleSet {
	if !(share < 1) { // NaN is 1
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

// make makes the rules that hold n of the shares.
func (e *elastic) make(n int) *storage.RuleSet {
	tokens := make([]int64, 0, len(e.full.buckets))
	for _, b := range e.full.buckets {
		switch {
		case b.free: // it has no rule
		case b.elastic:
			tokens = append(tokens, max(b.least, b.tokens*int64(n)/shares))
		default:
			tokens = append(tokens, b.tokens)
		}
	}
	rules := e.full.rules.Shrunk(tokens) // equal ones are one pointer, whoever makes them first
	e.shrunk[n].Store(rules)
	return rules
}

// validCosts checks the costs of the part that was added last. A cost above a shrunk capacity has the call decided by the
// full limits.
func (s *set) validCosts(v *Verdict, costs []int64, id string) error {
	last := &v.parts()[len(v.parts())-1]
	err := validCosts(costs, last.Rules, id)
	if last.Rules != s.rules && errors.Is(err, ErrCostExceedsCapacity) {
		last.Rules = s.rules
		err = validCosts(costs, s.rules, id)
	}
	return err
}
