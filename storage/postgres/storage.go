// Package postgres keeps consumption in PostgreSQL 14 or newer, where any number of processes share it.
//
// A decision is one call of a function: one round trip, atomic, by the clock of the server unless one is
// injected. Concurrent decisions of one process share calls, and none waits for company. Each
// identifier is one row. A refusal locks nothing and writes nothing.
//
//	pool, err := pgxpool.New(ctx, "postgres://localhost/app")
//	store, err := pgstore.New(ctx, pool, nil)
//	t, err := throttler.New(throttler.Config{Storage: store})
//
// Import it as pgstore.
package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/go-throttler/throttler/internal/combine"
	"github.com/go-throttler/throttler/storage"
)

// Source is what Verdict.Source says of this storage's answers.
const Source = "postgres"

// Defaults of Options. A commit waits for the disk, and a busy one takes tens of milliseconds.
const (
	DefaultName    = "throttler"
	DefaultTimeout = 500 * time.Millisecond
)

// Options of a Storage. The zero value and nil are the defaults.
type Options struct {
	// Schema is where the table and the functions are, by default the first of the role's search_path. It
	// is not created.
	Schema string

	// Name is what the names of the table and of the functions begin with, by default DefaultName. It has at most 40 bytes.
	Name string

	// Timeout is the longest that a call takes, whatever its context allows; by default DefaultTimeout. At
	// least 10 ms. The server gives up waiting for a lock, or working, shortly before.
	Timeout time.Duration

	// SynchronousCommit is that setting of Postgres for the transactions of this storage: "on", "off", "local",
	// "remote_write" or "remote_apply". Empty leaves what the server has. With "off" a crash of the server
	// forgets what was admitted in up to about the last 600 ms, and admits it again.
	SynchronousCommit string

	// Unlogged makes the table an unlogged one when it is created. That writes less, and a crash of the
	// server, or of a single backend, forgets everything. A standby does not have it.
	Unlogged bool

	// NoSchema says that somebody else has executed Schema: New then creates and upgrades nothing.
	NoSchema bool
}

// OptionError is a fault in what New was given.
type OptionError struct {
	Field  string // Pool or a field of Options
	Reason string // what was given and what is allowed
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("throttler: postgres: %s %s", e.Field, e.Reason)
}

// Storage is safe for concurrent use. It is made by New.
//
// A call is sent once, and again only after an error which says that it was rolled back (a deadlock or a
// serialization failure), at most twice. When the answer is lost it may have been executed, once.
//
// A call that Postgres does not answer in time, or answers with an error, wraps ErrUnavailable and the
// cause, a *pgconn.PgError if the server said it.
type Storage struct {
	pool    *pgxpool.Pool
	options Options
	names   names

	// Flights of one kind have one statement, which locks rows in their order. The requests of one identifier are
	// always in the same lane, which has one flight at a time: two would wait for each other's row.
	lanes   [2]*combine.Queue[query, answer]
	seed    maphash.Seed
	joint   *combine.Queue[query, answer] // a request of several
	changes *combine.Queue[query, answer]

	sweeps sweeps
}

var _ storage.Replica = (*Storage)(nil)

// New returns a storage on a pool, which the caller closes after it. It creates the table and the
// functions, or upgrades them, unless NoSchema says otherwise; any number of processes may do so at once,
// and when nothing is to be done no right to create is needed.
//
// The pool may have any size, and PgBouncer in front of it. In its transaction mode the connections need
// default_query_exec_mode=exec, as with every use of pgx.
func New(ctx context.Context, pool *pgxpool.Pool, o *Options) (*Storage, error) {
	s := &Storage{pool: pool}
	if o != nil {
		s.options = *o
	}
	s.options.Name = cmp.Or(s.options.Name, DefaultName)
	s.options.Timeout = cmp.Or(s.options.Timeout, DefaultTimeout)
	if err := s.options.validate(pool); err != nil {
		return nil, err
	}
	s.names = namesOf(&s.options)
	if !s.options.NoSchema {
		if err := s.install(ctx); err != nil {
			return nil, err
		}
	}
	timeout := s.options.Timeout
	s.seed = maphash.MakeSeed()
	for i := range s.lanes {
		s.lanes[i] = combine.New(combine.Options{Flights: 1, Timeout: timeout}, s.decide)
	}
	s.joint = combine.New(combine.Options{Timeout: timeout, Size: 1}, s.decideAll)
	s.changes = combine.New(combine.Options{Timeout: timeout}, s.change)
	return s, nil
}

func (o *Options) validate(pool *pgxpool.Pool) error {
	var faults []error
	fault := func(field, format string, args ...any) {
		faults = append(faults, &OptionError{field, fmt.Sprintf(format, args...)})
	}
	if pool == nil {
		fault("Pool", "is nil")
	}
	if len(o.Name) > 40 {
		fault("Name", "has %d bytes, must have at most 40", len(o.Name))
	}
	if o.Timeout < 10*time.Millisecond {
		fault("Timeout", "is %v, must be at least 10ms, or 0 for %v", o.Timeout, DefaultTimeout)
	}
	switch o.SynchronousCommit {
	case "", "on", "off", "local", "remote_write", "remote_apply":
	default:
		fault("SynchronousCommit", "is %q, must be on, off, local, remote_write, remote_apply or empty", o.SynchronousCommit)
	}
	return errors.Join(faults...)
}

// Close refuses further calls with ErrClosed, and waits until those that were sent are answered or
// Options.Timeout has passed. It does not close the pool.
func (s *Storage) Close() error {
	var wait sync.WaitGroup
	for _, lane := range s.lanes {
		wait.Go(lane.Close)
	}
	wait.Go(s.joint.Close)
	wait.Go(s.changes.Close)
	wait.Go(s.sweeps.close)
	wait.Wait()
	return nil
}

// Decide implements storage.Storage.
func (s *Storage) Decide(ctx context.Context, r storage.Request) (v storage.Verdict, err error) {
	if err := ctx.Err(); err != nil {
		return v, err
	}
	if err := r.Validate(); err != nil {
		return v, err
	}
	id := rowID(r.Name, r.Part.Identifier)
	queue := s.lanes[maphash.Bytes(s.seed, id)%uint64(len(s.lanes))]
	if len(r.More) > 0 {
		queue = s.joint
	}
	c := queue.Get()
	defer queue.Put(c)
	c.Query = query{id: id, request: r}
	if err := s.ask(ctx, queue, c); err != nil {
		return v, err
	}
	at := c.Answer.at
	if r.Clocked {
		at = r.Now
	}
	v.Begin(&c.Query.request, Source, at)
	c.Answer.fill(&v)
	return v, nil
}

// Charge implements storage.Storage.
func (s *Storage) Charge(ctx context.Context, c storage.Charge) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := c.Validate(); err != nil {
		return err
	}
	d := change{what: whatCharge, sent: sent(c.Clocked, c.Now), rules: c.Rules}
	for i := range c.Amounts {
		d.amounts = append(d.amounts, c.Amounts[i:i+1])
	}
	return s.apply(ctx, c.Name, c.Identifier, &d)
}

// Raise implements storage.Replica.
func (s *Storage) Raise(ctx context.Context, d storage.Debt) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := d.Validate(); err != nil {
		return err
	}
	return s.apply(ctx, d.Name, d.Identifier, &change{what: whatRaise, sent: sent(d.Clocked, d.Now), rules: d.Rules, amounts: d.Amounts})
}

// Reset implements storage.Storage.
func (s *Storage) Reset(ctx context.Context, name, identifier string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := storage.ValidateIdentifier(identifier); err != nil {
		return err
	}
	return s.apply(ctx, name, identifier, &change{what: whatReset, sent: -1})
}

func (s *Storage) apply(ctx context.Context, name, identifier string, d *change) error {
	c := s.changes.Get()
	defer s.changes.Put(c)
	c.Query = query{id: rowID(name, identifier), change: d}
	return s.ask(ctx, s.changes, c)
}

func (s *Storage) ask(ctx context.Context, queue *combine.Queue[query, answer], c *call) error {
	err := queue.Do(ctx, c)
	if errors.Is(err, combine.ErrTimeout) {
		return s.unavailable(err)
	}
	return err
}

// rowID is the key of a row. Names have no colon.
func rowID(name, identifier string) []byte { return []byte(name + ":" + identifier) }

// sent is the time that a call brings along, or -1.
func sent(clocked bool, now int64) int64 {
	if clocked {
		return now
	}
	return -1
}
