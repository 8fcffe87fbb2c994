package postgres

import (
	"bytes"
	"cmp"
	"slices"
	"strings"

	combine "github.com/go-throttler/throttler/internal/batch"
	"github.com/go-throttler/throttler/storage"
)

type call = combine.Call[query, answer]

// query is a decision, a change of one identifier, or the question what it owes.
type query struct {
	ids     [][]byte // of the parts, or the identifier
	request storage.Request
	change  *change // nil for a decision
	debt    bool    // the caller wants the debt, not the counts of a Peek

	rows []*row // of the ids, filled by the batch
}

// change is what happens to one identifier. A Reset has no rules.
type change struct {
	clocked bool
	now     int64
	rules   []storage.Rule
	charge  []storage.Amount   // of each rule, or nil
	debt    [][]storage.Amount // of each rule, or nil
}

type answer struct {
	verdict   storage.Verdict
	debt      [][]storage.Amount
	contended bool // and not done
}

// keep copies the strings of the request: the caller may leave before the batch
// is answered, and use their memory for something else.
func (q *query) keep() {
	r := &q.request
	r.Name, r.More = strings.Clone(r.Name), slices.Clone(r.More)
	for i := range r.Parts() {
		p := r.At(i)
		p.Identifier = strings.Clone(p.Identifier)
	}
}

// mark is what stands for all ids of the query in marks.
func (q *query) mark() []byte {
	if len(q.ids) == 1 {
		return q.ids[0]
	}
	return bytes.Join(q.ids, []byte{0})
}

// rules are those of one of the ids.
func (q *query) rules(i int) []storage.Rule {
	if q.change != nil {
		return q.change.rules
	}
	return q.request.At(i).Rules
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
			c.Err = q.decide(&c.Answer.verdict, now)
		}
	}
	for _, r := range rows {
		if r.changed {
			changed = append(changed, r)
		}
	}
	return changed
}

func (q *query) decide(v *storage.Verdict, now int64) error {
	r, at := &q.request, storage.Monotonic()
	if r.Clocked {
		at, now = r.Now, r.Now
	}
	var few [4]storage.Draw
	draws := few[:0]
	for i, row := range q.rows {
		part := r.At(i)
		if err := cmp.Or(row.fault, row.room(part.Rules, now)); err != nil {
			return err
		}
		for j := range part.Rules {
			rule := &part.Rules[j]
			draws = append(draws, storage.Draw{Rule: rule, Cost: part.Cost(j), State: row.state(rule)})
		}
	}
	v.Begin(r, Source, at)
	v.Allowed = storage.Decide(r.Mode, now, draws)
	for i := range draws {
		v.Set(i, draws[i].Count)
	}
	if !v.Taken() {
		return nil
	}
	for i, row := range q.rows {
		rules := r.At(i).Rules
		for j := range rules {
			if draws[j].Cost > 0 {
				row.set(&rules[j], draws[j].State)
				row.touch(r.Clocked, now)
			}
		}
		draws = draws[len(rules):]
	}
	return nil
}

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
	for i := range d.rules {
		rule := &d.rules[i]
		state := row.state(rule)
		switch {
		case d.debt != nil && len(d.debt[i]) > 0:
			state.Raise(rule, d.debt[i], now)
		case d.charge != nil && d.charge[i].N > 0:
			state.Charge(rule, d.charge[i], now)
		case d.charge != nil && d.charge[i].N < 0 && state.Law != nil:
			state.Refund(rule, storage.Amount{N: -d.charge[i].N, In: d.charge[i].In}, now)
		default:
			continue
		}
		row.set(rule, state)
		row.touch(d.clocked, now)
	}
	return nil
}
