// Package postgres keeps consumption in PostgreSQL 14 or newer, where any number of processes share it.
//
// Each identifier is one row. A decision reads the row and, if it admits, writes it on the condition that nobody else
// has written it since. If somebody has, the decision begins again under a lock. So a denial takes one round trip,
// and locks and writes nothing. An admission takes two round trips, or one if this process wrote the row last, a
// moment ago. Concurrent decisions of one process share round trips, and no decision is held back to fill a batch.
// The clock is the server's unless the throttler has one of its own.
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
	"math"
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

// Source is the value of Verdict.Source for answers of this storage.
const Source = "postgres"

// Defaults of Options. A commit waits for the disk, and a busy disk takes tens of milliseconds.
const (
	DefaultTablePrefix = "throttler"
	DefaultTimeout     = 500 * time.Millisecond
)

// maxTimeout is the longest time that Postgres takes as a setting: 2^31 - 1 milliseconds.
const maxTimeout = math.MaxInt32 * time.Millisecond

// Options of a Storage. The zero value and nil are the defaults.
type Options struct {
	// Schema is the schema of the table. By default it is the one in which New finds the table by the role's
	// search_path, or else creates it. New never creates the schema itself.
	Schema string

	// TablePrefix begins the name of the table, in at most 40 bytes. By default it is DefaultTablePrefix, and the
	// table is throttler_state.
	TablePrefix string

	// Timeout is the longest time that a call takes, even if its context allows more. It is from 10 ms to 24 days, as
	// Postgres takes no longer times; zero means DefaultTimeout. The server ends a statement after nine tenths of it,
	// and the wait for a lock a little earlier.
	Timeout time.Duration

	// SynchronousCommit sets synchronous_commit for the transactions of this storage: "on", "off", "local",
	// "remote_write" or "remote_apply". If it is empty the setting of the server applies. With "off" a crash of the
	// server forgets the admissions of about the last 600 ms, and those tokens can be taken again.
	SynchronousCommit string

	// Unlogged makes New create an UNLOGGED table. Such a table writes less, but a crash of the server, or of a single
	// backend, forgets everything. A standby does not have its content. An existing table stays as it is.
	Unlogged bool

	// NoSchema makes New send nothing and create nothing: somebody else has executed Schema.
	NoSchema bool
}

// OptionError is a fault in an argument of New.
type OptionError struct {
	Field  string // Pool or a field of Options
	Reason string // what was given and what is allowed

	cause error
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("throttler: postgres: %s %s", e.Field, e.Reason)
}

// Unwrap returns ErrCorruptState if something else has the name of the table, and nil otherwise.
func (e *OptionError) Unwrap() error { return e.cause }

// Storage keeps consumption in Postgres. New makes one, and all methods are safe for concurrent use.
//
// A call sends its changes again only if they did not take effect: another transaction has written or locked the row,
// or the error says that Postgres rolled back. If the answer is lost, the changes may have been made, but at most
// once.
//
// If Postgres does not answer in time, or answers with an error, the error wraps ErrUnavailable. It also wraps the
// cause: a *pgconn.PgError if it came from the server.
type Storage struct {
	pool    *pgxpool.Pool
	options Options
	sql     statements
	seed    maphash.Seed

	mode      pgx.QueryExecMode // of the pool
	forgetful atomic.Bool       // a pooler has lost a prepared statement: send unnamed ones
	blockless atomic.Bool       // a pooler refuses transactions of several round trips

	partitions [2]*partition                           // for calls of one identifier, which decides the partition
	locked     [8]*combine.Queue[query, answer]        // for contended calls; the first identifier decides the queue
	several    *combine.Queue[query, answer]           // for calls of several identifiers, one call in a batch
	ledger     *combine.Queue[*record, []replica.Debt] // for Record, one call in a batch

	closed    atomic.Bool // Close was called; set before the queues are closed one by one
	fresh     atomic.Bool // the last Record had to insert rows, so the next one tries that first
	contended marks       // rows whose calls lock first
	shared    marks       // rows that other processes write too, and memory therefore leaves out
	sweeps    sweeps
}

var _ replica.Storage = (*Storage)(nil)

// New returns a storage that uses a pool. The caller closes the pool after the storage. A nil o means the defaults.
//
// New creates the table if it does not exist, unless NoSchema is set. Any number of processes may do so at once. If the
// table exists, New needs no right to create. If something else has the table's name, New leaves it alone and returns
// an *OptionError that wraps ErrCorruptState. All faults of the arguments are joined, each an *OptionError.
//
// New waits for the server within ctx, and at most 10 s. If the server fails or does not answer, the error wraps
// ErrUnavailable.
//
// The pool may have any size and any default_query_exec_mode. There may be a PgBouncer in between that pools sessions
// or transactions.
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

// validate returns all faults of the arguments of New, joined.
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
	if o.Timeout < 10*time.Millisecond || o.Timeout > maxTimeout {
		fault("Timeout", "is %v, must be from 10ms to %v, or 0 for %v", o.Timeout, maxTimeout, DefaultTimeout)
	}
	switch o.SynchronousCommit {
	case "", "on", "off", "local", "remote_write", "remote_apply":
	default:
		fault("SynchronousCommit", "is %q, must be on, off, local, remote_write, remote_apply or empty", o.SynchronousCommit)
	}
	return errors.Join(faults...)
}

// Close makes further calls return ErrClosed and waits for the calls in flight, for at most Options.Timeout. If ctx
// ends earlier it returns the error of ctx. Closing twice is harmless. Close does not close the pool.
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

// closeAll closes all queues at the same time. Each waits for its batches, for at most Options.Timeout.
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

// change sends one change of an identifier.
func (s *Storage) change(ctx context.Context, name, identifier string, d *change) error {
	_, err := s.ask(ctx, &query{ids: [][]byte{rowID(name, identifier)}, change: d})
	return err
}

// ask sends a query to the queue of its first id, and returns the answer. If the answer is that the row is contended,
// nothing was done, and the query is sent again to a queue that locks first. All attempts share one Options.Timeout.
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

// send sends a query through a queue.
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
