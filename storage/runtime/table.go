package runtime

// The hash table of identifiers. It is made by hand because a Go map does not fit in three ways: a map of structs moves
// its entries as it grows, while a map of pointers costs an allocation and a pointer for each; a map never gives memory
// back after a flood of identifiers; and a sweep could not go on where the last one ended.
//
// The pieces:
//
//   - Shards. The upper 8 bits of an identifier's hash choose one of 256 shards, each with a mutex of its own. With few
//     shards concurrent calls would meet at the same mutex. With 256, the number of a shard is a byte, and calls by as
//     many processors as machines have seldom meet.
//   - Chunks. The entries of a shard are numbered without gaps from 0 on, and lie in chunks of 32. A shard that grows
//     allocates one more chunk, copies nothing, and moves no entry. It has room for less than two chunks more than it
//     needs, while a slice that doubles would leave up to half of its memory empty.
//   - Slots. The index from hashes to numbers is an array of words, searched by open addressing: from the identifier's
//     place on, up to the first free slot. A word has the number of the entry, plus one, and its tag.
//   - Tags. The tag is the lower 32 bits of the hash. It says at which slot a search begins, and it is compared before
//     the identifier is: so a search looks at an entry, which is elsewhere in memory, only if that is nearly certainly
//     the one. It also lets the index grow without hashing again.
//   - Layouts. Entries of the same name, clock and rules share one layout, so an entry need not say what its cells are.

import (
	"hash/maphash"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/go-throttler/throttler/internal/law"
)

const (
	shards = 256
	chunk  = 32 // entries allocated together
)

// shard is a hash table for the identifiers whose hashes begin with its number.
type shard struct {
	index   int      // the number of this shard; never changes
	storage *Storage // never changes

	mu      sync.Mutex // guards all that follows, the entries, and the shard's bit in Storage.held
	slots   []uint64   // tag<<32 | number+1; 0 is free. The length is a power of two, at most three quarters are used
	chunks  []*[chunk]entry
	n       int    // entries
	turn    uint32 // where the last walk began, as a fraction of the entries, in units of 2^-32
	wait    int    // identifiers that calls may still name until a sweep is due
	chance  uint64 // the random number that sets wait: simpler, and cheaper, than those of math/rand
	visited int    // entries that sweeps have looked at; for tests
	layouts map[layoutKey]*layout
	recent  *layout // the one used last, so that making entries seldom looks into the map
}

// entry is one identifier and what was spent from its buckets.
type entry struct {
	id     string // a copy
	layout *layout
	cells  [2]law.Cell // of the first two buckets, unless there are more
	more   *more       // nil if two cells are enough
}

// more is what few entries have: all cells if they are more than two, and the holds of those cells into which they do
// not fit, such as those of a SlidingLog.
type more struct {
	cells []law.Cell
	holds [][]law.Hold
}

// layoutKey says to which throttlers the entries of a layout belong, by name and kind of clock, and what each of their
// cells is: it has the state of the rule with the same number, under that rule's law.
type layoutKey struct {
	name    string
	clocked bool
	rules   *law.RuleSet
}

// layout is what many entries have in common. Each shard has layouts of its own, guarded by its lock.
type layout struct {
	layoutKey
	entries int // how many use it; without any it is dropped
}

// hash returns the hash of an identifier under a throttler's name. The empty name, which most programs have, costs
// nothing. The name is multiplied by an odd number so that its hash and that of an equal identifier do not cancel.
func hash(seed maphash.Seed, name, id string) uint64 {
	h := maphash.String(seed, id)
	if name != "" {
		h ^= maphash.String(seed, name) * 0x9e3779b97f4a7c15
	}
	return h
}

// entry returns entry number i.
func (sh *shard) entry(i int) *entry { return &sh.chunks[i/chunk][i%chunk] }

// find returns an identifier's entry, or nil if there is none.
func (sh *shard) find(tag uint32, name, id string) *entry {
	e, _ := sh.lookup(tag, name, id)
	return e
}

// lookup returns an identifier's entry and its number, or nil and -1. A shard that never had an entry has no slots,
// which ends the loop at once. Otherwise it ends at a free slot, and a quarter of them are.
func (sh *shard) lookup(tag uint32, name, id string) (*entry, int) {
	mask := uint32(len(sh.slots) - 1)
	for at := tag & mask; at < uint32(len(sh.slots)); at = (at + 1) & mask {
		slot := sh.slots[at]
		if slot == 0 {
			break
		}
		if uint32(slot>>32) == tag {
			i := int(uint32(slot)) - 1
			if e := sh.entry(i); e.id == id && e.layout.name == name {
				return e, i
			}
		}
	}
	return nil, -1
}

// tag returns the tag of an entry. Entries do not keep theirs: only removals need it, and memory counts more.
func (sh *shard) tag(e *entry) uint32 { return uint32(hash(sh.storage.seed, e.layout.name, e.id)) }

// slot returns which slot has entry number i, whose tag is given. The entry must be there.
func (sh *shard) slot(tag uint32, i int) uint32 {
	mask := uint32(len(sh.slots) - 1)
	at := tag & mask
	for uint32(sh.slots[at]) != uint32(i+1) {
		at = (at + 1) & mask
	}
	return at
}

// add makes an entry with cells that were never charged, for an identifier that has none. It copies the identifier. The
// layout must count the entry already (use).
func (sh *shard) add(tag uint32, id string, l *layout) *entry {
	if sh.n*4 >= len(sh.slots)*3 {
		sh.resize(max(8, 2*len(sh.slots)))
	}
	if sh.n == len(sh.chunks)*chunk {
		sh.chunks = append(sh.chunks, new([chunk]entry))
	}
	if sh.n++; sh.n == 1 {
		sh.storage.held[sh.index/64].Or(1 << (sh.index % 64))
	}
	sh.put(uint64(tag)<<32 | uint64(sh.n))
	e := sh.entry(sh.n - 1)
	*e = entry{id: strings.Clone(id), layout: l}
	e.resize(len(l.rules.Rules))
	return e
}

// put puts a slot at the first free place from its own on.
func (sh *shard) put(slot uint64) {
	mask := uint32(len(sh.slots) - 1)
	at := uint32(slot>>32) & mask
	for sh.slots[at] != 0 {
		at = (at + 1) & mask
	}
	sh.slots[at] = slot
}

// resize makes the index anew with size slots, a power of two.
func (sh *shard) resize(size int) {
	old := sh.slots
	sh.slots = make([]uint64, size)
	for _, slot := range old {
		if slot != 0 {
			sh.put(slot)
		}
	}
}

// remove forgets entry number i. The last entry takes its number and its place, so the numbers stay without gaps and
// the last chunk can be given back. That happens only when two chunks are free: a shard whose size goes up and down by
// one would otherwise free and allocate a chunk each time.
func (sh *shard) remove(i int) {
	e := sh.entry(i)
	sh.free(sh.slot(sh.tag(e), i))
	sh.release(e.layout)
	last := sh.n - 1
	if i != last {
		at := sh.slot(sh.tag(sh.entry(last)), last)
		sh.slots[at] = sh.slots[at]>>32<<32 | uint64(i+1)
		*e = *sh.entry(last)
	}
	*sh.entry(last) = entry{}
	if sh.n--; sh.n == 0 {
		sh.storage.held[sh.index/64].And(^(1 << (sh.index % 64)))
	}
	if len(sh.chunks)*chunk-sh.n >= 2*chunk {
		sh.chunks[len(sh.chunks)-1] = nil
		sh.chunks = sh.chunks[:len(sh.chunks)-1]
	}
	if len(sh.slots) > 8 && sh.n*4 < len(sh.slots) {
		sh.shrink()
	}
}

// shrink gives back what the shard needed when it had more entries: half of the index, and the memory of the slice and
// the map, neither of which shrinks by itself.
func (sh *shard) shrink() {
	sh.resize(len(sh.slots) / 2)
	sh.chunks = slices.Clone(sh.chunks)
	old := sh.layouts
	sh.layouts = make(map[layoutKey]*layout, len(old))
	maps.Copy(sh.layouts, old)
}

// free empties a slot, and moves back the slots behind it that could not stand nearer to their own place before. A
// search ends at the first free slot, so none may remain between an entry and its place. There is no mark for a deleted
// slot, which would make searches longer with each removal.
func (sh *shard) free(at uint32) {
	mask := uint32(len(sh.slots) - 1)
	for next := (at + 1) & mask; sh.slots[next] != 0; next = (next + 1) & mask {
		home := uint32(sh.slots[next]>>32) & mask
		if (next-home)&mask >= (next-at)&mask {
			sh.slots[at] = sh.slots[next]
			at = next
		}
	}
	sh.slots[at] = 0
}

// use returns the layout of the given content, makes it if there is none, and counts one more entry of it. The rules
// are compared by their pointer: equal sets are one (law.RuleSet).
func (sh *shard) use(name string, clocked bool, rules *law.RuleSet) *layout {
	l := sh.recent
	if l == nil || l.name != name || l.clocked != clocked || l.rules != rules {
		if l = sh.layouts[layoutKey{name, clocked, rules}]; l == nil {
			key := layoutKey{strings.Clone(name), clocked, rules}
			l = &layout{layoutKey: key}
			if sh.layouts == nil {
				sh.layouts = make(map[layoutKey]*layout)
			}
			sh.layouts[key] = l
		}
		sh.recent = l
	}
	l.entries++
	return l
}

// release counts one entry less of a layout, and drops it after the last: callers may use any number of names and
// rules.
func (sh *shard) release(l *layout) {
	if l.entries--; l.entries == 0 {
		delete(sh.layouts, l.layoutKey)
		if sh.recent == l {
			sh.recent = nil
		}
	}
}
