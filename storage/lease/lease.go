// Package lease decides frequent calls in the process. It takes tokens ahead from a shared storage and remembers
// denials, so most calls for a busy identifier need no round trip.
//
//	store, err := lease.New(redis, nil) // in front of redis, postgres or a failover.Storage
//	t, err := throttler.New(throttler.Config{Storage: store})
//	defer store.Close(ctx) // gives back what is left; then close redis
//
// The words of the package:
//
// The shared storage is the one that the processes share. It alone knows how many tokens were spent, and it decides
// every call that this package cannot decide in the process.
//
// A pool is what this process knows about one identifier: its recent demand, its lease, and its last denial.
//
// A lease is a number of tokens that the shared storage counts as spent and that this process may hand out. It lasts for
// at most Options.Lifetime, and never beyond the moment when the shared storage refills the tokens.
//
// The protocol has five rules. docs/lease.md describes them under the same numbers:
//
//	1  a denial is believed until it may be over                       pool.go
//	2  a lease decides a call if it covers the whole cost              pool.go
//	3  a call for a hot identifier takes tokens ahead with its cost    pool.go, flight.go
//	4  a call waits for a lease only if the lease provides for it      flight.go
//	5  unused tokens are given back, once                              flight.go
//
// Replenish, FixedWindow, SlidingWindow and SlidingLog buckets admit nothing that the shared storage could not have
// admitted itself, however many processes there are. A Continuous bucket admits, in any time w, at most its capacity plus
// the refill of w and one Lifetime. docs/lease.md lists the exceptions.
package lease

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// Source is the Verdict.Source of a decision that was made in this process.
const Source = "lease"

// Defaults of Options.
const (
	DefaultLifetime  = 200 * time.Millisecond
	DefaultMaxDenial = time.Second
)

const defaultMaxIdentifiers = 65536

// Options configures a Storage. The zero value, and a nil pointer, select the defaults.
type Options struct {
	// Lifetime is how long a token may be leased at most, 10 ms to 10 s. Zero means DefaultLifetime. With a longer
	// Lifetime the shared storage is called less often, but Continuous buckets may admit more too early: up to the
	// refill of one Lifetime.
	Lifetime time.Duration

	// MaxDenial is how long a denial is believed at most, 1 ms to 1 min. Zero means DefaultMaxDenial. It bounds how late
	// this process notices that another process gave tokens back, refunded or reset.
	MaxDenial time.Duration

	// MaxIdentifiers bounds how many identifiers have a pool. The shared storage decides all calls for further ones. Zero
	// means 65,536.
	MaxIdentifiers int

	// DenialsOnly disables leases: only denials are remembered, and the shared storage decides every admission.
	DenialsOnly bool
}

// OptionError describes one invalid argument of New.
type OptionError struct {
	Field  string // Shared, or the name of a field of Options
	Reason string // the value that was given and the values that are allowed
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("throttler: lease: %s %s", e.Field, e.Reason)
}

// Storage decides by leases from a shared storage. New creates it. It is safe for concurrent use.
//
// A call takes no longer than the same call to the shared storage, with two exceptions. If it is denied while this
// process holds a lease, the lease is given back and the call asks again. If it waits for another call's lease, that
// lease may turn out too small, and the call then asks the shared storage itself. Errors of the shared storage are passed
// on. A call that fails was charged at most its cost and the lease that it asked for.
type Storage struct {
	shared  storage.Storage
	options Options
	life    int64 // Lifetime, in microseconds
	half    int64 // half a Lifetime: the demand of this time is taken ahead
	denial  int64 // MaxDenial, in microseconds

	seed   maphash.Seed
	shards [256]shard
	cold   [1 << 14]atomic.Uint64 // call counts of identifiers without a pool; see warms
	pools  atomic.Int64
	frees  [1 << 12]atomic.Uint32 // counts of what may have freed tokens; see freed

	calls, returned atomic.Int64 // State.Calls and State.Returned

	// New starts the first goroutine. Others are started under the lock of a shard that is not closed, or by a goroutine
	// that running already counts. So once Close has closed all shards, running cannot rise from zero during Wait.
	running  sync.WaitGroup
	closed   atomic.Bool
	closing  chan struct{}         // closed by Close to stop the sweeper
	lasting  context.Context       // context of the returns; canceled when Close gives up
	giveUp   func()                // cancels lasting
	lost     atomic.Pointer[error] // the first failure to give back since Close began
	ended    chan struct{}         // closed when the first Close has finished
	closeErr error                 // result of the first Close; read it only after ended is closed
}

var _ storage.Storage = (*Storage)(nil)

// shard holds the pools of one part of the identifiers.
type shard struct {
	mu                sync.Mutex         // guards the shard and its pools; never held during I/O or while waiting for a goroutine
	pools             map[uint64]*pool   // by the hash of name and identifier
	leased            map[*pool]struct{} // the pools that have a lease, so that sweeps and State need not visit the others
	local, remembered int64              // State.Local and State.Remembered
	closed            bool
	_                 [16]byte // so that shards do not share a cache line
}

// New returns a Storage that decides by leases from shared. The caller still owns shared and closes it, after closing the
// Storage. New returns all faults of its arguments joined; each is an *OptionError.
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
		s.shards[i].pools, s.shards[i].leased = make(map[uint64]*pool), make(map[*pool]struct{})
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
	if v := reflect.ValueOf(s.shared); s.shared == nil || v.Kind() == reflect.Pointer && v.IsNil() {
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

// DecideNow decides a request if that needs no call to the shared storage, and reports whether it did. It retains nothing
// of the request, and if it decides it replaces the identifier by the pool's copy. A Throttler calls it first, and such a
// decision allocates nothing.
func (s *Storage) DecideNow(r *storage.Request, a *storage.Answer) bool {
	if s.pools.Load() == 0 || r.Clocked || len(r.Parts) != 1 || r.Mode == storage.Force {
		return false
	}
	part, now := &r.Parts[0], r.Now
	if now == 0 {
		now = law.Monotonic()
	}
	h := s.hash(r.Name, part.Identifier)
	sh := s.shard(h)
	sh.mu.Lock()
	p := sh.pool(h, r.Name, part.Identifier)
	known := p != nil && p.rules == part.Rules && !sh.closed && p.decides(r, a, now)
	if known {
		p.count(r.Costs, now, s.half)
		part.Identifier = p.identifier
	}
	sh.mu.Unlock()
	return known
}

// Decide implements storage.Storage. The shared storage decides requests with several parts, Force requests, and requests
// with the caller's own clock. It also decides a Reserve or an AtMost whose whole cost the lease does not cover.
func (s *Storage) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if r.Clocked || len(r.Parts) != 1 || r.Mode == storage.Force {
		return s.pass(ctx, r, a)
	}
	part := &r.Parts[0]
	h := s.hash(r.Name, part.Identifier)
	sh := s.shard(h)
	// A call waits for at most one flight that another call started. If the lease then cannot decide, the call starts its
	// own flight or asks the shared storage. So a call that misses the tokens of a lease does not wait forever.
	for waited := false; ; waited = true {
		now := law.Monotonic()
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

// stranger lets the shared storage decide on an identifier that has no pool. It is the fast path of a service with many
// identifiers, since nearly all of theirs have none.
func (s *Storage) stranger(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	if s.closed.Load() {
		return storage.ErrClosed
	}
	sent := s.moment(r)
	err := s.ask(ctx, r, a)
	if err == nil && !a.Allowed {
		s.learn(r, a, sent)
	}
	return err
}

// pass lets the shared storage decide. No call is denied because of tokens that this process holds: after a denial pass
// gives the leases back, also those that are on their way here, and asks once more. A Reserve, an AtMost and a Force get an
// answer that depends on how many tokens there are, so pass gives the leases back before it asks for them.
func (s *Storage) pass(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	if s.closed.Load() {
		return storage.ErrClosed
	}
	if r.Clocked { // leases live by this process's clock, not by the caller's
		return s.ask(ctx, r, a)
	}
	first := r.Mode == storage.Force || r.Within > 0 || anyAtMost(r.Parts)
	if first {
		s.landed(ctx, r)
	}
	// A Take does not wait for returns in progress, since it is usually admitted without them. If it is denied, it waits
	// for them and asks again. A Peek waits, so that its answer includes them.
	away := s.returning(r, first)
	if first || r.Mode == storage.Peek {
		wait(ctx, away)
	}
	sent := s.moment(r)
	err := s.ask(ctx, r, a)
	if err == nil && !a.Allowed && r.Mode != storage.Force {
		s.landed(ctx, r)
		// A return may have begun and finished since the request was sent: then freed has counted it.
		if away = append(away, s.returning(r, true)...); len(away) > 0 || s.freed(r) != sent.freed {
			wait(ctx, away)
			sent = s.moment(r)
			err = s.ask(ctx, r, a)
		}
	}
	if err == nil {
		s.learn(r, a, sent)
	}
	return err
}

// plain reports whether a request with one part asks for exactly its cost, without waiting.
func plain(r *storage.Request) bool { return r.Within == 0 && !r.Parts[0].AtMost }

func anyAtMost(parts []storage.Part) bool {
	for i := range parts {
		if parts[i].AtMost {
			return true
		}
	}
	return false
}

// ask calls the shared storage.
func (s *Storage) ask(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	s.calls.Add(1)
	return s.shared.Decide(ctx, r, a)
}

// moment is when a request was sent.
type moment struct {
	at    int64 // by law.Monotonic
	freed uint32
}

func (s *Storage) moment(r *storage.Request) moment { return moment{law.Monotonic(), s.freed(r)} }

// freed returns a number that changes whenever a Charge or a Reset of one of the request's identifiers ends. A denial may
// have been decided before tokens became free, so it is remembered only if the number is still that of the moment when
// the request was sent. The time would not do: the two may happen in the same microsecond.
//
// The counts are not in the pools, because an identifier may get its pool only with the denial. Identifiers that share a
// count cost each other a round trip now and then.
func (s *Storage) freed(r *storage.Request) (n uint32) {
	for i := range r.Parts {
		n += s.freesOf(s.hash(r.Name, r.Parts[i].Identifier)).Load()
	}
	return n
}

func (s *Storage) freesOf(h uint64) *atomic.Uint32 { return &s.frees[h%uint64(len(s.frees))] }

// learn updates the pools with the shared storage's answer to a request. It also adds the tokens that this process holds
// to the counts of the answer, since they can still be used.
func (s *Storage) learn(r *storage.Request, a *storage.Answer, sent moment) {
	n := 0
	for i := range r.Parts {
		part := &r.Parts[i]
		from := n
		n += len(part.Rules.Rules)
		h := s.hash(r.Name, part.Identifier)
		sh := s.shard(h)
		sh.mu.Lock()
		denied := !a.Allowed && len(r.Parts) == 1 && r.Mode == storage.Take && plain(r) && s.freed(r) == sent.freed
		p := sh.pool(h, r.Name, part.Identifier)
		if p == nil && denied { // a pool for the denial alone: it may save the next calls a round trip
			p = s.add(sh, h, r, law.Monotonic())
		}
		if p != nil && a.Allowed && r.Mode != storage.Peek {
			p.took(r.Costs[from:n], sent.at)
		}
		if p != nil && p.rules == part.Rules {
			if r.Mode != storage.Peek {
				p.heard(a.Counts[from:n], sent.at)
			}
			if denied {
				p.deny(r.Costs, a, s)
			}
			p.lease.countIn(a.Counts[from:n])
		}
		sh.mu.Unlock()
	}
}

// Charge implements storage.Storage. A Charge that spends tokens first gives the lease back, so that the shared storage
// charges the full balance. A refund need not wait for that.
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

// charge charges the shared storage. Afterwards it drops the remembered denial, because tokens may have become free.
//
// The pool is looked up again when the call is done: it may have been forgotten, or made, in the meantime. charging is
// counted on the pool that was there at the beginning.
func (s *Storage) charge(ctx context.Context, c *storage.Charge) error {
	h := s.hash(c.Name, c.Identifier)
	sh := s.shard(h)
	sh.mu.Lock()
	began := sh.pool(h, c.Name, c.Identifier)
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
	s.freesOf(h).Add(1)
	if p := sh.pool(h, c.Name, c.Identifier); p != nil {
		p.until = 0
		p.wasCharged(c, at, err)
	}
	return err
}

// Reset implements storage.Storage. It drops the lease without giving it back, since the shared storage forgets that the
// tokens were spent. It drops it again afterwards, for a lease that was taken while the shared storage was resetting.
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
	h := s.hash(name, identifier)
	sh := s.shard(h)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	s.freesOf(h).Add(1)
	if p := sh.pool(h, name, identifier); p != nil {
		p.until = 0
		p.resets++
		p.empty()
	}
}

// Close gives all leases back. Later calls return ErrClosed. It waits for requests in flight until ctx ends, and then
// returns the error of ctx. Its error may also say that some tokens could not be given back; the shared storage refills
// those as if they had been used. Another Close waits for the first, until its own ctx ends, and returns the same error.
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
		sh.closed = true // from here on no lease is added: land gives it back instead
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
