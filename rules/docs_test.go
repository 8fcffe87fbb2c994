package rules_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/rules"
)

func blocks(t *testing.T, language string) (out []string) {
	t.Helper()
	page, err := os.ReadFile("../docs/rules.md")
	require.NoError(t, err)
	for _, b := range regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllStringSubmatch(string(page), -1) {
		out = append(out, b[1])
	}
	require.NotEmpty(t, out)
	return out
}

func TestTheFilesOfThePageAreRight(t *testing.T) {
	t.Parallel()
	for _, text := range blocks(t, "yaml") {
		_, err := rules.Parse("", []byte(text))
		require.NoError(t, err, text)
		assert.True(t, judged(t, text), text)
	}
}

func TestTheLimitsOfThePageAreRead(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../docs/rules.md")
	require.NoError(t, err)
	found := regexp.MustCompile("`([0-9]+/[^`]+)`").FindAllStringSubmatch(string(page), -1)
	require.Greater(t, len(found), 8)
	for _, words := range found {
		_, err := rules.Parse("", []byte("rules: [{name: a, limits: ["+words[1]+"]}]"))
		require.NoError(t, err, words[1])
	}
}

func TestTheFaultsOfThePageAreThoseOfAFile(t *testing.T) {
	t.Parallel()
	_, err := rules.Parse("rules.yaml", []byte("domain: api\nrules:\n  - name: api\n    limit: [5/10s]\n    replaces: [helth]\n  - {name: health, unlimited: true}\n"))
	require.Error(t, err)
	assert.Equal(t, strings.TrimSpace(blocks(t, "text")[0]), err.Error())
}

func TestTheCodeOfThePageIsThatOfTheExamples(t *testing.T) {
	t.Parallel()
	examples, err := os.ReadFile("example_test.go")
	require.NoError(t, err)
	for _, block := range blocks(t, "go") {
		assert.Contains(t, string(examples), regexp.MustCompile(`(?m)^(.)`).ReplaceAllString(block, "\t$1"))
	}
}
