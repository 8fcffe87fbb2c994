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

	"github.com/go-throttler/throttler/storage"
)

// marks are on ids, for a time. One may be on another id as well, of which no more than speed depends.
type marks struct {
	seed  maphash.Seed
	until [1024]atomic.Int64
}

func (m *marks) of(id []byte) *atomic.Int64 {
	return &m.until[maphash.Bytes(m.seed, id)%uint64(len(m.until))]
}

func (m *marks) mark(id []byte, d time.Duration) {
	m.of(id).Store(storage.Monotonic() + d.Microseconds())
}

func (m *marks) marked(id []byte) bool { return m.of(id).Load() > storage.Monotonic() }

// contend answers calls that they have to be done again, under a lock.
func contend(calls []*call) {
	for _, c := range calls {
		c.Answer, c.Err = answer{contended: true}, nil
	}
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
	slices.SortFunc(rows, byID)
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
