package failover_test

import (
	"strings"
	"testing"

	"github.com/go-throttler/throttler/internal/storecheck"
)

// This tests the tests: if the code that keeps a rule of the protocol is taken out, a test named after that rule fails.
func TestWithoutOneOfTheRulesATestFails(t *testing.T) {
	t.Parallel()
	for _, m := range []struct{ rule, file, code, mutant string }{
		{"2, the ledger is charged", "flush.go", "amounts[i] = e.buckets[i].left(now)", ""},
		{"2, once", "flush.go", "s.flusher.origin, s.flusher.seq,", `s.flusher.origin, law.Monotonic(),`},
		{"3, Redis is raised where the ledger knows more", "flush.go", "if (raise || !e.clocked) && e.behind(", "if raise && e.behind("},
		{"4, what is pending is charged before Postgres decides", "decide.go", "if err := s.settle(ctx, key{r.Name, p.Identifier}); err != nil {", "if err := error(nil); err != nil && p.Rules == nil {"},
		{"7, what Redis may have missed is read first", "decide.go", "late, err = s.readThrough(ctx, r, read)", "err = nil"},
		{"8, the ledger is charged what Redis was charged", "charge.go", "s.journal.charged(c)", ""},
		{"8, no debt from before a reset is raised after it", "journal.go", "		r.stale = true\n", ""},
		{"10, Close writes what is pending", "failover.go", "written <- s.flushRest(ctx)", "written <- nil"},
	} {
		number, _, _ := strings.Cut(m.rule, ",")
		t.Run(m.rule, func(t *testing.T) {
			storecheck.AssertKilled(t, m.file, m.code, m.mutant, "^TestRule"+number+"[A-Z]")
		})
	}
}
