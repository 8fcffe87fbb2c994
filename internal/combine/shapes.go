package combine

import "github.com/go-throttler/throttler/storage"

// Shapes are the different parts of the requests in a flight, most of which are usually the same but for
// their identifiers, and which of them each part has. The zero value is empty.
type Shapes struct {
	All   []Shape
	Index []int // for each part that was added, its place in All
}

// Shape is a part of a request without its identifier.
type Shape struct {
	Mode    storage.Mode
	Clocked bool
	Now     int64
	More    bool          // the next part belongs to the same request
	Part    *storage.Part // of which the identifier does not matter
}

// lookBack is how many shapes a new part is compared with: parts that differ are few, or many.
const lookBack = 8

// Add adds part i of a request.
func (s *Shapes) Add(r *storage.Request, i int) {
	w := Shape{r.Mode, r.Clocked, r.Now, i+1 < r.Parts(), r.At(i)}
	for n := len(s.All) - 1; n >= max(0, len(s.All)-lookBack); n-- {
		if s.All[n].same(&w) {
			s.Index = append(s.Index, n)
			return
		}
	}
	s.Index = append(s.Index, len(s.All))
	s.All = append(s.All, w)
}

func (s *Shape) same(o *Shape) bool {
	a, b := s.Part, o.Part
	if s.Mode != o.Mode || s.Clocked != o.Clocked || s.Now != o.Now || s.More != o.More || len(a.Rules) != len(b.Rules) || &a.Rules[0] != &b.Rules[0] {
		return false
	}
	for i := range a.Rules {
		if a.Cost(i) != b.Cost(i) {
			return false
		}
	}
	return true
}
