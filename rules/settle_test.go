package rules_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/rules"
)

const settled = `
rules:
- {name: calls, per: user, limits: [10/1h]}
- {name: units, per: user, cost: 10, limits: [1000/1h, 2000/2h sliding]}
- {name: tokens, per: user, cost: tokens, limits: [100/1h continuous]}
- {name: spend, per: user, cost: 2, mode: charge, limits: [100/1h]}
- {name: try, per: user, shadow: true, limits: [100/1h]}
`

// settling makes a request of the cost 4 and 60 tokens, settles it, and returns what is left of each bucket.
func settling(t *testing.T, real rules.Descriptor) ([]int64, error) {
	t.Helper()
	e := engine(t, settled)
	v, applied, err := e.Decide(t.Context(), rules.Request{Cost: new(int64(4)), Entries: entries("user", "42", "tokens", "60")})
	require.NoError(t, err)
	require.True(t, v.Allowed)
	failed := e.Settle(t.Context(), v, applied, real)
	_, applied, err = e.Decide(t.Context(), rules.Request{Mode: rules.Peek, Cost: new(int64(0)), Entries: entries("user", "42", "tokens", "0")})
	require.NoError(t, err)
	var left []int64
	for _, a := range applied {
		for _, l := range a.Levels {
			left = append(left, l.Remaining-l.Debt)
		}
	}
	return left, failed
}

func TestSettlingMakesACostTheRealOne(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		why  string
		real rules.Descriptor
		left []int64 // of calls, units (two), tokens, spend and try
	}{
		{"it was right", rules.Descriptor{Cost: new(int64(4))}, []int64{6, 960, 1960, 40, 92, 96}},
		{"it was less, and factors count", rules.Descriptor{Cost: new(int64(1))}, []int64{9, 990, 1990, 40, 92, 96}},
		{"it was nothing", rules.Descriptor{Cost: new(int64(0))}, []int64{10, 1000, 2000, 40, 92, 96}},
		{"it was more, which leaves a debt", rules.Descriptor{Cost: new(int64(12))}, []int64{-2, 880, 1880, 40, 92, 96}},
		{"an entry is the cost of its rule only", rules.Descriptor{Entries: entries("tokens", "25")}, []int64{6, 960, 1960, 75, 92, 96}},
		{"both", rules.Descriptor{Cost: new(int64(3)), Entries: entries("tokens", "110")}, []int64{7, 970, 1970, -10, 92, 96}},
	} {
		left, err := settling(t, test.real)
		require.NoError(t, err, test.why)
		assert.Equal(t, test.left, left, test.why)
	}
}

func TestSettlingRefusesWhatNoRuleAsksFor(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		real rules.Descriptor
		says string
	}{
		{rules.Descriptor{Cost: new(int64(-1))}, "must be 0 or more"},
		{rules.Descriptor{Cost: new(int64(1)), Entries: entries("user", "7")}, `"user" is the cost of no rule`},
		{rules.Descriptor{Cost: new(int64(1)), Entries: entries("tokens", "many")}, `"many", must be a whole number`},
	} {
		left, err := settling(t, test.real)
		require.ErrorIs(t, err, throttler.ErrInvalidCost)
		require.ErrorContains(t, err, test.says)
		assert.Equal(t, []int64{6, 960, 1960, 40, 92, 96}, left, "nothing has changed")
	}
	e := engine(t, "rules: [{name: tokens, cost: tokens, limits: [100/1h]}]\n")
	v, applied, err := e.Decide(t.Context(), rules.Request{Entries: entries("tokens", "60")})
	require.NoError(t, err)
	require.ErrorContains(t, e.Settle(t.Context(), v, applied, rules.Descriptor{Cost: new(int64(5))}), "from an entry")

	v, applied, err = e.Decide(t.Context(), rules.Request{Descriptors: []rules.Descriptor{{Cost: new(int64(2))}, {Cost: new(int64(3))}}})
	require.NoError(t, err)
	require.ErrorContains(t, e.Settle(t.Context(), v, applied, rules.Descriptor{Cost: new(int64(1))}), "several descriptors")
}

func TestALimitOfOneNameInTwoRulesGetsTheLeastBack(t *testing.T) {
	t.Parallel()
	e := engine(t, "rules: [{name: a, limits: [100/1h named x]}, {name: b, cost: 10, limits: [1000/1h named x]}]\n")
	v, applied, err := e.Decide(t.Context(), rules.Request{Cost: new(int64(9))})
	require.NoError(t, err)
	require.NoError(t, e.Settle(t.Context(), v, applied, rules.Descriptor{Cost: new(int64(4))}))
	_, applied, err = e.Decide(t.Context(), rules.Request{Mode: rules.Peek, Cost: new(int64(0))})
	require.NoError(t, err)
	assert.Equal(t, int64(96), applied[0].Levels[0].Remaining)
	assert.Equal(t, int64(915), applied[1].Levels[0].Remaining, "never more than is due to either")
}
