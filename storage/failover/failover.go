// Package failover lets Redis decide, and Postgres when Redis cannot. Postgres knows what Redis admitted up to
// about 0.1 s ago, so limits carry over an outage and back; docs/failover.md has the exact bound.
//
// Postgres is the ledger: every 100 ms each process charges it with what Redis admitted. When Redis fails, a
// call first charges what this process has not told the ledger yet of its identifier, and is then decided there.
// Once Redis is well again, it is raised to what the ledger has recorded before it admits.
//
//	store, err := failover.New(redis, postgres, nil)
//	t, err := throttler.New(throttler.Config{Storage: store})
//	defer store.Close(ctx)
//
// docs/failover.md also has the protocol, what each fault looks like and what to watch.
package failover

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/postgres"
	"github.com/go-throttler/throttler/storage/redis"
	"github.com/go-throttler/throttler/storage/runtime"
)

// Defaults of Options.
const (
	DefaultPrimaryTimeout = 50 * time.Millisecond
	DefaultLedgerTimeout  = 200 * time.Millisecond
	DefaultFlushInterval  = 100 * time.Millisecond
	DefaultMaxPending     = 65536
)

// Options of a Storage. The zero value and nil are the defaults.
type Options struct {
	// PrimaryTimeout and LedgerTimeout are the longest that a call waits for Redis, and after it for Postgres; at
	// least 1 ms, by default DefaultPrimaryTimeout and DefaultLedgerTimeout. A shorter Timeout in the options of
	// the storages remains in force.
	PrimaryTimeout, LedgerTimeout time.Duration

	// FlushInterval is how long what Redis admitted waits until the ledger is charged, 1 ms to 1 min, by default
	// DefaultFlushInterval. A longer one costs Postgres less, and more may be admitted too much.
	FlushInterval time.Duration

	// MaxPending is for how many identifiers what the ledger has not been charged yet is remembered while
	// Postgres is away, above 0; 0 is DefaultMaxPending. What is admitted of others is not charged.
	MaxPending int

	// MaxIsolation refuses calls with ErrUnavailable when Postgres could not be charged for so long, although
	// Redis would decide. It bounds what is admitted where some processes reach Redis only and others
	// Postgres only. It is 0 or more; 0 is without this bound.
	MaxIsolation time.Duration

	// Local decides in this process while neither store can. Nil: such calls are ErrUnavailable.
	Local *LocalOptions

	// Observe is told what happens behind the calls. It is called by one goroutine at a time, and should be
	// quick.
	Observe func(Event)
}

// LocalOptions are for when neither store can decide.
type LocalOptions struct {
	// Share is the part of each bucket's capacity and refill that this process hands out by itself, above 0 and at
	// most 1: one over the number of processes keeps the limit. Its buckets begin full. A bucket hands out at
	// least one token, however small its share, so with small capacities n processes may admit up to n.
	Share float64
}

// OptionError is a fault in what New was given.
type OptionError struct {
	Field  string // Primary, Ledger or a field of Options
	Reason string // what was given and what is allowed
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("throttler: failover: %s %s", e.Field, e.Reason)
}

// primary is a *redis.Storage.
type primary interface {
	storage.Replica
	DecideFresh(ctx context.Context, r storage.Request, since int64) (storage.Verdict, error)
	Watch(timeout time.Duration, report func(error)) error
}

// ledger is a *postgres.Storage.
type ledger interface {
	storage.Replica
	Record(ctx context.Context, origin string, seq int64, batch []storage.Charge) ([]storage.Debt, error)
}

// Storage is safe for concurrent use. It is made by New.
//
// A call takes at most the two timeouts, 50 ms for Redis and 200 ms for Postgres, plus what the machine needs to
// run it; the tests on real servers ask for 99 % of calls within 260 ms. None that is answered by Redis does more
// than one round trip, except where Redis is doubted. An error of one store is not seen as long as the other
// answers. That of a call which neither does wraps ErrUnavailable and both causes.
type Storage struct {
	primary primary
	ledger  ledger
	options Options
	local   *runtime.Storage

	breaker breaker
	journal journal
	flusher flusher
	doubted atomic.Int64 // since when (Monotonic) the primary may have missed what the ledger knows; 0: never
	outage  atomic.Int64 // since when it has for sure, as Postgres decided meanwhile

	calls   atomic.Int64  // that are in progress
	closed  atomic.Bool   // no further ones are
	idle    chan struct{} // receives one when closed and none is in progress
	closing chan struct{} // closed when the goroutines are to end
	kill    func()        // ends what they wait for
	ended   chan struct{} // closed when Close is done
	left    error         // what it returned
	running sync.WaitGroup
	observe sync.Mutex
	jitter  func(time.Duration) time.Duration // from 0 to that
}

// New returns a storage that decides by Redis, and by Postgres when Redis fails. The primary must not have been used
// before, and nothing else may use it. Whoever made the stores closes them, after the storage.
//
// A fault is an *OptionError; all faults come joined, but nil stores are reported before the options. A primary that
// was used before, or is closed, is the error of package redis: its *OptionError, or ErrClosed.
func New(primary *redis.Storage, ledger *postgres.Storage, o *Options) (*Storage, error) {
	var faults []error
	if primary == nil {
		faults = append(faults, &OptionError{"Primary", "is nil"})
	}
	if ledger == nil {
		faults = append(faults, &OptionError{"Ledger", "is nil"})
	}
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	return open(primary, ledger, o)
}

func open(primary primary, ledger ledger, o *Options) (*Storage, error) {
	s := &Storage{primary: primary, ledger: ledger, jitter: mathrand.N[time.Duration], idle: make(chan struct{}, 1),
		closing: make(chan struct{}), ended: make(chan struct{})}
	if o != nil {
		s.options = *o
	}
	s.options.PrimaryTimeout = cmp.Or(s.options.PrimaryTimeout, DefaultPrimaryTimeout)
	s.options.LedgerTimeout = cmp.Or(s.options.LedgerTimeout, DefaultLedgerTimeout)
	s.options.FlushInterval = cmp.Or(s.options.FlushInterval, DefaultFlushInterval)
	s.options.MaxPending = cmp.Or(s.options.MaxPending, DefaultMaxPending)
	if err := s.options.validate(); err != nil {
		return nil, err
	}
	if s.options.Local != nil {
		s.local = runtime.New(nil)
	}
	s.journal = newJournal(s.options.MaxPending)
	s.flusher = flusher{origin: rand.Text(), seq: 1}
	ctx, kill := context.WithCancel(context.Background())
	s.kill = kill
	s.breaker.opened = func() { s.running.Go(func() { s.probes(ctx) }) }
	if err := primary.Watch(s.options.PrimaryTimeout, s.report); err != nil {
		kill()
		return nil, err
	}
	s.running.Go(func() { s.flushes(ctx) })
	return s, nil
}

func (o *Options) validate() error {
	var faults []error
	fault := func(field, format string, args ...any) {
		faults = append(faults, &OptionError{field, fmt.Sprintf(format, args...)})
	}
	for _, d := range []struct {
		field string
		value time.Duration
		least time.Duration
	}{
		{"PrimaryTimeout", o.PrimaryTimeout, time.Millisecond},
		{"LedgerTimeout", o.LedgerTimeout, time.Millisecond},
		{"FlushInterval", o.FlushInterval, time.Millisecond},
		{"MaxIsolation", o.MaxIsolation, 0},
	} {
		if d.value < d.least {
			fault(d.field, "is %v, must be at least %v", d.value, d.least)
		}
	}
	if o.FlushInterval > time.Minute {
		fault("FlushInterval", "is %v, must be at most 1m", o.FlushInterval)
	}
	if o.MaxPending < 0 {
		fault("MaxPending", "is %d, must be above 0, or 0 for %d", o.MaxPending, DefaultMaxPending)
	}
	if o.Local != nil && !(o.Local.Share > 0 && o.Local.Share <= 1) {
		fault("Local.Share", "is %v, must be above 0 and at most 1", o.Local.Share)
	}
	return errors.Join(faults...)
}

// Decide implements storage.Storage. The Verdict of a call that Redis did not answer is Degraded.
func (s *Storage) Decide(ctx context.Context, r storage.Request) (v storage.Verdict, err error) {
	if err := s.enter(ctx); err != nil {
		return v, err
	}
	defer s.leave()
	if err := r.Validate(); err != nil {
		return v, err
	}
	began, cause := time.Now(), s.breaker.cause()
	asked := cause == nil
	if asked {
		if v, cause = s.decideOnPrimary(ctx, &r, began, s.options.LedgerTimeout/2); !fails(cause) {
			return v, cause
		}
	}
	if v, err = s.decideOnLedger(ctx, r, began); err == nil || ctx.Err() != nil || !fails(err) {
		return v, err
	}
	if !asked { // and perhaps it is well again
		if v, cause = s.decideOnPrimary(ctx, &r, time.Now(), 0); !fails(cause) {
			v.Degrade()
			return v, cause
		}
	}
	if s.local != nil {
		if v, err := s.decideLocally(ctx, r); err == nil {
			return v, nil
		}
	}
	return v, unavailable(cause, err)
}

// decideOnPrimary asks Redis. Where Redis is doubted and would admit, it is first raised to what the ledger has. That may
// last until read after the call began; what is not done by then is done afterwards.
func (s *Storage) decideOnPrimary(ctx context.Context, r *storage.Request, began time.Time, read time.Duration) (v storage.Verdict, err error) {
	if err := s.isolated(); err != nil {
		return v, err
	}
	since := s.doubt(r)
	v, err = s.primary.DecideFresh(ctx, *r, since)
	if errors.Is(err, redis.ErrRestarted) && !r.Clocked {
		since = storage.Monotonic()
		s.doubted.Store(since)
	}
	if errors.Is(err, redis.ErrStale) {
		if since == 0 {
			read = 0
		}
		v, err = s.decideAnyway(ctx, *r, began.Add(read), since != 0)
	}
	if err == nil && v.Taken() {
		s.journal.took(r, &v)
	}
	return v, err
}

func (s *Storage) decideAnyway(ctx context.Context, r storage.Request, read time.Time, doubted bool) (v storage.Verdict, err error) {
	var late []*storage.Part
	if doubted {
		if late, err = s.readThrough(ctx, &r, read); err != nil {
			return v, err
		}
	}
	err = s.onPrimary(ctx, read, func(ctx context.Context) error {
		v, err = s.primary.Decide(ctx, r)
		return err
	})
	if err == nil {
		s.touch(&r, late)
	}
	return v, err
}

// decideOnLedger asks Postgres, after it was charged what this process owes it for the identifiers.
func (s *Storage) decideOnLedger(ctx context.Context, r storage.Request, began time.Time) (v storage.Verdict, err error) {
	err = s.onLedger(ctx, began, func(ctx context.Context) error {
		for i := range r.Parts() {
			if err := s.settle(ctx, key{r.Name, r.At(i).Identifier}); err != nil {
				return err
			}
		}
		v, err = s.ledger.Decide(ctx, r)
		return err
	})
	if err != nil {
		return storage.Verdict{}, err
	}
	v.Degrade()
	if v.Taken() && s.breaker.cause() == nil {
		for i := range r.Parts() { // others ask Redis
			s.journal.touch(r.Name, r.At(i), r.Clocked, r.Now)
		}
	}
	return v, nil
}

// onPrimary calls f with a context that ends PrimaryTimeout after a time: when the call began, or when its read of the
// ledger had to be done.
func (s *Storage) onPrimary(ctx context.Context, after time.Time, f func(context.Context) error) error {
	return within(ctx, after.Add(s.options.PrimaryTimeout), "Redis", f)
}

// onLedger calls f with a context that ends after LedgerTimeout, and at the latest both timeouts after the call began.
func (s *Storage) onLedger(ctx context.Context, began time.Time, f func(context.Context) error) error {
	left := s.options.PrimaryTimeout - time.Since(began)
	return within(ctx, time.Now().Add(s.options.LedgerTimeout+min(0, left)), "Postgres", f)
}

// within calls f with a context that ends at a deadline, and returns the caller's error if the caller's has ended.
func within(ctx context.Context, deadline time.Time, who string, f func(context.Context) error) error {
	given := time.Until(deadline)
	limited, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	err := f(limited)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case limited.Err() != nil && !fails(err):
		return fmt.Errorf("%w: no answer from %s within %v", storage.ErrUnavailable, who, max(0, given).Round(time.Millisecond))
	}
	return err
}

// decideLocally is for when neither store can decide.
func (s *Storage) decideLocally(ctx context.Context, r storage.Request) (v storage.Verdict, err error) {
	own := r
	if own.Part, err = s.share(&r.Part); err != nil {
		return v, err
	}
	own.More = nil
	for i := range r.More {
		p, err := s.share(&r.More[i])
		if err != nil {
			return v, err
		}
		own.More = append(own.More, p)
	}
	v, err = s.local.Decide(ctx, own)
	v.Degrade()
	return v, err
}

// share is a part with this process's share of the capacities.
func (s *Storage) share(p *storage.Part) (storage.Part, error) {
	rules := make([]storage.Rule, len(p.Rules))
	for i := range p.Rules {
		r, faults := &p.Rules[i], []error(nil)
		capacity, period := max(1, int64(float64(r.Capacity)*s.options.Local.Share)), r.Period
		if r.Kind == storage.Continuous { // the refill has to remain a whole number
			period = rounded(int64(float64(r.Period) / s.options.Local.Share))
		}
		if rules[i], faults = storage.NewRule(r.Name, r.Kind, micros(period), capacity, r.Refill); len(faults) > 0 {
			return storage.Part{}, errors.Join(faults...)
		}
	}
	out := storage.NewPart(p.Identifier, rules, 0)
	for i := range rules {
		out.SetCost(i, p.Cost(i))
	}
	return out, nil
}

// rounded is n, rounded up to four digits: a large bucket needs a period of many divisors.
func rounded(n int64) int64 {
	step := int64(1)
	for n/step >= 10_000 {
		step *= 10
	}
	return (n + step - 1) / step * step
}

// Charge implements storage.Storage.
func (s *Storage) Charge(ctx context.Context, c storage.Charge) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.leave()
	if err := c.Validate(); err != nil {
		return err
	}
	began, cause := time.Now(), s.breaker.cause()
	asked := cause == nil
	if asked {
		if cause = s.chargePrimary(ctx, &c, began, s.options.LedgerTimeout/2); !fails(cause) {
			return cause
		}
	}
	err := s.chargeLedger(ctx, &c, began)
	if err == nil || ctx.Err() != nil || !fails(err) {
		return err
	}
	if !asked {
		if cause = s.chargePrimary(ctx, &c, time.Now(), 0); !fails(cause) {
			return cause
		}
	}
	return unavailable(cause, err)
}

func (s *Storage) chargeLedger(ctx context.Context, c *storage.Charge, began time.Time) error {
	err := s.onLedger(ctx, began, func(ctx context.Context) error {
		if err := s.settle(ctx, key{c.Name, c.Identifier}); err != nil {
			return err
		}
		return s.ledger.Charge(ctx, *c)
	})
	if err == nil && takes(c) && s.breaker.cause() == nil {
		p := storage.NewPart(c.Identifier, c.Rules, 0)
		s.journal.touch(c.Name, &p, c.Clocked, c.Now)
	}
	return err
}

func takes(c *storage.Charge) bool {
	return slices.ContainsFunc(c.Amounts, func(a storage.Amount) bool { return a.N > 0 })
}

func gives(c *storage.Charge) bool {
	return slices.ContainsFunc(c.Amounts, func(a storage.Amount) bool { return a.N < 0 })
}

func (s *Storage) chargePrimary(ctx context.Context, c *storage.Charge, began time.Time, read time.Duration) error {
	var late []*storage.Part
	r := storage.Request{Name: c.Name, Clocked: c.Clocked, Now: c.Now, Part: storage.NewPart(c.Identifier, c.Rules, 0)}
	if takes(c) && s.doubt(&r) != 0 { // afterwards the state is young
		var err error
		began = began.Add(read)
		if late, err = s.readThrough(ctx, &r, began); err != nil {
			return err
		}
	}
	return s.onPrimary(ctx, began, func(ctx context.Context) error {
		if gives(c) {
			waited, cancel := context.WithTimeout(ctx, s.options.PrimaryTimeout)
			err := s.journal.giveBack(waited, key{c.Name, c.Identifier})
			cancel()
			if err != nil {
				return err
			}
			defer s.journal.gaveBack(key{c.Name, c.Identifier})
		}
		err := s.primary.Charge(ctx, *c)
		if err == nil {
			s.journal.charged(c)
			s.touch(&r, late)
		}
		return err
	})
}

func (s *Storage) resetPrimary(ctx context.Context, id key) error {
	return s.onPrimary(ctx, time.Now(), func(ctx context.Context) error {
		err := s.journal.giveBack(ctx, id)
		s.journal.reset(id)
		if err != nil {
			return err
		}
		defer s.journal.gaveBack(id)
		if cause := s.breaker.cause(); cause != nil {
			return cause
		}
		return s.primary.Reset(ctx, id.name, id.identifier)
	})
}

// Reset implements storage.Storage. A store that cannot be reached is reset once it can, unless this process ends
// before. It is an error if neither can.
func (s *Storage) Reset(ctx context.Context, name, identifier string) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.leave()
	if err := storage.ValidateIdentifier(identifier); err != nil {
		return err
	}
	id := key{name, identifier}
	cause := s.resetPrimary(ctx, id)
	if errors.Is(cause, storage.ErrUnavailable) {
		s.journal.resetPrimaryLater(id)
	}
	err := s.onLedger(ctx, time.Now(), func(ctx context.Context) error { return s.settle(ctx, id) })
	switch {
	case ctx.Err() != nil && err != nil:
		return ctx.Err()
	case cause != nil && err != nil:
		return unavailable(cause, err)
	case errors.Is(cause, storage.ErrCorruptState):
		return cause
	}
	return nil
}

// Close refuses further calls with ErrClosed, waits for those in progress, and charges the ledger with what is
// pending. It ends with the context, or after a second, and returns an error if something was left. Called again, it
// waits for the first call, and returns the same.
func (s *Storage) Close(ctx context.Context) error {
	if s.closed.Swap(true) {
		select {
		case <-s.ended:
			return s.left
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	if s.calls.Load() == 0 {
		s.noCalls()
	}
	select {
	case <-s.idle:
	case <-ctx.Done():
	}
	s.left = s.end(ctx)
	close(s.ended)
	return s.left
}

// fails tells of an error after which the other store is asked.
func fails(err error) bool {
	return errors.Is(err, storage.ErrUnavailable) || errors.Is(err, storage.ErrCorruptState)
}

func unavailable(primary, ledger error) error {
	return fmt.Errorf("%w: neither Redis (%w) nor Postgres (%w)", storage.ErrUnavailable, primary, ledger)
}

func (s *Storage) enter(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.calls.Add(1)
	if s.closed.Load() {
		s.leave()
		return storage.ErrClosed
	}
	return nil
}

func (s *Storage) leave() {
	if s.calls.Add(-1) == 0 && s.closed.Load() {
		s.noCalls()
	}
}

func (s *Storage) noCalls() {
	select {
	case s.idle <- struct{}{}:
	default:
	}
}
