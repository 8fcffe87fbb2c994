//go:build ratelimit

package main

import (
	"context"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/service/ratelimit/v3"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/go-throttler/throttler/internal/servers"
)

const differentialRules = `domain: d
descriptors:
- key: user
  rate_limit: {unit: day, requests_per_unit: 3}
- key: user
  value: "1"
  rate_limit: {unlimited: true}
- key: path
  value: /a*
  descriptors:
  - key: user
    rate_limit: {unit: day, requests_per_unit: 5}
- key: path
  value: /b
  rate_limit: {unit: day, requests_per_unit: 20}
- key: silent
  shadow_mode: true
  rate_limit: {unit: day, requests_per_unit: 2}
`

// TestAnswersAreThoseOfEnvoyproxyRatelimit compares random calls with the real envoyproxy/ratelimit, whose program
// RATELIMIT names. Each call has one descriptor and a cost of 1: there both are the same by design.
func TestAnswersAreThoseOfEnvoyproxyRatelimit(t *testing.T) {
	t.Parallel()
	require.NotEmpty(t, os.Getenv("RATELIMIT"), "RATELIMIT must name the program of envoyproxy/ratelimit: make test-long builds it")
	calls := 1000
	if os.Getenv("THROTTLER_LONG") != "" {
		calls = 10_000
	}
	theirs, ours := ratelimit(t), start(t, nil, "-rules", written(t, differentialRules)).envoy(t)
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // to be repeated
	one := func(of ...string) string { return of[random.IntN(len(of))] }
	denied := 0
	for i := range calls {
		user := strconv.Itoa(random.IntN(max(4, calls/16)))
		r := [...]*ratelimitv3.RateLimitRequest{
			ask("d", "user", user), ask("d", "path", one("/a", "/ab", "/b", "/c"), "user", user), ask("d", "path", one("/a", "/b")),
			ask("d", "silent", user), ask("d", "nope", user), ask("d", "user", user, "user", user),
		}[random.IntN(6)]
		a, b := should(t, theirs, r), should(t, ours, r)
		require.Equal(t, a.GetOverallCode(), b.GetOverallCode(), "call %d: %v", i, r)
		require.Len(t, b.GetStatuses(), 1)
		x, y := a.GetStatuses()[0], b.GetStatuses()[0]
		require.Equal(t, x.GetCode(), y.GetCode(), "call %d: %v", i, r)
		if r.GetDescriptors()[0].GetEntries()[0].GetKey() != "silent" { // of which only they tell the limit
			require.Equal(t, x.GetCurrentLimit().GetRequestsPerUnit(), y.GetCurrentLimit().GetRequestsPerUnit(), "call %d: %v", i, r)
			if x.GetCurrentLimit() != nil {
				require.Equal(t, x.GetLimitRemaining(), y.GetLimitRemaining(), "call %d: %v", i, r)
			}
		}
		if a.GetOverallCode() == codeOver {
			denied++
		}
	}
	require.Greater(t, denied, calls/50, "the calls try something")
	require.Less(t, denied, calls/2)
}

// ratelimit is a client of an envoyproxy/ratelimit with the rules, on a Redis of its own.
func ratelimit(t *testing.T) ratelimitv3.RateLimitServiceClient {
	t.Helper()
	dir, port := t.TempDir(), freePort(t)
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "r", "config"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "r", "config", "d.yaml"), []byte(differentialRules), 0o600))
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	c := exec.CommandContext(ctx, os.Getenv("RATELIMIT"))
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.Env = append(os.Environ(), "USE_STATSD=false", "REDIS_SOCKET_TYPE=tcp", "REDIS_URL="+servers.Redis(t).Addr(), "RUNTIME_ROOT="+dir, "RUNTIME_SUBDIRECTORY=r", "RUNTIME_WATCH_ROOT=false",
		"HOST=127.0.0.1", "PORT="+freePort(t), "GRPC_HOST=127.0.0.1", "GRPC_PORT="+port, "DEBUG_HOST=127.0.0.1", "DEBUG_PORT="+freePort(t), "LOG_LEVEL=error")
	log := &text{}
	c.Stdout, c.Stderr = log, log
	require.NoError(t, c.Start())
	t.Cleanup(func() { cancel(); _ = c.Wait() })
	eventually(t, func() bool {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", "127.0.0.1:"+port)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	}, "it listens")
	conn, err := grpc.NewClient("passthrough:///127.0.0.1:"+port, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return envoyClient(conn)
}
