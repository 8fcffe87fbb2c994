package redis

import "github.com/go-throttler/throttler/storage"

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
	more    bool          // the next part belongs to the same request
	since   int64         // as in a query
	part    *storage.Part // of which the identifier does not matter
}

// lookBack is how many shapes a new part is compared with: parts that differ are few, or many.
const lookBack = 8

// add adds part i of a decision.
func (s *shapes) add(q *query, i int) {
	r := &q.request
	w := shape{r.Mode, r.Clocked, r.Now, i+1 < r.Parts(), q.since, r.At(i)}
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
	a, b := s.part, o.part
	if s.mode != o.mode || s.clocked != o.clocked || s.now != o.now || s.more != o.more || s.since != o.since ||
		len(a.Rules) != len(b.Rules) || &a.Rules[0] != &b.Rules[0] {
		return false
	}
	for i := range a.Rules {
		if a.Cost(i) != b.Cost(i) {
			return false
		}
	}
	return true
}
