package main

import (
	"context"
	"crypto/rand"
	"io"
	"log/slog"
	"math"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	commonv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/ratelimit/v3"
	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/service/ratelimit/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/go-throttler/throttler/internal/servers"
)

// fields returns the header fields that Envoy must add to its answer.
func fields(r *ratelimitv3.RateLimitResponse) map[string]string {
	all := map[string]string{}
	for _, h := range r.GetResponseHeadersToAdd() {
		all[h.GetKey()] = h.GetValue()
	}
	return all
}

func TestEnvoyIsToldOfTheLimit(t *testing.T) {
	t.Parallel()
	c := start(t, nil, "-rules", written(t, "domain: x\ndescriptors:\n- key: user\n  rate_limit: {name: each, unit: hour, requests_per_unit: 2}\n")).envoy(t)
	for _, remaining := range []uint32{1, 0} {
		out := should(t, c, ask("x", "user", "1"))
		require.Equal(t, codeOK, out.GetOverallCode())
		require.Len(t, out.GetStatuses(), 1)
		s := out.GetStatuses()[0]
		require.Equal(t, codeOK, s.GetCode())
		require.Equal(t, uint32(2), s.GetCurrentLimit().GetRequestsPerUnit())
		require.Equal(t, ratelimitv3.RateLimitResponse_RateLimit_HOUR, s.GetCurrentLimit().GetUnit())
		require.Equal(t, "each", s.GetCurrentLimit().GetName())
		require.Equal(t, remaining, s.GetLimitRemaining())
		require.NotContains(t, fields(out), "retry-after")
		require.Nil(t, out.GetDynamicMetadata())
	}
	out := should(t, c, ask("x", "user", "1"))
	require.Equal(t, codeOver, out.GetOverallCode())
	require.Equal(t, codeOver, out.GetStatuses()[0].GetCode())
	until := out.GetStatuses()[0].GetDurationUntilReset().AsDuration()
	require.True(t, until > 0 && until <= time.Hour, until)
	require.NotEmpty(t, fields(out)["retry-after"])
	require.Contains(t, fields(out)["ratelimit"], ";r=0")
	require.Contains(t, fields(out)["ratelimit-policy"], ";q=2;w=3600")
	require.Equal(t, []any{"user"}, out.GetDynamicMetadata().AsMap()["denied_by"])
	require.Equal(t, codeOK, should(t, c, ask("x", "user", "2")).GetOverallCode())
}

func TestADenialChargesNoDescriptor(t *testing.T) {
	t.Parallel()
	c := start(t, nil, "-rules", written(t, "domain: x\ndescriptors:\n- key: large\n  rate_limit: {unit: day, requests_per_unit: 100000}\n- key: small\n  rate_limit: {unit: day, requests_per_unit: 100}\n")).envoy(t)
	both := &ratelimitv3.RateLimitRequest{Domain: "x", Descriptors: []*commonv3.RateLimitDescriptor{described("large", "a"), described("small", "a")}}
	var admitted atomic.Int64
	var callers sync.WaitGroup
	for range 16 {
		callers.Go(func() {
			for range 25 {
				if out, err := c.ShouldRateLimit(context.WithoutCancel(t.Context()), both); err == nil && out.GetOverallCode() == codeOK {
					admitted.Add(1)
				}
			}
		})
	}
	callers.Wait()
	require.Equal(t, int64(100), admitted.Load())
	out := should(t, c, both)
	require.Equal(t, codeOver, out.GetOverallCode())
	require.Equal(t, codeOK, out.GetStatuses()[0].GetCode())
	require.Equal(t, uint32(100000-100), out.GetStatuses()[0].GetLimitRemaining())
	require.Equal(t, codeOver, out.GetStatuses()[1].GetCode())
}

func TestHits(t *testing.T) {
	t.Parallel()
	c := start(t, nil, "-rules", written(t, "domain: x\ndescriptors:\n- key: user\n  rate_limit: {unit: day, requests_per_unit: 10}\n")).envoy(t)
	r := ask("x", "user", "1")
	r.HitsAddend = 4
	require.Equal(t, uint32(6), should(t, c, r).GetStatuses()[0].GetLimitRemaining())
	r.Descriptors[0].HitsAddend = wrapperspb.UInt64(0)
	require.Equal(t, uint32(6), should(t, c, r).GetStatuses()[0].GetLimitRemaining(), "0 looks")
	r.Descriptors[0].HitsAddend = wrapperspb.UInt64(5)
	require.Equal(t, uint32(1), should(t, c, r).GetStatuses()[0].GetLimitRemaining(), "a descriptor has its own")
	r.Descriptors[0].HitsAddend = wrapperspb.UInt64(math.MaxUint64)
	out := should(t, c, r)
	require.Equal(t, codeOver, out.GetOverallCode())
	require.Equal(t, uint32(1), out.GetStatuses()[0].GetLimitRemaining())
	require.NotContains(t, fields(out), "retry-after", "waiting does not help")
}

func TestNegativeHitsGiveBackWhatWasSpent(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string]func(*testing.T) []string{
		"runtime": func(*testing.T) []string { return nil },
		"redis":   func(t *testing.T) []string { return []string{"-storage", "redis", "-redis-url", servers.RedisURL(t)} },
		"postgres": func(t *testing.T) []string {
			return []string{"-storage", "postgres", "-postgres-url", servers.PostgresURL(t)}
		},
		"failover": func(t *testing.T) []string {
			return []string{"-storage", "failover", "-redis-url", servers.RedisURL(t), "-postgres-url", servers.PostgresURL(t)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := start(t, nil, append(flags(t), "-rules", written(t, "domain: x\ndescriptors:\n- key: user\n  rate_limit: {unit: day, requests_per_unit: 10}\n- key: other\n  rate_limit: {unit: day, requests_per_unit: 1}\n"+
				"---\ndomain: x\nrules: [{name: kinds, per: kinds, limits: [10/1h, 10/2h continuous, 10/3h fixed, 10/4h sliding, 10/5h log]}]\n"))...)
			c := d.envoy(t)
			user := rand.Text()
			hits := func(n uint64, negative bool) *commonv3.RateLimitDescriptor {
				to := described("user", user)
				to.HitsAddend, to.IsNegativeHits = wrapperspb.UInt64(n), negative
				return to
			}
			send := func(code ratelimitv3.RateLimitResponse_Code, d ...*commonv3.RateLimitDescriptor) []*ratelimitv3.RateLimitResponse_DescriptorStatus {
				out := should(t, c, &ratelimitv3.RateLimitRequest{Domain: "x", Descriptors: d})
				require.Equal(t, code, out.GetOverallCode())
				return out.GetStatuses()
			}
			require.Equal(t, uint32(3), send(codeOK, hits(7, false))[0].GetLimitRemaining())
			require.Equal(t, uint32(5), send(codeOK, hits(2, true))[0].GetLimitRemaining(), "it is told what is left afterwards")

			other := described("other", user)
			require.Equal(t, uint32(6), send(codeOK, hits(1, true), other)[0].GetLimitRemaining())
			send(codeOver, hits(1, true), other)
			require.Equal(t, uint32(6), send(codeOK, hits(0, false))[0].GetLimitRemaining(), "what is denied gives nothing back")

			require.Equal(t, uint32(10), send(codeOK, hits(math.MaxUint64, true))[0].GetLimitRemaining(), "it is never more than full")
			require.Equal(t, uint32(0), send(codeOK, hits(10, false))[0].GetLimitRemaining())
			send(codeOver, hits(1, false), hits(1, true))
			require.Equal(t, uint32(1), send(codeOK, hits(1, true))[0].GetLimitRemaining(), "nothing denies what is given back")
			send(codeOK, described("nobody", "limits this"), hits(0, true))

			kinds := described("kinds", user)
			kinds.HitsAddend = wrapperspb.UInt64(7)
			send(codeOK, kinds)
			kinds.HitsAddend, kinds.IsNegativeHits = wrapperspb.UInt64(2), true
			send(codeOK, kinds)
			require.Equal(t, []int64{5, 5, 5, 5, 5}, d.left(t, `{"kinds":"`+user+`"}`), "of every kind")

			a := d.post(t, "/json", `{"domain":"x","hitsAddend":4,"descriptors":[{"entries":[{"key":"user","value":"`+user+`"}],"isNegativeHits":true}]}`)
			require.Contains(t, strings.ReplaceAll(a.body, " ", ""), `"limitRemaining":5`, "without hits of its own it has those of the request")
		})
	}
}

func TestADescriptorTwiceCountsTwice(t *testing.T) {
	t.Parallel()
	c := start(t, nil, "-rules", written(t, "domain: x\ndescriptors:\n- key: user\n  rate_limit: {unit: day, requests_per_unit: 10}\n")).envoy(t)
	r := ask("x", "user", "1")
	r.Descriptors = append(r.Descriptors, described("user", "1"))
	out := should(t, c, r)
	require.Equal(t, uint32(8), out.GetStatuses()[0].GetLimitRemaining())
	require.Equal(t, uint32(8), out.GetStatuses()[1].GetLimitRemaining())
}

func TestOverrides(t *testing.T) {
	t.Parallel()
	c := start(t, nil, "-rules", "../examples/rules").envoy(t)
	r := ask("envoy", "special", "1")
	r.Descriptors[0].Limit = &commonv3.RateLimitDescriptor_RateLimitOverride{RequestsPerUnit: 1, Unit: typev3.RateLimitUnit_DAY, UnitMultiplier: wrapperspb.UInt32(7)}
	out := should(t, c, r)
	require.Equal(t, codeOK, out.GetOverallCode())
	require.Equal(t, ratelimitv3.RateLimitResponse_RateLimit_WEEK, out.GetStatuses()[0].GetCurrentLimit().GetUnit())
	require.Equal(t, codeOver, should(t, c, r).GetOverallCode())
}

func TestShadowNeverDenies(t *testing.T) {
	t.Parallel()
	c := start(t, nil, "-rules", written(t, "domain: x\nrules:\n- {name: a, limits: [1/1h], shadow: true}\n- {name: b, limits: [3/1h]}\n")).envoy(t)
	for range 3 {
		out := should(t, c, ask("x", "k", "v"))
		require.Equal(t, codeOK, out.GetOverallCode())
		require.Equal(t, "b", out.GetStatuses()[0].GetCurrentLimit().GetName())
	}
	require.Equal(t, codeOver, should(t, c, ask("x", "k", "v")).GetOverallCode())
}

func TestJSONOfEnvoy(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", written(t, "domain: x\ndescriptors:\n- key: user\n  rate_limit: {unit: hour, requests_per_unit: 1}\n"))
	const body = `{"domain":"x","descriptors":[{"entries":[{"key":"user","value":"1"}]}]}`
	for i, status := range []int{200, 429} {
		a := d.post(t, "/json", body)
		require.Equal(t, status, a.status)
		require.Equal(t, "application/json", a.header.Get("Content-Type"))
		require.Equal(t, i == 1, a.header.Get("Retry-After") != "")
		var out ratelimitv3.RateLimitResponse
		require.NoError(t, protojson.Unmarshal([]byte(a.body), &out))
		require.Equal(t, status == 429, out.GetOverallCode() == codeOver)
		require.Len(t, out.GetStatuses(), 1)
	}
	require.Equal(t, http.StatusMethodNotAllowed, d.get(t, "/json").status)
}

func TestTheHealthOfGRPC(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", "../examples/rules", "-reflection")
	c := healthv1.NewHealthClient(d.dial(t))
	eventually(t, func() bool {
		out, err := c.Check(t.Context(), &healthv1.HealthCheckRequest{Service: "envoy.service.ratelimit.v3.RateLimitService"})
		return err == nil && out.GetStatus() == healthv1.HealthCheckResponse_SERVING
	}, "it serves")
}

// TestWhatEnvoySendsAfterTheStreamIsCharged asks as Envoy does if a filter has apply_on_stream_done: first with
// hits_addend 0, and at the end with the cost of the answer.
func TestWhatEnvoySendsAfterTheStreamIsCharged(t *testing.T) {
	t.Parallel()
	c := start(t, nil, "-rules", written(t, "domain: x\nrules: [{name: tokens, per: [user], limits: [1000/1h], mode: charge}]\n")).envoy(t)
	ask := func(hits uint64) *ratelimitv3.RateLimitResponse {
		r := ask("x", "user", "42")
		r.Descriptors[0].HitsAddend = wrapperspb.UInt64(hits)
		return should(t, c, r)
	}
	require.Equal(t, codeOK, ask(0).GetOverallCode())
	require.Equal(t, codeOK, ask(900).GetOverallCode())
	require.Equal(t, codeOK, ask(0).GetOverallCode(), "100 are left")
	require.Equal(t, codeOK, ask(700).GetOverallCode(), "what has happened is charged, and leaves a debt")
	over := ask(0)
	require.Equal(t, codeOver, over.GetOverallCode(), "until it is paid nothing new begins")
	require.Equal(t, "tokens", over.GetStatuses()[0].GetCurrentLimit().GetName())
	require.Positive(t, over.GetStatuses()[0].GetDurationUntilReset().AsDuration())
}

func TestACallWhoseTimeIsOverIsNotDecided(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", written(t, "domain: x\nrules: [{name: a, limits: [1/1h]}]\n"))
	over, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := envoy{service: d.service}.ShouldRateLimit(over, ask("x", "k", "v"))
	require.Equal(t, codes.Canceled, status.Code(err))
	require.Equal(t, codeOK, should(t, d.envoy(t), ask("x", "k", "v")).GetOverallCode(), "nothing was taken")
}

// BenchmarkShouldRateLimit measures what of a call is not gRPC: two descriptors, with a rule each, in the memory of the process.
func BenchmarkShouldRateLimit(b *testing.B) {
	rules := written(b, `
domain: d
descriptors:
- key: user
  rate_limit: {unit: day, requests_per_unit: 100000000}
- key: org
  rate_limit: {unit: day, requests_per_unit: 100000000}
`)
	c, err := parse([]string{"-rules", rules, "-grpc", "127.0.0.1:0", "-http", "127.0.0.1:0"}, func(string) string { return "" }, io.Discard)
	require.NoError(b, err)
	d, err := newDaemon(b.Context(), c, slog.New(slog.DiscardHandler))
	require.NoError(b, err)
	defer func() { require.NoError(b, d.close(context.WithoutCancel(b.Context()))) }()
	r := ask("d", "user", "1")
	r.Descriptors = append(r.Descriptors, described("org", "1"))
	b.ReportAllocs()
	for b.Loop() {
		if out, err := (envoy{service: d.service}).ShouldRateLimit(b.Context(), r); err != nil || out.GetOverallCode() != codeOK {
			b.Fatal(out, err)
		}
	}
}
