package throttlerotel

// What is counted for each Event.

import (
	"context"
	"errors"
	"maps"
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/go-throttler/throttler"
)

// Observe is for Config.Observe, of one Throttler or of several, which their names tell apart. A denial is an event
// "throttler.denied" on the span of the context, if there is one that records; the status of the span stays as it is.
func (m *Metrics) Observe(ctx context.Context, e *throttler.Event) {
	result := e.Result()
	if e.Op == throttler.OpWait {
		m.observeWait(ctx, e, result)
	} else {
		m.observeAsked(ctx, e, result)
	}
	switch e.Attempt {
	case 0:
		m.decisions.Add(ctx, 1, m.optionsOf(e, result).decision...)
		m.observeBuckets(ctx, e, result)
	case 1:
		m.waiting.Add(ctx, 1, metric.WithAttributes(nameKey.String(e.Name)))
	}
}

// observeAsked counts what is no wait, and so asked a storage once at most.
func (m *Metrics) observeAsked(ctx context.Context, e *throttler.Event, result string) {
	if e.Duration > 0 {
		m.duration.Record(ctx, e.Duration.Seconds(), m.optionsOf(e, result).duration...)
	}
	if e.Err != nil {
		m.errors.Add(ctx, 1, metric.WithAttributes(nameKey.String(e.Name), errorKey.String(e.ErrorType())))
	}
}

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

func (m *Metrics) observeBuckets(ctx context.Context, e *throttler.Event, result string) {
	asks := e.Op == throttler.OpConsume || e.Op == throttler.OpWait
	allowed := result == "allowed"
	takes := allowed && (asks || e.Op == throttler.OpCharge)
	if asks && result == "denied" {
		denied(ctx, e)
	}
	for l, cost := range e.Buckets() {
		of := m.bucket(e.Name, l.Bucket)
		switch {
		case takes:
			m.tokens.Add(ctx, cost, of...)
			if 5*l.Remaining < l.Limit {
				m.near.Add(ctx, 1, of...)
			}
		case allowed && e.Op == throttler.OpRefund:
			m.refunded.Add(ctx, cost, of...)
		case asks && l.RetryAfter > 0:
			m.denials.Add(ctx, 1, of...)
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

type callOptions struct {
	decision []metric.AddOption
	duration []metric.RecordOption
}

func (m *Metrics) optionsOf(e *throttler.Event, result string) callOptions {
	return m.calls.get(call{e.Name, e.Op, result, e.Verdict.Source()}, func(c call) callOptions {
		source := sourceKey.String(c.source)
		all := attribute.NewSet(nameKey.String(c.name), opKey.String(string(c.op)), resultKey.String(c.result), source)
		return callOptions{
			[]metric.AddOption{metric.WithAttributeSet(all)},
			[]metric.RecordOption{metric.WithAttributeSet(attribute.NewSet(source))},
		}
	})
}

type bucket struct{ name, bucket string }

// bucket is the options of a bucket, or of "other" where MaxBuckets have options of their own.
func (m *Metrics) bucket(name, of string) []metric.AddOption {
	k := bucket{name, of}
	if m.buckets.full(k, m.maxBuckets) {
		k.bucket = "other"
	}
	return m.buckets.get(k, func(k bucket) []metric.AddOption {
		return []metric.AddOption{metric.WithAttributeSet(attribute.NewSet(nameKey.String(k.name), bucketKey.String(k.bucket)))}
	})
}

// kept is what is made once for each key, in a map that is never changed: to make options for each call allocates.
type kept[K comparable, V any] struct {
	all atomic.Pointer[map[K]V]
	mu  sync.Mutex // held to replace the map
}

func (k *kept[K, V]) get(key K, made func(K) V) V {
	if all := k.all.Load(); all != nil {
		if v, ok := (*all)[key]; ok {
			return v
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	all := map[K]V{}
	if known := k.all.Load(); known != nil {
		all = maps.Clone(*known)
	}
	if _, ok := all[key]; !ok {
		all[key] = made(key)
		k.all.Store(&all)
	}
	return all[key]
}

// full says that there is no room for a new key beside most others.
func (k *kept[K, V]) full(key K, most int) bool {
	all := k.all.Load()
	if all == nil {
		return false
	}
	_, ok := (*all)[key]
	return !ok && len(*all) >= most
}
