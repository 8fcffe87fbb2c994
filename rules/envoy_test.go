package rules_test

import (
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/rules"
)

// envoy contains what the documentation of envoyproxy/ratelimit shows: nested descriptors, defaults by key, patterns,
// unlimited descriptors, names and shadows.
const envoy = `
domain: mongo_cps
descriptors:
  - key: database
    value: users
    rate_limit: {unit: second, requests_per_unit: 500}
  - key: database
    value: default
    rate_limit: {unit: second, requests_per_unit: 10}
  - key: message_type
    value: marketing
    descriptors:
      - key: to_number
        rate_limit: {unit: day, requests_per_unit: 5}
  - key: to_number
    rate_limit:
      unit: Day
      requests_per_unit: 100
  - key: remote_address
    rate_limit: {unit: second, requests_per_unit: 10}
  - key: remote_address
    value: 50.0.0.5
    rate_limit: {unlimited: true}
  - key: path
    value: /foo*
    rate_limit: {unit: minute, requests_per_unit: 20}
  - key: path
    value: /foo/*/bar
    rate_limit: {unit: minute, requests_per_unit: 30}
  - key: path
    value: /foo/exact
    shadow_mode: true
    detailed_metric: true
    rate_limit: {unit: minute, requests_per_unit: 1, name: exact, replaces: [{name: other}, {name: nobody}]}
  - key: path
    value: /share*
    share_threshold: true
    value_to_metric: true
    quota_mode: true
    metadata: {team: a}
    descriptors:
      - key: user
        rate_limit: {unit: week, requests_per_unit: 2}
  - key: other
    rate_limit: {unit: year, requests_per_unit: 1, name: other}
  - key: ours
    rate_limits: [5/10s sliding, {unit: month, requests_per_unit: 1000, algorithm: continuous, burst: 10}, {unit: hour, requests_per_unit: 7, burst: 9}]
`

func TestAFileOfEnvoyIsWalkedAsThere(t *testing.T) {
	t.Parallel()
	set, err := rules.Parse("envoy.yaml", []byte(envoy))
	require.NoError(t, err)
	for _, test := range []struct {
		entries []string
		want    string
	}{
		{[]string{"database", "users"}, "database_users"},
		{[]string{"database", "other"}, ""},
		{[]string{"database", "users", "more", "x"}, ""},
		{[]string{"message_type", "marketing"}, ""},
		{[]string{"message_type", "marketing", "to_number", "555"}, "message_type_marketing.to_number"},
		{[]string{"to_number", "555", "message_type", "marketing"}, ""},
		{[]string{"to_number", "555"}, "to_number"},
		{[]string{"to_number", ""}, "to_number"},
		{[]string{"remote_address", "50.0.0.5"}, "remote_address_50.0.0.5"},
		{[]string{"remote_address", "50.0.0.6"}, "remote_address"},
		{[]string{"path", "/foo/x/bar"}, "path_/foo*"},
		{[]string{"path", "/foo/exact"}, "path_/foo/exact"},
		{[]string{"path", "/fo"}, ""},
		{[]string{"path", "/shared", "user", "1"}, "path_/share*.user"},
		{[]string{"path", "/share*", "user", "1"}, "path_/share*.user"},
		{[]string{"unknown", "x"}, ""},
		{nil, ""},
	} {
		assert.Equal(t, test.want, strings.Join(ids(set.Match("mongo_cps", entries(test.entries...))), " "), "%q", test.entries)
	}
}

func TestLimitsOfAFileOfEnvoyAreFixedWindowsUnlessItSaysOtherwise(t *testing.T) {
	t.Parallel()
	set, err := rules.Parse("envoy.yaml", []byte(envoy))
	require.NoError(t, err)
	limits := map[string]string{}
	for _, r := range set.Rules() {
		limits[r.ID] = fmt.Sprint(r.Limits)
	}
	assert.Equal(t, map[string]string{
		"database_users":                   "[500/1s fixed named 1s/fixed]",
		"database_default":                 "[10/1s fixed named 1s/fixed]",
		"message_type_marketing.to_number": "[5/24h fixed named 24h/fixed]",
		"to_number":                        "[100/24h fixed named 24h/fixed]",
		"remote_address":                   "[10/1s fixed named 1s/fixed]",
		"remote_address_50.0.0.5":          "[]",
		"path_/foo*":                       "[20/1m fixed named 1m/fixed]",
		"path_/foo/*/bar":                  "[30/1m fixed named 1m/fixed]",
		"path_/foo/exact":                  "[1/1m fixed named 1m/fixed]",
		"path_/share*.user":                "[2/168h fixed named 168h/fixed]",
		"other":                            "[1/8760h fixed named 8760h/fixed]",
		"ours":                             "[5/10s sliding named 10s/sliding 1000/720h continuous burst 10 named 720h/continuous 7/1h continuous burst 9 named 1h/continuous]",
	}, limits)
	exact := set.Match("mongo_cps", entries("path", "/foo/exact"))[0]
	assert.Equal(t, "exact", exact.Name)
	assert.True(t, exact.Shadow)
	assert.True(t, exact.DetailedMetric)
	assert.Equal(t, 30, exact.Line)
}

func TestDescriptorsOfOneRequestAreOneDecision(t *testing.T) {
	t.Parallel()
	e := engine(t, "domain: d\ndescriptors:\n- {key: a, rate_limit: {unit: day, requests_per_unit: 100}}\n- {key: b, rate_limit: {unit: day, requests_per_unit: 2, name: b}}\n- {key: c, rate_limit: {unlimited: true, replaces: [{name: b}]}}\n")
	ask := func(descriptors ...rules.Descriptor) (bool, []rules.Applied) {
		v, applied, err := e.Decide(t.Context(), rules.Request{Domain: "d", Descriptors: descriptors})
		require.NoError(t, err)
		return v.Allowed, applied
	}
	a, b := rules.Descriptor{Entries: entries("a", "1")}, rules.Descriptor{Entries: entries("b", "1")}
	for range 2 {
		allowed, _ := ask(a, b)
		require.True(t, allowed)
	}
	allowed, applied := ask(a, b)
	assert.False(t, allowed)
	assert.False(t, applied[0].Denied)
	assert.True(t, applied[1].Denied)
	assert.Equal(t, 1, applied[1].Descriptor)
	assert.Equal(t, int64(98), applied[0].Levels[0].Remaining, "the denied call took nothing")

	allowed, applied = ask(a, b, rules.Descriptor{Entries: entries("c", "x")})
	assert.True(t, allowed, "c replaces b")
	require.Len(t, applied, 2)
	assert.Equal(t, 2, applied[1].Descriptor)

	allowed, applied = ask(a, a)
	assert.True(t, allowed)
	assert.Equal(t, int64(95), applied[0].Levels[0].Remaining, "doubles are merged")
	assert.Equal(t, applied[0].Levels, applied[1].Levels)

	a.Cost = new(int64(0))
	_, applied = ask(a)
	assert.Equal(t, int64(95), applied[0].Levels[0].Remaining)
	a.Cost = new(int64(96))
	allowed, applied = ask(a)
	assert.False(t, allowed)
	assert.Equal(t, int64(95), applied[0].Levels[0].Remaining)
	a.Cost = new(int64(math.MaxInt64))
	allowed, applied = ask(a, a, a)
	assert.False(t, allowed, "a cost above the capacity is a denial")
	assert.True(t, applied[2].Denied)
	a.Cost = new(int64(-1))
	_, _, err := e.Decide(t.Context(), rules.Request{Domain: "d", Descriptors: []rules.Descriptor{a}})
	require.ErrorIs(t, err, throttler.ErrInvalidCost)
}

func TestValuesThatShareAThresholdHaveOneBucket(t *testing.T) {
	t.Parallel()
	e := engine(t, "domain: d\ndescriptors:\n- key: path\n  value: /share*\n  share_threshold: true\n  descriptors:\n  - {key: user, rate_limit: {unit: week, requests_per_unit: 2}}\n")
	remaining := func(path, user string) int64 {
		_, applied, err := e.Decide(t.Context(), rules.Request{Domain: "d", Entries: entries("path", path, "user", user)})
		require.NoError(t, err)
		return applied[0].Levels[0].Remaining
	}
	assert.Equal(t, int64(1), remaining("/share/a", "1"))
	assert.Equal(t, int64(0), remaining("/share/b", "1"))
	assert.Equal(t, int64(1), remaining("/share/b", "2"))
}

func TestIdentifiersOfDifferentEntriesNeverMeet(t *testing.T) {
	t.Parallel()
	e := engine(t, `
domain: d
descriptors:
- {key: a, rate_limit: {unit: day, requests_per_unit: 1}, descriptors: [{key: b, rate_limit: {unit: day, requests_per_unit: 1}}]}
- {key: a_b, rate_limit: {unit: day, requests_per_unit: 1}}
- {key: "a=1:b c", rate_limit: {unit: day, requests_per_unit: 1}}
- {key: rule, rate_limit: {unit: day, requests_per_unit: 1}, descriptors: [{key: k, rate_limit: {unit: day, requests_per_unit: 1}}]}
---
domain: d
rules: [{name: r, per: k, limits: 1/24h fixed}]
`)
	long := strings.Repeat("x", 2000)
	for _, s := range [][]string{
		{"a", "b_c"}, {"a_b", "c"}, {"a", "x", "b", "y"}, {"a", "x b=1:y"}, {"a=1:b c", "d"}, {"a", "b c=1:d"},
		{"rule", "r"}, {"k", "1"}, {"a", long}, {"a", long + "y"}, {"a_b", long},
	} {
		v, applied, err := e.Decide(t.Context(), rules.Request{Domain: "d", Entries: entries(s...)})
		require.NoError(t, err)
		assert.True(t, v.Allowed, "%.20q is new", s)
		assert.Len(t, applied, 1)
		v, _, err = e.Decide(t.Context(), rules.Request{Domain: "d", Entries: entries(s...)})
		require.NoError(t, err)
		assert.False(t, v.Allowed, "%.20q is known", s)
	}
}

func TestALimitOfTheRequestReplacesTheRules(t *testing.T) {
	t.Parallel()
	e := engine(t, envoy)
	remaining := func(b throttler.Bucket) int64 {
		v, applied, err := e.Decide(t.Context(), rules.Request{Domain: "mongo_cps", Descriptors: []rules.Descriptor{{Entries: entries("to_number", "5"), Limit: &b}}})
		require.NoError(t, err)
		require.True(t, v.Allowed)
		require.Len(t, applied, 1)
		return applied[0].Levels[0].Remaining
	}
	day := 24 * time.Hour
	assert.Equal(t, int64(9), remaining(throttler.NewBucket(day, 10).FixedWindow()))
	assert.Equal(t, int64(98), remaining(throttler.NewBucket(day, 100).FixedWindow()), "what was spent counts against another limit of this unit")
	assert.Equal(t, int64(4), remaining(throttler.NewBucket(time.Hour, 5).FixedWindow()))
	v, applied, err := e.Decide(t.Context(), rules.Request{Domain: "mongo_cps", Entries: entries("to_number", "5")})
	require.NoError(t, err)
	assert.True(t, v.Allowed)
	assert.Equal(t, int64(97), applied[0].Levels[0].Remaining, "and against the rule, as in envoyproxy/ratelimit")

	free := throttler.Unlimited()
	v, applied, err = e.Decide(t.Context(), rules.Request{Domain: "mongo_cps", Descriptors: []rules.Descriptor{{Entries: entries("to_number", "5"), Limit: &free}}})
	require.NoError(t, err)
	assert.True(t, v.Allowed)
	assert.Empty(t, applied[0].Levels)
	faulty := throttler.NewBucket(-1, 5)
	_, _, err = e.Decide(t.Context(), rules.Request{Domain: "mongo_cps", Descriptors: []rules.Descriptor{{Entries: entries("to_number", "5"), Limit: &faulty}}})
	var fault *throttler.BucketError
	require.ErrorAs(t, err, &fault)
	v, applied, err = e.Decide(t.Context(), rules.Request{Domain: "unknown", Descriptors: []rules.Descriptor{{Entries: entries("x", "5"), Limit: &faulty}}})
	require.NoError(t, err)
	assert.True(t, v.Allowed, "a domain without rules has no limits")
	assert.Empty(t, applied)
}

func TestLimitsOfOneRequestForOneUserAllCount(t *testing.T) {
	t.Parallel()
	now := clock.NewMock()
	l, err := throttler.New(throttler.Config{Clock: now})
	require.NoError(t, err)
	const text = "domain: d\ndescriptors:\n- {key: free}\n- {key: rule, rate_limits: [100/1s fixed, 10/1d fixed]}\n- {key: spend, rate_limit: 100/1h, mode: charge}\n"
	e, err := rules.NewEngine(l, rules.NewMemory(rules.File{Name: "rules.yaml", Data: []byte(text)}), nil)
	require.NoError(t, err)
	t.Cleanup(e.Close)
	limited := func(key string, cost int64, limit string) rules.Descriptor {
		d := rules.Descriptor{Entries: entries(key, "x"), Cost: &cost}
		if limit != "" {
			b, err := throttler.ParseBucket(limit)
			require.NoError(t, err)
			d.Limit = &b
		}
		return d
	}
	// ask returns what each level of each descriptor has left, -1 where the descriptor has denied, and nil for an error.
	ask := func(mode rules.Mode, d ...rules.Descriptor) (bool, [][]int64, error) {
		v, applied, err := e.Decide(t.Context(), rules.Request{Domain: "d", Mode: mode, Descriptors: d})
		left := make([][]int64, len(d))
		for _, a := range applied {
			for _, l := range a.Levels {
				left[a.Descriptor] = append(left[a.Descriptor], l.Remaining)
			}
			if a.Denied {
				left[a.Descriptor] = []int64{-1}
			}
		}
		return v.Allowed, left, err
	}
	for i, test := range []struct {
		mode    rules.Mode
		d       []rules.Descriptor
		allowed bool
		left    [][]int64
	}{
		{rules.Consume, []rules.Descriptor{limited("free", 1, "10/1h fixed"), limited("free", 2, "5/1s fixed")}, true, [][]int64{{9}, {3}}},
		{rules.Peek, []rules.Descriptor{limited("free", 4, "5/1s fixed"), limited("free", 1, "10/1h fixed")}, false, [][]int64{{-1}, {9}}},
		{rules.Consume, []rules.Descriptor{limited("free", 10, "10/1h fixed"), limited("free", 1, "5/1s fixed")}, false, [][]int64{{-1}, {3}}},
		{rules.Consume, []rules.Descriptor{limited("free", 1, "50/1h fixed"), limited("free", 1, "5/1s fixed"), limited("free", 1, "10/1h fixed")}, true, [][]int64{{7}, {2}, {7}}},
		{rules.Consume, []rules.Descriptor{limited("rule", 1, ""), limited("rule", 2, "50/1s fixed")}, true, [][]int64{{47, 9}, {47}}},
		{rules.Consume, []rules.Descriptor{limited("rule", 6, ""), limited("rule", 5, "10/1s fixed")}, false, [][]int64{{-1}, {-1}}},
		{rules.Consume, []rules.Descriptor{limited("rule", 1, "20/1m"), limited("rule", 9, ""), limited("rule", 0, "50/1s fixed")}, true, [][]int64{{19}, {38, 0}, {38}}},
		{rules.Consume, []rules.Descriptor{limited("spend", 300, ""), limited("spend", 1, "5/1s")}, true, [][]int64{nil, {4}}},
		{rules.Charge, []rules.Descriptor{limited("spend", 50, ""), limited("spend", 1, "5/1s"), limited("spend", 1, "500/1h")}, true, [][]int64{nil, nil, nil}},
		{rules.Peek, []rules.Descriptor{limited("spend", 0, "5/1s"), limited("spend", 0, "400/1h")}, true, [][]int64{{3}, {49}}},
	} {
		allowed, left, err := ask(test.mode, test.d...)
		require.NoError(t, err, i)
		assert.Equal(t, test.allowed, allowed, i)
		assert.Equal(t, test.left, left, i)
	}
	back := limited("free", 2, "10/1h fixed")
	back.GiveBack = true
	backToo := limited("free", 1, "5/1s fixed")
	backToo.GiveBack = true
	_, left, err := ask(rules.Consume, back, backToo, limited("free", 0, "100/1d"))
	require.NoError(t, err)
	assert.Equal(t, [][]int64{{9}, {3}, {100}}, left)

	_, _, err = ask(rules.Consume, limited("free", 1, "10/1h named x"), limited("free", 1, "5/1s named x"))
	require.ErrorAs(t, err, new(*throttler.BucketError), "one name cannot be two limits")
}

// Rule and Descriptor have the words that rule-based limiters are often described with: a path, and a limit per unit.
type Rule struct {
	Path        string       `json:"path"`
	Descriptors []Descriptor `json:"descriptors"`
}

type Descriptor struct {
	Key             string `json:"key"`
	Value           string `json:"value,omitempty"`
	Unit            string `json:"unit"`
	RequestsPerUnit int    `json:"requests_per_unit"`
}

func TestRulesOfAPathAndDescriptorsLoad(t *testing.T) {
	t.Parallel()
	words, err := json.Marshal(map[string][]Rule{"rules": {
		{"/login", []Descriptor{{Key: "user", Unit: "minute", RequestsPerUnit: 2}, {Key: "plan", Value: "free", Unit: "hour", RequestsPerUnit: 3}}},
		{"/api/*", []Descriptor{{Key: "user", Unit: "second", RequestsPerUnit: 10}}},
	}})
	require.NoError(t, err)
	e := engine(t, string(words))
	ask := func(s ...string) (bool, []rules.Applied) {
		v, applied, err := e.Decide(t.Context(), rules.Request{Entries: entries(s...)})
		require.NoError(t, err)
		return v.Allowed, applied
	}
	for i, want := range []bool{true, true, false} {
		allowed, _ := ask("path", "/login", "user", "1")
		assert.Equal(t, want, allowed, i)
	}
	allowed, applied := ask("path", "/login", "user", "2", "plan", "free")
	assert.True(t, allowed)
	require.Len(t, applied, 2, "every rule that matches applies")
	assert.Equal(t, "/login user", applied[0].Rule.Name)
	assert.Equal(t, "/login plan=free", applied[1].Rule.Name)
	allowed, applied = ask("path", "/api/search", "user", "1")
	assert.True(t, allowed)
	require.Len(t, applied, 1)
	assert.Equal(t, time.Second, applied[0].Levels[0].Period)
}
