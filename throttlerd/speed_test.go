//go:build ratelimit

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	commonv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/ratelimit/v3"
	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/service/ratelimit/v3"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"github.com/go-throttler/throttler/internal/servers"
)

const speedRules = `domain: d
descriptors:
- key: user
  rate_limit: {unit: day, requests_per_unit: 100000000}
- key: org
  rate_limit: {unit: day, requests_per_unit: 100000000}
`

// contender is a server to measure.
type contender struct {
	name    string
	cpu     func() (server, redis time.Duration) // processor time that they have used
	clients []*client
}

// measured is one round of a contender.
type measured struct{ rate, p50, p99, cpu, redis float64 } // calls a second; milliseconds; microseconds of processor time a call

// BenchmarkBesideEnvoyproxyRatelimit measures throttlerd and the real envoyproxy/ratelimit in turns, on one Redis. There
// are 1, 64 and 256 callers, each with its own connection. "make bench-ratelimit" runs it.
//
// Each call has two descriptors: one of 1,000 users and one of 100 organisations. Leases decide none of those, so the
// figures of -lease are what it costs in vain. With DESCRIPTORS=1 a call has the organisation alone, and leases decide.
//
// With "fields" envoyproxy/ratelimit answers with header fields for the client, which it does not by default and throttlerd
// does.
//
// "gRPC alone" is the floor: a server with the options of throttlerd that answers OK at once and decides nothing. No
// server that uses grpc-go can be faster. The rest of what throttlerd takes is its own.
func BenchmarkBesideEnvoyproxyRatelimit(b *testing.B) {
	server := servers.Redis(b)
	onRedis := []string{"-storage", "redis", "-redis-url", server.URL(), "-redis-timeout", "10s"}
	var contenders []*contender
	for _, c := range []struct {
		name  string
		start func() (address string, pid int)
		redis bool
	}{
		{"envoyproxy/ratelimit", func() (string, int) { return startRatelimit(b, server.Addr(), speedRules) }, true},
		{"envoyproxy/ratelimit, fields", func() (string, int) {
			return startRatelimit(b, server.Addr(), speedRules, "LIMIT_RESPONSE_HEADERS_ENABLED=true")
		}, true},
		{"throttlerd, redis", func() (string, int) { return startProgram(b, onRedis...) }, true},
		{"throttlerd, redis, -lease", func() (string, int) { return startProgram(b, append(onRedis, "-lease")...) }, true},
		{"throttlerd, runtime", func() (string, int) { return startProgram(b) }, false},
		{"gRPC alone", func() (string, int) { p := launch(b, "gRPC alone"); return p.address, p.pid }, false},
	} {
		if !strings.Contains(c.name, os.Getenv("ONLY")) {
			continue
		}
		address, pid := c.start()
		contenders = append(contenders, &contender{c.name, func() (daemon, redis time.Duration) {
			if c.redis {
				redis = usedByRedis(b, server)
			}
			return used(b, pid), redis
		}, dialAll(b, address)})
	}
	all := []int{1, 64, 256}
	if n, err := strconv.Atoi(os.Getenv("CALLERS")); err == nil {
		all = []int{n}
	}
	n := descriptors(b)
	for _, callers := range all { // each is a benchmark, because of one benchmark only ten lines are printed
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) { inTurns(b, contenders, callers, n) })
	}
}

// inTurns measures the contenders and prints a line for each.
func inTurns(b *testing.B, contenders []*contender, callers, descriptors int) {
	b.Helper()
	results := make([][]measured, len(contenders))
	for range rounds(b) {
		for i, c := range contenders {
			results[i] = append(results[i], c.measure(b, callers, descriptors))
		}
	}
	for i, c := range contenders {
		m := median(results[i])
		b.Logf("%-28s  %7.0f/s  %5.2f times  p50 %6.2f ms  p99 %6.2f ms  processors %4.0f µs a call and %4.0f µs of Redis", c.name, m.rate, ratio(results[i], results[0]), m.p50, m.p99, m.cpu, m.redis)
	}
}

func rounds(b *testing.B) int {
	n, err := strconv.Atoi(os.Getenv("ROUNDS"))
	if err != nil {
		n = 20
	}
	require.Positive(b, n)
	return n
}

func descriptors(b *testing.B) int {
	n, err := strconv.Atoi(os.Getenv("DESCRIPTORS"))
	if err != nil {
		n = 2
	}
	require.Contains(b, []int{1, 2}, n, "DESCRIPTORS")
	return n
}

// median returns the median of each figure.
func median(all []measured) (m measured) {
	of := func(f func(measured) float64) float64 {
		var values []float64
		for _, one := range all {
			values = append(values, f(one))
		}
		slices.Sort(values)
		return values[len(values)/2]
	}
	return measured{of(func(m measured) float64 { return m.rate }), of(func(m measured) float64 { return m.p50 }), of(func(m measured) float64 { return m.p99 }), of(func(m measured) float64 { return m.cpu }), of(func(m measured) float64 { return m.redis })}
}

// ratio returns the median of the quotients of each round: within a round, both met the same state of the machine.
func ratio(a, b []measured) float64 {
	var all []float64
	for i := range a {
		all = append(all, a[i].rate/b[i].rate)
	}
	slices.Sort(all)
	return all[len(all)/2]
}

// turn is short, since the speed of many machines changes from second to second.
const turn = 500 * time.Millisecond

func (c *contender) measure(b *testing.B, callers, descriptors int) measured {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(b.Context()), turn)
	defer cancel()
	var mu sync.Mutex
	var took []time.Duration
	var all sync.WaitGroup
	cpu, redis := c.cpu()
	began := time.Now()
	for i := range callers {
		all.Go(func() {
			mine := call(ctx, c.clients[i], descriptors)
			mu.Lock()
			defer mu.Unlock()
			took = append(took, mine...)
		})
	}
	all.Wait()
	elapsed := time.Since(began)
	cpuAfter, redisAfter := c.cpu()
	each := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(len(took)) }
	require.NotEmpty(b, took)
	slices.Sort(took)
	ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	return measured{float64(len(took)) / elapsed.Seconds(), ms(took[len(took)/2]), ms(took[len(took)*99/100]), each(cpuAfter - cpu), each(redisAfter - redis)}
}

// used returns the processor time that a process has used.
func used(b *testing.B, pid int) time.Duration {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	require.NoError(b, err, "this needs Linux")
	_, rest, _ := strings.Cut(string(data), ") ")
	fields := strings.Fields(rest)
	user, err := strconv.Atoi(fields[11])
	require.NoError(b, err)
	system, err := strconv.Atoi(fields[12])
	require.NoError(b, err)
	return time.Duration(user+system) * 10 * time.Millisecond // the unit of Linux on all platforms that Go supports
}

func usedByRedis(b *testing.B, s *servers.Server) time.Duration {
	b.Helper()
	c := redis.NewClient(&redis.Options{Addr: s.Addr()})
	defer func() { _ = c.Close() }()
	info := c.InfoMap(context.WithoutCancel(b.Context()), "cpu")
	require.NoError(b, info.Err())
	seconds := 0.0
	for _, name := range []string{"used_cpu_user", "used_cpu_sys"} {
		n, err := strconv.ParseFloat(info.Item("CPU", name), 64)
		require.NoError(b, err)
		seconds += n
	}
	return time.Duration(seconds * float64(time.Second))
}

// call makes calls until the context ends, each for one of 100 organisations, and with two descriptors also for one of
// 1,000 users.
func call(ctx context.Context, c *client, descriptors int) (took []time.Duration) {
	for ctx.Err() == nil {
		both := []*commonv3.RateLimitDescriptor{
			described("user", strconv.Itoa(rand.IntN(1000))), described("org", strconv.Itoa(rand.IntN(100))), //nolint:gosec // a load
		}
		r := &ratelimitv3.RateLimitRequest{Domain: "d", Descriptors: both[len(both)-descriptors:]}
		began := time.Now()
		out, err := c.ShouldRateLimit(r)
		if err != nil || out.GetOverallCode() != codeOK {
			panic(fmt.Sprint("a call was not admitted: ", out, err))
		}
		took = append(took, time.Since(began))
	}
	return took
}

func dialAll(b *testing.B, address string) (clients []*client) {
	b.Helper()
	for range 256 {
		clients = append(clients, dial(b, address))
	}
	return clients
}

// startProgram starts throttlerd in its own process, as envoyproxy/ratelimit is, and returns its gRPC address.
func startProgram(b *testing.B, flags ...string) (address string, pid int) {
	b.Helper()
	program := os.Getenv("THROTTLERD")
	if program == "" {
		program = filepath.Join(b.TempDir(), "throttlerd")
		out, err := exec.CommandContext(b.Context(), "go", "build", "-o", program, ".").CombinedOutput()
		require.NoError(b, err, "%s", out)
	}
	rules := filepath.Join(b.TempDir(), "d.yaml")
	require.NoError(b, os.WriteFile(rules, []byte(speedRules), 0o600))
	p := launch(b, program, append([]string{"-rules", rules, "-grpc", "127.0.0.1:0", "-http", "127.0.0.1:0"}, flags...)...)
	return p.address, p.pid
}

func init() { programs["gRPC alone"] = serveAlone }

// alone answers every call at once. It decides nothing.
type alone struct {
	ratelimitv3.UnimplementedRateLimitServiceServer
}

func (alone) ShouldRateLimit(context.Context, *ratelimitv3.RateLimitRequest) (*ratelimitv3.RateLimitResponse, error) {
	return &ratelimitv3.RateLimitResponse{OverallCode: codeOK}, nil
}

// serveAlone serves gRPC with alone until SIGTERM. It has the ballast of serve, so that its garbage is collected as rarely.
func serveAlone() {
	untouched := make([]byte, ballast)
	defer runtime.KeepAlive(untouched)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM)
	s := grpc.NewServer(serverOptions()...)
	ratelimitv3.RegisterRateLimitServiceServer(s, alone{})
	go func() { <-ended; s.GracefulStop() }()
	fmt.Printf("{\"for\":\"grpc\",\"address\":%q}\n", l.Addr())
	if err := s.Serve(l); err != nil {
		panic(err)
	}
}
