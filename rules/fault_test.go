package rules_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/rules"
)

// TestEveryFaultHasItsPlace reads testdata/faults: files whose comments "# ^ words" point at what is wrong in the line
// above, and say a part of the fault.
func TestEveryFaultHasItsPlace(t *testing.T) {
	t.Parallel()
	names, err := filepath.Glob("testdata/faults/*.yaml")
	require.NoError(t, err)
	require.NotEmpty(t, names)
	for _, name := range names {
		data, err := os.ReadFile(name)
		require.NoError(t, err)
		_, err = rules.Parse(name, data)
		var faults rules.Faults
		require.ErrorAs(t, err, &faults, name)
		line := 0
		for i, text := range strings.Split(string(data), "\n") {
			before, want, ok := strings.Cut(text, "^ ")
			if !ok || !strings.HasPrefix(strings.TrimSpace(before), "#") {
				line = i + 1
				continue
			}
			if assert.NotEmpty(t, faults, "%s:%d: %s", name, line, want) {
				assert.Equal(t, name, faults[0].File)
				assert.Equal(t, line, faults[0].Line, faults[0])
				assert.Equal(t, len(before)+1, faults[0].Column, faults[0])
				assert.Contains(t, faults[0].Error(), want)
				faults = faults[1:]
			}
		}
		assert.Empty(t, faults, name)
	}
}

func TestAFaultOfJSONHasItsPlace(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"{\n \"rules\": [\n  {\"nam\": \"é\", \"limits\": [\"5/10s\"]}\n ]\n}": "x.json:3:3: the rule has no name\nx.json:3:4: \"nam\" is no word of a rule",
		"{\"rules\": [{\"name\": \"é\", \"limits\": \"5\"}]}":                  "x.json:1:21: name is \"é\"",
		"{\"rules\": [1, ]}":                  "x.json:1:15: is not JSON",
		"{\"rules\": [":                       "x.json:1:12: is not JSON: it ends too early",
		"{\"rules\": []} {}":                  "is not JSON: more follows",
		"":                                    "is not JSON: it ends too early",
		"[]":                                  "x.json:1:1: a file is a list, must be a mapping",
		"{\"rules\": null}":                   "x.json:1:11: rules is empty, must be a list",
		"{\"a\": 1, \"rules\": [], \"a\": 2}": `x.json:1:23: "a" stands here twice`,
		strings.Repeat("[", 100_000):          "it has over 64 levels",
		`{"domain": 7, "rules": [{"name": true}], }`: "is not JSON",
	} {
		_, err := rules.Parse("x.json", []byte(text))
		require.ErrorContains(t, err, want, "%.100s", text)
	}
}

func TestAFileThatIsNotUTF8IsAFaultWithItsPlace(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"rules: []\n# J\xfcrgen":                                  "2:4: is not UTF-8",
		"{\"rules\": [\n], \"metadata\": {\"é\": \"J\xfcrgen\"}}": "2:24: is not UTF-8",
		"\xff\xfer\x00u\x00l\x00e\x00s\x00:\x00[\x00]\x00":        "1:1: is not UTF-8",
		"rules: []\n#\x00":                                        "2:2: has a NUL",
		"{\"rules\": [], \"$schema\": \"\x00\"}":                  "1:27: has a NUL",
	} {
		_, err := rules.Parse("", []byte(text))
		require.ErrorContains(t, err, want, "%q", text)
	}
	_, err := rules.Patch(rules.File{Name: "a", Data: []byte("rules: [{name: a, limits: 1/1s}]")}, []byte("{\"rules\": [{\"name\": \"a\", \"metadata\": {\"who\": \"J\xfcrgen\"}}]}"))
	require.ErrorContains(t, err, "the patch:1:48: is not UTF-8")
}

func TestYAMLAndJSONSayTheSame(t *testing.T) {
	t.Parallel()
	yaml, err := rules.Parse("a", []byte("domain: d\nrules: [{name: a, when: {n: [1, yes, 1.5]}, limits: 5/10s, cost: 2, unlimited: no, metadata: {x: [1]}}]"))
	require.NoError(t, err)
	for _, name := range []string{"a", "a.json"} {
		json, err := rules.Parse(name, []byte(`{"domain": "d", "rules": [{"name": "a", "when": {"n": [1, "yes", 1.5]}, "limits": "5/10s", "cost": 2, "unlimited": false, "metadata": {"x": [1]}}]}`))
		require.NoError(t, err)
		for _, set := range []*rules.Set{yaml, json} {
			for _, value := range []string{"1", "yes", "1.5"} {
				assert.Len(t, set.Match("d", entries("n", value)), 1, value)
			}
			assert.Empty(t, set.Match("d", entries("n", "true")))
			assert.Equal(t, map[string]any{"x": []any{1}}, set.Rules()[0].Metadata)
		}
	}
}

func TestFaultsAreDataToo(t *testing.T) {
	t.Parallel()
	_, err := rules.Compile(rules.File{Name: "b.yaml", Data: []byte("rules: [{name: x, limit: 5/10s}]")}, rules.File{Name: "a.yaml"})
	var faults rules.Faults
	require.ErrorAs(t, err, &faults)
	text, err := json.Marshal(faults)
	require.NoError(t, err)
	assert.JSONEq(t, `[
		{"file": "b.yaml", "line": 1, "column": 9, "problem": "the rule has no limits, and is not unlimited"},
		{"file": "b.yaml", "line": 1, "column": 19, "problem": "\"limit\" is no word of a rule, which are name, when, per, limits, unlimited, replaces, cost, shadow, mode, metadata, path, descriptors", "meant": "limits"},
		{"file": "a.yaml", "line": 0, "column": 0, "problem": "has no rules: it is empty"}
	]`, string(text))
}

func TestAliasesAndMergesAreRead(t *testing.T) {
	t.Parallel()
	set, err := rules.Parse("", []byte(`
rules:
  - &a {name: a, when: {path: /a}, limits: &l [5/10s]}
  - {<<: *a, name: b, when: {path: /b}}
  - {<<: [{name: c}, *a], limits: *l}
`))
	require.NoError(t, err)
	assert.Equal(t, []string{"a", "c"}, ids(set.Match("", entries("path", "/a"))))
	assert.Equal(t, []string{"b"}, ids(set.Match("", entries("path", "/b"))))
}

func TestTheFaultsOfAFileAreBounded(t *testing.T) {
	t.Parallel()
	_, err := rules.Parse("a.yaml", []byte("rules:\n"+strings.Repeat("- {}\n", 50_000)))
	var faults rules.Faults
	require.ErrorAs(t, err, &faults)
	assert.Len(t, faults, 1001)
	assert.Contains(t, faults[1000].Problem, "more than 1000 faults")
}

func TestAFileThatIsEndlessEnds(t *testing.T) {
	t.Parallel()
	bomb := "a: &a0 [" + strings.Repeat("x, ", 10) + "]\n"
	for i := range 9 {
		bomb += strings.ReplaceAll("b#: &a"+string(rune('1'+i))+" ["+strings.Repeat("*a"+string(rune('0'+i))+", ", 10)+"]\n", "#", string(rune('0'+i)))
	}
	for _, text := range []string{
		"rules: &x [*x]",
		"&x {<<: *x}",
		"domain: d\ndescriptors: &x [{key: a, descriptors: *x}]",
		"domain: d\ndescriptors: &x [{key: a, descriptors: *x}, {key: b, descriptors: *x}, {key: c, descriptors: *x}]",
		strings.Repeat("a: [", 50_000),
		strings.Repeat("[", 50_000),
		bomb + "rules: [{name: x, when: {k: *a9}, limits: [5/10s]}]",
	} {
		_, err := rules.Parse("", []byte(text))
		require.Error(t, err, "%.50s", text)
	}
}
