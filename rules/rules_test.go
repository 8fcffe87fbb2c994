package rules_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/rules"
)

const native = `
domain: api
addresses: [address]
rules:
  - name: api
    when: {path: /api/*}
    per: [user]
    limits: [5/10s, 100/1h sliding]
  - name: login
    when: {path: /login, method: POST}
    per: [address]
    limits: [3/1h log]
  - name: gold
    when: {path: /api/*, plan: gold}
    per: [user]
    limits: [100/10s continuous burst 200]
    replaces: [api]
  - {name: health, when: {path: /health}, unlimited: true}
  - {name: scrapers, when: {agent: [curl*, "*bot*"]}, limits: [0/1s]}
  - {name: inside, when: {address: [10.0.0.0/8, "2001:db8::/32", 192.0.2.7]}, limits: [1/1s]}
  - {name: next-year, when: {path: /api/*}, per: [org], limits: [2/30d], shadow: true}
`

func engine(t *testing.T, text string) *rules.Engine {
	t.Helper()
	l, err := throttler.New(throttler.Config{Clock: clock.NewMock()})
	require.NoError(t, err)
	e, err := rules.NewEngine(l, rules.NewMemory(rules.File{Name: "rules.yaml", Data: []byte(text)}), nil)
	require.NoError(t, err)
	t.Cleanup(e.Close)
	return e
}

// entries returns entries from alternating keys and values.
func entries(s ...string) (out []rules.Entry) {
	for i := 0; i < len(s); i += 2 {
		out = append(out, rules.Entry{Key: s[i], Value: s[i+1]})
	}
	return out
}

func ids(rs []*rules.Rule) (out []string) {
	for _, r := range rs {
		out = append(out, r.ID)
	}
	return out
}

func TestEveryRuleThatMatchesApplies(t *testing.T) {
	t.Parallel()
	set, err := rules.Parse("rules.yaml", []byte(native))
	require.NoError(t, err)
	for _, test := range []struct{ entries, want []string }{
		{[]string{"path", "/api/x", "user", "42"}, []string{"api"}},
		{[]string{"path", "/api/x"}, nil},
		{[]string{"path", "/api/x", "user", "42", "org", "7"}, []string{"api", "next-year"}},
		{[]string{"path", "/api/x", "user", "42", "plan", "gold"}, []string{"gold"}},
		{[]string{"path", "/login", "method", "POST", "address", "192.0.2.1"}, []string{"login"}},
		{[]string{"path", "/login", "method", "GET", "address", "10.1.2.3"}, []string{"inside"}},
		{[]string{"address", "::ffff:10.1.2.3"}, []string{"inside"}},
		{[]string{"address", "2001:db8:1::1%eth0"}, []string{"inside"}},
		{[]string{"address", "192.0.2.7"}, []string{"inside"}},
		{[]string{"address", "192.0.2.8"}, nil},
		{[]string{"address", "nonsense"}, nil},
		{[]string{"path", "/health", "agent", "a bot or curl"}, []string{"health", "scrapers"}},
		{[]string{"agent", "curlbot"}, []string{"scrapers"}},
		{nil, nil},
	} {
		assert.Equal(t, test.want, ids(set.Match("api", entries(test.entries...))), "%q", test.entries)
	}
	assert.Empty(t, set.Match("other", entries("path", "/api/x", "user", "42")))
}

func TestARequestIsOneDecisionOfAllItsRules(t *testing.T) {
	t.Parallel()
	e := engine(t, native)
	ask := func(s ...string) (throttler.Verdict, []rules.Applied) {
		v, applied, err := e.Decide(t.Context(), rules.Request{Domain: "api", Entries: entries(s...)})
		require.NoError(t, err)
		return v, applied
	}
	for range 5 {
		v, _ := ask("path", "/api/x", "user", "42", "org", "7")
		require.True(t, v.Allowed)
	}
	v, applied := ask("path", "/api/x", "user", "42", "org", "7")
	assert.False(t, v.Allowed)
	require.Len(t, applied, 2)
	assert.Equal(t, "api", applied[0].Rule.Name)
	assert.True(t, applied[0].Denied)
	require.Len(t, applied[0].Levels, 2)
	assert.Equal(t, "api/10s", applied[0].Levels[0].Bucket)
	assert.Equal(t, "api/1h/sliding", applied[0].Levels[1].Bucket)
	assert.Equal(t, int64(95), applied[0].Levels[1].Remaining, "a denied call takes nothing")

	v, applied = ask("path", "/api/y", "user", "43", "org", "7")
	assert.True(t, v.Allowed, "a shadow rule never denies")
	require.Len(t, applied, 2)
	assert.True(t, applied[1].Denied, "and tells that it would")

	v, applied = ask("agent", "curl")
	assert.False(t, v.Allowed)
	assert.Zero(t, v.RetryAfter)
	assert.True(t, applied[0].Denied)

	v, applied = ask("path", "/health")
	assert.True(t, v.Allowed)
	assert.Empty(t, applied[0].Levels)
}

// TestWhatIsLargeDoesNotTakeForever reads files for some of which quadratic time was minutes.
func TestWhatIsLargeDoesNotTakeForever(t *testing.T) {
	t.Parallel()
	many := func(n int, format, between string) string {
		all := make([]string, n)
		for i := range all {
			all[i] = fmt.Sprintf(format, i)
		}
		return strings.Join(all, between)
	}
	for name, test := range map[string]struct{ text, fault string }{
		"names that no rule has":    {"rules:\n" + many(5_000, "- {name: rule-%d, limits: 5/1s, replaces: base-rule-%[1]d}\n", ""), `replaces "base-rule-7", which is no rule`},
		"one name that no rule has": {"rules:\n" + many(5_000, "- {name: rule-%d, limits: 5/1s, replaces: base}\n", ""), `replaces "base", which is no rule`},
		"merges in metadata": {
			"rules:\n- {name: a, limits: 1/1s, metadata: &m {" + many(1000, "k%d: 1", ", ") + "}}\n" + many(1000, "- {name: b%d, limits: 1/1s, metadata: {<<: *m}}\n", ""),
			"too many values",
		},
		"aliases in metadata": {
			"rules:\n- {name: a, limits: 1/1s, metadata: &m {" + many(1000, "k%d: 1", ", ") + "}}\n" + many(1000, "- {name: b%d, limits: 1/1s, metadata: {m: *m}}\n", ""),
			"too many values",
		},
		"patterns of envoyproxy/ratelimit": {"domain: d\ndescriptors:\n" + many(10_000, "- {key: path, value: /p%d/*, rate_limit: {unit: second, requests_per_unit: 5}}\n", ""), ""},
		"JSON in one line":                 {`{"rules":[` + many(10_000, `{"name":"rule-%d","limits":["5/1s"],"per":["user"]}`, ",") + "]}", ""},
		"keys of per":                      {"rules: [{name: a, limits: 1/1s, per: [" + many(50_000, "k%d", ",") + "]}]", ""},
		"addresses":                        {"addresses: [" + many(10_000, "k%d", ",") + "]\nrules: [{name: a, limits: 1/1s, when: {k9999: [" + many(10_000, "'2001:db8::%x'", ",") + "]}}]", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			begun := time.Now()
			_, err := rules.Parse("", []byte(test.text))
			if test.fault == "" {
				assert.NoError(t, err)
			} else {
				assert.ErrorContains(t, err, test.fault)
			}
			assert.Less(t, time.Since(begun), time.Minute)
		})
	}
}

func TestAFaultNamesTheNearestOfAFewThousandNames(t *testing.T) {
	t.Parallel()
	text := "rules:\n"
	for i := range 3000 {
		text += fmt.Sprintf("- {name: rule-%d, limits: 5/1s}\n", i)
	}
	_, err := rules.Parse("", []byte(text+"- {name: a, limits: 5/1s, replaces: [rule-29999, rul-7]}\n"))
	require.ErrorContains(t, err, `replaces "rule-29999", which is no rule of the domain "default": did you mean "rule-2999"?`)
	require.ErrorContains(t, err, `replaces "rul-7", which is no rule of the domain "default": did you mean "rule-7"?`)
}
