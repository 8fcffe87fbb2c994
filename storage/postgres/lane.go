package postgres

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/go-throttler/throttler/internal/combine"
	"github.com/go-throttler/throttler/storage"
)

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

// memory is a row as it was written.
type memory struct {
	version int64
	buckets []bucket
}

// Bounds of the memory: the rows that are known, and how many more are old; the holds of a row; and times in
// microseconds. What is known is forgotten after 30 s at the latest, which is less than tombstone.
const (
	memoryRows   = 1 << 16
	memoryHolds  = 32
	memoryTime   = 10_000_000
	memoryOffset = 1_000_000
	offsetTrip   = 4_000 // an offset from a longer round trip is of no use
)

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

// contend has the calls of a row done again, under a lock, and later ones from the beginning.
func (l *lane) contend(r *row) {
	l.s.contended.mark(r.id, time.Second)
	contend(r.calls)
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

// recall sets the rows to what is remembered and forgets it, where every call is to take. It returns the others, and what the server's clock is.
func (l *lane) recall(rows []*row) (now int64, unknown []*row) {
	own := storage.Monotonic()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.age(own)
	if own > l.offsetAt+memoryOffset {
		return 0, rows
	}
	for _, r := range rows {
		m, ok := l.find(r.id)
		if !ok || !r.toTake() {
			unknown = append(unknown, r)
			continue
		}
		r.version, r.buckets, r.remembered = m.version, m.buckets, true
		delete(l.known, string(r.id))
		delete(l.old, string(r.id))
	}
	return own + l.offset, unknown
}

func (r *row) toTake() bool {
	for _, c := range r.calls {
		if c.Query.change != nil || c.Query.request.Mode == storage.Peek {
			return false
		}
	}
	return true
}

func (l *lane) find(id []byte) (m memory, ok bool) {
	if m, ok = l.known[string(id)]; !ok {
		m, ok = l.old[string(id)]
	}
	return m, ok
}

// remember keeps the rows that were written, but for those that others write too or that are large.
func (l *lane) remember(rows []*row) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.age(storage.Monotonic())
	for _, r := range rows {
		holds := 0
		for i := range r.buckets {
			holds += len(r.buckets[i].state.Holds())
		}
		if r.written && holds <= memoryHolds && !l.s.shared.marked(r.id) {
			l.known[string(r.id)] = memory{r.version, r.buckets}
		} else {
			delete(l.known, string(r.id))
		}
	}
}

func (l *lane) age(own int64) {
	if own >= l.aging || len(l.known) >= memoryRows {
		l.known, l.old = map[string]memory{}, l.known
		if own >= l.aging+memoryTime {
			l.old = nil
		}
		l.aging = own + memoryTime
	}
}
