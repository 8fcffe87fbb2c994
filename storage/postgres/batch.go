package postgres

import (
	"bytes"
	"context"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	combine "github.com/go-throttler/throttler/internal/batch"
	"github.com/go-throttler/throttler/internal/law"
)

// A batch is shared by concurrent calls of one identifier each. It reads their rows, applies the calls to them, and
// writes the rows that have changed. Each write has the condition that the row still has the version that was read.
//
// The condition is an optimistic lock. This process decides without holding a lock, with the arithmetic of
// internal/law, and a denial locks and writes nothing. A failed condition means that another transaction wrote the
// row since: the decision is void, none of it was written, and it may be made again. A second optimistic attempt
// could fail too, and so on without end. So the calls of that row become contended: a transaction locks the row
// before it reads it (contended.go).

// partition executes the calls of some identifiers, one batch at a time. An identifier is always in the same partition:
// if two batches of a process wrote one row at the same time, one of them would fail its condition.
//
// With two partitions this process computes while the server works on the other batch. More partitions make smaller
// batches, and no more decisions.
type partition struct {
	*combine.Queue[query, answer]
	s      *Storage
	memory memory
}

func newPartition(s *Storage) *partition {
	p := &partition{s: s}
	p.Queue = combine.New(combine.Options{InFlight: 1, Timeout: s.options.Timeout}, p.run)
	return p
}

// run executes a batch. It reads only the rows that are not remembered, so a batch without any saves a round trip. A
// remembered row is read after all if its write fails, or if one of its calls takes nothing and so needs a proof.
func (p *partition) run(ctx context.Context, calls []*call) {
	rows := rowsOf(calls)
	now, unknown := p.memory.recall(rows)
	if len(unknown) > 0 {
		var err error
		if now, err = p.read(ctx, unknown); err != nil {
			p.s.fail(calls, err)
			return
		}
	}
	p.s.swept(len(rows), missing(rows), &calls[0].Query.request, now)
	act(calls, rows, now)
	// Decided before the write: a row whose write may have succeeded, because its answer was lost, must not be done
	// again.
	write, again := split(rows)
	for _, r := range p.write(ctx, write, now, len(unknown) == 0) {
		if r.remembered {
			again = append(again, r)
		} else {
			p.contend(r)
		}
	}
	if len(again) > 0 {
		slices.SortFunc(again, byID)
		p.reread(ctx, again)
	}
}

// split returns the changed rows that can be written now, and those that must be read again: remembered rows with a
// call that took nothing. Such a call is answered without a write, so nothing would reveal that the memory was stale.
func split(rows []*row) (write, again []*row) {
	for _, r := range rows {
		switch {
		case r.remembered && !r.taken():
			again = append(again, r)
		case r.changed:
			write = append(write, r)
		}
	}
	return write, again
}

// taken reports whether every call of the row has taken tokens, so that the row will be written for each of them.
func (r *row) taken() bool {
	for _, c := range r.calls {
		if c.Err != nil || !c.Query.taken(&c.Answer) {
			return false
		}
	}
	return r.changed
}

// reread reads rows whose memory failed or proves nothing, and applies their calls again. If the version differs from
// the remembered one, other processes write the row too. Then it is not remembered for ten seconds, as the memory
// would mostly be stale.
func (p *partition) reread(ctx context.Context, rows []*row) {
	var calls []*call
	remembered := make([]int64, len(rows))
	for i, r := range rows {
		calls, remembered[i] = append(calls, r.calls...), r.version
	}
	now, err := p.read(ctx, rows)
	if err != nil {
		p.s.fail(calls, err)
		return
	}
	for i, r := range rows {
		if remembered[i] != r.version {
			p.s.shared.mark(r.id, 10*time.Second)
		}
	}
	for _, r := range p.write(ctx, act(calls, rows, now), now, false) {
		p.contend(r)
	}
}

// read reads rows and returns the server's time, from which the memory derives its estimate.
func (p *partition) read(ctx context.Context, rows []*row) (now int64, err error) {
	sent := law.Monotonic()
	if now, err = p.s.read(ctx, rows); err == nil {
		p.memory.setClock(sent, now)
	}
	return now, err
}

// write writes rows and returns those whose condition failed. If one of the rows is locked, nothing was written: the
// calls of the locked rows become contended, and the other rows are written in a second attempt. After any error that
// does not prove a rollback, the rows may have been written. Then their calls get the error, because doing them again
// could charge twice.
func (p *partition) write(ctx context.Context, rows []*row, now int64, memory bool) (lost []*row) {
	if len(rows) == 0 {
		return nil
	}
	lost, err := p.s.write(ctx, rows, now, memory)
	switch {
	case err == nil:
		p.memory.remember(rows, &p.s.shared)
		return lost
	case rolledBack(err):
		return rows
	case code(err) != lockNotAvailable:
		for _, r := range rows {
			p.s.fail(r.calls, err)
		}
		return nil
	}
	free := p.s.free(ctx, rows)
	for _, r := range rows {
		if !slices.Contains(free, r) {
			p.contend(r)
		}
	}
	if len(free) == len(rows) {
		return rows // the lock has been released since, and its holder has probably written the row
	}
	return p.write(ctx, free, now, memory)
}

// contend has the calls of a row done again under a lock. For a second, further calls of the row lock from the start.
func (p *partition) contend(r *row) {
	p.s.contended.mark(r.id, time.Second)
	contend(r.calls)
}

// rowsOf returns the rows of calls of one identifier each, sorted by id, and links rows and calls. The calls of a row
// stay in the order of their arrival.
func rowsOf(batch []*call) []*row {
	calls := slices.Clone(batch)
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

// byID is the lock order: all statements and transactions of this package lock rows in the order of their ids. Of two
// that need the same rows, one waits at the first shared row while it holds no later one. So waits never form a circle,
// and a deadlock is possible only with transactions of other programs.
func byID(a, b *row) int { return bytes.Compare(a.id, b.id) }

// idsOf returns the ids of rows, in the same order.
func idsOf(rows []*row) [][]byte {
	ids := make([][]byte, len(rows))
	for i, r := range rows {
		ids[i] = r.id
	}
	return ids
}

// missing counts the rows that do not exist.
func missing(rows []*row) (n int) {
	for _, r := range rows {
		if r.version == 0 {
			n++
		}
	}
	return n
}

// look reads the rows and applies the calls to them. It returns the rows that must be written, and the server's time.
// If the read fails the calls get the error, and no row is returned.
func (s *Storage) look(ctx context.Context, calls []*call, rows []*row) (changed []*row, now int64) {
	now, err := s.read(ctx, rows)
	if err != nil {
		s.fail(calls, err)
		return nil, 0
	}
	s.swept(len(rows), missing(rows), &calls[0].Query.request, now)
	return act(calls, rows, now), now
}

// read reads the rows without a lock and returns the server's time.
func (s *Storage) read(ctx context.Context, rows []*row) (now int64, err error) {
	err = s.query(ctx, s.sql.read, idsOf(rows), func(r pgx.Rows) (err error) {
		_, err = scan(r, rows, &now)
		return err
	})
	return now, err
}

// scan reads the answer to s.sql.read or s.sql.lock into the rows, and returns how many there were.
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

// write writes rows in one transaction and returns those whose condition failed: another transaction wrote them or, if
// memory is set, the estimate of the server's clock was wrong. Memory is set if the batch has read nothing. The rows in
// the result were not written, and the others are committed.
func (s *Storage) write(ctx context.Context, rows []*row, now int64, memory bool) (lost []*row, err error) {
	settings, err := s.settings(ctx, s.options.Timeout/10)
	if err != nil {
		return nil, err
	}
	b := &pgx.Batch{}
	b.Queue(sqlSettings, settings...)
	s.queueWrites(b, rows, now, memory)
	if err := s.exchangeAny(ctx, b); err != nil {
		return nil, err
	}
	for _, r := range rows {
		if r.written {
			r.version = r.next
		} else {
			lost = append(lost, r)
		}
	}
	return lost, nil
}

// free returns the rows that are not locked. A row that was missing counts as free, because nobody can lock it.
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

// queueWrites adds the statements that write rows, which must be sorted by id. When the answers are read they set
// written on the rows that were.
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
		r.written, r.next = false, r.nextVersion(now)
		if r.version == 0 {
			inserts.add(r)
		} else {
			updates.add(r)
		}
	}
	if len(inserts.ids) > 0 {
		b.Queue(s.sql.insert, inserts.args()...).Query(written)
	}
	var read any // the estimated time that the server has to confirm, or nil
	if memory {
		read = now
	}
	switch {
	case len(updates.ids) == 0:
	case len(rows) == 1: // a plain UPDATE takes half of the server's time
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

// columns collects the values of rows to be written, one array for each column of the table.
type columns struct {
	ids, states               [][]byte
	versions, before, fullAts []int64
	clocked                   []bool
}

// add adds a row, without the buckets that are full.
func (c *columns) add(r *row) {
	fullAt := r.forget()
	c.ids = append(c.ids, r.id)
	c.versions = append(c.versions, r.next)
	c.before = append(c.before, r.version)
	c.states = append(c.states, r.encode())
	c.fullAts = append(c.fullAts, fullAt)
	c.clocked = append(c.clocked, r.clocked)
}

// args returns the parameters of sqlInsert and sqlUpdate.
func (c *columns) args() []any {
	return []any{c.ids, c.versions, c.before, c.states, c.fullAts, c.clocked}
}
