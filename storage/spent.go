package storage

import (
	"slices"

	"github.com/go-throttler/throttler/internal/law"
)

// Spent is what has been spent from the buckets of one identifier, for a storage that keeps its states in Go. The zero
// Spent is that of an identifier never seen. It is not safe for concurrent use: the storage locks all that a call
// needs.
type Spent struct {
	buckets map[law.BucketID]law.State
}

// Decide answers a request, given what each of its parts has spent. It takes all costs or none, changes spent
// accordingly, and fills the answer except for Source and Degraded.
//
// Now is the time of a request that is not Clocked, in microseconds since the epoch: a storage with a clock of its own,
// such as a server's, gives the time by that. With 0 it is the monotonic clock of this process. The only error is that
// of TooManyBuckets; then nothing has changed.
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

// Charge applies a charge. Now and the error are as in Decide.
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

// Full reports whether all buckets are full, so that the identifier may be forgotten. Now is the time, in microseconds
// since the epoch, by the clock by which the tokens were spent.
func (s *Spent) Full(now int64) bool {
	for _, state := range s.buckets {
		if !state.Full(now) {
			return false
		}
	}
	return true
}

// times returns the time by which a call is decided, and the one for Answer.At. These differ if the storage has a clock
// of its own: refunds measure how much time has passed in this process, by the monotonic clock.
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

// room returns the error of a call after which too many buckets would not be full. It counts all buckets that the call
// names, and the others that are not full.
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

// state returns the state of a rule's bucket, which is the zero State if there is none.
func (s *Spent) state(r *law.Rule) law.State { return s.buckets[r.ID()] }

// set stores the state of a rule's bucket.
func (s *Spent) set(r *law.Rule, state law.State) {
	if s.buckets == nil {
		s.buckets = make(map[law.BucketID]law.State)
	}
	s.buckets[r.ID()] = state
}
