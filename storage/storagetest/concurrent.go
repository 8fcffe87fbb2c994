package storagetest

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
)

const goroutines = 200

// together runs f in n goroutines that begin at the same moment, and waits for them.
func together(n int, f func(i int)) {
	var ready, done sync.WaitGroup
	begin := make(chan struct{})
	ready.Add(n)
	for i := range n {
		done.Go(func() {
			ready.Done()
			<-begin
			f(i)
		})
	}
	ready.Wait()
	close(begin)
	done.Wait()
}

// exactlyTheLimit has many goroutines take from one bucket at once.
func exactlyTheLimit(t *testing.T, s storage.Storage) {
	for _, kind := range []law.Kind{law.Replenish, law.Continuous, law.FixedWindow, law.SlidingWindow, law.SlidingLog} {
		name, fifty := newName(), []law.Rule{rule(t, "fifty", kind, time.Hour, 50, 50)}
		var admitted atomic.Int64
		together(goroutines, func(int) {
			v, err := storecheck.Decide(t.Context(), s, request(name, time.Hour, storage.Take, storecheck.NewPart("hot", fifty, 1)))
			if assert.NoError(t, err) && v.Allowed {
				admitted.Add(1)
			}
		})
		assert.Equal(t, int64(50), admitted.Load(), "%v", kind)
	}
}

// bothOrNeither has many goroutines take from two buckets at once. The smaller one denies most of them, and a call that
// it denies must not have taken from the larger one.
func bothOrNeither(t *testing.T, s storage.Storage) {
	name := newName()
	small, large := rule(t, "small", law.Replenish, 10*time.Second, 30, 0), rule(t, "large", law.Continuous, time.Hour, 100, 100)
	var admitted atomic.Int64
	together(goroutines, func(int) {
		v, err := storecheck.Decide(t.Context(), s, request(name, 0, storage.Take, storecheck.NewPart("hot", []law.Rule{small, large}, 1)))
		if assert.NoError(t, err) && v.Allowed {
			admitted.Add(1)
		}
	})
	assert.Equal(t, int64(30), admitted.Load())
	assert.Equal(t, []int64{0, 70}, remaining(t, s, name, "hot", small, large))
}

// transfers takes from two or three identifiers at a time, in opposite orders, which must not deadlock. When one of
// them denies, the others must not have been charged.
func transfers(t *testing.T, s storage.Storage) {
	name, rules := newName(), []law.Rule{rule(t, "forty", law.Replenish, time.Hour, 40, 0)}
	orders := [][]string{{"a", "b"}, {"b", "a"}, {"a", "b", "c"}, {"c", "b", "a"}, {"b", "c"}, {"c", "a"}}
	var spent [3]atomic.Int64
	together(goroutines, func(i int) {
		order := orders[i%len(orders)]
		r := request(name, 0, storage.Take, storecheck.NewPart(order[0], rules, 1))
		for _, id := range order[1:] {
			r.Parts = append(r.Parts, storecheck.NewPart(id, rules, 1))
		}
		v, err := storecheck.Decide(t.Context(), s, r)
		if assert.NoError(t, err) && v.Allowed {
			for _, id := range order {
				spent[id[0]-'a'].Add(1)
			}
		}
	})
	for i, id := range []string{"a", "b", "c"} {
		assert.Equal(t, []int64{40 - spent[i].Load()}, remaining(t, s, name, id, rules...), id)
	}
	assert.Equal(t, int64(40), max(spent[0].Load(), spent[1].Load(), spent[2].Load()), "somebody reached the limit")
}

// linearizable records the answers to concurrent calls. Porcupine then looks for an order of the calls in which Decide
// would have given the same answers. A call that returned before another began must come first in it.
func linearizable(t *testing.T, s storage.Storage) {
	const callers, calls = 8, 40
	rules := []law.Rule{rule(t, "few", law.Replenish, 50*time.Microsecond, 20, 0), rule(t, "many", law.Continuous, 100*time.Microsecond, 60, 60)}
	for seed := range uint64(10) {
		name := newName()
		var mu sync.Mutex
		var history []porcupine.Operation
		began := time.Now()
		together(callers, func(i int) {
			rnd := rand.New(rand.NewPCG(seed, uint64(i)))
			for n := range calls {
				r := request(name, time.Duration(n+rnd.IntN(3))*time.Microsecond, []storage.Mode{storage.Take, storage.Take, storage.Peek, storage.Force}[rnd.IntN(4)],
					storecheck.NewPart(fmt.Sprint("id-", rnd.IntN(2)), rules, rnd.Int64N(4)))
				call := time.Since(began)
				v, err := storecheck.Decide(t.Context(), s, r)
				back := time.Since(began)
				if !assert.NoError(t, err) {
					return
				}
				mu.Lock()
				history = append(history, porcupine.Operation{ClientId: i, Input: r, Call: int64(call), Output: format(&v), Return: int64(back)})
				mu.Unlock()
			}
		})
		require.Len(t, history, callers*calls)
		result := porcupine.CheckOperationsTimeout(consumption, history, 30*time.Second)
		require.Equal(t, porcupine.Ok, result, "seed %d: no order of the calls explains the answers", seed)
	}
}

// consumption is the model for porcupine: one identifier with two buckets, on which law.Decide decides. Calls on
// different identifiers do not influence each other, so each identifier is a history of its own.
var consumption = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		byID := map[string][]porcupine.Operation{}
		for _, op := range history {
			id := op.Input.(storecheck.Request).Parts[0].Identifier
			byID[id] = append(byID[id], op)
		}
		var out [][]porcupine.Operation
		for _, ops := range byID {
			out = append(out, ops)
		}
		return out
	},
	Init: func() any { return [2]law.State{} },
	Step: func(state, input, output any) (bool, any) {
		states, r := state.([2]law.State), input.(storecheck.Request)
		var draws [2]law.Draw
		for i := range draws {
			draws[i] = law.Draw{Rule: &r.Parts[0].Rules.Rules[i], Cost: r.Parts[0].Costs[i], State: states[i]}
		}
		a := storage.Answer{Allowed: law.Decide(r.Mode, r.Now, draws[:])}
		for i, d := range draws {
			a.Counts = append(a.Counts, d.Count)
			if a.Allowed && r.Mode != storage.Peek && d.Cost > 0 {
				states[i] = d.State
			}
		}
		v := storecheck.Answered(r, &a)
		return format(&v) == output.(string), states
	},
	Equal: reflect.DeepEqual,
}
