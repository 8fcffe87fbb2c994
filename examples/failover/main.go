// Failover shows that a limit holds while Redis is killed and later comes back empty. Postgres decides in the meantime, and
// no caller notices. Sixteen callers make 400 calls a second for one identifier, which is allowed 100.
//
//	make demo-failover                                             # installs redis-server and postgresql if they are missing
//	go run ./examples/failover                                     # takes 16 seconds
//	go run ./examples/failover -kill 2s -restart 20s -for 30s      # Redis is away for longer
//
// It starts a Redis and a Postgres of its own on free ports of 127.0.0.1 and removes them at the end, also after Ctrl-C.
//
// Each line is one second. Its columns are what Redis and Postgres admitted, what was denied, how many callers got an error,
// the longest call, how many identifiers have admissions that Postgres has not recorded yet, and whether the storage is
// degraded. The exit status is 1 if more was admitted than docs/failover.md allows, or if a caller got an error.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9/logging"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/storage/failover"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

func main() {
	// Neither a second signal nor a closed output may end the program at once, since the servers' folders would be left.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	signal.Ignore(syscall.SIGPIPE)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "failover:", err)
		os.Exit(1)
	}
}

var errInterrupted = errors.New("interrupted")

// plan says when Redis is killed and restarted and when the load ends, all measured from its beginning, and how long a call
// waits for Postgres.
type plan struct{ kill, restart, end, patience time.Duration }

// run starts the servers and runs the demonstration. It closes the servers whatever happens.
func run(ctx context.Context, args []string, stdout io.Writer) (err error) {
	var p plan
	flags := flag.NewFlagSet("failover", flag.ExitOnError)
	flags.DurationVar(&p.kill, "kill", 3500*time.Millisecond, "kill Redis after this `time`")
	flags.DurationVar(&p.restart, "restart", 8500*time.Millisecond, "start it again, empty, after this `time`")
	flags.DurationVar(&p.end, "for", 16*time.Second, "end after this `time`")
	flags.DurationVar(&p.patience, "patience", failover.DefaultLedgerTimeout, "wait for Postgres for this `time`; more on a machine that is overloaded")
	_ = flags.Parse(args)
	if p.kill <= 0 || p.restart <= p.kill || p.end <= p.restart {
		return fmt.Errorf("-kill %v, -restart %v and -for %v must follow one another", p.kill, p.restart, p.end)
	}
	defer func() {
		if err == nil && ctx.Err() == nil {
			return
		}
		select { // Ctrl-C also ends the servers, perhaps before this program gets it; errors are then only a result of that
		case <-ctx.Done():
			err = errInterrupted
		case <-time.After(100 * time.Millisecond):
		}
	}()

	d := &demo{plan: p, stdout: stdout}
	d.print("Starting a Redis and a Postgres.\n")
	redis, err := servers.StartRedis()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, redis.Close()) }()
	postgres, err := servers.StartPostgres()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, postgres.Close()) }()
	d.redis = redis
	return d.show(ctx, postgres.URL())
}

// show runs the load and judges the result.
func (d *demo) show(ctx context.Context, postgresURL string) (err error) {
	logging.Disable() // go-redis writes to stderr whenever it cannot connect
	primary, err := redisstore.Open(d.redis.URL(), nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, primary.Close(context.Background())) }()
	pool, err := pgxpool.New(ctx, postgresURL)
	if err != nil {
		return err
	}
	defer pool.Close()
	ledger, err := pgstore.New(ctx, pool, &pgstore.Options{Timeout: max(d.patience, pgstore.DefaultTimeout)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ledger.Close(context.WithoutCancel(ctx))) }()
	if d.store, err = failover.New(primary, ledger, &failover.Options{LedgerTimeout: d.patience, Observe: d.observe}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.store.Close(context.WithoutCancel(ctx))) }() // takes at most a second
	d.throttler, err = throttler.New(throttler.Config{Storage: d.store, Buckets: []throttler.Bucket{
		throttler.NewBucket(time.Second, rate).Continuous(),
		throttler.NewBucket(time.Hour, 10_000).Named("hour"),
	}})
	if err != nil {
		return err
	}
	if _, err := d.throttler.Peek(ctx, who); err != nil { // opens the connections, and takes nothing
		return err
	}
	if err := d.run(ctx); err != nil {
		return err
	}
	return d.judge(ctx)
}
