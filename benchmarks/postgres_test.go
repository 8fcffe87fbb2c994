package benchmarks_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/go-throttler/throttler"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
)

// BenchmarkPostgres makes decisions on two limits, for one identifier and for 100,000 in turn, with
// synchronous_commit on. The patterns are those of other limiters, written here as their sources do it:
// an upsert for each limit (rate-limiter-flexible), and SELECT FOR UPDATE then UPDATE (Bucket4j). The floors
// decide nothing.
func BenchmarkPostgres(b *testing.B) {
	for _, c := range []struct {
		name string
		open func(*testing.B, *pgxpool.Pool) func(id string) error
	}{
		{"throttler", onPostgres(pgstore.Options{Name: "logged"})},
		{"throttler-unlogged", onPostgres(pgstore.Options{Name: "unlogged", Unlogged: true})},
		{"upsert-per-limit", upserts},
		{"select-for-update", forUpdate},
		{"floor-update", update},
		{"floor-select-1", selectOne},
	} {
		for _, identifiers := range []int{100_000, 1} {
			b.Run(fmt.Sprintf("%s/identifiers=%d", c.name, identifiers), func(b *testing.B) {
				config, err := pgxpool.ParseConfig(url(b, postgres))
				if err != nil {
					b.Fatal(err)
				}
				config.MaxConns = 64
				pool, err := pgxpool.NewWithConfig(b.Context(), config)
				if err != nil {
					b.Fatal(err)
				}
				defer pool.Close()
				measure(b, []int{1, 64}, identifiers, c.open(b, pool))
			})
		}
	}
}

func onPostgres(o pgstore.Options) func(*testing.B, *pgxpool.Pool) func(string) error {
	o.Timeout = 10 * time.Second
	return func(b *testing.B, pool *pgxpool.Pool) func(string) error {
		store, err := pgstore.New(b.Context(), pool, &o)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = store.Close() })
		return limited(b, throttler.Config{Storage: store})
	}
}

func execute(b *testing.B, pool *pgxpool.Pool, sql string) {
	if _, err := pool.Exec(b.Context(), sql); err != nil {
		b.Fatal(err)
	}
}

func upserts(b *testing.B, pool *pgxpool.Pool) func(string) error {
	execute(b, pool, "CREATE TABLE IF NOT EXISTS upserts (key text PRIMARY KEY, points int NOT NULL, expire bigint)")
	const upsert = `INSERT INTO upserts VALUES ($1, $2, $3) ON CONFLICT (key) DO UPDATE SET
		points = CASE WHEN upserts.expire <= $4 THEN $2 ELSE upserts.points + $2 END,
		expire = CASE WHEN upserts.expire <= $4 THEN $3 ELSE upserts.expire END RETURNING points, expire`
	return func(id string) error {
		now := time.Now().UnixMilli()
		for limit, window := range map[string]int64{"short": 10_000, "long": 3_600_000} {
			var points, expire int64
			if err := pool.QueryRow(context.Background(), upsert, limit+id, 1, now+window, now).Scan(&points, &expire); err != nil {
				return err
			}
		}
		return nil
	}
}

func forUpdate(b *testing.B, pool *pgxpool.Pool) func(string) error {
	execute(b, pool, "CREATE TABLE IF NOT EXISTS buckets (id text PRIMARY KEY, state bytea)")
	return func(id string) error {
		ctx := context.Background()
		return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			var state []byte
			err := tx.QueryRow(ctx, "SELECT state FROM buckets WHERE id = $1 FOR UPDATE", id).Scan(&state)
			if errors.Is(err, pgx.ErrNoRows) {
				_, err = tx.Exec(ctx, "INSERT INTO buckets VALUES ($1, NULL) ON CONFLICT DO NOTHING", id)
			}
			if err != nil {
				return err
			}
			_, err = tx.Exec(ctx, "UPDATE buckets SET state = $2 WHERE id = $1", id, make([]byte, 80))
			return err
		})
	}
}

func update(b *testing.B, pool *pgxpool.Pool) func(string) error {
	execute(b, pool, "CREATE TABLE IF NOT EXISTS counters (id text PRIMARY KEY, n bigint) WITH (fillfactor = 50)")
	execute(b, pool, "INSERT INTO counters SELECT 'user:' || i, 0 FROM generate_series(0, 99999) i ON CONFLICT DO NOTHING")
	return func(id string) error {
		_, err := pool.Exec(context.Background(), "UPDATE counters SET n = n + 1 WHERE id = $1", id)
		return err
	}
}

func selectOne(_ *testing.B, pool *pgxpool.Pool) func(string) error {
	return func(string) error {
		var one int
		return pool.QueryRow(context.Background(), "SELECT 1").Scan(&one)
	}
}
