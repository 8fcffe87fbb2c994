package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/rules"
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

func TestWhatADecideDoesNotSayClearlyIsRefused(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", written(t, "rules:\n- {name: all, limits: [9/1h]}\n- {name: user, per: [user], limits: [9/1h]}\n"))
	for body, says := range map[string]string{
		`{"entries":[["user"]]}`:                "pairs of texts",
		`{"entries":[["user","42","x"]]}`:       "pairs of texts",
		`{"entries":[["user",null]]}`:           "pairs of texts",
		`{"entries":[["user",42]]}`:             "pairs of texts",
		`{"entries":[null]}`:                    "pairs of texts",
		`{"entries":[[]]}`:                      "pairs of texts",
		`{"entries":{"user":null}}`:             "pairs of texts",
		`{"entries":{"user":null,"user":"42"}}`: "pairs of texts",
		`{"entries":"user"}`:                    "pairs of texts",
		`{"entries":null}`:                      "it has no entries",
		`{}`:                                    "it has no entries",
		`{"cost":2}`:                            "it has no entries",
		`{"descriptors":[null]}`:                "descriptors[0] has no entries",
		`{"descriptors":[{"entries":{"user":"1"}},{"cost":1}]}`:             "descriptors[1] has no entries",
		`{"descriptors":[{"entries":{"user":"1"}}],"cost":100}`:             "cost and limit are beside descriptors",
		`{"descriptors":[{"entries":{"user":"1"}}],"limit":"5/1h"}`:         "cost and limit are beside descriptors",
		`{"descriptors":[{"entries":{"user":"1"}}],"mode":"peek","cost":0}`: "cost and limit are beside descriptors",
	} {
		a := d.post(t, "/v1/decide", body)
		require.Equal(t, 400, a.status, body)
		detail, _ := a.json(t)["detail"].(string)
		require.Contains(t, detail, says, body)
	}
	for _, body := range []string{
		`{"entries":{}}`, `{"entries":[]}`, `{"entries":[["user","1"],["user",""]]}`, `{"entries":{"user":""},"cost":null,"limit":""}`,
		`{"descriptors":[{"entries":{}}]}`, `{"entries":{},"cost":0,"descriptors":[{"entries":{"user":"1"},"cost":2}]}`,
	} {
		a := d.post(t, "/v1/decide", body)
		require.Equal(t, 200, a.status, "%s: %s", body, a.body)
	}
}

func TestAWrongBodyIsToldInWordsOfJSON(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", "../examples/rules")
	for body, want := range map[string]string{
		``:                               "it is empty",
		`{"domain":`:                     "it ends before the value does",
		`[]`:                             "it is a list, must be an object",
		`{"domain":5}`:                   "domain is a number, must be text",
		`{"mode":true}`:                  "mode is true or false, must be text",
		`{"cost":1e0}`:                   "cost is 1e0, must be a whole number",
		`{"cost":92233720368547758080}`:  "cost is 92233720368547758080, must be a whole number",
		`{"descriptors":{}}`:             "descriptors is an object, must be a list",
		`{"descriptors":[{"cost":"x"}]}`: "cost is text, must be a whole number",
		`{"descriptors":[5]}`:            "descriptors is a number, must be an object",
		`{"domainn":"x"}`:                `unknown field \"domainn\"`,
		`{} {}`:                          "more follows the value",
		`{"cost":5,"Cost":0}`:            `\"cost\" stands there twice`,
		`{"descriptors":[{"entries":{"user":"x"},"cost":0}],"descriptors":[{"entries":{"user":"y"}}]}`: `\"descriptors\" stands there twice`,
		`{"descriptors":[{"entries":{"a":"1","b":"2","a":"3"}}]}`:                                      `\"a\" stands there twice`,
	} {
		a := d.post(t, "/v1/decide", body)
		require.Equal(t, 400, a.status, body)
		require.Contains(t, a.body, "the body is wrong: "+want+`"`, body)
	}
	for _, right := range []string{
		`{"entries":{"a":"a","A":"a","":"a","b":"a"}}`, `{"entries":[["a","a"],["a","a"]]}`,
		`{"descriptors":[{"entries":{"a":"b"},"cost":null},{"entries":{"a":"b"},"cost":1}],"mode":"peek","domain":"mode"}`,
	} {
		require.NoError(t, repeated([]byte(right)), right)
	}
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
	a := d.post(t, "/v1/decide", `{"mode":"refund","domain":"y","receipt":"`+receipt+`"}`)
	require.Equal(t, 400, a.status, "of another domain")
	require.Contains(t, a.body, "domain")
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

func TestADecisionIsMadeToTheEndThoughItsClientLeaves(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", written(t, "domain: x\nrules:\n- {name: calls, per: [user], limits: [10/1h]}\n- {name: spend, per: [user], limits: [10/1h], mode: charge}\n"))
	for i, test := range []struct{ path, body, left string }{
		{"/v1/decide", `{"domain":"x","mode":"charge","entries":{"user":"%d"}}`, "one of each"},
		{"/v1/decide", `{"domain":"x","entries":{"user":"%d"}}`, "what a rule of mode: charge asks for too"},
		{"/json", `{"domain":"x","descriptors":[{"entries":[{"key":"user","value":"%d"}]}]}`, "as over gRPC"},
	} {
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		r := httptest.NewRequestWithContext(gone, "POST", test.path, strings.NewReader(fmt.Sprintf(test.body, i)))
		map[string]http.HandlerFunc{"/v1/decide": d.service.decideHTTP, "/json": d.service.json}[test.path](httptest.NewRecorder(), r)
		require.Equal(t, []int64{9, 9}, d.left(t, fmt.Sprintf(`{"user":"%d"}`, i)), test.left)
	}
}

// left returns what each limit has left, in the order of the rules, less its debt.
func (r *running) left(t *testing.T, descriptor string) (left []int64) {
	t.Helper()
	a := r.post(t, "/v1/decide", `{"mode":"peek","domain":"x","cost":0,"entries":`+descriptor+`}`)
	var out answered
	require.NoError(t, json.Unmarshal([]byte(a.body), &out), a.body)
	for _, rule := range out.Rules {
		for _, l := range rule.Limits {
			left = append(left, l.Remaining-l.Debt)
		}
	}
	return left
}

func TestASettleMakesTheEstimateTheRealCostOnce(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", written(t, "domain: x\nrules:\n- {name: calls, per: [user], limits: [10/1h]}\n- {name: units, per: [user], cost: 10, limits: [1000/1h]}\n- {name: tokens, per: [user], cost: tokens, limits: [100/1h continuous burst 100]}\n"))
	for i, test := range []struct {
		settle string
		left   []int64 // of calls, units and tokens
	}{
		{`"cost":1`, []int64{9, 990, 40}},
		{`"cost":12`, []int64{-2, 880, 40}},
		{`"entries":{"tokens":"25"}`, []int64{6, 960, 75}},
		{`"cost":3,"entries":[["tokens","110"]]`, []int64{7, 970, -10}},
	} {
		user := strconv.Itoa(i)
		first := d.post(t, "/v1/decide", `{"domain":"x","cost":4,"receipt":true,"entries":{"tokens":"60","user":"`+user+`"}}`)
		receipt, _ := first.json(t)["receipt"].(string)
		require.NotEmpty(t, receipt, first.body)
		settle := `{"mode":"settle","receipt":"` + receipt + `",` + test.settle + `}`
		for _, wrong := range []string{`"cost":-1`, `"entries":{"user":"1"}`, `"entries":{"tokens":"many"}`, `"cost":1,"limit":"1/1h"`, `"cost":1,"descriptors":[{"cost":1}]`, `"domain":"x"`, `"domain":"y","cost":1`} {
			a := d.post(t, "/v1/decide", `{"mode":"settle","receipt":"`+receipt+`",`+wrong+`}`)
			require.Equal(t, 400, a.status, wrong)
		}
		require.Equal(t, []int64{6, 960, 40}, d.left(t, `{"tokens":"0","user":"`+user+`"}`), "what is wrong changes nothing")
		a := d.post(t, "/v1/decide", settle)
		require.Equal(t, 200, a.status, a.body)
		require.JSONEq(t, `{"allowed":true,"rules":[]}`, a.body)
		require.Equal(t, test.left, d.left(t, `{"tokens":"0","user":"`+user+`"}`), test.settle)
		require.Equal(t, 404, d.post(t, "/v1/decide", settle).status, "a receipt is used once")
	}
	require.Equal(t, 400, d.post(t, "/v1/decide", `{"mode":"settle","cost":1}`).status)
	require.Equal(t, 400, d.post(t, "/v1/decide", `{"mode":"settle","receipt":true,"cost":1}`).status)
	require.Equal(t, 404, d.post(t, "/v1/decide", `{"mode":"settle","receipt":"nobody gave it","cost":1}`).status)
}

func TestReceiptsEndAndAreFew(t *testing.T) {
	t.Parallel()
	var r receipts
	now := time.Now()
	d := &decision{}
	first := r.give(d, now)
	_, ok := r.take(first, now.Add(receiptLasts))
	require.False(t, ok, "it is too old")
	second := r.give(d, now)
	for range maxReceipts {
		used := r.give(d, now)
		_, ok = r.take(used, now)
		require.True(t, ok)
	}
	given, ok := r.take(second, now)
	require.True(t, ok, "those that were used do not count")
	r.put(given, now)
	for range maxReceipts {
		r.give(d, now)
	}
	require.Equal(t, maxReceipts, r.order.Len())
	require.Len(t, r.given, maxReceipts)
	_, ok = r.take(second, now)
	require.False(t, ok, "the oldest is forgotten")
	r.give(d, now.Add(receiptLasts))
	require.Len(t, r.given, 1, "those that are too old are too")
	require.Equal(t, 1, r.order.Len())
}

// TestReceiptsTakeBoundedMemory gives large receipts, twice as many as there is room for.
func TestReceiptsTakeBoundedMemory(t *testing.T) { //nolint:paralleltest // it measures memory
	d := start(t, nil, "-rules", written(t, "rules: [{name: a, per: user, limits: [1000000/1h, 1000000/2h sliding]}]\n"))
	asked := rules.Request{Descriptors: make([]rules.Descriptor, 256)}
	for i := range asked.Descriptors {
		asked.Descriptors[i].Entries = []rules.Entry{{Key: "user", Value: fmt.Sprintf("%0900d", i)}}
	}
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc) //nolint:gosec // it fits
	}
	d.service.decide(t.Context(), asked)
	before := heap()
	for range 2 * maxHeld / (256 * (900 + sizeOfApplied + 2*sizeOfLevel)) {
		out := d.service.decide(t.Context(), asked)
		require.NoError(t, out.err)
		d.service.receipts.give(out, time.Now())
	}
	used := heap() - before
	require.Less(t, used, int64(maxHeld))
	require.Greater(t, used, int64(maxHeld/8), "storage runtime has the identifiers anyway, and the rest is not far off")
	require.LessOrEqual(t, d.service.receipts.held, maxHeld)
	for id := range d.service.receipts.given {
		_, ok := d.service.receipts.take(id, time.Now())
		require.True(t, ok)
	}
	require.Zero(t, d.service.receipts.held)
}
