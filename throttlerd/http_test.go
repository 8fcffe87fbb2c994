package main

import (
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestDecideConsumesPeeksAndCharges(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", written(t, "rules: [{name: a, per: [user], limits: [3/1h continuous]}]\n"))
	remaining := func(body string) float64 {
		a := d.post(t, "/v1/decide", body)
		require.Equal(t, 200, a.status, a.body)
		out := a.json(t)
		rules, _ := out["rules"].([]any)
		require.Len(t, rules, 1)
		rule, _ := rules[0].(map[string]any)
		limits, _ := rule["limits"].([]any)
		if len(limits) == 0 {
			return -1
		}
		limit, _ := limits[0].(map[string]any)
		n, _ := limit["remaining"].(float64)
		return n
	}
	require.InDelta(t, 1, remaining(`{"entries":{"user":"1"},"cost":2}`), 0)
	require.InDelta(t, 0, remaining(`{"entries":{"user":"1"},"mode":"peek"}`), 0)
	require.InDelta(t, 1, remaining(`{"entries":[["user","1"]],"mode":"peek","cost":0}`), 0)
	require.InDelta(t, -1, remaining(`{"entries":{"user":"1"},"mode":"charge","cost":5}`), 0)
	a := d.post(t, "/v1/decide", `{"entries":{"user":"1"},"cost":1}`)
	require.Equal(t, 429, a.status)
	require.NotEmpty(t, a.header.Get("Retry-After"))
	require.NotEmpty(t, a.header.Get("Ratelimit-Policy"))
	require.Contains(t, a.body, `"debt":4`)
	a = d.post(t, "/v1/decide", `{"descriptors":[{"entries":{"user":"2"}},{"entries":{"user":"1"}}]}`)
	require.Equal(t, 429, a.status)
	require.Contains(t, a.body, `"descriptor":1,"cost":1,"denied":true`)
	require.Contains(t, a.body, `"descriptor":0,"cost":1,"denied":false`)
	a = d.post(t, "/v1/decide", `{"entries":{"user":"9"},"limit":"1/1h","cost":1}`)
	require.Equal(t, 200, a.status, a.body)
	require.Equal(t, 429, d.post(t, "/v1/decide", `{"entries":{"user":"9"},"limit":"1/1h"}`).status)
}

func TestReadyzAndHealthz(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", "../examples/rules")
	require.Equal(t, "OK\n", d.get(t, "/healthz").body)
	eventually(t, func() bool { return d.get(t, "/readyz").json(t)["ready"] == true }, "it is ready")
	require.Equal(t, http.StatusNotFound, d.get(t, "/").status)
}

func TestWhatAClientSendsIsBounded(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", "../examples/rules")
	large := `{"domain":"` + strings.Repeat("x", maxBody) + `"}`
	for _, path := range []string{"/json", "/v1/decide"} {
		require.Equal(t, http.StatusRequestEntityTooLarge, d.post(t, path, large).status, path)
	}
	a := d.get(t, "/auth?domain=api", "X-Forwarded-Uri", "/"+strings.Repeat("x", 100<<10))
	require.Equal(t, http.StatusRequestHeaderFieldsTooLarge, a.status)
}
