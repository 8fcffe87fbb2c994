package main

import (
	"context"
	"encoding/binary"
	"errors"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage/failover"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// onPostgresAt returns the contenders that decide in a Postgres, each with a pool of its own. There is no peer in Go, so the
// others are libraries of other languages, rewritten here with the statements of their sources. A floor decides nothing.
func onPostgresAt(url string) []contender {
	pattern := func(name string, idle bool, open func(*pgxpool.Pool, []limit) (allow, error)) contender {
		return contender{name: name, idle: idle, open: func(limits []limit) (allow, func(), error) {
			pool, err := postgresPool(url)
			if err != nil {
				return nil, nil, err
			}
			a, err := open(pool, limits)
			return a, pool.Close, err
		}}
	}
	return []contender{
		us("throttler", throttlerOnPostgres(url, pgstore.Options{TablePrefix: "logged"})),
		us("throttler, Unlogged", throttlerOnPostgres(url, pgstore.Options{TablePrefix: "unlogged", Unlogged: true})),
		pattern("upsert per limit", false, upserts),
		pattern("SELECT FOR UPDATE", false, forUpdate),
		pattern("floor: UPDATE", true, update),
		pattern("floor: SELECT 1", true, selectOne),
	}
}

func throttlerOnPostgres(url string, o pgstore.Options) func() (throttler.Config, func(), error) {
	return func() (throttler.Config, func(), error) {
		pool, err := postgresPool(url)
		if err != nil {
			return throttler.Config{}, nil, err
		}
		o.Timeout = 10 * time.Second // the other contenders have no timeout
		store, err := pgstore.New(context.Background(), pool, &o)
		return throttler.Config{Storage: store}, func() { _ = store.Close(context.Background()); pool.Close() }, err
	}
}

// upserts works as rate-limiter-flexible (Node) does: one upsert for each limit.
func upserts(pool *pgxpool.Pool, limits []limit) (allow, error) {
	const upsert = `INSERT INTO upserts VALUES ($1, $2, $3) ON CONFLICT (key) DO UPDATE SET
		points = CASE WHEN upserts.expire <= $4 THEN $2 ELSE upserts.points + $2 END,
		expire = CASE WHEN upserts.expire <= $4 THEN $3 ELSE upserts.expire END RETURNING points, expire`
	_, err := pool.Exec(context.Background(), "CREATE TABLE IF NOT EXISTS upserts (key text PRIMARY KEY, points int NOT NULL, expire bigint)")
	return func(id string) (bool, error) {
		now := time.Now().UnixMilli()
		for _, l := range limits {
			var points, expire int64
			err := pool.QueryRow(context.Background(), upsert, prefix(l)+id, 1, now+l.period.Milliseconds(), now).Scan(&points, &expire)
			if err != nil || points > l.n {
				return false, err
			}
		}
		return true, nil
	}, err
}

// forUpdate works as Bucket4j (Java) does: one row has the state of all limits, and is locked, read and written.
func forUpdate(pool *pgxpool.Pool, limits []limit) (allow, error) {
	ctx := context.Background()
	_, err := pool.Exec(ctx, "CREATE TABLE IF NOT EXISTS buckets (id text PRIMARY KEY, state bytea)")
	decide := func(tx pgx.Tx, id string) (bool, error) {
		var state []byte
		const lock = "SELECT state FROM buckets WHERE id = $1 FOR UPDATE"
		err := tx.QueryRow(ctx, lock, id).Scan(&state)
		if errors.Is(err, pgx.ErrNoRows) {
			if _, err = tx.Exec(ctx, "INSERT INTO buckets VALUES ($1, NULL) ON CONFLICT DO NOTHING", id); err == nil {
				err = tx.QueryRow(ctx, lock, id).Scan(&state)
			}
		}
		if err != nil {
			return false, err
		}
		state, ok := take(state, limits)
		if ok {
			_, err = tx.Exec(ctx, "UPDATE buckets SET state = $2 WHERE id = $1", id, state)
		}
		return ok, err
	}
	return func(id string) (ok bool, err error) {
		err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			ok, err = decide(tx, id)
			return err
		})
		return ok, err
	}, err
}

// take counts in windows. For each limit the state has 16 bytes: the end of the window, in microseconds, and the count.
func take(state []byte, limits []limit) ([]byte, bool) {
	if state == nil {
		state = make([]byte, 16*len(limits))
	}
	now := time.Now()
	for i, l := range limits {
		end, n := state[16*i:], state[16*i+8:]
		if int64(binary.BigEndian.Uint64(end)) <= now.UnixMicro() {
			binary.BigEndian.PutUint64(end, uint64(now.Add(l.period).UnixMicro()))
			binary.BigEndian.PutUint64(n, 0)
		}
		if int64(binary.BigEndian.Uint64(n)) >= l.n {
			return state, false
		}
		binary.BigEndian.PutUint64(n, binary.BigEndian.Uint64(n)+1)
	}
	return state, true
}

func update(pool *pgxpool.Pool, _ []limit) (allow, error) {
	ctx := context.Background()
	_, err := pool.Exec(ctx, "CREATE TABLE IF NOT EXISTS counters (id text PRIMARY KEY, n bigint) WITH (fillfactor = 50)")
	if err == nil {
		_, err = pool.Exec(ctx, "INSERT INTO counters SELECT 'user:' || lpad(i::text, 11, '0'), 0 FROM generate_series(0, 99999) i ON CONFLICT DO NOTHING")
	}
	return func(id string) (bool, error) {
		changed, err := pool.Exec(ctx, "UPDATE counters SET n = n + 1 WHERE id = $1", id)
		return changed.RowsAffected() == 1, err
	}, err
}

func selectOne(pool *pgxpool.Pool, _ []limit) (allow, error) {
	return func(string) (bool, error) {
		var one int
		err := pool.QueryRow(context.Background(), "SELECT 1").Scan(&one)
		return one == 1, err
	}, nil
}

func (b *bench) onPostgres(ctx context.Context) error {
	cases := b.wanted("postgres", crowds(100_000))
	if len(cases) == 0 {
		return nil
	}
	s, err := startPostgres(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	all := onPostgresAt(s.url)
	results, err := b.onServer(ctx, "postgres", all, cases, plenty(2, 1e8), b.d, s.used, nothing)
	if err != nil {
		return err
	}
	checks, err := checkAll(ctx, all, 3)
	if err != nil {
		return err
	}
	b.report.server("Postgres", s.version, results, checks)
	return nil
}

// failover compares Redis alone with failover over the same Redis, while nothing fails. Failover writes to Postgres ten times
// a second. Turns are longer so that they contain these writes, and before each turn the pending ones are waited for.
func (b *bench) failover(ctx context.Context) error {
	cases := b.wanted("failover", []crowd{{1000, 1}, {1000, 64}, {1, 1}, {1, 64}})
	if len(cases) == 0 {
		return nil
	}
	redis, err := startRedis(ctx)
	if err != nil {
		return err
	}
	defer redis.close()
	postgres, err := startPostgres(ctx)
	if err != nil {
		return err
	}
	defer postgres.close()
	var store *failover.Storage
	all := []contender{
		us("throttler, Redis alone", throttlerOnRedis(redis.url)),
		us("throttler, failover", func() (throttler.Config, func(), error) {
			var done func()
			store, done, err = openFailover(redis.url, postgres.url)
			return throttler.Config{Storage: store}, done, err
		}),
	}
	settle := func() {
		for store.State().Pending > 0 && ctx.Err() == nil {
			time.Sleep(10 * time.Millisecond)
		}
	}
	used := func() time.Duration { return redis.used() + postgres.used() }
	results, err := b.onServer(ctx, "failover", all, cases, plenty(2, 1e7), 2*b.d, used, settle)
	if err != nil {
		return err
	}
	checks, err := checkAll(ctx, all, 10)
	if err != nil {
		return err
	}
	b.report.server("Failover", redis.version+" and "+postgres.version, results, checks)
	return nil
}

func openFailover(redisURL, postgresURL string) (*failover.Storage, func(), error) {
	client, err := redisClient(redisURL)
	if err != nil {
		return nil, nil, err
	}
	pool, err := postgresPool(postgresURL)
	if err != nil {
		return nil, nil, err
	}
	ledger, err := pgstore.New(context.Background(), pool, &pgstore.Options{TablePrefix: "ledger"})
	if err != nil {
		return nil, nil, err
	}
	primary, err := redisstore.New(client, &redisstore.Options{Prefix: "failover:"})
	if err != nil {
		return nil, nil, err
	}
	store, err := failover.New(primary, ledger, nil)
	return store, func() {
		_ = store.Close(context.Background())
		_, _, _ = primary.Close(context.Background()), ledger.Close(context.Background()), client.Close()
		pool.Close()
	}, err
}

// inParallel makes one decision on each identifier, from 64 goroutines.
func inParallel(ctx context.Context, identifiers int, a allow) error {
	var next atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	for range 64 {
		group.Go(func() error {
			for i := int(next.Add(1)) - 1; i < identifiers && ctx.Err() == nil; i = int(next.Add(1)) - 1 {
				if _, err := a(identifier(i)); err != nil {
					return err
				}
			}
			return ctx.Err()
		})
	}
	return group.Wait()
}
