package storagetest

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
)

// shrunkRules takes at random under a rule and under seven that it was shrunk to, and compares each answer with Decide.
func shrunkRules(t *testing.T, s storage.Storage) {
	name := newName()
	for _, kind := range everyKind {
		for i, period := range []time.Duration{time.Second, time.Hour, 24 * time.Hour} {
			capacity := []int64{50, 1_000_003, 100_000}[i]
			full := rule(t, "elastic", kind, period, capacity, capacity)
			id, rnd := fmt.Sprint(kind, period), rand.New(rand.NewPCG(uint64(kind), uint64(i)))
			rules := make([]law.Rule, 8)
			for i := range rules {
				rules[i] = full.Shrunk(capacity * int64(8-i) / 8)
			}
			alone, at := []law.Draw{{}}, time.Hour
			for n := range 60 {
				at += time.Duration(rnd.Int64N(int64(period) / 10)).Truncate(time.Microsecond)
				alone[0].Rule = &rules[rnd.IntN(len(rules))]
				alone[0].Cost = rnd.Int64N(1 + min(alone[0].Rule.Capacity, capacity/5))
				v, err := storecheck.Decide(t.Context(), s, request(name, at, storage.Take, storecheck.NewPart(id, []law.Rule{*alone[0].Rule}, alone[0].Cost)))
				require.NoError(t, err)
				require.Equal(t, law.Decide(storage.Take, at.Microseconds(), alone), v.Allowed, "%s: call %d", id, n)
				require.Equal(t, alone[0].Count, v.Count(0), "%s: call %d", id, n)
			}
		}
	}
}
