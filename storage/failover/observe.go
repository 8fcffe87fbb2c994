package failover

import (
	"fmt"
	"time"

	"github.com/go-throttler/throttler/storage"
)

// Kind is what an Event tells of.
type Kind uint8

// The kinds of events.
const (
	PrimaryLost Kind = iota // from now on Postgres decides, because of Err
	PrimaryBack             // from now on Redis decides
	Flushed                 // Postgres was charged what was admitted up to Lag ago. With Err it refused some entries, which are lost
	FlushFailed             // Postgres could not be charged because of Err. What is pending is Lag old
)

var kindNames = [...]string{"primary lost", "primary back", "flushed", "flush failed"}

// String is the kind in two words.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Event is something that happened behind the calls.
type Event struct {
	Kind    Kind
	Err     error         // PrimaryLost: why; Flushed: why entries were rejected, else nil; FlushFailed: why
	Lag     time.Duration // Flushed, FlushFailed: age of the oldest entry
	Pending int           // identifiers of which Postgres has not been charged yet
	Relayed int           // Flushed: identifiers to which Redis was raised, as Postgres knew of more
}

func (s *Storage) notify(e Event) {
	if s.options.Observe == nil {
		return
	}
	e.Pending, _ = s.journal.pending()
	s.observe.Lock()
	defer s.observe.Unlock()
	s.options.Observe(e)
}

// State is how a Storage is, for health checks and metrics.
type State struct {
	Degraded    bool          // Redis does not decide
	Cause       error         // why not
	Since       time.Time     // of the last change of that; zero if there was none
	Transitions int64         // from Redis to Postgres and back
	Doubted     time.Time     // since when Redis is raised to what Postgres has, before it admits; zero: never
	Pending     int           // identifiers of which Postgres has not been charged yet
	Lag         time.Duration // how long ago the oldest of that was admitted
	Flushed     time.Time     // when Postgres was last charged; zero: never
	FlushError  error         // why it could not be the last time, nil if it could
	Relayed     int64         // identifiers to which Redis was raised
	Forgotten   int64         // admissions that were not charged because MaxPending was reached, or Postgres refused them
}

// State returns how the storage is now. It asks nobody.
func (s *Storage) State() (out State) {
	out.Cause = s.breaker.cause()
	out.Degraded = out.Cause != nil
	b := &s.breaker
	b.mu.Lock()
	if out.Since = b.closedAt; b.openedAt.After(b.closedAt) {
		out.Since = b.openedAt
	}
	out.Transitions = b.changes
	b.mu.Unlock()

	f := &s.flusher
	f.mu.Lock()
	out.Flushed, out.FlushError, out.Relayed = f.flushedAt, f.failure, f.relayed
	f.mu.Unlock()
	now, since := storage.Monotonic(), int64(0)
	if out.Pending, since = s.journal.pending(); since > 0 {
		out.Lag = micros(now - since)
	}
	if doubted := s.doubted.Load(); doubted > 0 {
		out.Doubted = time.Now().Add(-micros(now - doubted))
	}
	s.journal.mu.Lock()
	out.Forgotten = s.journal.forgotten
	s.journal.mu.Unlock()
	return out
}
