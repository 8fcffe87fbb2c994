// Package failover lets Redis decide, and Postgres when Redis cannot. Postgres knows what Redis admitted up to
// about 0.1 s ago, so limits carry over into an outage and back; docs/failover.md has the exact bound.
//
//	store, err := failover.New(redis, postgres, nil)
//	t, err := throttler.New(throttler.Config{Storage: store})
//	defer store.Close(ctx)
//
// The words of the package:
//
// The ledger is Postgres. It records every admission and forgets none, so it alone knows what an identifier has
// spent in both stores together.
//
// The primary, or replica, is Redis. It is the primary because it decides while it is well, and a replica because
// what it holds may be lost at any time and is brought up to the ledger again.
//
// Pending is what Redis has admitted and the ledger has not recorded yet. It is in the memory of this process, in the
// journal, for about one flush interval.
//
// A debt is what an identifier has spent and not got back: amounts of tokens, each with the time until it is back.
// Debts cross between the stores as durations and never as points in time, so the clocks of the servers may differ.
//
// To raise Redis is to increase what it counts as spent to at least the debt of the ledger. Raising twice is raising
// once, and a raise lowers nothing.
//
// Redis is doubted while it may lack spending that the ledger knows of: after an outage, or when it has restarted. A
// doubted Redis is raised before it admits.
//
// The protocol is ten rules, which docs/failover.md states under the same numbers and names:
//
//	 1  Redis decides                                 decide.go
//	 2  the ledger is charged, and once               flush.go
//	 3  Redis is raised to the ledger                 flush.go
//	 4  Postgres decides a call that Redis fails      decide.go
//	 5  a denial by Redis is final                    decide.go
//	 6  the breaker                                   breaker.go
//	 7  a doubted Redis is raised before it admits    doubt.go
//	 8  charges, refunds and resets reach both        charge.go
//	 9  neither store answers                         decide.go
//	10  Close writes what is pending                  failover.go
//
// Each function that keeps a part of rule 3 says Rule 3 in its comment. The states of what is pending and the order of
// the locks are described once, at the journal (journal.go). How amounts are merged and counted is in amount.go, what
// operators see in observe.go, and what a log says in log.go.
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

	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/postgres"
	"github.com/go-throttler/throttler/storage/redis"
	"github.com/go-throttler/throttler/storage/runtime"
)

// Defaults of Options. A Redis that takes 50 ms is not well. Postgres gets more time, as a commit waits for its disk.
const (
	DefaultPrimaryTimeout = 50 * time.Millisecond
	DefaultLedgerTimeout  = 200 * time.Millisecond
	DefaultFlushInterval  = 100 * time.Millisecond
)

const (
	defaultMaxPending = 65536
	closeTimeout      = time.Second // the longest that Close takes
)

// Options of a Storage. The zero value and nil stand for the defaults.
type Options struct {
	// PrimaryTimeout and LedgerTimeout are the longest that a call waits for Redis, and after it for Postgres. They
	// are at least 1 ms; zero means DefaultPrimaryTimeout and DefaultLedgerTimeout. A shorter Timeout in the options
	// of the two storages remains in force.
	PrimaryTimeout, LedgerTimeout time.Duration

	// FlushInterval is how long an admission by Redis waits until Postgres records it, from 1 ms to 1 min; zero means
	// DefaultFlushInterval. A longer interval costs Postgres less and allows more over-admission.
	FlushInterval time.Duration

	// MaxPending bounds how many identifiers may have admissions that Postgres has not recorded yet. Beyond it,
	// further identifiers are admitted but never recorded. Zero means 65,536.
	MaxPending int

	// MaxIsolation bounds how long Redis decides while Postgres cannot be charged. After that time Redis decides no
	// more, and calls fail with ErrUnavailable until Postgres answers. It limits the over-admission where some
	// processes reach only Redis and others only Postgres. Zero means no bound.
	MaxIsolation time.Duration

	// Local decides in this process while neither store can. If nil, such calls fail with ErrUnavailable.
	Local *LocalOptions

	// Observe, if not nil, is called with each Event, by one goroutine at a time. It should be quick: flushes, and the
	// calls that find Redis lost, wait for it. It may call State.
	Observe func(Event)
}

// LocalOptions say how a process decides by itself while neither store can. Do not refund a verdict whose Source is
// "runtime": what it took is in neither store, so once a store is back the refund would free tokens of other calls.
type LocalOptions struct {
	// Share is this process's part of each bucket's capacity and refill, above 0 and at most 1. Set to 1/n for n
	// processes it keeps the limit. The buckets begin full. Each hands out at least one token, however small its
	// share, so n processes may admit n tokens of a bucket that holds fewer. A bucket of capacity 0 hands out none.
	Share float64
}

// OptionError is a fault in an argument of New.
type OptionError struct {
	Field  string // Primary, Ledger or a field of Options, such as Local.Share
	Reason string // what was given and what is allowed
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("throttler: failover: %s %s", e.Field, e.Reason)
}

// primary is a *redis.Storage, except in the tests, which simulate it.
type primary interface {
	replica.Storage
	DecideFresh(ctx context.Context, r *storage.Request, a *storage.Answer, since int64) error
	Watch(timeout time.Duration, report func(error)) error
}

// ledger is a *postgres.Storage, except in the tests, which simulate it.
type ledger interface {
	replica.Storage
	Record(ctx context.Context, origin string, seq int64, batch []storage.Charge) ([]replica.Debt, error)
}

// Storage decides by Redis, and by Postgres when Redis fails. New makes it; it is safe for concurrent use.
//
// A call takes at most the two timeouts, 50 ms for Redis and 200 ms for Postgres, plus the time the machine needs to
// run it; the tests on real servers require 99 % of calls to end within 260 ms. A call that Redis answers is one round
// trip, except where Redis is doubted. Callers see no error of one store as long as the other answers. If neither
// answers, the error wraps ErrUnavailable and both causes.
type Storage struct {
	primary primary
	ledger  ledger
	options Options
	local   *runtime.Storage

	breaker breaker
	journal journal
	flusher flusher
	// Rule 7. State that Redis changed last at the time doubted, or before, may lack spending. Both are times of
	// law.Monotonic, zero for never. The end of an outage sets both; the restart of a server sets doubted only.
	doubted, outage atomic.Int64

	// Rule 10. A call first counts itself in calls and then looks at closed; Close first sets closed and then looks at
	// calls. So each call either sees closed and returns ErrClosed, or is seen by Close, which waits for it.
	calls    atomic.Int64  // calls in progress
	closed   atomic.Bool   // further calls get ErrClosed
	idle     chan struct{} // has room for one token, which says that closed is set and no call is in progress
	closing  chan struct{} // closed to end the goroutines
	stop     func()        // cancels what the goroutines wait for
	running  sync.WaitGroup
	ended    chan struct{} // closed when the first Close is done
	closeErr error         // the result of the first Close; may be read once ended is closed

	observe sync.Mutex                        // one call of Observe at a time
	jitter  func(time.Duration) time.Duration // random, from 0 to its argument
}

// New returns a storage that decides by Redis, and by Postgres when Redis fails. The primary must not have been used
// before, and nothing else may use it: New lowers its timeout and watches its round trips. The storage does not close
// the two stores; their owner closes them after the storage.
//
// Each fault is an *OptionError and all faults are joined, but if a store is nil the options are not checked. If the
// primary was used before or is closed the error wraps that of package redis, an *OptionError of its own or ErrClosed.
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

// open is New for any stores.
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
	s.flusher = flusher{origin: rand.Text(), seq: 1} // Rule 2: a new process is a new origin, so its numbers may begin at 1
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	s.breaker.opened = func() { s.running.Go(func() { s.probeLoop(ctx) }) }
	if err := primary.Watch(s.options.PrimaryTimeout, s.report); err != nil { // Rules 1 and 6
		stop()
		return nil, fmt.Errorf("throttler: failover: the primary must be open, and used by nothing else, before and after: %w", err)
	}
	s.running.Go(func() { s.flushLoop(ctx) })
	return s, nil
}

// validate returns all faults of the options, joined. The defaults are filled in already.
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

// Close keeps Rule 10, Close writes what is pending: further calls get ErrClosed, Close waits for those in progress,
// and then charges the ledger with what is pending. It takes at most a second, and no longer than its context allows.
// An error says that something may not have been written. A second Close waits for the first and returns the same
// error, or the error of its own context if that ends before.
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
	if s.calls.Load() == 0 { // otherwise the last call to leave says so
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

// end ends the goroutines and writes what is left. The order matters: the breaker must not start another goroutine once
// running.Wait has begun. If the context ends first, end returns although a store may still be answering. The goroutine
// that waits for that answer is left behind; it ends soon, because stop cancels its call.
func (s *Storage) end(ctx context.Context) error {
	defer s.stop()
	s.breaker.end()
	close(s.closing)
	written := make(chan error, 1)
	go func() {
		s.running.Wait()
		written <- s.flushRest(ctx)
	}()
	select {
	case err := <-written:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// flushRest writes batch after batch until nothing is left or one fails (Rule 10). The goroutine of flushLoop has
// ended, so the flusher belongs to this one now.
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

// enter begins a call, unless its context has ended or the storage is closed (Rule 10). If it returns nil the caller
// must call leave.
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

// leave ends a call. After Close has begun, the last call lets it go on.
func (s *Storage) leave() {
	if s.calls.Add(-1) == 0 && s.closed.Load() {
		s.noCalls()
	}
}

// noCalls tells Close that no call is in progress. The last call and Close itself may both say so, and a call that was
// refused too, so a second token is dropped.
func (s *Storage) noCalls() {
	select {
	case s.idle <- struct{}{}:
	default:
	}
}
