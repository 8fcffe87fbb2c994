package storagetest

import (
	"context"
	"strings"
	"sync"

	"github.com/go-throttler/throttler/storage"
)

// Model is the simplest storage there is: a map, a mutex and Decide. It is what others are compared
// with, and an example of the contract; it never forgets an identifier.
type Model struct {
	mu     sync.Mutex
	states map[[2]string]map[storage.BucketID]storage.State // by name and identifier
}

// NewModel returns an empty Model.
func NewModel() *Model { return &Model{states: make(map[[2]string]map[storage.BucketID]storage.State)} }

// Decide implements storage.Storage.
func (m *Model) Decide(ctx context.Context, r storage.Request) (storage.Verdict, error) {
	if err := ctx.Err(); err != nil {
		return storage.Verdict{}, err
	}
	if err := r.Validate(); err != nil {
		return storage.Verdict{}, err
	}
	now := r.Now
	if !r.Clocked {
		now = storage.Monotonic()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var draws []storage.Draw
	for i := range r.Parts() {
		p := r.At(i)
		states := m.states[[2]string{r.Name, p.Identifier}]
		if err := fits(states, p.Rules, now); err != nil {
			return storage.Verdict{}, err
		}
		for j := range p.Rules {
			draws = append(draws, storage.Draw{Rule: &p.Rules[j], Cost: p.Cost(j), State: states[p.Rules[j].ID()]})
		}
	}
	v := storage.NewVerdict(&r, "model", now)
	v.Allowed = storage.Decide(r.Mode, now, draws)
	for i := range draws {
		v.Set(i, draws[i].Count)
	}
	if !v.Allowed || r.Mode == storage.Peek {
		return v, nil
	}
	for i := range r.Parts() {
		p := r.At(i)
		for j := range p.Rules {
			if d := draws[j]; d.Cost > 0 {
				m.keep(r.Name, p.Identifier, d.Rule.ID(), d.State)
			}
		}
		draws = draws[len(p.Rules):]
	}
	return v, nil
}

// Charge implements storage.Storage.
func (m *Model) Charge(ctx context.Context, c storage.Charge) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := c.Validate(); err != nil {
		return err
	}
	now := c.Now
	if !c.Clocked {
		now = storage.Monotonic()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	states := m.states[[2]string{c.Name, c.Identifier}]
	if err := fits(states, c.Rules, now); err != nil {
		return err
	}
	for i, a := range c.Amounts {
		s := states[c.Rules[i].ID()]
		switch {
		case a.N > 0:
			s.Charge(&c.Rules[i], a, now)
		case a.N < 0:
			s.Refund(&c.Rules[i], storage.Amount{N: -max(a.N, -1<<62), In: a.In}, now)
		}
		if a.N != 0 && s.Law != nil {
			m.keep(c.Name, c.Identifier, c.Rules[i].ID(), s)
		}
	}
	return nil
}

// Debt implements storage.Replica.
func (m *Model) Debt(ctx context.Context, d storage.Debt) (storage.Debt, error) {
	if err := ctx.Err(); err != nil {
		return storage.Debt{}, err
	}
	d.Amounts = nil
	if err := d.Validate(); err != nil {
		return storage.Debt{}, err
	}
	now := d.Now
	if !d.Clocked {
		now = storage.Monotonic()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d.Amounts = make([][]storage.Amount, len(d.Rules))
	for i := range d.Rules {
		s := m.states[[2]string{d.Name, d.Identifier}][d.Rules[i].ID()]
		d.Amounts[i] = s.Debt(&d.Rules[i], now)
	}
	return d, nil
}

// Raise implements storage.Replica.
func (m *Model) Raise(ctx context.Context, d storage.Debt) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := d.Validate(); err != nil {
		return err
	}
	now := d.Now
	if !d.Clocked {
		now = storage.Monotonic()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	states := m.states[[2]string{d.Name, d.Identifier}]
	if err := fits(states, d.Rules, now); err != nil {
		return err
	}
	for i, debt := range d.Amounts {
		if len(debt) > 0 {
			s := states[d.Rules[i].ID()]
			s.Raise(&d.Rules[i], debt, now)
			m.keep(d.Name, d.Identifier, d.Rules[i].ID(), s)
		}
	}
	return nil
}

// Reset implements storage.Storage.
func (m *Model) Reset(ctx context.Context, name, identifier string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := storage.ValidateIdentifier(identifier); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.states, [2]string{name, identifier})
	return nil
}

func (m *Model) keep(name, id string, b storage.BucketID, s storage.State) {
	key := [2]string{name, strings.Clone(id)} // as the caller may use its memory again
	if m.states[key] == nil {
		m.states[key] = make(map[storage.BucketID]storage.State)
	}
	m.states[key][b] = s
}

// fits fails when rules and the other buckets that are not full are too many.
func fits(states map[storage.BucketID]storage.State, rules []storage.Rule, now int64) error {
	n := len(rules)
next:
	for b, s := range states {
		for i := range rules {
			if rules[i].ID() == b {
				continue next
			}
		}
		if !s.Full(now) {
			n++
		}
	}
	return storage.TooManyBuckets(rules, n)
}
