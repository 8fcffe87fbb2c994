package redis

import (
	"slices"

	"github.com/go-throttler/throttler/storage"
)

// shapes are the different parts of the requests in a batch, most of which are usually the same but for
// their identifiers, and which of them each part has. The zero value is empty.
type shapes struct {
	all   []shape
	index []int // for each part that was added, its place in all
}

// shape is a part of a request without its identifier.
type shape struct {
	mode    storage.Mode
	clocked bool
	now     int64
	within  int64
	atMost  bool
	more    bool  // the next part belongs to the same request
	since   int64 // as in a query
	rules   *storage.RuleSet
	costs   []int64
}

// lookBack is how many shapes a new part is compared with: parts that differ are few, or many.
const lookBack = 8

// add adds the parts of a decision.
func (s *shapes) add(q *query) {
	r, costs := &q.request, q.request.Costs
	for i := range r.Parts {
		p := &r.Parts[i]
		rules := p.Rules
		n := len(rules.Rules)
		s.addOne(shape{r.Mode, r.Clocked, r.Now, r.Within, p.AtMost, i+1 < len(r.Parts), q.since, rules, costs[:n]})
		costs = costs[n:]
	}
}

func (s *shapes) addOne(w shape) {
	for n := len(s.all) - 1; n >= max(0, len(s.all)-lookBack); n-- {
		if s.all[n].same(&w) {
			s.index = append(s.index, n)
			return
		}
	}
	s.index = append(s.index, len(s.all))
	s.all = append(s.all, w)
}

func (s *shape) same(o *shape) bool {
	return s.mode == o.mode && s.clocked == o.clocked && s.now == o.now && s.within == o.within && s.atMost == o.atMost && s.more == o.more && s.since == o.since &&
		s.rules == o.rules && slices.Equal(s.costs, o.costs)
}
