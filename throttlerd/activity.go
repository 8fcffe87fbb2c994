// What each rule admits and denies: for Prometheus, and for the admin page.

package main

import (
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-throttler/throttler/rules"
)

// result is what a rule did to a request that it applied to.
type result int

const (
	allowed   result = iota // the request was admitted
	denied                  // the rule denied it
	spared                  // other rules denied it, and so it took nothing
	wouldDeny               // the rule is a shadow, or of quota_mode, and would have denied it
	bypassed                // the storage failed, and -on-storage-error allow admitted it without a limit
	failed                  // it could not be decided
	results
)

var resultNames = [results]string{"allowed", "denied", "denied_by_others", "would_deny", "bypassed", "error"}

// resultOf is what the rule did.
func resultOf(d *decision, a *rules.Applied) result {
	switch {
	case !d.denied():
		return failed
	case a.Denied && (a.Rule.Shadow || a.Rule.Quota):
		return wouldDeny
	case a.Denied:
		return denied
	case !d.v.Allowed:
		return spared
	case d.bypassed():
		return bypassed
	}
	return allowed
}

// activity counts by rule. Rules that went are forgotten, so that it holds no more than there are rules. It is safe for
// concurrent use.
type activity struct {
	byRule atomic.Pointer[map[*rules.Rule]*counts] // of the rules that count now; never changed

	mu    sync.Mutex // guards what follows, and is held to replace byRule
	named map[ruleName]*counts
	lost  counts            // of nobody
	tick  int               // how often second was called
	at    [window]time.Time // when
}

// overrideID is the ID of the rules that package rules makes of limits that requests bring.
const overrideID = "override"

// ruleName is what a rule is found by after a reload.
type ruleName struct{ domain, id string }

func nameOf(r *rules.Rule) ruleName { return ruleName{r.Domain, r.ID} }

// window is how many calls of second "now" has.
const window = 10

// counts are those of a rule.
type counts struct {
	of    ruleName
	total [results]atomic.Int64
	past  [window][results]int64 // the totals at activity.at; guarded by activity.mu
}

func newActivity() *activity {
	a := &activity{named: map[ruleName]*counts{}}
	for i := range a.at {
		a.at[i] = time.Now()
	}
	a.byRule.Store(&map[*rules.Rule]*counts{})
	return a
}

// loaded takes newer rules. One that keeps its name keeps its counts.
func (a *activity) loaded(set *rules.Set) {
	a.mu.Lock()
	defer a.mu.Unlock()
	byRule, named := map[*rules.Rule]*counts{}, map[ruleName]*counts{}
	for _, r := range set.Rules() {
		byRule[r] = a.get(nameOf(r))
		named[nameOf(r)] = byRule[r]
	}
	for _, domain := range set.Domains() {
		name := ruleName{domain, overrideID}
		if c := a.named[name]; c != nil {
			named[name] = c
		}
	}
	a.named = named
	a.byRule.Store(&byRule)
}

// get needs the mutex.
func (a *activity) get(name ruleName) *counts {
	c := a.named[name]
	if c == nil {
		c = &counts{of: name}
		a.named[name] = c
	}
	return c
}

// count counts what came of a request.
func (a *activity) count(d *decision) {
	for i := range d.applied {
		a.of(d.applied[i].Rule).total[resultOf(d, &d.applied[i])].Add(1)
	}
}

// of finds the counts of a rule. A rule that is not in the files stands for limits that requests bring. Another one that
// loaded does not know has just come or gone: without its name it is not counted, as it could stay for ever.
func (a *activity) of(r *rules.Rule) *counts {
	if c := (*a.byRule.Load())[r]; c != nil {
		return c
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if name := nameOf(r); r.Line == 0 || a.named[name] != nil {
		return a.get(name)
	}
	return &a.lost
}

// second has to be called each second, or nearly.
func (a *activity) second(now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.tick++
	a.at[a.tick%window] = now
	for _, c := range a.named {
		past := &c.past[a.tick%window]
		for r := range past {
			past[r] = c.total[r].Load()
		}
	}
}

// ruleActivity is what a rule does.
type ruleActivity struct {
	domain, id string
	total      [results]int64
	rate       [results]float64 // a second, of the last ten
}

// all are the counts by domain and rule, also of rules that no request was for.
func (a *activity) all(now time.Time) []ruleActivity {
	a.mu.Lock()
	defer a.mu.Unlock()
	oldest := (a.tick + 1) % window
	elapsed := max(1, now.Sub(a.at[oldest]).Seconds())
	var all []ruleActivity
	for name, c := range a.named {
		one := ruleActivity{domain: name.domain, id: name.id}
		for r := range one.total {
			one.total[r] = c.total[r].Load()
			one.rate[r] = float64(one.total[r]-c.past[oldest][r]) / elapsed
		}
		all = append(all, one)
	}
	slices.SortFunc(all, func(a, b ruleActivity) int {
		if d := strings.Compare(a.domain, b.domain); d != 0 {
			return d
		}
		return strings.Compare(a.id, b.id)
	})
	return all
}
