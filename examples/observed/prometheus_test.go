package main

// What a real Prometheus sees of the service.

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// without says why some panels have no data here, by the beginning of their titles.
var without = map[string]string{
	"Failover: ":      "the storage is in the memory of the process",
	"Waiting ":        "nobody calls Wait",
	"Time of a wait ": "nobody calls Wait",
	"Errors ":         "nothing fails",
}

func TestEachPanelOfTheDashboardHasDataOrAReasonWhyNot(t *testing.T) {
	t.Parallel()
	base := serve(t, "-load", "2m")
	api := scrape(t, strings.TrimPrefix(base, "http://"))
	missing := panels(t)
	for begin := range without {
		maps.DeleteFunc(missing, func(title, _ string) bool { return strings.HasPrefix(title, begin) })
	}
	require.Greater(t, len(missing), 10)
	assert.Eventually(t, func() bool {
		maps.DeleteFunc(missing, func(_, expr string) bool { return results(t, api, expr) > 0 })
		return len(missing) == 0
	}, time.Minute, 100*time.Millisecond)
	assert.Empty(t, missing)
}

// panels returns the expressions of throttlerprom's dashboard, by panel title.
func panels(t *testing.T) map[string]string {
	read, err := os.ReadFile("../../throttlerprom/grafana.json")
	require.NoError(t, err)
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	require.NoError(t, json.Unmarshal(read, &dashboard))
	filled, all := strings.NewReplacer("$__rate_interval", "5s", "$__range", "1m", "$name", ".*", "$storage", ".*"), map[string]string{}
	for _, p := range dashboard.Panels {
		for i, target := range p.Targets {
			all[fmt.Sprint(p.Title, " ", i)] = filled.Replace(target.Expr)
		}
	}
	require.NotEmpty(t, all)
	return all
}

// scrape starts a Prometheus that scrapes the target, and returns its address.
func scrape(t *testing.T, target string) string {
	program, err := exec.LookPath("prometheus")
	require.NoError(t, err, "make servers installs it")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address := listener.Addr().String()
	require.NoError(t, listener.Close())
	dir := t.TempDir()
	config := fmt.Sprintf("global: {scrape_interval: 250ms}\nscrape_configs: [{job_name: observed, static_configs: [{targets: [%q]}]}]\n", target)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o600))
	run := exec.CommandContext(t.Context(), program, "--config.file", filepath.Join(dir, "prometheus.yml"),
		"--storage.tsdb.path", filepath.Join(dir, "data"), "--web.listen-address", address, "--log.level", "warn")
	run.Cancel = func() error { return run.Process.Signal(syscall.SIGTERM) }
	require.NoError(t, run.Start())
	t.Cleanup(func() { _ = run.Wait() }) // the process gets a signal before
	return "http://" + address
}

// results returns how many series an expression has. It is 0 while Prometheus starts.
func results(t *testing.T, api, expr string) int {
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, api+"/api/v1/query?query="+url.QueryEscape(expr), nil)
	require.NoError(t, err)
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return 0
	}
	defer func() { _ = answer.Body.Close() }()
	var found struct {
		Data struct{ Result []any }
	}
	_ = json.NewDecoder(answer.Body).Decode(&found) // fails while Prometheus starts
	return len(found.Data.Result)
}
