package postgres

import (
	"bytes"
	"cmp"

	combine "github.com/go-throttler/throttler/internal/batch"
	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

type call = combine.Call[query, answer]

// query is a decision, a change of one identifier, or the question for its debt.
//
// A batch may read it after its caller has left. The caller may then reuse the memory of the identifiers in request, so
// the ids are copies, and the identifiers are never read.
type query struct {
	ids     [][]byte        // of the rows, in the order of the parts
	request storage.Request // of a decision or a question
	change  *change         // nil for a decision
	debt    bool            // the caller wants the debt, not the counts of a Peek

	rows []*row // of the ids, set by the batch
}

// change is a Charge, a Raise or a Reset of one identifier. A Reset has no rules.
type change struct {
	clocked bool
	now     int64
	rules   *storage.RuleSet
	charge  []storage.Amount   // one for each rule, or nil
	debt    [][]storage.Amount // one list for each rule, or nil
}

// answer is the answer to a query.
type answer struct {
	allowed   bool
	at        int64              // when it was decided: the caller's time, or law.Monotonic
	counts    []storage.Count    // one for each bucket
	tokens    int64              // what a part with AtMost took
	debt      [][]storage.Amount // one list for each rule
	contended bool               // nothing was done; the rest is zero
}

// mark returns the id that stands for the query in marks.
func (q *query) mark() []byte {
	if len(q.ids) == 1 {
		return q.ids[0]
	}
	return bytes.Join(q.ids, []byte{0})
}

// rules returns the rules of id i.
func (q *query) rules(i int) *storage.RuleSet {
	if q.change != nil {
		return q.change.rules
	}
	return q.request.Parts[i].Rules
}

// rowID returns the id of a row. Names have no colon, so no two names and identifiers share an id.
func rowID(name, identifier string) []byte { return []byte(name + ":" + identifier) }

// act applies the calls to the rows, in order, and returns the rows that have changed. Now is the server's time, for
// calls without a time of their own. Each call gets its answer or error, which counts only once the changed rows are
// committed.
func act(calls []*call, rows []*row, now int64) (changed []*row) {
	for _, c := range calls {
		q := &c.Query
		c.Answer = answer{}
		switch {
		case q.change != nil:
			c.Err = q.change.apply(q.rows[0], now)
		case q.debt:
			c.Answer.debt, c.Err = q.owed(now)
		default:
			c.Err = q.decide(&c.Answer, now)
		}
	}
	for _, r := range rows {
		if r.changed {
			changed = append(changed, r)
		}
	}
	return changed
}

// decide makes the decision over the rows of all parts. Only if it takes tokens does it change rows, and then all of
// those from which something was taken.
func (q *query) decide(a *answer, now int64) error {
	r := &q.request
	if a.at = law.Monotonic(); r.Clocked {
		a.at, now = r.Now, r.Now
	}
	var few [4]law.Draw
	draws := few[:0]
	for i, row := range q.rows {
		part := &r.Parts[i]
		if err := cmp.Or(row.fault, row.room(part.Rules, now)); err != nil {
			return err
		}
		for j := range part.Rules.Rules {
			rule := &part.Rules.Rules[j]
			draws = append(draws, law.Draw{Rule: rule, Cost: r.Costs[len(draws)], Within: r.Within, AtMost: part.AtMost, State: row.state(rule)})
		}
	}
	a.allowed = law.Decide(r.Mode, now, draws)
	a.tokens = law.Taken(draws)
	a.counts = make([]storage.Count, len(draws))
	for i := range draws {
		a.counts[i] = draws[i].Count
	}
	if !q.taken(a) {
		return nil
	}
	for i, row := range q.rows {
		n := len(r.Parts[i].Rules.Rules)
		for _, d := range draws[:n] {
			if d.Cost > 0 {
				row.set(d.Rule, d.State)
				row.touch(r.Clocked, now)
			}
		}
		draws = draws[n:]
	}
	return nil
}

// taken reports whether the decision with this answer has taken its costs.
func (q *query) taken(a *answer) bool { return a.allowed && q.request.Mode != storage.Peek }

// owed returns the debt of the query's only row.
func (q *query) owed(now int64) ([][]storage.Amount, error) {
	if q.request.Clocked {
		now = q.request.Now
	}
	return q.rows[0].debt(q.rules(0), now), q.rows[0].fault
}

// apply makes the change in a row. A fault of the row is the error of every change except a Reset.
func (d *change) apply(row *row, now int64) error {
	if d.clocked {
		now = d.now
	}
	if d.rules == nil {
		row.reset(now)
		return nil
	}
	if err := cmp.Or(row.fault, row.room(d.rules, now)); err != nil {
		return err
	}
	for i := range d.rules.Rules {
		rule := &d.rules.Rules[i]
		state := row.state(rule)
		switch {
		case d.debt != nil && len(d.debt[i]) > 0:
			state.Raise(rule, d.debt[i], now)
		case d.charge == nil || !state.Apply(rule, d.charge[i], now):
			continue
		}
		row.set(rule, state)
		row.touch(d.clocked, now)
	}
	return nil
}
