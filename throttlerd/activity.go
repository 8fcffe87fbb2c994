// Counts of what each rule admits and denies, for Prometheus and for the admin page.

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
	spared                  // other rules denied the request, so this rule took nothing
	wouldDeny               // the rule is a shadow or has quota_mode, and would have denied the request
	bypassed                // the storage failed, and -on-storage-error allow admitted the request without a limit
	failed                  // the request could not be decided
	results
)

var resultNames = [results]string{"allowed", "denied", "denied_by_others", "would_deny", "bypassed", "error"}

// resultOf returns what the rule a did to the request.
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

// activity counts results by rule. It forgets rules that are no longer loaded, so its memory is bounded by the number of
// rules. It is safe for concurrent use.
type activity struct {
	byRule atomic.Pointer[map[*rules.Rule]*counts] // of the loaded rules; replaced as a whole, its map never changes

	mu    sync.Mutex // guards the fields below; also held while byRule is replaced
	named map[ruleName]*counts
	lost  counts            // collects the results of rules that are not loaded; never shown
	tick  int               // number of calls of second
	at    [window]time.Time // time of each of the last calls, a ring indexed by tick
}

// overrideID is the ID that package rules gives to the rule of a limit that a request brings.
const overrideID = "override"

// ruleName identifies a rule across reloads.
type ruleName struct{ domain, id string }

func nameOf(r *rules.Rule) ruleName { return ruleName{r.Domain, r.ID} }

// window is how many snapshots second keeps. Rates are averages since the oldest of them.
const window = 10

// counts belong to one rule.
type counts struct {
	of    ruleName
	total [results]atomic.Int64
	past  [window][results]int64 // the totals at the times in activity.at; guarded by activity.mu
}

func newActivity() *activity {
	a := &activity{named: map[ruleName]*counts{}}
	for i := range a.at {
		a.at[i] = time.Now()
	}
	a.byRule.Store(&map[*rules.Rule]*counts{})
	return a
}

// loaded replaces the rules. A rule whose name is in the new set keeps its counts, and so do the limits that requests
// brought to a domain that still has rules.
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

// get returns the counts of a name, and makes them if there are none. The caller holds mu.
func (a *activity) get(name ruleName) *counts {
	c := a.named[name]
	if c == nil {
		c = &counts{of: name}
		a.named[name] = c
	}
	return c
}

// count adds the outcome of a request to the counts of every rule that applied to it.
func (a *activity) count(d *decision) {
	for i := range d.applied {
		a.of(d.applied[i].Rule).total[resultOf(d, &d.applied[i])].Add(1)
	}
}

// of returns the counts of a rule. Three kinds of rules are not in byRule. A rule with Line 0 is the limit of a request
// and gets counts. Other rules belong to a set just before or after the loaded one. If their name is known, they share
// its counts. If not, they go to lost: they may have been removed, and then nothing would delete counts made for them.
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

// second takes a snapshot of the totals. It must be called about once a second.
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

// ruleActivity is the counts of one rule at one moment.
type ruleActivity struct {
	domain, id string
	total      [results]int64
	rate       [results]float64 // per second, averaged over about the last ten seconds
}

// all returns the counts of all rules, sorted by domain and ID. Rules that no request matched are included.
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
