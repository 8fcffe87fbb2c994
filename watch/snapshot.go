package watch

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// named is how many identifiers a Snapshot has at most in each list.
const named = 20

// Snapshot is what a Watch has seen. It can be encoded as JSON; durations are nanoseconds there.
type Snapshot struct {
	At    time.Time // when it was taken
	Since time.Time // when the Watch was made

	Rate    Rate     // of all calls of Consume, ConsumeAll and Wait
	Minute  Calls    // the same, over the last 60 s
	Seconds []Second // the last 300 seconds, the oldest first
	Hour    []Second // the last hour: 360 averages over ten seconds each
	Buckets []Bucket // by name
	Sources []Source // by name

	HeavySince time.Time // the start of the last full minute; heavy identifiers are counted from then on
	MostAsked  []Heavy   // identifiers that asked for most tokens: at most 20
	MostDenied []Heavy   // identifiers that were denied most often: at most 20
	State      any       `json:",omitempty"` // from Options.State
}

// Rate is a frequency in decisions a second.
type Rate struct {
	Now   float64 // over the last ten seconds
	Hour  float64 // over the hour before those, or since the Watch was made
	Peak  int64   // the most in one second of that hour
	Spike bool    // Now is over three times Hour and at least 10
}

// Calls counts decisions by their result.
type Calls struct {
	Allowed, Denied int64
	Bypassed        int64 // allowed by a policy, without asking a bucket
	Failed          int64 // ended with an error
}

// Decisions returns the sum of all results.
func (c Calls) Decisions() int64 { return c.Allowed + c.Denied + c.Bypassed + c.Failed }

// Second holds the decisions of one second by their result, or averages over several seconds.
type Second struct{ Allowed, Denied, Bypassed, Failed float64 }

// Bucket sums up all buckets of one name, over all identifiers.
type Bucket struct {
	Throttler, Bucket string        // the Name of the Throttler, and the name of the bucket
	Limit             int64         // tokens that an identifier may take, as last seen
	Period            time.Duration // as last seen
	Rate              Rate          // calls that this bucket allowed or denied
	Allowed, Denied   int64         // calls in the last 60 s
	Near              int64         // how many of those allowed left less than a fifth of the limit
	Tokens            int64         // taken in the last 60 s, minus refunded
}

// Source is a storage that decides.
type Source struct {
	Source   string
	Percent  float64       // share of the decisions of the last ten seconds
	Calls    int64         // in the last 60 s
	Degraded int64         // how many of those a fallback answered
	P50, P99 time.Duration // since HeavySince, half and 99 % of the decisions took at most this long; at most a quarter too long
}

// Heavy is an identifier that asks for much. Sketches count it, so the true numbers lie between AskedLeast and Asked, and
// between DeniedLeast and Denied, bounds included.
type Heavy struct {
	Identifier          string // its first 128 bytes, or those of what Mask returned
	Asked, AskedLeast   int64  // tokens that it asked for, whether admitted or not
	Denied, DeniedLeast int64  // calls that were denied
}

// Snapshot returns what the Watch has seen up to now.
func (w *Watch) Snapshot() Snapshot {
	at := time.Now()
	now := int64(at.Sub(w.start) / time.Second)
	s := Snapshot{At: at, Since: w.start, HeavySince: w.time(max(0, now/60-1) * 60)}
	latency := w.collect(&s)
	w.mu.Lock()
	minute := w.all.fine.sum(now-60, now)
	s.Rate, s.Minute = w.all.rate(now), callsOf(&minute)
	s.Seconds = secondsOf(&w.all.fine, now-fine, now)
	s.Hour = secondsOf(&w.all.hour, now/step-steps, now/step)
	s.Buckets, s.Sources = w.bucketsNow(now), w.sourcesNow(now, latency)
	w.mu.Unlock()
	if w.options.State != nil {
		s.State = w.options.State()
	}
	return s
}

// collect reads the heavy identifiers and the latencies from the shards, one shard at a time.
func (w *Watch) collect(s *Snapshot) map[string]*histogram {
	latency, found := make(map[string]*histogram), []Heavy(nil)
	var asked, denied int64
	for i := range w.shards {
		h := &w.shards[i]
		h.mu.Lock()
		h.turn(s.At)
		h.flush()
		found = h.collect(found, latency)
		asked += h.this.asked.GetStreamLength() + h.last.asked.GetStreamLength()
		denied += h.this.denied.GetStreamLength() + h.last.denied.GetStreamLength()
		h.mu.Unlock()
	}
	s.MostAsked = heaviest(found, asked, func(h *Heavy) (most, least int64) { return h.Asked, h.AskedLeast })
	s.MostDenied = heaviest(found, denied, func(h *Heavy) (most, least int64) { return h.Denied, h.DeniedLeast })
	return latency
}

// collect appends the identifiers of the shard that have a name, and adds its latencies by source.
func (s *shard) collect(found []Heavy, latency map[string]*histogram) []Heavy {
	for hash, id := range s.names {
		h := s.heavy(hash)
		h.Identifier = id
		found = append(found, h)
	}
	for i := range s.sources {
		name := s.sources[i].name
		if latency[name] == nil {
			latency[name] = new(histogram)
		}
		latency[name].add(&s.this.latency[i])
		latency[name].add(&s.last.latency[i])
	}
	return found
}

// heaviest returns the identifiers that are certainly heavy: by their lower bound, and only if the uncertainty of their
// count is no larger than that bound.
func heaviest(found []Heavy, total int64, of func(*Heavy) (most, least int64)) (out []Heavy) {
	for i := range found {
		if most, least := of(&found[i]); least > total/heavyOf && least >= most-least {
			out = append(out, found[i])
		}
	}
	slices.SortFunc(out, func(a, b Heavy) int {
		more, _ := of(&a)
		less, _ := of(&b)
		return cmp.Or(cmp.Compare(less, more), cmp.Compare(a.Identifier, b.Identifier))
	})
	return out[:min(named, len(out))]
}

func callsOf(c *counts) Calls {
	return Calls{c.calls[allowed], c.calls[denied], c.calls[bypassed], c.calls[failed]}
}

// secondsOf returns the averages of the slots of [from, to).
func secondsOf(r *ring, from, to int64) (out []Second) {
	for n := from; n < to; n++ {
		var second Second
		if c := r.at(n); c != nil {
			mean := func(of outcome) float64 { return float64(c.calls[of]) / float64(r.seconds) }
			second = Second{mean(allowed), mean(denied), mean(bypassed), mean(failed)}
		}
		out = append(out, second)
	}
	return out
}

func (w *Watch) bucketsNow(now int64) (out []Bucket) {
	for name, s := range w.buckets {
		c := s.fine.sum(now-60, now)
		out = append(out, Bucket{
			Throttler: name.throttler, Bucket: name.bucket, Limit: s.limit, Period: s.period,
			Rate: s.rate(now), Allowed: c.calls[allowed], Denied: c.calls[denied], Near: c.near, Tokens: c.tokens,
		})
	}
	slices.SortFunc(out, func(a, b Bucket) int {
		return cmp.Or(cmp.Compare(a.Throttler, b.Throttler), cmp.Compare(a.Bucket, b.Bucket))
	})
	return out
}

func (w *Watch) sourcesNow(now int64, latency map[string]*histogram) (out []Source) {
	all := int64(0)
	for _, name := range slices.Sorted(maps.Keys(w.sources)) {
		s := w.sources[name]
		last, c := s.fine.sum(now-step, now), s.fine.sum(now-60, now)
		h := latency[name]
		if h == nil {
			h = new(histogram) // the first call of the source came after collect
		}
		out = append(out, Source{Source: name, Percent: 100 * float64(last.decisions()), Calls: c.decisions(), Degraded: c.degraded,
			P50: h.quantile(0.5), P99: h.quantile(0.99)})
		all += last.decisions()
	}
	for i := range out {
		out[i].Percent /= float64(max(1, all))
	}
	return out
}
