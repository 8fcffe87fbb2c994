// Command benchmarks compares this module with its peers, in one run on one machine, and writes docs/benchmarks.md with its
// charts. It starts the servers that it needs. "make bench" runs it. For a quick look at one part, run
//
//	go run . -only redis -rounds 3 -d 100ms
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"syscall"
	"time"
)

func main() {
	b := bench{rounds: 8, d: 300 * time.Millisecond, only: regexp.MustCompile("")}
	flag.IntVar(&b.rounds, "rounds", b.rounds, "the turns that each contender gets in a case")
	flag.DurationVar(&b.d, "d", b.d, "how long a turn lasts with a server; in the process a quarter of it")
	flag.Func("only", "run the cases whose names match this regexp, such as redis/64", func(s string) (err error) {
		b.only, err = regexp.Compile(s)
		return err
	})
	out := flag.String("out", "", "the folder for benchmarks.md and its charts; the text is printed if there is none")
	flag.Parse()
	if err := b.check(*out); err != nil {
		fmt.Fprintln(os.Stderr, "benchmarks:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal then ends the process at once
	if err := b.run(ctx, *out); err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		fmt.Fprintln(os.Stderr, "benchmarks:", err)
		os.Exit(1)
	}
}

// bench is one run.
type bench struct {
	rounds int
	d      time.Duration
	only   *regexp.Regexp
	first  int // the number of the first round: it decides which contender begins
	report report
}

// fewer returns a run with half as many rounds, for slow cases.
func (b *bench) fewer() *bench { return &bench{rounds: (b.rounds + 1) / 2, d: b.d} }

func (b *bench) check(out string) error {
	switch {
	case b.rounds < 1 || b.d < time.Millisecond:
		return errors.New("-rounds is at least 1, and -d 1ms")
	case out != "" && b.only.String() != "":
		return errors.New("-out is for whole runs, without -only")
	}
	return nil
}

func (b *bench) run(ctx context.Context, out string) error {
	began := time.Now()
	for _, part := range []func(context.Context) error{b.inProcess, b.growth, b.onRedis, b.failover, b.onPostgres, b.leased, b.http} {
		if err := part(ctx); err != nil {
			return err
		}
	}
	return b.report.finish(b, began, out)
}
