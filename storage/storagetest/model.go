package storagetest

import (
	"context"
	"strings"
	"sync"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/storage"
)

// Model is the simplest correct storage: a map, a mutex and law.Decide. Other storages are compared with it. It never
// forgets an identifier. It implements replica.Storage too, and is safe for concurrent use.
type Model struct {
	mu     sync.Mutex
	states map[[2]string]states // by name and identifier
}

// states is what one identifier has spent, by bucket.
type states map[law.BucketID]law.State

// NewModel returns an empty Model.
func NewModel() *Model { return &Model{states: make(map[[2]string]states)} }

// Decide implements storage.Storage.
func (m *Model) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	now := timeOf(r.Clocked, r.Now)
	m.mu.Lock()
	defer m.mu.Unlock()
	var draws []law.Draw
	for _, p := range r.Parts {
		s := m.of(r.Name, p.Identifier)
		if err := s.fit(p.Rules, now); err != nil {
			return err
		}
		for i := range p.Rules.Rules {
			rule := &p.Rules.Rules[i]
			draws = append(draws, law.Draw{Rule: rule, Cost: r.Costs[len(draws)], Within: r.Within, AtMost: p.AtMost, State: s[rule.ID()]})
		}
	}
	a.Allowed, a.Source, a.Degraded, a.At = law.Decide(r.Mode, now, draws), "model", false, now
	a.Tokens = law.Taken(draws)
	for i := range draws {
		a.Counts[i] = draws[i].Count
	}
	if !a.Allowed || r.Mode == storage.Peek {
		return nil
	}
	for _, p := range r.Parts {
		s := m.of(r.Name, p.Identifier)
		for _, d := range draws[:len(p.Rules.Rules)] {
			if d.Cost > 0 {
				s[d.Rule.ID()] = d.State
			}
		}
		draws = draws[len(p.Rules.Rules):]
	}
	return nil
}

// Charge implements storage.Storage.
func (m *Model) Charge(ctx context.Context, c *storage.Charge) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	now := timeOf(c.Clocked, c.Now)
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.of(c.Name, c.Identifier)
	if err := s.fit(c.Rules, now); err != nil {
		return err
	}
	for i, a := range c.Amounts {
		rule := &c.Rules.Rules[i]
		if state := s[rule.ID()]; state.Apply(rule, a, now) {
			s[rule.ID()] = state
		}
	}
	return nil
}

// Debt implements replica.Storage.
func (m *Model) Debt(ctx context.Context, d replica.Debt) (replica.Debt, error) {
	if err := ctx.Err(); err != nil {
		return replica.Debt{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d.Amounts = make([][]storage.Amount, len(d.Rules.Rules))
	for i := range d.Amounts {
		rule := &d.Rules.Rules[i]
		d.Amounts[i] = m.of(d.Name, d.Identifier)[rule.ID()].Debt(rule, timeOf(d.Clocked, d.Now))
	}
	return d, nil
}

// Raise implements replica.Storage.
func (m *Model) Raise(ctx context.Context, d replica.Debt) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	now := timeOf(d.Clocked, d.Now)
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.of(d.Name, d.Identifier)
	if err := s.fit(d.Rules, now); err != nil {
		return err
	}
	for i, debt := range d.Amounts {
		if rule := &d.Rules.Rules[i]; len(debt) > 0 {
			state := s[rule.ID()]
			state.Raise(rule, debt, now)
			s[rule.ID()] = state
		}
	}
	return nil
}

// Reset implements storage.Storage.
func (m *Model) Reset(ctx context.Context, name, identifier string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.states, [2]string{name, identifier})
	return nil
}

// timeOf returns the time of a call: the caller's if its clock is injected, otherwise that of this process.
func timeOf(clocked bool, now int64) int64 {
	if clocked {
		return now
	}
	return law.Monotonic()
}

// of returns the states of an identifier, and makes them under a copy of it: the caller may reuse the memory.
func (m *Model) of(name, id string) states {
	key := [2]string{name, strings.Clone(id)}
	if m.states[key] == nil {
		m.states[key] = make(states)
	}
	return m.states[key]
}

// fit returns the error of TooManyBuckets if the rules and the other buckets that are not full are too many.
func (s states) fit(rules *storage.RuleSet, now int64) error {
	n := len(rules.Rules)
	for id, state := range s {
		if !state.Full(now) {
			n++
		}
		for i := range rules.Rules {
			if rules.Rules[i].ID() == id && !state.Full(now) {
				n--
			}
		}
	}
	return storage.TooManyBuckets(rules, n)
}
