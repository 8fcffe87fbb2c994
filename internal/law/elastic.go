package law

// Rules that shrink while a process is loaded.

// Shrunk returns the set with so many tokens of each rule.
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

// SameLaws reports whether it is known, at once, that both have rules of the same buckets and laws.
func (s *RuleSet) SameLaws(o *RuleSet) bool { return s == o || s.full() == o.full() }

func (s *RuleSet) full() *RuleSet {
	if s.like != nil {
		return s.like
	}
	return s
}

// Shrunk is the rule with n tokens, from 1 to what it has now: n is the capacity, or what comes back each period if the
// rule is Continuous, whose capacity then shrinks in proportion and holds at least one token.
//
// It is a copy and not made by NewRule, which might choose another Tick: by the same one, what was spent under either rule
// is the same under the other, up to a unit. So whoever is asked by both in turn admits no more than the larger alone.
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

// refillGrain is the number of which smaller refills have to be a multiple, so that One stays in its bounds by the Tick that
// the rule has. It is 1 but for large refills and long periods.
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
