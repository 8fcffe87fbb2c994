package postgres

import (
	"bytes"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/go-throttler/throttler/internal/combine"
	"github.com/go-throttler/throttler/storage"
)

// A flight reads the rows of its calls, does to them what the calls ask, and writes those that have changed,
// each on the condition that nobody else has written it meanwhile. So the arithmetic is that of package
// storage, a refusal locks nothing and writes nothing, and no lock is held while this process thinks. Calls
// of a row that somebody else has written are contended: they are done again in a transaction that
// locks the row before it reads it.

// lane executes the calls of some identifiers, one flight after the other. It remembers the rows that it has
// written, and how far the server's clock is from ours: an admission from memory saves the round trip of a read.
// It is written on the condition that the row is as it is remembered and the clock as well, to 5 ms; if not, the
// row is read. So is everything that writes nothing, as nobody would find out that the memory is wrong.
type lane struct {
	*combine.Queue[query, answer]
	s *Storage

	mu         sync.Mutex // guards what follows; a flight that is stuck does not keep the next one from starting
	known, old map[string]memory
	aging      int64 // when known becomes old and what was old is forgotten
	offset     int64 // of the server's clock to ours, in microseconds
	offsetAt   int64 // when it was found
}

func newLane(s *Storage) *lane {
	l := &lane{s: s}
	l.Queue = combine.New(combine.Options{Flights: 1, Timeout: s.options.Timeout}, l.fly)
	return l
}

// fly executes a flight of calls of one identifier each.
func (l *lane) fly(ctx context.Context, flight []*call) {
	rows := rowsOf(flight)
	now, unknown := l.recall(rows)
	if len(unknown) > 0 {
		var err error
		if now, err = l.read(ctx, unknown); err != nil {
			l.s.fail(flight, err)
			return
		}
	}
	l.s.swept(len(rows), missing(rows), &flight[0].Query.request, now)
	act(flight, rows, now)
	write, again := split(rows)
	for _, r := range l.write(ctx, write, now, len(unknown) == 0) {
		if r.remembered {
			again = append(again, r)
		} else {
			l.contend(r)
		}
	}
	if len(again) > 0 {
		slices.SortFunc(again, byID) // the order in which rows are locked
		l.reread(ctx, again)
	}
}

// reread does again what was done to rows that are not as they were remembered, or of which nothing was taken.
func (l *lane) reread(ctx context.Context, rows []*row) {
	var calls []*call
	for _, r := range rows {
		calls = append(calls, r.calls...)
	}
	remembered := make([]int64, len(rows))
	for i, r := range rows {
		remembered[i] = r.version
	}
	now, err := l.read(ctx, rows)
	if err != nil {
		l.s.fail(calls, err)
		return
	}
	for i, r := range rows {
		if remembered[i] != r.version {
			l.s.shared.mark(r.id, 10*time.Second)
		}
	}
	for _, r := range l.write(ctx, act(calls, rows, now), now, false) {
		l.contend(r)
	}
}

// split returns the rows to be written, and those that have to be read before anything is said of them: rows from memory of
// which a call has taken nothing.
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
		if c.Err != nil || !c.Answer.verdict.Taken() {
			return false
		}
	}
	return r.changed
}

// contend has the calls of a row done again, under a lock, and later ones from the beginning.
func (l *lane) contend(r *row) {
	l.s.contended.mark(r.id, time.Second)
	contend(r.calls)
}

// read reads rows, and finds the offset of the clock.
func (l *lane) read(ctx context.Context, rows []*row) (now int64, err error) {
	sent := storage.Monotonic()
	if now, err = l.s.read(ctx, rows); err != nil {
		return 0, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if own := storage.Monotonic(); own-sent < offsetTrip {
		l.offset, l.offsetAt = now-own, own
	}
	return now, nil
}

// write writes rows, and returns those that somebody else has written. The calls of those that are locked are
// contended, and those that fail otherwise have the error.
func (l *lane) write(ctx context.Context, rows []*row, now int64, memory bool) (late []*row) {
	if len(rows) == 0 {
		return nil
	}
	late, err := l.s.write(ctx, rows, now, memory)
	switch {
	case err == nil:
		l.remember(rows)
		return late
	case rolledBack(err):
		return rows
	case code(err) != lockNotAvailable:
		for _, r := range rows {
			l.s.fail(r.calls, err)
		}
		return nil
	}
	free := l.s.free(ctx, rows)
	for _, r := range rows {
		if !slices.Contains(free, r) {
			l.contend(r)
		}
	}
	if len(free) == len(rows) {
		return rows // by now
	}
	return l.write(ctx, free, now, memory)
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

// byID is the order in which every transaction locks rows, so that none waits for another in a circle.
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

// write writes rows, and returns those that somebody else has written, or whose calls took longer than the clock
// of memory allows, if that is where the rows come from. After an error none is written.
func (s *Storage) write(ctx context.Context, rows []*row, now int64, memory bool) (late []*row, err error) {
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
