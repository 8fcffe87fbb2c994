// One decision: which rules apply, what each asks of whom, and who denied.

package rules

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/go-throttler/throttler"
)

// Decide decides a request by all rules that apply to it, in one decision, all or nothing, and tells which these are.
// Without any it is allowed, also in a domain that has no rules.
//
// A denial is a Verdict, also where a cost exceeds a capacity, and so in a bucket of capacity 0. Its RetryAfter is then
// 0, as waiting does not help. Errors are those of the Throttler: ErrInvalidCost, also for an entry that should be a
// cost and is no number; ErrInvalidIdentifier for over 256 descriptors or identifiers; ErrUnavailable and its like. What a
// Charge of several buckets records in part is an error that joins a *throttler.DebtError for each.
//
// What Charge rules are asked for is charged after the others were asked, whatever these answered, and has no Levels.
//
// Shadow and Quota rules are decided after the others have admitted, each by itself; an error of the storage then leaves
// Applied without Levels.
//
// Two descriptors that one rule counts for the same are one, whose cost is the sum.
func (e *Engine) Decide(ctx context.Context, r Request) (throttler.Verdict, []Applied, error) {
	p := plan{engine: e, mode: r.Mode}
	if err := p.make(e.set.Load(), &r); err != nil {
		return throttler.Verdict{}, nil, err
	}
	v, err := p.ask(ctx, look)
	if err == nil && v.Allowed && (p.has(decide) || !p.has(look)) {
		v, err = p.ask(ctx, decide)
	}
	if _, uncharged := p.ask(ctx, charge); uncharged != nil {
		v.Allowed, err = false, errors.Join(err, uncharged)
	}
	if bypassed := v.Degraded() && len(v.Levels()) == 0; v.Allowed && !bypassed {
		p.shadows(ctx)
	}
	return v, p.applied, err
}

// plan is what one request asks.
type plan struct {
	engine  *Engine
	mode    Mode
	applied []Applied
	partOf  []int // of each applied rule, -1 if it asks nothing
	parts   []part
	asked   int // parts that are not silent
}

// part is what is asked of one identifier.
type part struct {
	id   string
	rule *Rule
	cost int64
}

func (p *part) silent() bool { return p.rule.Shadow || p.rule.Quota }

// step is when a part is asked for.
type step int

const (
	look   step = iota // a Charge rule and a cost of 0: whether there is a token, before anything is taken
	decide             // most
	charge             // after that, whatever it was
	shadow             // by itself, if all was admitted
)

func (p *plan) stepOf(part *part) step {
	switch {
	case part.silent():
		return shadow
	case p.mode == Charge, p.mode == Consume && part.rule.Charge && part.cost > 0:
		return charge
	case p.mode == Consume && part.rule.Charge:
		return look
	}
	return decide
}

// maxParts is as many identifiers as a Throttler decides on together. More descriptors are refused before they are
// compared with each other, which takes the square of their number.
const maxParts = 256

func (p *plan) make(set *Set, r *Request) error {
	if n := len(r.Descriptors); n > maxParts {
		return fmt.Errorf("%w: the request has %d descriptors, must have at most %d", throttler.ErrInvalidIdentifier, n, maxParts)
	}
	descriptors := r.Descriptors
	if r.Entries != nil || len(descriptors) == 0 {
		descriptors = append([]Descriptor{{Entries: r.Entries, Cost: r.Cost}}, descriptors...)
	}
	var buf [16]*Rule
	matched, counts := buf[:0], make([]int, len(descriptors))
	for i := range descriptors {
		n := len(matched)
		matched = p.engine.match(matched, set, r.Domain, &descriptors[i])
		counts[i] = len(matched) - n
	}
	at := 0
	for i := range descriptors {
		for _, rule := range matched[at : at+counts[i]] {
			if isReplaced(rule, matched) {
				continue
			}
			if err := p.add(rule, i, &descriptors[i]); err != nil {
				return err
			}
		}
		at += counts[i]
	}
	return nil
}

// add is what a rule asks for a descriptor.
func (p *plan) add(rule *Rule, i int, d *Descriptor) error {
	base := int64(1)
	if d.Cost != nil {
		base = *d.Cost
	}
	cost, err := rule.cost.of(rule, base, d.Entries)
	if err != nil {
		return err
	}
	p.applied = append(p.applied, Applied{Rule: rule, Descriptor: i, Cost: cost})
	index := -1
	if !rule.Unlimited {
		index = p.part(rule, rule.identifier(d.Entries), cost)
	}
	p.partOf = append(p.partOf, index)
	if p.asked > maxParts {
		return fmt.Errorf("%w: the rules limit over %d of them", throttler.ErrInvalidIdentifier, maxParts)
	}
	return nil
}

// part adds a cost to what is asked of an identifier. Two limits of a request for one identifier are one part: that of
// the smaller one.
func (p *plan) part(rule *Rule, id string, cost int64) int {
	for i := range p.parts {
		if have := &p.parts[i]; have.id == id && have.silent() == (rule.Shadow || rule.Quota) {
			have.cost = add(have.cost, cost)
			if rule != have.rule && rule.Limits[0].Capacity() < have.rule.Limits[0].Capacity() {
				have.rule = rule
			}
			return i
		}
	}
	p.parts = append(p.parts, part{id, rule, cost})
	if !p.parts[len(p.parts)-1].silent() {
		p.asked++
	}
	return len(p.parts) - 1
}

// add is the sum of two costs, or as much as there can be.
func add(a, b int64) int64 {
	if a > maxCost-b {
		return maxCost
	}
	return a + b
}

func (p *plan) has(s step) bool {
	return slices.ContainsFunc(p.parts, func(part part) bool { return p.stepOf(&part) == s })
}

// ask asks for the parts of a step, and gives the rules the levels of their buckets.
func (p *plan) ask(ctx context.Context, s step) (v throttler.Verdict, err error) {
	var asked []throttler.Part
	for i := range p.parts {
		if part := &p.parts[i]; p.stepOf(part) == s {
			cost := part.cost
			if s == look {
				cost = 1
			}
			asked = append(asked, throttler.For(part.id, part.rule.using, throttler.Cost(cost)))
		}
	}
	if len(asked) == 0 {
		if v.Allowed = true; s == decide {
			err = ctx.Err() // which a storage would have told
		}
		return v, err
	}
	switch {
	case s == charge:
		return v, p.engine.t.ChargeAll(ctx, asked...)
	case s == look || p.mode == Peek:
		v, err = p.engine.t.PeekAll(ctx, asked...)
	case p.mode == Consume:
		v, err = p.engine.t.ConsumeAll(ctx, asked...)
	default:
		return v, fmt.Errorf("rules: Request.Mode is %d, must be Consume, Peek or Charge", p.mode)
	}
	if tooLarge := errors.Is(err, throttler.ErrCostExceedsCapacity); err == nil || tooLarge {
		p.spread(&v, s, tooLarge)
		err = nil
	}
	return v, err
}

// spread gives the rules of a step the levels of their buckets.
func (p *plan) spread(v *throttler.Verdict, s step, tooLarge bool) {
	levels := v.Levels()
	if len(levels) == 0 {
		return
	}
	for i := range p.parts {
		part := &p.parts[i]
		if p.stepOf(part) != s {
			continue
		}
		n := len(part.rule.Limits)
		p.give(i, levels[:n:n], tooLarge)
		levels = levels[n:]
	}
}

// give gives all rules of a part its levels.
func (p *plan) give(index int, levels []throttler.Level, tooLarge bool) {
	denied, cost := false, p.parts[index].cost
	if p.stepOf(&p.parts[index]) == look {
		cost = 1
	}
	for i := range levels {
		denied = denied || levels[i].RetryAfter > 0 || tooLarge && levels[i].Limit < cost
	}
	for i := range p.applied {
		if p.partOf[i] == index {
			p.applied[i].Levels, p.applied[i].Denied = levels, denied
		}
	}
}

// shadows decides what never denies.
func (p *plan) shadows(ctx context.Context) {
	for i := range p.parts {
		part := &p.parts[i]
		if !part.silent() {
			continue
		}
		v, err := p.shadow(ctx, part)
		if tooLarge := errors.Is(err, throttler.ErrCostExceedsCapacity); err == nil || tooLarge {
			p.give(i, v.Levels(), tooLarge)
		}
	}
}

func (p *plan) shadow(ctx context.Context, part *part) (throttler.Verdict, error) {
	options := []throttler.Option{part.rule.using, throttler.Cost(part.cost)}
	switch {
	case p.mode == Peek:
		return p.engine.t.Peek(ctx, part.id, options...)
	case p.mode == Charge || part.rule.Charge:
		return throttler.Verdict{}, p.engine.t.Charge(ctx, part.id, options...)
	}
	return p.engine.t.ConsumeContext(ctx, part.id, options...)
}

// match appends the rules for a descriptor: those that match, or the limit that it brings.
func (e *Engine) match(dst []*Rule, set *Set, name string, d *Descriptor) []*Rule {
	domain := set.domain(name)
	switch {
	case domain == nil:
		return dst
	case d.Limit != nil:
		return append(dst, e.limits.rule(domain, d))
	}
	return domain.match(dst, d.Entries)
}

// overrides are the limits that requests bring, by domain, number of entries and words. There are few of them, or they
// are forgotten: making one again is only slower.
type overrides struct {
	mu    sync.Mutex
	known map[override]*Rule
}

type override struct {
	domain  string
	entries int
	words   string
}

const maxOverrides = 1024

// rule is the rule of the limit of a descriptor. What is spent is found by the entries and by the period and kind of the
// limit, as with rules of files: so a client that asks for ever other limits has one bucket.
func (o *overrides) rule(d *domain, of *Descriptor) *Rule {
	key := override{d.name, len(of.Entries), of.Limit.String()}
	o.mu.Lock()
	defer o.mu.Unlock()
	if r := o.known[key]; r != nil {
		return r
	}
	if o.known == nil || len(o.known) >= maxOverrides {
		o.known = map[override]*Rule{}
	}
	r := &Rule{
		Domain: d.name, ID: "override", cost: cost{factor: 1},
		path: make(path, len(of.Entries)), prefix: envoyPrefix(d.name),
	}
	if r.Unlimited = of.Limit.Unlimited(); !r.Unlimited {
		r.Limits = []throttler.Bucket{limitNamed("", *of.Limit)}
		r.using = throttler.Using(r.Limits...)
	}
	o.known[key] = r
	return r
}
