package storagetest

import (
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
)

// What is asked without a time of the caller's, so that a storage that decides by what it has taken ahead does so. While
// a test runs nothing comes back. A storage that takes ahead may deny for a moment what it has not given back yet, so what
// has to be admitted is asked for until it is.

// slow is a rule of which nothing comes back during a test.
func slow(t testing.TB, name string, kind law.Kind, capacity int64) law.Rule {
	if kind == law.Continuous {
		return rule(t, name, kind, 366*24*time.Hour, capacity, capacity)
	}
	return rule(t, name, kind, storecheck.Period(), capacity, 0)
}

// crowdByOwnClock has a crowd ask for more than there is of one bucket and of two, and then takes what is left.
func crowdByOwnClock(t *testing.T, s storage.Storage) {
	for _, kind := range everyKind {
		for _, rules := range [][]law.Rule{{slow(t, "one", kind, 250)}, {slow(t, "small", law.Replenish, 200), slow(t, "large", kind, 250)}} {
			r := storecheck.Request{Name: newName(), Parts: []storecheck.Part{storecheck.NewPart("hot", rules, 1)}}
			limit := rules[0].Capacity
			var admitted atomic.Int64
			take := func() bool {
				v, err := storecheck.Decide(t.Context(), s, r)
				if assert.NoError(t, err) && v.Allowed {
					admitted.Add(1)
					return true
				}
				return false
			}
			together(20, func(int) {
				for range 30 {
					take()
				}
			})
			storecheck.Until(t, "something is left that nobody is given", func() bool { return admitted.Load() >= limit || take() && admitted.Load() == limit })
			for range 20 {
				take()
			}
			require.Equal(t, limit, admitted.Load(), "%v, %d buckets", kind, len(rules))
		}
	}
}

// sequenceByOwnClock compares with Decide what one caller is told of two buckets.
func sequenceByOwnClock(t *testing.T, s storage.Storage) {
	for _, kind := range everyKind {
		rnd, name := rand.New(rand.NewPCG(uint64(kind), 3)), newName()
		rules := []law.Rule{slow(t, "a", kind, 120), slow(t, "b", law.Continuous, 200)}
		draws := []law.Draw{{Rule: &rules[0]}, {Rule: &rules[1]}}
		alone := slow(t, "a", kind, 120) // another set of rules, of one bucket
		for n := range 400 {
			if rnd.IntN(100) == 0 {
				require.NoError(t, s.Reset(t.Context(), name, "id"))
				draws[0].State, draws[1].State = law.State{}, law.State{}
			}
			p := storecheck.NewPart("id", rules, 1)
			if rnd.IntN(10) == 0 {
				p.Costs = []int64{rnd.Int64N(10), rnd.Int64N(10)}
			}
			asked := draws
			if rnd.IntN(50) == 0 {
				p, asked = storecheck.NewPart("id", []law.Rule{alone}, 2), draws[:1]
			}
			mode := []storage.Mode{storage.Take, storage.Take, storage.Take, storage.Take, storage.Peek, storage.Force}[rnd.IntN(5+n%2*rnd.IntN(2))]
			for i := range asked {
				asked[i].Cost, asked[i].AtMost = p.Costs[i], false
			}
			if mode == storage.Take && rnd.IntN(20) == 0 {
				p.AtMost = true
				for i := range asked {
					p.Costs[i] += 20
					asked[i].Cost, asked[i].AtMost = p.Costs[i], true
				}
			}
			allowed := law.Decide(mode, time.Now().UnixMicro(), asked)
			tokens := law.Taken(asked)
			r := storecheck.Request{Name: name, Mode: mode, Parts: []storecheck.Part{p}}
			v, err := storecheck.Decide(t.Context(), s, r)
			require.NoError(t, err)
			if allowed && !v.Allowed {
				storecheck.Until(t, fmt.Sprint(kind, ": call ", n, " is denied"), func() bool {
					v, err = storecheck.Decide(t.Context(), s, r)
					return err == nil && v.Allowed
				})
			}
			require.Equal(t, allowed, v.Allowed, "%v: call %d", kind, n)
			if p.AtMost && allowed {
				got := max(v.Cost(0, 0), v.Cost(0, len(asked)-1))
				require.LessOrEqual(t, got, tokens, "%v: call %d", kind, n)
				for i := range asked { // it may have got less for the moment
					asked[i].State.Refund(asked[i].Rule, law.Amount{N: min(p.Costs[i], tokens) - v.Cost(0, i), In: asked[i].Count.HeldFor}, time.Now().UnixMicro())
				}
			}
		}
	}
}

// jointByOwnClock takes from two identifiers alone and together: nobody is denied for what was taken ahead.
func jointByOwnClock(t *testing.T, s storage.Storage) {
	name, rules := newName(), []law.Rule{slow(t, "hundred", law.Replenish, 100)}
	one := func(ids ...string) storecheck.Request {
		r := storecheck.Request{Name: name}
		for _, id := range ids {
			r.Parts = append(r.Parts, storecheck.NewPart(id, rules, 1))
		}
		return r
	}
	alone := 0
	for range 60 {
		alone += storecheck.Take(t, s, one("a"), 1)
		storecheck.Take(t, s, one("b"), 1)
	}
	require.Equal(t, 60, alone)
	admitted := 0
	for range 40 {
		storecheck.Until(t, "both are denied", func() bool { return storecheck.Take(t, s, one("a", "b"), 1) == 1 })
		admitted++
	}
	require.Zero(t, storecheck.Take(t, s, one("b", "a"), 5), "after %d together", admitted)
	require.Zero(t, storecheck.Take(t, s, one("a"), 5))
}
