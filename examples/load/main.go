// Load shows limits that follow the load of a process. It sends the example fastapi-like one and a half times the requests
// that it can answer, first without -elastic and then with it.
//
//	make demo-load                                            # takes about a minute
//	make demo-load FLAGS='-for 30s -check'                    # also fails if elastic limits did not help
//
// The server has one processor. 95 users together send 40 % of what it can answer, and repeat a request up to twice if there
// is no answer after a second. After the first five seconds 5 more users send 110 % together.
//
// Each line is one second. Its columns are the good answers, which came within a second, to the 95 and to the 5 users; how
// many answers were late; how many requests were denied by the limit; and the time within which 99 % of the admitted
// requests were answered.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

// run measures the server without elastic limits and with them, and prints both.
func run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	server := flags.String("server", "bin/fastapi-like", "the `program` to ask")
	calm := flags.Duration("calm", 5*time.Second, "the `time` before the overload, and after it")
	overload := flags.Duration("for", 15*time.Second, "the `time` of the overload")
	check := flags.Bool("check", false, "fail if elastic limits did not help")
	_ = flags.Parse(args)
	if *calm < time.Second || *overload < time.Second {
		return fmt.Errorf("-calm %v and -for %v must be at least 1s", *calm, *overload)
	}
	var seen [2]result
	for i, arg := range []string{"-elastic=false", "-elastic"} {
		_, _ = fmt.Fprintf(stdout, "\n%s %s\n", *server, arg)
		r, err := show(ctx, *server, arg, *calm, *overload, stdout)
		if err != nil {
			return err
		}
		seen[i] = r
	}
	_, _ = fmt.Fprintf(stdout, "\n%-16s %18s %18s %12s %12s\n", "in the overload", "95 users, good/s", "5 users, good/s", "99 % within", "before it")
	for i, name := range []string{"without", "with -elastic"} {
		_, _ = fmt.Fprintf(stdout, "%-16s %18.0f %18.0f %12s %12s\n", name, seen[i].good[0], seen[i].good[1], told(seen[i].loaded), told(seen[i].calm))
	}
	if *check {
		return seen[1].helped(&seen[0])
	}
	return nil
}

// helped returns an error unless r, with elastic limits, is clearly better than the result without them.
func (r *result) helped(without *result) error {
	switch {
	case without.loaded < patience:
		return errors.New("it was no overload: without elastic limits 99 % were answered in time")
	case r.loaded >= 10*r.calm:
		return fmt.Errorf("99 %% of the admitted requests were answered within %v, which is not below 10 times the %v before the overload", r.loaded, r.calm)
	case r.good[0] < 2*without.good[0]:
		return fmt.Errorf("the 95 users had %.0f good answers a second, which is not twice the %.0f without elastic limits", r.good[0], without.good[0])
	}
	return nil
}

// show starts a server, sends it the load, and ends it.
func show(ctx context.Context, server, arg string, calm, overload time.Duration, stdout io.Writer) (r result, err error) {
	address, end, err := start(ctx, server, arg)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, end()) }()
	d := newDemo("http://"+address+"/api/work", stdout)
	defer d.client.CloseIdleConnections()
	if err := d.measure(ctx); err != nil {
		return r, err
	}
	return d.run(ctx, calm, overload)
}

// start starts a server with one processor on a free port. It returns the server's address and a function that ends it.
func start(ctx context.Context, server, arg string) (address string, end func() error, err error) {
	c := exec.CommandContext(ctx, server, "-addr", "127.0.0.1:0", arg)
	c.Env = append(os.Environ(), "GOMAXPROCS=1")
	c.Stderr = os.Stderr
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	stdout, err := c.StdoutPipe()
	if err != nil {
		return "", nil, err
	}
	if err := c.Start(); err != nil {
		return "", nil, fmt.Errorf("the server does not start: %w", err)
	}
	end = func() error {
		_ = c.Cancel()
		if err := c.Wait(); ctx.Err() == nil { // otherwise this program is being ended, and its error does not count
			return err
		}
		return nil
	}
	lines := bufio.NewReader(stdout)
	first, _ := lines.ReadBytes('\n') // an empty line fails below
	var listening struct{ Address string }
	if err := json.Unmarshal(first, &listening); err != nil || listening.Address == "" {
		return "", nil, errors.Join(fmt.Errorf("the server said %.200q, and not where it listens", first), end())
	}
	go func() { _, _ = io.Copy(io.Discard, lines) }() // so that the server never blocks on its output
	return listening.Address, end, nil
}

// told formats a duration in milliseconds. No request waits for longer than patience.
func told(d time.Duration) string {
	if d >= patience {
		return "over 1 s"
	}
	return fmt.Sprintf("%d ms", d.Milliseconds())
}
