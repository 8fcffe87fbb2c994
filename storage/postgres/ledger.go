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

// The ledger records in batches what another store has admitted, and charges each batch once. The row of an origin
// holds the number of its last batch. It is locked and written in the transaction that charges the batch, so either
// both are stored or neither is. A batch that is sent again finds its number there and charges nothing. If the answer
// to a batch is slow and it is sent again, the second attempt waits at the lock of that row until the first has
// ended.
//
// A batch takes two round trips. The first locks all rows in the order of their ids and reads them. The second writes
// them by their ctid, the place where they were found. Missing rows are inserted before any lock is taken. To save
// that statement it runs only if the previous batch needed it; otherwise missing rows are noticed after locking, and
// the batch begins again.

// maxOrigin is the longest origin, in bytes.
const maxOrigin = 64

// originTime is how long the row of an origin stays after its last batch, in microseconds: one hour.
const originTime = 3_600_000_000

// originFormat is the first byte of the state column in the row of an origin. The sequence number follows as a varint.
const originFormat = 0xff

// record is one batch.
type record struct {
	entries []entry
	rows    []*row    // of all entries and the origin, sorted by id
	charged []*row    // the rows that must exist, with the origin's, sorted by id; none if the batch only reads
	origin  *row      // nil if nothing is charged
	seq     int64     // the number of the batch
	last    int64     // the last number of the origin, as it was read
	fresh   bool      // rows were missing in some attempt
	made    int       // how many rows were inserted
	until   time.Time // the deadline of the caller; zero if there is none
}

// entry is one charge of a batch.
type entry struct {
	change
	row  *row
	none bool         // all amounts are zero
	left bool         // it could not be charged and was left out
	debt replica.Debt // the answer, without its Amounts until the batch is done
}

// Record charges all entries of a batch once, and refunds the negative amounts. It returns for each entry the debts
// of its buckets after the whole batch, as Debt does. Several entries may have the same identifier, with different
// rules, and each entry may have a clock of its own.
//
// Origin has 1 to 64 bytes and no colon. It stands for one process from its start to its end, and must not be used
// again. Seq is above zero and grows from batch to batch. A batch whose seq is not above the last one of its origin
// has been charged before, so Record only returns the debts. A batch that failed, or whose answer was lost, may
// therefore be sent again with the same seq, until an hour after the last batch of the origin. If all amounts are
// zero, Record only reads: it locks and writes nothing, and needs neither origin nor seq.
//
// An entry is left out, and its Amounts in the answer are nil, if its row cannot be read or would have more than
// law.MaxBuckets buckets. If the row of the origin cannot be read, nothing is charged, and the error is
// ErrCorruptState.
//
// Record takes no longer than ctx and Options.Timeout allow. If a lock is not granted in time the error is
// ErrUnavailable, and nothing was charged. After any other failure, or if ctx ends during the call, the batch may
// have been charged.
//
// Record is safe for concurrent use. But if a later batch of the same origin is charged first, the earlier one counts
// as charged and is lost. The rules must never change.
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

// newRecord makes a record of a batch, and copies everything that the caller may change after it has left.
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

// validateOrigin checks the arguments of a batch that charges. Without a colon an origin cannot be the id of an
// identifier.
func validateOrigin(origin string, seq int64) error {
	if origin == "" || len(origin) > maxOrigin || strings.Contains(origin, ":") {
		return fmt.Errorf("throttler: postgres: the origin %.99q of a batch must have 1 to %d bytes and no colon", origin, maxOrigin)
	}
	if seq <= 0 {
		return fmt.Errorf("throttler: postgres: the sequence number of a batch is %d, must be above zero", seq)
	}
	return nil
}

// addRows adds the rows of the entries, one for each identifier, and sorts all rows by id.
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

// consult reads the rows of a batch that charges nothing, and returns the server's time.
func (s *Storage) consult(ctx context.Context, r *record) (now int64, err error) {
	err = s.query(ctx, s.sql.read, idsOf(r.rows), func(answer pgx.Rows) (err error) {
		_, err = scan(answer, r.rows, &now)
		return err
	})
	return now, err
}

// enter charges the batch. It begins again if Postgres rolls it back, up to three attempts in all, and if rows are
// missing when they are locked. From the second attempt on missing rows are inserted first.
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
			_, _ = conn.Exec(ctx, "ROLLBACK") // or else Release would close the connection
		}
		if err != nil && (again >= 2 || !rolledBack(err)) {
			return 0, err
		}
	}
}

// enterOnce is one attempt of enter. Without an error, done is false if rows were missing. Then nothing was charged,
// and the transaction is still open.
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
		b.Queue("ROLLBACK") // it was charged before, and the rows that this attempt inserted are not needed
	} else {
		r.charge(now)
		b.Queue(s.sql.record, r.columns(now)...)
		b.Queue("COMMIT")
	}
	err = s.exchange(ctx, conn, b)
	return now, err == nil, err
}

// claim begins a transaction, locks the rows that exist and reads them. If create is set it inserts the missing rows
// first. It returns the server's time. A lock is waited for until shortly before the caller leaves, so that the
// server's answer, which proves that nothing was charged, still arrives.
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

// scan reads the answer to s.sql.claim into the rows, and returns the server's time.
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

// sequence decodes the state column of an origin: the number of its last batch, or zero in a new row.
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

// charge applies the entries to the rows, in order. An entry that a row does not take is left out.
func (r *record) charge(now int64) {
	for i := range r.entries {
		e := &r.entries[i]
		e.left = !e.none && e.apply(e.row, now) != nil
	}
}

// columns returns the parameters of sqlRecord: the changed rows, and the row of the origin with the number of the
// batch.
func (r *record) columns(now int64) []any {
	var c columns
	var at []pgtype.TID
	for _, row := range r.rows {
		if row == r.origin || !row.changed {
			continue
		}
		row.next = row.nextVersion(now)
		c.add(row)
		at = append(at, row.at)
	}
	c.ids = append(c.ids, r.origin.id)
	c.versions = append(c.versions, r.origin.nextVersion(now))
	c.before = append(c.before, r.origin.version)
	c.states = append(c.states, binary.AppendUvarint([]byte{originFormat}, uint64(r.seq)))
	c.fullAts = append(c.fullAts, now+originTime)
	c.clocked = append(c.clocked, false)
	return append(c.args(), append(at, r.origin.at))
}

// debts returns the answer to the batch, by the clock of each entry or else by the server's.
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
