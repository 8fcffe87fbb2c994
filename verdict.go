// The answer to a call: Verdict and Level.

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
	inline   = 4   // buckets that fit into a Verdict without an allocation
	maxParts = 256 // identifiers of one call
)

// Verdict is the answer to a call. It is a value that the caller owns. The zero Verdict is a denial without Levels, which
// calls return with most errors.
type Verdict struct {
	// Allowed reports whether the cost was taken from every bucket, or for a Peek would be. Otherwise nothing was taken.
	Allowed bool

	// RetryAfter is how long after the decision the same call is admitted if nobody else takes tokens. It is exact to
	// the microsecond, and zero if the call is allowed.
	RetryAfter time.Duration

	// Delay is how long after the decision the tokens taken by a Reserve may be used. It is zero for other calls, and if
	// the call is denied.
	Delay time.Duration

	degraded bool
	peeked   bool
	nParts   uint8 // parts in few
	nBuckets uint8 // entries in costs and counts
	source   string
	at       int64 // when the storage decided: storage.Answer.At
	within   int64 // storage.Request.Within
	tokens   int64 // storage.Answer.Tokens; without parts, the largest cost

	// The request, and what the storage counted for each bucket. For more than two parts or more than four buckets all of
	// it is in more, and the fields here are unused. A Verdict must stay small: copying it is a part of every call.
	few    [2]storage.Part
	costs  [inline]int64
	counts [inline]storage.Count
	more   *more
}

// more holds a large request. It has room for some parts that together have as many buckets as one identifier can have, so
// that such a request takes one allocation.
type more struct {
	parts  []storage.Part
	costs  []int64
	counts []storage.Count

	someParts  [inline]storage.Part
	someCosts  [law.MaxBuckets]int64
	someCounts [law.MaxBuckets]storage.Count
}

// Level is the state of one bucket right after a decision. Amounts are in tokens.
type Level struct {
	Identifier, Bucket string
	Limit, Remaining   int64         // the capacity, and what may still be taken now
	Full               int64         // the capacity as defined; above Limit while the bucket is shrunk (Bucket.Elastic)
	Debt               int64         // tokens to be refilled before Remaining rises from 0, as a Charge may leave
	Period             time.Duration // the bucket's period
	Window             time.Duration // time in which an empty bucket becomes full: the Period, unless it has a Burst
	ResetAfter         time.Duration // until the bucket is full, if nobody takes tokens
	NextAfter          time.Duration // until Remaining rises by one token, if nobody takes tokens; zero if full
	RetryAfter         time.Duration // until this bucket admits the denied cost; zero if it admitted it
}

// Levels returns the level of each bucket, in the order of the request. For up to four buckets it does not allocate, as
// long as the result does not outlive the caller.
func (v *Verdict) Levels() []Level { return v.levels(make([]Level, 0, inline)) }

func (v *Verdict) levels(out []Level) []Level {
	n, counts := 0, v.all()
	for _, p := range v.parts() {
		for j := range p.Rules.Rules {
			out = append(out, Level{})
			out[len(out)-1].set(p.Identifier, &p.Rules.Rules[j], &counts[n], v.Allowed)
			n++
		}
	}
	return out
}

// All yields the level of each bucket and the tokens it was asked for, in the order of the request. With AtMost it is the
// tokens that were taken, if the call was admitted. Each Level is a new one, which the caller may keep. All does not allocate
// as long as the Levels do not outlive the loop.
func (v *Verdict) All() iter.Seq2[*Level, int64] {
	return func(yield func(*Level, int64) bool) {
		n, costs, counts := 0, v.asked(), v.all()
		for _, p := range v.parts() {
			for j := range p.Rules.Rules {
				l := new(Level)
				l.set(p.Identifier, &p.Rules.Rules[j], &counts[n], v.Allowed)
				cost := costs[n]
				if p.AtMost && v.Allowed {
					cost = min(cost, v.tokens)
				}
				if !yield(l, cost) {
					return
				}
				n++
			}
		}
	}
}

// set fills in a zero Level, in the place where it stays: a copy of what was just written field by field would wait for these
// writes.
func (l *Level) set(id string, r *law.Rule, c *storage.Count, allowed bool) {
	l.Identifier, l.Bucket, l.Limit, l.Full, l.Period, l.Window = id, r.Name, r.Capacity, r.Full, duration(r.Period), duration(r.Window)
	l.Remaining, l.Debt = max(0, c.Remaining), max(0, -c.Remaining)
	l.ResetAfter, l.NextAfter = duration(c.ResetAfter), duration(c.NextAfter)
	if !allowed {
		l.RetryAfter = duration(c.RetryAfter)
	}
}

// Tokens returns how many tokens were taken from the bucket that gave most: the cost, or less with AtMost. For a Peek it is
// what would have been taken. If nothing limits the call it is the cost. It is 0 if v is not Allowed.
func (v *Verdict) Tokens() (most int64) {
	if !v.Allowed {
		return 0
	}
	if v.empty() {
		return v.tokens
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

// took returns what was taken from bucket n, counted through all parts, which belongs to part i.
func (v *Verdict) took(i, n int) int64 {
	cost := v.asked()[n]
	if v.parts()[i].AtMost {
		return min(cost, v.tokens)
	}
	return cost
}

func duration(micros int64) time.Duration { return time.Duration(micros) * time.Microsecond }

// Source names the kind of storage that answered: "runtime", "redis", "postgres" or "lease". It is empty if no storage did.
func (v *Verdict) Source() string { return v.source }

// Degraded reports whether the answer is not the storage's regular one, but that of a policy or of a fallback.
func (v *Verdict) Degraded() bool { return v.degraded }

// Taken reports whether costs were taken: v is Allowed, a storage decided it, and it is not the answer to a Peek.
func (v *Verdict) Taken() bool { return v.Allowed && !v.peeked && !v.empty() }

// add appends an identifier to the request and returns its costs, which are 0. The slice is valid until the next add, which
// may move the costs.
func (v *Verdict) add(id string, rules *storage.RuleSet) (costs []int64, err error) {
	for i := range v.parts() {
		if v.parts()[i].Identifier == id {
			return nil, fmt.Errorf("%w: %.64q stands in two parts of one call", ErrInvalidIdentifier, id)
		}
	}
	from, n := int(v.nBuckets), len(rules.Rules)
	if v.more == nil && int(v.nParts) < len(v.few) && from+n <= inline {
		p := &v.few[v.nParts]
		p.Identifier, p.Rules = id, rules
		v.nParts++
		v.nBuckets += uint8(n)
		return v.costs[from : from+n], nil
	}
	return v.addMore(id, rules)
}

func (v *Verdict) addMore(id string, rules *storage.RuleSet) ([]int64, error) {
	if v.more == nil {
		m := &more{}
		m.parts = append(m.someParts[:0], v.parts()...) // the slices begin in m itself
		m.costs = append(m.someCosts[:0], v.asked()...)
		m.counts = m.someCounts[:len(m.costs)]
		v.more = m
	}
	m := v.more
	if len(m.parts) == maxParts {
		return nil, fmt.Errorf("%w: over %d of them in one call", ErrInvalidIdentifier, maxParts)
	}
	from, n := len(m.costs), len(rules.Rules)
	m.parts = append(m.parts, storage.Part{Identifier: id, Rules: rules})
	m.costs = slices.Grow(m.costs, n)[:from+n]
	m.counts = slices.Grow(m.counts, n)[:from+n]
	clear(m.costs[from:]) // the room that Grow makes may hold anything
	return m.costs[from:], nil
}

// unlimited notes the largest cost of a part that nothing limits, for Tokens.
func (v *Verdict) unlimited(cost int64, options []Option) {
	v.tokens = max(v.tokens, cost)
	for i := range options {
		if o := &options[i]; o.kind == costOfOption {
			v.tokens = max(v.tokens, o.n)
		}
	}
}

// empty reports whether the request has no parts, so that no bucket is asked.
func (v *Verdict) empty() bool { return v.nParts == 0 && v.more == nil }

// parts returns the parts of the request.
func (v *Verdict) parts() []storage.Part {
	if v.more != nil {
		return v.more.parts
	}
	return v.few[:v.nParts]
}

// asked returns the costs of all buckets, through all parts in order; all returns their counts.
func (v *Verdict) asked() []int64 {
	if v.more != nil {
		return v.more.costs
	}
	return v.costs[:v.nBuckets]
}

func (v *Verdict) all() []storage.Count {
	if v.more != nil {
		return v.more.counts
	}
	return v.counts[:v.nBuckets]
}

// answered takes over what a storage says besides the counts, which it has written in place. The source is a parameter of
// its own on purpose: if it were read from a, escape analysis would conclude that v keeps what a points to, which includes
// the counts in v itself, and would move every Verdict to the heap.
func (v *Verdict) answered(a *storage.Answer, source string, mode storage.Mode) {
	v.Allowed, v.source, v.degraded, v.at, v.peeked = a.Allowed, source, a.Degraded, a.At, mode == storage.Peek
	v.tokens = a.Tokens
	if !a.Allowed || v.within != 0 {
		v.waits()
	}
}

// waits sets RetryAfter, or the Delay of a reservation, to the longest wait of any bucket.
func (v *Verdict) waits() {
	wait := &v.RetryAfter
	if v.Allowed {
		wait = &v.Delay
	}
	counts := v.all()
	for i := range counts {
		*wait = max(*wait, duration(counts[i].RetryAfter))
	}
}
