package storage

import (
	"slices"

	"github.com/go-throttler/throttler/internal/law"
)

// Spent is what has been spent from the buckets of one identifier, for a storage that keeps its
// states in Go. The zero Spent is that of an identifier never seen. It is not safe for concurrent use.
type Spent struct {
	buckets map[law.BucketID]law.State
}

// Decide answers a request whose parts have spent what is given, one for each: it takes all costs or
// none, and fills the answer. The time counts only if the request has none of its own: a storage
// with a clock of its own gives that one, in microseconds since the epoch, and others give 0, which
// is the monotonic clock of this process. The error is that of TooManyBuckets.
func Decide(r *Request, a *Answer, now int64, spent ...*Spent) error {
	now, a.At = times(r.Clocked, r.Now, now)
	var draws []law.Draw
	for i, p := range r.Parts {
		if err := spent[i].room(p.Rules, now); err != nil {
			return err
		}
		for j := range p.Rules.Rules {
			rule := &p.Rules.Rules[j]
			draws = append(draws, law.Draw{Rule: rule, Cost: r.Costs[len(draws)], Within: r.Within, AtMost: p.AtMost, State: spent[i].state(rule)})
		}
	}
	a.Allowed = law.Decide(r.Mode, now, draws)
	a.Tokens = law.Taken(draws)
	for i := range draws {
		a.Counts[i] = draws[i].Count
	}
	if !a.Allowed || r.Mode == Peek {
		return nil
	}
	for i, p := range r.Parts {
		for _, d := range draws[:len(p.Rules.Rules)] {
			if d.Cost > 0 {
				spent[i].set(d.Rule, d.State)
			}
		}
		draws = draws[len(p.Rules.Rules):]
	}
	return nil
}

// Charge applies a charge. The time is as in Decide.
func (s *Spent) Charge(c *Charge, now int64) error {
	now, _ = times(c.Clocked, c.Now, now)
	if err := s.room(c.Rules, now); err != nil {
		return err
	}
	for i, a := range c.Amounts {
		rule := &c.Rules.Rules[i]
		state := s.state(rule)
		if state.Apply(rule, a, now) {
			s.set(rule, state)
		}
	}
	return nil
}

// Full says that all buckets are full, so that the identifier may be forgotten. The time is the
// clock's by which it was spent, in microseconds since the epoch.
func (s *Spent) Full(now int64) bool {
	for _, state := range s.buckets {
		if !state.Full(now) {
			return false
		}
	}
	return true
}

// times are the time by which a call is decided, and the one that Answer.At tells.
func times(clocked bool, given, now int64) (decided, at int64) {
	switch {
	case clocked:
		return given, given
	case now == 0:
		now = law.Monotonic()
		return now, now
	}
	return now, law.Monotonic()
}

// room refuses a call after which too many buckets would not be full.
func (s *Spent) room(rules *RuleSet, now int64) error {
	n := len(rules.Rules)
	for id, state := range s.buckets {
		named := slices.ContainsFunc(rules.Rules, func(r law.Rule) bool { return r.ID() == id })
		if !named && !state.Full(now) {
			n++
		}
	}
	return TooManyBuckets(rules, n)
}

func (s *Spent) state(r *law.Rule) law.State { return s.buckets[r.ID()] }

func (s *Spent) set(r *law.Rule, state law.State) {
	if s.buckets == nil {
		s.buckets = make(map[law.BucketID]law.State)
	}
	s.buckets[r.ID()] = state
}
