package postgres

import (
	"github.com/go-throttler/throttler/storage"
)

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
