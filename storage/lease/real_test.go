package lease_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/lease"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// onServers runs a test on Redis and on Postgres. plain is a storage on the same server without leases.
func onServers(t *testing.T, test func(t *testing.T, url string, plain storage.Storage)) {
	t.Parallel()
	t.Run("redis", func(t *testing.T) {
		t.Parallel()
		url := servers.RedisURL(t)
		test(t, url, openRedis(t, url))
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		url := servers.PostgresURL(t)
		test(t, url, openPostgres(t, url))
	})
}

// unique returns an identifier that no other test uses.
func unique(name string) string { return fmt.Sprint(name, time.Now().UnixNano()) }

// limited returns an order for a bucket that refills nothing during a test.
func limited(kind law.Kind, limit int64) order {
	o := order{ID: unique(kind.String()), Kind: kind, Period: storecheck.Period(), Limit: limit}
	if kind == law.Continuous {
		o.Period = 366 * 24 * time.Hour
	}
	return o
}

func (o order) with(do string, workers, calls int) order {
	o.Do, o.Workers, o.Calls = do, workers, calls
	return o
}

// spent returns how many tokens the shared storage counts as spent.
func (o order) spent(t testing.TB, plain storage.Storage) int64 {
	t.Helper()
	r, err := o.request()
	require.NoError(t, err)
	return storecheck.Spent(t, plain, r)
}

func TestFourProcessesAdmitExactlyTheLimit(t *testing.T) {
	onServers(t, func(t *testing.T, url string, plain storage.Storage) {
		var nodes []*node
		for range 4 {
			nodes = append(nodes, startNode(t, url))
		}
		crowd := func(o order) (sum int64) {
			for _, n := range nodes {
				n.begin(o)
			}
			for _, n := range nodes {
				sum += n.end().Admitted
			}
			return sum
		}
		for _, kind := range storecheck.Kinds {
			o := limited(kind, 4000)
			if kind == law.SlidingLog {
				o.Limit = 256
			}
			admitted := crowd(o.with("crowd", 8, 300))
			storecheck.Until(t, "something is left that nobody is given", func() bool {
				admitted += crowd(o.with("crowd", 1, 20))
				return admitted >= o.Limit
			})
			admitted += crowd(o.with("crowd", 8, 50))
			assert.Equal(t, o.Limit, admitted, "%v", kind)
			assert.Equal(t, o.Limit, o.spent(t, plain), "%v", kind)
		}
		for _, n := range nodes {
			a := n.do(order{Do: "close", Kind: law.Replenish, Period: time.Hour})
			assert.Greater(t, a.State.Local, int64(100), "leases decided")
			assert.Greater(t, a.State.Remembered, int64(100), "denials were remembered")
		}
	})
}

func TestWhatAKilledProcessHadLeasedComesBackWithItsHold(t *testing.T) {
	onServers(t, func(t *testing.T, url string, plain storage.Storage) {
		n := startNode(t, url)
		o := order{ID: unique("killed"), Kind: law.Replenish, Period: 2 * time.Second, Limit: 1000}
		had := n.do(o.with("lease", 0, 0))
		n.signal(syscall.SIGKILL)
		require.Positive(t, had.State.Tokens)
		r, err := o.request()
		require.NoError(t, err)
		other := over(t, plain, nil)
		admitted := int64(storecheck.Take(t, other, r, 1000))
		assert.LessOrEqual(t, admitted, 1000-had.Admitted)
		storecheck.Until(t, "the hold does not end", func() bool { return o.spent(t, plain) == 0 })
		began := time.Now()
		assert.LessOrEqual(t, storecheck.Take(t, other, r, 1100), 1000*int(1+time.Since(began)/o.Period))
	})
}

func TestAProcessThatWasStoppedUsesNoLeaseThatIsOver(t *testing.T) {
	onServers(t, func(t *testing.T, url string, plain storage.Storage) {
		n := startNode(t, url)
		o := order{ID: unique("stopped"), Kind: law.Replenish, Period: 5 * time.Second, Limit: 1000}
		had := n.do(o.with("lease", 0, 0))
		n.signal(syscall.SIGSTOP)
		require.Positive(t, had.State.Tokens)
		storecheck.Until(t, "the hold does not end", func() bool { return o.spent(t, plain) == 0 })
		r, err := o.request()
		require.NoError(t, err)
		began := time.Now()
		admitted := int64(storecheck.Take(t, over(t, plain, nil), r, 1000))
		n.signal(syscall.SIGCONT)
		admitted += n.do(o.with("crowd", 2, 30)).Admitted
		assert.LessOrEqual(t, admitted, 1000*int64(1+time.Since(began)/o.Period))
	})
}

func TestALeaseOutlivesARedisThatIsStopped(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	shared, err := redisstore.Open(server.URL(), &redisstore.Options{Timeout: 100 * time.Millisecond})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, shared.Close(context.Background())) })
	s := over(t, shared, &lease.Options{Lifetime: 5 * time.Second})
	o := limited(law.Replenish, 100_000)
	r, err := o.request()
	require.NoError(t, err)
	var told storecheck.Told
	for s.State().Tokens < 50 {
		_ = told.Ask(s, r)
	}
	require.NoError(t, server.Freeze())
	for s.State().Tokens > 0 {
		require.NoError(t, told.Ask(s, r), "a lease needs no server")
	}
	require.ErrorIs(t, told.Ask(s, r), storage.ErrUnavailable)
	require.NoError(t, server.Thaw())
	storecheck.Until(t, "it stays away", func() bool { return told.Ask(s, r) == nil })
	require.NoError(t, s.Close(t.Context()))
	// A failed call was charged at most its cost and the lease that it asked for.
	spent := o.spent(t, shared)
	assert.GreaterOrEqual(t, spent, told.Admitted.Load())
	assert.LessOrEqual(t, spent-told.Admitted.Load(), told.Failed.Load()*1000)
}

func TestCloseUnderLoadGivesEverythingBack(t *testing.T) {
	onServers(t, func(t *testing.T, _ string, plain storage.Storage) {
		s, err := lease.New(plain, nil)
		require.NoError(t, err)
		o := limited(law.Replenish, 1<<40)
		r, err := o.request()
		require.NoError(t, err)
		var admitted atomic.Int64
		var closed error
		storecheck.Crowd(16, func(i int) {
			for n := 0; ; n++ {
				if i == 0 && n == 500 {
					closed = s.Close(context.Background())
				}
				v, err := storecheck.Decide(context.Background(), s, r)
				if err != nil {
					assert.ErrorIs(t, err, storage.ErrClosed)
					return
				}
				if assert.True(t, v.Allowed) {
					admitted.Add(1)
				}
			}
		})
		require.NoError(t, closed)
		assert.Positive(t, s.State().Local)
		assert.Zero(t, s.State().Tokens)
		assert.Equal(t, admitted.Load(), o.spent(t, plain))
	})
}
