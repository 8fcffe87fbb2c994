package postgres

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	combine "github.com/go-throttler/throttler/internal/batch"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/storage"
)

// The ledger takes what another store has admitted: in batches, each of them once. The row of an origin holds the number of
// its last batch, and is locked and written in the transaction that charges the batch. So either both are stored or none,
// and a batch that is sent again finds its number and charges nothing. Two attempts of a batch that overlap, because the
// answer of the first was slow, wait for each other at the lock of that row.
//
// A batch takes two round trips: one locks all rows in the order of their ids and reads them, one writes them where they were
// found. Missing rows are inserted before any lock is taken. To save that statement it runs only if the previous batch needed
// it; otherwise missing rows are noticed after locking, and the batch begins again.

// maxOrigin is the longest origin, in bytes.
const maxOrigin = 64

// originTime is how long the row of an origin stays after its last batch, in microseconds.
const originTime = 3_600_000_000

// originFormat begins the state column of an origin. The sequence number follows, as a varint.
const originFormat = 0xff

// record is one batch.
type record struct {
	entries []entry
	rows    []*row    // all, by id
	charged []*row    // those that have to be there, the origin's too; none if the batch only reads
	origin  *row      // nil if nothing is charged
	seq     int64     // of the batch
	last    int64     // of the origin, as it was read
	fresh   bool      // rows were missing
	made    int       // how many were inserted
	until   time.Time // when the caller leaves; zero if that is not known
}

// entry is one charge of a batch.
type entry struct {
	change
	row  *row
	none bool // all amounts are zero
	left bool // it was left out
	debt replica.Debt
}

// Record charges all entries of a batch once, or gives back where an amount is negative, and returns for each entry
// what its buckets owe after the whole batch, as Debt does. The entries may name an identifier several times, with
// several rules, and have clocks of their own.
//
// Origin is 1 to 64 bytes without a colon, and belongs to one life of one process; seq is above zero and grows from
// batch to batch. A batch whose seq is not above the last one of the origin was charged before: only what is owed is
// answered. So a batch that failed, or whose answer was lost, may be sent again with the same seq, until an hour after
// the origin's last one. A batch of zeros only reads: it locks and writes nothing, and needs no origin and no seq.
//
// An entry whose row cannot be read, or would have more than
// law.MaxBuckets buckets, is left out, and its Amounts in the answer are nil. If the row of the origin cannot be
// read nothing is charged, and the error is ErrCorruptState.
//
// A Record takes no longer than ctx and Options.Timeout allow. If a lock is not granted in time
// the error is ErrUnavailable and nothing was charged. After any other failure, or if ctx ends during the call, the batch may
// have been charged. Record is
// safe for concurrent use, but a batch that a later one of its origin overtakes counts as charged. Rules must
// never change.
func (s *Storage) Record(ctx context.Context, origin string, seq int64, batch []storage.Charge) ([]replica.Debt, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r, err := newRecord(origin, seq, batch)
	if err != nil {
		return nil, err
	}
	if s.closed.Load() {
		return nil, storage.ErrClosed
	}
	r.until, _ = ctx.Deadline()
	c := s.ledger.Get()
	defer s.ledger.Put(c)
	c.Query = r
	if err := s.ledger.Do(ctx, c); errors.Is(err, combine.ErrTimeout) {
		return nil, s.unavailable(err)
	} else if err != nil {
		return nil, err
	}
	return c.Answer, nil
}

// newRecord copies what the caller may change after it has left.
func newRecord(origin string, seq int64, batch []storage.Charge) (*record, error) {
	r := &record{entries: make([]entry, len(batch)), seq: seq}
	charges := false
	for i := range batch {
		c, e := &batch[i], &r.entries[i]
		e.debt = replica.Debt{Name: strings.Clone(c.Name), Clocked: c.Clocked, Now: c.Now, Identifier: strings.Clone(c.Identifier), Rules: c.Rules}
		e.change = change{clocked: c.Clocked, now: c.Now, rules: c.Rules, charge: make([]storage.Amount, len(c.Amounts))}
		e.none = true
		for j, a := range c.Amounts {
			e.charge[j], e.none = a.Clamp(), e.none && a.N == 0
		}
		charges = charges || !e.none
	}
	if charges {
		if err := validateOrigin(origin, seq); err != nil {
			return nil, err
		}
		r.origin = &row{id: []byte(origin)}
		r.rows, r.charged = append(r.rows, r.origin), append(r.charged, r.origin)
	}
	r.addRows()
	return r, nil
}

func validateOrigin(origin string, seq int64) error {
	if origin == "" || len(origin) > maxOrigin || strings.Contains(origin, ":") {
		return fmt.Errorf("throttler: postgres: the origin %.99q of a batch must have 1 to %d bytes and no colon", origin, maxOrigin)
	}
	if seq <= 0 {
		return fmt.Errorf("throttler: postgres: the sequence number of a batch is %d, must be above zero", seq)
	}
	return nil
}

// addRows adds those of the entries, one for each identifier.
func (r *record) addRows() {
	type known struct {
		row     *row
		charged bool
	}
	all := make(map[string]known, len(r.entries))
	for i := range r.entries {
		e := &r.entries[i]
		id := rowID(e.debt.Name, e.debt.Identifier)
		k, ok := all[string(id)]
		if !ok {
			k.row = &row{id: id, rules: e.rules}
			r.rows = append(r.rows, k.row)
		}
		if !e.none && !k.charged {
			k.charged = true
			r.charged = append(r.charged, k.row)
		}
		e.row, all[string(id)] = k.row, k
	}
	slices.SortFunc(r.rows, byID)
	slices.SortFunc(r.charged, byID)
}

// runRecord executes one batch.
func (s *Storage) runRecord(ctx context.Context, one []*combine.Call[*record, []replica.Debt]) {
	c := one[0]
	r, now, err := c.Query, int64(0), error(nil)
	switch {
	case len(r.rows) == 0:
	case r.origin == nil:
		now, err = s.consult(ctx, r)
	default:
		now, err = s.enter(ctx, r)
	}
	switch {
	case errors.Is(err, storage.ErrCorruptState):
		c.Err = err
	case err != nil:
		c.Err = s.unavailable(err)
	default:
		c.Answer = r.debts(now)
	}
	if err == nil && len(r.entries) > 0 {
		d := &r.entries[0].debt
		s.swept(max(len(r.entries), r.made), r.made, &storage.Request{Name: d.Name, Clocked: d.Clocked, Now: d.Now}, now)
	}
}

// consult reads the rows, and returns the server's time.
func (s *Storage) consult(ctx context.Context, r *record) (now int64, err error) {
	err = s.query(ctx, s.sql.read, idsOf(r.rows), func(answer pgx.Rows) (err error) {
		_, err = scan(answer, r.rows, &now)
		return err
	})
	return now, err
}

// enter charges the batch. It begins again when Postgres rolls it back, and when a row is removed before it
// is locked.
func (s *Storage) enter(ctx context.Context, r *record) (now int64, err error) {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Release()
	for again, create := 0, s.fresh.Load(); ; again, create = again+1, true {
		now, done, err := s.enterOnce(ctx, conn.Conn(), r, create)
		if done {
			s.fresh.Store(r.fresh)
			return now, nil
		}
		if conn.Conn().PgConn().TxStatus() != 'I' {
			_, _ = conn.Exec(ctx, "ROLLBACK") // without which Release closes the connection
		}
		if err != nil && (again == 2 || !rolledBack(err)) {
			return 0, err
		}
	}
}

func (s *Storage) enterOnce(ctx context.Context, conn *pgx.Conn, r *record, create bool) (now int64, done bool, err error) {
	now, err = s.claim(ctx, conn, r, create)
	if err != nil {
		return 0, false, err
	}
	if slices.ContainsFunc(r.charged, func(row *row) bool { return row.version == 0 }) {
		r.fresh = true
		return 0, false, nil
	}
	b := &pgx.Batch{}
	if r.last >= r.seq {
		b.Queue("ROLLBACK") // as it was charged before, and rows that were not there are not needed
	} else {
		r.charge(now)
		b.Queue(s.sql.record, r.columns(now)...)
		b.Queue("COMMIT")
	}
	err = s.exchange(ctx, conn, b)
	return now, err == nil, err
}

// claim locks the rows that are there and reads them, and returns the server's time. Before, it may make those
// that are missing.
func (s *Storage) claim(ctx context.Context, conn *pgx.Conn, r *record, create bool) (now int64, err error) {
	lock := s.options.Timeout * 8 / 10
	if !r.until.IsZero() {
		lock = min(lock, time.Until(r.until)-5*time.Millisecond)
	}
	settings, err := s.settings(ctx, lock)
	if err != nil {
		return 0, err
	}
	for _, row := range r.rows {
		row.version, row.buckets, row.fault, row.changed = 0, nil, nil, false
	}
	b := &pgx.Batch{}
	b.Queue(sqlBegin)
	b.Queue(sqlSettings, settings...)
	b.Queue(sqlNoScan)
	if create {
		b.Queue(s.sql.absent, idsOf(r.charged)).Exec(func(made pgconn.CommandTag) error {
			r.made = int(made.RowsAffected())
			r.fresh = r.fresh || r.made > 0
			return nil
		})
	}
	b.Queue(s.sql.claim, idsOf(r.rows)).Query(func(answer pgx.Rows) (err error) {
		now, err = r.scan(answer)
		return err
	})
	err = s.exchange(ctx, conn, b)
	return now, err
}

// scan reads the answer to s.sql.claim.
func (r *record) scan(answer pgx.Rows) (now int64, err error) {
	var place, version int64
	var at pgtype.TID
	_, err = pgx.ForEachRow(answer, []any{&place, &version, nil, &at, &now}, func() error {
		state, err := octets(answer, 2)
		if err != nil {
			return err
		}
		row := r.rows[place-1]
		row.at = at
		if row != r.origin {
			row.read(version, state)
			return nil
		}
		row.version = version
		r.last, err = row.sequence(state)
		return err
	})
	return now, err
}

// sequence reads the state column of an origin: zero in a row that is new.
func (r *row) sequence(state []byte) (int64, error) {
	if len(state) == 0 {
		return 0, nil
	}
	n, size := binary.Uvarint(state[1:])
	if state[0] != originFormat || size != len(state)-1 || int64(n) <= 0 {
		return 0, fmt.Errorf("%w: the row of the origin %.99q is none of this package's, or one of a later version", storage.ErrCorruptState, r.id)
	}
	return int64(n), nil
}

// charge does to the rows what the entries ask.
func (r *record) charge(now int64) {
	for i := range r.entries {
		e := &r.entries[i]
		e.left = !e.none && e.apply(e.row, now) != nil
	}
}

// columns are those of the rows that have changed, and of the origin's.
func (r *record) columns(now int64) []any {
	var c columns
	var at []pgtype.TID
	for _, row := range r.rows {
		if row == r.origin || !row.changed {
			continue
		}
		row.next = max(row.version+1, now)
		c.add(row)
		at = append(at, row.at)
	}
	c.ids = append(c.ids, r.origin.id)
	c.versions = append(c.versions, max(r.origin.version+1, now))
	c.before = append(c.before, r.origin.version)
	c.states = append(c.states, binary.AppendUvarint([]byte{originFormat}, uint64(r.seq)))
	c.fullAts = append(c.fullAts, now+originTime)
	c.clocked = append(c.clocked, false)
	return append(c.args(), append(at, r.origin.at))
}

// debts answer the batch.
func (r *record) debts(now int64) []replica.Debt {
	out := make([]replica.Debt, len(r.entries))
	for i := range r.entries {
		e := &r.entries[i]
		out[i] = e.debt
		if e.left {
			continue
		}
		at := now
		if e.clocked {
			at = e.now
		}
		out[i].Amounts = e.row.debt(e.rules, at)
	}
	return out
}
