package rules_test

import (
	"context"
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/rules"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/failover"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
	redisstore "github.com/go-throttler/throttler/storage/redis"
	memstore "github.com/go-throttler/throttler/storage/runtime"
)

func redis(t *testing.T) *redisstore.Storage {
	t.Helper()
	s, err := redisstore.Open(servers.RedisURL(t), &redisstore.Options{Timeout: storecheck.Patient})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close(context.Background())) })
	return s
}

func postgres(t *testing.T) *pgstore.Storage {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), servers.PostgresURL(t))
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	s, err := pgstore.New(t.Context(), pool, &pgstore.Options{Timeout: storecheck.Patient})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close(context.Background())) })
	return s
}

func TestACrowdIsChargedExactlyForWhatIsAdmitted(t *testing.T) {
	t.Parallel()
	for name, open := range map[string]func(*testing.T) storage.Storage{
		"runtime":  func(*testing.T) storage.Storage { return memstore.New(nil) },
		"redis":    func(t *testing.T) storage.Storage { return redis(t) },
		"postgres": func(t *testing.T) storage.Storage { return postgres(t) },
		"failover": func(t *testing.T) storage.Storage {
			s, err := failover.New(redis(t), postgres(t), &failover.Options{PrimaryTimeout: storecheck.Patient, LedgerTimeout: storecheck.Patient})
			require.NoError(t, err)
			t.Cleanup(func() { assert.NoError(t, s.Close(context.Background())) })
			return s
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, err := throttler.New(throttler.Config{Storage: open(t), Name: fmt.Sprint("rules", time.Now().UnixNano())})
			require.NoError(t, err)
			// No fixed windows here: the test would fail if midnight ended one.
			source := rules.NewMemory(rules.File{Name: "a", Data: []byte("domain: d\ndescriptors: [{key: large, rate_limits: [100000/1d]}, {key: small, rate_limits: [1000/1d]}]")})
			e, err := rules.NewEngine(l, source, nil)
			require.NoError(t, err)
			t.Cleanup(e.Close)
			request := rules.Request{Domain: "d", Descriptors: []rules.Descriptor{{Entries: entries("large", "x")}, {Entries: entries("small", "x")}}}
			var admitted atomic.Int64
			storecheck.Crowd(64, func(int) {
				for range 4000 / 64 {
					v, applied, err := e.Decide(context.Background(), request)
					if !assert.NoError(t, err) {
						return
					}
					if v.Allowed {
						admitted.Add(1)
					} else {
						assert.False(t, applied[0].Denied)
						assert.True(t, applied[1].Denied)
					}
				}
			})
			assert.Equal(t, int64(1000), admitted.Load())
			request.Descriptors[0].Cost, request.Descriptors[1].Cost = new(int64(0)), new(int64(0))
			request.Mode = rules.Peek
			_, applied, err := e.Decide(t.Context(), request)
			require.NoError(t, err)
			assert.Equal(t, int64(100_000-1000), applied[0].Levels[0].Remaining)
			assert.Equal(t, int64(0), applied[1].Levels[0].Remaining)
		})
	}
}

func TestShadowsAreDecidedWhilePostgresAnswersForRedis(t *testing.T) {
	t.Parallel()
	gone, err := redisstore.Open("redis://127.0.0.1:1", nil) // a port that nobody listens on
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, gone.Close(context.Background())) })
	s, err := failover.New(gone, postgres(t), &failover.Options{LedgerTimeout: storecheck.Patient})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close(context.Background())) })
	l, err := throttler.New(throttler.Config{Storage: s, Name: fmt.Sprint("shadows", time.Now().UnixNano())})
	require.NoError(t, err)
	e, err := rules.NewEngine(l, rules.NewMemory(rules.File{Name: "a", Data: []byte("rules: [{name: a, limits: 9/1d}, {name: b, limits: 1/1d, shadow: true}]")}), nil)
	require.NoError(t, err)
	t.Cleanup(e.Close)
	for _, denied := range []bool{false, true} {
		v, applied, err := e.Decide(t.Context(), rules.Request{})
		require.NoError(t, err)
		require.True(t, v.Allowed)
		require.True(t, v.Degraded())
		require.Len(t, applied[1].Levels, 1)
		require.Equal(t, denied, applied[1].Denied)
	}
}

func TestAHundredThousandLimitsOfRequestsTakeBoundedMemory(t *testing.T) { //nolint:paralleltest // it measures memory
	memory := memstore.New(nil)
	l, err := throttler.New(throttler.Config{Storage: memory})
	require.NoError(t, err)
	e, err := rules.NewEngine(l, rules.NewMemory(rules.File{Name: "a", Data: []byte("domain: d\ndescriptors: []")}), nil)
	require.NoError(t, err)
	defer e.Close()
	ask := func(from, to int) {
		for i := from; i < to; i++ {
			b := throttler.NewBucket(time.Hour, int64(1_000_000+i))
			_, _, err := e.Decide(t.Context(), rules.Request{Domain: "d", Descriptors: []rules.Descriptor{{Entries: entries("user", "42"), Limit: &b}}})
			require.NoError(t, err)
		}
	}
	ask(0, 2000)
	before := heap()
	ask(2000, 102_000)
	assert.Less(t, heap()-before, int64(4<<20), "they are 2.3 KB each in envoyproxy/ratelimit")
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestIdentifiersOfOneDomainHaveOneHashTag(t *testing.T) {
	t.Parallel()
	s := &spy{}
	l, err := throttler.New(throttler.Config{Storage: s})
	require.NoError(t, err)
	e, err := rules.NewEngine(l, rules.NewMemory(rules.File{Name: "a", Data: []byte("domain: a b=1:c\ndescriptors: [{key: k, rate_limits: [5/1h]}]\n---\ndomain: a b=1:c\nrules: [{name: r, per: k, limits: 5/1h}]")}), nil)
	require.NoError(t, err)
	defer e.Close()
	_, _, err = e.Decide(t.Context(), rules.Request{Domain: "a b=1:c", Entries: entries("k", "v")})
	require.ErrorIs(t, err, errSpy)
	for _, id := range s.identifiers() {
		assert.Equal(t, "a b=1:c", rules.HashTag(id), id)
	}
	assert.Len(t, s.identifiers(), 2)
	for _, id := range []string{"", "user:42", "domain=", "domain=x:y", "domain=99:y", "domain=-1:y"} {
		assert.Equal(t, id, rules.HashTag(id))
	}
}
