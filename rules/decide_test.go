package rules_test

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/rules"
)

const modes = `
rules:
- {name: all, limits: [10/1h], cost: 2}
- {name: user, per: user, limits: [10/1h], cost: bytes}
- {name: try, per: user, limits: [3/1h], shadow: true}
`

func TestModesTakePeekAndCharge(t *testing.T) {
	t.Parallel()
	e := engine(t, modes)
	ask := func(mode rules.Mode, cost int64) (bool, []int64) {
		v, applied, err := e.Decide(t.Context(), rules.Request{Mode: mode, Cost: &cost, Entries: entries("user", "42")})
		require.NoError(t, err)
		var remaining []int64
		for _, a := range applied {
			for _, l := range a.Levels {
				remaining = append(remaining, l.Remaining-l.Debt)
			}
		}
		return v.Allowed, remaining
	}
	for i, test := range []struct {
		mode    rules.Mode
		cost    int64
		allowed bool
		want    []int64
	}{
		{rules.Peek, 1, true, []int64{8, 9, 2}},
		{rules.Consume, 1, true, []int64{8, 9, 2}},
		{rules.Consume, 3, true, []int64{2, 6, 2}}, // the shadow denies, and so has nothing taken
		{rules.Peek, 2, false, []int64{2, 6}},
		{rules.Consume, 2, false, []int64{2, 6}},
		{rules.Charge, 4, true, nil}, // the shadow denies, so nothing is taken from it
		{rules.Peek, 0, true, []int64{-6, 2, -2}},
	} {
		allowed, remaining := ask(test.mode, test.cost)
		assert.Equal(t, test.allowed, allowed, i)
		assert.Equal(t, test.want, remaining, i)
	}
	require.NoError(t, e.Reset(t.Context(), rules.Request{Entries: entries("user", "42")}))
	_, remaining := ask(rules.Peek, 0)
	assert.Equal(t, []int64{10, 10, 3}, remaining)
	_, _, err := e.Decide(t.Context(), rules.Request{Mode: 7})
	require.ErrorContains(t, err, "Request.Mode is 7")
}

func TestACostIsAnEntryOrAFactor(t *testing.T) {
	t.Parallel()
	e := engine(t, modes)
	costs := func(cost int64, s ...string) (out []int64) {
		_, applied, err := e.Decide(t.Context(), rules.Request{Mode: rules.Peek, Cost: &cost, Entries: entries(s...)})
		require.NoError(t, err)
		for _, a := range applied {
			out = append(out, a.Cost)
		}
		return out
	}
	assert.Equal(t, []int64{2, 7, 1}, costs(1, "user", "42", "bytes", "7"))
	assert.Equal(t, []int64{6, 0, 3}, costs(3, "user", "42", "bytes", "0"))
	assert.Equal(t, []int64{6, 3, 3}, costs(3, "user", "42"), "without the entry it is the cost of the request")
	assert.Equal(t, []int64{1<<63 - 1}, costs(1<<62+1), "too large to multiply")
	for _, bytes := range []string{"x", "-1", "1.5", "9223372036854775808", ""} {
		_, _, err := e.Decide(t.Context(), rules.Request{Entries: entries("user", "42", "bytes", bytes)})
		require.ErrorIs(t, err, throttler.ErrInvalidCost, bytes)
	}
}

func TestExplainSaysWhyEachRuleAppliesOrNot(t *testing.T) {
	t.Parallel()
	set, err := rules.Compile(rules.File{Data: []byte(native)}, rules.File{Data: []byte("domain: api\ndescriptors: [{key: path, descriptors: [{key: user, value: x*, rate_limit: {unit: day, requests_per_unit: 1}}]}]")})
	require.NoError(t, err)
	why := map[string]string{}
	for _, x := range set.Explain("api", entries("path", "/api/x", "plan", "gold", "user", "42", "agent", "me", "address", "192.0.2.1")) {
		assert.Equal(t, x.Applies, x.Why == "")
		why[x.Rule.ID] = x.Why
	}
	assert.Equal(t, map[string]string{
		"api":          `the rule "gold" replaces it`,
		"login":        `the entry "path" is "/api/x", must be /login`,
		"gold":         "",
		"health":       `the entry "path" is "/api/x", must be /health`,
		"scrapers":     `the entry "agent" is "me", must be curl* or *bot*`,
		"inside":       `the entry "address" is "192.0.2.1", must be 10.0.0.0/8 or 2001:db8::/32 or 192.0.2.7/32`,
		"next-year":    `there is no entry "org"`,
		"path.user_x*": `the entries lead to no descriptor: there is none of key "plan" here`,
	}, why)
	for _, test := range []struct {
		entries []string
		want    string
	}{
		{[]string{"path", "/", "user", "y"}, `the entries lead to no descriptor: there is none of key "user" and value "y" here`},
		{[]string{"path", "/"}, "the entries, all and in their order, lead elsewhere"},
		{[]string{"path", "/", "user", "xy"}, ""},
	} {
		all := set.Explain("api", entries(test.entries...))
		assert.Equal(t, test.want, all[len(all)-1].Why)
	}
	assert.Empty(t, set.Explain("other", nil))
}

func TestOneRuleMayReplaceAllOthers(t *testing.T) {
	t.Parallel()
	set, err := rules.Parse("", []byte("rules: [{name: a, limits: 1/1s}, {name: b, limits: 1/1s}, {name: office, when: {x: y}, unlimited: true, replaces: \"*\"}]"))
	require.NoError(t, err)
	assert.Equal(t, []string{"a", "b"}, ids(set.Match("", nil)))
	assert.Equal(t, []string{"office"}, ids(set.Match("", entries("x", "y"))))
	assert.Equal(t, []string{rules.DefaultDomain}, set.Domains())
}

func TestTooManyDescriptorsAreRefusedBeforeTheyAreCompared(t *testing.T) {
	t.Parallel()
	e := engine(t, "rules: [{name: a, per: user, limits: 1/1h}, {name: b, per: user, limits: 1/1h}, {name: c, per: user, shadow: true, limits: 1/1h}]")
	ask := func(n int) error {
		var all []rules.Descriptor
		for i := range n {
			all = append(all, rules.Descriptor{Entries: entries("user", strconv.Itoa(i))})
		}
		_, _, err := e.Decide(t.Context(), rules.Request{Descriptors: all})
		return err
	}
	require.NoError(t, ask(128), "of two rules each, and one that never denies")
	require.ErrorIs(t, ask(129), throttler.ErrInvalidIdentifier)
	require.ErrorContains(t, ask(257), "257 descriptors")
	many := rules.Request{Descriptors: make([]rules.Descriptor, 1_000_000)} // comparing these with each other would take hours
	_, _, err := e.Decide(t.Context(), many)
	require.ErrorIs(t, err, throttler.ErrInvalidIdentifier)
}

func TestARequestOfTooMuchTextIsRefusedBeforeItIsMatched(t *testing.T) {
	t.Parallel()
	e := engine(t, "rules: [{name: a, when: {path: /x}, per: user, limits: 9/1h}, {name: b, when: {path: /x, plan: gold}, limits: 9/1h}]")
	one := func(n int) rules.Descriptor {
		return rules.Descriptor{Entries: slices.Repeat(entries("path", "/x"), n)}
	}
	text := func(bytes int) []rules.Entry { return entries("path", strings.Repeat("x", bytes-len("path"))) }
	for _, test := range []struct {
		asked rules.Request
		says  string // "" if the request is right
	}{
		{rules.Request{Entries: one(64).Entries}, ""},
		{rules.Request{Entries: one(65).Entries}, "a descriptor has 65 entries, must have at most 64"},
		{rules.Request{Descriptors: []rules.Descriptor{one(1), one(65)}}, "a descriptor has 65 entries, must have at most 64"},
		{rules.Request{Entries: one(1_000_000).Entries}, "1000000 entries"}, // matching these would take hours
		{rules.Request{Entries: text(256 << 10)}, ""},
		{rules.Request{Entries: text(256<<10 + 1)}, "the entries have 262145 bytes, must have at most 262144"},
		{rules.Request{Entries: text(256 << 10), Descriptors: []rules.Descriptor{{Entries: text(5)}}}, "the entries have 262149 bytes"},
	} {
		_, _, err := e.Decide(t.Context(), test.asked)
		if test.says == "" {
			require.NoError(t, err)
			continue
		}
		require.ErrorIs(t, err, throttler.ErrInvalidIdentifier)
		require.ErrorContains(t, err, test.says)
		require.ErrorContains(t, e.Reset(t.Context(), test.asked), test.says)
	}
}

func TestARuleOfModeChargeTakesWhateverThereIs(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"rules: [{name: tokens, per: user, limits: [10/1h], mode: charge}, {name: calls, per: user, limits: [3/1h]}]",
		"domain: default\ndescriptors: [{key: user, rate_limit: 10/1h, mode: charge}]\n---\nrules: [{name: calls, per: user, limits: [3/1h]}]",
	} {
		e := engine(t, text)
		ask := func(mode rules.Mode, cost int64) (throttler.Verdict, []bool) {
			v, applied, err := e.Decide(t.Context(), rules.Request{Mode: mode, Cost: &cost, Entries: entries("user", "42")})
			require.NoError(t, err)
			denied := map[string]bool{}
			for _, a := range applied {
				denied[a.Rule.ID] = a.Denied
			}
			return v, []bool{denied["tokens"] || denied["user"], denied["calls"]}
		}
		v, _ := ask(rules.Consume, 0)
		assert.True(t, v.Allowed)
		assert.NotEmpty(t, v.Levels())
		v, denied := ask(rules.Consume, 3)
		assert.True(t, v.Allowed)
		assert.Equal(t, []bool{false, false}, denied)
		v, denied = ask(rules.Consume, 20)
		assert.False(t, v.Allowed, "the other rule denies")
		assert.Equal(t, []bool{false, true}, denied, "and it is charged all the same")
		v, denied = ask(rules.Consume, 0)
		assert.False(t, v.Allowed, "a debt of 13")
		assert.Equal(t, []bool{true, false}, denied)
		assert.Positive(t, v.RetryAfter)
		v, denied = ask(rules.Peek, 1)
		assert.False(t, v.Allowed, "the other rule denies")
		assert.Equal(t, []bool{false, true}, denied, "and this one denies no cost, as in Mode Consume")
	}
}

func TestWhatARuleOfModeChargeCannotRecordDeniesNothing(t *testing.T) {
	t.Parallel()
	var observed []error
	l, err := throttler.New(throttler.Config{Clock: clock.NewMock(), Observe: func(_ context.Context, e *throttler.Event) { observed = append(observed, e.Err) }})
	require.NoError(t, err)
	e, err := rules.NewEngine(l, rules.NewMemory(rules.File{Name: "rules.yaml", Data: []byte(`
rules:
- {name: spend, per: user, mode: charge, cost: bytes, limits: [10/1h]}
- {name: none, per: user, mode: charge, cost: bytes, limits: [0/1h]}
- {name: calls, per: user, limits: [3/1h]}
`)}), nil)
	require.NoError(t, err)
	t.Cleanup(e.Close)
	for i := range 5 {
		v, applied, err := e.Decide(t.Context(), rules.Request{Entries: entries("user", "42", "bytes", "100")})
		require.NoError(t, err, i)
		require.Equal(t, i < 3, v.Allowed, "the other rule decides")
		require.Equal(t, i >= 3, v.RetryAfter > 0)
		require.Equal(t, []bool{false, false, i >= 3}, []bool{applied[0].Denied, applied[1].Denied, applied[2].Denied})
		require.Equal(t, max(0, 2-int64(i)), applied[2].Levels[0].Remaining)
		require.ErrorAs(t, observed[len(observed)-1], new(*throttler.DebtError), "who observes still learns it")
	}
	_, _, err = e.Decide(t.Context(), rules.Request{Mode: rules.Charge, Entries: entries("user", "42", "bytes", "1")})
	require.ErrorAs(t, err, new(*throttler.DebtError), "whoever asked for a charge is told that it is not recorded")
	v, applied, err := e.Decide(t.Context(), rules.Request{Mode: rules.Peek, Entries: entries("user", "42", "bytes", "0")})
	require.NoError(t, err)
	require.False(t, v.Allowed)
	require.Equal(t, int64(30), applied[0].Levels[0].Debt, "of what it may owe it has recorded all")
}

func TestWhatOnlyLooksTellsTheLevels(t *testing.T) {
	t.Parallel()
	e := engine(t, "rules: [{name: tokens, limits: [10/1h], mode: charge}]")
	for _, remaining := range []int64{10, 0} {
		v, applied, err := e.Decide(t.Context(), rules.Request{Cost: new(int64(0))})
		require.NoError(t, err)
		require.Equal(t, remaining > 0, v.Allowed)
		require.Len(t, v.Levels(), 1)
		require.Equal(t, max(0, remaining-1), applied[0].Levels[0].Remaining, "as after one more")
		v, applied, err = e.Decide(t.Context(), rules.Request{Mode: rules.Peek, Cost: new(int64(12))})
		require.NoError(t, err)
		require.True(t, v.Allowed, "a cost is never denied")
		require.Equal(t, remaining, applied[0].Levels[0].Remaining)
		_, _, err = e.Decide(t.Context(), rules.Request{Cost: new(int64(12))})
		require.NoError(t, err)
	}
	v, applied, err := engine(t, "rules: [{name: none, limits: [0/1h], mode: charge}]").Decide(t.Context(), rules.Request{Cost: new(int64(0))})
	require.NoError(t, err)
	require.False(t, v.Allowed)
	require.True(t, applied[0].Denied, "there never is a token")
}

func TestWhatIsGivenBackIsWhatWasSpentAndOnlyIfAllElseIsAdmitted(t *testing.T) {
	t.Parallel()
	e := engine(t, modes+"- {name: spend, per: user, mode: charge, limits: [10/1h]}\n- {name: other, when: {other: \"*\"}, limits: [2/1h]}\n")
	left := func(s ...string) (all []int64) {
		_, applied, err := e.Decide(t.Context(), rules.Request{Mode: rules.Peek, Cost: new(int64(0)), Entries: entries(s...)})
		require.NoError(t, err)
		for _, a := range applied {
			all = append(all, a.Levels[0].Remaining)
		}
		return all
	}
	ask := func(d ...rules.Descriptor) (bool, []rules.Applied) {
		v, applied, err := e.Decide(t.Context(), rules.Request{Descriptors: d})
		require.NoError(t, err)
		return v.Allowed, applied
	}
	user := entries("user", "42")
	allowed, _ := ask(rules.Descriptor{Entries: user, Cost: new(int64(3))})
	require.True(t, allowed)
	require.Equal(t, []int64{4, 7, 0, 7}, left("user", "42"), "all, user, try and spend")

	allowed, applied := ask(rules.Descriptor{Entries: user, Cost: new(int64(2)), GiveBack: true})
	require.True(t, allowed)
	require.Equal(t, int64(4), applied[0].Cost, "a factor counts")
	require.Equal(t, int64(8), applied[0].Levels[0].Remaining, "they are told what is left afterwards")
	require.Equal(t, []int64{8, 9, 2, 9}, left("user", "42"))

	allowed, _ = ask(rules.Descriptor{Entries: user, Cost: new(int64(1)), GiveBack: true}, rules.Descriptor{Entries: entries("other", "x"), Cost: new(int64(3))})
	require.False(t, allowed)
	require.Equal(t, []int64{8, 9, 2, 9}, left("user", "42"), "nothing is given back by a request that is denied")

	allowed, _ = ask(rules.Descriptor{Entries: user, Cost: new(int64(100)), GiveBack: true}, rules.Descriptor{Entries: user, Cost: new(int64(1))})
	require.True(t, allowed)
	require.Equal(t, []int64{10, 10, 3, 10}, left("user", "42"), "first it takes, and then no bucket is more than full")

	v, _, err := e.Decide(t.Context(), rules.Request{Mode: rules.Peek, Descriptors: []rules.Descriptor{{Entries: user, GiveBack: true}}})
	require.NoError(t, err)
	require.True(t, v.Allowed)
	require.Equal(t, []int64{10, 10, 3, 10}, left("user", "42"))
}

func TestWhatGivesBackReplacesNoRuleOfWhatAsks(t *testing.T) {
	t.Parallel()
	e := engine(t, "rules:\n- {name: api, when: {path: /api}, per: user, limits: [3/1h]}\n- {name: gold, when: {plan: gold}, per: user, limits: [100/1h], replaces: api}\n")
	api := rules.Descriptor{Entries: entries("path", "/api", "user", "42")}
	gold := rules.Descriptor{Entries: entries("plan", "gold", "user", "9"), Cost: new(int64(0))}
	goldBack, apiBack := gold, api
	goldBack.GiveBack, apiBack.GiveBack = true, true
	for _, test := range []struct {
		why  string
		d    []rules.Descriptor
		want []string
	}{
		{"it asks", []rules.Descriptor{api, gold}, []string{"gold"}},
		{"it gives back", []rules.Descriptor{api, goldBack}, []string{"api", "gold"}},
		{"it gives back, first", []rules.Descriptor{goldBack, api}, []string{"gold", "api"}},
		{"both give back what both would have asked", []rules.Descriptor{apiBack, goldBack}, []string{"gold"}},
		{"what asks replaces a rule that would get something back", []rules.Descriptor{apiBack, gold}, []string{"gold"}},
	} {
		_, applied, err := e.Decide(t.Context(), rules.Request{Mode: rules.Peek, Descriptors: test.d})
		require.NoError(t, err)
		var got []string
		for _, a := range applied {
			got = append(got, a.Rule.ID)
		}
		assert.Equal(t, test.want, got, test.why)
	}
}
