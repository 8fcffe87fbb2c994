package throttlerotel

// Figures that storages report about themselves.

import (
	"context"
	"errors"
	"iter"
	"maps"

	"go.opentelemetry.io/otel/metric"
)

// Storage adds the figures that a storage reports about itself, with the attribute throttler.storage. They are read each
// time the metrics are: the runtime storage reports how many identifiers it holds, and failover and leases report their states. Other
// storages report nothing yet. A storage replaces an earlier one of the same name; nil removes it. Storage is safe for
// concurrent use.
func (m *Metrics) Storage(name string, storage any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.storages[name] = storage; storage == nil {
		delete(m.storages, name)
	}
}

// figures makes an instrument for each figure that a storage may report, and maps the storage's name of the figure to it.
func (m *Metrics) figures(meter metric.Meter) error {
	var faults []error
	known, all := map[string]metric.Float64Observable{}, []metric.Observable(nil)
	keep := func(stat string, o metric.Float64Observable, err error) {
		known[stat] = o
		all, faults = append(all, o), append(faults, err)
	}
	gauge := func(stat, name, unit, what string) {
		g, err := meter.Float64ObservableGauge("throttler."+name, metric.WithUnit(unit), metric.WithDescription(what))
		keep(stat, g, err)
	}
	counter := func(stat, name, unit, what string) {
		c, err := meter.Float64ObservableCounter("throttler."+name, metric.WithUnit(unit), metric.WithDescription(what))
		keep(stat, c, err)
	}
	gauge("identifiers", "identifiers", "{identifier}", "Identifiers that the storage in the process holds.")
	gauge("failover_degraded", "failover.degraded", "1", "1 while Postgres decides, as Redis does not.")
	gauge("failover_flush_failing", "failover.flush_failing", "1", "1 while Postgres does not record what Redis admitted.")
	gauge("failover_lag_seconds", "failover.lag", "s", "Age of the oldest admission that Postgres has not recorded.")
	gauge("failover_pending", "failover.pending", "{identifier}", "Identifiers with admissions that Postgres has not recorded.")
	counter("failover_transitions_total", "failover.transitions", "{transition}", "Changes of who decides.")
	counter("failover_relayed_total", "failover.relayed", "{identifier}", "Identifiers that were raised in Redis, as Postgres knew of more.")
	counter("failover_forgotten_total", "failover.forgotten", "{admission}", "Admissions that Postgres never records.")
	gauge("lease_identifiers", "lease.identifiers", "{identifier}", "Identifiers that the process knows what it may decide of.")
	gauge("lease_tokens", "lease.tokens", "{token}", "Tokens that are leased and not used.")
	counter("lease_calls_total", "lease.calls", "{call}", "Calls to the shared storage.")
	counter("lease_local_total", "lease.local", "{call}", "Calls admitted by a lease.")
	counter("lease_remembered_total", "lease.remembered", "{call}", "Calls denied by a denial that is remembered.")
	counter("lease_returned_total", "lease.returned", "{lease}", "Leases given back.")
	_, err := meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		m.observeStorages(o, known)
		return nil
	}, all...)
	return errors.Join(append(faults, err)...)
}

func (m *Metrics) observeStorages(o metric.Observer, known map[string]metric.Float64Observable) {
	m.mu.Lock()
	storages := maps.Clone(m.storages)
	m.mu.Unlock()
	for name, s := range storages {
		of := metric.WithAttributes(text(storageKey, name))
		for stat, value := range statsOf(s) {
			if instrument := known[stat]; instrument != nil {
				o.ObserveFloat64(instrument, value, of)
			}
		}
	}
}

func statsOf(storage any) iter.Seq2[string, float64] {
	switch s := storage.(type) {
	case interface {
		Stats() iter.Seq2[string, float64]
	}:
		return s.Stats()
	case interface{ Len() int }:
		return func(yield func(string, float64) bool) { yield("identifiers", float64(s.Len())) }
	}
	return func(func(string, float64) bool) {}
}
