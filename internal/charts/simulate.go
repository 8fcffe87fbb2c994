package main

import (
	"time"

	"github.com/go-throttler/throttler/internal/law"
)

// What the charts show. Times are in microseconds.
const (
	capacity = 5
	period   = int64(10 * time.Second / time.Microsecond)
	step     = period / 100
	steps    = 300
)

// client returns how many calls for one token to make at step i, if remaining tokens are left.
type client func(i int, remaining int64) int64

// run is the result of a simulation.
type run struct {
	calls  []call
	levels []level // one for each step
}

// call is one call for one token.
type call struct {
	at       int64
	admitted bool
}

// level is the number of tokens that remain before and after the calls of a step.
type level struct{ before, after int64 }

// ruleOf returns the rule of a bucket that refills its capacity in a period.
func ruleOf(kind law.Kind, capacity int64) *law.Rule {
	r, faults := law.NewRule("chart", kind, time.Duration(period)*time.Microsecond, capacity, capacity)
	if len(faults) > 0 {
		panic(faults[0])
	}
	return &r
}

// simulate lets a client use a bucket for some steps. It begins at the epoch, where a FixedWindow begins too.
func simulate(r *law.Rule, steps int, step int64, c client) run {
	var out run
	draws := []law.Draw{{Rule: r}}
	ask := func(at, cost int64) (remaining int64, admitted bool) {
		draws[0].Cost = cost
		admitted = law.Decide(law.Take, at, draws)
		return draws[0].Count.Remaining, admitted
	}
	for i := range steps {
		now := int64(i) * step
		before, _ := ask(now, 0) // a cost of 0 takes nothing and tells the level
		after := before
		for range c(i, before) {
			var admitted bool
			after, admitted = ask(now, 1)
			out.calls = append(out.calls, call{now, admitted})
		}
		out.levels = append(out.levels, level{before, after})
	}
	return out
}

// worst returns the half-open window [from, from+length) in which most calls were admitted, and their number. Of
// equal windows it returns the first. It tries only windows that begin with an admitted call: any other window can be
// moved later until it does, and loses none.
func (r *run) worst(length int64) (from int64, most int) {
	var admitted []int64
	for _, c := range r.calls {
		if c.admitted {
			admitted = append(admitted, c.at)
		}
	}
	end := 0
	for i, t := range admitted {
		for end < len(admitted) && admitted[end] < t+length {
			end++
		}
		if end-i > most {
			from, most = t, end-i
		}
	}
	return from, most
}

// run simulates the script of a chart.
func (c chart) run() run {
	return simulate(ruleOf(c.kind, capacity), steps, step, func(i int, _ int64) int64 {
		n := 0
		for _, a := range c.script {
			if i >= a.from && i < a.to && (i-a.from)%a.every == 0 {
				n += a.count
			}
		}
		return int64(n)
	})
}
