// Throttlerd is a rate limiting daemon. It serves Envoy over gRPC, nginx, Caddy and Traefik by forward-auth, and programs
// in any language over HTTP. The limits are files of rules, which may change while it runs.
//
//	throttlerd -rules rules.d          # or "throttlerd serve …": serves until SIGTERM or SIGINT
//	throttlerd check rules.d           # reports every fault of the files and its place; exits with 1 if there are any
//	throttlerd match rules.d -domain api path=/api/x user=42    # which rules apply, and why the others do not
//	throttlerd schema                  # the JSON Schema of files of rules, for editors
//
// docs/throttlerd.md describes every flag, what each gateway needs, and how every error looks to each kind of client.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"

	goredis "github.com/redis/go-redis/v9"

	"github.com/go-throttler/throttler/rules"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // restore the default: a second signal kills the process
	goredis.SetLogger(silent{})
	os.Exit(command(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// silent discards the log of the Redis client, which writes a line for each failed connection. A failed call returns an
// error as well, and the daemon logs those at most once a second.
type silent struct{}

func (silent) Printf(context.Context, string, ...any) {}

// command runs the command that args name and returns the exit status: 0, 1 for a failure, 2 for wrong arguments.
func command(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	name := "serve"
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		name, args = args[0], args[1:]
	}
	do, known := commands[name]
	if !known {
		_, _ = fmt.Fprintf(stderr, "throttlerd: %q is no command, must be serve, check, match or schema\n", name)
		return 2
	}
	err := do(ctx, args, stdout, stderr)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	_, _ = fmt.Fprintln(stderr, "throttlerd:", err)
	if wrong := (*usageError)(nil); errors.As(err, &wrong) {
		return 2
	}
	return 1
}

var commands = map[string]func(ctx context.Context, args []string, stdout, stderr io.Writer) error{
	"serve": serve, "check": check, "match": match,
	"schema": func(_ context.Context, _ []string, stdout, _ io.Writer) error {
		_, err := io.WriteString(stdout, rules.Schema())
		return err
	},
}

// usageError is a fault of the arguments: the exit status is 2.
type usageError struct{ error }

func usage(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// ballast is allocated but never touched, so it takes no physical memory. The garbage collector counts it as live heap
// and therefore runs less often: without it, a daemon that holds little would collect a hundred times a second under load
// and spend a tenth of its time on that.
const ballast = 32 << 20 // bytes

// serve runs the daemon until ctx is done.
func serve(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	c, err := parse(args, os.Getenv, stderr)
	if err != nil {
		return err
	}
	untouched := make([]byte, ballast)
	defer runtime.KeepAlive(untouched)
	d, err := newDaemon(ctx, c, slog.New(slog.NewJSONHandler(stdout, nil)))
	if err != nil {
		return err
	}
	return d.serve(ctx)
}

// check compiles files and reports all of their faults.
func check(ctx context.Context, args []string, stdout, _ io.Writer) error {
	set, err := compile(ctx, args)
	if err != nil {
		return err
	}
	_, _ = fmt.Fprintf(stdout, "%d rules of %d domains are fine\n", len(set.Rules()), len(set.Domains()))
	return nil
}

func compile(ctx context.Context, paths []string) (*rules.Set, error) {
	if len(paths) == 0 {
		return nil, usage("name the files or folders of rules")
	}
	files, err := rules.Files(paths...).Files(ctx)
	if err != nil {
		return nil, err
	}
	return rules.Compile(files...)
}

// match prints which rules apply to entries, and why the others do not.
func match(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return usage("match wants a file or folder of rules, and then key=value…")
	}
	flags := flag.NewFlagSet("match", flag.ContinueOnError)
	flags.SetOutput(stderr)
	domain := flags.String("domain", "", "the `domain` whose rules may apply")
	if err := flags.Parse(args[1:]); err != nil {
		return &usageError{err}
	}
	entries, err := entriesOf(flags.Args())
	if err != nil {
		return &usageError{err}
	}
	set, err := compile(ctx, args[:1])
	if err != nil {
		return err
	}
	if err := hasRules(set, *domain); err != nil {
		return err
	}
	for _, x := range set.Explain(*domain, entries) {
		if x.Applies {
			_, _ = fmt.Fprintf(stdout, "applies  %s\n", x.Rule.ID)
		} else {
			_, _ = fmt.Fprintf(stdout, "does not %s: %s\n", x.Rule.ID, x.Why)
		}
	}
	return nil
}

// hasRules returns an error if there are no rules of a domain, which is DefaultDomain if it is "".
func hasRules(set *rules.Set, domain string) error {
	domain = cmp.Or(domain, rules.DefaultDomain)
	domains := set.Domains()
	if slices.Contains(domains, domain) {
		return nil
	}
	return fmt.Errorf("the domain %.64q has no rules, %d others have: %.64q", domain, len(domains), domains[:min(len(domains), 10)])
}

// entriesOf parses words of the form "key=value".
func entriesOf(words []string) (entries []rules.Entry, err error) {
	for _, word := range words {
		key, value, found := strings.Cut(word, "=")
		if !found || key == "" {
			return nil, fmt.Errorf("%.64q is no entry, must be key=value", word)
		}
		entries = append(entries, rules.Entry{Key: key, Value: value})
	}
	return entries, nil
}
