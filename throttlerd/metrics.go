// The metrics for Prometheus: GET /metrics. docs/throttlerd.md lists their names, and a test keeps them from changing.

package main

import (
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/go-throttler/throttler/storage/lease"
	"github.com/go-throttler/throttler/throttlerprom"
)

// maxBuckets is how many buckets get labels of their own. Rules, and limits that requests bring, determine their names.
const maxBuckets = 1000

// newMetrics registers everything. Each daemon has its own registry, because tests run several daemons in one process.
func (d *daemon) newMetrics(s *stores) (m *throttlerprom.Metrics, err error) {
	d.registry = prometheus.NewRegistry()
	if m, err = throttlerprom.New(d.registry, &throttlerprom.Options{MaxBuckets: maxBuckets, NativeHistograms: true}); err != nil {
		return nil, err
	}
	m.Storage(d.config.storage, s.shared)
	if s.leases != nil {
		m.Storage(lease.Source, s.leases)
	}
	for _, c := range []prometheus.Collector{d, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})} {
		if err := d.registry.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (d *daemon) metrics() http.Handler {
	return promhttp.HandlerFor(d.registry, promhttp.HandlerOpts{})
}

var (
	decidedDesc = prometheus.NewDesc("throttlerd_rule_decisions_total", "Requests that a rule applied to, by what it did to them.", []string{"domain", "rule", "result"}, nil)
	rulesDesc   = prometheus.NewDesc("throttlerd_rules", "Rules that count.", nil, nil)
	staleDesc   = prometheus.NewDesc("throttlerd_rules_stale", "1 while newer rules are wrong or cannot be read, so that those before still count.", nil, nil)
	readyDesc   = prometheus.NewDesc("throttlerd_ready", "1 while the storage answers.", nil, nil)
)

// Describe implements prometheus.Collector.
func (d *daemon) Describe(to chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{decidedDesc, rulesDesc, staleDesc, readyDesc} {
		to <- desc
	}
}

// Collect implements prometheus.Collector. A result that a rule never had is no series: with 10,000 rules most would be
// 0.
func (d *daemon) Collect(to chan<- prometheus.Metric) {
	gauge := func(desc *prometheus.Desc, value float64) {
		to <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value)
	}
	gauge(rulesDesc, float64(len(d.engine.Rules().Rules())))
	gauge(staleDesc, truth(d.engine.Err() != nil))
	gauge(readyDesc, truth(d.readiness.failed.Load() == nil))
	for _, a := range d.activity.all(time.Now()) {
		for r, n := range a.total {
			if n > 0 {
				to <- prometheus.MustNewConstMetric(decidedDesc, prometheus.CounterValue, float64(n), label(a.domain), label(a.id), resultNames[r])
			}
		}
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// label replaces invalid UTF-8, which Prometheus rejects in label values.
func label(text string) string { return strings.ToValidUTF8(text, "?") }
