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

// A batch is what concurrent calls of one identifier each share: it reads their rows, does to them what the calls ask, and
// writes those that have changed, each on the condition that its version is still the one that was read.
//
// The condition is an optimistic lock. This process decides while it holds no lock, with the arithmetic of package storage,
// and a denial locks and writes nothing. A lost condition means that somebody else wrote the row in between: what this
// process decided is void, nothing of it was written, and it may be done again. Another optimistic attempt could lose again
// and again, so the calls of that row are contended: they are done in a transaction that locks the row first (contended.go).

// partition executes the calls of some identifiers, one batch after the other. An identifier is always in the same one: two
// batches of a process in flight at once never write the same row, or each would void what the other has decided.
//
// Two partitions overlap the work of this process with that of the server. More make smaller batches and no more decisions.
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

// run executes a batch. Only rows that are not remembered are read: if there are none the read is saved. If a remembered row
// turns out to be wrong, or nothing was taken from it, it is read after all.
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
	write, again := split(rows) // before any has an answer: a row whose answer is lost must not be done again
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

// split returns the rows to be written now, and those to be read first: remembered rows from which a call has taken nothing.
// Nothing would be written to them, and so nothing would reveal that the memory is stale.
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

// taken reports whether every call of the row has taken something.
func (r *row) taken() bool {
	for _, c := range r.calls {
		if c.Err != nil || !c.Query.taken(&c.Answer) {
			return false
		}
	}
	return r.changed
}

// reread reads rows in place of what was remembered of them, and does again what their calls ask. A row whose version was
// another one is shared with other processes, and not remembered for a while: the memory of it would mostly be stale.
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

// read reads rows, and what the server's clock is.
func (p *partition) read(ctx context.Context, rows []*row) (now int64, err error) {
	sent := law.Monotonic()
	if now, err = p.s.read(ctx, rows); err == nil {
		p.memory.setClock(sent, now)
	}
	return now, err
}

// write writes rows, and returns those whose condition was lost. The calls of rows that somebody keeps locked are contended,
// and the others are written. After another error it is not known whether the rows were written, so their calls have the
// error: doing them again could charge twice.
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
		return rows // the lock has gone meanwhile, and the row has probably changed
	}
	return p.write(ctx, free, now, memory)
}

// contend has the calls of a row done again under a lock, and later ones from the beginning.
func (p *partition) contend(r *row) {
	p.s.contended.mark(r.id, time.Second)
	contend(r.calls)
}

// rowsOf returns the rows of calls of one identifier each, by id. Calls of one row keep their order.
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

// byID is the order in which all statements and transactions of this package lock rows. Two that want the same rows then
// wait for each other at the first they share, and never in a circle: there are no deadlocks but with strangers.
func byID(a, b *row) int { return bytes.Compare(a.id, b.id) }

func idsOf(rows []*row) [][]byte {
	ids := make([][]byte, len(rows))
	for i, r := range rows {
		ids[i] = r.id
	}
	return ids
}

// missing counts the rows that are not there.
func missing(rows []*row) (n int) {
	for _, r := range rows {
		if r.version == 0 {
			n++
		}
	}
	return n
}

// look reads the rows and does to them what the calls ask. It returns those that are to be written, and the
// server's time.
func (s *Storage) look(ctx context.Context, calls []*call, rows []*row) (changed []*row, now int64) {
	now, err := s.read(ctx, rows)
	if err != nil {
		s.fail(calls, err)
		return nil, 0
	}
	s.swept(len(rows), missing(rows), &calls[0].Query.request, now)
	return act(calls, rows, now), now
}

// read reads the rows, and returns the server's time.
func (s *Storage) read(ctx context.Context, rows []*row) (now int64, err error) {
	err = s.query(ctx, s.sql.read, idsOf(rows), func(r pgx.Rows) (err error) {
		_, err = scan(r, rows, &now)
		return err
	})
	return now, err
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

// write writes rows in one transaction, and returns those whose condition failed: another process wrote them or, if all come
// from memory, the estimate of the clock was wrong.
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

// free returns the rows that nobody locks. One that was missing counts as free: it cannot be looked at.
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
