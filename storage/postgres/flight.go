package postgres

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	combine "github.com/go-throttler/throttler/internal/batch"
	"github.com/go-throttler/throttler/storage"
)

// A flight reads the rows of its calls, does to them what the calls ask, and writes those that have changed,
// each on the condition that nobody else has written it meanwhile. So the arithmetic is that of package
// storage, a refusal locks nothing and writes nothing, and no lock is held while this process thinks. Calls
// of a row that somebody else has written are contended: they are done again in a transaction that
// locks the row before it reads it.

type call = combine.Call[query, answer]

// query is a decision, a change of one identifier, or the question what it owes.
type query struct {
	ids     [][]byte // of the parts, or the identifier
	request storage.Request
	change  *change // nil for a decision
	debt    bool    // not the counts of a Peek are asked for, but what is owed

	rows []*row // of the ids; the flight's
}

// change is what happens to one identifier. A Reset has no rules.
type change struct {
	clocked bool
	now     int64
	rules   []storage.Rule
	charge  []storage.Amount   // of each rule, or nil
	debt    [][]storage.Amount // of each rule, or nil
}

type answer struct {
	verdict   storage.Verdict
	debt      [][]storage.Amount
	contended bool // and not done
}

// keep copies the strings of the request: its caller may leave, and use their memory again, before the flight lands.
func (q *query) keep() {
	r := &q.request
	r.Name, r.More = strings.Clone(r.Name), slices.Clone(r.More)
	for i := range r.Parts() {
		p := r.At(i)
		p.Identifier = strings.Clone(p.Identifier)
	}
}

// mark is what stands for all ids of the query in marks.
func (q *query) mark() []byte {
	if len(q.ids) == 1 {
		return q.ids[0]
	}
	return bytes.Join(q.ids, []byte{0})
}

// rules are those of one of the ids.
func (q *query) rules(i int) []storage.Rule {
	if q.change != nil {
		return q.change.rules
	}
	return q.request.At(i).Rules
}

// act does to the rows what the calls ask, by the server's clock where they have none, and returns those that
// have changed.
func act(calls []*call, rows []*row, now int64) (changed []*row) {
	for _, c := range calls {
		q := &c.Query
		c.Answer = answer{}
		switch {
		case q.change != nil:
			c.Err = q.change.apply(q.rows[0], now)
		case q.debt:
			c.Answer.debt, c.Err = q.owed(now)
		default:
			c.Err = q.decide(&c.Answer.verdict, now)
		}
	}
	for _, r := range rows {
		if r.changed {
			changed = append(changed, r)
		}
	}
	return changed
}

func (q *query) decide(v *storage.Verdict, now int64) error {
	r, at := &q.request, storage.Monotonic()
	if r.Clocked {
		at, now = r.Now, r.Now
	}
	var few [4]storage.Draw
	draws := few[:0]
	for i, row := range q.rows {
		part := r.At(i)
		if err := cmp.Or(row.fault, row.room(part.Rules, now)); err != nil {
			return err
		}
		for j := range part.Rules {
			rule := &part.Rules[j]
			draws = append(draws, storage.Draw{Rule: rule, Cost: part.Cost(j), State: row.state(rule)})
		}
	}
	v.Begin(r, Source, at)
	v.Allowed = storage.Decide(r.Mode, now, draws)
	for i := range draws {
		v.Set(i, draws[i].Count)
	}
	if !v.Taken() {
		return nil
	}
	for i, row := range q.rows {
		rules := r.At(i).Rules
		for j := range rules {
			if draws[j].Cost > 0 {
				row.set(&rules[j], draws[j].State)
				row.touch(r.Clocked, now)
			}
		}
		draws = draws[len(rules):]
	}
	return nil
}

func (q *query) owed(now int64) ([][]storage.Amount, error) {
	if q.request.Clocked {
		now = q.request.Now
	}
	return q.rows[0].debt(q.rules(0), now), q.rows[0].fault
}

func (d *change) apply(row *row, now int64) error {
	if d.clocked {
		now = d.now
	}
	if d.rules == nil {
		row.reset(now)
		return nil
	}
	if err := cmp.Or(row.fault, row.room(d.rules, now)); err != nil {
		return err
	}
	for i := range d.rules {
		rule := &d.rules[i]
		state := row.state(rule)
		switch {
		case d.debt != nil && len(d.debt[i]) > 0:
			state.Raise(rule, d.debt[i], now)
		case d.charge != nil && d.charge[i].N > 0:
			state.Charge(rule, d.charge[i], now)
		case d.charge != nil && d.charge[i].N < 0 && state.Law != nil:
			state.Refund(rule, storage.Amount{N: -d.charge[i].N, In: d.charge[i].In}, now)
		default:
			continue
		}
		row.set(rule, state)
		row.touch(d.clocked, now)
	}
	return nil
}

// flyContended executes a flight of contended calls, those of each identifier, or of several, in a transaction of
// their own. One that waits for a lock for long is done again, so that it does not hold up the others.
func (s *Storage) flyContended(ctx context.Context, flight []*call) {
	type work struct {
		calls []*call
		rows  []*row
	}
	var all []work
	single := flight[:0:0]
	for _, c := range flight {
		if len(c.Query.ids) == 1 {
			single = append(single, c)
		} else if calls, rows := []*call{c}, rowsOfJoint(c); len(first(s.look(ctx, calls, rows))) > 0 {
			all = append(all, work{calls, rows})
		}
	}
	if len(single) > 0 {
		for _, r := range first(s.look(ctx, single, rowsOf(single))) {
			all = append(all, work{r.calls, []*row{r}})
		}
	}
	lock := s.options.Timeout * 8 / 10 // as a tenth has passed before
	if len(all) > 1 {
		lock = s.options.Timeout / 10
	}
	var wait sync.WaitGroup
	for _, w := range all {
		wait.Go(func() {
			defer s.caught(w.calls)
			if err := s.transact(ctx, w.calls, w.rows, lock); code(err) == lockNotAvailable {
				s.contended.mark(w.calls[0].Query.mark(), time.Second)
				if len(all) > 1 {
					contend(w.calls)
				}
			}
		})
	}
	wait.Wait()
}

// contend answers calls that they have to be done again, under a lock.
func contend(calls []*call) {
	for _, c := range calls {
		c.Answer, c.Err = answer{contended: true}, nil
	}
}

// caught is deferred by a goroutine that answers calls.
func (s *Storage) caught(calls []*call) {
	if fault := recover(); fault != nil {
		s.fail(calls, fmt.Errorf("panic: %v\n\n%s", fault, debug.Stack()))
	}
}

func first(changed []*row, _ int64) []*row { return changed }

// flyJoint executes a flight of one call of several identifiers.
func (s *Storage) flyJoint(ctx context.Context, flight []*call) {
	c, rows := flight[0], rowsOfJoint(flight[0])
	if changed, _ := s.look(ctx, flight, rows); len(changed) == 0 {
		return
	}
	if err := s.transact(ctx, flight, rows, s.options.Timeout/10); code(err) == lockNotAvailable {
		s.contended.mark(c.Query.mark(), time.Second)
		contend(flight)
	}
}

// rowsOfJoint returns the rows of a call of several identifiers, in the order of the ids.
func rowsOfJoint(c *call) []*row {
	q := &c.Query
	q.rows = nil
	for i, id := range q.ids {
		q.rows = append(q.rows, &row{id: id, rules: q.rules(i)})
	}
	rows := slices.Clone(q.rows)
	slices.SortFunc(rows, func(a, b *row) int { return bytes.Compare(a.id, b.id) })
	return rows
}

// look reads the rows and does to them what the calls ask. It returns those that are to be written, and the
// server's time.
func (s *Storage) look(ctx context.Context, calls []*call, rows []*row) (changed []*row, now int64) {
	err := s.query(ctx, s.sql.read, idsOf(rows), func(r pgx.Rows) (err error) {
		_, err = scan(r, rows, &now)
		return err
	})
	if err != nil {
		s.fail(calls, err)
		return nil, 0
	}
	s.swept(len(rows), &calls[0].Query.request, now)
	return act(calls, rows, now), now
}

// rowsOf returns the rows of calls of one identifier each, in the order of the ids, which is that in which every
// transaction locks them.
func rowsOf(flight []*call) []*row {
	calls := slices.Clone(flight)
	slices.SortStableFunc(calls, func(a, b *call) int { return bytes.Compare(a.Query.ids[0], b.Query.ids[0]) })
	rows := make([]*row, 0, len(calls))
	for i := 0; i < len(calls); {
		r := &row{id: calls[i].Query.ids[0], rules: calls[i].Query.rules(0)}
		rows = append(rows, r)
		first := i
		for ; i < len(calls) && bytes.Equal(calls[i].Query.ids[0], r.id); i++ {
			calls[i].Query.rows = rows[len(rows)-1:]
		}
		r.calls = calls[first:i]
	}
	return rows
}

// transact does what calls ask to rows that it locks. It begins again when Postgres rolls it back, and when a
// row is removed before it is locked. No lock is waited for longer than given. The calls have its error.
func (s *Storage) transact(ctx context.Context, calls []*call, rows []*row, lock time.Duration) error {
	if s.blockless.Load() && len(rows) == 1 {
		return s.race(ctx, calls, rows)
	}
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		s.fail(calls, err)
		return err
	}
	defer conn.Release()
	for again := 0; ; again++ {
		done, err := s.attempt(ctx, conn.Conn(), calls, rows, lock)
		if done {
			return nil
		}
		if conn.Conn().PgConn().TxStatus() != 'I' {
			_, _ = conn.Exec(ctx, "ROLLBACK") // without which Release closes the connection
		}
		if noBlocks(err) && len(rows) == 1 {
			s.blockless.Store(true)
			conn.Release() // there may be no other
			return s.race(ctx, calls, rows)
		}
		if err != nil && (again == 2 || !rolledBack(err)) {
			s.fail(calls, err)
			return err
		}
	}
}

// race is transact of one row where a pooler lets nobody begin a transaction: it reads and writes until nobody else
// has written meanwhile.
func (s *Storage) race(ctx context.Context, calls []*call, rows []*row) error {
	for {
		changed, now := s.look(ctx, calls, rows)
		if len(changed) == 0 {
			return nil
		}
		late, err := s.write(ctx, changed, now, false)
		if err != nil && !rolledBack(err) {
			s.fail(calls, err)
			return err
		}
		if err == nil && len(late) == 0 {
			return nil
		}
	}
}

func (s *Storage) attempt(ctx context.Context, conn *pgx.Conn, calls []*call, rows []*row, lock time.Duration) (done bool, err error) {
	settings, err := s.settings(ctx, lock)
	if err != nil {
		return false, err
	}
	ids, found, now := idsOf(rows), 0, int64(0)
	b := &pgx.Batch{}
	b.Queue(begin)
	b.Queue(setSettings, settings...)
	b.Queue(s.sql.blank, ids)
	b.Queue(s.sql.lock, ids).Query(func(r pgx.Rows) (err error) {
		found, err = scan(r, rows, &now)
		return err
	})
	if err := s.exchange(ctx, conn, b); err != nil || found < len(rows) {
		return false, err
	}
	changed := act(calls, rows, now)
	b = &pgx.Batch{}
	s.queueWrites(b, changed, now, false)
	b.Queue("COMMIT")
	err = s.exchange(ctx, conn, b)
	return err == nil, err
}

// scan reads the answer to s.sql.read or s.sql.lock, and returns how many rows it has.
func scan(r pgx.Rows, rows []*row, now *int64) (n int, err error) {
	var place, version int64
	_, err = pgx.ForEachRow(r, []any{&place, &version, nil, now}, func() error {
		n++
		state, err := octets(r, 2)
		rows[place-1].read(version, state)
		return err
	})
	return n, err
}

// write writes rows, and returns those that somebody else has written, or whose calls took longer than the clock
// of memory allows, if that is where the rows come from. After an error none is written.
func (s *Storage) write(ctx context.Context, rows []*row, now int64, memory bool) (late []*row, err error) {
	settings, err := s.settings(ctx, s.options.Timeout/10)
	if err != nil {
		return nil, err
	}
	b := &pgx.Batch{}
	b.Queue(setSettings, settings...)
	s.queueWrites(b, rows, now, memory)
	if err := s.exchangeAny(ctx, b); err != nil {
		return nil, err
	}
	for _, r := range rows {
		if r.written {
			r.version = r.next
		} else {
			late = append(late, r)
		}
	}
	return late, nil
}

// free returns those of the rows that nobody locks, as far as can be seen: new ones are.
func (s *Storage) free(ctx context.Context, rows []*row) (free []*row) {
	unlocked := make([]bool, len(rows))
	err := s.query(ctx, s.sql.free, idsOf(rows), func(r pgx.Rows) (err error) {
		var place int64
		_, err = pgx.ForEachRow(r, []any{&place}, func() error {
			unlocked[place-1] = true
			return nil
		})
		return err
	})
	if err != nil {
		return nil
	}
	for i, r := range rows {
		if unlocked[i] || r.version == 0 {
			free = append(free, r)
		}
	}
	return free
}

// queueWrites adds statements that write rows, which are in the order of their ids, and set their written.
func (s *Storage) queueWrites(b *pgx.Batch, rows []*row, now int64, memory bool) {
	written := func(r pgx.Rows) error {
		_, err := pgx.ForEachRow(r, []any{nil}, func() error {
			id, err := octets(r, 0)
			if i, ok := slices.BinarySearchFunc(rows, id, func(r *row, id []byte) int { return bytes.Compare(r.id, id) }); ok {
				rows[i].written = true
			}
			return err
		})
		return err
	}
	var inserts, updates columns
	for _, r := range rows {
		r.written, r.next = false, max(r.version+1, now)
		if r.version == 0 {
			inserts.add(r)
		} else {
			updates.add(r)
		}
	}
	if len(inserts.ids) > 0 {
		b.Queue(s.sql.insert, inserts.args()...).Query(written)
	}
	var read any // when the rows from memory are as the server has them
	if memory {
		read = now
	}
	switch {
	case len(updates.ids) == 0:
	case len(rows) == 1: // in half of the server's time
		u := &updates
		b.Queue(s.sql.one, u.ids[0], u.versions[0], u.before[0], u.states[0], u.fullAts[0], u.clocked[0], read).Exec(func(tag pgconn.CommandTag) error {
			rows[0].written = tag.RowsAffected() == 1
			return nil
		})
	case memory:
		b.Queue(s.sql.recall, append(updates.args(), read)...).Query(written)
	default:
		b.Queue(s.sql.update, updates.args()...).Query(written)
	}
}

// columns are those of rows to be written.
type columns struct {
	ids, states               [][]byte
	versions, before, fullAts []int64
	clocked                   []bool
}

func (c *columns) add(r *row) {
	fullAt := r.forget()
	c.ids = append(c.ids, r.id)
	c.versions = append(c.versions, r.next)
	c.before = append(c.before, r.version)
	c.states = append(c.states, r.encode())
	c.fullAts = append(c.fullAts, fullAt)
	c.clocked = append(c.clocked, r.clocked)
}

func (c *columns) args() []any {
	return []any{c.ids, c.versions, c.before, c.states, c.fullAts, c.clocked}
}

func idsOf(rows []*row) [][]byte {
	ids := make([][]byte, len(rows))
	for i, r := range rows {
		ids[i] = r.id
	}
	return ids
}

// begin is for what waits for a lock and then reads what others have committed.
const begin = "BEGIN ISOLATION LEVEL READ COMMITTED"

// setSettings is for the rest of a transaction, which a batch is.
const setSettings = `SELECT set_config('lock_timeout', $1::text, true), set_config('statement_timeout', $2::text, true),
	set_config('idle_in_transaction_session_timeout', $2::text, true), CASE WHEN $3::text <> '' THEN set_config('synchronous_commit', $3::text, true) END`

// settings are such that the server gives up before the context does, as pgx closes the connection when that
// ends. No lock is waited for longer than given.
func (s *Storage) settings(ctx context.Context, lock time.Duration) ([]any, error) {
	deadline, _ := ctx.Deadline()
	left := time.Until(deadline) - max(5*time.Millisecond, s.options.Timeout/10)
	if left < time.Millisecond {
		return nil, context.DeadlineExceeded
	}
	return []any{milliseconds(max(time.Millisecond, min(lock, left))), milliseconds(left), s.options.SynchronousCommit}, nil
}

func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

// code is what Postgres calls an error, empty if it is not one of Postgres.
func code(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

const (
	serializationFailure = "40001"
	deadlockDetected     = "40P01"
	lockNotAvailable     = "55P03"
)

// rolledBack tells of an error after which nothing has happened, and the same may be tried again.
func rolledBack(err error) bool {
	return code(err) == serializationFailure || code(err) == deadlockDetected || forgotten(err)
}

// noBlocks tells of the error by which PgBouncer refuses a transaction of several round trips.
func noBlocks(err error) bool {
	return code(err) == "08P01" && strings.Contains(err.Error(), "statement pooling mode")
}

func (s *Storage) fail(calls []*call, err error) {
	err = s.unavailable(err)
	for _, c := range calls {
		c.Err = err
	}
}

// unavailable wraps the error of a round trip. The context of a flight is not the caller's, and must not
// look like it.
func (s *Storage) unavailable(err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.Is(err, combine.ErrTimeout) {
		return fmt.Errorf("%w: no answer from Postgres within %v%s", storage.ErrUnavailable, s.options.Timeout, s.busy())
	}
	return fmt.Errorf("%w: %w", storage.ErrUnavailable, err)
}

// busy is what the pool knows of why there is no answer.
func (s *Storage) busy() string {
	pool := s.pool.Stat()
	switch {
	case pool.ConstructingConns() > 0:
		return ": a connection is still being opened"
	case pool.AcquiredConns() >= pool.MaxConns():
		return fmt.Sprintf(": all connections of the pool, %d, are in use", pool.MaxConns())
	}
	return ""
}
