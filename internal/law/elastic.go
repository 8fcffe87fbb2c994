package law

// Rules that shrink while a process is under load.

// Shrunk returns the set with each rule shrunk to so many tokens, as Rule.Shrunk does.
func (s *RuleSet) Shrunk(tokens []int64) *RuleSet {
	rules, like := make([]Rule, len(s.Rules)), s
	for i := range rules {
		r := &s.Rules[i]
		if rules[i] = r.Shrunk(tokens[i]); rules[i].Law != r.Law {
			like = nil
		}
	}
	return intern(rules, like)
}

// SameLaws reports whether both sets are known to have rules of the same buckets and laws, in the same order. It only
// compares pointers, so false may also mean that it cannot tell.
func (s *RuleSet) SameLaws(o *RuleSet) bool { return s == o || s.full() == o.full() }

// full returns the set that this one was shrunk from, if that has the same laws, and otherwise the set itself.
func (s *RuleSet) full() *RuleSet {
	if s.like != nil {
		return s.like
	}
	return s
}

// Shrunk returns the rule with n tokens, from 1 to what it has now. N is the capacity, except for a Continuous rule,
// where it is the refill: then the capacity shrinks in proportion, to at least one token.
//
// NewRule might choose another Tick, so Shrunk does not use it. With the same Tick, what was spent under either rule is
// the same under the other, up to a unit. A bucket that is asked by both rules in turn therefore admits no more than
// the larger rule alone would.
func (r *Rule) Shrunk(n int64) Rule {
	small := *r
	if r.Kind != Continuous {
		small.Capacity = n
		return small
	}
	grain := r.refillGrain()
	small.Refill = max(grain, n/grain*grain)
	capacity, _ := scale(r.Capacity, small.Refill, r.Refill)
	small.Capacity = max(min(1, r.Capacity), capacity) // one of 0 admits nothing
	steps := r.Period / r.Tick
	common := gcd(steps, small.Refill)
	small.One, small.Drain = steps/common, small.Refill/common
	return small
}

// refillGrain returns the number that a smaller refill has to be a multiple of, so that One stays in its bounds with
// the Tick that the rule has. It is 1 except for large refills and long periods. The search ends at a thousand times
// the least candidate. Then the grain is the greatest common divisor of steps and refill, with which One stays what it
// is.
func (r *Rule) refillGrain() int64 {
	most := (exact - 1) / 4 / max(r.Capacity, r.Refill)
	if most < r.One { // measured for a burst that is smaller than the refill
		most = (exact - 1) / 4 / r.Capacity
	}
	steps := r.Period / r.Tick
	common, least := gcd(steps, r.Refill), ceil(steps, most)
	for d := least; d < min(common, 1000*least); d++ {
		if common%d == 0 {
			return d
		}
	}
	return common
}
