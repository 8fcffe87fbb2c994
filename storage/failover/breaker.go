package failover

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/go-throttler/throttler/storage"
)

// The breaker opens at once when Redis says that it will not work, else after failuresInRow round trips, or when
// half of at least manyTrips in a second have failed. It closes when goodProbes in a row, over at least
// goodFor, succeed. When it opens again within relapse, it stays open for twice as long as the last time at
// least, from leastOpen to mostOpen.
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

// breaker says whether Redis decides.
type breaker struct {
	why    atomic.Pointer[error] // nil: Redis does
	opened func()                // called when it opens, with mu held

	mu            sync.Mutex // guards what follows
	inRow         int        // failures, since the last success
	trips, failed int        // in the second that began then
	began         time.Time
	openedAt      time.Time
	closedAt      time.Time
	least         time.Duration // how long it stays open
	changes       int64
	ended         bool
}

// cause is why Redis does not decide, nil if it does.
func (b *breaker) cause() error {
	if why := b.why.Load(); why != nil {
		return *why
	}
	return nil
}

// report counts a round trip, and says whether the breaker has opened by it.
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
	if now.Sub(b.closedAt) < relapse {
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

// close closes the breaker, unless it is too early.
func (b *breaker) close() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	if now.Sub(b.openedAt) < b.least {
		return false
	}
	b.closedAt, b.inRow, b.trips, b.failed = now, 0, 0, 0
	b.changes++
	b.why.Store(nil)
	return true
}

func (b *breaker) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
}

// sick tells of an error which says that the next call will fail as well.
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

// report is told of every round trip to Redis.
func (s *Storage) report(err error) {
	if s.breaker.report(err) {
		s.notify(Event{Kind: PrimaryLost, Err: err})
	}
}

// probes asks Redis until it is well, and then hands back to it.
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

// probe takes a token from a bucket of its own. Other identifiers are in other slots of a cluster.
func (s *Storage) probe(ctx context.Context) error {
	rule, _ := storage.NewRule("probe", storage.Replenish, time.Second, 1000, 0)
	id := s.flusher.origin + string(rune('a'+rand.N(26)))
	_, err := s.primary.Decide(ctx, storage.Request{Name: "!probe", Part: storage.NewPart(id, []storage.Rule{rule}, 1)})
	return err
}
