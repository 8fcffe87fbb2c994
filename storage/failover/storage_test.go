package failover_test

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/failover"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
	redisstore "github.com/go-throttler/throttler/storage/redis"
	"github.com/go-throttler/throttler/storage/storagetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// stores returns the storages of a Redis and a Postgres, with timeouts so long that a slow machine fails no call: these
// tests are about what is decided.
func stores(t testing.TB) (*redisstore.Storage, *pgstore.Storage) {
	t.Helper()
	r, err := redisstore.Open(servers.RedisURL(t), &redisstore.Options{Timeout: storecheck.Patient})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, r.Close(context.Background())) })
	pool, err := pgxpool.New(t.Context(), servers.PostgresURL(t))
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	p, err := pgstore.New(t.Context(), pool, &pgstore.Options{Timeout: storecheck.Patient})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, p.Close(context.Background())) })
	return r, p
}

// real returns a storage on real servers, with timeouts as long as those of stores.
func real(t testing.TB, o failover.Options) *failover.Storage {
	t.Helper()
	o.PrimaryTimeout, o.LedgerTimeout = storecheck.Patient, storecheck.Patient
	r, p := stores(t)
	s, err := failover.New(r, p, &o)
	require.NoError(t, err)
	t.Cleanup(func() {
		assert.NoError(t, s.Close(context.Background()))
		assert.False(t, s.State().Degraded)
	})
	return s
}

func TestTheStoragePassesTheSuite(t *testing.T) {
	t.Parallel()
	s := real(t, failover.Options{})
	storagetest.Run(t, func(testing.TB) storage.Storage { return s })
}

func TestAStoreThatIsClosedTooEarlyIsToldByEveryCallThatNeedsIt(t *testing.T) {
	t.Parallel()
	bg := context.Background()
	t.Run("Postgres", func(t *testing.T) {
		t.Parallel()
		r, p := stores(t)
		s, err := failover.New(r, p, &failover.Options{FlushInterval: time.Minute, PrimaryTimeout: storecheck.Patient, LedgerTimeout: storecheck.Patient})
		require.NoError(t, err)
		require.Equal(t, 3, storecheck.Take(t, s, storecheck.FivePerHour(t, "a"), 3))
		require.NoError(t, p.Close(bg))
		require.ErrorIs(t, s.Reset(bg, "", "b"), storage.ErrClosed)
		require.ErrorIs(t, s.Close(bg), storage.ErrClosed, "3 admissions were not written")
		assert.Equal(t, 2, s.State().Pending)
	})
	t.Run("Redis", func(t *testing.T) {
		t.Parallel()
		r, p := stores(t)
		s, err := failover.New(r, p, &failover.Options{PrimaryTimeout: storecheck.Patient, LedgerTimeout: storecheck.Patient})
		require.NoError(t, err)
		_, err = failover.New(r, p, nil)
		require.ErrorContains(t, err, "must be open, and used by nothing else")
		require.NoError(t, r.Close(bg))
		require.ErrorIs(t, s.Reset(bg, "", "a"), storage.ErrClosed)
		require.NoError(t, s.Close(bg))
	})
}
