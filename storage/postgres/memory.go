package postgres

import (
	"sync"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// memory is what a partition remembers: the rows that it has written, as it wrote them, and how far the server's clock is
// from the monotonic one of this process. An admission from memory saves the read, which is half of its round trips.
//
// The memory may be stale at any time, since other processes write the same rows. It is safe because it is never believed
// without a proof:
//
//   - A row is written on the condition that its version is the remembered one. Versions are never used twice, so the row is
//     then as it was remembered.
//   - What writes nothing (a denial, a Peek) has no such proof, and is always read.
//   - If a batch reads nothing the time is an estimate, and the write has the second condition that the server's clock is at
//     most 1 ms before and 5 ms after it. So an admission is dated at most 5 ms early, and a server whose clock was set is
//     noticed. If a batch reads any row it has the time from there.
//
// A row leaves the memory when it is recalled and comes back when it was written. So a batch that is overdue, and the next
// one, which starts meanwhile, cannot both build upon one memory.
type memory struct {
	mu sync.Mutex // guards all below, as a batch that is overdue may still run beside the next one

	// Rows are remembered in recent, which becomes old after memoryTime or memoryRows. What is old is dropped when the next
	// becomes old. That bounds the memory without a list of what was used last.
	recent, old map[string]remembered
	aging       int64 // when recent becomes old

	offset   int64 // of the server's clock to ours, in microseconds
	offsetAt int64 // when it was measured
}

// remembered is a row as it was written.
type remembered struct {
	version int64
	buckets []bucket
}

// Bounds of the memory. Rows are forgotten after 30 s at the latest, which has to be less than tombstone: a row that was reset
// must be there as long as somebody may remember what it was before.
const (
	memoryRows   = 1 << 16    // of recent, and as many are old
	memoryHolds  = 32         // of a row
	memoryTime   = 10_000_000 // microseconds
	memoryOffset = 1_000_000  // microseconds after which the offset is no longer believed, as clocks drift
	offsetTrip   = 4_000      // microseconds of the longest round trip that measures it: the server read its clock at any time of it
)

// recall fills the rows from memory and removes them from it, where all calls of a row take tokens. It returns the others and
// the estimated time of the server. Without a recent offset it recalls nothing.
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

// takes reports whether all calls of the row ask to take tokens.
func (r *row) takes() bool {
	for _, c := range r.calls {
		if c.Query.change != nil || c.Query.request.Mode == storage.Peek {
			return false
		}
	}
	return true
}

func (m *memory) find(id []byte) (known remembered, ok bool) {
	if known, ok = m.recent[string(id)]; !ok {
		known, ok = m.old[string(id)]
	}
	return known, ok
}

// remember keeps rows that were written, unless others write them too or they are large.
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

func (m *memory) age(own int64) {
	if own >= m.aging || len(m.recent) >= memoryRows {
		m.recent, m.old = map[string]remembered{}, m.recent
		if own >= m.aging+memoryTime {
			m.old = nil
		}
		m.aging = own + memoryTime
	}
}

// setClock notes that the server's clock was now in answer to what was sent at that time of ours.
func (m *memory) setClock(sent, now int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if own := law.Monotonic(); own-sent < offsetTrip {
		m.offset, m.offsetAt = now-own, own
	}
}
