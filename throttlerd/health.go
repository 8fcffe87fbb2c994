// Whether the daemon can decide: /readyz, and grpc.health.v1 for Envoy.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/rules"
)

// readiness is the result of the last probe of the storage.
type readiness struct{ failed atomic.Pointer[string] } // the error's text; nil: the storage answered

const lookEach = time.Second // also the pace that activity.second needs

var probed = throttler.Using(throttler.NewBucket(time.Second, 1).Named("readiness"))

// healthServer is grpc.health.v1. Those who watch it do not hold up the end of the daemon: their streams never end by
// themselves.
type healthServer struct {
	*health.Server

	ended context.Context //nolint:containedctx // of all who watch
	leave func()          // cancels ended
}

func newHealthServer() *healthServer {
	h := &healthServer{Server: health.NewServer()}
	h.ended, h.leave = context.WithCancel(context.Background())
	return h
}

// end tells everybody NOT_SERVING, and ends the streams of those who watch.
func (h *healthServer) end() {
	h.Shutdown()
	h.leave()
}

// Watch tells each change of the health. The last that it tells is NOT_SERVING, unless the client leaves.
func (h *healthServer) Watch(asked *healthv1.HealthCheckRequest, to healthv1.Health_WatchServer) error {
	ctx, cancel := context.WithCancel(to.Context())
	defer cancel()
	defer context.AfterFunc(h.ended, cancel)()
	w := &watching{Health_WatchServer: to, ctx: ctx}
	err := h.Server.Watch(asked, w)
	if h.ended.Err() == nil || to.Context().Err() != nil {
		return err
	}
	if w.last != healthv1.HealthCheckResponse_NOT_SERVING {
		_ = w.Send(&healthv1.HealthCheckResponse{Status: healthv1.HealthCheckResponse_NOT_SERVING}) // fails only if the client has gone
	}
	return status.Error(codes.Unavailable, "throttlerd ends")
}

// watching is the stream of one who watches.
type watching struct {
	healthv1.Health_WatchServer

	ctx  context.Context //nolint:containedctx // it is that of the stream
	last healthv1.HealthCheckResponse_ServingStatus
}

func (w *watching) Context() context.Context { return w.ctx }

func (w *watching) Send(r *healthv1.HealthCheckResponse) error {
	w.last = r.GetStatus()
	return w.Health_WatchServer.Send(r)
}

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

// ready is GET /readyz: 503 while the storage does not answer. The first fault of wrong rules is mentioned, which do not
// make it 503, since the rules before them still decide. An error of the source is in the log only: it may name hosts, users or folders, and
// whoever reaches -http can ask.
func (d *daemon) ready(w http.ResponseWriter, _ *http.Request) {
	body := struct {
		Ready bool   `json:"ready"`
		Rules int    `json:"rules"`
		ETag  string `json:"etag"`
		Stale string `json:"rules_error,omitempty"` // why newer rules are not in force
	}{d.readiness.failed.Load() == nil, len(d.engine.Rules().Rules()), d.engine.Rules().ETag(), ""}
	var wrong rules.Faults
	if err := d.engine.Err(); errors.As(err, &wrong) && len(wrong) > 0 {
		first := *wrong[0]
		first.File = filepath.Base(first.File)
		if body.Stale = first.Error(); len(wrong) > 1 {
			body.Stale += fmt.Sprintf("; and %d faults more, which are in the log", len(wrong)-1)
		}
	} else if err != nil {
		body.Stale = "the source of the rules does not answer: the log says why"
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	if !body.Ready {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(body)
}
