// Package throttlerprom exports what Throttlers decide to Prometheus.
//
//	m, err := throttlerprom.New(prometheus.DefaultRegisterer, nil)
//	t, err := throttler.New(throttler.Config{Name: "api", Observe: m.Observe})
//	m.Storage("main", store)
//
// No label contains an identifier, because clients could invent any number of those. The names of Throttlers, operations
// and storages come from code. So do nearly all names of buckets, and at most Options.MaxBuckets of them become labels.
//
// The folder also has a dashboard for Grafana, grafana.json, and alerting rules, alerts.yaml.
package throttlerprom

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// DefaultMaxBuckets is the MaxBuckets of Options that leave it 0.
const DefaultMaxBuckets = 100

// Options are the options of New. A nil *Options means the defaults.
type Options struct {
	// MaxBuckets is how many buckets get labels of their own, over all Throttlers. The first ones get them; all others
	// count as the bucket "other" of their Throttler. 0 is DefaultMaxBuckets. Below 0 New returns an error.
	MaxBuckets int

	// NativeHistograms adds native buckets to the duration of decisions, each a tenth wider than the one before, for a
	// Prometheus that scrapes them. They cost about 30 ns a decision, and a few kilobytes for each source.
	NativeHistograms bool
}

// Metrics counts what it observes and is a prometheus.Collector. Only New makes one. It is safe for concurrent use.
type Metrics struct {
	maxBuckets int

	decisions, denials, tokens, refunded, near, errors *prometheus.CounterVec
	waiting, limit, fullLimit, period                  *prometheus.GaugeVec
	duration, wait                                     *prometheus.HistogramVec

	// The series are looked up by their labels once, and afterwards in maps that are never changed: the lookup by labels
	// takes longer than the counting.
	decided  atomic.Pointer[map[decidedBy]*decided]
	last     atomic.Pointer[decided]
	full     atomic.Bool // further buckets are "other"
	mu       sync.Mutex  // held while a map is replaced; guards the fields below
	names    map[string]*named
	labelled int // number of buckets that have labels of their own
	storages map[string]any
}

// New registers the metrics with r. If r already has them, it returns those, with the Options of the first New.
func New(r prometheus.Registerer, o *Options) (*Metrics, error) {
	m := &Metrics{maxBuckets: DefaultMaxBuckets, names: map[string]*named{}, storages: map[string]any{}}
	if o != nil && o.MaxBuckets != 0 {
		m.maxBuckets = o.MaxBuckets
	}
	if m.maxBuckets < 0 {
		return nil, fmt.Errorf("throttlerprom: Options.MaxBuckets is %d, must be 0 or more", m.maxBuckets)
	}
	m.decided.Store(&map[decidedBy]*decided{})
	m.make(o != nil && o.NativeHistograms)
	err := r.Register(m)
	if there := (prometheus.AlreadyRegisteredError{}); errors.As(err, &there) {
		if m, ok := there.ExistingCollector.(*Metrics); ok {
			return m, nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("throttlerprom: %w", err)
	}
	return m, nil
}

func (m *Metrics) make(native bool) {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "throttler_" + name, Help: help}, labels)
	}
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "throttler_" + name, Help: help}, labels)
	}
	histogram := func(name, help string, from float64, native bool, labels ...string) *prometheus.HistogramVec {
		o := prometheus.HistogramOpts{Name: "throttler_" + name, Help: help, Buckets: prometheus.ExponentialBuckets(from, 4, 11)}
		if native {
			o.NativeHistogramBucketFactor, o.NativeHistogramMaxBucketNumber, o.NativeHistogramMinResetDuration = 1.1, 160, time.Hour
		}
		return prometheus.NewHistogramVec(o, labels)
	}
	m.decisions = counter("decisions_total", "Calls by their result. The attempts of a wait are not counted, and the source is the store that answered.", "name", "op", "result", "source")
	m.denials = counter("denials_total", "Denials by each bucket that denied, which may be several of one call.", "name", "bucket")
	m.tokens = counter("tokens_total", "Tokens that were taken, also by charges.", "name", "bucket")
	m.refunded = counter("refunded_tokens_total", "Tokens that refunds gave back.", "name", "bucket")
	m.near = counter("near_limit_total", "Admissions that left less than a fifth of the bucket.", "name", "bucket")
	m.errors = counter("errors_total", "Calls that failed by type, also those that a policy allowed.", "name", "type")
	m.limit = gauge("limit_tokens", "Capacity of the bucket as last seen.", "name", "bucket")
	m.fullLimit = gauge("limit_full_tokens", "Capacity of the bucket without load, as last seen: limit_tokens, but for elastic buckets.", "name", "bucket")
	m.period = gauge("limit_period_seconds", "Period of the bucket as last seen.", "name", "bucket")
	m.waiting = gauge("waiting", "Calls of Wait that have not returned.", "name")
	m.duration = histogram("decision_duration_seconds", "Time that one call of the Throttler took, storage included, by the store that answered.", 1e-6, native, "source")
	m.wait = histogram("wait_duration_seconds", "Time from the beginning of a wait to its result.", 1e-4, false, "name", "result")
}

func (m *Metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.decisions, m.denials, m.tokens, m.refunded, m.near, m.errors, m.limit, m.fullLimit, m.period, m.waiting, m.duration, m.wait}
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(to chan<- *prometheus.Desc) {
	for _, c := range m.collectors() {
		c.Describe(to)
	}
	for _, s := range stats {
		to <- s.desc
	}
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(to chan<- prometheus.Metric) {
	for _, c := range m.collectors() {
		c.Collect(to)
	}
	m.mu.Lock()
	storages := maps.Clone(m.storages)
	m.mu.Unlock()
	for name, s := range storages {
		collect(to, name, s)
	}
}

// Storage adds the figures that a storage reports about itself, under the label storage. They are read at each scrape.
// They are the number of identifiers of the storage in the process, and the state of failover and of lease; other
// storages report none. A storage of the same name is replaced; nil removes it.
func (m *Metrics) Storage(name string, storage any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.storages[name] = storage; storage == nil {
		delete(m.storages, name)
	}
}

// stat is a figure that storages report about themselves.
type stat struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

// stats are the known figures, by the names that storages use for them. A figure of any other name is not exported.
var stats = func() map[string]stat {
	all := map[string]stat{}
	for _, s := range []struct {
		name, help string
		kind       prometheus.ValueType
	}{
		{"identifiers", "Identifiers that the storage in the process holds.", prometheus.GaugeValue},
		{"failover_degraded", "1 while Postgres decides, as Redis does not.", prometheus.GaugeValue},
		{"failover_flush_failing", "1 while Postgres does not record what Redis admitted.", prometheus.GaugeValue},
		{"failover_lag_seconds", "Age of the oldest admission that Postgres has not recorded.", prometheus.GaugeValue},
		{"failover_pending", "Identifiers with admissions that Postgres has not recorded.", prometheus.GaugeValue},
		{"failover_transitions_total", "Changes of who decides.", prometheus.CounterValue},
		{"failover_relayed_total", "Identifiers that were raised in Redis, as Postgres knew of more.", prometheus.CounterValue},
		{"failover_forgotten_total", "Admissions that Postgres never records.", prometheus.CounterValue},
		{"lease_identifiers", "Identifiers that the process knows what it may decide of.", prometheus.GaugeValue},
		{"lease_tokens", "Tokens that are leased and not used.", prometheus.GaugeValue},
		{"lease_calls_total", "Calls to the shared storage.", prometheus.CounterValue},
		{"lease_local_total", "Calls admitted by a lease.", prometheus.CounterValue},
		{"lease_remembered_total", "Calls denied by a denial that is remembered.", prometheus.CounterValue},
		{"lease_returned_total", "Leases given back.", prometheus.CounterValue},
	} {
		all[s.name] = stat{prometheus.NewDesc("throttler_"+s.name, s.help, []string{"storage"}, nil), s.kind}
	}
	return all
}()

func collect(to chan<- prometheus.Metric, name string, storage any) {
	send := func(stat string, value float64) {
		if s, known := stats[stat]; known {
			to <- prometheus.MustNewConstMetric(s.desc, s.kind, value, strings.ToValidUTF8(name, "?"))
		}
	}
	if s, ok := storage.(interface{ Len() int }); ok {
		send("identifiers", float64(s.Len()))
	}
	if s, ok := storage.(interface {
		Stats() iter.Seq2[string, float64]
	}); ok {
		for stat, value := range s.Stats() {
			send(stat, value)
		}
	}
}
