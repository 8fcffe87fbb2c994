package postgres

import (
	"bytes"
	"cmp"

	combine "github.com/go-throttler/throttler/internal/batch"
	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

type call = combine.Call[query, answer]

// query is a decision, a change of one identifier, or the question what it owes.
type query struct {
	ids     [][]byte        // of the parts, or the identifier
	request storage.Request // its identifiers are the caller's memory, and the ids are not
	change  *change         // nil for a decision
	debt    bool            // the caller wants the debt, not the counts of a Peek

	rows []*row // of the ids, filled by the batch
}

// change is what happens to one identifier. A Reset has no rules.
type change struct {
	clocked bool
	now     int64
	rules   *storage.RuleSet
	charge  []storage.Amount   // of each rule, or nil
	debt    [][]storage.Amount // of each rule, or nil
}

type answer struct {
	allowed   bool
	at        int64           // of a decision
	counts    []storage.Count // of its buckets
	tokens    int64           // that AtMost took
	debt      [][]storage.Amount
	contended bool // and not done
}

// mark is what stands for all ids of the query in marks.
func (q *query) mark() []byte {
	if len(q.ids) == 1 {
		return q.ids[0]
	}
	return bytes.Join(q.ids, []byte{0})
}

// rules are those of one of the ids.
func (q *query) rules(i int) *storage.RuleSet {
	if q.change != nil {
		return q.change.rules
	}
	return q.request.Parts[i].Rules
}

// rowID is the key of a row. Names have no colon.
func rowID(name, identifier string) []byte { return []byte(name + ":" + identifier) }

// act does to the rows what the calls ask, by the server's clock where they have none, and returns those that
// have changed.
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

// taken reports whether an answer says that costs were taken.
func (q *query) taken(a *answer) bool { return a.allowed && q.request.Mode != storage.Peek }

func (q *query) owed(now int64) ([][]storage.Amount, error) {
	if q.request.Clocked {
		now = q.request.Now
	}
	return q.rows[0].debt(q.rules(0), now), q.rows[0].fault
}

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
