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
// For every sweepEvery new rows a process looks at the next sweepRows rows of the table. That is twice as many, so a round
// through the table ends before the table has doubled, and in a table that only grows about half of the rows are full at
// most. Only new rows make a table grow, so this bound needs nothing else.
//
// A call for a row that was there counts as much only while looks find something. After a look that removed nothing it
// counts half of what it did, down to a 16th: looks cost up to a tenth of all, and a table that is in use all the time
// has nothing to remove. The 16th stays, or a table that was large once and has no new rows would never shrink.
//
// A look waits for no lock.
const (
	sweepEvery = 256
	sweepRows  = 2 * sweepEvery
	fullWeight = 16 // of a new row, and of any while looks find something
)

// sweeps is how far the table has been swept.
type sweeps struct {
	due    atomic.Int64 // weights of the rows that calls have looked at since the last look
	weight atomic.Int64 // of a row that was there, from 1 to fullWeight

	mu     sync.Mutex // guards what follows
	busy   bool
	closed bool
	after  []byte // the last row that was looked at
	wait   sync.WaitGroup
}

// count adds the rows of a batch, and reports whether a look is due.
func (w *sweeps) count(rows, fresh int) (due bool) {
	weights := int64(fresh)*fullWeight + int64(rows-fresh)*w.weight.Load()
	return w.due.Add(weights) >= sweepEvery*fullWeight
}

// swept counts the rows of a batch, of which some were not there, and sweeps if it is time. R is one of its requests. The
// server's clock was now: rows that were written since stay, because a client's clock may have been set back meanwhile.
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

// end keeps the place where the next look begins. One that failed is not repeated: the next one comes.
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
