package watch

// What a call counts for. Everything under the lock of a shard is here, so that a call locks once.

import (
	"sync"
	"time"
	"unsafe"

	"github.com/go-throttler/throttler"
)

// shard counts the calls of some of the identifiers.
type shard struct {
	watch *Watch

	mu      sync.Mutex // guards the fields below
	second  int64      // the second that the tallies count
	until   time.Time  // the end of that second
	all     tally
	sources []sourceTally
	buckets []bucketTally
	find    map[name]int // indexes in buckets

	this, last *minute
	names      map[int64]string // of heavy identifiers, by the hash of the identifier
	known      [64]known        // some of those, indexed by hash
}

// tally holds the counts of one second, and the series that they are added to.
type tally struct {
	counts
	series *series
}

type sourceTally struct {
	tally
	name string
}

type bucketTally struct {
	tally
	name   name
	limit  int64 // as last seen
	period time.Duration
}

func (s *shard) begin(w *Watch) {
	s.watch, s.all.series, s.find, s.names = w, w.all, make(map[name]int), make(map[int64]string)
	s.last, s.this, s.until = newMinute(-1), newMinute(0), w.time(1)
}

// turn moves on to the second of a time, if that is later. It is never moved back: an event that arrives late counts in the
// present second.
func (s *shard) turn(now time.Time) {
	if now.Before(s.until) {
		return
	}
	s.flush()
	s.second = int64(now.Sub(s.watch.start) / time.Second)
	s.until = s.watch.time(s.second + 1)
	s.turnMinute(s.second / 60)
}

// flush adds the counts to the history. It takes the lock of the Watch, at most about once a second for each shard and
// once for each Snapshot.
func (s *shard) flush() {
	s.flushKnown()
	s.watch.mu.Lock()
	defer s.watch.mu.Unlock()
	s.all.flush(s.second)
	for i := range s.sources {
		s.sources[i].flush(s.second)
	}
	for i := range s.buckets {
		b := &s.buckets[i]
		if b.flush(s.second) && b.series != s.watch.buckets[many] {
			b.series.limit, b.series.period = b.limit, b.period
		}
	}
}

func (t *tally) flush(second int64) bool {
	if t.counts == (counts{}) {
		return false
	}
	t.series.add(second, &t.counts)
	t.counts = counts{}
	return true
}

// asking is what one identifier asked for in a call: the largest number of tokens that any of its buckets was asked for.
type asking struct {
	identifier string
	cost       int64
	denied     bool
}

func (a *asking) add(l *throttler.Level, cost int64) {
	a.cost = max(a.cost, cost)
	a.denied = a.denied || l.RetryAfter > 0
}

// count counts an event. It reports whether the event was also about other identifiers, whose shards are not locked now.
// It is one function because it runs for each decision: calls of functions for its parts took a sixth of the time.
func (s *shard) count(e *throttler.Event, hash int64) (others bool) {
	of := allowed
	if e.Err != nil || !e.Verdict.Taken() {
		of = outcomeOf(e)
	}
	var decided, counted bool // by a storage; as a call and not an attempt of one
	switch e.Op {
	case throttler.OpConsume:
		decided, counted = true, e.Attempt == 0 // an attempt counts with its Wait
	case throttler.OpWait:
		counted = true
	case throttler.OpCharge, throttler.OpPeek:
		decided = true
	case throttler.OpRefund:
		s.refund(e)
	}
	if source := e.Verdict.Source(); decided && source != "" {
		i := 0
		// The first maxSources sources have a tally each. All others share the tally behind those.
		for i < len(s.sources) && i < maxSources && !same(s.sources[i].name, source) {
			i++
		}
		if i == len(s.sources) {
			s.addSource(source)
		}
		s.sources[i].calls[of]++
		if e.Verdict.Degraded() {
			s.sources[i].degraded++
		}
		s.this.latency[i][bin(e.Duration)]++
	}
	if counted {
		s.all.calls[of]++
	} else if e.Op != throttler.OpCharge {
		return false
	}

	n, most, refused := 0, int64(0), false
	for l, cost := range e.Verdict.All() {
		// Bucket number n of a call usually has the same number here, which saves the map.
		if n < len(s.buckets) && same(s.buckets[n].name.bucket, l.Bucket) && same(s.buckets[n].name.throttler, e.Name) {
			s.buckets[n].count(e.Op, of, l, cost)
		} else {
			s.findBucket(name{e.Name, l.Bucket}).count(e.Op, of, l, cost)
		}
		n++
		if same(l.Identifier, e.Identifier) {
			most = max(most, cost)
			refused = refused || l.RetryAfter > 0
		} else {
			others = true
		}
	}
	if n == 0 { // no bucket was asked, so only the cost of the call is known
		most = e.Cost
	}
	if k := s.knownAt(hash); k.hash == hash {
		k.add(most, refused)
	} else {
		s.asked(hash, asking{e.Identifier, most, refused})
	}
	return others
}

func (s *shard) addSource(source string) {
	if len(s.sources) == maxSources {
		source = other
	}
	s.watch.mu.Lock()
	defer s.watch.mu.Unlock()
	s.sources = append(s.sources, sourceTally{tally{series: s.watch.source(source)}, source})
}

func (s *shard) findBucket(n name) *bucketTally {
	i, ok := s.find[n]
	if !ok && len(s.buckets) >= maxBuckets {
		n = many
		i, ok = s.find[n]
	}
	if !ok {
		i = len(s.buckets)
		s.find[n] = i
		s.watch.mu.Lock()
		s.buckets = append(s.buckets, bucketTally{tally: tally{series: s.watch.bucket(n)}, name: n})
		s.watch.mu.Unlock()
	}
	return &s.buckets[i]
}

func (s *shard) refund(e *throttler.Event) {
	for l, cost := range e.Buckets() {
		s.findBucket(name{e.Name, l.Bucket}).tokens -= cost
	}
}

// count counts what the bucket answered in a call.
func (b *bucketTally) count(op throttler.Op, of outcome, l *throttler.Level, cost int64) {
	b.limit, b.period = l.Limit, l.Period
	switch {
	case l.RetryAfter > 0:
		b.calls[denied]++
	case op == throttler.OpCharge:
		b.tokens += cost
	case of == allowed:
		b.calls[allowed]++
		b.tokens += cost
		if l.Remaining*nearOf < l.Limit {
			b.near++
		}
	}
}

// same reports whether two strings are equal. Mostly they are the same memory, and then it takes no call to see that.
func same(a, b string) bool {
	return len(a) == len(b) && (unsafe.StringData(a) == unsafe.StringData(b) || a == b)
}
