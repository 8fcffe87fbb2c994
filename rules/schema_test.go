package rules_test

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v4"

	"github.com/go-throttler/throttler/rules"
)

// schema validates values by those words of JSON Schema that rules.schema.json uses. Any other word fails the test.
type schema struct {
	t    *testing.T
	root map[string]any
}

func (s schema) fits(by, v any) bool {
	for word, arg := range by.(map[string]any) {
		if !s.word(by.(map[string]any), word, arg, v) {
			return false
		}
	}
	return true
}

func (s schema) word(by map[string]any, word string, arg, v any) bool {
	object, _ := v.(map[string]any)
	list, _ := v.([]any)
	text, isText := v.(string)
	number, isNumber := v.(float64)
	switch word {
	case "$schema", "$id", "title", "$defs", "description", "then", "else":
		return true // "if" handles the last two
	case "$ref":
		return s.fits(s.root["$defs"].(map[string]any)[strings.TrimPrefix(arg.(string), "#/$defs/")], v)
	case "if":
		if s.fits(arg, v) {
			return s.fits(by["then"], v)
		}
		return s.fits(by["else"], v)
	case "type":
		types, ok := arg.([]any)
		return slices.ContainsFunc(append(types, arg), func(t any) bool { return is(t, v) }) && (ok || is(arg, v))
	case "enum":
		return slices.ContainsFunc(arg.([]any), func(e any) bool { return reflect.DeepEqual(e, v) })
	case "anyOf":
		return slices.ContainsFunc(arg.([]any), func(o any) bool { return s.fits(o, v) })
	case "required":
		return !slices.ContainsFunc(arg.([]any), func(k any) bool { _, has := object[k.(string)]; return !has }) || object == nil
	case "properties":
		known := arg.(map[string]any)
		return s.properties(object, func(k string) any { return known[k] })
	case "additionalProperties":
		known, _ := by["properties"].(map[string]any)
		return s.properties(object, func(k string) any {
			if known[k] != nil {
				return nil
			}
			return arg
		})
	case "items":
		return !slices.ContainsFunc(list, func(e any) bool { return !s.fits(arg, e) })
	case "minItems":
		return list == nil || len(list) >= int(arg.(float64))
	case "maxItems":
		return len(list) <= int(arg.(float64))
	case "minLength":
		return !isText || utf8.RuneCountInString(text) >= int(arg.(float64))
	case "maxLength":
		return utf8.RuneCountInString(text) <= int(arg.(float64))
	case "minimum":
		return !isNumber || number >= arg.(float64)
	case "pattern":
		return !isText || regexp.MustCompile(arg.(string)).MatchString(text)
	}
	s.t.Fatalf("the test does not know %q", word)
	return false
}

// properties reports whether each value of the object fits its schema: nil accepts any value, and false accepts none.
func (s schema) properties(object map[string]any, by func(string) any) bool {
	for k, v := range object {
		if asked := by(k); asked == false || asked != nil && !s.fits(asked, v) {
			return false
		}
	}
	return true
}

func is(t, v any) bool {
	switch v := v.(type) {
	case nil:
		return t == "null"
	case map[string]any:
		return t == "object"
	case []any:
		return t == "array"
	case string:
		return t == "string"
	case bool:
		return t == "boolean"
	case float64:
		return t == "number" || t == "integer" && v == math.Trunc(v)
	}
	return false
}

// judged returns what the schema says about YAML.
func judged(t *testing.T, text string) bool {
	t.Helper()
	s := schema{t: t}
	require.NoError(t, json.Unmarshal([]byte(rules.Schema()), &s.root))
	var v any
	require.NoError(t, yaml.Unmarshal([]byte(text), &v))
	data, err := json.Marshal(v)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(data, &v))
	return s.fits(s.root, v)
}

func TestTheSchemaAllowsWhatTheParserReads(t *testing.T) {
	t.Parallel()
	texts := []string{native, envoy, "domain: d\ndescriptors:", "domain: 7\nrules: [{name: 7, limits: 5/1s}]"}
	examples, err := filepath.Glob("../examples/rules/*")
	require.NoError(t, err)
	require.NotEmpty(t, examples)
	for _, name := range examples {
		data, err := os.ReadFile(name)
		require.NoError(t, err)
		texts = append(texts, string(data))
	}
	for _, text := range texts {
		_, err := rules.Parse("", []byte(text))
		require.NoError(t, err, text)
		assert.True(t, judged(t, text), text)
	}
}

// TestTheSchemaKnowsTheWordsOfTheParser misspells each word and gives each value another type. The schema must find
// whatever the parser finds.
func TestTheSchemaKnowsTheWordsOfTheParser(t *testing.T) {
	t.Parallel()
	whole := []string{
		"domain: d\naddresses: [a]\nrules: [{name: n, when: {k: [v]}, per: [k], limits: [5/10s], replaces: [\"*\"], cost: 2, mode: charge, metadata: {}}, {name: s, limits: [5/1s], shadow: true}, {name: u, unlimited: true}]",
		"rules: [{name: n, path: p, descriptors: [{key: k, value: v, unit: day, requests_per_unit: 5}]}]",
		"domain: d\ndescriptors: [{key: k, value: v*, shadow_mode: true, quota_mode: true, detailed_metric: true, value_to_metric: true, share_threshold: true, metadata: {}, mode: consume, descriptors: [{key: k, rate_limit: {unit: day, requests_per_unit: 5, name: n, replaces: [{name: m}], algorithm: continuous, burst: 7}}, {key: l, rate_limits: [5/10s, {unlimited: false, unit: day}]}]}]",
	}
	words := regexp.MustCompile(`([a-z_]+): `)
	tried := 0
	for _, text := range whole {
		_, err := rules.Parse("", []byte(text))
		require.NoError(t, err)
		require.True(t, judged(t, text), text)
		for _, at := range words.FindAllStringSubmatchIndex(text, -1) {
			word := text[at[2]:at[3]]
			if word == "k" { // in when, any word is a key
				continue
			}
			wrong := text[:at[3]] + "x" + text[at[3]:]
			_, err := rules.Parse("", []byte(wrong))
			require.Error(t, err, wrong)
			assert.False(t, judged(t, wrong), wrong)
			tried++
		}
	}
	assert.Greater(t, tried, 40)
	for _, wrong := range []string{
		"17", "[]", "{}", "rules: 1", "rules: [1]", "rules: [{name: a}]", "rules: [{name: a, limits: []}]", "rules: [{name: a, limits: [5]}]", "rules: [{name: a, limits: [x]}]",
		"rules: [{name: \"\", limits: [5/1s]}]", "rules: [{name: a, limits: [5/1s], when: {a: []}}]", "rules: [{name: a, limits: [5/1s], when: [a]}]", "rules: [{name: a, limits: [5/1s], cost: -1}]",
		"rules: [{name: a, limits: [5/1s], shadow: maybe}]", "rules: [{name: a, limits: [5/1s], mode: change}]", "rules: [{name: a, limits: [5/1s], metadata: 1}]", "rules: [{name: a, limits: [5/1s], per: {a: b}}]", "domain: \"\"\nrules: []",
		"domain: d\ndescriptors: [{value: v}]", "domain: d\ndescriptors: [{key: k, rate_limit: {unit: days}}]", "descriptors: []", "domain: d\ndescriptors: [{key: k, rate_limit: {unit: day, burst: 0}}]",
		"domain: d\ndescriptors: [{key: k, rate_limit: {unit: day, algorithm: leaky}}]", "domain: d\ndescriptors: [{key: k, rate_limit: {unit: day, requests_per_unit: -1}}]", "domain: " + strings.Repeat("x", 256) + "\nrules: []",
	} {
		_, err := rules.Parse("", []byte(wrong))
		assert.Error(t, err, wrong)
		assert.False(t, judged(t, wrong), wrong)
	}
}
