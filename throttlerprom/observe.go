package throttlerprom

// What is counted for each Event.

import (
	"context"
	"errors"
	"maps"
	"strings"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/go-throttler/throttler"
)

// Observe is the function for Config.Observe of one or several Throttlers, whose names tell them apart. It allocates
// nothing for labels that it has seen before.
func (m *Metrics) Observe(_ context.Context, e *throttler.Event) {
	d := m.decidedBy(e)
	if e.Op == throttler.OpWait {
		m.observeWait(e)
	} else {
		d.asked(e)
	}
	switch e.Attempt {
	case 0:
		result := e.Result()
		d.counter(result).Inc()
		d.observeBuckets(e, result)
	case 1:
		m.waiting.WithLabelValues(e.Name).Inc()
	}
}

func (m *Metrics) observeWait(e *throttler.Event) {
	m.waiting.WithLabelValues(e.Name).Dec()
	result := "error"
	switch {
	case e.Err == nil:
		result = "admitted"
	case e.Result() != "denied":
	case errors.Is(e.Err, context.DeadlineExceeded):
		result = "deadline"
	default:
		result = "gave_up"
	}
	m.wait.WithLabelValues(e.Name, result).Observe(e.Duration.Seconds())
}

func (d *decided) observeBuckets(e *throttler.Event, result string) {
	asks := e.Op == throttler.OpConsume || e.Op == throttler.OpWait
	allowed := result == "allowed"
	takes := allowed && (asks || e.Op == throttler.OpCharge) || e.Op == throttler.OpCharge && errors.Is(e.Err, throttler.ErrDebtLimit)
	for l, cost := range e.Buckets() {
		b := d.named.bucket(l.Bucket)
		b.limited(l)
		switch {
		case takes:
			b.took(l, cost)
		case allowed && e.Op == throttler.OpRefund:
			b.refunded.Add(float64(cost))
		case asks && l.RetryAfter > 0:
			b.denials.Inc()
		}
	}
}

type decidedBy struct {
	name   string
	op     throttler.Op
	source string
}

// decided holds the series for the calls of one name, operation and source.
type decided struct {
	by                                decidedBy
	named                             *named
	allowed, denied, bypassed, failed prometheus.Counter
	errors                            *prometheus.CounterVec // with the label name set
	duration                          prometheus.Observer
}

func (d *decided) counter(result string) prometheus.Counter {
	switch result {
	case "allowed":
		return d.allowed
	case "denied":
		return d.denied
	case "bypassed":
		return d.bypassed
	}
	return d.failed
}

// asked counts a call other than a Wait. The attempts of a Wait are such calls, so its errors and durations are counted
// there.
func (d *decided) asked(e *throttler.Event) {
	if e.Duration > 0 {
		d.duration.Observe(e.Duration.Seconds())
	}
	if e.Err != nil {
		d.errors.WithLabelValues(e.ErrorType()).Inc()
	}
}

func (m *Metrics) decidedBy(e *throttler.Event) *decided {
	by := decidedBy{e.Name, e.Op, e.Verdict.Source()}
	if d := m.last.Load(); d != nil && d.by == by { // the usual case, and faster than the map
		return d
	}
	d := (*m.decided.Load())[by]
	if d == nil {
		d = m.addDecided(by)
	}
	m.last.Store(d)
	return d
}

// The maps are copied and replaced, never changed: Observe reads them without a lock.
func (m *Metrics) addDecided(by decidedBy) *decided {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := maps.Clone(*m.decided.Load())
	if all[by] == nil {
		all[by] = m.newDecided(by)
		m.decided.Store(&all)
	}
	return all[by]
}

func (m *Metrics) newDecided(by decidedBy) *decided {
	source := strings.ToValidUTF8(by.source, "?")
	result := func(result string) prometheus.Counter {
		return m.decisions.WithLabelValues(by.name, string(by.op), result, source)
	}
	n := m.names[by.name]
	if n == nil {
		n = &named{m: m, name: by.name}
		n.buckets.Store(&map[string]*bucket{})
		m.names[by.name] = n
		for _, t := range errorTypes {
			m.errors.WithLabelValues(by.name, t)
		}
	}
	return &decided{
		by, n, result("allowed"), result("denied"), result("bypassed"), result("error"),
		m.errors.MustCurryWith(prometheus.Labels{"name": by.name}), m.duration.WithLabelValues(source),
	}
}

// errorTypes are those of Event.ErrorType. Their series begin with the first call of a name. One that began with the first
// error would begin with 1, which is no increase for Prometheus, so an alert would miss that error.
var errorTypes = [...]string{"unavailable", "corrupt", "closed", "cancelled", "unknown_identifier", "debt_limit", "cost_exceeds_capacity", "invalid", "other"}

// named holds the buckets of all Throttlers of one name.
type named struct {
	m       *Metrics
	name    string
	buckets atomic.Pointer[map[string]*bucket] // by bucket name; replaced as a whole
}

// other is the bucket label for all buckets that have no labels of their own.
const other = "other"

func (n *named) bucket(name string) *bucket {
	known := *n.buckets.Load()
	if b := known[name]; b != nil {
		return b
	}
	if b := known[other]; b != nil && n.m.full.Load() {
		return b
	}
	return n.add(name)
}

func (n *named) add(name string) *bucket {
	m := n.m
	m.mu.Lock()
	defer m.mu.Unlock()
	known := maps.Clone(*n.buckets.Load())
	if known[name] != nil { // another goroutine has added it meanwhile
		return known[name]
	}
	if m.full.Load() {
		name = other
	} else {
		m.labelled++
		m.full.Store(m.labelled == m.maxBuckets)
	}
	if known[name] == nil {
		known[name] = m.newBucket(n.name, name)
		n.buckets.Store(&known)
	}
	return known[name]
}

// bucket holds the series of one bucket. The bucket "other" stands for many, so it has no limit and no period.
type bucket struct {
	denials, tokens, refunded, near prometheus.Counter
	limit, full, period             prometheus.Gauge

	lastLimit, lastFull, lastPeriod atomic.Int64 // last values set; they seldom change
}

func (m *Metrics) newBucket(name, of string) *bucket {
	b := &bucket{
		denials: m.denials.WithLabelValues(name, of), tokens: m.tokens.WithLabelValues(name, of),
		refunded: m.refunded.WithLabelValues(name, of), near: m.near.WithLabelValues(name, of),
	}
	if of != other {
		b.limit, b.full, b.period = m.limit.WithLabelValues(name, of), m.fullLimit.WithLabelValues(name, of), m.period.WithLabelValues(name, of)
	}
	return b
}

func (b *bucket) limited(l *throttler.Level) {
	if b.limit == nil || b.lastLimit.Load() == l.Limit && b.lastFull.Load() == l.Full && b.lastPeriod.Load() == int64(l.Period) {
		return
	}
	b.lastLimit.Store(l.Limit)
	b.lastFull.Store(l.Full)
	b.lastPeriod.Store(int64(l.Period))
	b.limit.Set(float64(l.Limit))
	b.full.Set(float64(l.Full))
	b.period.Set(l.Period.Seconds())
}

func (b *bucket) took(l *throttler.Level, cost int64) {
	b.tokens.Add(float64(cost))
	if 5*l.Remaining < l.Limit {
		b.near.Inc()
	}
}
