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

// readiness is the result of the last probe of the storage.
type readiness struct{ failed atomic.Pointer[string] } // the error's text; nil: the storage answered

const lookEach = time.Second // also the pace that activity.second needs

var probed = throttler.Using(throttler.NewBucket(time.Second, 1).Named("readiness"))

// eachSecond probes the storage, takes a snapshot of the counts and logs errors that were left out, once a second, until
// ctx is done.
func (d *daemon) eachSecond(ctx context.Context) {
	tick := time.NewTicker(lookEach)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			d.activity.second(now)
			d.undecided.due()
			d.undecidedAllowed.due()
			d.probe(ctx)
		case <-ctx.Done():
			return
		}
	}
}

// probe sends the storage a call that changes nothing, and publishes whether it answered. A failover storage is ready
// while Postgres stands in for a failed Redis.
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
	for _, service := range []string{"", "envoy.service.ratelimit.v3.RateLimitService", "ratelimit"} { // clients of envoyproxy/ratelimit ask for the last one
		d.grpcReady.SetServingStatus(service, state)
	}
}

// ready is GET /readyz: 503 while the storage does not answer. Faulty rules are mentioned but do not make it 503, since
// the rules before them still decide.
func (d *daemon) ready(w http.ResponseWriter, _ *http.Request) {
	body := struct {
		Ready bool   `json:"ready"`
		Rules int    `json:"rules"`
		ETag  string `json:"etag"`
		Stale string `json:"rules_error,omitempty"` // why newer rules are not in force
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
