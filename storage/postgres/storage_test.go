package postgres_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
	"github.com/go-throttler/throttler/storage/storagetest"
)

var bg = context.Background()

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// connect returns a pool of connections. It is closed after the test.
func connect(t testing.TB, url string) *pgxpool.Pool {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), url)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	return pool
}

// open returns a storage. It is closed after the test. Without a Timeout it has storecheck.Patient.
func open(t testing.TB, pool *pgxpool.Pool, o pgstore.Options) *pgstore.Storage {
	t.Helper()
	if o.Timeout == 0 {
		o.Timeout = storecheck.Patient
	}
	s, err := pgstore.New(t.Context(), pool, &o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close(bg)) })
	return s
}

func TestTheStoragePassesTheSuite(t *testing.T) {
	t.Parallel()
	s := open(t, connect(t, servers.PostgresURL(t)), pgstore.Options{})
	storagetest.Run(t, func(testing.TB) storage.Storage { return s })
}
