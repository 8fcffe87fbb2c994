// Package lease decides in the process what is asked often, with tokens that it takes ahead from a shared storage, and
// remembers denials.
//
//	store, err := lease.New(redis, nil) // in front of redis, postgres or a failover.Storage
//	t, err := throttler.New(throttler.Config{Storage: store})
//	defer store.Close(ctx) // gives back what is left; then close redis
//
// The words of the package:
//
// The shared storage is the one that processes share. It alone knows what was spent, and it is asked for everything that
// is not decided here.
//
// A pool is what this process knows of one identifier: what was asked lately, its lease, and the last denial.
//
// A lease is tokens that the shared storage counts as spent, and that this process may hand out until the lease ends: for
// at most Options.Lifetime, and never longer than until the tokens are back in the shared storage by themselves.
//
// The protocol is five rules, which docs/lease.md states under the same numbers:
//
//	1  a denial is believed until it may be over         pool.go
//	2  a lease decides while it has the whole cost       pool.go
//	3  what is hot takes tokens ahead with its own cost  pool.go, flight.go
//	4  others wait only for what takes enough for them   flight.go
//	5  what is not used is given back, once              flight.go
//
// What is admitted from Replenish, FixedWindow, SlidingWindow and SlidingLog buckets is what the shared storage could have
// admitted by itself, whatever the number of processes. A Continuous bucket admits in any time w at most its capacity and
// what comes back in w and a Lifetime. docs/lease.md names the exceptions.
package lease

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// Source is what Verdict.Source says of a decision that was made in this process.
const Source = "lease"

// Defaults of Options.
const (
	DefaultLifetime  = 200 * time.Millisecond
	DefaultMaxDenial = time.Second
)

const defaultMaxIdentifiers = 65536

// Options of a Storage. The zero value and nil are the defaults.
type Options struct {
	// Lifetime is the longest that a token is leased, 10 ms to 10 s, by default DefaultLifetime. A longer one asks the
	// shared storage less often, and lets Continuous buckets admit more too early: what comes back in a Lifetime.
	Lifetime time.Duration

	// MaxDenial is how long a denial is believed at most, 1 ms to 1 min, by default DefaultMaxDenial. It is how late this
	// process notices that another one has given back, refunded or reset.
	MaxDenial time.Duration

	// MaxIdentifiers bounds how many identifiers are remembered. Further ones are decided by the shared storage. Zero
	// means 65,536.
	MaxIdentifiers int

	// DenialsOnly takes nothing ahead, and only remembers denials: then every admission is the shared storage's.
	DenialsOnly bool
}

// OptionError is a fault in what New was given.
type OptionError struct {
	Field  string // Shared or a field of Options
	Reason string // what was given and what is allowed
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("throttler: lease: %s %s", e.Field, e.Reason)
}

// Storage is made by New and is safe for concurrent use.
//
// A call takes no longer than the shared storage does, but for two cases: one that is denied while this process holds a
// lease gives that back and asks once more, and one that waits for a lease may find that it brought less. An error of the
// shared storage is passed on. A call that fails was charged at most its cost and the lease that it took along.
type Storage struct {
	shared  storage.Storage
	options Options
	life    int64 // Lifetime, in microseconds
	half    int64 // of it: what was asked in this time is taken ahead
	denial  int64 // MaxDenial, in microseconds

	seed   maphash.Seed
	shards [256]shard
	cold   [1 << 14]atomic.Uint64 // how often identifiers without a pool ask: see warms
	pools  atomic.Int64

	calls, returned atomic.Int64 // of State

	// A goroutine is started under the lock of a shard that is not closed. So after Close has closed them all, none is.
	running  sync.WaitGroup
	closed   atomic.Bool
	closing  chan struct{}         // closed to end the sweeper
	lasting  context.Context       // of what is given back; it ends when Close gives up
	giveUp   func()                // ends it
	lost     atomic.Pointer[error] // the first failure to give back since Close began
	ended    chan struct{}         // closed when the first Close is done
	closeErr error                 // the result of Close, for those who read from ended
}

var _ storage.Storage = (*Storage)(nil)

// shard is a part of the identifiers.
type shard struct {
	mu                sync.Mutex // guards all of the shard and of its pools. Nobody waits for anything while holding it
	pools             map[key]*pool
	leased            map[*pool]struct{} // those that have a lease
	local, remembered int64              // of State
	closed            bool
	_                 [16]byte // so that shards do not share a cache line
}

// New returns a storage that decides by leases from the shared one. Whoever made that closes it, after this one. All
// faults are returned, joined; each is an *OptionError.
func New(shared storage.Storage, o *Options) (*Storage, error) {
	s := &Storage{shared: shared, seed: maphash.MakeSeed(), closing: make(chan struct{}), ended: make(chan struct{})}
	if o != nil {
		s.options = *o
	}
	s.options.Lifetime = cmp.Or(s.options.Lifetime, DefaultLifetime)
	s.options.MaxDenial = cmp.Or(s.options.MaxDenial, DefaultMaxDenial)
	s.options.MaxIdentifiers = cmp.Or(s.options.MaxIdentifiers, defaultMaxIdentifiers)
	if err := s.validate(); err != nil {
		return nil, err
	}
	s.life, s.denial = s.options.Lifetime.Microseconds(), s.options.MaxDenial.Microseconds()
	s.half = s.life / 2
	for i := range s.shards {
		s.shards[i].pools, s.shards[i].leased = make(map[key]*pool), make(map[*pool]struct{})
	}
	s.lasting, s.giveUp = context.WithCancel(context.Background())
	s.running.Go(s.sweep)
	return s, nil
}

func (s *Storage) validate() error {
	var faults []error
	fault := func(field, format string, args ...any) {
		faults = append(faults, &OptionError{field, fmt.Sprintf(format, args...)})
	}
	if s.shared == nil {
		fault("Shared", "is nil")
	}
	if d := s.options.Lifetime; d < 10*time.Millisecond || d > 10*time.Second {
		fault("Lifetime", "is %v, must be from 10ms to 10s", d)
	}
	if d := s.options.MaxDenial; d < time.Millisecond || d > time.Minute {
		fault("MaxDenial", "is %v, must be from 1ms to 1m", d)
	}
	if n := s.options.MaxIdentifiers; n < 0 {
		fault("MaxIdentifiers", "is %d, must be above 0, or 0 for %d", n, defaultMaxIdentifiers)
	}
	return errors.Join(faults...)
}

// DecideNow decides, and reports true, if that needs no question to the shared storage. It keeps nothing of the request, and
// puts a copy in place of the identifier: so a Throttler asks it first, and allocates nothing if it knows the answer.
func (s *Storage) DecideNow(r *storage.Request, a *storage.Answer) bool {
	if s.pools.Load() == 0 || r.Clocked || len(r.Parts) != 1 || r.Mode == storage.Force {
		return false
	}
	part, now := &r.Parts[0], r.Now
	if now == 0 {
		now = law.Monotonic()
	}
	sh := s.shardOf(part.Identifier)
	sh.mu.Lock()
	p := sh.pools[key{r.Name, part.Identifier}]
	known := p != nil && p.rules == part.Rules && !sh.closed && p.decides(r, a, now)
	if known {
		p.count(r.Costs, now, s.half)
		part.Identifier = p.identifier
	}
	sh.mu.Unlock()
	return known
}

// Decide implements storage.Storage. A request of several parts, a Force and one with a time of the caller's are the shared
// storage's, and so is a Reserve or an AtMost of which the lease does not have the whole cost.
func (s *Storage) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if r.Clocked || len(r.Parts) != 1 || r.Mode == storage.Force {
		return s.pass(ctx, r, a)
	}
	part := &r.Parts[0]
	h := maphash.String(s.seed, part.Identifier)
	sh := &s.shards[h>>56]
	for waited := false; ; waited = true {
		now := r.Now
		if now == 0 || waited {
			now = law.Monotonic()
		}
		sh.mu.Lock()
		p := s.poolOf(sh, h, r, now)
		if p == nil || sh.closed {
			sh.mu.Unlock()
			return s.stranger(ctx, r, a)
		}
		if !waited {
			p.count(r.Costs, now, s.half)
		}
		if p.decides(r, a, now) {
			sh.mu.Unlock()
			return nil
		}
		f, own := s.flightFor(ctx, p, r, now, waited)
		sh.mu.Unlock()
		if f == nil {
			return s.pass(ctx, r, a)
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		if own || f.err != nil {
			return f.tell(a)
		}
	}
}

// stranger has the shared storage decide on an identifier of which nothing is known here. Nearly all of many identifiers
// are such.
func (s *Storage) stranger(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	if s.closed.Load() {
		return storage.ErrClosed
	}
	s.calls.Add(1)
	sent := law.Monotonic()
	err := s.shared.Decide(ctx, r, a)
	if err == nil && !a.Allowed {
		s.learn(r, a, sent)
	}
	return err
}

// pass has the shared storage decide. Nobody is denied for what this process holds: then that is given back, and the
// shared storage is asked once more. A Reserve, an AtMost and a Force would be told of less than there is, so they are
// preceded by that.
func (s *Storage) pass(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	if s.closed.Load() {
		return storage.ErrClosed
	}
	if r.Clocked { // by a clock of which leases know nothing
		return s.ask(ctx, r, a)
	}
	first := r.Mode == storage.Force || r.Within > 0 || anyAtMost(r.Parts)
	away := s.returning(r, first)
	if first || r.Mode == storage.Peek {
		wait(ctx, away)
	}
	sent := law.Monotonic()
	err := s.ask(ctx, r, a)
	if err == nil && !a.Allowed && r.Mode != storage.Force {
		if away = append(away, s.returning(r, true)...); len(away) > 0 {
			wait(ctx, away)
			sent = law.Monotonic()
			err = s.ask(ctx, r, a)
		}
	}
	if err == nil {
		s.learn(r, a, sent)
	}
	return err
}

// plain says that a request of one part is for its cost, now.
func plain(r *storage.Request) bool { return r.Within == 0 && !r.Parts[0].AtMost }

func anyAtMost(parts []storage.Part) bool {
	for i := range parts {
		if parts[i].AtMost {
			return true
		}
	}
	return false
}

// ask asks the shared storage. The time of a request without a clock is not passed on, as it is over by now.
func (s *Storage) ask(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	s.calls.Add(1)
	if r.Now != 0 && !r.Clocked {
		later := *r
		later.Now = 0
		r = &later
	}
	return s.shared.Decide(ctx, r, a)
}

// learn takes over what the shared storage has said to a question that was sent at a time. What this process holds is not gone, and so it is counted in.
func (s *Storage) learn(r *storage.Request, a *storage.Answer, sent int64) {
	n := 0
	for i := range r.Parts {
		part := &r.Parts[i]
		from := n
		n += len(part.Rules.Rules)
		sh := s.shardOf(part.Identifier)
		denied := !a.Allowed && len(r.Parts) == 1 && r.Mode == storage.Take && plain(r)
		sh.mu.Lock()
		p := sh.pools[key{r.Name, part.Identifier}]
		if p == nil && denied {
			p = s.add(sh, r, law.Monotonic())
		}
		if p != nil && p.rules == part.Rules {
			if r.Mode != storage.Peek {
				p.heard(a.Counts[from:n], sent)
			}
			if denied {
				p.deny(r.Costs, a, s)
			}
			p.lease.countIn(a.Counts[from:n])
		}
		sh.mu.Unlock()
	}
}

// Charge implements storage.Storage. Before something is spent the lease is given back.
func (s *Storage) Charge(ctx context.Context, c *storage.Charge) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.closed.Load() {
		return storage.ErrClosed
	}
	for _, a := range c.Amounts {
		if a.N > 0 && !c.Clocked {
			wait(ctx, s.returning(&storage.Request{Name: c.Name, Parts: []storage.Part{{Identifier: c.Identifier}}}, true))
			break
		}
	}
	return s.charge(ctx, c)
}

// charge charges the shared storage. What was denied before may be admitted afterwards.
func (s *Storage) charge(ctx context.Context, c *storage.Charge) error {
	sh, k := s.shardOf(c.Identifier), key{c.Name, c.Identifier}
	sh.mu.Lock()
	began := sh.pools[k]
	at := law.Monotonic()
	if began != nil {
		began.charging++
	}
	sh.mu.Unlock()
	s.calls.Add(1)
	err := s.shared.Charge(ctx, c)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if began != nil {
		began.charging--
	}
	if p := sh.pools[k]; p != nil {
		p.until = 0
		p.wasCharged(c, at, err)
	}
	return err
}

// Reset implements storage.Storage. The lease is forgotten with the rest, and not given back: so is one that was taken while
// the shared storage forgets.
func (s *Storage) Reset(ctx context.Context, name, identifier string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.closed.Load() {
		return storage.ErrClosed
	}
	s.forget(name, identifier)
	defer s.forget(name, identifier)
	s.calls.Add(1)
	return s.shared.Reset(ctx, name, identifier)
}

func (s *Storage) forget(name, identifier string) {
	sh := s.shardOf(identifier)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if p := sh.pools[key{name, identifier}]; p != nil {
		p.until = 0
		p.resets++
		p.empty()
	}
}

// Close gives back what is leased. Further calls get ErrClosed. It waits for leases that are on their way, as long as its
// context allows; the error says that something could not be given back, which then comes back by itself. A second Close
// waits for the first and returns the same.
func (s *Storage) Close(ctx context.Context) error {
	if s.closed.Swap(true) {
		select {
		case <-s.ended:
			return s.closeErr
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	defer close(s.ended)
	defer s.giveUp()
	close(s.closing)
	for i := range s.shards {
		sh := &s.shards[i]
		sh.mu.Lock()
		for p := range sh.leased {
			s.giveBack(p, p.empty())
		}
		sh.closed = true
		sh.mu.Unlock()
	}
	all := make(chan struct{})
	go func() { s.running.Wait(); close(all) }()
	select {
	case <-all:
	case <-ctx.Done():
		s.closeErr = ctx.Err()
		return s.closeErr
	}
	if err := s.lost.Load(); err != nil {
		s.closeErr = fmt.Errorf("throttler: lease: Close could not give back everything: %w", *err)
	}
	return s.closeErr
}
