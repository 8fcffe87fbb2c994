package throttlerotel

// What an Event adds to the metrics.

import (
	"context"
	"errors"
	"maps"
	"strings"
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/go-throttler/throttler"
)

// Observe is the Config.Observe of a Throttler, or of several, which their names tell apart. If the span of the context is
// recording, a denial becomes an event "throttler.denied" on it. The status of the span does not change. Observe is safe for
// concurrent use.
func (m *Metrics) Observe(ctx context.Context, e *throttler.Event) {
	result := e.Result()
	c := m.calls.get(call{e.Name, e.Op, result, e.Verdict.Source()}, newCalls)
	if e.Op == throttler.OpWait {
		m.observeWait(ctx, e, result)
	} else {
		m.observeAsked(ctx, e, c)
	}
	switch e.Attempt {
	case 0:
		c.decided.Add(1)
		m.observeBuckets(ctx, e, result)
	case 1:
		m.waiting.Add(ctx, 1, metric.WithAttributes(nameKey.String(e.Name)))
	}
}

// observeAsked counts an event that is not the end of a Wait, and therefore asked a storage at most once.
func (m *Metrics) observeAsked(ctx context.Context, e *throttler.Event, c *calls) {
	if e.Duration > 0 {
		m.duration.Record(ctx, e.Duration.Seconds(), c.duration...)
	}
	if e.Err != nil {
		m.failed.get(failure{e.Name, e.ErrorType()}, func(failure) *atomic.Int64 { return new(atomic.Int64) }).Add(1)
	}
}

// observeWait records the end of a Wait with its own words for the result: "admitted", "deadline" if it could not be admitted
// in time, "gave_up" if its context was cancelled, or that of the Event.
func (m *Metrics) observeWait(ctx context.Context, e *throttler.Event, result string) {
	name := nameKey.String(e.Name)
	m.waiting.Add(ctx, -1, metric.WithAttributes(name))
	switch {
	case e.Err == nil:
		result = "admitted"
	case result != "denied":
	case errors.Is(e.Err, context.DeadlineExceeded):
		result = "deadline"
	default:
		result = "gave_up"
	}
	m.wait.Record(ctx, e.Duration.Seconds(), metric.WithAttributes(name, resultKey.String(result)))
}

// observeBuckets counts what the event says about each bucket. A Peek takes and denies nothing, so it adds nothing.
func (m *Metrics) observeBuckets(ctx context.Context, e *throttler.Event, result string) {
	asks := e.Op == throttler.OpConsume || e.Op == throttler.OpWait
	allowed := result == "allowed"
	takes := allowed && (asks || e.Op == throttler.OpCharge) || e.Op == throttler.OpCharge && errors.Is(e.Err, throttler.ErrDebtLimit)
	if asks && result == "denied" {
		denied(ctx, e)
	}
	for l, cost := range e.Buckets() {
		b := m.bucket(e.Name, l.Bucket)
		switch {
		case takes:
			b.took(l, cost)
		case allowed && e.Op == throttler.OpRefund:
			b.refunded.Add(cost)
		case asks && l.RetryAfter > 0:
			b.denials.Add(1)
		}
	}
}

func denied(ctx context.Context, e *throttler.Event) {
	if span := trace.SpanFromContext(ctx); span.IsRecording() {
		span.AddEvent("throttler.denied", trace.WithAttributes(
			nameKey.String(e.Name), bucketKey.String(e.Bucket), retryKey.Float64(e.Verdict.RetryAfter.Seconds())))
	}
}

type call struct {
	name   string
	op     throttler.Op
	result string
	source string
}

func (c call) attributes() attribute.Set {
	return attribute.NewSet(nameKey.String(c.name), opKey.String(string(c.op)), resultKey.String(c.result), text(sourceKey, c.source))
}

// text is an attribute of UTF-8. OTLP sends nothing at all of a program of which one text is not.
func text(k attribute.Key, s string) attribute.KeyValue { return k.String(strings.ToValidUTF8(s, "?")) }

// calls counts the calls of one kind and has the options with which their duration is recorded. The options are kept,
// because making them for each call would allocate.
type calls struct {
	decided  atomic.Int64
	duration []metric.RecordOption
}

func newCalls(c call) *calls {
	return &calls{duration: []metric.RecordOption{metric.WithAttributeSet(attribute.NewSet(text(sourceKey, c.source)))}}
}

type failure struct{ name, kind string }

type bucket struct{ name, bucket string }

// tokens counts what happened to one bucket.
type tokens struct{ denials, taken, refunded, near atomic.Int64 }

func (t *tokens) took(l *throttler.Level, cost int64) {
	t.taken.Add(cost)
	if 5*l.Remaining < l.Limit { // less than a fifth is left
		t.near.Add(1)
	}
}

// bucket returns the counts of a bucket. Once MaxBuckets buckets have attributes of their own, a further one is counted as
// "other".
func (m *Metrics) bucket(name, of string) *tokens {
	if b := m.buckets.known()[bucket{name, of}]; b != nil {
		return b
	}
	return m.addBucket(name, of)
}

func (m *Metrics) addBucket(name, of string) *tokens {
	m.adding.Lock()
	defer m.adding.Unlock()
	k := bucket{name, of}
	if known := m.buckets.known(); known[k] == nil && len(known) >= m.maxBuckets {
		k.bucket = "other"
	}
	return m.buckets.get(k, func(bucket) *tokens { return new(tokens) })
}

// kept is a map of values that are made once per key. A map that readers can see never changes: get replaces it by a copy
// with one more key. Reading therefore takes no lock.
type kept[K comparable, V any] struct {
	all atomic.Pointer[map[K]V]
	mu  sync.Mutex // held to replace the map
}

func (k *kept[K, V]) known() map[K]V {
	if all := k.all.Load(); all != nil {
		return *all
	}
	return nil
}

func (k *kept[K, V]) get(key K, made func(K) V) V {
	if v, ok := k.known()[key]; ok {
		return v
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	all := map[K]V{}
	maps.Copy(all, k.known())
	if _, ok := all[key]; !ok {
		all[key] = made(key)
		k.all.Store(&all)
	}
	return all[key]
}
