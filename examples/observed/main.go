// Observed is a small web service whose limits can be watched: a page shows live what is admitted and denied, and which
// identifiers ask for most.
//
//	go run .                                         # on localhost:8000; -addr :8000 is on all interfaces
//	go run . -load 30s                               # calls itself for so long, as 40 users and one attacker, and ends
//	open http://localhost:8000/debug/throttler/      # the page; a real service puts a login before it
//	curl localhost:8000/debug/throttler/json         # the same as JSON
//	curl localhost:8000/debug/vars                   # the same by expvar
//	curl localhost:8000/metrics                      # for Prometheus; throttlerprom has a dashboard and alerts
//	curl -i -H 'X-User: alice' localhost:8000        # 200 {"message":"Hello User, you have access!"}
//
// It is a separate module, as are the packages that it demonstrates. From the root of the repository, "make demo-observe"
// runs the second line.
package main

import (
	"context"
	"errors"
	"expvar"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/go-throttler/throttler/watch"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // restore the default: a second signal kills the process
	w := watch.New(nil)
	expvar.Publish("throttler", expvar.Func(func() any { return w.Snapshot() }))
	if err := run(ctx, w, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "observed:", err)
		os.Exit(1)
	}
}

// run serves until ctx is done or the load has ended.
func run(ctx context.Context, w *watch.Watch, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("observed", flag.ExitOnError)
	addr := flags.String("addr", "localhost:8000", "listen on this `address`; port 0 picks a free one")
	load := flags.Duration("load", 0, "call the service for this `time` as 40 users and one attacker, then end; 0 waits for calls of others")
	_ = flags.Parse(args)

	handler, err := newHandler(w)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", *addr)
	if err != nil {
		return err
	}
	serving, end := context.WithCancel(ctx)
	defer end()
	server := &http.Server{
		Handler:           handler,
		BaseContext:       func(net.Listener) context.Context { return serving }, // its end ends the streams of open pages
		ReadHeaderTimeout: 3 * time.Second,
		WriteTimeout:      3 * time.Second,
		IdleTimeout:       time.Minute,
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	base := "http://" + listener.Addr().String()
	_, _ = fmt.Fprintf(stdout, "Open %s/debug/throttler/ to see who asks and what is denied. %[1]s/metrics is for Prometheus.\n", base)
	if *load > 0 {
		_, _ = fmt.Fprintf(stdout, "For %v 40 users call, and after ten seconds the attacker %s.\n", *load, attacker)
		callFor(serving, base, *load)
		report(stdout, w.Snapshot())
	} else {
		<-ctx.Done()
	}
	end()
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	err = server.Shutdown(last)
	if ended := <-served; !errors.Is(ended, http.ErrServerClosed) {
		err = errors.Join(err, ended)
	}
	return err
}
