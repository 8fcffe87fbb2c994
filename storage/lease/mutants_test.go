package lease_test

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

// The test checks the other tests. Each mutant removes one of the safeguards of the bound, and the simulation or a test of a
// single rule must fail.
func TestWithoutOneOfTheRulesATestFails(t *testing.T) {
	t.Parallel()
	for _, m := range []struct{ rule, file, code, mutant string }{
		{"1, a denial ends", "pool.go", "if now >= p.until {", "if p.until == 0 {"},
		{"2, a lease ends with its Lifetime", "flight.go", "end: sent + life,", "end: sent + 20*life,"},
		{"2, a lease ends before its tokens are back", "flight.go", "		l.end = min(l.end, end)\n", "		_ = end\n"},
		{"2, that is counted from before the question", "flight.go", "end := sent + c.HeldFor - margin", "end := law.Monotonic() + c.HeldFor - margin"},
		{"2, a SlidingWindow's lease ends with the window", "flight.go", "end -= r.Period", "_ = r.Period"},
		{"2, what is used is gone", "pool.go", "		g.left -= cost\n", ""},
		{"3, a SlidingLog is not leased", "pool.go", "r.Kind == law.SlidingLog ||", ""},
		{"3, nor what could be given back to another period", "pool.go", "r.Period < 2*life", "r.Period < life"},
		{"3, what the answer brought is leased, not what was asked for", "flight.go", "min(f.costs[i]+f.extra[i], f.answer.Tokens) - f.costs[i]", "f.extra[i]"},
		{"3, a lease from before a Reset is not used", "flight.go", "case p.resets != f.resets:", "case p.resets < 0:"},
		{"5, what is given back is not used", "flight.go", "	p.lease = lease{}\n", ""},
		{"5, what has come back by itself is not given back", "flight.go", "in := g.held - now;", "in := g.held - now + 3600_000_000;"},
		{"5, once", "flight.go", "			err = s.charge(s.lasting, c)\n", "			_ = s.charge(s.lasting, c)\n			err = s.charge(s.lasting, c)\n"},
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
			test := exec.CommandContext(t.Context(), "go", "test", "-overlay", list, "-count=1", "-vet=off", "-timeout=100s", "-run", "^(TestTheBound|TestRule)", ".")
			test.Env = append(os.Environ(), "THROTTLER_SEEDS=60", "THROTTLER_SEED=")
			out, err := test.CombinedOutput()
			assert.Error(t, err)
			assert.Contains(t, string(out), "--- FAIL", "it does not compile")
		})
	}
}
