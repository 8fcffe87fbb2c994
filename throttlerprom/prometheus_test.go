package throttlerprom_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	memstore "github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/throttlerprom"
)

// program returns the path of a program of Debian's package prometheus.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	require.NoError(t, err, `there is no %s here: run "apt-get install prometheus", or "brew install prometheus" on macOS`, name)
	return path
}

func TestEachAlertFiresWhenItShould(t *testing.T) {
	t.Parallel()
	out, err := exec.CommandContext(t.Context(), program(t, "promtool"), "test", "rules", "testdata/alerts_test.yaml").CombinedOutput()
	require.NoError(t, err, string(out))
}

// TestPrometheusHasDataForEachPanelAndEachAlert runs a real Prometheus. Only the figures of failover are invented,
// because a real failover storage needs servers.
func TestPrometheusHasDataForEachPanelAndEachAlert(t *testing.T) {
	t.Parallel()
	r := prometheus.NewRegistry()
	m, err := throttlerprom.New(r, nil)
	require.NoError(t, err)
	app := httptest.NewServer(promhttp.HandlerFor(r, promhttp.HandlerOpts{}))
	defer app.Close()
	ctx, stop := context.WithCancel(t.Context())
	loaded := make(chan struct{})
	go func() { defer close(loaded); load(ctx, t, m) }()
	defer func() { stop(); <-loaded }()
	api := startPrometheus(t, strings.TrimPrefix(app.URL, "http://"))

	asked := 0
	for title, expr := range expressions(t) {
		asked++
		var got []sample
		require.Eventually(t, func() bool {
			got = query(t, api, expr)
			return len(got) > 0 && got[0].Value[1] != "NaN"
		}, time.Minute, 50*time.Millisecond, "%s has no data: %s", title, expr)
		for _, s := range got {
			assert.NotContains(t, fmt.Sprint(s.Metric), "user:", title)
		}
	}
	assert.Greater(t, asked, 30)
	var names []string
	for _, s := range query(t, api, `count by (__name__) ({__name__=~"throttler_.*"})`) {
		names = append(names, s.Metric["__name__"])
	}
	assert.Len(t, names, 18+2*3, "each name, and of the two histograms three")
}

// load makes each kind of call until the context ends.
func load(ctx context.Context, t *testing.T, m *throttlerprom.Metrics) {
	store := memstore.New(nil)
	m.Storage("memory", store)
	m.Storage("main", failover{})
	th, err := throttler.New(throttler.Config{
		Name: "api", Storage: store, Observe: m.Observe,
		Buckets: []throttler.Bucket{throttler.NewBucket(100*time.Millisecond, 5).Named("short"), throttler.NewBucket(time.Hour, 1<<40).Named("long")},
	})
	assert.NoError(t, err)
	open, err := throttler.New(throttler.Config{Name: "open", Observe: m.Observe, OnUnknownIdentifier: throttler.Allow})
	assert.NoError(t, err)
	for i := 0; ctx.Err() == nil; i++ {
		v, _ := th.Consume("user:42", throttler.Cost(2))
		if i%8 == 0 {
			_ = th.Refund(ctx, v)
		}
		_, _ = th.Consume("")
		_, _ = open.Consume("user:1")
		_, _ = th.Wait(ctx, "user:43")
		m.Observe(ctx, &throttler.Event{Name: "api", Op: throttler.OpConsume, Err: throttler.ErrUnavailable, Duration: time.Millisecond})
		m.Observe(ctx, &throttler.Event{Name: "api", Op: throttler.OpConsume, Err: throttler.ErrCorruptState, Duration: time.Millisecond})
	}
}

// expressions returns the expressions of the dashboard and of the alerts. Alerts lose their thresholds: what they measure
// has data even when nothing is wrong.
func expressions(t *testing.T) map[string]string {
	t.Helper()
	var d struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	read, err := os.ReadFile("grafana.json")
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(read, &d))
	filled := strings.NewReplacer("$__rate_interval", "5s", "$__range", "1m", "$name", ".*", "$storage", ".*")
	all := map[string]string{}
	for _, p := range d.Panels {
		for i, target := range p.Targets {
			all[fmt.Sprint(p.Title, " ", i)] = filled.Replace(target.Expr)
		}
	}
	read, err = os.ReadFile("alerts.yaml")
	require.NoError(t, err)
	for _, rule := range strings.Split(string(read), "- alert: ")[1:] {
		name, rest, _ := strings.Cut(rule, "\n")
		_, expr, found := strings.Cut(rest, "expr: ")
		require.True(t, found, name)
		expr, _, _ = strings.Cut(strings.TrimPrefix(expr, "|\n"), "\n        labels:")
		expr, _, _ = strings.Cut(expr, "\n        for:")
		for _, than := range []string{" > ", " == "} {
			expr, _, _ = strings.Cut(expr, than)
		}
		all[name] = expr
	}
	return all
}

// startPrometheus starts a Prometheus that scrapes the target, and returns the URL for queries.
func startPrometheus(t *testing.T, target string) string {
	t.Helper()
	dir, port := t.TempDir(), freePort(t)
	config := fmt.Sprintf("global: {scrape_interval: 250ms}\nscrape_configs:\n- job_name: app\n  metrics_path: /\n  static_configs: [{targets: [%q]}]\n", target)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o600))
	c := exec.Command(program(t, "prometheus"), "--config.file", filepath.Join(dir, "prometheus.yml"), "--storage.tsdb.path", filepath.Join(dir, "data"),
		"--web.listen-address", port, "--log.level", "warn")
	var log strings.Builder
	c.Stdout, c.Stderr = &log, &log
	require.NoError(t, c.Start())
	t.Cleanup(func() {
		_ = c.Process.Signal(syscall.SIGTERM)
		_ = c.Wait()
		if t.Failed() {
			t.Log(log.String())
		}
	})
	require.Eventually(t, func() bool {
		r, err := http.Get("http://" + port + "/-/ready")
		return err == nil && r.Body.Close() == nil && r.StatusCode == http.StatusOK
	}, time.Minute, 50*time.Millisecond)
	return "http://" + port
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

type sample struct {
	Metric map[string]string
	Value  []any
}

// query returns the data of an expression, if there is any.
func query(t *testing.T, api, expr string) []sample {
	t.Helper()
	r, err := http.Get(api + "/api/v1/query?query=" + url.QueryEscape(expr))
	if !assert.NoError(t, err) {
		return nil
	}
	defer func() { _ = r.Body.Close() }()
	var answer struct {
		Status, Error string
		Data          struct{ Result []sample }
	}
	assert.NoError(t, json.NewDecoder(r.Body).Decode(&answer))
	assert.Equal(t, "success", answer.Status, "%s: %s", expr, answer.Error)
	return answer.Data.Result
}
