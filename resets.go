// The calls of Reset that run now or have ended of late. A Reset makes the storage forget reservations. A waiter must not keep
// one that a Reset has overlapped, and nobody may give it back: that would free tokens which others have taken since.

package throttler

import (
	"context"
	"hash/maphash"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/go-throttler/throttler/storage"
)

// resets remembers the calls of Reset. The zero value is ready for use.
type resets struct {
	ended   atomic.Uint64 // how many have ended, all waiters knowing of it
	running atomic.Int64

	mu     sync.Mutex // guards the fields below
	recent []uint64   // hashes of the identifiers: that of number i is at i%len(recent)
	now    map[string]*reset
}

// reset is an identifier that is being reset.
type reset struct {
	calls int
	over  chan struct{} // closed when the last of the calls has ended
}

// remembered is how many Resets since returns exactly. A call to a storage takes less time than so many need.
const remembered = 1024

var resetSeed = maphash.MakeSeed()

func (r *resets) begin(id string) {
	r.running.Add(1)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.now == nil {
		r.now = make(map[string]*reset)
	}
	if r.now[id] == nil {
		r.now[strings.Clone(id)] = &reset{over: make(chan struct{})}
	}
	r.now[id].calls++
}

func (r *resets) end(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running.Add(-1)
	if one := r.now[id]; one.calls > 1 {
		one.calls--
	} else {
		close(one.over)
		delete(r.now, id)
	}
}

// note counts a Reset that the storage has made.
func (r *resets) note(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.recent == nil {
		r.recent = make([]uint64, remembered)
	}
	n := r.ended.Load()
	r.recent[n%remembered] = maphash.String(resetSeed, id)
	r.ended.Store(n + 1)
}

// since reports whether one of the identifiers was reset since the number of Resets was mark. If there were too many to know,
// it says so too: then a reservation is lost, which is better than one too many.
func (r *resets) since(mark uint64, parts []storage.Part) bool {
	if r.ended.Load() == mark {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.ended.Load()
	if n-mark > remembered {
		return true
	}
	for i := range parts {
		h := maphash.String(resetSeed, parts[i].Identifier)
		for j := mark; j < n; j++ {
			if r.recent[j%remembered] == h {
				return true
			}
		}
	}
	return false
}

// runs reports whether one of the identifiers is being reset.
func (r *resets) runs(parts []storage.Part) bool {
	if r.running.Load() == 0 {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range parts {
		if r.now[parts[i].Identifier] != nil {
			return true
		}
	}
	return false
}

// settle waits for the Resets of these identifiers that are running, or until ctx ends. Otherwise a whole crowd could reserve
// between a Reset in the storage and the news of it, and all these reservations would be dropped for nothing.
func (r *resets) settle(ctx context.Context, parts []Part) {
	for i := 0; i < len(parts) && r.running.Load() > 0; i++ {
		r.mu.Lock()
		one := r.now[parts[i].id]
		r.mu.Unlock()
		if one == nil {
			continue
		}
		select {
		case <-one.over:
		case <-ctx.Done():
			return
		}
	}
}
