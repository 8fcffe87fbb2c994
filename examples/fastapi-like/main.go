// Fastapi-like is a small web service with a rate limit: each client may ask five times in ten
// seconds. It keeps the counts in its own memory and needs nothing else, or in a Redis or Postgres that
// any number of its processes share.
//
//	go run ./examples/fastapi-like                      # on port 8000; -addr changes that
//	go run ./examples/fastapi-like -storage redis       # -redis-url redis://localhost:6379 is the default
//	go run ./examples/fastapi-like -storage postgres    # -postgres-url postgres://localhost:5432/postgres is the default
//	curl -i localhost:8000                              # 200 {"message":"Hello User, you have access!"}
//	for i in $(seq 20); do curl -s -w ' %{http_code}\n' localhost:8000; done
//	curl -i -H 'X-API-Key: another' localhost:8000      # another client, with a limit of its own
//
// From the sixth call on the answer is 429 {"message":"You've reached the limit!"}, and the header
// Retry-After says in how many seconds to come back.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
	redisstore "github.com/go-throttler/throttler/storage/redis"
	memstore "github.com/go-throttler/throttler/storage/runtime"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // from now on a second signal kills
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "fastapi-like:", err)
		os.Exit(1)
	}
}

// run serves until the context is done, then finishes the requests that have begun.
func run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("fastapi-like", flag.ExitOnError)
	addr := flags.String("addr", ":8000", "listen on this `address`; port 0 picks a free one")
	kind := flags.String("storage", "runtime", "keep the counts in the memory of this process (`runtime`), in redis or in postgres")
	redisURL := flags.String("redis-url", "redis://localhost:6379", "with -storage redis: the `URL` of a server, a cluster or sentinels")
	postgresURL := flags.String("postgres-url", "postgres://localhost:5432/postgres", "with -storage postgres: the `URL` of a database")
	_ = flags.Parse(args)

	store, closeStore, err := open(ctx, *kind, *redisURL, *postgresURL)
	if err != nil {
		return err
	}
	defer closeStore()
	fivePer10s := throttler.NewBucket(10*time.Second, 5)
	t, err := throttler.New(throttler.Config{Storage: store, Buckets: []throttler.Bucket{fivePer10s}})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", *addr)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewJSONHandler(stdout, nil))
	server := &http.Server{
		Handler:           newHandler(t, log),
		ReadHeaderTimeout: 3 * time.Second, // the timeouts are below the 5 s of Shutdown, so that
		ReadTimeout:       3 * time.Second, // no client can hold up the end
		WriteTimeout:      3 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	log.Info("listening", "address", listener.Addr().String())
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

// open returns the storage of a kind, and what closes it.
func open(ctx context.Context, kind, redisURL, postgresURL string) (storage.Storage, func(), error) {
	switch kind {
	case "runtime":
		return memstore.New(nil), func() {}, nil
	case "redis":
		s, err := redisstore.Open(redisURL, nil)
		if err != nil {
			return nil, nil, err
		}
		return s, func() { _ = s.Close() }, nil
	case "postgres":
		pool, err := pgxpool.New(ctx, postgresURL)
		if err != nil {
			return nil, nil, err
		}
		s, err := pgstore.New(ctx, pool, nil)
		if err != nil {
			pool.Close()
			return nil, nil, err
		}
		return s, func() { _ = s.Close(); pool.Close() }, nil
	}
	return nil, nil, fmt.Errorf("-storage is %q, must be runtime, redis or postgres", kind)
}

func newHandler(t *throttler.Throttler, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /{$}", limited(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, "Hello User, you have access!")
	})))
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Allow", "GET, HEAD")
		answer(w, http.StatusMethodNotAllowed, "Method not allowed.")
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusNotFound, "Not found.")
	})
	return logged(log, mux)
}

// limited calls next if the client's buckets admit the request, and otherwise answers why not.
func limited(t *throttler.Throttler, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, err := t.ConsumeContext(r.Context(), client(r))
		switch {
		case err != nil:
			if rec, ok := w.(*recorder); ok {
				rec.err = err
			}
			answer(w, http.StatusServiceUnavailable, "The service is unavailable, please try again later.")
		case !v.Allowed:
			seconds := max(1, (v.RetryAfter+time.Second-1)/time.Second) // rounded up: never too early
			w.Header().Set("Retry-After", strconv.FormatInt(int64(seconds), 10))
			answer(w, http.StatusTooManyRequests, "You've reached the limit!")
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// client returns whom the request counts for. An API key is a secret, and the identifier stands in
// errors and in the log, so it is a hash of the key. A key and an address never mean the same
// client, and X-Forwarded-For is not believed, because anybody can send it. The same is true of an
// API key that nobody checks: a real service first makes sure that it has issued the key.
func client(r *http.Request) string {
	if key := r.Header.Get("X-API-Key"); key != "" {
		return fmt.Sprintf("key:%.8x", sha256.Sum256([]byte(key)))
	}
	host, _, _ := net.SplitHostPort(r.RemoteAddr) // the server always sets host and port
	return "ip:" + host
}

// answer writes {"message":"…"}.
func answer(w http.ResponseWriter, status int, message string) {
	body, _ := json.Marshal(map[string]string{"message": message}) // cannot fail
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(body) // fails when the client has gone: there is nobody to tell
}

// logged writes one line to the log for each request.
func logged(log *slog.Logger, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		rec := &recorder{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(rec, r)
		line := []any{"method", r.Method, "path", r.URL.Path, "status", rec.status, "client", client(r), "duration", time.Since(start).String()}
		if rec.err == nil {
			log.Info("request", line...)
		} else {
			log.Error("request", append(line, "error", rec.err.Error())...)
		}
	})
}

// recorder remembers for the log how a request ended.
type recorder struct {
	http.ResponseWriter
	status int
	err    error
}

func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}
