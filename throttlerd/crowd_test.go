package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"

	commonv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/ratelimit/v3"
	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/service/ratelimit/v3"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
)

// crowdRules are not fixed windows, because the test would fail if midnight ended one.
const crowdRules = "domain: DOMAIN\ndescriptors: [{key: large, rate_limits: [100000/1d]}, {key: small, rate_limits: [1000/1d]}]\n"

const calls = 4000

// crowd is 64 callers of the gRPC listener. Each has its own connection and asks for two limits.
type crowd struct {
	domain   string
	clients  []ratelimitv3.RateLimitServiceClient
	asked    atomic.Int64
	admitted atomic.Int64
}

// newCrowd starts a daemon. Its timeouts are long, so that a busy machine may be slow: the test is about the numbers.
func newCrowd(t *testing.T, flags ...string) *crowd {
	t.Helper()
	c := &crowd{domain: fmt.Sprintf("crowd%x", rand.Uint64())} //nolint:gosec // a name of its own on a server that others use
	rules := "domain: " + c.domain + crowdRules[len("domain: DOMAIN"):]
	flags = append([]string{"-rules", written(t, rules)}, flags...)
	for _, server := range []string{"redis", "postgres"} {
		if slices.Contains(flags, "-"+server+"-url") {
			flags = append(flags, "-"+server+"-timeout", storecheck.Patient.String())
		}
	}
	d := start(t, nil, flags...)
	for range 64 {
		c.clients = append(c.clients, d.envoy(t))
	}
	return c
}

func (c *crowd) request() *ratelimitv3.RateLimitRequest {
	return &ratelimitv3.RateLimitRequest{Domain: c.domain, Descriptors: []*commonv3.RateLimitDescriptor{described("large", "x"), described("small", "x")}}
}

// run lets all clients make calls, as many as the constant calls says. Before call number at it runs happens, while the
// other clients go on.
func (c *crowd) run(t *testing.T, at int64, happens func()) {
	t.Helper()
	storecheck.Crowd(len(c.clients), func(i int) {
		for n := c.asked.Add(1); n <= calls; n = c.asked.Add(1) {
			if n == at {
				happens()
			}
			out, err := c.clients[i].ShouldRateLimit(t.Context(), c.request(), grpc.WaitForReady(true))
			if !assert.NoError(t, err) || !assert.NotContains(t, out.GetDynamicMetadata().GetFields(), "error") {
				return
			}
			if out.GetOverallCode() == codeOK {
				c.admitted.Add(1)
				continue
			}
			assert.Equal(t, codeOK, out.GetStatuses()[0].GetCode())
			assert.Equal(t, codeOver, out.GetStatuses()[1].GetCode())
		}
	})
}

// left returns what the two limits have left, and takes none of it.
func (c *crowd) left(t *testing.T) (large, small uint32) {
	t.Helper()
	r := c.request()
	for _, d := range r.GetDescriptors() {
		d.HitsAddend = wrapperspb.UInt64(0)
	}
	out := should(t, c.clients[0], r)
	return out.GetStatuses()[0].GetLimitRemaining(), out.GetStatuses()[1].GetLimitRemaining()
}

func TestACrowdIsChargedExactlyAsOftenAsAdmitted(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string]func(t *testing.T) []string{
		"runtime": func(*testing.T) []string { return nil },
		"redis":   func(t *testing.T) []string { return []string{"-storage", "redis", "-redis-url", servers.RedisURL(t)} },
		"redis, by leases": func(t *testing.T) []string {
			return []string{"-storage", "redis", "-redis-url", servers.RedisURL(t), "-lease"}
		},
		"postgres": func(t *testing.T) []string {
			return []string{"-storage", "postgres", "-postgres-url", servers.PostgresURL(t)}
		},
		"failover": func(t *testing.T) []string {
			return []string{"-storage", "failover", "-redis-url", servers.RedisURL(t), "-postgres-url", servers.PostgresURL(t)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCrowd(t, flags(t)...)
			c.run(t, 0, nil)
			assert.Equal(t, int64(1000), c.admitted.Load())
			large, small := c.left(t)
			assert.Equal(t, uint32(100_000-1000), large)
			assert.Equal(t, uint32(0), small)
		})
	}
}

// TestACrowdSeesNoErrorWhenRedisIsKilled kills Redis when it has admitted some calls and Postgres knows of fewer.
func TestACrowdSeesNoErrorWhenRedisIsKilled(t *testing.T) {
	t.Parallel()
	redis := servers.Redis(t)
	c := newCrowd(t, "-storage", "failover", "-redis-url", redis.URL(), "-postgres-url", servers.PostgresURL(t))
	c.run(t, 500, func() { assert.NoError(t, redis.Kill()) })
	large, small := c.left(t)
	require.Equal(t, int64(1000), c.admitted.Load())
	require.Equal(t, uint32(100_000-1000), large)
	require.Equal(t, uint32(0), small)
}
