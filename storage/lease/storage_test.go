package lease_test

import (
	"context"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/failover"
	"github.com/go-throttler/throttler/storage/lease"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
	redisstore "github.com/go-throttler/throttler/storage/redis"
	"github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/storage/storagetest"
)

// over returns a lease storage in front of a shared one. It is closed after the test.
func over(t testing.TB, shared storage.Storage, o *lease.Options) *lease.Storage {
	t.Helper()
	s, err := lease.New(shared, o)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close(context.Background())) })
	return s
}

// openRedis returns a storage on a Redis server. The storage is closed after the test.
func openRedis(t testing.TB, url string) *redisstore.Storage {
	t.Helper()
	s, err := redisstore.Open(url, &redisstore.Options{Timeout: storecheck.Patient})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close(context.Background())) })
	return s
}

// openPostgres returns a storage on a Postgres server. The storage is closed after the test.
func openPostgres(t testing.TB, url string) *pgstore.Storage {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), url)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	s, err := pgstore.New(t.Context(), pool, &pgstore.Options{Timeout: storecheck.Patient})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close(context.Background())) })
	return s
}

// openFailover returns a failover storage with long timeouts, so that slow servers cause no failover. It is closed after the
// test.
func openFailover(t testing.TB, redisURL, postgresURL string) *failover.Storage {
	t.Helper()
	s, err := failover.New(openRedis(t, redisURL), openPostgres(t, postgresURL),
		&failover.Options{PrimaryTimeout: storecheck.Patient, LedgerTimeout: storecheck.Patient})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close(context.Background())) })
	return s
}

// passesTheSuite runs the suite of all storages over a shared one, and requires that leases decided a part of the calls.
func passesTheSuite(t *testing.T, shared func(testing.TB) storage.Storage) {
	var local, remembered, returned atomic.Int64
	t.Cleanup(func() {
		t.Logf("admitted here %d, denied here %d, given back %d times", local.Load(), remembered.Load(), returned.Load())
		assert.Greater(t, local.Load(), int64(500))
		assert.Greater(t, remembered.Load(), int64(1000))
		assert.Greater(t, returned.Load(), int64(10))
	})
	storagetest.Run(t, func(tb testing.TB) storage.Storage {
		s := over(tb, shared(tb), nil)
		tb.Cleanup(func() {
			state := s.State()
			local.Add(state.Local)
			remembered.Add(state.Remembered)
			returned.Add(state.Returned)
		})
		return s
	})
}

func TestTheStoragePassesTheSuite(t *testing.T) {
	t.Parallel()
	passesTheSuite(t, func(testing.TB) storage.Storage { return runtime.New(nil) })
}

func TestTheStoragePassesTheSuiteOverRedis(t *testing.T) {
	t.Parallel()
	s := openRedis(t, servers.RedisURL(t))
	passesTheSuite(t, func(testing.TB) storage.Storage { return s })
}

func TestTheStoragePassesTheSuiteOverPostgres(t *testing.T) {
	t.Parallel()
	s := openPostgres(t, servers.PostgresURL(t))
	passesTheSuite(t, func(testing.TB) storage.Storage { return s })
}

func TestTheStoragePassesTheSuiteOverFailover(t *testing.T) {
	t.Parallel()
	s := openFailover(t, servers.RedisURL(t), servers.PostgresURL(t))
	passesTheSuite(t, func(testing.TB) storage.Storage { return s })
}
