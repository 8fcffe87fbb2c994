package failover

// Rule 6: the breaker. It says for the whole process whether Redis decides.

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// The breaker opens at once when Redis says that it cannot work, else after failuresInRow round trips, or when half of
// at least manyTrips in a second have failed. It closes when goodProbes in a row, over at least goodFor, succeed. If it
// opens again within relapse, it stays open for at least twice as long as before, from leastOpen up to mostOpen: each
// transition makes every identifier read the ledger (Rule 7), so a link that comes and goes must not cause many.
const (
	failuresInRow = 3
	manyTrips     = 10
	goodProbes    = 3
	goodFor       = 300 * time.Millisecond
	relapse       = 30 * time.Second
	leastOpen     = 300 * time.Millisecond
	mostOpen      = 5 * time.Second

	firstProbe   = 100 * time.Millisecond // then twice as long after each that fails
	longestProbe = 2 * time.Second
)

// breaker is closed while Redis decides, and open while it does not.
type breaker struct {
	why    atomic.Pointer[error] // why it is open; nil: closed. Calls read it without a lock
	opened func()                // starts the probes, with mu held

	mu            sync.Mutex // guards what follows
	inRow         int        // failures since the last success
	began         time.Time  // of the second in which trips and failed are counted
	trips, failed int
	openedAt      time.Time
	closedAt      time.Time
	least         time.Duration // how long it stays open
	changes       int64         // openings and closings
	ended         bool          // it opens no more
}

// cause is why the breaker is open, or nil if it is closed.
func (b *breaker) cause() error {
	if why := b.why.Load(); why != nil {
		return *why
	}
	return nil
}

// report keeps Rule 6: it counts a round trip, and reports whether the breaker has opened by it. Round trips that end
// while it is open are late ones, which say nothing about Redis now.
func (b *breaker) report(err error) (opened bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ended || b.why.Load() != nil {
		return false
	}
	now := time.Now()
	if now.Sub(b.began) >= time.Second {
		b.began, b.trips, b.failed = now, 0, 0
	}
	b.trips++
	if err == nil {
		b.inRow = 0
		return false
	}
	b.inRow++
	b.failed++
	if !sick(err) && b.inRow < failuresInRow && (b.trips < manyTrips || 2*b.failed < b.trips) {
		return false
	}
	if now.Sub(b.closedAt) < relapse { // it closed too early the last time
		b.least = min(2*b.least, mostOpen)
	} else {
		b.least = leastOpen
	}
	b.openedAt = now
	b.changes++
	why := err
	b.why.Store(&why)
	b.opened()
	return true
}

// close closes the breaker and returns true, unless it is too early.
func (b *breaker) close() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	if now.Sub(b.openedAt) < b.least { // the probes go on
		return false
	}
	b.closedAt, b.inRow, b.trips, b.failed = now, 0, 0, 0
	b.changes++
	b.why.Store(nil)
	return true
}

// end keeps the breaker from opening: Close waits for the goroutines, and none may begin after that.
func (b *breaker) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
}

// sick reports whether an error says that the next call will fail as well. Errors of a single key, such as a wrong
// type, say nothing about others.
func sick(err error) bool {
	if errors.Is(err, syscall.ECONNREFUSED) {
		return true
	}
	for _, prefix := range []string{"READONLY", "LOADING", "CLUSTERDOWN", "OOM", "MISCONF", "NOAUTH", "WRONGPASS", "NOPERM", "MASTERDOWN"} {
		if goredis.HasErrorPrefix(err, prefix) {
			return true
		}
	}
	return false
}

// report is called after every round trip to Redis. Round trips run under the timeout of the storage and report though
// the caller has left. Otherwise callers with short deadlines would hide a Redis that does not answer.
func (s *Storage) report(err error) {
	if s.breaker.report(err) {
		s.notify(Event{Kind: PrimaryLost, Err: err})
	}
}

// probeLoop keeps Rule 6 while the breaker is open: it probes Redis until it is well, and then hands back to it. The
// pauses are random, so that the processes do not all come at once.
func (s *Storage) probeLoop(ctx context.Context) {
	pause, good, since := firstProbe, 0, time.Time{}
	for {
		select {
		case <-s.closing:
			return
		case <-time.After(pause/2 + s.jitter(pause)):
		}
		if s.probe(ctx) != nil {
			pause, good = min(2*pause, longestProbe), 0
			continue
		}
		if good++; good == 1 {
			since = time.Now()
		}
		if pause = firstProbe; good >= goodProbes && time.Since(since) >= goodFor && s.handBack(ctx) {
			return
		}
	}
}

// probe makes a real decision on a bucket of its own: a Redis that is sick may still answer a PING. The last letter of
// the identifier is random, so that in a cluster the probes come to several nodes.
func (s *Storage) probe(ctx context.Context) error {
	rule, _ := law.NewRule("probe", law.Replenish, time.Second, 1000, 0)
	id := s.flusher.origin + string(rune('a'+rand.N(26)))
	r := &storage.Request{Name: "!probe", Parts: []storage.Part{{Identifier: id, Rules: law.NewRuleSet(rule)}}, Costs: []int64{1}}
	return s.primary.Decide(ctx, r, &storage.Answer{Counts: make([]storage.Count, 1)})
}
