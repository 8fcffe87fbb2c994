package main

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
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

func TestAReceiptGivesBackOnce(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", written(t, "domain: x\nrules:\n- {name: calls, per: [user], limits: [2/1h]}\n- {name: bytes, per: [user], cost: bytes, limits: [100/1h continuous]}\n"))
	const request = `{"domain":"x","entries":{"user":"42","bytes":"60"},"receipt":true}`
	first := d.post(t, "/v1/decide", request)
	require.Equal(t, 200, first.status, first.body)
	receipt, _ := first.json(t)["receipt"].(string)
	require.NotEmpty(t, receipt)
	denied := d.post(t, "/v1/decide", request)
	require.Equal(t, 429, denied.status, "60 bytes more are too many")
	require.NotContains(t, denied.body, "receipt")
	refund := `{"mode":"refund","receipt":"` + receipt + `"}`
	back := d.post(t, "/v1/decide", refund)
	require.Equal(t, 200, back.status, back.body)
	require.JSONEq(t, `{"allowed":true,"rules":[]}`, back.body)
	again := d.post(t, "/v1/decide", refund)
	require.Equal(t, 404, again.status, "a receipt is used once")
	require.Contains(t, again.body, "used")
	left := d.post(t, "/v1/decide", `{"domain":"x","entries":{"user":"42"},"cost":0,"mode":"peek"}`)
	require.Contains(t, left.body, `"limit":2,"remaining":2`)
	require.Contains(t, left.body, `"limit":100,"remaining":100`)
	for _, wrong := range []string{
		`{"mode":"refund"}`, `{"mode":"refund","receipt":true}`, `{"mode":"refund","receipt":"x","cost":1}`, `{"mode":"refund","receipt":"x","entries":{}}`,
		`{"entries":{},"receipt":"x"}`, `{"entries":{},"receipt":1}`, `{"entries":{},"mode":"peek","receipt":true}`,
	} {
		require.Equal(t, 400, d.post(t, "/v1/decide", wrong).status, wrong)
	}
	require.Equal(t, 404, d.post(t, "/v1/decide", `{"mode":"refund","receipt":"nobody gave it"}`).status)
}

func TestReceiptsEndAndAreFew(t *testing.T) {
	t.Parallel()
	var r receipts
	now := time.Now()
	first := r.give(throttler.Verdict{}, now)
	_, ok := r.take(first, now.Add(receiptLasts))
	require.False(t, ok, "it is too old")
	second := r.give(throttler.Verdict{}, now)
	for range maxReceipts {
		r.give(throttler.Verdict{}, now)
	}
	require.Len(t, r.order, maxReceipts)
	require.LessOrEqual(t, len(r.given), maxReceipts)
	_, ok = r.take(second, now)
	require.False(t, ok, "the oldest is forgotten")
	r.give(throttler.Verdict{}, now.Add(receiptLasts))
	require.Len(t, r.given, 1, "those that are too old are too")
}
