// Package throttlerotel reports the decisions of Throttlers to OpenTelemetry: as metrics, and for each denial as an event on
// the caller's span. It uses only the API; the program brings the SDK and its exporters.
//
//	m, err := throttlerotel.New(nil)
//	t, err := throttler.New(throttler.Config{Name: "api", Observe: m.Observe})
//	m.Storage("main", store)
//
// Identifiers are never attributes, because clients may invent any number of them. The names of Throttlers, operations and
// storages come from code. So do nearly all names of buckets; at most Options.MaxBuckets of them are attributes.
package throttlerotel

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// The attributes. Errors also have error.type, as OpenTelemetry names it.
const (
	nameKey    = attribute.Key("throttler.name")
	opKey      = attribute.Key("throttler.op")
	resultKey  = attribute.Key("throttler.result")
	sourceKey  = attribute.Key("throttler.source")
	bucketKey  = attribute.Key("throttler.bucket")
	storageKey = attribute.Key("throttler.storage")
	retryKey   = attribute.Key("throttler.retry_after") // seconds
	errorKey   = attribute.Key("error.type")
)

// DefaultMaxBuckets is used if Options.MaxBuckets is 0.
const DefaultMaxBuckets = 100

// Options configures New. Nil means the defaults.
type Options struct {
	// MeterProvider makes the instruments. Nil means the global one.
	MeterProvider metric.MeterProvider

	// MaxBuckets is how many buckets, over all Throttlers, have an attribute value of their own. The buckets seen first
	// have one. All later ones count as bucket "other" of their Throttler. 0 means DefaultMaxBuckets; below 0 is an error
	// of New.
	MaxBuckets int
}

// Metrics counts what it observes. It is safe for concurrent use and must be made by New.
type Metrics struct {
	maxBuckets int

	// Counts are kept here and reported when the metrics are read, because adding to an instrument takes far longer than
	// adding to an integer.
	calls   kept[call, *calls]
	failed  kept[failure, *atomic.Int64]
	buckets kept[bucket, *tokens]
	adding  sync.Mutex // held to add to buckets, so that they are no more than maxBuckets

	waiting        metric.Int64UpDownCounter
	duration, wait metric.Float64Histogram

	mu       sync.Mutex // guards what follows
	storages map[string]any
}

// New makes the instruments. It returns an error if an option is invalid or the MeterProvider refuses an instrument.
func New(o *Options) (*Metrics, error) {
	m := &Metrics{maxBuckets: DefaultMaxBuckets, storages: map[string]any{}}
	provider := otel.GetMeterProvider()
	if o != nil && o.MeterProvider != nil {
		provider = o.MeterProvider
	}
	if o != nil && o.MaxBuckets != 0 {
		m.maxBuckets = o.MaxBuckets
	}
	if m.maxBuckets < 0 {
		return nil, fmt.Errorf("throttlerotel: Options.MaxBuckets is %d, must be 0 or more", m.maxBuckets)
	}
	meter := provider.Meter("github.com/go-throttler/throttler/throttlerotel")
	if err := errors.Join(m.instruments(meter), m.counters(meter), m.figures(meter)); err != nil {
		return nil, fmt.Errorf("throttlerotel: %w", err)
	}
	return m, nil
}

func (m *Metrics) instruments(meter metric.Meter) error {
	var faults []error
	histogram := func(name, what string, from float64) metric.Float64Histogram {
		var bounds []float64
		for range 11 {
			bounds, from = append(bounds, from), 4*from
		}
		h, err := meter.Float64Histogram("throttler."+name, metric.WithUnit("s"), metric.WithDescription(what), metric.WithExplicitBucketBoundaries(bounds...))
		faults = append(faults, err)
		return h
	}
	m.duration = histogram("decision.duration", "Time that one call of the Throttler took, storage included, by the store that answered.", 1e-6)
	m.wait = histogram("wait.duration", "Time from the beginning of a wait to its result.", 1e-4)
	waiting, err := meter.Int64UpDownCounter("throttler.waiting", metric.WithUnit("{call}"), metric.WithDescription("Calls of Wait that have not returned."))
	m.waiting = waiting
	return errors.Join(append(faults, err)...)
}

// counters makes the counters that are reported when the metrics are read.
func (m *Metrics) counters(meter metric.Meter) error {
	var faults []error
	var all []metric.Observable
	counter := func(name, unit, what string) metric.Int64ObservableCounter {
		c, err := meter.Int64ObservableCounter("throttler."+name, metric.WithUnit(unit), metric.WithDescription(what))
		all, faults = append(all, c), append(faults, err)
		return c
	}
	decisions := counter("decisions", "{decision}", "Calls by their result. The attempts of a wait are not counted, and the source is the store that answered.")
	denials := counter("denials", "{denial}", "Denials by each bucket that denied, which may be several of one call.")
	taken := counter("tokens", "{token}", "Tokens that were taken, also by charges.")
	refunded := counter("refunded_tokens", "{token}", "Tokens that refunds gave back.")
	near := counter("near_limit", "{decision}", "Admissions that left less than a fifth of the bucket.")
	failed := counter("errors", "{error}", "Calls that failed by type, also those that a policy allowed.")
	_, err := meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		for c, n := range m.calls.known() {
			if decided := n.decided.Load(); decided > 0 { // 0 if the only such calls were attempts of a Wait
				o.ObserveInt64(decisions, decided, metric.WithAttributeSet(c.attributes()))
			}
		}
		for f, n := range m.failed.known() {
			o.ObserveInt64(failed, n.Load(), metric.WithAttributes(nameKey.String(f.name), errorKey.String(f.kind)))
		}
		for b, n := range m.buckets.known() {
			of := metric.WithAttributes(nameKey.String(b.name), bucketKey.String(b.bucket))
			o.ObserveInt64(denials, n.denials.Load(), of)
			o.ObserveInt64(taken, n.taken.Load(), of)
			o.ObserveInt64(refunded, n.refunded.Load(), of)
			o.ObserveInt64(near, n.near.Load(), of)
		}
		return nil
	}, all...)
	return errors.Join(append(faults, err)...)
}
