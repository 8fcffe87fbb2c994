package watch

// Which identifiers ask for most.

import (
	"maps"
	"strings"

	"github.com/apache/datasketches-go/frequencies"
)

const (
	counters = 1 << 10 // in one sketch
	heavyOf  = 1000    // an identifier is heavy above one in this many of all tokens or denials
	maxNames = 4096    // more than the four sketches of a shard track: three quarters of their counters each
	longest  = 128     // bytes kept of an identifier
	mostCost = 1 << 40 // tokens; a larger cost counts as this much, so that no sum overflows
)

// minute holds what identifiers did in one minute, by their hashes, and how long decisions took.
type minute struct {
	number        int64
	asked, denied *frequencies.LongsSketch
	latency       [maxSources + 1]histogram // by the index of the source
}

func newMinute(number int64) *minute {
	asked, _ := frequencies.NewLongsSketchWithMaxMapSize(counters) // fails only if the size is not a power of two
	denied, _ := frequencies.NewLongsSketchWithMaxMapSize(counters)
	return &minute{number: number, asked: asked, denied: denied}
}

// turnMinute begins the minute of this number, unless it is the present one.
func (s *shard) turnMinute(number int64) {
	if number == s.this.number {
		return
	}
	s.last, s.this = s.this, newMinute(number)
	if s.last.number < number-1 {
		s.last = newMinute(number - 1)
	}
	s.forgetNames()
}

// known is an identifier whose name is kept, and what it did since the last flush. Most calls are of few identifiers, and
// adding to these numbers takes less time than a sketch.
type known struct{ hash, asked, denied int64 }

func (s *shard) knownAt(hash int64) *known { return &s.known[uint64(hash)%uint64(len(s.known))] }

// flush moves the numbers to the sketches of the minute.
func (k *known) flush(m *minute) {
	if k.asked > 0 {
		_ = m.asked.UpdateMany(k.hash, k.asked) // fails only for a negative count
		_ = m.denied.UpdateMany(k.hash, k.denied)
	}
	k.asked, k.denied = 0, 0
}

// add adds what was asked for in one call.
func (k *known) add(cost int64, denied bool) {
	if cost <= 0 {
		return
	}
	k.asked += min(cost, mostCost)
	if denied {
		k.denied++
	}
}

// asked counts what an identifier asked for. Its name is kept only once it is heavy, so a flood of identifiers that each
// ask for little takes no memory.
func (s *shard) asked(hash int64, a asking) {
	if k := s.knownAt(hash); k.hash == hash {
		k.add(a.cost, a.denied)
		return
	}
	now := known{hash: hash}
	now.add(a.cost, a.denied)
	now.flush(s.this)
	if heavyIn(s.this.asked, hash) || a.denied && heavyIn(s.this.denied, hash) {
		s.keepName(hash, a.identifier)
	}
}

func heavyIn(s *frequencies.LongsSketch, hash int64) bool {
	least, _ := s.GetLowerBound(hash) // never fails
	return least > s.GetStreamLength()/heavyOf
}

func (s *shard) keepName(hash int64, id string) {
	k := s.knownAt(hash)
	k.flush(s.this)
	k.hash = hash
	if _, ok := s.names[hash]; ok {
		return
	}
	if len(s.names) >= maxNames {
		s.forgetNames()
	}
	if s.watch.options.Mask != nil {
		id = s.mask(id)
	}
	s.names[hash] = strings.Clone(id[:min(len(id), longest)])
}

// mask calls Mask and unlocks the shard if that panics; otherwise all later calls would block forever. The functions that
// lock the shard unlock it without defer, because defer takes a tenth of their time.
func (s *shard) mask(id string) string {
	panics := true
	defer func() {
		if panics {
			s.mu.Unlock()
		}
	}()
	id = s.watch.options.Mask(id)
	panics = false
	return id
}

func (s *shard) flushKnown() {
	for i := range s.known {
		s.known[i].flush(s.this)
	}
}

// forgetNames removes the names of identifiers that no sketch tracks any more.
func (s *shard) forgetNames() {
	s.flushKnown()
	clear(s.known[:])
	maps.DeleteFunc(s.names, func(hash int64, _ string) bool {
		h := s.heavy(hash)
		return h.AskedLeast == 0 && h.DeniedLeast == 0
	})
}

// heavy returns what an identifier did in this minute and in the last one.
func (s *shard) heavy(hash int64) (h Heavy) {
	for _, m := range [...]*minute{s.this, s.last} {
		asked, _ := m.asked.GetUpperBound(hash)
		askedLeast, _ := m.asked.GetLowerBound(hash)
		denied, _ := m.denied.GetUpperBound(hash)
		deniedLeast, _ := m.denied.GetLowerBound(hash)
		h.Asked, h.AskedLeast = h.Asked+asked, h.AskedLeast+askedLeast
		h.Denied, h.DeniedLeast = h.Denied+denied, h.DeniedLeast+deniedLeast
	}
	return h
}
