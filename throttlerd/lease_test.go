package main

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/service/ratelimit/v3"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
)

// leased is a rule of one limit in a domain of its own, and the flags of daemons with leases that share it.
type leased struct {
	domain string
	flags  []string
}

// newLeased uses a fixed window of 30 days, because the end of one is hardly ever met.
func newLeased(t *testing.T, limit int, redisURL string) *leased {
	t.Helper()
	l := &leased{domain: fmt.Sprintf("leased%x", rand.Uint64())} //nolint:gosec // a name of its own on a server that others use
	rules := fmt.Sprintf("domain: %s\nrules: [{name: hot, per: [user], limits: [%d/30d fixed]}]\n", l.domain, limit)
	l.flags = []string{"-rules", written(t, rules), "-storage", "redis", "-redis-url", redisURL, "-redis-timeout", storecheck.Patient.String(), "-lease"}
	return l
}

// admits reports whether a call of the user was admitted.
func (l *leased) admits(t *testing.T, c ratelimitv3.RateLimitServiceClient) bool {
	t.Helper()
	return should(t, c, ask(l.domain, "user", "x")).GetOverallCode() == codeOK
}

func (l *leased) query() string { return "/v1/levels?domain=" + l.domain + "&entry=user=x" }

// left returns what GET /v1/levels says that the user has left.
func (l *leased) left(t *testing.T, d *running) int {
	t.Helper()
	a := d.administer(t, http.MethodGet, l.query(), "")
	require.Equal(t, http.StatusOK, a.status, a.body)
	_, rest, found := strings.Cut(a.body, `"remaining":`)
	require.True(t, found, a.body)
	digits := rest[:strings.IndexFunc(rest, func(c rune) bool { return c < '0' || c > '9' })]
	n, err := strconv.Atoi(digits)
	require.NoError(t, err)
	return n
}

// figure returns a figure of the leases in the metrics.
func (r *running) figure(t *testing.T, name string) int {
	t.Helper()
	lines := r.scrape(t, "throttler_lease_"+name+`{storage="lease"} `)
	require.Len(t, lines, 1, name)
	n, err := strconv.ParseFloat(lines[0], 64)
	require.NoError(t, err)
	return int(n)
}

// scripts returns how many scripts a Redis has run. Each decision, and each batch of them, is one.
func scripts(t *testing.T, s *servers.Server) (n int) {
	t.Helper()
	c := redis.NewClient(&redis.Options{Addr: s.Addr()})
	defer func() { _ = c.Close() }()
	info := c.InfoMap(t.Context(), "commandstats")
	require.NoError(t, info.Err())
	for _, command := range []string{"eval", "evalsha", "fcall"} {
		said, _ := strings.CutPrefix(info.Item("Commandstats", "cmdstat_"+command), "calls=")
		calls, _, _ := strings.Cut(said, ",")
		if calls != "" {
			more, err := strconv.Atoi(calls)
			require.NoError(t, err)
			n += more
		}
	}
	return n
}

// TestLeasesDecideAHotIdentifierWithFewCallsToRedis asks one call after another: concurrent ones would share the scripts
// anyway.
func TestLeasesDecideAHotIdentifierWithFewCallsToRedis(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	l := newLeased(t, 1_000_000, server.URL())
	d := start(t, withToken, l.flags...)
	client := d.envoy(t)
	const asked = 2000
	before := scripts(t, server)
	for range asked {
		require.True(t, l.admits(t, client))
	}
	require.Less(t, scripts(t, server)-before, asked/4)
	require.Equal(t, 1_000_000-asked, l.left(t, d), "none is lost")

	require.Greater(t, d.figure(t, "local_total"), asked*3/4)
	require.Less(t, d.figure(t, "calls_total"), asked/4)
	require.NotEmpty(t, d.scrape(t, `throttler_decisions_total{name="rules",op="consume",result="allowed",source="lease"}`))
	require.Contains(t, d.administer(t, http.MethodGet, "/debug/throttler/", "").body, "lease_local_total")
}

func TestLeasesOverAFailoverShowTheFiguresOfBoth(t *testing.T) {
	t.Parallel()
	l := newLeased(t, 1000, servers.RedisURL(t))
	d := start(t, withToken, append(l.flags, "-storage", "failover", "-postgres-url", servers.PostgresURL(t), "-postgres-timeout", storecheck.Patient.String())...)
	require.True(t, l.admits(t, d.envoy(t)))
	require.Positive(t, d.figure(t, "calls_total"))
	require.Equal(t, []string{"0"}, d.scrape(t, `throttler_failover_degraded{storage="failover"} `))
	page := d.administer(t, http.MethodGet, "/debug/throttler/", "").body
	require.Contains(t, page, "lease_tokens")
	require.Contains(t, page, "degraded")
}

// TestTwoDaemonsWithLeasesAdmitExactlyTheLimit also resets the limit through one of the daemons. The other one believes
// its denial for a second.
func TestTwoDaemonsWithLeasesAdmitExactlyTheLimit(t *testing.T) {
	t.Parallel()
	const limit = 3000
	l := newLeased(t, limit, servers.RedisURL(t))
	daemons := [2]*running{start(t, withToken, l.flags...), start(t, withToken, l.flags...)}
	var clients []ratelimitv3.RateLimitServiceClient
	for i := range 16 {
		clients = append(clients, daemons[i%2].envoy(t))
	}
	var admitted atomic.Int64
	storecheck.Crowd(len(clients), func(i int) {
		for range 2 * limit / len(clients) {
			out, err := clients[i].ShouldRateLimit(t.Context(), ask(l.domain, "user", "x"), grpc.WaitForReady(true))
			if !assert.NoError(t, err) {
				return
			}
			if out.GetOverallCode() == codeOK {
				admitted.Add(1)
			}
		}
	})
	for _, d := range daemons {
		require.Positive(t, d.figure(t, "local_total"), "leases decided")
	}
	// A lease that was out while the last calls were denied comes back.
	total := int(admitted.Load())
	storecheck.Until(t, "the rest is admitted", func() bool {
		for _, c := range clients[:2] {
			if l.admits(t, c) {
				total++
			}
		}
		return total >= limit
	})
	storecheck.Until(t, "nobody has a lease", func() bool { return daemons[0].figure(t, "tokens")+daemons[1].figure(t, "tokens") == 0 })
	for _, c := range clients {
		require.False(t, l.admits(t, c), "nothing is admitted above the limit")
	}
	require.Equal(t, limit, total)

	require.Equal(t, http.StatusNoContent, daemons[0].administer(t, http.MethodDelete, l.query(), "").status)
	require.True(t, l.admits(t, clients[0]), "the daemon that resets knows at once")
	storecheck.Until(t, "the other one asks Redis again", func() bool { return l.admits(t, clients[1]) })
}

// TestLevelsCountWhatIsLeasedAndAResetForgetsIt looks while the daemon holds tokens.
func TestLevelsCountWhatIsLeasedAndAResetForgetsIt(t *testing.T) {
	t.Parallel()
	const limit = 100_000
	l := newLeased(t, limit, servers.RedisURL(t))
	d := start(t, withToken, l.flags...)
	client, asked := d.envoy(t), 0
	use := func() {
		storecheck.Until(t, "tokens are leased", func() bool {
			for range 50 {
				require.True(t, l.admits(t, client))
				asked++
			}
			return d.figure(t, "tokens") > 0
		})
	}
	use()
	require.Equal(t, limit-asked, l.left(t, d))
	use()
	require.Equal(t, http.StatusNoContent, d.administer(t, http.MethodDelete, l.query(), "").status)
	require.Equal(t, limit, l.left(t, d))
	require.True(t, l.admits(t, client))
	require.Equal(t, limit-1, l.left(t, d))
}

// TestADaemonThatEndsGivesItsLeasesBack ends one by SIGTERM while 8 callers go on. What Redis then has left is exactly
// what they were not given: no lease is lost, and each call that was charged was also answered.
func TestADaemonThatEndsGivesItsLeasesBack(t *testing.T) {
	t.Parallel()
	const limit = 1_000_000
	l := newLeased(t, limit, servers.RedisURL(t))
	p := launch(t, "throttlerd", append([]string{"-grpc", "127.0.0.1:0", "-http", "127.0.0.1:0"}, l.flags...)...)
	var admitted atomic.Int64
	var callers sync.WaitGroup
	for range 8 {
		conn, err := grpc.NewClient("passthrough:///"+p.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		callers.Go(func() {
			for {
				out, err := envoyClient(conn).ShouldRateLimit(t.Context(), ask(l.domain, "user", "x"))
				if err != nil {
					return // the daemon is gone
				}
				if out.GetOverallCode() == codeOK {
					admitted.Add(1)
				}
			}
		})
	}
	storecheck.Until(t, "the user is hot", func() bool { return admitted.Load() > 2000 })
	require.NoError(t, p.stop(), "exit status 0")
	callers.Wait()
	other := start(t, withToken, l.flags...)
	require.Equal(t, limit-int(admitted.Load()), l.left(t, other))
}
