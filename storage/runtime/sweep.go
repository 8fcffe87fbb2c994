package runtime

import (
	"context"
	"math"
	"math/bits"
	"math/rand/v2"
	"sync"

	"github.com/go-throttler/throttler/internal/law"
)

// Calls pay for cleaning: each call, whatever it asks and is answered, may have to remove identifiers whose buckets are
// all full. A goroutine that did it instead would have to be stopped, would keep a storage that nobody uses from being
// collected, and could not know the time of an injected clock.
//
// About every eighth call sweeps. It looks at four entries from the next shard on, or at 32 if the sweep before removed
// any, and at 16 more for each entry that it removes, up to 64. So a call costs little when there is nothing to remove,
// and calls catch up fast when there is. Of the calls by an injected clock every second one sweeps, because only they
// can judge the entries that were spent by it.
//
// Chance decides which calls sweep. If it were exactly each eighth, a program whose every eighth call is by the same
// clock would leave the entries of its other clocks alone forever.
const (
	sweepEvery = 8             // calls for each that sweeps, on average
	sweepFirst = 4             // entries that a sweep looks at in any case
	sweepRich  = 32            // as sweepFirst, if the sweep before removed any
	sweepMore  = 16            // further entries for each that was removed
	sweepMost  = 64            // the most entries that a call looks at
	sweepHalf  = sweepMost / 2 // the same for each of two sweeps, of a call that may have to search for room as well
)

// sweep is one look at some entries, which removes those that are full. An entry by an injected clock is judged only by
// calls of its own name with such a clock: the time of one clock says nothing about another.
type sweep struct {
	name    string
	clocked bool  // now is the time of the name's entries that are by an injected clock
	now     int64 // in microseconds, as is real
	real    int64 // the time, by law.Monotonic, of all entries that are by the storage's own clock

	// First is how many entries to judge in any case, and most how many to look at, judged or not.
	first, most int
	// Of the entries looked at, those are judged that are by a clock whose time is known.
	looked, judged, removed int
}

// sweep returns a sweep on behalf of a call with this name, clock and time, which looks at no more than most entries.
// Without clocked, now is law.Monotonic. An injected time that the arithmetic cannot hold judges nothing.
func (s *Storage) sweep(name string, clocked bool, now int64, first, most int) sweep {
	w := sweep{name: name, clocked: clocked, now: now, real: now, first: first, most: most}
	if clocked {
		w.real = law.Monotonic()
		w.clocked = law.Clocked(now)
	}
	return w
}

// goesOn reports whether the sweep may look at one more entry. Entries that it cannot judge count towards most only, so
// they do not use up the few looks that may find something.
func (w *sweep) goesOn() bool { return w.looked < w.most && w.judged < w.first+sweepMore*w.removed }

// full reports whether an entry may be removed: its time is known, and all its buckets are full.
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

// shard looks at up to n entries of a locked shard, from number i-1 down and then from the last one down. It returns
// the number at which it ends.
//
// It goes down because remove gives the number of a removed entry to the last one. From the last number down, that
// entry has been looked at already or is new, so none is left out. A walk that begins in the middle may miss one in
// this way, which a later walk finds.
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

// due counts a call with this many identifiers, and reports whether it has to sweep. A call by an injected clock counts
// sweepEvery/2 times. Then it draws how many to wait until the next: 1 to 15, which is sweepEvery on average. Each
// shard counts for itself, since a count for all of them would be written by all processors. The shard is locked.
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

// tidy sweeps after a call. The caller holds no lock. Tidy waits for none either: a shard that is in use is left out,
// so cleaning never delays a call.
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

// walk sweeps the shards that have entries, each at most once, from the one after that where the last walk ended. It
// leaves out those that lock does not lock. It holds the lock of one shard at a time. Concurrent walks may begin at the
// same shard, which only costs a little work.
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

// start returns the number before which a walk of the shard begins. With few entries it is the last. With more it moves
// on by the golden section of their number each time, which spreads the starts evenly. Entries that were made together
// become full together, so a few looks far apart find them sooner than many side by side.
func (sh *shard) start() int {
	sh.turn += 0x9e3779b9
	if sh.n <= 8 {
		return sh.n
	}
	return int(uint64(sh.turn) * uint64(sh.n) >> 32)
}

// next returns the first shard from number i on that has entries. Numbers of 256 and more mean the shards from the
// first on again. If no shard has entries it returns a number at least a round later.
func (s *Storage) next(i int) int {
	for end := i + shards; i < end; i = i/64*64 + 64 {
		if held := s.held[i%shards/64].Load() >> (i % 64); held != 0 {
			return i + bits.TrailingZeros64(held)
		}
	}
	return i
}

// sweepSome is for a call that makes no decision: a Reset, and a call without parts or whose context has ended. It has
// no shard in which it could count, so chance alone decides whether it sweeps.
func (s *Storage) sweepSome(name string, clocked bool, now int64) {
	if rand.IntN(sweepEvery) == 0 {
		s.tidy(name, clocked, now, sweepHalf)
	}
}

// Sweep removes all identifiers whose buckets are full, by the clock of this process, and returns how many it has
// removed. A storage that is in use does not need it, because calls remove them too. It is for one that is hardly used
// any more.
//
// It takes each shard in small pieces, between which decisions go on, and is safe for concurrent use. If ctx ends it
// returns its error, and how many it had removed by then. Identifiers that were spent by a Config.Clock are not removed
// by Sweep but by calls with that clock and name.
func (s *Storage) Sweep(ctx context.Context) (removed int64, err error) {
	for i := range s.shards {
		sh := &s.shards[i]
		for at := math.MaxInt; at > 0; {
			if err := ctx.Err(); err != nil {
				return removed, err
			}
			sh.mu.Lock()
			w := s.sweep("", false, law.Monotonic(), sweepMost, sweepMost)
			at = min(at, sh.n) // others may have removed entries since the last piece
			at = w.shard(sh, at, at)
			sh.mu.Unlock()
			s.live.Add(-int64(w.removed))
			removed += int64(w.removed)
		}
	}
	return removed, nil
}
