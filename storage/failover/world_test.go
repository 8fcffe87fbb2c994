package failover_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"sync"
	"syscall"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/redis"
)

// A world has two stores, and links from the processes to them. Everything takes virtual time. How long a call takes is
// computed from the seed, the link and the time, so that a seed always gives the same run.

// store decides as Redis or Postgres does, by a clock of its own.
type store struct {
	name string

	mu      sync.Mutex // guards what follows
	ahead   int64      // how far its clock is ahead, in microseconds
	down    bool
	scripts map[*link]bool // the links whose script it knows
	states  map[id]map[law.BucketID]law.State
	seqs    map[string]int64 // the last number of each origin
}

type id struct{ name, identifier string }

func newStore(name string) *store {
	return &store{name: name, scripts: map[*link]bool{}, states: map[id]map[law.BucketID]law.State{}, seqs: map[string]int64{}}
}

func (s *store) now() int64 { return law.Monotonic() + s.ahead }

// of returns the states of an identifier, which may be changed.
func (s *store) of(name, identifier string) map[law.BucketID]law.State {
	k := id{name, identifier}
	if s.states[k] == nil {
		s.states[k] = map[law.BucketID]law.State{}
	}
	return s.states[k]
}

// snapshot returns a copy of all states, which a restart may bring back.
func (s *store) snapshot() map[id]map[law.BucketID]law.State {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[id]map[law.BucketID]law.State{}
	for k, states := range s.states {
		out[k] = map[law.BucketID]law.State{}
		for name, st := range states {
			out[k][name] = law.MakeState(st.Law, st.Seen, append([]law.Hold(nil), st.Holds()...))
		}
	}
	return out
}

func (s *store) restore(states map[id]map[law.BucketID]law.State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.states, s.scripts, s.down = states, map[*link]bool{}, false
}

func (s *store) setDown(down bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = down
}

func (s *store) step(by int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ahead += by
}

// decide decides as redis.Storage.Decide does or, if fresh, as DecideFresh does.
func (s *store) decide(l *link, r *storage.Request, fresh bool, since int64) (*storage.Answer, error) {
	if fresh && !s.scripts[l] {
		return nil, redis.ErrRestarted
	}
	s.scripts[l] = true
	now := s.now()
	var draws []law.Draw
	var states []map[law.BucketID]law.State // one for each draw
	doubtful, unsure, asked := false, false, false
	for _, p := range r.Parts {
		for j := range p.Rules.Rules {
			rule, cost := &p.Rules.Rules[j], r.Costs[len(draws)]
			states = append(states, s.of(r.Name, p.Identifier))
			st := s.of(r.Name, p.Identifier)[rule.ID()]
			st = law.MakeState(st.Law, st.Seen, append([]law.Hold(nil), st.Holds()...))
			doubted := st.Law == nil || st.Seen <= now-(law.Monotonic()-since)
			doubtful, unsure, asked = doubtful || doubted && cost > 0, unsure || doubted, asked || cost > 0
			draws = append(draws, law.Draw{Rule: rule, Cost: cost, Within: r.Within, AtMost: p.AtMost, State: st})
		}
	}
	a := &storage.Answer{Allowed: law.Decide(r.Mode, now, draws), Source: s.name, At: law.Monotonic()}
	a.Tokens = law.Taken(draws)
	if a.Allowed && (doubtful || unsure && !asked) && since != 0 {
		return nil, redis.ErrStale
	}
	for i, d := range draws {
		a.Counts = append(a.Counts, d.Count)
		if a.Allowed && r.Mode != storage.Peek && d.Cost > 0 {
			states[i][d.Rule.ID()] = d.State
		}
	}
	return a, nil
}

func (s *store) charge(c *storage.Charge) {
	states := s.of(c.Name, c.Identifier)
	for i, a := range c.Amounts {
		rule := &c.Rules.Rules[i]
		if st := states[rule.ID()]; st.Apply(rule, a, s.now()) {
			states[rule.ID()] = st
		}
	}
}

func (s *store) debt(d replica.Debt) replica.Debt {
	d.Amounts = nil
	for i := range d.Rules.Rules {
		rule := &d.Rules.Rules[i]
		d.Amounts = append(d.Amounts, s.of(d.Name, d.Identifier)[rule.ID()].Debt(rule, s.now()))
	}
	return d
}

func (s *store) raise(d *replica.Debt) {
	states := s.of(d.Name, d.Identifier)
	for i, debt := range d.Amounts {
		if rule := &d.Rules.Rules[i]; len(debt) > 0 {
			st := states[rule.ID()]
			st.Raise(rule, debt, s.now())
			states[rule.ID()] = st
		}
	}
}

// record is postgres.Storage.Record.
func (s *store) record(origin string, seq int64, batch []storage.Charge) (debts []replica.Debt) {
	zero := true
	for i := range batch {
		for _, a := range batch[i].Amounts {
			zero = zero && a.N == 0
		}
	}
	if !zero && s.seqs[origin] < seq {
		s.seqs[origin] = seq
		for i := range batch {
			s.charge(&batch[i])
		}
	}
	for i := range batch {
		debts = append(debts, s.debt(replica.Debt{Name: batch[i].Name, Identifier: batch[i].Identifier, Rules: batch[i].Rules}))
	}
	return debts
}

// fault is what a link does to a call.
type fault uint8

const (
	fine      fault = iota
	refuses         // at once
	swallows        // everything, without a word
	loses           // the answers
	sometimes       // loses one of three answers
	stalls          // executes it later than the caller waits
)

// link is the connection of one process to a store. It is a primary or a ledger.
type link struct {
	to      *store
	seed    uint64
	timeout time.Duration

	mu     sync.Mutex    // guards what follows
	trip   time.Duration // mean of one way
	fault  fault
	failed time.Time // the last time that a call met a fault
	calls  uint64
	report func(error)
}

func (l *link) slow(trip time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.trip = trip
}

func (l *link) set(f fault) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fault = f
}

// heal ends a fault, unless another has begun.
func (l *link) heal(f fault) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fault == f {
		l.fault = fine
	}
}

// healthy returns for how long no call has met a fault.
func (l *link) healthy() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return time.Since(l.failed)
}

// hurt notes that a call has met a fault.
func (l *link) hurt() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = time.Now()
}

// random returns a number that is the same for the same call in each run of a seed.
func (l *link) random(n uint64) uint64 {
	h := fnv.New64a()
	_ = binary.Write(h, binary.LittleEndian, []uint64{l.seed, n, uint64(law.Monotonic())})
	return h.Sum64()
}

// call executes op at the store, unless a fault prevents it. It returns with the answer, after the timeout, or when ctx
// ends.
func (l *link) call(ctx context.Context, op func() error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	l.mu.Lock()
	l.calls++
	n, f, trip, report := l.calls, l.fault, l.trip, l.report
	l.mu.Unlock()
	if f != fine {
		l.hurt()
	}
	r := l.random(n)
	there := trip/2 + time.Duration(r%uint64(trip))
	back := trip/2 + time.Duration(r>>32%uint64(trip))
	answer := make(chan error, 1)
	switch f {
	case refuses:
		answer <- errRefused
	case swallows:
	case stalls:
		there += l.timeout
		fallthrough
	default:
		go func() {
			<-time.After(there)
			l.to.mu.Lock()
			var err error
			if l.to.down {
				err = errRefused
			} else {
				err = op()
			}
			l.to.mu.Unlock()
			<-time.After(back)
			if f != loses && (f != sometimes || r%3 > 0) {
				answer <- err
			}
		}()
	}
	// The round trip goes on when the caller has left, and is reported, as those of the Redis storage are.
	done := make(chan error, 1)
	go func() {
		var err error
		select {
		case err = <-answer:
		case <-time.After(l.timeout):
			err = fmt.Errorf("%w: no answer", storage.ErrUnavailable)
		}
		failure := err
		if errors.Is(err, storage.ErrUnavailable) {
			l.hurt()
		} else {
			failure = nil
		}
		if report != nil {
			report(failure)
		}
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

var errRefused = fmt.Errorf("%w: %w", storage.ErrUnavailable, syscall.ECONNREFUSED)

func (l *link) Watch(timeout time.Duration, report func(error)) error {
	l.timeout, l.report = timeout, report
	return nil
}

func (l *link) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	return l.answer(ctx, a, func() (*storage.Answer, error) { return l.to.decide(l, r, false, 0) })
}

func (l *link) DecideFresh(ctx context.Context, r *storage.Request, a *storage.Answer, since int64) error {
	return l.answer(ctx, a, func() (*storage.Answer, error) { return l.to.decide(l, r, true, since) })
}

// answer is call for an op with an answer. It fills a only before it returns, as the caller may have left by the time
// the op is executed.
func (l *link) answer(ctx context.Context, a *storage.Answer, op func() (*storage.Answer, error)) error {
	answer := make(chan *storage.Answer, 1)
	err := l.call(ctx, func() error {
		a, err := op()
		answer <- a
		return err
	})
	if err == nil {
		got := <-answer
		a.Allowed, a.Source, a.Degraded, a.At, a.Tokens = got.Allowed, got.Source, false, got.At, got.Tokens
		copy(a.Counts, got.Counts)
	}
	return err
}

func (l *link) Charge(ctx context.Context, c *storage.Charge) error {
	return l.call(ctx, func() error { l.to.charge(c); return nil })
}

func (l *link) Reset(ctx context.Context, name, identifier string) error {
	return l.call(ctx, func() error { delete(l.to.states, id{name, identifier}); return nil })
}

func (l *link) Raise(ctx context.Context, d replica.Debt) error {
	return l.call(ctx, func() error { l.to.raise(&d); return nil })
}

func (l *link) Debt(ctx context.Context, d replica.Debt) (replica.Debt, error) {
	answer := make(chan replica.Debt, 1)
	if err := l.call(ctx, func() error { answer <- l.to.debt(d); return nil }); err != nil {
		return d, err
	}
	return <-answer, nil
}

func (l *link) Record(ctx context.Context, origin string, seq int64, batch []storage.Charge) ([]replica.Debt, error) {
	answer := make(chan []replica.Debt, 1)
	if err := l.call(ctx, func() error { answer <- l.to.record(origin, seq, batch); return nil }); err != nil {
		return nil, err
	}
	return <-answer, nil
}
