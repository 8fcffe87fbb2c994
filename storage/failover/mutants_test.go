package failover_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// This tests the tests: if the code that keeps a rule of the protocol is taken out, a test named after a rule fails.
func TestWithoutOneOfTheRulesATestFails(t *testing.T) {
	t.Parallel()
	for _, m := range []struct{ rule, file, code, mutant string }{
		{"2, the ledger is charged", "flush.go", "amounts[i] = e.buckets[i].left(now)", ""},
		{"2, once", "flush.go", "s.flusher.origin, s.flusher.seq,", `s.flusher.origin, law.Monotonic(),`},
		{"3, Redis is raised where the ledger knows more", "flush.go", "if (raise || !e.clocked) && e.behind(", "if raise && e.behind("},
		{"4, what is pending is charged before Postgres decides", "decide.go", "if err := s.settle(ctx, key{r.Name, p.Identifier}); err != nil {", "if err := error(nil); err != nil && p.Rules == nil {"},
		{"7, what Redis may have missed is read first", "decide.go", "late, err = s.readThrough(ctx, r, read)", "err = nil"},
		{"8, the ledger is charged what Redis was charged", "charge.go", "s.journal.charged(c)", ""},
		{"10, Close writes what is pending", "failover.go", "written <- s.flushRest(ctx)", "written <- nil"},
	} {
		t.Run(m.rule, func(t *testing.T) {
			source, err := os.ReadFile(m.file)
			require.NoError(t, err)
			mutant := strings.Replace(string(source), m.code, m.mutant, 1)
			require.NotEqual(t, string(source), mutant, "the code has changed, and the mutant has not")
			changed := filepath.Join(t.TempDir(), m.file)
			require.NoError(t, os.WriteFile(changed, []byte(mutant), 0o600))
			here, err := filepath.Abs(m.file)
			require.NoError(t, err)
			overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{here: changed}})
			require.NoError(t, err)
			list := filepath.Join(t.TempDir(), "overlay.json")
			require.NoError(t, os.WriteFile(list, overlay, 0o600))
			test := exec.CommandContext(t.Context(), "go", "test", "-overlay", list, "-count=1", "-timeout=100s", "-run", "^TestRule", ".")
			out, err := test.CombinedOutput()
			assert.Error(t, err)
			assert.Contains(t, string(out), "--- FAIL", "it does not compile")
		})
	}
}
