package postgres

import (
	"context"
	"slices"
	"sync"
	"time"

	combine "github.com/go-throttler/throttler/internal/batch"
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
	l.Queue = combine.New(combine.Options{InFlight: 1, Timeout: s.options.Timeout}, l.fly)
	return l
}

// fly executes a flight of calls of one identifier each.
func (l *lane) fly(ctx context.Context, flight []*call) {
	rows := rowsOf(flight)
	if now, ok := l.recall(flight, rows); ok {
		act(flight, rows, now)
		if taken(flight, rows) {
			l.s.swept(len(rows), &flight[0].Query.request, now)
			if rows = l.write(ctx, rows, now, true); len(rows) == 0 {
				return
			}
			flight = nil
			for _, r := range rows {
				flight = append(flight, r.calls...)
			}
		}
	}
	changed, now := l.look(ctx, flight, rows)
	for _, r := range l.write(ctx, changed, now, false) {
		l.contend(r)
	}
}

// contend has the calls of a row done again, under a lock, and later ones from the beginning.
func (l *lane) contend(r *row) {
	l.s.contended.mark(r.id, time.Second)
	contend(r.calls)
}

// taken reports whether every call has taken something, and every row is to be written.
func taken(flight []*call, rows []*row) bool {
	for _, c := range flight {
		if c.Err != nil || !c.Answer.verdict.Taken() {
			return false
		}
	}
	for _, r := range rows {
		if !r.changed {
			return false
		}
	}
	return true
}

// look is that of the Storage. It finds the offset of the clock, and whether rows that were remembered are shared
// with others.
func (l *lane) look(ctx context.Context, flight []*call, rows []*row) (changed []*row, now int64) {
	remembered := make([]int64, len(rows))
	for i, r := range rows {
		remembered[i] = r.version
	}
	sent := storage.Monotonic()
	changed, now = l.s.look(ctx, flight, rows)
	if now == 0 {
		return nil, 0
	}
	for i, r := range rows {
		if remembered[i] > 0 && remembered[i] != r.version {
			l.s.shared.mark(r.id, 10*time.Second)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if own := storage.Monotonic(); own-sent < offsetTrip {
		l.offset, l.offsetAt = now-own, own
	}
	return changed, now
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

// recall sets the rows to what is remembered and forgets it, if that is so of all of them and every call is to
// take, and returns what the server's clock is.
func (l *lane) recall(flight []*call, rows []*row) (now int64, ok bool) {
	for _, c := range flight {
		if c.Query.change != nil || c.Query.request.Mode == storage.Peek {
			return 0, false
		}
	}
	own := storage.Monotonic()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.age(own)
	if own > l.offsetAt+memoryOffset {
		return 0, false
	}
	for _, r := range rows {
		m, ok := l.find(r.id)
		if !ok {
			return 0, false
		}
		r.version, r.buckets = m.version, m.buckets
	}
	for _, r := range rows {
		delete(l.known, string(r.id))
		delete(l.old, string(r.id))
	}
	return own + l.offset, true
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
