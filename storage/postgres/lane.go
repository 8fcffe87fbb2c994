package postgres

import (
	"context"
	"sync"
	"time"

	"github.com/go-throttler/throttler/internal/combine"
	"github.com/go-throttler/throttler/storage"
)

// lane executes the calls of some identifiers, one flight after the other. It remembers the rows that it has
// written, and what the server's clock said: an admission from memory saves the round trip of a read, and is
// written on the condition that the memory is right. Everything else is read: what writes nothing is
// not found out to be wrong.
type lane struct {
	*combine.Queue[query, answer]
	s *Storage

	mu         sync.Mutex // guards what follows; a flight that is stuck does not keep the next one from starting
	known, old map[string]known
	aging      int64 // when known becomes old and what was old is forgotten
	ahead      int64 // how far the server's clock was ahead of ours when it was read, at least, in microseconds
	heard      int64 // when that was
}

// known is a row as it was written.
type known struct {
	version int64
	buckets []bucket
}

// Bounds of the memory: the rows that are known, and how many more are old, and times in microseconds. In a
// second two clocks do not drift apart by more than the time of a round trip, by which what is remembered of the
// clock is behind.
const (
	memory      = 1 << 16
	memoryRow   = 10_000_000 // and as long again; less than tombstone in all
	memoryClock = 1_000_000
)

func newLane(s *Storage) *lane {
	l := &lane{s: s}
	l.Queue = combine.New(combine.Options{Flights: 1, Timeout: s.options.Timeout}, l.fly)
	return l
}

// fly executes a flight of calls of one identifier each.
func (l *lane) fly(ctx context.Context, flight []*call) {
	rows := rowsOf(flight)
	if now, ok := l.recall(rows); ok && len(act(flight, rows, now)) == len(rows) && taken(flight) {
		l.s.swept(len(rows), flight)
		late, locked := l.write(ctx, rows, now)
		if locked || len(late) == 0 {
			l.contend(late)
			return
		}
		rows, flight = late, nil
		for _, r := range rows {
			l.s.shared.mark(r.id, 10*time.Second)
			flight = append(flight, r.calls...)
		}
	}
	if changed, now := l.look(ctx, flight, rows); len(changed) > 0 {
		late, _ := l.write(ctx, changed, now)
		l.contend(late)
	}
}

// taken reports whether every call is a decision that took something.
func taken(flight []*call) bool {
	for _, c := range flight {
		if c.Err != nil || !c.Answer.verdict.Taken() {
			return false
		}
	}
	return true
}

// look is that of the Storage, and remembers the clock.
func (l *lane) look(ctx context.Context, flight []*call, rows []*row) (changed []*row, now int64) {
	changed, now = l.s.look(ctx, flight, rows)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.heard = storage.Monotonic()
	l.ahead = now - l.heard
	return changed, now
}

// write writes rows, and returns those that somebody else has written, or all of them if a lock has to be waited
// for. The calls of those that fail otherwise have the error.
func (l *lane) write(ctx context.Context, rows []*row, now int64) (late []*row, locked bool) {
	err := l.s.write(ctx, rows, now)
	locked = code(err) == lockNotAvailable
	for _, r := range rows {
		switch {
		case !r.changed:
			l.remember(r)
		case err == nil || rolledBack(err) || locked:
			late = append(late, r)
		default:
			l.s.fail(r.calls, err)
		}
	}
	return late, locked
}

// contend answers the calls of rows that they have to be done under a lock.
func (l *lane) contend(rows []*row) {
	for _, r := range rows {
		l.s.contended.mark(r.id, time.Second)
		for _, c := range r.calls {
			c.Answer, c.Err = answer{contended: true}, nil
		}
	}
}

// recall sets the rows to what is remembered and forgets it, if all of them are, and returns what the server's
// clock is now.
func (l *lane) recall(rows []*row) (now int64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	own := storage.Monotonic()
	l.age(own)
	if own > l.heard+memoryClock || len(rows) > len(l.known)+len(l.old) {
		return 0, false
	}
	for _, r := range rows {
		k, ok := l.known[string(r.id)]
		if !ok {
			k, ok = l.old[string(r.id)]
		}
		if !ok {
			return 0, false
		}
		r.version, r.buckets = k.version, k.buckets
	}
	for _, r := range rows {
		delete(l.known, string(r.id))
		delete(l.old, string(r.id))
	}
	return own + l.ahead, true
}

// remember keeps a row that was written, unless others write it too.
func (l *lane) remember(r *row) {
	if l.s.shared.marked(r.id) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.age(storage.Monotonic())
	l.known[string(r.id)] = known{r.version, r.buckets}
}

func (l *lane) age(own int64) {
	if own >= l.aging || len(l.known) >= memory {
		l.known, l.old = map[string]known{}, l.known
		if own >= l.aging+memoryRow {
			l.old = nil
		}
		l.aging = own + memoryRow
	}
}
