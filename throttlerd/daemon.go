// The daemon: its parts, its listeners, how it starts and how it stops.

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/service/ratelimit/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/rules"
	"github.com/go-throttler/throttler/watch"
)

// daemon is everything that a process serves. newDaemon makes one; serve runs it once and closes it.
type daemon struct {
	config  *config
	log     *slog.Logger
	closing closing // storages and sources to close

	engine   *rules.Engine
	service  *service
	admin    *admin // nil without a token or an address
	activity *activity
	registry *prometheus.Registry

	undecided        faults // of requests
	undecidedAllowed faults // by -on-storage-error allow

	probed    *throttler.Throttler
	readiness readiness
	grpcReady *healthServer

	grpc      *grpc.Server
	servers   []*http.Server
	listeners []listener
}

// listener is an open address and the function that serves it.
type listener struct {
	name  string
	l     net.Listener
	serve func(net.Listener) error
}

// newDaemon opens everything and listens, but serves no request yet.
func newDaemon(ctx context.Context, c *config, log *slog.Logger) (*daemon, error) {
	d := &daemon{config: c, log: log, activity: newActivity(), grpcReady: newHealthServer(), undecided: faults{log: log}, undecidedAllowed: faults{log: log}}
	err := d.open(ctx)
	if err == nil {
		err = d.listen(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, d.close(context.WithoutCancel(ctx)))
	}
	return d, nil
}

// open opens the storage and the rules. The engine reads the rules before any listener exists, so the daemon does not
// start with faulty ones.
func (d *daemon) open(ctx context.Context) error {
	stores, err := openStores(ctx, d.config, d.log, &d.closing)
	if err != nil {
		return err
	}
	if d.probed, err = throttler.New(throttler.Config{Name: "rules", Storage: stores.shared}); err != nil {
		return err
	}
	decides, err := d.newThrottler(&stores)
	if err != nil {
		return err
	}
	source, err := openSource(ctx, d.config, &d.closing)
	if err != nil {
		return err
	}
	if d.engine, err = rules.NewEngine(decides, source, &rules.Options{OnLoad: d.loaded}); err != nil {
		return err
	}
	d.activity.loaded(d.engine.Rules())
	if d.admin != nil {
		d.admin.serves(d.engine, source)
	}
	d.service, err = newService(decides, d.engine, d.config, d.activity.count, d.undecided.tell)
	return err
}

// newThrottler makes the throttler that decides, with its observers. The live page is part of the admin API and exists
// only with it.
func (d *daemon) newThrottler(s *stores) (*throttler.Throttler, error) {
	m, err := d.newMetrics(s)
	if err != nil {
		return nil, err
	}
	observers := []func(context.Context, *throttler.Event){m.Observe, d.bypassed()}
	if d.config.adminToken != "" && d.config.admin != "" {
		live := watch.New(&watch.Options{State: s.state()})
		observers = append(observers, live.Observe)
		d.admin = newAdmin(d.config.adminToken, d.log, d.activity, live)
	}
	policy := throttler.Deny
	if d.config.onStorageError == "allow" {
		policy = throttler.Allow
	}
	return throttler.New(throttler.Config{Name: "rules", Storage: s.decides(), OnStorageError: policy, Observe: throttler.Observers(observers...)})
}

// loaded is called after the engine has looked for newer rules: with the new set, or with the error that kept the old
// one.
func (d *daemon) loaded(set *rules.Set, err error) {
	if err != nil {
		d.log.Error("the rules stay as they are, since the new ones are wrong or cannot be read", "error", err.Error())
		return
	}
	d.activity.loaded(set)
	d.log.Info("the rules are loaded", "rules", len(set.Rules()), "etag", set.ETag())
}

// faults logs errors, at most one a second. Each line says how many errors there were since the line before, itself
// included. It is safe for concurrent use.
type faults struct {
	log *slog.Logger

	mu   sync.Mutex // guards the fields below
	last time.Time  // of the last line
	err  error      // of the newest error that stands in no line yet
	more int        // how many those are
}

func (f *faults) tell(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
	f.more++
	f.write(time.Second)
}

// due writes the errors that were left out, if a second has passed. Without it the last of them would wait for another
// error, perhaps for hours. It is called each second.
func (f *faults) due() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.write(time.Second)
}

// end writes the errors that were left out, now.
func (f *faults) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.write(0)
}

// write expects mu to be held.
func (f *faults) write(after time.Duration) {
	if f.more == 0 || time.Since(f.last) < after {
		return
	}
	f.log.Error("a request could not be decided", "error", f.err.Error(), "requests", f.more)
	f.last, f.err, f.more = time.Now(), nil, 0
}

// bypassed returns an observer that logs requests which were admitted undecided because the storage failed. It is nil
// unless -on-storage-error is allow.
func (d *daemon) bypassed() func(context.Context, *throttler.Event) {
	if d.config.onStorageError != "allow" {
		return nil
	}
	return func(_ context.Context, e *throttler.Event) {
		if e.Err != nil && e.Bypassed() {
			d.undecidedAllowed.tell(fmt.Errorf("allowed without a limit: %w", e.Err))
		}
	}
}

// listen opens the addresses.
func (d *daemon) listen(ctx context.Context) error {
	secure, err := d.config.tls()
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /json", d.service.json)
	mux.HandleFunc("POST /v1/decide", d.service.decideHTTP)
	mux.HandleFunc("/auth", d.service.auth)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("OK\n")) })
	mux.HandleFunc("GET /readyz", d.ready)
	mux.Handle("GET /metrics", d.metrics())
	err = errors.Join(d.listenGRPC(ctx, secure), d.listenHTTP(ctx, "http", d.config.http, mux, secure))
	if d.admin != nil {
		err = errors.Join(err, d.listenHTTP(ctx, "admin", d.config.admin, d.admin.handler(), nil))
		d.servers[len(d.servers)-1].RegisterOnShutdown(d.admin.leave)
	}
	return err
}

// streamWorkers is how many goroutines gRPC keeps between calls: more than usually wait for a storage at a time. Calls
// beyond them get a new goroutine each. Growing the stack of a new goroutine took a seventh of the time of a call.
const streamWorkers = 512

// windowSize is how much a client may send before the server must grant more. The size is fixed because with a dynamic
// window gRPC pings the client at every request to estimate the best size.
const windowSize = 1 << 20 // bytes

// serverOptions are those of the gRPC server.
func serverOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.NumStreamWorkers(streamWorkers), grpc.InitialWindowSize(windowSize), grpc.InitialConnWindowSize(windowSize),
		grpc.ForceServerCodecV2(codec{encoding.GetCodecV2(proto.Name)}),
	}
}

func (d *daemon) listenGRPC(ctx context.Context, secure *tls.Config) error {
	if d.config.grpc == "" {
		return nil
	}
	options := serverOptions()
	if secure != nil {
		options = append(options, grpc.Creds(credentials.NewTLS(secure)))
	}
	d.grpc = grpc.NewServer(options...)
	ratelimitv3.RegisterRateLimitServiceServer(d.grpc, envoy{service: d.service})
	healthv1.RegisterHealthServer(d.grpc, d.grpcReady)
	if d.config.reflection {
		reflection.Register(d.grpc)
	}
	return d.listenOn(ctx, "grpc", d.config.grpc, d.grpc.Serve)
}

func (d *daemon) listenHTTP(ctx context.Context, name, address string, h http.Handler, secure *tls.Config) error {
	if address == "" {
		return nil
	}
	s := newServer(h)
	s.ErrorLog = slog.NewLogLogger(d.log.Handler(), slog.LevelWarn)
	d.servers = append(d.servers, s)
	return d.listenOn(ctx, name, address, func(l net.Listener) error {
		if secure != nil {
			l = tls.NewListener(l, secure)
		}
		return s.Serve(l)
	})
}

func (d *daemon) listenOn(ctx context.Context, name, address string, serve func(net.Listener) error) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("-%s: %w", name, err)
	}
	d.listeners = append(d.listeners, listener{name, l, serve})
	return nil
}

// serve serves until ctx is done or a listener fails. It then lets requests finish and closes everything. The deferred
// calls run in this order: stop ends the background tasks, Wait waits for them, and only then are the engine and the
// storage closed, which the tasks use.
func (d *daemon) serve(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, d.close(context.WithoutCancel(ctx))) }()
	running, stop := context.WithCancel(ctx)
	var tasks sync.WaitGroup
	defer tasks.Wait()
	defer stop()
	d.probe(running)
	tasks.Go(func() { d.eachSecond(running) })
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	tasks.Go(func() { d.reloadOn(running, hangup) })
	failed := make(chan error, len(d.listeners))
	for _, l := range d.listeners {
		tasks.Go(func() { failed <- l.serve(l.l) })
		d.log.Info("listening", "for", l.name, "address", l.l.Addr().String())
	}
	if d.admin == nil && d.config.admin != "" {
		d.log.Info("there is no admin API, since it has no token")
	}
	state := "ready"
	if d.readiness.failed.Load() != nil {
		state = "started, and not ready" // probe has logged why
	}
	d.log.Info(state, "storage", d.config.storage, "rules", len(d.engine.Rules().Rules()), "domains", d.engine.Rules().Domains())
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	d.end(context.WithoutCancel(ctx))
	d.undecided.end()
	d.undecidedAllowed.end()
	d.log.Info("stopped")
	return err
}

// end accepts nothing new and waits for requests that have begun, for as long as -drain allows. What is unfinished then
// is cut off.
func (d *daemon) end(ctx context.Context) {
	d.grpcReady.end()
	ctx, cancel := context.WithTimeout(ctx, d.config.drain)
	defer cancel()
	var tasks sync.WaitGroup
	for _, s := range d.servers {
		tasks.Go(func() {
			if s.Shutdown(ctx) != nil {
				_ = s.Close()
			}
		})
	}
	if d.grpc != nil {
		tasks.Go(func() {
			defer context.AfterFunc(ctx, d.grpc.Stop)()
			d.grpc.GracefulStop()
		})
	}
	tasks.Wait()
}

// close closes what open and listen opened. It may run after either of them failed halfway.
func (d *daemon) close(ctx context.Context) error {
	for _, l := range d.listeners {
		_ = l.l.Close() // closed already if its server has ended, which does no harm
	}
	if d.grpc != nil {
		d.grpc.Stop()
	}
	if d.engine != nil {
		d.engine.Close()
	}
	if d.admin != nil {
		d.admin.leave()
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return d.closing.close(ctx)
}

func (d *daemon) reloadOn(ctx context.Context, hangup <-chan os.Signal) {
	for {
		select {
		case <-hangup:
			_ = d.engine.Reload(ctx) // loaded logs the error
		case <-ctx.Done():
			return
		}
	}
}
