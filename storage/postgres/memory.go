package postgres

import (
	"sync"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// memory is what a partition remembers: the rows as it wrote them, and the difference between the server's clock and
// the monotonic clock of this process. An admission from memory saves the read, which is one of its two round trips.
//
// The memory may be stale at any time, because other processes write the same rows. It is safe because nothing is
// decided by it without a proof:
//
//   - A row is written on the condition that it still has the remembered version. A version is never used twice, so the
//     content of the row is then the remembered one.
//   - A call that writes nothing (a denial, a Peek) has no such proof. Its row is always read.
//   - A batch that reads nothing estimates the server's time. Its write has a second condition: the server's clock is
//     at most 1 ms before and 5 ms after the estimate. So an admission is dated at most 5 ms early, and a server whose
//     clock was set is noticed. A batch that reads any row gets the time with it.
//
// A row leaves the memory when it is recalled and comes back when it is written. While an overdue batch still runs the
// next one may start; so the two can never decide by the same remembered row.
type memory struct {
	mu sync.Mutex // guards the fields below, which an overdue batch may use beside the next one

	// Rows are remembered in recent. After memoryTime, or with memoryRows rows, recent becomes old, and the former
	// old is dropped. That bounds the memory without keeping the order of use.
	recent, old map[string]remembered
	aging       int64 // when recent becomes old (law.Monotonic)

	offset   int64 // the server's clock minus law.Monotonic, in microseconds
	offsetAt int64 // when it was measured (law.Monotonic)
}

// remembered is a row as this process wrote it.
type remembered struct {
	version int64
	buckets []bucket
}

// Bounds of the memory. Rows are forgotten after 30 s at the latest. That must be less than tombstone: the row of an
// identifier that was reset must exist, with its new version, as long as a process may remember the old one.
const (
	memoryRows   = 1 << 16    // rows in recent, and as many in old
	memoryHolds  = 32         // most holds of a row that is remembered
	memoryTime   = 10_000_000 // microseconds until recent becomes old
	memoryOffset = 1_000_000  // microseconds after which the offset is too old to use, because clocks drift
	offsetTrip   = 4_000      // longest round trip that measures the offset, in microseconds: the server may read its clock at any time in it
)

// recall fills rows from memory and removes them from it. It returns the rows that must be read (those not
// remembered, and those with a call that does not ask to take tokens) and the estimated time of the server. If the
// offset is too old it recalls nothing.
func (m *memory) recall(rows []*row) (now int64, unknown []*row) {
	own := law.Monotonic()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.age(own)
	if own > m.offsetAt+memoryOffset {
		return 0, rows
	}
	for _, r := range rows {
		known, ok := m.find(r.id)
		if !ok || !r.takes() {
			unknown = append(unknown, r)
			continue
		}
		r.version, r.buckets, r.remembered = known.version, known.buckets, true
		delete(m.recent, string(r.id))
		delete(m.old, string(r.id))
	}
	return own + m.offset, unknown
}

// takes reports whether all calls of the row ask to take tokens, so that it is probably written.
func (r *row) takes() bool {
	for _, c := range r.calls {
		if c.Query.change != nil || c.Query.request.Mode == storage.Peek {
			return false
		}
	}
	return true
}

// find returns the row of an id, if it is remembered. The caller holds mu.
func (m *memory) find(id []byte) (known remembered, ok bool) {
	if known, ok = m.recent[string(id)]; !ok {
		known, ok = m.old[string(id)]
	}
	return known, ok
}

// remember keeps the rows that were written, except rows that other processes write too and rows with many holds.
func (m *memory) remember(rows []*row, shared *marks) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.age(law.Monotonic())
	for _, r := range rows {
		holds := 0
		for i := range r.buckets {
			holds += len(r.buckets[i].state.Holds())
		}
		if r.written && holds <= memoryHolds && !shared.marked(r.id) {
			m.recent[string(r.id)] = remembered{r.version, r.buckets}
		} else {
			delete(m.recent, string(r.id))
		}
	}
}

// age makes recent old if it is time. If two periods have passed, what becomes old now is dropped too. The caller
// holds mu.
func (m *memory) age(own int64) {
	if own >= m.aging || len(m.recent) >= memoryRows {
		m.recent, m.old = map[string]remembered{}, m.recent
		if own >= m.aging+memoryTime {
			m.old = nil
		}
		m.aging = own + memoryTime
	}
}

// setClock measures the offset. Now is the server's time in an answer that has just arrived, and sent is when the
// question was sent (law.Monotonic). A long round trip is ignored. The server has read its clock before the answer
// arrived, so the offset is too small by at most the round trip: estimates are early and never late, unless a clock
// is set.
func (m *memory) setClock(sent, now int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if own := law.Monotonic(); own-sent < offsetTrip {
		m.offset, m.offsetAt = now-own, own
	}
}
