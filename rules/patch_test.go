package rules_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/rules"
)

const unpatched = `# The rules of the API.
domain: api # whose

rules:
  # the first
  - name: api # named
    when: {path: /api/*, plan: "1"} # both
    per: [user]
    limits: [5/10s, 100/1h sliding]   # two
    shadow: true

  - {name: health, when: {path: /health}, unlimited: true} # no limit
  - name: base
    when: &w
      path: /x
    limits: 1/1s
  - name: like-base
    when: *w
    limits: [1/1s]
# the end
---
domain: other
rules:
  - name: health
    limits:
      - 1/1s # one
`

func TestAPatchChangesWhatItSaysAndNothingElse(t *testing.T) {
	t.Parallel()
	f, err := rules.Patch(rules.File{Name: "a.yaml", Data: []byte(unpatched)}, []byte(`{"rules": [
		{"name": "api", "when": {"plan": null, "method": "7"}, "limits": ["10/1s"], "shadow": null, "per": null, "metadata": {"a": {"b": 1, "c": null}}},
		{"name": "like-base", "unknown": null}]}`))
	require.ErrorContains(t, err, `the patch:3:3: the rule "like-base" has anchors, aliases or << in line 17`)
	require.Empty(t, f)

	f, err = rules.Patch(rules.File{Name: "a.yaml", Data: []byte(unpatched)}, []byte(`{"domain": "api", "rules": [
		{"name": "api", "when": {"plan": null, "method": "7"}, "limits": ["10/1s"], "shadow": null, "per": null, "metadata": {"a": {"b": 1, "c": null}}},
		{"name": "health", "unlimited": null, "limits": ["1/1h"]}]}`))
	require.NoError(t, err)
	assert.Equal(t, `# The rules of the API.
domain: api # whose
rules:
  # the first
  - name: api # named
    when: {path: /api/*, method: '7'} # both
    limits: [10/1s] # two
    metadata:
      a:
        b: 1
  - {name: health, when: {path: /health}, limits: [1/1h]} # no limit
  - name: base
    when: &w
      path: /x
    limits: 1/1s
  - name: like-base
    when: *w
    limits: [1/1s]

# the end
---
domain: other
rules:
  - name: health
    limits:
      - 1/1s # one
`, string(f.Data))
	_, err = rules.Compile(f)
	require.NoError(t, err)

	again, err := rules.Patch(f, []byte(`{"domain": "other", "rules": [{"name": "health", "limits": ["2/1s"]}]}`))
	require.NoError(t, err)
	assert.Contains(t, string(again.Data), "      - 2/1s\n")
	assert.NotEqual(t, f.ETag(), again.ETag())
}

func TestAPatchOfJSONIsJSON(t *testing.T) {
	t.Parallel()
	f, err := rules.Patch(rules.File{Name: "a.json", Data: []byte(`{"rules":[{"name":"a<b","limits":["1/1s"],"cost":2},{"name":"c","unlimited":true}]}`)},
		[]byte(`{"rules":[{"name":"a<b","limits":["2/1s","3/1h"],"cost":null,"metadata":{}}]}`))
	require.NoError(t, err)
	require.JSONEq(t, `{"rules":[{"name":"a<b","limits":["2/1s","3/1h"],"metadata":{}},{"name":"c","unlimited":true}]}`, string(f.Data))
	require.Contains(t, string(f.Data), `"a<b"`)
	_, err = rules.Compile(f)
	require.NoError(t, err)
}

func TestAPatchThatIsWrongSaysWhy(t *testing.T) {
	t.Parallel()
	for patch, says := range map[string]string{
		``:                                "the patch:1:1: is not JSON",
		`rules: []`:                       "is not JSON",
		`[]`:                              "must be a mapping",
		`{}`:                              `no "rules"`,
		`{"rules":[]}`:                    `no "rules"`,
		`{"rules":[1]}`:                   "must be a mapping",
		`{"rule":[{"name":"api"}]}`:       `did you mean "rules"?`,
		`{"rules":[{"limits":["1/1s"]}]}`: "has no name",
		`{"rules":[{"name":"apy"}]}`:      `the patch:1:11: the file has no rule "apy": did you mean "api"?`,
		`{"rules":[{"name":"health"}]}`:   "say the domain",
		`{"domain":"x","rules":[{"name":"api"}]}`: `no rule "api"`,
	} {
		_, err := rules.Patch(rules.File{Name: "a.yaml", Data: []byte(unpatched)}, []byte(patch))
		var faults rules.Faults
		require.ErrorAs(t, err, &faults, patch)
		require.ErrorContains(t, err, says, patch)
	}
	_, err := rules.Patch(rules.File{Name: "a.yaml", Data: []byte("rules: [")}, []byte(`{"rules":[{"name":"a"}]}`))
	require.ErrorContains(t, err, "a.yaml:2")
	_, err = rules.Patch(rules.File{Name: "e.yaml", Data: []byte("domain: x\ndescriptors: [{key: a}]\n")}, []byte(`{"rules":[{"name":"a"}]}`))
	require.ErrorContains(t, err, `no rule "a"`)
}

func TestARuleThatMergesAMappingOfItsOwnIsNotPatched(t *testing.T) {
	t.Parallel()
	f := rules.File{Name: "a.yaml", Data: []byte("rules:\n  - name: a\n    limits: [5/10s]\n    when: {<<: {plan: free}, path: /x}\n")}
	_, err := rules.Patch(f, []byte(`{"rules":[{"name":"a","when":{"plan":null}}]}`))
	require.ErrorContains(t, err, `the rule "a" has anchors, aliases or << in line 2`)
	f.Data = []byte("rules:\n  - name: a\n    limits: [5/10s]\n    when: {\"<<\": free}\n")
	_, err = rules.Patch(f, []byte(`{"rules":[{"name":"a","when":{"<<":"gold"}}]}`))
	require.NoError(t, err, "a word in quotes merges nothing")
}

func TestAWordThatStandsTwiceInAPatchIsAFault(t *testing.T) {
	t.Parallel()
	f := rules.File{Name: "a.yaml", Data: []byte("rules:\n  - name: a\n    limits: [5/10s]\n")}
	for patch, fault := range map[string]string{
		`{"rules":[{"name":"a","when":{"plan":"x","plan":"y"}}]}`:            `the patch:1:42: "plan" stands here twice, before in line 1`,
		`{"rules":[{"name":"a","metadata":{"x":[{"y":1,"y":2}],"z":null}}]}`: `the patch:1:47: "y" stands here twice, before in line 1`,
		`{"rules":[{"name":"a","shadow":true,"shadow":false}]}`:              `the patch:1:37: "shadow" stands here twice, before in line 1`,
	} {
		_, err := rules.Patch(f, []byte(patch))
		require.EqualError(t, err, fault)
	}
}
