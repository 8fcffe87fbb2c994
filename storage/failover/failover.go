// Package failover lets Redis decide, and Postgres when Redis cannot. Postgres knows what Redis admitted up to
// about 0.1 s ago, so limits carry over an outage and back; docs/failover.md has the exact bound.
//
// Postgres is the ledger: every 100 ms each process charges it with what Redis admitted. When Redis fails, a
// call first charges what this process has not told the ledger yet of its identifier, and is then decided there.
// Once Redis is well again, it is raised to what the ledger has recorded before it admits.
//
//	store, err := failover.New(redisstore.New(client, nil), pgstore, nil)
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
)

const defaultMaxPending = 65536

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
	// Postgres is away, above 0; 0 is 65,536. What is admitted of others is not charged.
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

	calls    atomic.Int64  // that are in progress
	closed   atomic.Bool   // no further ones are
	idle     chan struct{} // receives one when closed and none is in progress
	closing  chan struct{} // closed when the goroutines are to end
	stop     func()        // ends what they wait for
	ended    chan struct{} // closed when Close is done
	closeErr error         // what it returned
	running  sync.WaitGroup
	observe  sync.Mutex
	jitter   func(time.Duration) time.Duration // from 0 to that
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
	s.options.MaxPending = cmp.Or(s.options.MaxPending, defaultMaxPending)
	if err := s.options.validate(); err != nil {
		return nil, err
	}
	if s.options.Local != nil {
		s.local = runtime.New(nil)
	}
	s.journal = newJournal(s.options.MaxPending)
	s.flusher = flusher{origin: rand.Text(), seq: 1}
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	s.breaker.opened = func() { s.running.Go(func() { s.probeLoop(ctx) }) }
	if err := primary.Watch(s.options.PrimaryTimeout, s.report); err != nil {
		stop()
		return nil, err
	}
	s.running.Go(func() { s.flushLoop(ctx) })
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
		fault("MaxPending", "is %d, must be above 0, or 0 for %d", o.MaxPending, defaultMaxPending)
	}
	if o.Local != nil && !(o.Local.Share > 0 && o.Local.Share <= 1) {
		fault("Local.Share", "is %v, must be above 0 and at most 1", o.Local.Share)
	}
	return errors.Join(faults...)
}

// Close refuses further calls with ErrClosed, waits for those in progress, and charges the ledger with what is
// pending. It ends with the context, or after a second, and returns an error if something was left. Called again, it
// waits for the first call, and returns the same.
func (s *Storage) Close(ctx context.Context) error {
	if s.closed.Swap(true) {
		select {
		case <-s.ended:
			return s.closeErr
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
	s.closeErr = s.end(ctx)
	close(s.ended)
	return s.closeErr
}

// end ends the goroutines and tells the ledger what is left. It does not wait for a store that goes on after the context
// has ended.
func (s *Storage) end(ctx context.Context) error {
	defer s.stop()
	s.breaker.end()
	close(s.closing)
	told := make(chan error, 1)
	go func() {
		s.running.Wait()
		told <- s.flushRest(ctx)
	}()
	select {
	case err := <-told:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// flushRest tells the ledger all that is left, as long as it takes it. The goroutines have ended.
func (s *Storage) flushRest(ctx context.Context) error {
	for {
		_, pending, _ := s.journal.due()
		if pending == 0 && len(s.flusher.batch) == 0 {
			return nil
		}
		if s.flush(ctx); s.flusher.failure != nil {
			return s.flusher.failure
		}
	}
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
