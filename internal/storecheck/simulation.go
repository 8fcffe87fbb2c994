package storecheck

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Seeds returns the seeds of a simulation, from one up to but not including another: few of them, or as many as
// THROTTLER_SEEDS says, or only THROTTLER_SEED.
func Seeds(t testing.TB, few int) (from, to uint64) {
	t.Helper()
	if s := os.Getenv("THROTTLER_SEED"); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
		return seed, seed + 1
	}
	if n, err := strconv.Atoi(os.Getenv("THROTTLER_SEEDS")); err == nil {
		few = n
	}
	return 0, uint64(few)
}

// AssertKilled asserts that a mutant does not survive: in a file of the package, whose tests call it, it replaces code by a
// fault, and one of the tests that the regular expression names has to fail. It runs them by the go command, in the
// environment env beside its own.
func AssertKilled(t *testing.T, file, code, fault, tests string, env ...string) {
	t.Helper()
	source, err := os.ReadFile(file)
	require.NoError(t, err)
	mutant := strings.Replace(string(source), code, fault, 1)
	require.NotEqual(t, string(source), mutant, "the code has changed, and the mutant has not")
	changed := filepath.Join(t.TempDir(), file)
	require.NoError(t, os.WriteFile(changed, []byte(mutant), 0o600))
	here, err := filepath.Abs(file)
	require.NoError(t, err)
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{here: changed}})
	require.NoError(t, err)
	list := filepath.Join(t.TempDir(), "overlay.json")
	require.NoError(t, os.WriteFile(list, overlay, 0o600))
	test := exec.CommandContext(t.Context(), "go", "test", "-overlay", list, "-count=1", "-failfast", "-vet=off", "-ldflags=-s -w", "-timeout=100s", "-run", tests, ".")
	test.Env = append(os.Environ(), env...)
	out, err := test.CombinedOutput()
	assert.Error(t, err)
	assert.Contains(t, string(out), "--- FAIL", "it does not compile")
}
