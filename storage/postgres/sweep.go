package postgres

import (
	"bytes"
	"context"
	"sync"
	"sync/atomic"

	"github.com/jackc/pgx/v5"

	"github.com/go-throttler/throttler/storage"
)

// Rows whose buckets are all full are of no use. Who decides sweeps: for every sweepEvery rows that were
// decided on, one look at the next sweepRows of the table, twice as many, so that in a table that only grows
// at most about half of the rows are full. No lock is waited for.
const (
	sweepEvery = 256
	sweepRows  = 2 * sweepEvery
)

// sweeps is how far the table has been swept.
type sweeps struct {
	due atomic.Int64 // rows that were decided on since the last one

	mu     sync.Mutex // guards what follows
	busy   bool
	closed bool
	after  []byte // the last row that was looked at
	wait   sync.WaitGroup
}

// swept counts n rows that a flight has looked at, and sweeps if it is time. R is one of the requests. The server's
// clock was now: a row that has been written since may be by a client's clock that was set back.
func (s *Storage) swept(n int, r *storage.Request, now int64) {
	w := &s.sweeps
	if w.due.Add(int64(n)) < sweepEvery || !w.begin() {
		return
	}
	name, sent := "", int64(-1)
	if r.Clocked {
		name, sent = r.Name, r.Now
	}
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), s.options.Timeout)
		defer cancel()
		_, last, err := s.sweep(ctx, w.after, name, sent, now)
		w.end(last, err)
	}()
}

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

// end keeps the place where the next sweep begins. One that failed is not repeated: the next one comes.
func (w *sweeps) end(last []byte, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	defer w.wait.Done()
	w.busy = false
	if err == nil {
		w.after = last
	}
}

// close waits for a sweep in progress.
func (w *sweeps) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.wait.Wait()
}

func (s *Storage) sweep(ctx context.Context, after []byte, name string, sent, now int64) (removed int64, last []byte, err error) {
	if after == nil {
		after = []byte{}
	}
	b := &pgx.Batch{}
	b.Queue(begin)
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

// Sweep removes all rows whose buckets are full, by the server's clock, and says how many. Nobody needs to
// call it where calls go on, as those remove rows too; it is for a table that is hardly used any more.
// It takes the table in small pieces, waits for no lock, and ends with the context.
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
