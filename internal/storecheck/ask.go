package storecheck

import (
	"context"
	"slices"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// Request is a storage.Request in which each part has its own costs, so that tests can change parts one by one.
type Request struct {
	Name    string
	Mode    storage.Mode
	Clocked bool
	Now     int64
	Within  int64
	Parts   []Part
}

// Part is one identifier in a Request.
type Part struct {
	Identifier string
	Rules      *storage.RuleSet
	Costs      []int64
	AtMost     bool
}

// NewPart returns a part that asks every rule for the same cost.
func NewPart(id string, rules []law.Rule, cost int64) Part {
	return Part{Identifier: id, Rules: law.NewRuleSet(rules...), Costs: slices.Repeat([]int64{cost}, len(rules))}
}

// Of returns r in the form that a storage takes. It shares no slice with r.
func (r *Request) Of() *storage.Request {
	out := &storage.Request{Name: r.Name, Mode: r.Mode, Clocked: r.Clocked, Now: r.Now, Within: r.Within}
	for _, p := range r.Parts {
		out.Parts = append(out.Parts, storage.Part{Identifier: p.Identifier, Rules: p.Rules, AtMost: p.AtMost})
		out.Costs = append(out.Costs, p.Costs...)
	}
	return out
}

// Verdict is the answer of a storage, together with its request.
type Verdict struct {
	Allowed    bool
	RetryAfter time.Duration // of a denial, else 0
	Delay      time.Duration // of a reservation, else 0

	request Request
	answer  storage.Answer // empty after an error
}

// Decide asks a storage for a decision.
func Decide(ctx context.Context, s storage.Storage, r Request) (Verdict, error) {
	return decide(r, func(r *storage.Request, a *storage.Answer) error { return s.Decide(ctx, r, a) })
}

// Fresh is a storage with a DecideFresh, as package redis has it.
type Fresh interface {
	DecideFresh(ctx context.Context, r *storage.Request, a *storage.Answer, since int64) error
}

// DecideFresh asks a storage for a decision that does not trust states changed at since or before.
func DecideFresh(ctx context.Context, s Fresh, r Request, since int64) (Verdict, error) {
	return decide(r, func(r *storage.Request, a *storage.Answer) error { return s.DecideFresh(ctx, r, a, since) })
}

// decide asks by a function, and returns an empty Verdict with an error.
func decide(r Request, by func(*storage.Request, *storage.Answer) error) (Verdict, error) {
	asked := r.Of()
	a := &storage.Answer{Counts: make([]storage.Count, len(asked.Costs))}
	if err := by(asked, a); err != nil {
		return Verdict{}, err
	}
	return Answered(r, a), nil
}

// Answered returns the answer to a request as a Verdict.
func Answered(r Request, a *storage.Answer) Verdict {
	v := Verdict{Allowed: a.Allowed, request: r, answer: *a}
	for i := range a.Counts {
		if wait := micros(a.Counts[i].RetryAfter); a.Allowed {
			v.Delay = max(v.Delay, wait)
		} else {
			v.RetryAfter = max(v.RetryAfter, wait)
		}
	}
	return v
}

// micros returns n microseconds.
func micros(n int64) time.Duration { return time.Duration(n) * time.Microsecond }

// Taken reports whether the costs were taken.
func (v *Verdict) Taken() bool { return v.Allowed && v.request.Mode != storage.Peek }

// Source returns the name of the storage's kind.
func (v *Verdict) Source() string { return v.answer.Source }

// Degraded reports whether a fallback answered.
func (v *Verdict) Degraded() bool { return v.answer.Degraded }

// At returns when the storage decided, as in storage.Answer.
func (v *Verdict) At() int64 { return v.answer.At }

// Count returns what the answer says of bucket i, counted through all parts.
func (v *Verdict) Count(i int) storage.Count { return v.answer.Counts[i] }

// Parts returns the number of parts of the request, or 0 after an error.
func (v *Verdict) Parts() int { return len(v.request.Parts) }

// Part returns part i of the request.
func (v *Verdict) Part(i int) *Part { return &v.request.Parts[i] }

// Cost returns what an admitted call took from bucket j of part i.
func (v *Verdict) Cost(i, j int) int64 {
	p := &v.request.Parts[i]
	if p.AtMost {
		return min(p.Costs[j], v.answer.Tokens)
	}
	return p.Costs[j]
}

// Tokens returns the largest number of tokens that was taken from one bucket, or 0 after a denial.
func (v *Verdict) Tokens() (most int64) {
	if !v.Allowed {
		return 0
	}
	for i := range v.request.Parts {
		for j := range v.request.Parts[i].Costs {
			most = max(most, v.Cost(i, j))
		}
	}
	return most
}

// Level is what the answer says of one bucket, in tokens and durations.
type Level struct {
	Identifier, Bucket                        string
	Limit, Remaining, Debt                    int64
	Period, ResetAfter, NextAfter, RetryAfter time.Duration
}

// Levels returns the levels of all buckets, through all parts in order.
func (v *Verdict) Levels() (out []Level) {
	counts := v.answer.Counts
	for _, p := range v.request.Parts {
		for i := range p.Rules.Rules {
			r, c := &p.Rules.Rules[i], &counts[i]
			out = append(out, Level{p.Identifier, r.Name, r.Capacity, max(0, c.Remaining), max(0, -c.Remaining),
				micros(r.Period), micros(c.ResetAfter), micros(c.NextAfter), micros(c.RetryAfter)})
			if v.Allowed {
				out[len(out)-1].RetryAfter = 0
			}
		}
		counts = counts[len(p.Costs):]
	}
	return out
}
