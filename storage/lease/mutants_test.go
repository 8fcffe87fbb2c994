package lease_test

import (
	"testing"

	"github.com/go-throttler/throttler/internal/storecheck"
)

// The test checks the other tests. Each mutant removes one of the safeguards of the bound, and the simulation or a test of a
// single rule must fail.
func TestWithoutOneOfTheRulesATestFails(t *testing.T) {
	t.Parallel()
	for _, m := range []struct{ rule, file, code, mutant string }{
		{"1, a denial ends", "pool.go", "if now >= p.until {", "if p.until == 0 {"},
		{"1, a denial from before tokens were free is not remembered", "lease.go", "plain(r) && s.freed(r) == sent.freed", "plain(r)"},
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
			storecheck.AssertKilled(t, m.file, m.code, m.mutant, "^(TestTheBound|TestRule)", "THROTTLER_SEEDS=60", "THROTTLER_SEED=")
		})
	}
}
