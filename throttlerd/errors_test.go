package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	commonv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/ratelimit/v3"
	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/service/ratelimit/v3"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/rules"
	pgrules "github.com/go-throttler/throttler/rules/postgres"
)

const tableRules = `domain: api
rules:
- {name: spent, when: {path: /spent}, limits: [1/1h]}
- {name: sized, when: {path: /sized}, cost: size, limits: [5/1h]}
- {name: never, when: {path: /never}, limits: [0/1h]}
- {name: spend, when: {path: /spend}, mode: charge, cost: size, limits: [5/1h]}
`

// situation is a row of the table in docs/throttlerd.md.
type situation struct {
	name   string
	flags  []string
	domain string // "" is api
	path   string
	size   string
	gone   bool // the daemon has stopped

	// The expected answers; "-" is no answer.
	grpc                       string
	json, decide, nginx, caddy int
}

var situations = []situation{
	{name: "admitted", path: "/free", grpc: "OK", json: 200, decide: 200, nginx: 200, caddy: 200},
	{name: "denied", path: "/spent", grpc: "OVER_LIMIT", json: 429, decide: 429, nginx: 429, caddy: 429},
	{name: "the cost exceeds the capacity", path: "/sized", size: "6", grpc: "OVER_LIMIT", json: 429, decide: 413, nginx: 429, caddy: 413},
	{name: "the capacity is 0", path: "/never", grpc: "OVER_LIMIT", json: 429, decide: 403, nginx: 429, caddy: 403},
	{name: "a rule of mode: charge cannot record it all", path: "/spend", size: "100", grpc: "OK", json: 200, decide: 200, nginx: 200, caddy: 200},
	{name: "the cost is no number", path: "/sized", size: "many", grpc: "OVER_LIMIT", json: 400, decide: 400, nginx: 500, caddy: 400},
	{name: "the cost is below zero", path: "/sized", size: "-1", grpc: "OVER_LIMIT", json: 400, decide: 400, nginx: 500, caddy: 400},
	{name: "the domain has no rules", domain: "nope", path: "/free", grpc: "OVER_LIMIT", json: 404, decide: 404, nginx: 500, caddy: 404},
	{name: "the same with -on-unknown-domain allow", domain: "nope", path: "/free", flags: []string{"-on-unknown-domain", "allow"}, grpc: "OK", json: 200, decide: 200, nginx: 200, caddy: 200},
	{name: "the storage fails", path: "/spent", flags: noRedis(), grpc: "OVER_LIMIT", json: 503, decide: 503, nginx: 500, caddy: 503},
	{name: "the same with -on-storage-error error", path: "/spent", flags: noRedis("-on-storage-error", "error"), grpc: "Unavailable", json: 503, decide: 503, nginx: 500, caddy: 503},
	{name: "the same with -on-storage-error allow", path: "/spent", flags: noRedis("-on-storage-error", "allow"), grpc: "OK", json: 200, decide: 200, nginx: 200, caddy: 200},
	{name: "throttlerd is gone", path: "/free", gone: true, grpc: "Unavailable", nginx: 500, caddy: 502},
}

// noRedis names a port that nobody listens on.
func noRedis(more ...string) []string {
	return append([]string{"-storage", "redis", "-redis-url", "redis://127.0.0.1:1"}, more...)
}

func TestWhatEveryErrorLooksLike(t *testing.T) {
	t.Parallel()
	for _, s := range situations {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			s.run(t)
		})
	}
}

func (s situation) run(t *testing.T) {
	d := start(t, nil, append([]string{"-rules", written(t, tableRules), "-entry", "size=X-Size"}, s.flags...)...)
	domain := s.domain
	if domain == "" {
		domain = "api"
	}
	d.post(t, "/v1/decide", `{"domain":"api","entries":{"path":"/spent"}}`)
	all := map[string]*gateway{}
	for _, name := range slices.Sorted(maps.Keys(gateways)) {
		all[name] = startGateway(t, name, d.address("http"), domain)
	}
	entries := []string{"path", s.path}
	if s.size != "" {
		entries = append(entries, "size", s.size)
	}
	client := d.envoy(t)
	if s.gone {
		require.NoError(t, d.stop())
	} else {
		require.Equal(t, s.json, d.post(t, "/json", jsonOf(t, ask(domain, entries...))).status, "/json")
		require.Equal(t, s.decide, d.post(t, "/v1/decide", decideOf(domain, entries...)).status, "/v1/decide")
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := client.ShouldRateLimit(ctx, ask(domain, entries...))
	got := out.GetOverallCode().String()
	if err != nil {
		got = status.Code(err).String()
	} else {
		require.Len(t, out.GetStatuses(), 1)
		require.Equal(t, got, out.GetStatuses()[0].GetCode().String())
	}
	require.Equal(t, s.grpc, got, "gRPC")
	for name, want := range map[string]int{"nginx": s.nginx, "caddy": s.caddy} {
		a := do(t, "GET", all[name].url+s.path, "", "X-Size", s.size)
		require.Equal(t, want, a.status, "%s: %s", name, a.body)
		require.Equal(t, want == 200, all[name].served.Load() == 1, name)
	}
}

func jsonOf(t *testing.T, r *ratelimitv3.RateLimitRequest) string {
	t.Helper()
	data, err := json.Marshal(map[string]any{"domain": r.GetDomain(), "descriptors": r.GetDescriptors()})
	require.NoError(t, err)
	return string(data)
}

func decideOf(domain string, entries ...string) string {
	var pairs []string
	for i := 0; i < len(entries); i += 2 {
		pairs = append(pairs, fmt.Sprintf("%q:%q", entries[i], entries[i+1]))
	}
	return fmt.Sprintf(`{"domain":%q,"entries":{%s}}`, domain, strings.Join(pairs, ","))
}

func TestTheDocHasTheTable(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("../docs/throttlerd.md")
	require.NoError(t, err)
	for _, s := range situations {
		number := func(n int) string {
			if n == 0 {
				return "–"
			}
			return fmt.Sprint(n)
		}
		row := fmt.Sprintf("| %s | %s | %s | %s | %s | %s |", s.name, s.grpc, number(s.json), number(s.decide), number(s.nginx), number(s.caddy))
		require.Contains(t, strings.ReplaceAll(string(doc), "`", ""), row)
	}
}

func TestARequestThatIsWrongIsOverTheLimit(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", "../examples/rules")
	c := d.envoy(t)
	wrongUnit := ask("envoy", "a", "b")
	wrongUnit.Descriptors[0].Limit = &commonv3.RateLimitDescriptor_RateLimitOverride{RequestsPerUnit: 5}
	many := ask("envoy", "remote_address", "0")
	for i := range 300 {
		many.Descriptors = append(many.Descriptors, described("remote_address", fmt.Sprint(i)))
	}
	for name, r := range map[string]*ratelimitv3.RateLimitRequest{
		"nothing": {}, "no descriptors": {Domain: "envoy"}, "no domain": ask("", "remote_address", "1"),
		"an override without a unit": wrongUnit, "over 256 descriptors": many,
		"over 64 entries": ask("envoy", make([]string, 2*65)...), "too much text": ask("envoy", "remote_address", strings.Repeat("x", 257<<10)),
	} {
		out := should(t, c, r)
		require.Equal(t, codeOver, out.GetOverallCode(), name)
		require.Len(t, out.GetStatuses(), min(len(r.GetDescriptors()), maxDescriptors), name)
		require.NotEmpty(t, out.GetDynamicMetadata().AsMap()["error"], name)
	}
	require.Contains(t, should(t, c, many).GetDynamicMetadata().AsMap()["error"], "301 descriptors")
	long := ask("envoy", "remote_address", strings.Repeat("x", 100<<10))
	require.Equal(t, codeOK, should(t, c, long).GetOverallCode(), "a long identifier is hashed")
	for _, body := range []string{"", "{", "[]", `{"domain":1}`, `{"domain":"envoy"}`, `{"domain":"envoy","descriptors":[]}`, `{"nope":1}`} {
		require.Equal(t, http.StatusBadRequest, d.post(t, "/json", body).status, body)
	}
	for _, body := range []string{"", "{", "[]", "{}", `{"entries":1}`, `{"entries":{"a":1}}`, `{"entries":{},"nope":1}`, `{"entries":{}} {}`, `{"entries":{},"mode":"steal"}`, `{"entries":{},"limit":"five"}`, `{"domain":"api","entries":{"path":"/api/x","user":"1"},"cost":-1}`, `{"entries":[` + strings.Repeat(`["a","b"],`, 64) + `["a","b"]]}`} {
		require.Equal(t, http.StatusBadRequest, d.post(t, "/v1/decide", body).status, body)
	}
}

func TestTooManyDescriptorsAreRefusedBeforeTheyAreCopied(t *testing.T) { //nolint:paralleltest // it counts allocations
	many := &ratelimitv3.RateLimitRequest{Domain: "envoy", Descriptors: make([]*commonv3.RateLimitDescriptor, 100_000)}
	require.Less(t, testing.AllocsPerRun(1, func() {
		_, err := requestOf(many)
		require.ErrorContains(t, err, "100000 descriptors")
	}), 100.0)
}

// rawCodec sends and receives messages as they are.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) ([]byte, error) {
	data, _ := v.(*[]byte)
	return *data, nil
}

func (rawCodec) Unmarshal(data []byte, v any) error {
	to, _ := v.(*[]byte)
	*to = bytes.Clone(data)
	return nil
}

// sendRaw sends a message for ShouldRateLimit, also one that no client of gRPC would send.
func sendRaw(t *testing.T, d *running, message []byte) (out *ratelimitv3.RateLimitResponse, size int) {
	t.Helper()
	var data []byte
	require.NoError(t, d.dial(t).Invoke(t.Context(), ratelimitv3.RateLimitService_ShouldRateLimit_FullMethodName, &message, &data, grpc.ForceCodec(rawCodec{})))
	out = &ratelimitv3.RateLimitResponse{}
	require.NoError(t, proto.Unmarshal(data, out))
	return out, len(data)
}

func TestAMessageThatCannotBeReadIsOverTheLimit(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", "../examples/rules")
	good, err := proto.Marshal(ask("envoy", "remote_address", "x"))
	require.NoError(t, err)
	out, _ := sendRaw(t, d, good)
	require.Equal(t, codeOK, out.GetOverallCode())
	for name, message := range map[string][]byte{
		"a value that is no UTF-8":  bytes.ReplaceAll(good, []byte("x"), []byte{0xff}),
		"a domain that is no UTF-8": bytes.ReplaceAll(good, []byte("envoy"), []byte("envo\xff")),
		"a message that is cut":     good[:len(good)-1],
		"no message":                []byte("hello"),
	} {
		out, _ := sendRaw(t, d, message)
		require.Equal(t, codeOver, out.GetOverallCode(), name)
		require.Contains(t, out.GetDynamicMetadata().AsMap()["error"], "cannot be read", name)
	}
}

func TestAnAnswerHasNoMoreStatusesThanARequestMayHaveDescriptors(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", "../examples/rules")
	out, size := sendRaw(t, d, append([]byte("\x0a\x01e"), bytes.Repeat([]byte{0x12, 0}, 100_000)...)) // empty ones
	require.Equal(t, codeOver, out.GetOverallCode())
	require.Len(t, out.GetStatuses(), maxDescriptors)
	require.Less(t, size, 10_000)
}

func TestADomainWithoutRulesIsNamed(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", written(t, tableRules))
	for body, name := range map[string]string{`{"entries":{}}`: "default", `{"entries":{},"domain":"nope"}`: "nope"} {
		a := d.post(t, "/v1/decide", body)
		require.Equal(t, http.StatusNotFound, a.status, body)
		require.Equal(t, `the domain has no rules: "`+name+`"`, a.json(t)["detail"])
	}
}

func TestATooLargeMessageIsAGRPCError(t *testing.T) {
	t.Parallel()
	c := start(t, nil, "-rules", "../examples/rules").envoy(t)
	_, err := c.ShouldRateLimit(t.Context(), ask("envoy", "remote_address", strings.Repeat("x", 5<<20)))
	require.Equal(t, codes.ResourceExhausted, status.Code(err))
}

func TestAFaultOfTheProgramLetsNobodyIn(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", "../examples/rules")
	broken := *d.service
	broken.engine = &rules.Engine{} // its Decide panics
	out := broken.decide(t.Context(), rules.Request{})
	require.ErrorIs(t, out.err, errInternal)
	require.False(t, out.v.Allowed)
	require.Equal(t, codeOver, broken.response(ask("x", "a", "b"), out).GetOverallCode())
}

func TestWhatCouldNotBeGivenBackIsADenial(t *testing.T) {
	t.Parallel()
	c := start(t, nil, append(noRedis("-on-storage-error", "allow"), "-rules", written(t, tableRules))...).envoy(t)
	r := ask("api", "path", "/spent")
	require.Equal(t, codeOK, should(t, c, r).GetOverallCode())
	r.Descriptors[0].IsNegativeHits = true
	require.Equal(t, codeOver, should(t, c, r).GetOverallCode())
	r.Descriptors = append(r.Descriptors, described("path", "/sized"))
	require.Equal(t, codeOK, should(t, c, r).GetOverallCode(), "nothing is given back by what was not decided")
}

func TestAStateOfSomebodyElseLetsNobodyIn(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	d := start(t, nil, "-rules", written(t, tableRules), "-storage", "redis", "-redis-url", server.URL(), "-on-storage-error", "allow")
	require.Equal(t, 200, d.post(t, "/v1/decide", decideOf("api", "path", "/spent")).status)
	o, err := redis.ParseURL(server.URL())
	require.NoError(t, err)
	client := redis.NewClient(o)
	defer func() { _ = client.Close() }()
	keys, err := client.Keys(t.Context(), "*spent*").Result()
	require.NoError(t, err)
	require.Len(t, keys, 1)
	require.NoError(t, client.Set(t.Context(), keys[0], "hello", 0).Err())
	require.Equal(t, 503, d.post(t, "/v1/decide", decideOf("api", "path", "/spent")).status)
	require.Equal(t, codeOver, should(t, d.envoy(t), ask("api", "path", "/spent")).GetOverallCode())
	eventually(t, func() bool { return strings.Contains(d.log.String(), "could not be decided") }, "it is logged")
}

var passwords = regexp.MustCompile(`s3cret`)

func TestARedisThatComesBackIsReadyAgain(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t, "--requirepass", "s3cret")
	url := strings.Replace(server.URL(), "redis://", "redis://:s3cret@", 1)
	require.NoError(t, server.Kill())
	d := start(t, map[string]string{"THROTTLERD_REDIS_URL": url}, "-rules", written(t, tableRules), "-storage", "redis")
	eventually(t, func() bool { return d.get(t, "/readyz").status == 503 }, "it starts without Redis, and says so")
	health := healthv1.NewHealthClient(d.dial(t))
	out, err := health.Check(t.Context(), &healthv1.HealthCheckRequest{})
	require.NoError(t, err)
	require.Equal(t, healthv1.HealthCheckResponse_NOT_SERVING, out.GetStatus())
	require.Equal(t, 503, d.post(t, "/v1/decide", decideOf("api", "path", "/spent")).status)
	require.NoError(t, server.Start())
	eventually(t, func() bool { return d.get(t, "/readyz").status == 200 }, "it is ready")
	require.Equal(t, 200, d.post(t, "/v1/decide", decideOf("api", "path", "/spent")).status)
	require.Contains(t, d.log.String(), `"msg":"started, and not ready"`)
	require.NotContains(t, d.log.String(), `"msg":"ready"`)
	require.Contains(t, d.log.String(), `"msg":"not ready`)
	require.Contains(t, d.log.String(), "ready again")
	require.False(t, passwords.MatchString(d.log.String()))
}

func TestWithFailoverNobodySeesThatRedisDies(t *testing.T) {
	t.Parallel()
	redis, postgres := servers.Redis(t), servers.Postgres(t)
	d := start(t, nil, "-rules", "../examples/rules", "-storage", "failover", "-redis-url", redis.URL(), "-postgres-url", postgres.URL())
	c := d.envoy(t)
	deadline := time.Now().Add(patience)
	for i, killed := 0, false; ; i++ {
		out := should(t, c, ask("envoy", "remote_address", fmt.Sprint(i)))
		require.Equal(t, codeOK, out.GetOverallCode())
		if i == 20 {
			require.NoError(t, redis.Kill())
			killed = true
		}
		if killed && strings.Contains(d.log.String(), "Postgres decides") {
			break
		}
		require.True(t, time.Now().Before(deadline), d.log)
	}
	d.probe(t.Context()) // as it does each second
	require.Equal(t, 200, d.get(t, "/readyz").status, "Postgres in place of Redis is ready")
	require.Equal(t, []string{"1"}, d.scrape(t, `throttler_failover_degraded{storage="failover"} `))
}

func TestReadinessNamesNothingOfTheTable(t *testing.T) {
	t.Parallel()
	server := servers.Postgres(t)
	d := start(t, nil, "-source", "postgres", "-postgres-url", server.URL(), "-rules", written(t, "rules: []\n"))
	require.NoError(t, server.Kill())
	eventually(t, func() bool { return strings.Contains(d.get(t, "/readyz").body, "rules_error") }, "it is told")
	require.Equal(t, "the source of the rules does not answer: the log says why", d.get(t, "/readyz").json(t)["rules_error"])
	eventually(t, func() bool {
		return strings.Contains(d.log.String(), "127.0.0.1") && strings.Contains(d.log.String(), "the rules stay as they are")
	}, "the log says why")
}

func TestTwoDaemonsWithATableAgree(t *testing.T) {
	t.Parallel()
	server := servers.Postgres(t)
	flags := []string{"-source", "postgres", "-storage", "postgres", "-postgres-url", server.URL(), "-rules", written(t, "rules: [{name: a, limits: [1/1h]}]\n")}
	a, b := start(t, withToken, flags...), start(t, withToken, flags...)
	const body = `{"entries":{}}`
	require.Equal(t, 200, a.post(t, "/v1/decide", body).status)
	require.Equal(t, 429, b.post(t, "/v1/decide", body).status, "they share what is spent")
	out := a.administer(t, "PUT", "/v1/rules/rules.yaml", "rules: [{name: a, limits: [2/1h]}]\n", "If-Match", "*")
	require.Equal(t, 200, out.status, out.body)
	eventually(t, func() bool { return b.post(t, "/v1/decide", body).status == 200 }, "and the rules")
	require.Equal(t, 429, a.post(t, "/v1/decide", body).status)
	third := start(t, nil, "-source", "postgres", "-postgres-url", server.URL(), "-rules", "../examples/rules")
	require.Len(t, third.engine.Rules().Rules(), 1, "a table that has rules gets no others")
}

// TestChangesOfTwoDaemonsAreRightTogether puts pairs of files that are each right, and wrong together.
func TestChangesOfTwoDaemonsAreRightTogether(t *testing.T) {
	t.Parallel()
	flags := []string{"-source", "postgres", "-postgres-url", servers.Postgres(t).URL(), "-rules", written(t, "domain: s\nrules: []\n")}
	a, b := start(t, withToken, flags...), start(t, withToken, flags...)
	for i := range 20 {
		var puts sync.WaitGroup
		var statuses [2]int
		for j, d := range []*running{a, b} {
			puts.Go(func() {
				statuses[j] = d.administer(t, "PUT", fmt.Sprintf("/v1/rules/%d.yaml", j), fmt.Sprintf("domain: x\nrules: [{name: r%d, limits: [1/1h]}]\n", i), "If-Match", "*").status
			})
		}
		puts.Wait()
		require.ElementsMatch(t, []int{200, 422}, statuses[:])
		for j := range 2 {
			a.administer(t, "DELETE", fmt.Sprintf("/v1/rules/%d.yaml", j), "", "If-Match", "*")
		}
	}
}

func TestATableGetsAllFilesAtTheStartOrNone(t *testing.T) {
	t.Parallel()
	pool, err := pgxpool.New(t.Context(), servers.Postgres(t).URL())
	require.NoError(t, err)
	defer pool.Close()
	table, err := pgrules.New(t.Context(), pool, nil)
	require.NoError(t, err)
	seed := []rules.File{{Name: "a.yaml", Data: []byte("domain: a\nrules: []")}, {Name: "b.yaml", Data: []byte("domain: b\nrules: [] # \xff")}}
	require.Error(t, plant(t.Context(), table, seed), "Postgres cannot store the second")
	files, err := table.Files(t.Context())
	require.NoError(t, err)
	require.Empty(t, files, "the next start would run with half of the rules")
	seed[1].Data = []byte("domain: b\nrules: []")
	require.NoError(t, plant(t.Context(), table, seed))
	require.NoError(t, plant(t.Context(), table, seed[:1]), "a table that has files gets no others")
	files, err = table.Files(t.Context())
	require.NoError(t, err)
	require.Equal(t, seed, files)
}

func TestOnAClusterADomainIsInOneSlotOrDenied(t *testing.T) {
	t.Parallel()
	cluster := servers.RedisCluster(t, 3)
	url := cluster.Nodes[0].URL() + "?addr=" + cluster.Nodes[1].Addr()
	file := written(t, "domain: api\nrules:\n- {name: a, per: [k], limits: [9/1h]}\n- {name: b, per: [k], limits: [1/1h]}\n- {name: c, limits: [9/1h]}\n")
	flags := []string{"-rules", file, "-storage", "redis", "-redis-url", url}
	together := start(t, nil, append(flags, "-redis-slot-by-domain")...).envoy(t)
	require.Equal(t, codeOK, should(t, together, ask("api", "k", "1")).GetOverallCode())
	out := should(t, together, ask("api", "k", "1"))
	require.Equal(t, codeOver, out.GetOverallCode())
	require.Equal(t, []any{"b"}, out.GetDynamicMetadata().AsMap()["denied_by"])
	apart := start(t, nil, flags...).envoy(t)
	out = should(t, apart, ask("api", "k", "2"))
	require.Equal(t, codeOver, out.GetOverallCode())
	require.NotEmpty(t, out.GetDynamicMetadata().AsMap()["error"])
}

func TestAnErrorThatWasLeftOutIsToldWithinASecondToo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log := &text{}
		f := &faults{log: slog.New(slog.NewJSONHandler(log, nil))}
		lines := func() []string { return regexp.MustCompile(`"error":.*}`).FindAllString(log.String(), -1) }
		for _, err := range []string{"first", "second", "third"} {
			f.tell(errors.New(err))
			f.due()
		}
		require.Equal(t, []string{`"error":"first","requests":1}`}, lines())
		<-time.After(time.Second)
		f.due()
		f.due()
		require.Equal(t, []string{`"error":"first","requests":1}`, `"error":"third","requests":2}`}, lines(), "though no other follows")
		f.tell(errors.New("last"))
		f.end()
		f.end()
		require.Equal(t, `"error":"last","requests":1}`, lines()[2], "the end waits for nothing")
		require.Len(t, lines(), 3)
	})
}
