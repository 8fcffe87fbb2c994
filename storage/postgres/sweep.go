package postgres

import (
	"bytes"
	"context"
	"sync"
	"sync/atomic"

	"github.com/jackc/pgx/v5"

	"github.com/go-throttler/throttler/storage"
)

// Calls pay for the removal of rows whose buckets are all full.
//
// After every sweepEvery new rows a process sweeps: it examines the next sweepRows rows of the table. That is twice
// as many rows, so a round through the table ends before the table has doubled. In a table that only grows, about
// half of the rows are full at most. Only new rows make a table grow, so this bound needs nothing else.
//
// A call for an existing row counts like a new row only while sweeps remove rows. After a sweep that removed nothing
// it counts half as much, down to a 16th. Otherwise sweeps would take up to a tenth of the time, for nothing in a
// table that is in use all the time. It never counts less, or a table that was large once and gets no new rows would
// never shrink.
//
// A sweep waits for no lock.
const (
	sweepEvery = 256
	sweepRows  = 2 * sweepEvery
	fullWeight = 16 // of a new row, and of any row while sweeps remove some
)

// sweeps is the progress of the sweeps through the table.
type sweeps struct {
	due    atomic.Int64 // the weights of the rows that calls have asked for since the last sweep
	weight atomic.Int64 // of an existing row, from 1 to fullWeight

	mu     sync.Mutex // guards the fields below; only the sweep that has set busy reads after without it
	busy   bool       // a sweep is running
	closed bool
	after  []byte // the last row that was examined; nil at the beginning of the table
	wait   sync.WaitGroup
}

// count adds the rows of a batch, fresh of which did not exist, and reports whether a sweep is due.
func (w *sweeps) count(rows, fresh int) (due bool) {
	weights := int64(fresh)*fullWeight + int64(rows-fresh)*w.weight.Load()
	return w.due.Add(weights) >= sweepEvery*fullWeight
}

// swept counts the rows of a batch, fresh of which did not exist, and starts a sweep if one is due. R is any request
// of the batch: if it has a caller's time, rows with that clock are removed too. Now is the server's time of the
// batch. Of rows with a client's clock those written later stay, because that clock may have been set back since.
func (s *Storage) swept(rows, fresh int, r *storage.Request, now int64) {
	w := &s.sweeps
	if !w.count(rows, fresh) || !w.begin() {
		return
	}
	name, sent := "", int64(-1)
	if r.Clocked {
		name, sent = r.Name, r.Now
	}
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), s.options.Timeout)
		defer cancel()
		removed, last, err := s.sweep(ctx, w.after, name, sent, now)
		w.end(removed, last, err)
	}()
}

// begin reports whether a sweep may start: none is running, and the storage is not closed. If so, end must follow.
func (w *sweeps) begin() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.busy || w.closed {
		return false
	}
	w.busy = true
	w.due.Store(0)
	w.wait.Add(1)
	return true
}

// end keeps the place where the next sweep begins, and adapts the weight. A sweep that failed is not repeated at
// once: the next one begins at the same place.
func (w *sweeps) end(removed int64, last []byte, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	defer w.wait.Done()
	w.busy = false
	if err == nil {
		w.after = last
	}
	if removed > 0 {
		w.weight.Store(fullWeight)
	} else {
		w.weight.Store(max(1, w.weight.Load()/2))
	}
}

// close prevents further sweeps, and waits for the one that is running.
func (w *sweeps) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.wait.Wait()
}

// sweep executes sqlSweep once, and once more if a pooler has lost the prepared statement.
func (s *Storage) sweep(ctx context.Context, after []byte, name string, sent, now int64) (removed int64, last []byte, err error) {
	if after == nil {
		after = []byte{}
	}
	b := &pgx.Batch{}
	b.Queue(sqlBegin)
	b.Queue(s.sql.sweep, after, sweepRows, []byte(name+":"), []byte(name+";"), sent, now).Query(func(r pgx.Rows) error {
		_, err := pgx.ForEachRow(r, []any{&removed, nil}, func() (err error) {
			last, err = octets(r, 1)
			last = bytes.Clone(last)
			return err
		})
		return err
	})
	b.Queue("COMMIT")
	if err = s.exchangeAny(ctx, b); forgotten(err) {
		err = s.exchangeAny(ctx, b)
	}
	return removed, last, err
}

// Sweep removes all rows whose buckets are full by the server's clock, and returns how many. Rows with a clock of
// their throttler (Config.Clock) stay. Calls remove full rows too, so Sweep is needed only for a table that is hardly
// used any more.
//
// Sweep examines the table in small pieces, waits for no lock, and ends when ctx does. The error is that of ctx,
// ErrClosed, or one that wraps ErrUnavailable. It is safe for concurrent use.
func (s *Storage) Sweep(ctx context.Context) (removed int64, err error) {
	for last := []byte(nil); ; {
		if s.closed.Load() {
			return removed, storage.ErrClosed
		}
		n, next, err := s.sweep(ctx, last, "", -1, 0)
		removed += n
		if err != nil {
			return removed, wrap(ctx, err)
		}
		if last = next; last == nil {
			return removed, nil
		}
	}
}
