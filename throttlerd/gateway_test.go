package main

import (
	"bytes"
	"cmp"
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/rules"
)

// gateway is an nginx or a Caddy with the configuration in deploy. The server behind it counts the requests that reach
// it.
type gateway struct {
	url    string
	served *atomic.Int64
	log    *text
}

// freePort returns a port that nobody listens on at the moment.
func freePort(t testing.TB) string {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { _ = l.Close() }()
	_, port, err := net.SplitHostPort(l.Addr().String())
	require.NoError(t, err)
	return port
}

// configured returns a file of deploy with the ports of the test.
func configured(t *testing.T, file, port, daemon, backend string, more ...string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("deploy", file))
	require.NoError(t, err)
	replace := append([]string{"127.0.0.1:8000", "127.0.0.1:" + port, ":8000 {", ":" + port + " {", "127.0.0.1:8080", daemon, "127.0.0.1:9000", backend}, more...)
	name := filepath.Join(t.TempDir(), file)
	require.NoError(t, os.WriteFile(name, []byte(strings.NewReplacer(replace...).Replace(string(data))), 0o600))
	return name
}

// program returns the path of a gateway's program.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(cmp.Or(os.Getenv(strings.ToUpper(name)), name))
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/" + name)
	}
	require.NoError(t, err, "run \"apt-get install %s\", or name the program in %s", name, strings.ToUpper(name))
	return path
}

func startGateway(t *testing.T, name, daemon, domain string) *gateway {
	t.Helper()
	g := &gateway{served: &atomic.Int64{}, log: &text{}}
	backend := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { g.served.Add(1) }))
	t.Cleanup(backend.Close)
	port := freePort(t)
	g.url = "http://127.0.0.1:" + port
	args := gateways[name](t, port, daemon, strings.TrimPrefix(backend.URL, "http://"), "domain=api", "domain="+domain)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	c := exec.CommandContext(ctx, program(t, name), args...)
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.Env = append(os.Environ(), "HOME="+t.TempDir())
	c.Stdout, c.Stderr = g.log, g.log
	require.NoError(t, c.Start())
	t.Cleanup(func() { cancel(); _ = c.Wait() })
	eventually(t, func() bool {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", "127.0.0.1:"+port)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	}, name+" listens")
	return g
}

var gateways = map[string]func(t *testing.T, port, daemon, backend string, more ...string) []string{
	"nginx": func(t *testing.T, port, daemon, backend string, more ...string) []string {
		dir := t.TempDir()
		var temp bytes.Buffer
		for _, what := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
			temp.WriteString(what + "_temp_path " + dir + "/" + what + ";\n")
		}
		file := configured(t, "nginx.conf", port, daemon, backend, append(more, "http {", "http {\naccess_log off;\n"+temp.String())...)
		return []string{"-p", dir, "-c", file, "-e", "stderr", "-g", "daemon off; master_process off; pid " + dir + "/pid; error_log stderr;"}
	},
	"caddy": func(t *testing.T, port, daemon, backend string, more ...string) []string {
		file := configured(t, "Caddyfile", port, daemon, backend, append(more, "# Caddy asks", "{\n\tadmin off\n\tauto_https off\n}\n# Caddy asks")...)
		return []string{"run", "--adapter", "caddyfile", "--config", file}
	},
}

func TestAGatewayLetsThroughWhatIsAllowed(t *testing.T) {
	t.Parallel()
	for name := range gateways {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const rules = "domain: api\naddresses: [address]\nrules:\n- {name: login, when: {path: /login, method: POST, address: 127.0.0.0/8}, per: [address], limits: [LIMIT/1h]}\n"
			file := written(t, strings.ReplaceAll(rules, "LIMIT", "2"))
			d := start(t, nil, "-rules", file)
			g := startGateway(t, name, d.address("http"), "api")
			for range 2 {
				a := do(t, "POST", g.url+"/login?x=1", "")
				require.Equal(t, 200, a.status, g.log)
				if name == "nginx" {
					require.Contains(t, a.header.Get("Ratelimit-Policy"), ";q=2;w=3600")
				}
			}
			for _, path := range []string{"/login", "//login", "/x/../login", "/%6cogin", "/./login?y"} {
				a := do(t, "POST", g.url+path, "")
				require.Equal(t, 429, a.status, path)
				require.NotEmpty(t, a.header.Get("Retry-After"))
				require.Contains(t, a.header.Get("Ratelimit"), ";r=0")
			}
			a := do(t, "POST", g.url+"/login", "", "X-Forwarded-Uri", "/free", "X-Forwarded-Method", "GET", "X-Forwarded-For", "192.0.2.1", "X-Forwarded-Host", "x")
			require.Equal(t, 429, a.status, "a client cannot say who it is")
			require.Equal(t, 200, do(t, "GET", g.url+"/login", "").status)
			require.Equal(t, int64(3), g.served.Load(), "what is denied reaches nobody")

			require.NoError(t, os.WriteFile(file, []byte(strings.ReplaceAll(rules, "LIMIT", "3")), 0o600))
			eventually(t, func() bool { return do(t, "POST", g.url+"/login", "").status == 200 }, "the reload is seen")
			require.Equal(t, 429, do(t, "POST", g.url+"/login", "").status)
		})
	}
}

// authEntry returns an entry that forward-auth makes of a request with a header field.
func authEntry(t *testing.T, entry, field, value string) string {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), "GET", "/auth", http.NoBody)
	for key, value := range map[string]string{"X-Forwarded-Uri": "/", "X-Forwarded-Method": "GET", "X-Forwarded-For": "192.0.2.1", field: value} {
		r.Header.Set(key, value)
	}
	all, err := (&service{config: &config{}}).authEntries(r)
	require.NoError(t, err, value)
	i := slices.IndexFunc(all, func(e rules.Entry) bool { return e.Key == entry })
	require.NotEqual(t, -1, i, entry)
	return all[i].Value
}

func TestNoSpellingOfAPathEscapesItsRule(t *testing.T) {
	t.Parallel()
	for want, uris := range map[string][]string{
		"/":         {"/", "//", "/.", "/..", "/%2e", "/x/..", "/x/../", "/#", "/?#", "http://h", "http://h/#x"},
		"/login":    {"/login", "//login", "/x/../login", "/%6cogin", "/./login?y", "/login#x", "/login#", "/login#/y", "/login?x#y", "/login#?x", "http://h/login#x"},
		"/dir/":     {"/dir/", "/dir/.", "/dir/..//dir/.", "/dir/x/..", "/dir/%2e", "/dir/%2E%2e/dir/%2e", "/dir/x/%2e%2e", "/dir/x%2f..", "/dir/#x", "/dir/.#x", "/dir/.?x"},
		"/dir/...":  {"/dir/..."},
		"/dir/x.":   {"/dir/x."},
		"/login#x":  {"/login%23x"},
		"/login?x/": {"/login%3fx/", "/login%3fx/."},
	} {
		for _, uri := range uris {
			require.Equal(t, want, authEntry(t, "path", "X-Forwarded-Uri", uri), uri)
		}
	}
}

func TestABackslashInAPathIsRefused(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", written(t, "domain: x\nrules:\n- {name: a, limits: [9/1h]}\n"), "-domain", "x")
	for uri, status := range map[string]int{`/x\..\login`: 400, `/\login`: 400, `/login?a\b`: 200, `/x%5clogin`: 200} {
		got := d.get(t, "/auth", "X-Forwarded-Uri", uri, "X-Forwarded-Method", "GET", "X-Forwarded-For", "192.0.2.1")
		require.Equal(t, status, got.status, uri)
	}
}

func TestNoSpellingOfAHostEscapesItsRule(t *testing.T) {
	t.Parallel()
	for want, hosts := range map[string][]string{
		"example.com": {"example.com", "EXAMPLE.com", "example.com:80", "example.com:", "example.com.", "example.com.:80", "Example.com.:"},
		"2001:db8::1": {"[2001:db8::1]", "[2001:DB8::1]:80", "[2001:db8::1]:"},
		"192.0.2.7":   {"192.0.2.7", "192.0.2.7.", "192.0.2.7:80"},
	} {
		for _, host := range hosts {
			require.Equal(t, want, authEntry(t, "host", "X-Forwarded-Host", host), host)
		}
	}
}

func TestForwardAuthBelievesOnlyTheGateway(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", written(t, "domain: x\naddresses: [address]\nrules:\n- {name: a, per: [address], limits: [1/1h]}\n- {name: u, per: [user], limits: [1/1h]}\n"), "-domain", "x", "-trust", "198.51.100.0/24", "-entry", "user=X-User")
	ask := func(forwarded string, more ...string) int {
		return d.get(t, "/auth", append([]string{"X-Forwarded-Uri", "/", "X-Forwarded-Method", "GET", "X-Forwarded-For", forwarded}, more...)...).status
	}
	require.Equal(t, 200, ask("192.0.2.1"))
	require.Equal(t, 429, ask("192.0.2.1"))
	require.Equal(t, 429, ask("203.0.113.7, 192.0.2.1"), "what a client writes before does not count")
	require.Equal(t, 429, ask("192.0.2.1, 198.51.100.9"), "a trusted proxy is believed")
	require.Equal(t, 429, ask("203.0.113.7, 192.0.2.1, 198.51.100.9"))
	require.Equal(t, 200, ask("rubbish, 198.51.100.9"), "the proxy itself counts")
	require.Equal(t, 429, ask("198.51.100.9"))
	require.Equal(t, 200, ask("2001:db8::1"))
	require.Equal(t, 429, ask("2001:db8::ffff:2"), "a client has a whole /64")
	require.Equal(t, 200, ask("2001:db8:0:1::1"))
	require.Equal(t, 429, ask("::ffff:192.0.2.1"))
	require.Equal(t, 200, ask("192.0.2.50", "X-User", "42"))
	require.Equal(t, 429, ask("192.0.2.51", "X-User", "42"))
	for _, header := range [][]string{
		{}, {"X-Forwarded-Uri", "/"}, {"X-Forwarded-Uri", "/", "X-Forwarded-Method", "GET"},
		{"X-Forwarded-Uri", "/", "X-Forwarded-Uri", "/", "X-Forwarded-Method", "GET", "X-Forwarded-For", "192.0.2.77"},
		{"X-Forwarded-Uri", "%", "X-Forwarded-Method", "GET", "X-Forwarded-For", "192.0.2.77"},
		{"X-Forwarded-Uri", "/", "X-Forwarded-Method", "GET", "X-Forwarded-For", "unknown"},
		{"X-Forwarded-Uri", "/", "X-Forwarded-Method", "GET", "X-Forwarded-For", "192.0.2.77,"},
		{"X-Forwarded-Uri", "/", "X-Forwarded-Method", "GET", "X-Forwarded-For", "192.0.2.77", "X-Forwarded-Host", "evil", "X-Forwarded-Host", "a"},
		{"X-Forwarded-Uri", "/", "X-Forwarded-Method", "GET", "X-Forwarded-For", "192.0.2.77", "X-User", "evil", "X-User", "a"},
	} {
		require.Equal(t, 400, d.get(t, "/auth", header...).status, header)
	}
	for _, query := range []string{"domian=x", "domain=x;denied=403", "domain=x&domain=y", "denied=403&denied=429"} {
		require.Equal(t, 400, d.get(t, "/auth?"+query, "X-Forwarded-Uri", "/", "X-Forwarded-Method", "GET", "X-Forwarded-For", "192.0.2.79").status, query)
	}
	require.Equal(t, 400, d.get(t, "/auth?denied=200", "X-Forwarded-Uri", "/", "X-Forwarded-Method", "GET", "X-Forwarded-For", "192.0.2.78").status)
}
