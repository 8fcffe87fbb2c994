package main

import (
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/rules"
)

const countedRules = `domain: x
rules:
- {name: small, when: {path: /small}, limits: [1/1h]}
- {name: large, when: {path: /small}, limits: [100/1h]}
- {name: quiet, when: {path: /small}, limits: [1/1h], shadow: true}
- {name: never, when: {path: /never}, limits: [0/1h]}
- {name: free, when: {path: /free}, unlimited: true}
- {name: unasked, when: {path: /unasked}, limits: [1/1h]}
`

// scrape returns the lines of /metrics that begin with the prefix, without it.
func (r *running) scrape(t *testing.T, prefix string) (out []string) {
	t.Helper()
	a := r.get(t, "/metrics")
	require.Equal(t, http.StatusOK, a.status, a.body)
	for line := range strings.Lines(a.body) {
		if strings.HasPrefix(line, prefix) {
			out = append(out, strings.TrimSpace(strings.TrimPrefix(line, prefix)))
		}
	}
	return out
}

func TestMetricsSayWhatEachRuleDid(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", written(t, countedRules))
	for _, body := range []string{
		`{"domain":"x","entries":{"path":"/small"}}`, `{"domain":"x","entries":{"path":"/small"}}`, `{"domain":"x","entries":{"path":"/never"}}`,
		`{"domain":"x","entries":{"path":"/free"}}`, `{"domain":"x","entries":{"path":"/small"},"mode":"peek"}`,
		`{"domain":"x","entries":{"path":"/other"},"limit":"5/1h"}`,
	} {
		d.post(t, "/v1/decide", body)
	}
	require.Equal(t, []string{
		`{domain="x",result="allowed",rule="free"} 1`,
		`{domain="x",result="allowed",rule="large"} 1`,
		`{domain="x",result="allowed",rule="override"} 1`,
		`{domain="x",result="allowed",rule="quiet"} 1`,
		`{domain="x",result="allowed",rule="small"} 1`,
		`{domain="x",result="denied",rule="never"} 1`,
		`{domain="x",result="denied",rule="small"} 1`,
		`{domain="x",result="denied_by_others",rule="large"} 1`,
		`{domain="x",result="denied_by_others",rule="quiet"} 1`,
	}, d.scrape(t, "throttlerd_rule_decisions_total"))
	require.Equal(t, []string{"6"}, d.scrape(t, "throttlerd_rules "))
	require.Equal(t, []string{"0"}, d.scrape(t, "throttlerd_rules_stale "))
	require.Equal(t, []string{"1"}, d.scrape(t, "throttlerd_ready "))
	require.Contains(t, d.scrape(t, "throttler_denials_total"), `{bucket="small/1h",name="rules"} 1`)
	require.Contains(t, d.scrape(t, "throttler_tokens_total"), `{bucket="large/1h",name="rules"} 1`)
	require.Contains(t, d.scrape(t, "throttler_decisions_total"), `{name="rules",op="consume",result="denied",source="runtime"} 1`)
	require.NotEmpty(t, d.scrape(t, `throttler_identifiers{storage="runtime"}`))
	require.NotEmpty(t, d.scrape(t, "go_goroutines"))
	require.NotContains(t, d.get(t, "/metrics").body, "readiness", "the daemon's own looks at the storage are not counted")
}

func TestMetricsOfAStorageThatFails(t *testing.T) {
	t.Parallel()
	for policy, result := range map[string]string{"deny": "error", "allow": "bypassed"} {
		d := start(t, nil, noRedis("-rules", written(t, countedRules), "-on-storage-error", policy)...)
		d.post(t, "/v1/decide", `{"domain":"x","entries":{"path":"/small"}}`)
		require.Contains(t, d.scrape(t, "throttlerd_rule_decisions_total"), `{domain="x",result="`+result+`",rule="small"} 1`)
		require.Contains(t, d.scrape(t, "throttler_errors_total"), `{name="rules",type="unavailable"} 1`)
		eventually(t, func() bool { return slices.Equal(d.scrape(t, "throttlerd_ready "), []string{"0"}) }, "it is not ready")
	}
}

func TestWrongRulesAreInTheMetrics(t *testing.T) {
	t.Parallel()
	file := written(t, countedRules)
	d := start(t, nil, "-rules", file)
	d.post(t, "/v1/decide", `{"domain":"x","entries":{"path":"/free"}}`)
	overwrite(t, file, "rules: [{}]")
	eventually(t, func() bool { return slices.Equal(d.scrape(t, "throttlerd_rules_stale "), []string{"1"}) }, "the rules are wrong")
	overwrite(t, file, "domain: x\nrules: [{name: free, limits: [1/1h]}]\n")
	eventually(t, func() bool { return slices.Equal(d.scrape(t, "throttlerd_rules_stale "), []string{"0"}) }, "they are mended")
	require.Equal(t, []string{`{domain="x",result="allowed",rule="free"} 1`}, d.scrape(t, "throttlerd_rule_decisions_total"), "a rule keeps its counts")
}

// TestTheNamesOfMetricsAreThese keeps the names from changing and compares them with the documentation.
func TestTheNamesOfMetricsAreThese(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", written(t, countedRules))
	d.post(t, "/v1/decide", `{"domain":"x","entries":{"path":"/small"}}`)
	names := d.scrape(t, "# TYPE throttlerd_")
	require.Equal(t, []string{"ready gauge", "rule_decisions_total counter", "rules gauge", "rules_stale gauge"}, names)
	faults, err := testutil.GatherAndLint(d.registry)
	require.NoError(t, err)
	for _, f := range faults {
		require.NotRegexp(t, "^throttler", f.Metric, f.Text)
	}
	doc := read(t, "../docs/throttlerd.md")
	for _, name := range append(resultNames[:], "rule_decisions_total", "rules_stale", "rules", "ready") {
		require.Regexp(t, "`(throttlerd_)?"+regexp.QuoteMeta(name)+"`", doc)
	}
}

func TestARuleThatGoesIsForgottenAndTheRateIsOfTenSeconds(t *testing.T) {
	t.Parallel()
	set := func(text string) *rules.Set {
		s, err := rules.Parse("", []byte(text))
		require.NoError(t, err)
		return s
	}
	a, both := newActivity(), set("rules: [{name: a, limits: 1/1s}, {name: b, limits: 1/1s}]")
	a.loaded(both)
	now := time.Now()
	ask := func(n int) {
		for range n {
			a.of(both.Rules()[0]).total[allowed].Add(1)
		}
	}
	for range 30 {
		ask(5)
		now = now.Add(time.Second)
		a.second(now)
	}
	all := a.all(now)
	require.Len(t, all, 2)
	require.InDelta(t, 5, all[0].rate[allowed], 0.01)
	require.Equal(t, int64(150), all[0].total[allowed])
	require.Zero(t, all[1].total)
	a.loaded(set("rules: [{name: b, limits: 1/1s}]"))
	require.Len(t, a.all(now), 1)
	ask(1) // a decision that began before the rules were loaded
	require.Len(t, a.all(now), 1)
	require.Equal(t, "b", a.all(now)[0].id)
}

func TestTheRatesAreThoseOfNow(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", written(t, countedRules))
	eventually(t, func() bool {
		d.activity.mu.Lock()
		defer d.activity.mu.Unlock()
		return d.activity.tick > 0
	}, "the counts are looked at each second")
}
