package redis

import (
	"slices"

	"github.com/go-throttler/throttler/storage"
)

// shapes collects the different shapes of a batch's requests, and which shape each part has. Most parts differ only in
// their identifiers, so sending each shape once makes a batch much smaller. The zero value is empty.
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
	since   int64 // as in query
	rules   *storage.RuleSet
	costs   []int64
}

// lookBack is how many of the newest shapes a new part is compared with. Usually a batch has few different shapes. If
// it has many, comparing with all of them would take a time that grows with the square of their number; then some
// shapes are sent twice.
const lookBack = 8

// add adds the parts of a decision, in order.
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

// addOne adds a part of shape w.
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

// same reports whether two shapes are equal. Equal rule sets are one pointer.
func (s *shape) same(o *shape) bool {
	return s.mode == o.mode && s.clocked == o.clocked && s.now == o.now && s.within == o.within && s.atMost == o.atMost && s.more == o.more && s.since == o.since &&
		s.rules == o.rules && slices.Equal(s.costs, o.costs)
}
