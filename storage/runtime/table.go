package runtime

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

// shard is a hash table: an index by open addressing over entries in chunks that never move while
// it grows. A slot of the index is the entry's tag, which also is its hash, and its number plus
// one; 0 is free.
type shard struct {
	index   int      // of this shard; fixed
	storage *Storage // fixed

	mu      sync.Mutex // held for all that follows, and for the entries
	slots   []uint64
	chunks  []*[chunk]entry
	n       int    // entries
	turn    uint32 // where the last walk began, of 2^32 for all entries
	wait    int    // identifiers of calls until one sweeps
	chance  uint64 // of which wait is set: a random number, cheaper than those of math/rand
	visited int    // by sweeps; for tests
	layouts map[layoutKey]*layout
	recent  *layout // the last one used, so that making entries seldom asks the map
}

// entry is one identifier.
type entry struct {
	id     string
	layout *layout
	cells  [2]law.Cell
	more   *more
}

// more is what few entries have: all cells where they are more than two, and the holds of
// cells into which they do not fit.
type more struct {
	cells []law.Cell
	holds [][]law.Hold
}

// layoutKey is whose entries of a layout are, and the rule of each cell, by whose law it was spent.
type layoutKey struct {
	name    string
	clocked bool
	rules   *law.RuleSet
}

// layout is what entries have in common.
type layout struct {
	layoutKey
	entries int
}

func hash(seed maphash.Seed, name, id string) uint64 {
	h := maphash.String(seed, id)
	if name != "" {
		h ^= maphash.String(seed, name) * 0x9e3779b97f4a7c15
	}
	return h
}

func (sh *shard) entry(i int) *entry { return &sh.chunks[i/chunk][i%chunk] }

// find returns an identifier's entry, or nil.
func (sh *shard) find(tag uint32, name, id string) *entry {
	e, _ := sh.lookup(tag, name, id)
	return e
}

// lookup returns an identifier's entry and its number, or nil.
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

func (sh *shard) tag(e *entry) uint32 { return uint32(hash(sh.storage.seed, e.layout.name, e.id)) }

// slot is where entry number i of the given tag stands in the index.
func (sh *shard) slot(tag uint32, i int) uint32 {
	mask := uint32(len(sh.slots) - 1)
	at := tag & mask
	for uint32(sh.slots[at]) != uint32(i+1) {
		at = (at + 1) & mask
	}
	return at
}

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

func (sh *shard) put(slot uint64) {
	mask := uint32(len(sh.slots) - 1)
	at := uint32(slot>>32) & mask
	for sh.slots[at] != 0 {
		at = (at + 1) & mask
	}
	sh.slots[at] = slot
}

func (sh *shard) resize(size int) {
	old := sh.slots
	sh.slots = make([]uint64, size)
	for _, slot := range old {
		if slot != 0 {
			sh.put(slot)
		}
	}
}

// remove forgets entry number i; the last entry takes its number.
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

// shrink gives back what the shard needed when it had more entries. A map and a slice would keep it.
func (sh *shard) shrink() {
	sh.resize(len(sh.slots) / 2)
	sh.chunks = slices.Clone(sh.chunks)
	old := sh.layouts
	sh.layouts = make(map[layoutKey]*layout, len(old))
	maps.Copy(sh.layouts, old)
}

// free empties a slot and moves back those that had to stand behind it.
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

// use returns the layout of the given content, and counts one more entry of it.
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

func (sh *shard) release(l *layout) {
	if l.entries--; l.entries == 0 {
		delete(sh.layouts, l.layoutKey)
		if sh.recent == l {
			sh.recent = nil
		}
	}
}
