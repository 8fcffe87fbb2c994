package failover

// What operators see: events as they happen, and the present state.

import (
	"encoding/json"
	"fmt"
	"iter"
	"time"

	"github.com/go-throttler/throttler/internal/law"
)

// Kind is the kind of an Event.
type Kind uint8

// The kinds of events.
const (
	PrimaryLost Kind = iota // Postgres decides from now on, because of Err
	PrimaryBack             // Redis decides from now on
	Flushed                 // Postgres has recorded a batch, whose oldest admission was Lag old; Err if it rejected some
	FlushFailed             // Postgres could not be charged because of Err; the batch is kept and tried again
)

var kindNames = [...]string{"primary lost", "primary back", "flushed", "flush failed"}

// String returns the kind in words, such as "primary lost".
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Event is something that happened behind the calls.
type Event struct {
	Kind    Kind
	Err     error         // PrimaryLost, FlushFailed: why; Flushed: why Postgres rejected entries, or nil
	Lag     time.Duration // Flushed, FlushFailed: age of the oldest admission of the batch
	Pending int           // identifiers with admissions that Postgres has not recorded yet
	Relayed int           // Flushed: identifiers for which Redis was raised, as Postgres knew of more
}

// notify calls Options.Observe, if there is one, after filling in what is pending. The caller holds no lock of the
// storage, since Observe may call State (see the locks at journal).
func (s *Storage) notify(e Event) {
	if s.options.Observe == nil {
		return
	}
	e.Pending, _ = s.journal.pending()
	s.observe.Lock()
	defer s.observe.Unlock()
	s.options.Observe(e)
}

// State describes a Storage, for health checks and metrics. It is a snapshot: its parts are read one after the other.
type State struct {
	Degraded    bool          // Postgres decides
	Cause       error         // why Redis does not; nil if it does
	Since       time.Time     // the last change of Degraded; zero if it never changed
	Transitions int64         // changes of Degraded, in all
	Doubted     time.Time     // state in Redis that is older must be raised before it admits; zero if never doubted
	Pending     int           // identifiers with admissions that Postgres has not recorded yet
	Lag         time.Duration // age of the oldest of these admissions
	Flushed     time.Time     // the last time that Postgres recorded some; zero if it never did
	FlushError  error         // why the last flush failed; nil if it succeeded
	Relayed     int64         // how often a flush raised an identifier in Redis
	Forgotten   int64         // admissions that Postgres never records, because of MaxPending or because it rejected them
}

// MarshalJSON writes errors as their texts and Lag in seconds, as lag_seconds. Fields that are zero are left out,
// except Degraded, Pending and Lag.
func (s State) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Degraded    bool      `json:"degraded"`
		Cause       string    `json:"cause,omitempty"`
		Since       time.Time `json:"since,omitzero"`
		Transitions int64     `json:"transitions,omitempty"`
		Doubted     time.Time `json:"doubted,omitzero"`
		Pending     int       `json:"pending"`
		Lag         float64   `json:"lag_seconds"`
		Flushed     time.Time `json:"flushed,omitzero"`
		FlushError  string    `json:"flush_error,omitempty"`
		Relayed     int64     `json:"relayed,omitempty"`
		Forgotten   int64     `json:"forgotten,omitempty"`
	}{s.Degraded, text(s.Cause), s.Since, s.Transitions, s.Doubted, s.Pending, s.Lag.Seconds(), s.Flushed, text(s.FlushError), s.Relayed, s.Forgotten})
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// Stats yields the present State in numbers, by the names of its metrics: failover_degraded, failover_lag_seconds and
// so on. A truth value is 1 or 0. It does no I/O.
func (s *Storage) Stats() iter.Seq2[string, float64] {
	return func(yield func(string, float64) bool) {
		state := s.State()
		_ = yield("failover_degraded", truth(state.Degraded)) &&
			yield("failover_flush_failing", truth(state.FlushError != nil)) &&
			yield("failover_lag_seconds", state.Lag.Seconds()) &&
			yield("failover_pending", float64(state.Pending)) &&
			yield("failover_transitions_total", float64(state.Transitions)) &&
			yield("failover_relayed_total", float64(state.Relayed)) &&
			yield("failover_forgotten_total", float64(state.Forgotten))
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// State returns the present state. It does no I/O and waits for none, so it suits a health check.
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
	now, since := law.Monotonic(), int64(0)
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
