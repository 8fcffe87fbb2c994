package faulttest_test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// connect makes the client open six connections. So it could send a command six times, although the reply to the first
// command on each connection is lost.
func connect(t testing.TB, c *goredis.Client) {
	t.Helper()
	for range 6 {
		held := c.Conn()
		defer func() { assert.NoError(t, held.Close()) }()
		assert.NoError(t, held.Ping(t.Context()).Err())
	}
}

func TestAReplyThatIsLostIsChargedAtMostOnce(t *testing.T) {
	t.Parallel()
	p := before(t, servers.Redis(t))
	c := stubborn(t, p.Listen)
	s, r := on(t, c, storecheck.Patient), storecheck.Hourly(t, "a", 1<<40)
	var count storecheck.Told
	require.NoError(t, count.Ask(s, r))
	for i := range 100 {
		connect(t, c)
		heal := p.poison(t, "limit_data", replies, attributes{"bytes": 0})
		storecheck.Crowd(1+i%3, func(int) { assert.ErrorIs(t, count.Ask(s, r), storage.ErrUnavailable) })
		heal()
		count.AssertAccount(t, s, r)
	}
	t.Logf("%d calls lost their reply, %d of them were charged", count.Failed.Load(), storecheck.Spent(t, s, r)-1)
	assert.Greater(t, storecheck.Spent(t, s, r), int64(50), "the calls did not arrive, so that nothing was tested")
}

func TestABlackHoleDelaysCallsByTheirTimeAndNoLonger(t *testing.T) {
	t.Parallel()
	p := before(t, servers.Redis(t))
	s, r := open(t, p.URL(), redisstore.DefaultTimeout), storecheck.Hourly(t, "a", 1000)
	var count storecheck.Told
	require.NoError(t, count.Ask(s, r))
	heals := []func(){p.poison(t, "timeout", requests, attributes{"timeout": 0}), p.poison(t, "timeout", replies, attributes{"timeout": 0})}
	storecheck.AssertBackAfter(t, redisstore.DefaultTimeout, storecheck.Timed(7, func() {
		err := count.Ask(s, r)
		assert.ErrorIs(t, err, storage.ErrUnavailable)
		assert.NotErrorIs(t, err, context.DeadlineExceeded, "the context that ended is not the caller's")
	}))
	storecheck.AssertBackAfter(t, 100*time.Millisecond, storecheck.Timed(7, func() {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := storecheck.Decide(ctx, s, r)
		assert.ErrorIs(t, err, context.DeadlineExceeded)
	}))
	for _, heal := range heals {
		heal()
	}
	t.Log("works after", storecheck.Recovery(t, 5*time.Second, func() error { return count.Ask(s, r) }))
	count.AssertAccount(t, s, r)
	assertExact(t, s, "b")
}

// Nothing closes the connections into the hole, as if the host had disappeared. The client has the timeouts that New
// asks for.
func TestConnectionsIntoABlackHoleAreGivenUp(t *testing.T) {
	t.Parallel()
	const timeout = 100 * time.Millisecond
	server := servers.Redis(t)
	p := before(t, server)
	var moved atomic.Bool
	c := goredis.NewClient(&goredis.Options{
		DialTimeout: timeout, ReadTimeout: timeout, WriteTimeout: timeout, DialerRetries: 1,
		Dialer: func(ctx context.Context, network, _ string) (net.Conn, error) {
			addr := p.Listen
			if moved.Load() {
				addr = server.Addr()
			}
			return new(net.Dialer).DialContext(ctx, network, addr)
		},
	})
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	s, r := on(t, c, timeout), storecheck.Hourly(t, "a", 1000)
	var count storecheck.Told
	require.NoError(t, count.Ask(s, r))
	p.poison(t, "timeout", requests, attributes{"timeout": 0})
	for range 25 { // more than batches can be in flight
		assert.ErrorIs(t, count.Ask(s, r), storage.ErrUnavailable)
	}
	moved.Store(true)
	took := storecheck.Recovery(t, 5*time.Second, func() error { return count.Ask(s, r) })
	t.Log("works after", took)
	assert.Less(t, took, timeout+time.Second, "dead connections are still waited for")
	count.AssertAccount(t, s, r)
}

func TestLatencyAndJitterDoNotMatter(t *testing.T) {
	t.Parallel()
	p := before(t, servers.Redis(t))
	p.poison(t, "latency", replies, attributes{"latency": 20, "jitter": 15})
	assertExact(t, open(t, p.URL(), storecheck.Patient), "a")
}

func TestConnectionsThatAreResetChargeNothingTwice(t *testing.T) {
	t.Parallel()
	for _, direction := range []string{requests, replies} {
		t.Run(direction, func(t *testing.T) {
			t.Parallel()
			p := before(t, servers.Redis(t))
			s := on(t, stubborn(t, p.Listen), storecheck.Patient)
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			assertUnderFire(t, s, func() {
				heal := p.poison(t, "reset_peer", direction, attributes{"timeout": 0})
				<-tick.C
				heal()
				<-tick.C
			})
			assertExact(t, s, "after")
		})
	}
}

func TestRepliesInPiecesDoNotMatter(t *testing.T) {
	t.Parallel()
	p := before(t, servers.Redis(t))
	p.poison(t, "slicer", replies, attributes{"average_size": 3, "size_variation": 2, "delay": 50})
	p.poison(t, "slicer", requests, attributes{"average_size": 200, "size_variation": 100, "delay": 50})
	assertExact(t, open(t, p.URL(), storecheck.Patient), "a")
}

func TestConnectionsThatAreSlowToCloseDoNotMatter(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	p := before(t, server)
	p.poison(t, "slow_close", replies, attributes{"delay": 100})
	p.poison(t, "slow_close", requests, attributes{"delay": 100})
	s := on(t, stubborn(t, p.Listen), storecheck.Patient)
	assertExact(t, s, "a")
	admin := stubborn(t, server.Addr())
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	assertUnderFire(t, s, func() {
		assert.NoError(t, admin.ClientKillByFilter(context.Background(), "TYPE", "normal", "SKIPME", "yes").Err())
		<-tick.C
	})
	assertExact(t, s, "after")
}
