package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	commonv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/ratelimit/v3"
	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/service/ratelimit/v3"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// programs are those that the program of the tests becomes if TEST_PROGRAM names one. Tests run them in processes of
// their own.
var programs = map[string]func(){"throttlerd": main}

func TestMain(m *testing.M) {
	if program := programs[os.Getenv("TEST_PROGRAM")]; program != nil {
		program()
		return
	}
	goleak.VerifyTestMain(m)
}

// process is a program that runs in a process of its own.
type process struct {
	address string // where it listens for gRPC
	pid     int
	stop    func() error // sends SIGTERM and waits for the end
}

// launch starts one of programs, or the program of that file. The log on its standard output has to name the address for
// gRPC.
func launch(t testing.TB, program string, flags ...string) *process {
	t.Helper()
	file := program
	if programs[program] != nil {
		var err error
		file, err = os.Executable()
		require.NoError(t, err)
	}
	c := exec.Command(file, flags...)
	c.Env = append(os.Environ(), "TEST_PROGRAM="+program)
	stderr := &text{}
	c.Stderr = stderr
	stdout, err := c.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, c.Start())
	p := &process{pid: c.Process.Pid}
	read := make(chan struct{})
	p.stop = sync.OnceValue(func() error {
		err := c.Process.Signal(syscall.SIGTERM)
		<-read
		return errors.Join(err, c.Wait())
	})
	t.Cleanup(func() { _ = p.stop() })
	lines := bufio.NewScanner(stdout)
	for p.address == "" && lines.Scan() {
		var said struct{ For, Address string }
		if json.Unmarshal(lines.Bytes(), &said) == nil && said.For == "grpc" {
			p.address = said.Address
		}
	}
	go func() {
		defer close(read)
		_, _ = io.Copy(io.Discard, stdout) // so that the log never blocks the program
	}()
	require.NotEmpty(t, p.address, "%s has ended: %s", program, stderr)
	return p
}

const patience = 30 * time.Second

// text is a log that may be read while it is being written.
type text struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (t *text) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.Write(p)
}

func (t *text) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.String()
}

// running is a daemon that serves until the test ends or stop is called.
type running struct {
	*daemon
	log  *text
	stop func() error
}

// start starts a daemon on free ports.
func start(t *testing.T, env map[string]string, args ...string) *running {
	t.Helper()
	args = append([]string{"-grpc", "127.0.0.1:0", "-http", "127.0.0.1:0", "-admin", "127.0.0.1:0"}, args...)
	c, err := parse(args, func(name string) string { return env[name] }, io.Discard)
	require.NoError(t, err)
	log := &text{}
	d, err := newDaemon(t.Context(), c, slog.New(slog.NewJSONHandler(log, nil)))
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	served := make(chan error, 1)
	go func() { served <- d.serve(ctx) }()
	r := &running{daemon: d, log: log}
	r.stop = sync.OnceValue(func() error { cancel(); return <-served })
	t.Cleanup(func() { require.NoError(t, r.stop(), log) })
	return r
}

func (r *running) address(name string) string {
	for _, l := range r.listeners {
		if l.name == name {
			return l.l.Addr().String()
		}
	}
	return ""
}

// envoy returns a client of the gRPC listener.
func (r *running) envoy(t *testing.T) ratelimitv3.RateLimitServiceClient {
	return envoyClient(r.dial(t))
}

func envoyClient(c *grpc.ClientConn) ratelimitv3.RateLimitServiceClient {
	return ratelimitv3.NewRateLimitServiceClient(c)
}

func (r *running) dial(t *testing.T, o ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	if o == nil {
		o = append(o, grpc.WithTransportCredentials(insecure.NewCredentials()))
	}
	conn, err := grpc.NewClient("passthrough:///"+r.address("grpc"), o...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// answer is an HTTP answer with its body.
type answer struct {
	status int
	header http.Header
	body   string
}

func (a answer) json(t *testing.T) map[string]any {
	t.Helper()
	var out map[string]any
	require.NoError(t, json.Unmarshal([]byte(a.body), &out), a.body)
	return out
}

// do sends a request. header holds pairs of name and value.
func do(t *testing.T, method, url, body string, header ...string) answer {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	require.NoError(t, err)
	for i := 0; i < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	out, err := client.Do(r)
	require.NoError(t, err)
	defer func() { _ = out.Body.Close() }()
	data, err := io.ReadAll(out.Body)
	require.NoError(t, err)
	return answer{out.StatusCode, out.Header, string(data)}
}

func (r *running) post(t *testing.T, path, body string) answer {
	t.Helper()
	return do(t, http.MethodPost, "http://"+r.address("http")+path, body)
}

func (r *running) get(t *testing.T, path string, header ...string) answer {
	t.Helper()
	return do(t, http.MethodGet, "http://"+r.address("http")+path, "", header...)
}

// written returns the name of a file with these rules.
func written(t testing.TB, rules string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "rules.yaml")
	require.NoError(t, os.WriteFile(name, []byte(rules), 0o600))
	return name
}

// ask returns a request of Envoy with one descriptor.
func ask(domain string, entries ...string) *ratelimitv3.RateLimitRequest {
	return &ratelimitv3.RateLimitRequest{Domain: domain, Descriptors: []*commonv3.RateLimitDescriptor{described(entries...)}}
}

func described(entries ...string) *commonv3.RateLimitDescriptor {
	d := &commonv3.RateLimitDescriptor{}
	for i := 0; i < len(entries); i += 2 {
		d.Entries = append(d.Entries, &commonv3.RateLimitDescriptor_Entry{Key: entries[i], Value: entries[i+1]})
	}
	return d
}

func should(t *testing.T, c ratelimitv3.RateLimitServiceClient, r *ratelimitv3.RateLimitRequest) *ratelimitv3.RateLimitResponse {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := c.ShouldRateLimit(ctx, r, grpc.WaitForReady(true))
	require.NoError(t, err)
	return out
}

func eventually(t *testing.T, holds func() bool, what string) {
	t.Helper()
	require.Eventually(t, holds, patience, 10*time.Millisecond, what)
}

func TestTheCommandsOfTheReadmeServe(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", "../examples/rules")
	for i := range 6 {
		a := d.post(t, "/v1/decide", `{"domain":"api","entries":{"path":"/api/x","user":"42"}}`)
		if i < 5 {
			require.Equal(t, http.StatusOK, a.status, a.body)
			require.Equal(t, true, a.json(t)["allowed"])
			continue
		}
		require.Equal(t, http.StatusTooManyRequests, a.status)
		require.NotEmpty(t, a.header.Get("Retry-After"))
	}
}

func TestNothingListensOnAPublicAddressByDefault(t *testing.T) {
	t.Parallel()
	c, err := parse([]string{"-rules", "x"}, func(string) string { return "" }, io.Discard)
	require.NoError(t, err)
	for _, address := range []string{c.grpc, c.http, c.admin} {
		require.True(t, strings.HasPrefix(address, "localhost:"), address)
	}
}

func TestWrongFlagsAreAllTold(t *testing.T) {
	t.Parallel()
	var stderr bytes.Buffer
	status := command(t.Context(), []string{"-storage", "disk", "-on-storage-error", "shrug", "-tls-key", "x"}, io.Discard, &stderr)
	require.Equal(t, 2, status)
	for _, word := range []string{`-storage is "disk"`, `-on-storage-error is "shrug"`, "-tls-cert and -tls-key", "-rules"} {
		require.Contains(t, stderr.String(), word)
	}
	for _, args := range [][]string{{"walk"}, {"serve", "-nope"}, {"serve", "-rules", "x", "y"}, {"-entry", "path=X", "-rules", "x"}, {"-trust", "x", "-rules", "y"}, {"-entry", "tenant=host", "-rules", "x"}, {"check"}, {"match"}, {"match", "../examples/rules", "x"}} {
		require.Equal(t, 2, command(t.Context(), args, io.Discard, io.Discard), args)
	}
	require.Equal(t, 0, command(t.Context(), []string{"serve", "-help"}, io.Discard, io.Discard))
}

func TestAFlagOfAStorageThatIsNotUsedIsRefused(t *testing.T) {
	t.Parallel()
	const redis, postgres = "redis://localhost", "postgres://localhost"
	for _, c := range []struct {
		args []string
		want string // "" if it is right
	}{
		{[]string{"-redis-url", redis}, "-redis-url is given with -storage runtime, which does not use it: must be with -storage redis or failover"},
		{[]string{"-redis-url", redis, "-storage", "postgres"}, "-redis-url is given with -storage postgres"},
		{[]string{"-redis-timeout", "1s"}, "-redis-timeout is given"},
		{[]string{"-redis-slot-by-domain"}, "-redis-slot-by-domain is given"},
		{[]string{"-postgres-url", postgres}, "-postgres-url is given with -storage runtime, which does not use it: must be with -storage postgres or failover"},
		{[]string{"-postgres-timeout", "1s", "-storage", "redis"}, "-postgres-timeout is given with -storage redis"},
		{[]string{"-storage", "rediss", "-redis-url", redis}, `-storage is "rediss", must be runtime, redis, postgres, failover`},
		{[]string{"-lease"}, "-lease is given with -storage runtime, which does not use it: must be with -storage redis or postgres or failover"},
		{[]string{"-redis-url", redis, "-redis-timeout", "1s", "-redis-slot-by-domain", "-lease", "-storage", "redis"}, ""},
		{[]string{"-redis-url", redis, "-postgres-url", postgres, "-postgres-timeout", "1s", "-storage", "failover"}, ""},
		{[]string{"-postgres-url", postgres, "-source", "postgres"}, ""},
		{[]string{"-lease=false", "-redis-timeout", "0"}, ""},
	} {
		_, err := parse(append(c.args, "-rules", "x"), func(string) string { return "" }, io.Discard)
		if c.want == "" {
			require.NoError(t, err, c.args)
		} else {
			require.ErrorContains(t, err, c.want, c.args)
		}
	}
	everywhere := func(string) string { return redis } // the environment may be that of other programs too
	_, err := parse([]string{"-rules", "x"}, everywhere, io.Discard)
	require.NoError(t, err)
}

func TestSecretsAreInNoErrorAndNoHelp(t *testing.T) {
	t.Setenv("THROTTLERD_REDIS_URL", "redis://:s3cret-word@localhost:x")
	t.Setenv("THROTTLERD_POSTGRES_URL", "postgres://a:s3cret-word@@localhost/x")
	t.Setenv("THROTTLERD_ADMIN_TOKEN", "s3cret-word-too-long")
	var said bytes.Buffer
	require.Equal(t, 0, command(t.Context(), []string{"-help"}, &said, &said))
	for _, storage := range []string{"redis", "postgres", "failover"} {
		require.Equal(t, 1, command(t.Context(), []string{"-rules", "../examples/rules", "-storage", storage}, &said, &said))
	}
	require.Contains(t, said.String(), "-redis-url")
	require.Contains(t, said.String(), "-postgres-url")
	require.NotContains(t, said.String(), "s3cret")
}

func TestCheckTellsEveryFaultWithItsPlace(t *testing.T) {
	t.Parallel()
	var stdout, stderr bytes.Buffer
	require.Equal(t, 0, command(t.Context(), []string{"check", "../examples/rules"}, &stdout, &stderr))
	require.Contains(t, stdout.String(), "13 rules of 3 domains")
	file := written(t, "domain: x\nrules:\n  - name: a\n    limit: [5/10s]\n  - name: b\n    limits: [five]\n")
	require.Equal(t, 1, command(t.Context(), []string{"check", file}, &stdout, &stderr))
	require.Contains(t, stderr.String(), "rules.yaml:4:5")
	require.Contains(t, stderr.String(), `"limits"`)
	require.Contains(t, stderr.String(), "rules.yaml:6:")
}

func TestMatchSaysWhichRulesApplyAndWhyOthersDoNot(t *testing.T) {
	t.Parallel()
	var stdout bytes.Buffer
	args := []string{"match", "../examples/rules", "-domain", "api", "path=/api/x", "user=42"}
	require.Equal(t, 0, command(t.Context(), args, &stdout, io.Discard))
	require.Contains(t, stdout.String(), "applies  api\n")
	require.Contains(t, stdout.String(), `does not login: `)

	var stderr bytes.Buffer
	require.Equal(t, 1, command(t.Context(), []string{"match", "../examples/rules", "-domain", "apo", "user=42"}, io.Discard, &stderr))
	require.Contains(t, stderr.String(), `the domain "apo" has no rules, 3 others have: ["api" `)
}

func TestSchemaPrintsTheSchema(t *testing.T) {
	t.Parallel()
	var stdout bytes.Buffer
	require.Equal(t, 0, command(t.Context(), []string{"schema"}, &stdout, io.Discard))
	require.True(t, json.Valid(stdout.Bytes()))
}

func TestWrongRulesAtTheBeginningAreNotServed(t *testing.T) {
	t.Parallel()
	var stderr bytes.Buffer
	require.Equal(t, 1, command(t.Context(), []string{"-rules", written(t, "domain: x\nrules: [{nam: a}]\n")}, io.Discard, &stderr))
	require.Contains(t, stderr.String(), `did you mean "name"`)
}

func TestAChangedFileCountsAndWhatWasSpentStaysSpent(t *testing.T) {
	t.Parallel()
	file := written(t, "domain: x\nrules: [{name: a, limits: [2/1h]}]\n")
	d := start(t, nil, "-rules", file)
	const body = `{"domain":"x","entries":{}}`
	for _, status := range []int{200, 200, 429} {
		require.Equal(t, status, d.post(t, "/v1/decide", body).status)
	}
	require.NoError(t, os.WriteFile(file, []byte("domain: x\nrules: [{name: a, limits: [3/1h]}]\n"), 0o600))
	eventually(t, func() bool { return d.post(t, "/v1/decide", body).status == 200 }, "the file counts")
	require.Equal(t, 429, d.post(t, "/v1/decide", body).status)

	require.NoError(t, os.WriteFile(file, []byte("domain: x\nrules: [{name: a, limit: [9/1h]}]\n"), 0o600))
	eventually(t, func() bool { return strings.Contains(d.get(t, "/readyz").body, "rules_error") }, "the fault is told")
	a := d.get(t, "/readyz")
	require.Equal(t, 200, a.status)
	require.Contains(t, a.body, `"rules_error":"rules.yaml:2:`, "the folder is nobody's business")
	require.Contains(t, d.log.String(), "rules.yaml:2:")
	require.Equal(t, 429, d.post(t, "/v1/decide", body).status, "the rules before still decide")

	require.NoError(t, os.WriteFile(file, []byte("domain: x\nrules: ["+strings.Repeat("{}, ", 5000)+"]\n"), 0o600))
	eventually(t, func() bool { return strings.Contains(d.get(t, "/readyz").body, "; and 1000 faults more") }, "all faults are counted")
	require.Less(t, len(d.get(t, "/readyz").body), 1000)

	require.NoError(t, os.WriteFile(file, []byte("domain: x\nrules: [{name: a, limits: [4/1h]}]\n"), 0o600))
	eventually(t, func() bool { return !strings.Contains(d.get(t, "/readyz").body, "rules_error") }, "the fault is mended")
	require.Equal(t, 200, d.post(t, "/v1/decide", body).status)
}

func TestTheEndAnswersWhatHasBegun(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", "../examples/rules")
	watching, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	health, err := healthv1.NewHealthClient(d.dial(t)).Watch(watching, &healthv1.HealthCheckRequest{})
	require.NoError(t, err)
	state := func() healthv1.HealthCheckResponse_ServingStatus {
		out, err := health.Recv()
		require.NoError(t, err)
		return out.GetStatus()
	}
	for state() != healthv1.HealthCheckResponse_SERVING {
		continue
	}
	reader, writer := io.Pipe()
	answered := make(chan int, 1)
	go func() {
		r, _ := http.NewRequestWithContext(context.WithoutCancel(t.Context()), http.MethodPost, "http://"+d.address("http")+"/v1/decide", reader)
		out, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(r)
		if err != nil {
			answered <- 0
			return
		}
		_ = out.Body.Close()
		answered <- out.StatusCode
	}()
	_, err = writer.Write([]byte(`{"domain":"api",`)) // the server reads it
	require.NoError(t, err)
	eventually(t, func() bool { return d.get(t, "/healthz").status == 200 }, "the server runs")
	stopped := make(chan error, 1)
	go func() { stopped <- d.stop() }()
	require.Equal(t, healthv1.HealthCheckResponse_NOT_SERVING, state(), "a call that has begun is answered")
	cancel()
	_, err = writer.Write([]byte(`"entries":{"path":"/api/x","user":"42"}}`))
	require.NoError(t, err)
	require.NoError(t, writer.Close())
	require.Equal(t, 200, <-answered)
	require.NoError(t, <-stopped)
	require.Contains(t, d.log.String(), `"stopped"`)
}

// TestWhoWatchesTheHealthDoesNotHoldUpTheEnd watches a service that is ready, and one that nobody knows, of which the end
// is no news.
func TestWhoWatchesTheHealthDoesNotHoldUpTheEnd(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", "../examples/rules", "-drain", "10m")
	client := healthv1.NewHealthClient(d.dial(t))
	var watches []healthv1.Health_WatchClient
	for _, service := range []string{"", "nobody"} {
		w, err := client.Watch(t.Context(), &healthv1.HealthCheckRequest{Service: service})
		require.NoError(t, err)
		_, err = w.Recv()
		require.NoError(t, err)
		watches = append(watches, w)
	}
	require.NoError(t, d.stop())
	for _, w := range watches {
		last, err := healthv1.HealthCheckResponse_UNKNOWN, error(nil)
		for out := (*healthv1.HealthCheckResponse)(nil); err == nil; out, err = w.Recv() {
			if out != nil {
				last = out.GetStatus()
			}
		}
		require.Equal(t, codes.Unavailable, status.Code(err))
		require.Equal(t, healthv1.HealthCheckResponse_NOT_SERVING, last)
	}
}

func overwrite(t *testing.T, file, text string) {
	t.Helper()
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
}

func read(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	require.NoError(t, err)
	return string(data)
}
