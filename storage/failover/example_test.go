package failover_test

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage/failover"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

func Example() {
	serve := func(ctx context.Context, pool *pgxpool.Pool) error {
		redis, err := redisstore.Open("redis://localhost:6379", nil)
		if err != nil {
			return err
		}
		defer func() { _ = redis.Close(context.Background()) }()
		postgres, err := pgstore.New(ctx, pool, nil) // Postgres must be up when a process starts, Redis need not
		if err != nil {
			return err
		}
		defer func() { _ = postgres.Close(context.Background()) }()
		store, err := failover.New(redis, postgres, nil)
		if err != nil {
			return err
		}
		defer func() { _ = store.Close(context.Background()) }() // runs before the two Closes above: it still needs both stores
		t, err := throttler.New(throttler.Config{Storage: store, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 100)}})
		if err != nil {
			return err
		}
		_, err = t.ConsumeContext(ctx, "user:42")
		return err
	}
	_ = serve
	// Output:
}
