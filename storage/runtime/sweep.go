package runtime

import (
	"context"
	"math"
	"math/bits"
	"math/rand/v2"
	"sync"

	"github.com/go-throttler/throttler/internal/law"
)

// Calls remove identifiers whose buckets are all full, whatever they ask and are answered. About every eighth call looks
// at four entries of the next shard, or at 32 if the last such call removed some, and goes on by 16 for each that it
// removes, up to 64. So a call costs little where there is nothing to remove, and calls catch up fast where there is. Of
// the calls by an injected clock every second does, as they alone can judge what was spent by it. Which calls do so is left
// to chance, so that no pattern of them leaves the entries of one clock to the calls by another.
const (
	sweepEvery = 8
	sweepFirst = 4
	sweepRich  = 32 // in place of sweepFirst, where the last call found some
	sweepMore  = 16
	sweepMost  = 64
	sweepHalf  = sweepMost / 2 // of a call that may do so twice
)

// sweep looks at entries, and removes those that are full. An entry by an injected clock is judged by the time of its
// own name only: time of one clock says nothing of another.
type sweep struct {
	name    string
	clocked bool // now is the time of the name's entries that are by an injected clock
	now     int64
	real    int64 // the time of all entries that are not

	first, most             int
	looked, judged, removed int
}

// sweep returns a sweep by a call of this name and time, which looks at most at so many entries.
func (s *Storage) sweep(name string, clocked bool, now int64, first, most int) sweep {
	w := sweep{name: name, clocked: clocked, now: now, real: now, first: first, most: most}
	if clocked {
		w.real = law.Monotonic()
		w.clocked = law.Clocked(now)
	}
	return w
}

func (w *sweep) goesOn() bool { return w.looked < w.most && w.judged < w.first+sweepMore*w.removed }

func (w *sweep) full(e *entry) bool {
	now := w.real
	if e.layout.clocked {
		if now = w.now; !w.clocked || w.name != e.layout.name {
			return false
		}
	}
	w.judged++
	return e.full(now)
}

// shard looks at n entries, those before number i first and then from the last one on, and returns the number of the
// one it ends at. It goes down: the entry that takes the number of a removed one has been looked at, or is new.
func (w *sweep) shard(sh *shard, i, n int) int {
	for ; n > 0 && w.goesOn(); n-- {
		if i == 0 || i > sh.n {
			i = sh.n
		}
		i--
		w.looked++
		sh.visited++
		if w.full(sh.entry(i)) {
			sh.remove(i)
			w.removed++
		}
	}
	return i
}

// due counts the identifiers of calls down to the next that sweeps.
func (sh *shard) due(clocked bool, identifiers int) bool {
	if clocked {
		identifiers *= sweepEvery / 2
	}
	if sh.wait -= identifiers; sh.wait > 0 {
		return false
	}
	sh.chance = sh.chance*6364136223846793005 + 1442695040888963407
	sh.wait = 1 + int(sh.chance>>32%(2*sweepEvery-1))
	return true
}

// tidy sweeps a little. The caller holds no lock, and it waits for none.
func (s *Storage) tidy(name string, clocked bool, now int64, most int) {
	first, rich := sweepFirst, s.rich.Load()
	if rich {
		first = sweepRich
	}
	w := s.sweep(name, clocked, now, first, most)
	s.walk(&w, (*sync.Mutex).TryLock)
	if found := w.removed > 0; found != rich {
		s.rich.Store(found)
	}
}

// walk looks at the shards that have entries, each at most once, from the one after that where the last walk ended. It
// leaves out those that it cannot lock.
func (s *Storage) walk(w *sweep, lock func(*sync.Mutex) bool) {
	first := int(s.hand.Load() % shards)
	i := s.next(first)
	for ; i < first+shards && w.goesOn(); i = s.next(i + 1) {
		if sh := &s.shards[i%shards]; lock(&sh.mu) {
			w.shard(sh, sh.start(), sh.n)
			sh.mu.Unlock()
		}
	}
	s.hand.Store(uint32(i))
	if w.removed > 0 {
		s.live.Add(-int64(w.removed))
	}
}

// start is before which entry a walk begins: of few the last, and else the golden section further each time. So a few
// looks are spread evenly, for entries that were made together are full together.
func (sh *shard) start() int {
	sh.turn += 0x9e3779b9
	if sh.n <= 8 {
		return sh.n
	}
	return int(uint64(sh.turn) * uint64(sh.n) >> 32)
}

// next is the first shard from i on that has entries. After the last comes the first; with none it is a round further.
func (s *Storage) next(i int) int {
	for end := i + shards; i < end; i = i/64*64 + 64 {
		if held := s.held[i%shards/64].Load() >> (i % 64); held != 0 {
			return i + bits.TrailingZeros64(held)
		}
	}
	return i
}

// sweepSome sweeps as a decision does, for a call that makes none.
func (s *Storage) sweepSome(name string, clocked bool, now int64) {
	if rand.IntN(sweepEvery) == 0 {
		s.tidy(name, clocked, now, sweepHalf)
	}
}

// Sweep removes all identifiers whose buckets are full, by the clock of this process, and says how many. Nobody needs
// to call it where calls go on, as those remove them too; it is for a storage that is hardly used any more.
// It takes each shard in small pieces, between which decisions go on, and ends with the context. Identifiers of a
// Config.Clock are removed by calls with that clock and name, and not by Sweep.
func (s *Storage) Sweep(ctx context.Context) (removed int64, err error) {
	for i := range s.shards {
		sh := &s.shards[i]
		for at := math.MaxInt; at > 0; {
			if err := ctx.Err(); err != nil {
				return removed, err
			}
			sh.mu.Lock()
			w := s.sweep("", false, law.Monotonic(), sweepMost, sweepMost)
			at = min(at, sh.n)
			at = w.shard(sh, at, at)
			sh.mu.Unlock()
			s.live.Add(-int64(w.removed))
			removed += int64(w.removed)
		}
	}
	return removed, nil
}
