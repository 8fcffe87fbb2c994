package postgres

import (
	"context"
	"fmt"
	"hash/maphash"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/go-throttler/throttler/internal/law"
)

// A call is contended if several processes write its row at the same moment, or if somebody keeps the row locked. Its
// transaction locks the row before it reads it, so that nobody can write it in between. Admissions of calls of several
// identifiers are always made this way, because they write all of their rows or none.

// marks flags ids for a while, in a fixed hash table. A collision flags a second id, which only costs speed.
type marks struct {
	seed  maphash.Seed
	until [1024]atomic.Int64 // by law.Monotonic
}

// of returns the place of an id.
func (m *marks) of(id []byte) *atomic.Int64 {
	return &m.until[maphash.Bytes(m.seed, id)%uint64(len(m.until))]
}

// mark flags an id for the duration d from now on.
func (m *marks) mark(id []byte, d time.Duration) {
	m.of(id).Store(law.Monotonic() + d.Microseconds())
}

// marked reports whether an id is flagged.
func (m *marks) marked(id []byte) bool { return m.of(id).Load() > law.Monotonic() }

// contend answers calls with contended: they were not done, and ask sends them to a queue that locks first.
func contend(calls []*call) {
	for _, c := range calls {
		c.Answer, c.Err = answer{contended: true}, nil
	}
}

// runContended executes a batch of contended calls. It looks without a lock first, because a denial needs none. Then
// each changed row, and each call of several identifiers, gets a transaction of its own, and all run at the same
// time.
//
// The batch is answered when the slowest transaction is. So if there are several, none waits long for its lock: calls
// that do not get it stay contended, and ask sends them again.
func (s *Storage) runContended(ctx context.Context, calls []*call) {
	type work struct {
		calls []*call
		rows  []*row
	}
	var all []work
	var single []*call
	for _, c := range calls {
		if len(c.Query.ids) == 1 {
			single = append(single, c)
		} else if one, rows := []*call{c}, rowsOfOne(c); len(first(s.look(ctx, one, rows))) > 0 {
			all = append(all, work{one, rows})
		}
	}
	if len(single) > 0 {
		for _, r := range first(s.look(ctx, single, rowsOf(single))) {
			all = append(all, work{r.calls, []*row{r}})
		}
	}
	lock := s.options.Timeout * 8 / 10 // a tenth may have passed in a batch before, and the server stops a tenth early
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

// caught is deferred by goroutines that answer calls: after a panic the calls get it as their error, and the program
// goes on.
func (s *Storage) caught(calls []*call) {
	if fault := recover(); fault != nil {
		s.fail(calls, fmt.Errorf("panic: %v\n\n%s", fault, debug.Stack()))
	}
}

// first returns the rows of an answer of look.
func first(changed []*row, _ int64) []*row { return changed }

// runSeveral executes a call of several identifiers. It looks without a lock first, because a denial needs none.
func (s *Storage) runSeveral(ctx context.Context, one []*call) {
	rows := rowsOfOne(one[0])
	if changed, _ := s.look(ctx, one, rows); len(changed) == 0 {
		return
	}
	if err := s.transact(ctx, one, rows, s.options.Timeout/10); code(err) == lockNotAvailable {
		s.contended.mark(one[0].Query.mark(), time.Second)
		contend(one)
	}
}

// rowsOfOne returns the rows of one call of several identifiers, sorted by id. Query.rows keeps the order of the parts.
func rowsOfOne(c *call) []*row {
	q := &c.Query
	q.rows = nil
	for i, id := range q.ids {
		q.rows = append(q.rows, &row{id: id, rules: q.rules(i)})
	}
	rows := slices.Clone(q.rows)
	slices.SortFunc(rows, byID)
	return rows
}

// transact locks rows, applies calls to them and writes them. The duration lock bounds the wait for each row.
//
// It begins again if Postgres rolls it back, up to three attempts in all, and if a row is removed before it is
// locked. It never does after another error, because a COMMIT whose answer is lost may have been executed. Then the
// calls get the error, which it also returns.
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
			_, _ = conn.Exec(ctx, "ROLLBACK") // or else Release would close the connection
		}
		if noBlocks(err) && len(rows) == 1 {
			s.blockless.Store(true)
			conn.Release() // race needs a connection, and the pool may have only this one
			return s.race(ctx, calls, rows)
		}
		if err != nil && (again >= 2 || !rolledBack(err)) {
			s.fail(calls, err)
			return err
		}
	}
}

// race replaces transact for one row if a pooler refuses transactions of several round trips: it repeats read and
// conditional write until the condition holds. Whenever the condition fails another process has made progress. The
// context bounds the time.
func (s *Storage) race(ctx context.Context, calls []*call, rows []*row) error {
	for {
		changed, now := s.look(ctx, calls, rows)
		if len(changed) == 0 {
			return nil
		}
		lost, err := s.write(ctx, changed, now, false)
		if err != nil && !rolledBack(err) {
			s.fail(calls, err)
			return err
		}
		if err == nil && len(lost) == 0 {
			return nil
		}
	}
}

// attempt is one transaction in two round trips. The first inserts missing rows, because a row that does not exist
// cannot be locked, then locks all rows and reads them. The second writes the changed rows and commits. If a row was
// removed between its insertion and its lock, attempt returns false without an error, and the transaction is still
// open.
func (s *Storage) attempt(ctx context.Context, conn *pgx.Conn, calls []*call, rows []*row, lock time.Duration) (done bool, err error) {
	settings, err := s.settings(ctx, lock)
	if err != nil {
		return false, err
	}
	ids, found, now := idsOf(rows), 0, int64(0)
	b := &pgx.Batch{}
	b.Queue(sqlBegin)
	b.Queue(sqlSettings, settings...)
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
