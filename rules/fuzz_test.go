package rules_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/rules"
)

// FuzzParse checks that no file causes a panic, that each fault has a place in the file, and that rules without a fault
// can decide.
func FuzzParse(f *testing.F) {
	for _, pattern := range []string{"testdata/faults/*", "../examples/rules/*"} {
		names, err := filepath.Glob(pattern)
		require.NoError(f, err)
		for _, name := range names {
			data, err := os.ReadFile(name)
			require.NoError(f, err)
			f.Add(string(data), "/api/x")
		}
	}
	f.Add(native, "/api/x")
	f.Add(envoy, "/foo/a/bar")
	f.Add("rules: &x [*x]", "")
	f.Add("a: &a {<<: *a}", "")
	f.Add(`{"rules": [{"name": "a", "limits": "5/1s"}]}`, "")
	f.Fuzz(func(t *testing.T, text, path string) {
		for _, name := range []string{"a.yaml", "a.json"} {
			set, err := rules.Parse(name, []byte(text))
			var faults rules.Faults
			if errors.As(err, &faults) {
				lines := 2 + strings.Count(text, "\n") + strings.Count(text, "\r") + strings.Count(text, "\u0085") + strings.Count(text, "\u2028") + strings.Count(text, "\u2029")
				for _, fault := range faults {
					require.LessOrEqual(t, fault.Line, lines, fault)
					require.NotEmpty(t, fault.Problem)
				}
				continue
			}
			require.NoError(t, err)
			for _, r := range set.Rules() {
				_, err := throttler.New(throttler.Config{Buckets: r.Limits})
				require.NoError(t, err)
				set.Explain(r.Domain, entries("path", path, "user", "42"))
				set.Match(r.Domain, entries("path", path, "user", "42"))
			}
		}
	})
}

// FuzzMatch compares patterns with a matcher that tries everything.
func FuzzMatch(f *testing.F) {
	f.Add("/api/*/x*", "/api/a/xy")
	f.Add("*bot*", "a bot")
	f.Fuzz(func(t *testing.T, pattern, value string) {
		if len(pattern) > 12 || len(value) > 12 || strings.Trim(pattern, "*") == "" {
			return
		}
		if !utf8.ValidString(pattern) {
			return
		}
		quoted, err := json.Marshal(pattern)
		require.NoError(t, err)
		set, err := rules.Parse("a.json", []byte(`{"rules": [{"name": "a", "limits": "1/1s", "when": {"k": `+string(quoted)+`}}]}`))
		require.NoError(t, err)
		require.Equal(t, fits(pattern, value, false), len(set.Match("", entries("k", value))) == 1, "%q %q", pattern, value)
	})
}

// FuzzPatch patches what compiles. A patch that says nothing new changes no rule.
func FuzzPatch(f *testing.F) {
	f.Add(unpatched, "health", "other")
	f.Add(`{"rules":[{"name":"a<b","limits":["1/1s"],"cost":2,"metadata":{"a":[1,null,"x"]}}]}`, "a<b", "")
	f.Add("rules:\n- name: a\n  when: {k: 'x\n\n   y', \"\\u2028\": \"\\t\"}\n  limits: |-\n    1/1s\n", "a", "default")
	f.Fuzz(func(t *testing.T, text, name, domain string) {
		file := rules.File{Name: "a", Data: []byte(text)}
		before, err := rules.Compile(file)
		if err != nil || !utf8.ValidString(text) {
			return
		}
		patch := map[string]any{"rules": []any{map[string]any{"name": name}}}
		if domain != "" {
			patch["domain"] = domain
		}
		data, err := json.Marshal(patch)
		require.NoError(t, err)
		after, err := rules.Patch(file, data)
		if err != nil {
			require.ErrorAs(t, err, new(rules.Faults))
			return
		}
		set, err := rules.Compile(after)
		require.NoError(t, err, "%s", after.Data)
		was, is := before.Rules(), set.Rules()
		require.Len(t, is, len(was))
		for i := range was {
			require.Equal(t, was[i].ID, is[i].ID)
			require.Equal(t, was[i].Domain, is[i].Domain)
			require.Equal(t, was[i].Limits, is[i].Limits)
			require.Equal(t, was[i].Metadata, is[i].Metadata)
		}
	})
}
