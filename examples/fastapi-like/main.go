// Fastapi-like is a small web service with rate limits for the whole app, for a router and for single routes, as with
// Depends in FastAPI. app.go declares them in one table. The counts are kept in the memory of the process, or in a Redis or
// Postgres that any number of processes share, or in both. With both Redis decides, and Postgres while Redis cannot.
//
//	go run ./examples/fastapi-like                      # on localhost:8000; -addr :8000 listens on all interfaces
//	go run ./examples/fastapi-like -storage redis       # -redis-url redis://localhost:6379 is the default
//	go run ./examples/fastapi-like -storage postgres    # -postgres-url postgres://localhost:5432/postgres is the default
//	go run ./examples/fastapi-like -storage failover    # both of these; Redis may be down at any time, Postgres must be up at the start
//	go run ./examples/fastapi-like -storage redis -lease # busy clients are decided in the process, by tokens that it takes ahead
//	go run ./examples/fastapi-like -elastic             # the limit of /api/work shrinks while the process is loaded
//	open http://localhost:8000/docs                     # lists and calls all routes, and shows what is left of each limit
//	curl -i localhost:8000                              # 200 {"message":"Hello User, you have access!"}
//	for i in $(seq 20); do curl -s -o /dev/null -w '%{http_code}\n' localhost:8000/api/data; done
//	curl -i -H 'X-API-Key: another' localhost:8000      # another client, with limits of its own
//
// The loop prints 200 ten times and then 429: the header Retry-After says in how many seconds to come back.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/load"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal then kills the process
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "fastapi-like:", err)
		os.Exit(1)
	}
}

// run serves until the context is done. It then waits for the requests that have begun.
func run(ctx context.Context, args []string, stdout io.Writer) (err error) {
	flags := flag.NewFlagSet("fastapi-like", flag.ExitOnError)
	addr := flags.String("addr", "localhost:8000", "listen on this `address`; port 0 picks a free one")
	kind := flags.String("storage", "runtime", "keep the counts in this `place`: runtime (the memory of this process), redis, postgres or failover (redis, and postgres while it fails)")
	redisURL := flags.String("redis-url", "redis://localhost:6379", "with -storage redis or failover: the `URL` of a server, a cluster or sentinels")
	postgresURL := flags.String("postgres-url", "postgres://localhost:5432/postgres", "with -storage postgres or failover: the `URL` of a database")
	leases := flags.Bool("lease", false, "decide busy clients in the process, by tokens that are taken ahead from a shared -storage")
	elastic := flags.Bool("elastic", false, "let the limit of /api/work shrink while this process is loaded")
	_ = flags.Parse(args)

	log := slog.New(slog.NewJSONHandler(stdout, nil))
	store, closeStore, err := open(ctx, *kind, *redisURL, *postgresURL, log)
	if err == nil && *leases {
		store, closeStore, err = ahead(ctx, store, closeStore)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeStore(context.WithoutCancel(ctx))) }() // takes at most a second
	config := throttler.Config{Storage: store}
	latency := &load.Latency{}
	if *elastic {
		follows, err := load.New(load.Most(load.Scheduler(10*time.Millisecond), latency.Signal(100*time.Millisecond)),
			&load.Options{Interval: 50 * time.Millisecond, Up: 0.005})
		if err != nil {
			return err
		}
		defer follows.Close()
		config.Load = follows.Share
	}
	t, err := throttler.New(config)
	if err != nil {
		return err
	}
	handler, err := newHandler(t, log, latency.Took)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", *addr)
	if err != nil {
		return err
	}
	server := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 3 * time.Second, // the timeouts are shorter than the 5 s of Shutdown, so
		ReadTimeout:       3 * time.Second, // that no client can delay the end
		WriteTimeout:      3 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	log.Info("listening", "address", listener.Addr().String(), "storage", *kind)
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	err = server.Shutdown(last)
	log.Info("stopped", "reason", context.Cause(ctx).Error())
	return err
}
