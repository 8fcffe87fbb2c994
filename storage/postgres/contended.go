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

// Contended are the calls of rows that several processes write at the same moment, or that somebody keeps locked. They are
// done in a transaction that locks the row before it reads it, so that nobody can write it in between. Calls of several
// identifiers always are, as they write all of their rows or none.

// marks flags ids for a while, in a fixed hash table. A collision flags a second id, which only costs speed.
type marks struct {
	seed  maphash.Seed
	until [1024]atomic.Int64
}

func (m *marks) of(id []byte) *atomic.Int64 {
	return &m.until[maphash.Bytes(m.seed, id)%uint64(len(m.until))]
}

func (m *marks) mark(id []byte, d time.Duration) {
	m.of(id).Store(law.Monotonic() + d.Microseconds())
}

func (m *marks) marked(id []byte) bool { return m.of(id).Load() > law.Monotonic() }

// contend answers calls that they have to be done again under a lock.
func contend(calls []*call) {
	for _, c := range calls {
		c.Answer, c.Err = answer{contended: true}, nil
	}
}

// runContended executes a batch of contended calls. Each row, and each call of several identifiers, has a transaction of its
// own. If there are several, none waits long for its lock: it would hold up the answers of the others. Its calls come again.
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
	lock := s.options.Timeout * 8 / 10 // a tenth has passed in a batch before, and the server gives up a tenth earlier
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

// runSeveral executes a call of several identifiers. It reads without a lock first, as a denial needs none.
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

// rowsOfOne returns the rows of one call of several identifiers, by id.
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

// transact does what calls ask to rows that it locks, and waits for each lock for as long as given. It begins again if Postgres
// rolls it back (three times, then somebody else keeps getting in its way) and if a row is removed before it is locked. It
// does not after other errors: a COMMIT whose answer is lost may have been executed. The calls have its error.
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

// race is transact of one row where a pooler allows no transactions: it repeats the optimistic write until the condition
// holds. Each time that it is lost somebody else has made progress, and the context bounds it.
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

// attempt is one transaction. Its first round trip makes the rows that are missing, since what is not there cannot be locked,
// locks all and reads them; its second writes and commits. It is not done if a row was removed in between.
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
