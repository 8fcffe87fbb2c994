// Receipts of POST /v1/decide. A client uses one to return what a decision took.

package main

import (
	"crypto/rand"
	"sync"
	"time"

	"github.com/go-throttler/throttler"
)

const (
	receiptLasts = 10 * time.Minute
	maxReceipts  = 16384 // each takes about a kilobyte
)

// receipts holds the receipts that were issued and not used yet, in the memory of this process. It is safe for concurrent
// use.
type receipts struct {
	mu    sync.Mutex
	given map[string]receipt
	order []string // in the order of issue, including those used since
}

type receipt struct {
	v     throttler.Verdict
	until time.Time
}

// give issues a receipt that nobody can guess. If there are too many, it forgets the oldest. A used receipt counts until it
// is the oldest: it has no entry in given, so the zero time makes it look expired.
func (r *receipts) give(v throttler.Verdict, now time.Time) string {
	id := rand.Text()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.given == nil {
		r.given = map[string]receipt{}
	}
	for len(r.order) > 0 && (len(r.order) >= maxReceipts || !now.Before(r.given[r.order[0]].until)) {
		delete(r.given, r.order[0])
		r.order = r.order[1:]
	}
	r.given[id] = receipt{v, now.Add(receiptLasts)}
	r.order = append(r.order, id)
	return id
}

// take returns the verdict that a receipt stands for. It succeeds at most once for each receipt.
func (r *receipts) take(id string, now time.Time) (v throttler.Verdict, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	given, ok := r.given[id]
	delete(r.given, id)
	return given.v, ok && now.Before(given.until)
}
