package failover

// Rule 6: the breaker. It says for the whole process whether Redis decides.
//
// It keeps calls from waiting for a timeout that the calls before them have already run into. There is one breaker for
// all identifiers, even with a cluster, because nobody knows which identifiers fail together.

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

// The breaker opens at once if Redis says that it cannot work. Otherwise it opens after failuresInRow failed round
// trips in a row, or if half of at least manyTrips round trips in a second have failed. It closes when goodProbes
// probes in a row have succeeded, over at least goodFor.
//
// If it opens again within relapse after it closed, it stays open for at least twice as long as before, from leastOpen
// up to mostOpen. Each transition makes every identifier read the ledger once (Rule 7), so a link that comes and goes
// must not cause many transitions.
const (
	failuresInRow = 3
	manyTrips     = 10
	goodProbes    = 3
	goodFor       = 300 * time.Millisecond
	relapse       = 30 * time.Second
	leastOpen     = 300 * time.Millisecond
	mostOpen      = 5 * time.Second

	// The pause before a probe is random: from half to one and a half of a length that begins with firstProbe and doubles
	// after each probe that fails, up to longestProbe.
	firstProbe   = 100 * time.Millisecond
	longestProbe = 2 * time.Second
)

// breaker is closed while Redis decides, and open while it does not. Calls read why without a lock, as each of them
// does; everything that changes it holds mu, so that only one change is made for one reason.
type breaker struct {
	why    atomic.Pointer[error] // why it is open; nil if it is closed
	opened func()                // starts the goroutine of the probes; called with mu held

	mu            sync.Mutex // guards what follows
	inRow         int        // failures since the last success
	began         time.Time  // of the second in which trips and failed are counted
	trips, failed int
	openedAt      time.Time
	closedAt      time.Time
	least         time.Duration // how long it stays open at least
	changes       int64         // openings and closings, in all
	ended         bool          // it does not open any more
}

// cause returns why the breaker is open, or nil if it is closed.
func (b *breaker) cause() error {
	if why := b.why.Load(); why != nil {
		return *why
	}
	return nil
}

// report keeps Rule 6: it counts a round trip, and reports whether this one has opened the breaker. Round trips that
// end while the breaker is open do not count: they began before it opened and say nothing about Redis now, or they are
// probes, which probeLoop judges.
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
	if now.Sub(b.closedAt) < relapse { // the last time it closed too early
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

// close closes the breaker and returns true, unless it has been open for less than its least time. Counting begins
// anew: failures of the time before the outage must not open it again.
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

// end keeps the breaker from opening again (Rule 10). Close waits for the goroutines, and once it does no new one may
// begin.
func (b *breaker) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
}

// sick reports whether an error of Redis says that the next call will fail as well, so that one is enough to open the
// breaker. An error of a single key, such as a wrong type, is not one: it says nothing about other keys.
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

// report is called after every round trip to Redis (Rule 6). A round trip runs under the timeout of the Redis storage
// and reports even if its caller has left. Otherwise callers with short deadlines would hide a Redis that does not
// answer.
func (s *Storage) report(err error) {
	if s.breaker.report(err) {
		s.notify(Event{Kind: PrimaryLost, Err: err})
	}
}

// probeLoop keeps Rule 6 while the breaker is open: it probes Redis until Redis is well, and then hands back to it. The
// pauses are random, so that the processes do not all probe at once. It returns when the breaker has closed, or with
// Close.
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

// probe makes a real decision on a bucket of its own, because an unhealthy Redis may still answer a PING. The last
// letter of the identifier is random, so that in a cluster the probes reach several nodes.
func (s *Storage) probe(ctx context.Context) error {
	rule, _ := law.NewRule("probe", law.Replenish, time.Second, 1000, 0)
	id := s.flusher.origin + string(rune('a'+rand.N(26)))
	r := &storage.Request{Name: "!probe", Parts: []storage.Part{{Identifier: id, Rules: law.NewRuleSet(rule)}}, Costs: []int64{1}}
	return s.primary.Decide(ctx, r, &storage.Answer{Counts: make([]storage.Count, 1)})
}
