// Whether the daemon can decide: /readyz, and grpc.health.v1 for Envoy.

package main

import (
	"context"
	"encoding/json"
	"net/http"
	"sync/atomic"
	"time"

	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/go-throttler/throttler"
)

// readiness is what the last look at the storage found.
type readiness struct{ failed atomic.Pointer[string] } // nil: it answered

const lookEach = time.Second // activity.second wants that

var probed = throttler.Using(throttler.NewBucket(time.Second, 1).Named("readiness"))

// eachSecond looks at the storage until the context is done.
func (d *daemon) eachSecond(ctx context.Context) {
	tick := time.NewTicker(lookEach)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			d.activity.second(now)
			d.probe(ctx)
		case <-ctx.Done():
			return
		}
	}
}

// probe asks the storage something that changes nothing. Postgres in place of a Redis that failed is ready.
func (d *daemon) probe(ctx context.Context) {
	asking, cancel := context.WithTimeout(ctx, lookEach)
	defer cancel()
	_, err := d.probed.Peek(asking, "readiness", probed, throttler.Cost(0))
	if ctx.Err() != nil {
		return
	}
	before, now := d.readiness.failed.Load(), (*string)(nil)
	if err != nil {
		now = new(err.Error())
	}
	d.readiness.failed.Store(now)
	switch {
	case now != nil && before == nil:
		d.log.Error("not ready: the storage does not answer", "error", *now)
	case now == nil && before != nil:
		d.log.Info("ready again: the storage answers")
	}
	state := healthv1.HealthCheckResponse_SERVING
	if now != nil {
		state = healthv1.HealthCheckResponse_NOT_SERVING
	}
	for _, service := range []string{"", "envoy.service.ratelimit.v3.RateLimitService", "ratelimit"} { // the last is asked of envoyproxy/ratelimit
		d.grpcReady.SetServingStatus(service, state)
	}
}

// ready is GET /readyz: 503 while the storage does not answer. Rules that are wrong are told, but the ones before still
// decide.
func (d *daemon) ready(w http.ResponseWriter, _ *http.Request) {
	body := struct {
		Ready bool   `json:"ready"`
		Rules int    `json:"rules"`
		ETag  string `json:"etag"`
		Stale string `json:"rules_error,omitempty"` // why newer rules do not count
	}{d.readiness.failed.Load() == nil, len(d.engine.Rules().Rules()), d.engine.Rules().ETag(), ""}
	if err := d.engine.Err(); err != nil {
		body.Stale = err.Error()
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	if !body.Ready {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(body)
}
