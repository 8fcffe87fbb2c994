package watch

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// named is how many identifiers a Snapshot has in each list.
const named = 20

// Snapshot is what a Watch has seen. It can be written as JSON, in which durations are nanoseconds.
type Snapshot struct {
	At    time.Time // when it was taken
	Since time.Time // the Watch was made

	Rate    Rate     // of all calls of Consume, ConsumeAll and Wait
	Minute  Calls    // the same, of the last 60 s
	Seconds []Second // the last 300 seconds, the oldest first
	Hour    []Second // the last hour: 360 means of ten seconds each
	Buckets []Bucket // by name
	Sources []Source // by name

	HeavySince time.Time // the beginning of the last minute, since when the heavy ones are counted
	MostAsked  []Heavy   // who asked for most tokens: at most 20
	MostDenied []Heavy   // who was denied most often: at most 20
	State      any       `json:",omitempty"` // of Options.State
}

// Rate is how often something happens, in decisions a second.
type Rate struct {
	Now   float64 // in the last ten seconds
	Hour  float64 // in the hour before them, or since the Watch was made
	Peak  int64   // the most in one second of that hour
	Spike bool    // Now is over three times Hour, and at least 10
}

// Calls are decisions, by what came of them.
type Calls struct {
	Allowed, Denied int64
	Bypassed        int64 // allowed by a policy, without asking a bucket
	Failed          int64 // ended with an error
}

// Decisions is how many there were.
func (c Calls) Decisions() int64 { return c.Allowed + c.Denied + c.Bypassed + c.Failed }

// Second is what came of the decisions of a second, or of a mean one of several.
type Second struct{ Allowed, Denied, Bypassed, Failed float64 }

// Bucket is the bucket of a name, in all identifiers.
type Bucket struct {
	Throttler, Bucket string        // the Name of the Throttler, and that of the bucket
	Limit             int64         // tokens that an identifier may take, as last seen
	Period            time.Duration // as last seen
	Rate              Rate          // of calls that this bucket allowed or denied
	Allowed, Denied   int64         // calls in the last 60 s
	Near              int64         // calls of those allowed that left less than a fifth of the limit
	Tokens            int64         // taken in the last 60 s, without those given back
}

// Source is a storage that decides.
type Source struct {
	Source   string
	Percent  float64       // of the decisions of the last ten seconds
	Calls    int64         // in the last 60 s
	Degraded int64         // calls of those that are not the regular way: a fallback answered
	P50, P99 time.Duration // half, and 99 % of the decisions since HeavySince took less: up to a quarter too long
}

// Heavy is an identifier that asks for much. The true numbers lie between the least and the other, both included.
type Heavy struct {
	Identifier          string // its first 128 bytes, or what Mask made of it
	Asked, AskedLeast   int64  // tokens that it asked for, admitted or not
	Denied, DeniedLeast int64  // calls
}

// Snapshot returns what the Watch has seen until now.
func (w *Watch) Snapshot() Snapshot {
	since := time.Since(w.start)
	now := int64(since / time.Second)
	s := Snapshot{At: w.start.Add(since), Since: w.start, HeavySince: w.time(max(0, now/60-1) * 60)}
	latency := w.collect(since, &s)
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

// collect asks the shards who is heavy, and how long decisions took.
func (w *Watch) collect(since time.Duration, s *Snapshot) map[string]*histogram {
	latency, found := make(map[string]*histogram), []Heavy(nil)
	var asked, denied int64
	for i := range w.shards {
		h := &w.shards[i]
		h.mu.Lock()
		h.turn(since)
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

// collect adds those of the shard who have a name, and its latencies by source.
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

// heaviest are those of whom it is certain that they are heavy: not by the error of the count.
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

// secondsOf are the means of the slots from one to before another.
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
			h = new(histogram) // a call has come in between
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
