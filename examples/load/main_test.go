package main

import (
	"context"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func server(t *testing.T) string {
	path := filepath.Join(t.TempDir(), "fastapi-like")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", path, "../fastapi-like").CombinedOutput()
	require.NoError(t, err, string(out))
	return path
}

// The figures are not checked here, since they depend on the machine, which tests share: `make demo-load FLAGS=-check` does
// that.
func TestTheDemonstrationShowsBothInALineASecond(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	require.NoError(t, run(t.Context(), []string{"-server", server(t), "-calm", "1s", "-for", "1s"}, &out))
	assert.Len(t, regexp.MustCompile(`(?m)^ +[1-3]( +\d+){4} +(\d+ ms|over 1 s)$`).FindAllString(out.String(), -1), 2*3, out.String())
	assert.Regexp(t, `(?m)^with -elastic( +\d+){2}( +(\d+ ms|over 1 s)){2}$`, out.String())
}

func TestTheDemonstrationEndsWithItsContext(t *testing.T) {
	t.Parallel()
	ctx, stop := context.WithTimeout(t.Context(), 3*time.Second)
	defer stop()
	require.Error(t, run(ctx, []string{"-server", server(t), "-calm", "1h"}, &strings.Builder{}))
}

func TestTheDemonstrationSaysWhyItCannotBegin(t *testing.T) {
	t.Parallel()
	require.ErrorContains(t, run(t.Context(), []string{"-calm", "1ms"}, &strings.Builder{}), "-calm 1ms")
	require.ErrorContains(t, run(t.Context(), []string{"-server", "/nowhere"}, &strings.Builder{}), "the server does not start")
	require.ErrorContains(t, run(t.Context(), []string{"-server", "/bin/echo"}, &strings.Builder{}), "not where it listens")
}

func TestTheCheckTellsWhatDidNotHelp(t *testing.T) {
	t.Parallel()
	without := result{[2]float64{20, 40}, 15 * time.Millisecond, patience}
	for want, r := range map[string]result{
		"":         {[2]float64{100, 50}, 15 * time.Millisecond, 149 * time.Millisecond},
		"10 times": {[2]float64{100, 50}, 15 * time.Millisecond, 150 * time.Millisecond},
		"95 users": {[2]float64{39, 50}, 15 * time.Millisecond, 100 * time.Millisecond},
	} {
		if err := r.helped(&without); want == "" {
			assert.NoError(t, err)
		} else {
			assert.ErrorContains(t, err, want)
		}
	}
	assert.ErrorContains(t, (&result{}).helped(&result{}), "no overload")
}
