// Receipts of POST /v1/decide, by which what was taken can be given back.

package main

import (
	"crypto/rand"
	"sync"
	"time"

	"github.com/go-throttler/throttler"
)

const (
	receiptLasts = 10 * time.Minute
	maxReceipts  = 16384 // of about a kilobyte
)

// receipts are those that were given and not used, in the memory of this process. It is safe for concurrent use.
type receipts struct {
	mu    sync.Mutex
	given map[string]receipt
	order []string // as they were given, also those that were used since
}

type receipt struct {
	v     throttler.Verdict
	until time.Time
}

// give returns a receipt that nobody can guess. The oldest is forgotten if there are too many.
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

// take returns what a receipt is for, once.
func (r *receipts) take(id string, now time.Time) (v throttler.Verdict, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	given, ok := r.given[id]
	delete(r.given, id)
	return given.v, ok && now.Before(given.until)
}
