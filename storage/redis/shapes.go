package redis

import (
	"slices"

	"github.com/go-throttler/throttler/storage"
)

// shapes collects the different shapes of a batch's requests. Most requests differ only in their identifiers, so sending
// each shape once makes a batch much smaller. The zero value is empty.
type shapes struct {
	all   []shape // those of one request follow each other
	index []int   // for each request that was added, the place of its first shape in all
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

// lookBack is how many of the newest requests a new one is compared with. Usually a batch has few different ones. If it
// has many, comparing with all of them would take a time that grows with the square of their number; then some shapes
// are sent twice.
const lookBack = 8

// add adds a decision.
func (s *shapes) add(q *query) {
	parts := len(q.request.Parts)
	for n := len(s.all) - parts; n >= max(0, len(s.all)-parts*lookBack); n-- {
		if s.has(n, q) {
			s.index = append(s.index, n)
			return
		}
	}
	s.index = append(s.index, len(s.all))
	for i, from := 0, 0; i < parts; i++ {
		of := q.shape(i, from)
		s.all, from = append(s.all, of), from+len(of.costs)
	}
}

// has reports whether the shapes from place n on are those of a decision.
func (s *shapes) has(n int, q *query) bool {
	from := 0
	for i := range q.request.Parts {
		of := q.shape(i, from)
		if !s.all[n+i].same(&of) {
			return false
		}
		from += len(of.costs)
	}
	return true
}

// shape returns the shape of a part of a decision, whose costs begin at place from.
func (q *query) shape(i, from int) shape {
	r := &q.request
	p := &r.Parts[i]
	return shape{r.Mode, r.Clocked, r.Now, r.Within, p.AtMost, i+1 < len(r.Parts), q.since, p.Rules, r.Costs[from : from+len(p.Rules.Rules)]}
}

// same reports whether two shapes are equal. Equal rule sets are one pointer.
func (s *shape) same(o *shape) bool {
	return s.mode == o.mode && s.clocked == o.clocked && s.now == o.now && s.within == o.within && s.atMost == o.atMost && s.more == o.more && s.since == o.since &&
		s.rules == o.rules && slices.Equal(s.costs, o.costs)
}
