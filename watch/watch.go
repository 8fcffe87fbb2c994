// Package watch shows live what Throttlers decide: decisions a second and their peak, each bucket, the heaviest
// identifiers, how long decisions take, which storage decides, and sudden spikes. It covers one process and keeps
// everything in its memory.
//
//	w := watch.New(nil)
//	t, err := throttler.New(throttler.Config{Observe: w.Observe, …})
//	mux.Handle("/debug/throttler/", staffOnly(w)) // the page, behind your own login, and what it shows as JSON at json
//	expvar.Publish("throttler", expvar.Func(func() any { return w.Snapshot() })) // with identifiers, for anybody at /debug/vars
//
// Memory is bounded, whatever the calls: identifiers are counted by sketches, and only the names of the heaviest are
// kept.
package watch

import (
	"context"
	"hash/maphash"
	"sync"
	"time"

	"github.com/go-throttler/throttler"
)

// Options are the options of a Watch. The zero value means the defaults.
type Options struct {
	// Mask, if not nil, returns what is kept and shown in place of an identifier, such as a hash. It is called when an
	// identifier is found to be heavy. It must be quick and safe for concurrent use, and must not call the Watch.
	Mask func(identifier string) string

	// State, if not nil, returns what else is shown, such as the state of a storage. encoding/json must be able to encode
	// it, and should make an object of it. It is called for each Snapshot.
	State func() any
}

// Watch observes any number of Throttlers. Only New makes one. It is safe for concurrent use, has no goroutine and needs
// no Close.
type Watch struct {
	options Options
	seed    maphash.Seed // random, so that nobody can choose identifiers with equal hashes
	start   time.Time    // times are counted from here, by the monotonic clock
	shards  [shards]shard

	mu      sync.Mutex // guards the fields below; if a shard is locked too, that is locked first
	all     *series
	sources map[string]*series
	buckets map[name]*series
}

const (
	shards     = 8  // by identifier, so that a call seldom waits for another
	maxSources = 8  // further sources count as other
	maxBuckets = 64 // further buckets count as other
	other      = "other"
)

// name is the name of a bucket and of its Throttler.
type name struct{ throttler, bucket string }

// many is the bucket that stands for all further ones. It has no limit, since theirs differ.
var many = name{bucket: other}

// New returns a Watch. Nil options mean the defaults.
func New(o *Options) *Watch {
	w := &Watch{seed: maphash.MakeSeed(), start: time.Now(), all: newSeries(), sources: make(map[string]*series), buckets: make(map[name]*series)}
	if o != nil {
		w.options = *o
	}
	for i := range w.shards {
		w.shards[i].begin(w)
	}
	return w
}

// Observe is the function for Config.Observe. It allocates only when a minute begins, for a new source or bucket, and
// when an identifier becomes heavy.
func (w *Watch) Observe(_ context.Context, e *throttler.Event) {
	hash := w.hash(e.Identifier)
	s := w.shard(hash)
	s.mu.Lock()
	if !e.Time.Before(s.until) {
		s.turn(e.Time)
	}
	others := s.count(e, hash)
	s.mu.Unlock()
	if others {
		w.countOthers(e)
	}
}

// countOthers counts what identifiers other than that of the event asked for. They may belong to other shards, which are
// locked one after the other and never together.
func (w *Watch) countOthers(e *throttler.Event) {
	a := asking{identifier: e.Identifier}
	for l, cost := range e.Verdict.All() {
		if l.Identifier != a.identifier {
			w.countOther(e, &a)
			a = asking{identifier: l.Identifier}
		}
		a.add(l, cost)
	}
	w.countOther(e, &a)
}

func (w *Watch) countOther(e *throttler.Event, a *asking) {
	if a.identifier == e.Identifier {
		return
	}
	hash := w.hash(a.identifier)
	s := w.shard(hash)
	s.mu.Lock()
	if !e.Time.Before(s.until) {
		s.turn(e.Time)
	}
	s.asked(hash, *a)
	s.mu.Unlock()
}

func (w *Watch) hash(id string) int64 { return int64(maphash.String(w.seed, id)) }

func (w *Watch) shard(hash int64) *shard { return &w.shards[uint64(hash)>>32%shards] }

// time returns when a second began.
func (w *Watch) time(second int64) time.Time { return w.start.Add(time.Duration(second) * time.Second) }

// source returns the series of a source, and bucket that of a bucket. Beyond the first few it is the series that the
// others share.
func (w *Watch) source(of string) *series {
	return seriesOf(w.sources, of, other, maxSources)
}

func (w *Watch) bucket(of name) *series {
	return seriesOf(w.buckets, of, many, maxBuckets)
}

func seriesOf[K comparable](all map[K]*series, k, other K, most int) *series {
	if all[k] == nil && len(all) >= most {
		k = other
	}
	if all[k] == nil {
		all[k] = newSeries()
	}
	return all[k]
}
