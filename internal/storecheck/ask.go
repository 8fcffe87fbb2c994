package storecheck

import (
	"context"
	"slices"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// Request is a storage.Request whose costs are with their parts.
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

// NewPart asks every rule for the same cost.
func NewPart(id string, rules []law.Rule, cost int64) Part {
	return Part{Identifier: id, Rules: law.NewRuleSet(rules...), Costs: slices.Repeat([]int64{cost}, len(rules))}
}

// Of is the request that a storage is asked, which shares nothing with r.
func (r *Request) Of() *storage.Request {
	out := &storage.Request{Name: r.Name, Mode: r.Mode, Clocked: r.Clocked, Now: r.Now, Within: r.Within}
	for _, p := range r.Parts {
		out.Parts = append(out.Parts, storage.Part{Identifier: p.Identifier, Rules: p.Rules, AtMost: p.AtMost})
		out.Costs = append(out.Costs, p.Costs...)
	}
	return out
}

// Verdict is the answer of a storage to a request, which it refers to.
type Verdict struct {
	Allowed    bool
	RetryAfter time.Duration // of a denial
	Delay      time.Duration // of a reservation

	request Request
	answer  storage.Answer // empty after an error
}

// Decide asks a storage.
func Decide(ctx context.Context, s storage.Storage, r Request) (Verdict, error) {
	return decide(r, func(r *storage.Request, a *storage.Answer) error { return s.Decide(ctx, r, a) })
}

// Fresh is a storage that can be asked with a doubt.
type Fresh interface {
	DecideFresh(ctx context.Context, r *storage.Request, a *storage.Answer, since int64) error
}

// DecideFresh asks one.
func DecideFresh(ctx context.Context, s Fresh, r Request, since int64) (Verdict, error) {
	return decide(r, func(r *storage.Request, a *storage.Answer) error { return s.DecideFresh(ctx, r, a, since) })
}

func decide(r Request, by func(*storage.Request, *storage.Answer) error) (Verdict, error) {
	asked := r.Of()
	a := &storage.Answer{Counts: make([]storage.Count, len(asked.Costs))}
	if err := by(asked, a); err != nil {
		return Verdict{}, err
	}
	return Answered(r, a), nil
}

// Answered is an answer to a request as a Verdict.
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

func micros(n int64) time.Duration { return time.Duration(n) * time.Microsecond }

// Taken says that the costs were taken.
func (v *Verdict) Taken() bool { return v.Allowed && v.request.Mode != storage.Peek }

// Source is the storage's name of its kind.
func (v *Verdict) Source() string { return v.answer.Source }

// Degraded says that a fallback answered.
func (v *Verdict) Degraded() bool { return v.answer.Degraded }

// At is when the storage decided.
func (v *Verdict) At() int64 { return v.answer.At }

// Count is what it counted of bucket i.
func (v *Verdict) Count(i int) storage.Count { return v.answer.Counts[i] }

// Parts is how many parts the request had, 0 if none was answered.
func (v *Verdict) Parts() int { return len(v.request.Parts) }

// Part is part i of the request.
func (v *Verdict) Part(i int) *Part { return &v.request.Parts[i] }

// Cost is what was taken from bucket j of part i.
func (v *Verdict) Cost(i, j int) int64 {
	p := &v.request.Parts[i]
	if p.AtMost {
		return min(p.Costs[j], v.answer.Tokens)
	}
	return p.Costs[j]
}

// Tokens is the most that was taken from a bucket.
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

// Level is what the answer says of one bucket.
type Level struct {
	Identifier, Bucket                        string
	Limit, Remaining, Debt                    int64
	Period, ResetAfter, NextAfter, RetryAfter time.Duration
}

// Levels are those of all buckets.
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
