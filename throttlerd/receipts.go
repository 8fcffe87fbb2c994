// Receipts of POST /v1/decide. A client uses one to return what a decision took, or to make it the real cost.

package main

import (
	"container/list"
	"crypto/rand"
	"sync"
	"time"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/rules"
)

const (
	receiptLasts = 10 * time.Minute
	maxReceipts  = 16384    // most take about two kilobytes
	maxHeld      = 64 << 20 // bytes of all receipts: one of 256 descriptors takes hundreds of kilobytes
)

// receipts holds the receipts that were issued and not used yet, in the memory of this process. It is safe for concurrent
// use.
type receipts struct {
	mu    sync.Mutex
	given map[string]*list.Element
	order list.List // of *receipt, in the order of issue
	held  int       // bytes, the sum of their sizes
}

type receipt struct {
	id      string
	v       throttler.Verdict
	applied []rules.Applied
	until   time.Time
	size    int // bytes, about
}

// isOf returns an error if a request names another domain than that of the decision. It need not name any.
func (r *receipt) isOf(domain string) error {
	if domain != "" && len(r.applied) > 0 && r.applied[0].Rule.Domain != domain {
		return malformed("the receipt is of the domain %.64q", r.applied[0].Rule.Domain)
	}
	return nil
}

// Sizes of the parts of a receipt, somewhat more than what they take in memory.
const (
	sizeOfReceipt = 1 << 10 // bytes
	sizeOfApplied = 128     // without the identifier
	sizeOfLevel   = 256     // in the verdict too
)

// sizeOf returns about how many bytes a receipt for the decision takes.
func sizeOf(d *decision) int {
	size := sizeOfReceipt
	for i := range d.applied {
		levels := d.applied[i].Levels
		size += sizeOfApplied + len(levels)*sizeOfLevel
		if len(levels) > 0 {
			size += len(levels[0].Identifier)
		}
	}
	return size
}

// give issues a receipt that nobody can guess. If there are too many, it forgets the oldest.
func (r *receipts) give(d *decision, now time.Time) string {
	given := &receipt{rand.Text(), d.v, d.applied, now.Add(receiptLasts), sizeOf(d)}
	r.put(given, now)
	return given.id
}

// put keeps a receipt, also one that was taken and not used.
func (r *receipts) put(given *receipt, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.given == nil {
		r.given = map[string]*list.Element{}
	}
	for len(r.given) > 0 && (len(r.given) >= maxReceipts || r.held+given.size > maxHeld || !now.Before(r.oldest().until)) {
		r.remove(r.oldest())
	}
	r.given[given.id] = r.order.PushBack(given)
	r.held += given.size
}

func (r *receipts) oldest() *receipt {
	given, _ := r.order.Front().Value.(*receipt)
	return given
}

func (r *receipts) remove(given *receipt) {
	r.order.Remove(r.given[given.id])
	delete(r.given, given.id)
	r.held -= given.size
}

// take returns the decision that a receipt stands for. It succeeds at most once for each receipt.
func (r *receipts) take(id string, now time.Time) (*receipt, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.given[id]
	if e == nil {
		return nil, false
	}
	given, _ := e.Value.(*receipt)
	r.remove(given)
	return given, now.Before(given.until)
}
