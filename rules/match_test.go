package rules_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/rules"
)

// many returns files larger than anybody is likely to have, and a request that some of their rules match.
func many(tb testing.TB) map[string]struct {
	set     *rules.Set
	entries []rules.Entry
	matches int
} {
	tb.Helper()
	var native, paths, tree strings.Builder
	native.WriteString("rules:\n")
	paths.WriteString("rules:\n")
	tree.WriteString("domain: default\ndescriptors:\n")
	for i := range 10_000 {
		switch {
		case i%2 == 0 && i >= 2:
			fmt.Fprintf(&native, "- {name: r%d, when: {path: /api/v%d/*, method: [GET, POST]}, per: [user], limits: [5/10s]}\n", i, i)
		case i%2 == 1 && i >= 3:
			fmt.Fprintf(&native, "- {name: r%d, when: {tenant: t%d, plan: free}, per: [user], limits: [5/10s]}\n", i, i)
		default:
			fmt.Fprintf(&native, "- {name: r%d, per: [user], limits: [5/10s]}\n", i)
		}
		if i < 5000 {
			fmt.Fprintf(&paths, "- {name: r%d, when: {path: /api/v%d/*/items/*}, per: [user], limits: [5/10s]}\n", i, i)
		}
		fmt.Fprintf(&tree, "- {key: tenant, value: t%d, descriptors: [{key: user, rate_limit: {unit: minute, requests_per_unit: 5}}]}\n", i)
	}
	request := []rules.Entry{{"path", "/api/v4712/users/items/7"}, {"method", "GET"}, {"user", "42"}, {"tenant", "t4711"}, {"plan", "free"}}
	out := map[string]struct {
		set     *rules.Set
		entries []rules.Entry
		matches int
	}{}
	for name, text := range map[string]string{"10000Rules": native.String(), "5000Paths": paths.String(), "10000Descriptors": tree.String()} {
		set, err := rules.Parse(name, []byte(text))
		require.NoError(tb, err)
		test := out[name]
		test.set, test.entries, test.matches = set, request, 4
		if name != "10000Rules" {
			test.matches = 1
		}
		if name == "10000Descriptors" {
			test.entries = []rules.Entry{{"tenant", "t4711"}, {"user", "42"}}
		}
		out[name] = test
	}
	return out
}

func TestMatchingAllocatesNothing(t *testing.T) { //nolint:paralleltest // it counts allocations
	for name, test := range many(t) {
		dst := make([]*rules.Rule, 0, 16)
		require.Len(t, test.set.AppendMatch(dst, "", test.entries), min(test.matches, 4), name)
		assert.Zero(t, testing.AllocsPerRun(100, func() { dst = test.set.AppendMatch(dst[:0], "", test.entries) }), name)
	}
}

func BenchmarkMatch(b *testing.B) {
	for name, test := range many(b) {
		b.Run(name, func(b *testing.B) {
			dst := make([]*rules.Rule, 0, 16)
			b.ReportAllocs()
			for b.Loop() {
				dst = test.set.AppendMatch(dst[:0], "", test.entries)
			}
		})
	}
}

func BenchmarkParse(b *testing.B) {
	var text strings.Builder
	text.WriteString("rules:\n")
	for i := range 10_000 {
		fmt.Fprintf(&text, "- {name: r%d, when: {path: /api/v%d/*, method: [GET, POST]}, per: [user], limits: [5/10s]}\n", i, i)
	}
	for b.Loop() {
		_, err := rules.Parse("", []byte(text.String()))
		require.NoError(b, err)
	}
}

// linear is a rule as written, and matches by checking each of its values in turn.
type linear struct {
	name string
	when [][2][]string // key, values
}

func (l linear) matches(entries []rules.Entry, addresses map[string]bool) bool {
	for _, w := range l.when {
		found := false
		for _, e := range entries {
			for _, value := range w[1] {
				found = found || e.Key == w[0][0] && fits(value, e.Value, addresses[e.Key])
			}
		}
		if !found {
			return false
		}
	}
	return true
}

// fits reports whether the pattern matches the value. It tries every way.
func fits(pattern, value string, address bool) bool {
	if address && pattern != "*" {
		a, err := netip.ParseAddr(value)
		if err != nil {
			return false
		}
		if p, err := netip.ParsePrefix(pattern); err == nil {
			return p.Contains(a)
		}
		return pattern == a.String()
	}
	first, rest, star := strings.Cut(pattern, "*")
	if !star {
		return pattern == value
	}
	if !strings.HasPrefix(value, first) {
		return false
	}
	for i := len(first); i <= len(value); i++ {
		if fits(rest, value[i:], false) {
			return true
		}
	}
	return false
}

// random returns rules and requests made of few words, so that they often match.
type random struct{ *rand.Rand }

func (r random) text(letters string, n int) string {
	out := make([]byte, r.IntN(n))
	for i := range out {
		out[i] = letters[r.IntN(len(letters))]
	}
	return string(out)
}

func (r random) value(key, letters string) string {
	if key == "address" {
		return fmt.Sprintf("10.%d.0.%d", r.IntN(2), r.IntN(3))
	}
	return r.text(letters, 5)
}

func (r random) rule(i int) linear {
	l := linear{name: fmt.Sprint("r", i)}
	for _, key := range []string{"a", "b", "address"} {
		var values []string
		for range r.IntN(4) - 1 {
			value := r.value(key, "xy*")
			if key == "address" && r.IntN(2) == 0 {
				value = netip.MustParsePrefix(value + fmt.Sprint("/", 7+r.IntN(26))).Masked().String()
			}
			values = append(values, value)
		}
		if values != nil {
			l.when = append(l.when, [2][]string{{key}, values})
		}
	}
	return l
}

func TestMatchingFindsWhatALinearSearchFinds(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		r := random{rand.New(rand.NewPCG(seed, 1))}
		var text strings.Builder
		text.WriteString("addresses: [address]\nrules:\n")
		var all []linear
		for i := range 1 + r.IntN(30) {
			l := r.rule(i)
			all = append(all, l)
			fmt.Fprintf(&text, "- {name: %s, limits: [1/1s], when: {", l.name)
			for _, w := range l.when {
				fmt.Fprintf(&text, "%s: [", w[0][0])
				for _, value := range w[1] {
					fmt.Fprintf(&text, "%q, ", value)
				}
				text.WriteString("], ")
			}
			text.WriteString("}}\n")
		}
		set, err := rules.Parse("", []byte(text.String()))
		require.NoError(t, err, text.String())
		for range 50 {
			var request []rules.Entry
			for range r.IntN(5) {
				key := []string{"a", "b", "address", "c"}[r.IntN(4)]
				request = append(request, rules.Entry{Key: key, Value: r.value(key, "xy")})
			}
			var want []string
			for _, l := range all {
				if l.matches(request, map[string]bool{"address": true}) {
					want = append(want, l.name)
				}
			}
			require.Equal(t, want, ids(set.Match("", request)), "seed %d: %q of\n%s", seed, request, text.String())
		}
	}
}
