package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/failover"
	"github.com/go-throttler/throttler/storage/lease"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
	redisstore "github.com/go-throttler/throttler/storage/redis"
	memstore "github.com/go-throttler/throttler/storage/runtime"
)

// open returns a storage of the given kind, and a function that closes it.
func open(ctx context.Context, kind, redisURL, postgresURL string, log *slog.Logger) (storage.Storage, func(context.Context) error, error) {
	switch kind {
	case "runtime":
		return memstore.New(nil), func(context.Context) error { return nil }, nil
	case "redis":
		s, err := redisstore.Open(redisURL, nil)
		if err != nil {
			return nil, nil, err
		}
		return s, s.Close, nil
	case "postgres":
		s, closeBoth, err := openPostgres(ctx, postgresURL)
		if err != nil {
			return nil, nil, err
		}
		return s, closeBoth, nil
	case "failover":
		return openFailover(ctx, redisURL, postgresURL, log)
	}
	return nil, nil, fmt.Errorf("-storage is %q, must be runtime, redis, postgres or failover", kind)
}

// ahead puts leases before a storage. They are given back first.
func ahead(ctx context.Context, shared storage.Storage, closeShared func(context.Context) error) (storage.Storage, func(context.Context) error, error) {
	s, err := lease.New(shared, nil)
	if err != nil {
		return nil, nil, errors.Join(err, closeShared(ctx))
	}
	return s, func(ctx context.Context) error { return errors.Join(s.Close(ctx), closeShared(ctx)) }, nil
}

func openPostgres(ctx context.Context, url string) (*pgstore.Storage, func(context.Context) error, error) {
	pool, err := newPool(ctx, url)
	if err != nil {
		return nil, nil, err
	}
	s, err := pgstore.New(ctx, pool, nil)
	if err != nil {
		pool.Close()
		return nil, nil, err
	}
	return s, func(ctx context.Context) error {
		defer pool.Close()
		return s.Close(ctx)
	}, nil
}

// newPool keeps passwords out of its errors. The errors of pgx quote a URL that pgx cannot parse, and hide only what
// certainly is a password. If a password has an @ that is not encoded, its rest is parsed as the host or as the name of the
// database.
func newPool(ctx context.Context, url string) (*pgxpool.Pool, error) {
	_, rest, _ := strings.Cut(url, "://")
	_, path, _ := strings.Cut(rest, "/")
	if strings.Count(rest, "@") > 1 || strings.Contains(path, "@") {
		return nil, errors.New("-postgres-url has an @ that must be written as %40, or a / before it as %2F")
	}
	pool, err := pgxpool.New(ctx, url)
	if err != nil {
		return nil, errors.New("-postgres-url cannot be read, must be like postgres://user:password@localhost:5432/database, or like host=localhost user=user password='password'")
	}
	return pool, nil
}

// openFailover does not connect to Redis, which may be down. Postgres must be up, since its table is made here.
func openFailover(ctx context.Context, redisURL, postgresURL string, log *slog.Logger) (storage.Storage, func(context.Context) error, error) {
	primary, err := redisstore.Open(redisURL, nil)
	if err != nil {
		return nil, nil, err
	}
	ledger, closeLedger, err := openPostgres(ctx, postgresURL)
	if err != nil {
		return nil, nil, errors.Join(err, primary.Close(ctx))
	}
	s, err := failover.New(primary, ledger, &failover.Options{Observe: failover.Log(log)})
	if err != nil {
		return nil, nil, errors.Join(err, primary.Close(ctx), closeLedger(ctx))
	}
	return s, func(ctx context.Context) error {
		return errors.Join(s.Close(ctx), primary.Close(ctx), closeLedger(ctx))
	}, nil
}
