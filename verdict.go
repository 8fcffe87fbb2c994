// What a call answers: the Verdict and its Levels.

package throttler

import (
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

const (
	inline   = 4   // buckets that a Verdict has without allocating
	maxParts = 256 // identifiers of one call
)

// Verdict is the answer to a call. It is a value, owned by the caller. The zero Verdict is a denial
// that nobody made.
type Verdict struct {
	// Allowed says that the cost was taken from every bucket. Otherwise nothing was taken.
	Allowed bool

	// RetryAfter is how long after the decision the same call is admitted, if nobody else takes:
	// exact to the microsecond, zero when allowed.
	RetryAfter time.Duration

	// Delay is how long after the decision what a Reserve took may be used. It is zero for other calls, and when denied.
	Delay time.Duration

	degraded bool
	peeked   bool
	source   string
	at       int64 // when the storage decided: storage.Answer.At
	within   int64 // storage.Request.Within
	tokens   int64 // storage.Answer.Tokens

	// The request and what the storage counted, bucket by bucket. Of a call with several parts or
	// more than four buckets all of that is in more, and the fields here are not used.
	one    [1]storage.Part // without rules if there are no parts
	costs  [inline]int64
	counts [inline]storage.Count
	more   *more
}

// more has room for two parts of four buckets together, so that they take one allocation.
type more struct {
	parts  []storage.Part
	costs  []int64
	counts []storage.Count

	someParts  [2]storage.Part
	someCosts  [inline]int64
	someCounts [inline]storage.Count
}

// Level is the state of one bucket right after a decision.
type Level struct {
	Identifier, Bucket string
	Limit, Remaining   int64         // tokens: the capacity, and what may still be taken now
	Full               int64         // the capacity that the bucket was given: Limit, unless it has shrunk (Bucket.Elastic)
	Debt               int64         // tokens that have to come back before Remaining rises from 0: a Charge may leave some
	Period             time.Duration // the bucket's period
	Window             time.Duration // in which an empty bucket becomes full: the Period, but for a Burst
	ResetAfter         time.Duration // until the bucket is full again, if nobody takes
	NextAfter          time.Duration // until one token more than Remaining may be taken, if nobody takes; zero if full
	RetryAfter         time.Duration // until this bucket admits the denied cost; zero if it did
}

// Levels returns the level of each bucket, in the order of the request. Up to four buckets it
// allocates nothing, as long as the result does not outlive the caller.
func (v *Verdict) Levels() []Level { return v.levels(make([]Level, 0, inline)) }

func (v *Verdict) levels(out []Level) []Level {
	for l := range v.All() {
		out = append(out, l)
	}
	return out
}

// All yields the level of each bucket and its cost, in tokens, in the order of the request. It allocates nothing.
func (v *Verdict) All() iter.Seq2[Level, int64] {
	return func(yield func(Level, int64) bool) {
		n, costs, counts := 0, v.asked(), v.all()
		for _, p := range v.parts() {
			for j := range p.Rules.Rules {
				l := level(p.Identifier, &p.Rules.Rules[j], &counts[n])
				if v.Allowed {
					l.RetryAfter = 0
				}
				if !yield(l, costs[n]) {
					return
				}
				n++
			}
		}
	}
}

func level(id string, r *law.Rule, c *storage.Count) Level {
	return Level{
		Identifier: id, Bucket: r.Name,
		Limit: r.Capacity, Full: r.Full, Remaining: max(0, c.Remaining), Debt: max(0, -c.Remaining),
		Period: duration(r.Period), Window: duration(r.Window),
		ResetAfter: duration(c.ResetAfter), NextAfter: duration(c.NextAfter), RetryAfter: duration(c.RetryAfter),
	}
}

// Tokens is how many tokens were taken, from the bucket that gave most: the cost, or less by AtMost. It is 0 if v is not
// Allowed, and of a Peek what would have been taken.
func (v *Verdict) Tokens() (most int64) {
	if !v.Allowed {
		return 0
	}
	n := 0
	for i, p := range v.parts() {
		for range p.Rules.Rules {
			most = max(most, v.took(i, n))
			n++
		}
	}
	return most
}

// took is what was taken from bucket n, through all parts, which is one of part i.
func (v *Verdict) took(i, n int) int64 {
	cost := v.asked()[n]
	if v.parts()[i].AtMost {
		return min(cost, v.tokens)
	}
	return cost
}

func duration(micros int64) time.Duration { return time.Duration(micros) * time.Microsecond }

// Source names the kind of storage that answered: "runtime", "redis", "postgres" or "lease". It is empty if none did.
func (v *Verdict) Source() string { return v.source }

// Degraded says that the answer is not the storage's regular one: a policy or a fallback gave it.
func (v *Verdict) Degraded() bool { return v.degraded }

// Taken says that the costs were taken: v is Allowed, by a storage, and not the answer to a Peek.
func (v *Verdict) Taken() bool { return v.Allowed && !v.peeked && len(v.parts()) > 0 }

// add makes an identifier a part of the request, and returns its costs, which are 0.
func (v *Verdict) add(id string, rules *storage.RuleSet) (costs []int64, err error) {
	n := len(rules.Rules)
	if one := &v.one[0]; one.Rules == nil && v.more == nil && n <= inline {
		one.Identifier, one.Rules = id, rules
		return v.costs[:n], nil
	}
	return v.addMore(id, rules)
}

func (v *Verdict) addMore(id string, rules *storage.RuleSet) ([]int64, error) {
	if v.more == nil {
		m := &more{}
		m.parts, m.costs, m.counts = m.someParts[:0], m.someCosts[:0], m.someCounts[:0]
		if one := &v.one[0]; one.Rules != nil {
			copy(m.add(one.Identifier, one.Rules), v.costs[:])
			m.parts[0].AtMost = one.AtMost
		}
		v.more = m
	}
	if len(v.more.parts) == maxParts {
		return nil, fmt.Errorf("%w: over %d of them in one call", ErrInvalidIdentifier, maxParts)
	}
	for i := range v.more.parts {
		if v.more.parts[i].Identifier == id {
			return nil, fmt.Errorf("%w: %.64q stands in two parts of one call", ErrInvalidIdentifier, id)
		}
	}
	return v.more.add(id, rules), nil
}

// add adds a part and returns its costs, which are 0 and lie there until the next part is added.
func (m *more) add(id string, rules *storage.RuleSet) []int64 {
	from, n := len(m.costs), len(rules.Rules)
	m.parts = append(m.parts, storage.Part{Identifier: id, Rules: rules})
	if from == 0 && n > len(m.someCosts) {
		room := &struct {
			costs  [law.MaxBuckets]int64
			counts [law.MaxBuckets]storage.Count
		}{}
		m.costs, m.counts = room.costs[:0], room.counts[:0]
	}
	m.costs = slices.Grow(m.costs, n)[:from+n]
	m.counts = slices.Grow(m.counts, n)[:from+n]
	clear(m.costs[from:])
	return m.costs[from:]
}

// parts are those of the request.
func (v *Verdict) parts() []storage.Part {
	switch {
	case v.more != nil:
		return v.more.parts
	case v.one[0].Rules != nil:
		return v.one[:]
	}
	return nil
}

// asked are the costs, and all the counts, of all buckets through all parts in order.
func (v *Verdict) asked() []int64 {
	switch {
	case v.more != nil:
		return v.more.costs
	case v.one[0].Rules != nil:
		return v.costs[:len(v.one[0].Rules.Rules)]
	}
	return nil
}

func (v *Verdict) all() []storage.Count {
	switch {
	case v.more != nil:
		return v.more.counts
	case v.one[0].Rules != nil:
		return v.counts[:len(v.one[0].Rules.Rules)]
	}
	return nil
}

// answered takes over what a storage says beside the counts, which are in place. The source is not read from the answer,
// or the compiler would take it for something that refers to the counts, and keep v on the heap.
func (v *Verdict) answered(a *storage.Answer, source string, mode storage.Mode) {
	v.Allowed, v.source, v.degraded, v.at, v.peeked = a.Allowed, source, a.Degraded, a.At, mode == storage.Peek
	v.tokens = a.Tokens
	if a.Allowed && v.within == 0 {
		return
	}
	wait := &v.RetryAfter
	if a.Allowed {
		wait = &v.Delay
	}
	for i := range a.Counts {
		*wait = max(*wait, duration(a.Counts[i].RetryAfter))
	}
}
