// Package postgres keeps consumption in PostgreSQL 14 or newer, where any number of processes share it.
//
// Each identifier is one row. A decision reads it and, if it admits, writes it on the condition that nobody else has written
// it in between; if somebody has, it begins again under a lock. So a denial is one round trip, locks nothing and writes
// nothing. An admission is two, or one if this process was the last to write the row, a moment ago. Concurrent decisions of a
// process share round trips, and none waits for company. The clock is the server's unless one is injected.
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
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	combine "github.com/go-throttler/throttler/internal/batch"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/storage"
)

// Source is what Verdict.Source says of this storage's answers.
const Source = "postgres"

// Defaults of Options. A commit waits for the disk, and a busy one takes tens of milliseconds.
const (
	DefaultTablePrefix = "throttler"
	DefaultTimeout     = 500 * time.Millisecond
)

// Options of a Storage. The zero value and nil are the defaults.
type Options struct {
	// Schema is where the table is. By default it is where New finds one, or makes it, by the search_path of the
	// role. The schema is not created.
	Schema string

	// TablePrefix begins the name of the table, by default DefaultTablePrefix, which makes it throttler_state. It has at
	// most 40 bytes.
	TablePrefix string

	// Timeout is the longest that a call takes, whatever its context allows; by default DefaultTimeout. At
	// least 10 ms. The server gives up when nine tenths have passed, waiting for a lock a little earlier.
	Timeout time.Duration

	// SynchronousCommit is that setting of Postgres for the transactions of this storage: "on", "off", "local",
	// "remote_write" or "remote_apply". Empty leaves what the server has. With "off" a crash of the server
	// forgets what was admitted in up to about the last 600 ms, and admits it again.
	SynchronousCommit string

	// Unlogged makes the table an unlogged one when it is created. That writes less, and a crash of the
	// server, or of a single backend, forgets everything. A standby does not have it.
	Unlogged bool

	// NoSchema says that somebody else has executed Schema: New then creates nothing.
	NoSchema bool
}

// OptionError is a fault in what New was given.
type OptionError struct {
	Field  string // Pool or a field of Options
	Reason string // what was given and what is allowed

	cause error
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("throttler: postgres: %s %s", e.Field, e.Reason)
}

// Unwrap returns ErrCorruptState if another table has the name that TablePrefix leads to, else nil.
func (e *OptionError) Unwrap() error { return e.cause }

// Storage is safe for concurrent use. It is made by New.
//
// What was sent is sent again only if it changed nothing: when somebody else has written or locks the row, and
// after an error which says that it was rolled back. When the answer is lost it may have been executed, once.
//
// A call that Postgres does not answer in time, or answers with an error, wraps ErrUnavailable and the
// cause, a *pgconn.PgError if the server said it.
type Storage struct {
	pool    *pgxpool.Pool
	options Options
	sql     statements
	seed    maphash.Seed

	mode      pgx.QueryExecMode // of the pool
	forgetful atomic.Bool       // a pooler is, of the names of statements
	blockless atomic.Bool       // a pooler lets nobody begin a transaction

	partitions [2]*partition                    // of calls of one identifier
	locked     [8]*combine.Queue[query, answer] // of contended calls, also by identifier
	several    *combine.Queue[query, answer]    // of calls of several identifiers, each on its own
	ledger     *combine.Queue[*record, []replica.Debt]

	closed    atomic.Bool // by Close, which need not wait for the queues to know it
	fresh     atomic.Bool // the last Record had to make rows
	contended marks       // rows that are locked from the beginning
	shared    marks       // rows that others write too
	sweeps    sweeps
}

var _ replica.Storage = (*Storage)(nil)

// New returns a storage on a pool, which the caller closes after it. It creates the table if
// it is not there, unless NoSchema says otherwise; any number of processes may do so at once, and when nothing is
// to be done no right to create is needed. What has the table's name and is none of this package's is an
// OptionError that wraps ErrCorruptState, and left alone.
//
// The pool may have any size and any default_query_exec_mode, and PgBouncer in front of it, which pools sessions or
// transactions.
func New(ctx context.Context, pool *pgxpool.Pool, o *Options) (*Storage, error) {
	s := &Storage{pool: pool}
	if o != nil {
		s.options = *o
	}
	s.options.TablePrefix = cmp.Or(s.options.TablePrefix, DefaultTablePrefix)
	s.options.Timeout = cmp.Or(s.options.Timeout, DefaultTimeout)
	if err := s.options.validate(pool); err != nil {
		return nil, err
	}
	s.mode = pool.Config().ConnConfig.DefaultQueryExecMode
	if !s.options.NoSchema {
		if err := s.install(ctx); err != nil {
			return nil, err
		}
	}
	s.sql = statementsOf(&s.options)
	timeout := s.options.Timeout
	s.seed, s.contended.seed, s.shared.seed = maphash.MakeSeed(), maphash.MakeSeed(), maphash.MakeSeed()
	for i := range s.partitions {
		s.partitions[i] = newPartition(s)
	}
	for i := range s.locked {
		s.locked[i] = combine.New(combine.Options{Timeout: timeout}, s.runContended)
	}
	s.several = combine.New(combine.Options{InFlight: 4, Timeout: timeout, Size: 1}, s.runSeveral)
	s.fresh.Store(true)
	s.sweeps.weight.Store(fullWeight)
	s.ledger = combine.New(combine.Options{InFlight: 4, Timeout: timeout, Size: 1}, s.runRecord)
	return s, nil
}

func (o *Options) validate(pool *pgxpool.Pool) error {
	var faults []error
	fault := func(field, format string, args ...any) {
		faults = append(faults, &OptionError{Field: field, Reason: fmt.Sprintf(format, args...)})
	}
	if pool == nil {
		fault("Pool", "is nil")
	}
	if len(o.TablePrefix) > 40 {
		fault("TablePrefix", "has %d bytes, must have at most 40", len(o.TablePrefix))
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

// Close refuses further calls with ErrClosed, and waits for those in flight: until Options.Timeout has passed, or until
// the context ends, whose error it returns then. It may be called again. It does not close the pool.
func (s *Storage) Close(ctx context.Context) error {
	s.closed.Store(true)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.closeAll()
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Storage) closeAll() {
	var wait sync.WaitGroup
	for _, p := range s.partitions {
		wait.Go(func() { _ = p.Close(context.Background()) })
	}
	for _, queue := range s.locked {
		wait.Go(func() { _ = queue.Close(context.Background()) })
	}
	wait.Go(func() { _ = s.several.Close(context.Background()) })
	wait.Go(func() { _ = s.ledger.Close(context.Background()) })
	wait.Go(s.sweeps.close)
	wait.Wait()
}

// Decide implements storage.Storage.
func (s *Storage) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	q := query{request: *r}
	for _, p := range r.Parts {
		q.ids = append(q.ids, rowID(r.Name, p.Identifier))
	}
	got, err := s.ask(ctx, &q)
	if err != nil {
		return err
	}
	a.Allowed, a.Source, a.Degraded, a.At = got.allowed, Source, false, got.at
	a.Tokens = got.tokens
	copy(a.Counts, got.counts)
	return nil
}

// Charge implements storage.Storage.
func (s *Storage) Charge(ctx context.Context, c *storage.Charge) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	amounts := slices.Clone(c.Amounts)
	for i, a := range amounts {
		amounts[i] = a.Clamp()
	}
	return s.change(ctx, c.Name, c.Identifier, &change{clocked: c.Clocked, now: c.Now, rules: c.Rules, charge: amounts})
}

// Debt implements replica.Storage.
func (s *Storage) Debt(ctx context.Context, d replica.Debt) (replica.Debt, error) {
	if err := ctx.Err(); err != nil {
		return replica.Debt{}, err
	}
	q := query{ids: [][]byte{rowID(d.Name, d.Identifier)}, debt: true}
	q.request = storage.Request{Name: d.Name, Mode: storage.Peek, Clocked: d.Clocked, Now: d.Now, Parts: []storage.Part{{Rules: d.Rules}}, Costs: make([]int64, len(d.Rules.Rules))}
	a, err := s.ask(ctx, &q)
	if err != nil {
		return replica.Debt{}, err
	}
	d.Amounts = a.debt
	return d, nil
}

// Raise implements replica.Storage.
func (s *Storage) Raise(ctx context.Context, d replica.Debt) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	debts := slices.Clone(d.Amounts)
	for i := range debts {
		debts[i] = slices.Clone(debts[i])
		for j, a := range debts[i] {
			debts[i][j] = a.Clamp()
		}
	}
	return s.change(ctx, d.Name, d.Identifier, &change{clocked: d.Clocked, now: d.Now, rules: d.Rules, debt: debts})
}

// Reset implements storage.Storage.
func (s *Storage) Reset(ctx context.Context, name, identifier string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.change(ctx, name, identifier, &change{})
}

func (s *Storage) change(ctx context.Context, name, identifier string, d *change) error {
	_, err := s.ask(ctx, &query{ids: [][]byte{rowID(name, identifier)}, change: d})
	return err
}

// ask sends a query. One that turns out to be contended is sent again, within the same time.
func (s *Storage) ask(ctx context.Context, q *query) (a answer, err error) {
	if s.closed.Load() {
		return a, storage.ErrClosed
	}
	began, hash := time.Now(), maphash.Bytes(s.seed, q.ids[0])
	queue, locked := s.partitions[hash%uint64(len(s.partitions))].Queue, s.locked[hash%uint64(len(s.locked))]
	if len(q.ids) > 1 {
		queue = s.several
	}
	if s.contended.marked(q.mark()) {
		queue = locked
	}
	a, err = s.send(ctx, queue, q)
	if err != nil || !a.contended {
		return a, err
	}
	rest, cancel := context.WithDeadline(ctx, began.Add(s.options.Timeout))
	defer cancel()
	for a.contended && err == nil {
		a, err = s.send(rest, locked, q)
	}
	if err != nil && ctx.Err() == nil && rest.Err() != nil {
		err = s.unavailable(rest.Err())
	}
	return a, err
}

func (s *Storage) send(ctx context.Context, queue *combine.Queue[query, answer], q *query) (a answer, err error) {
	c := queue.Get()
	defer queue.Put(c)
	c.Query = *q
	if err := queue.Do(ctx, c); errors.Is(err, combine.ErrTimeout) {
		return a, s.unavailable(err)
	} else if err != nil {
		return a, err
	}
	return c.Answer, nil
}
