//go:build ratelimit

package main

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/service/ratelimit/v3"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"

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
- key: roomy
  rate_limit: {unit: day, requests_per_unit: 1000000}
- key: silent
  shadow_mode: true
  rate_limit: {unit: day, requests_per_unit: 2}
`

// TestAnswersAreThoseOfEnvoyproxyRatelimit compares random calls over gRPC and JSON with the real envoyproxy/ratelimit,
// the program that RATELIMIT names. A call has either one descriptor and a cost of 1, or several descriptors, any cost,
// and limits that are never reached. In other cases the two differ by design, and so they do for negative hits, which
// envoyproxy/ratelimit takes as any others.
func TestAnswersAreThoseOfEnvoyproxyRatelimit(t *testing.T) {
	t.Parallel()
	calls := 1000
	if os.Getenv("THROTTLER_LONG") != "" {
		calls = 10_000
	}
	theirs, theirURL := ratelimit(t, differentialRules)
	d := start(t, nil, "-rules", written(t, differentialRules))
	ours, ourURL := d.envoy(t), "http://"+d.address("http")
	client := &http.Client{Transport: &http.Transport{}}
	t.Cleanup(client.CloseIdleConnections)
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // to be repeated
	denied := 0
	for i := range calls {
		r := randomCall(random, calls)
		var a, b *ratelimitv3.RateLimitResponse
		if random.IntN(4) == 0 {
			a, b = overJSON(t, client, theirURL, r), overJSON(t, client, ourURL, r)
		} else {
			a, b = should(t, theirs, r), should(t, ours, r)
		}
		requireSame(t, a, b, r, "call %d: %v", i, r)
		if a.GetOverallCode() == codeOver {
			denied++
		}
	}
	require.Greater(t, denied, calls/50, "the calls try something")
	require.Less(t, denied, calls/2)
}

func randomCall(random *rand.Rand, calls int) *ratelimitv3.RateLimitRequest {
	one := func(of ...string) string { return of[random.IntN(len(of))] }
	user := strconv.Itoa(random.IntN(max(4, calls/16)))
	if random.IntN(5) == 0 {
		r := &ratelimitv3.RateLimitRequest{Domain: "d", HitsAddend: random.Uint32N(4)}
		for i := range 1 + random.IntN(3) {
			r.Descriptors = append(r.Descriptors, described("roomy", strconv.Itoa(3*random.IntN(20)+i))) // no descriptor twice in a call
		}
		return r
	}
	return [...]*ratelimitv3.RateLimitRequest{
		ask("d", "user", user), ask("d", "path", one("/a", "/ab", "/b", "/c"), "user", user), ask("d", "path", one("/a", "/b")),
		ask("d", "silent", user), ask("d", "nope", user), ask("d", "user", user, "user", user),
	}[random.IntN(6)]
}

// requireSame compares their answer a with ours, b.
func requireSame(t *testing.T, a, b *ratelimitv3.RateLimitResponse, r *ratelimitv3.RateLimitRequest, what ...any) {
	t.Helper()
	require.Equal(t, a.GetOverallCode(), b.GetOverallCode(), what...)
	require.Len(t, b.GetStatuses(), len(a.GetStatuses()), what...)
	for i := range a.GetStatuses() {
		x, y := a.GetStatuses()[i], b.GetStatuses()[i]
		require.Equal(t, x.GetCode(), y.GetCode(), what...)
		if r.GetDescriptors()[0].GetEntries()[0].GetKey() == "silent" {
			continue // only envoyproxy/ratelimit reports this limit
		}
		require.Equal(t, x.GetCurrentLimit().GetRequestsPerUnit(), y.GetCurrentLimit().GetRequestsPerUnit(), what...)
		require.Equal(t, x.GetCurrentLimit().GetUnit(), y.GetCurrentLimit().GetUnit(), what...)
		if x.GetCurrentLimit() != nil {
			require.Equal(t, x.GetLimitRemaining(), y.GetLimitRemaining(), what...)
		}
	}
}

// overJSON asks by POST /json and checks that the HTTP status fits the code.
func overJSON(t *testing.T, client *http.Client, url string, r *ratelimitv3.RateLimitRequest) *ratelimitv3.RateLimitResponse {
	t.Helper()
	body, err := protojson.Marshal(r)
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	q, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/json", bytes.NewReader(body))
	require.NoError(t, err)
	answer, err := client.Do(q)
	require.NoError(t, err)
	defer func() { _ = answer.Body.Close() }()
	body, err = io.ReadAll(answer.Body)
	require.NoError(t, err)
	out := &ratelimitv3.RateLimitResponse{}
	require.NoError(t, protojson.Unmarshal(body, out), "%s", body)
	want := http.StatusOK
	if out.GetOverallCode() == codeOver {
		want = http.StatusTooManyRequests
	}
	require.Equal(t, want, answer.StatusCode)
	return out
}

// ratelimit starts an envoyproxy/ratelimit with rules for the domain d and a Redis of its own.
func ratelimit(t *testing.T, rules string) (client ratelimitv3.RateLimitServiceClient, url string) {
	t.Helper()
	port := freePort(t)
	address, _ := startRatelimit(t, servers.Redis(t).Addr(), rules, "PORT="+port)
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return envoyClient(conn), "http://127.0.0.1:" + port
}

// startRatelimit starts the program and returns its gRPC address.
func startRatelimit(t testing.TB, redis, rules string, env ...string) (address string, pid int) {
	t.Helper()
	require.NotEmpty(t, os.Getenv("RATELIMIT"), "RATELIMIT must name the program of envoyproxy/ratelimit: make test builds it")
	dir, port := t.TempDir(), freePort(t)
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "r", "config"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "r", "config", "d.yaml"), []byte(rules), 0o600))
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	c := exec.CommandContext(ctx, os.Getenv("RATELIMIT"))
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.Env = append(os.Environ(), "USE_STATSD=false", "REDIS_SOCKET_TYPE=tcp", "REDIS_URL="+redis, "RUNTIME_ROOT="+dir, "RUNTIME_SUBDIRECTORY=r", "RUNTIME_WATCH_ROOT=false",
		"HOST=127.0.0.1", "PORT="+freePort(t), "GRPC_HOST=127.0.0.1", "GRPC_PORT="+port, "DEBUG_HOST=127.0.0.1", "DEBUG_PORT="+freePort(t), "LOG_LEVEL=error")
	c.Env = append(c.Env, env...)
	log := &text{}
	c.Stdout, c.Stderr = log, log
	require.NoError(t, c.Start())
	t.Cleanup(func() { cancel(); _ = c.Wait() })
	require.Eventually(t, func() bool {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", "127.0.0.1:"+port)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	}, patience, 10*time.Millisecond, "it listens")
	return "127.0.0.1:" + port, c.Process.Pid
}
