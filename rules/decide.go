// One decision: which rules apply, what each asks of which identifier, and which of them denied.

package rules

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/go-throttler/throttler"
)

// Decide decides a request by all rules that apply to it, in one decision, all or nothing, and returns these rules. If no
// rule applies the request is allowed, even if the domain has no rules.
//
// A denial is a Verdict. That includes a cost above a capacity, such as any cost in a bucket of capacity 0: its
// RetryAfter is 0, as waiting does not help. Errors are those of the Throttler. ErrInvalidCost is also returned if an
// entry should be a cost but is no number. ErrInvalidIdentifier is returned for more than 256 descriptors or identifiers,
// for a descriptor of more than 64 entries, and for more than 256 KiB of keys and values.
// ErrUnavailable and its like come from the storage. If a request of Mode Charge is recorded only in part, the error joins
// a *throttler.DebtError for each bucket concerned.
//
// Charge rules are charged after the other rules have been asked, whatever those answered. They have no Levels, except in
// Mode Peek, where they have those before the charge. What their buckets cannot record (see Throttler.Charge) is lost. In
// Mode Consume that is no error, because they deny no cost; Config.Observe of the Throttler is told.
//
// Shadow and Quota rules are decided after the others have admitted the request, each in a call of its own. If the
// storage fails then, Applied has no Levels for them.
//
// What descriptors with GiveBack name is given back last, and only if all others were admitted: a request that was denied
// changes nothing, so nobody gains by adding it to requests that are. All rules that match get it back, Charge, Shadow
// and Quota rules too. Their Levels are those afterwards.
//
// Two descriptors for which one rule has the same identifier count as one, whose cost is the sum. What is given back is
// not set off against what is asked.
func (e *Engine) Decide(ctx context.Context, r Request) (throttler.Verdict, []Applied, error) {
	p := plan{engine: e, mode: r.Mode}
	if err := p.make(e.set.Load(), &r); err != nil {
		return throttler.Verdict{}, nil, err
	}
	// If the only parts are Charge rules with a cost of 0, the verdict of look is the answer.
	v, err := p.ask(ctx, look)
	if err == nil && v.Allowed && (p.has(decide) || !p.has(look)) {
		v, err = p.ask(ctx, decide)
	}
	// Charged even after a denial or an error: the cost has been incurred already. What the storage has decided and could
	// not record in full is an error only to a caller that asked for a Charge: a Charge rule denies no cost.
	if _, uncharged := p.ask(ctx, charge); uncharged != nil && (r.Mode == Charge || !errors.Is(uncharged, throttler.ErrDebtLimit)) {
		v.Allowed, err = false, errors.Join(err, uncharged)
	}
	// A bypassed request means that the storage is failing. Asking it about shadow rules would only cost the caller time.
	if bypassed := v.Degraded() && len(v.Levels()) == 0; v.Allowed && !bypassed {
		p.shadows(ctx)
		if unreturned := p.giveBack(ctx); unreturned != nil {
			v.Allowed, err = false, unreturned
		}
	}
	return v, p.applied, err
}

// plan is what one request asks of the throttler.
type plan struct {
	engine  *Engine
	mode    Mode
	applied []Applied
	partOf  []int // for each applied rule the index of its part; -1 if the rule asks for nothing
	parts   []part
	asked   int  // number of parts that are asked together
	shared  bool // several parts have one identifier
}

// part is what is asked of one identifier.
type part struct {
	id   string
	rule *Rule
	cost int64
	back bool // the cost is given back
}

func (p *part) silent() bool { return p.rule.Shadow || p.rule.Quota }

// step is when a part is asked. Each step but shadow is one call for all of its parts.
type step int

const (
	look   step = iota // for a Charge rule and a cost of 0: is there a token left? Asked before anything is taken
	decide             // the normal case
	charge             // afterwards, whatever the others answered; a Peek only looks
	shadow             // each in a call of its own, if all others admitted
	back               // given back, if all others admitted
)

func (p *plan) stepOf(part *part) step {
	switch {
	case part.back:
		return back
	case part.silent():
		return shadow
	case p.mode == Charge, part.rule.Charge && part.cost > 0:
		return charge
	case p.mode == Consume && part.rule.Charge:
		return look
	}
	return decide
}

// maxParts is how many identifiers a Throttler decides on together. A request with more descriptors is rejected early,
// because comparing them with each other takes quadratic time.
const maxParts = 256

// Bounds of what the entries of a request may make the engine do. A rule is looked for by each entry of a descriptor, and
// then looks at all of them, which takes quadratic time. A pattern reads the whole value.
const (
	maxEntries     = 64        // of a descriptor
	maxEntryLength = 256 << 10 // bytes of all keys and values of a request
)

// bounded returns an error if the request has more of anything than one decision allows.
func (r *Request) bounded() error {
	if n := len(r.Descriptors); n > maxParts {
		return fmt.Errorf("%w: the request has %d descriptors, must have at most %d", throttler.ErrInvalidIdentifier, n, maxParts)
	}
	length := 0
	count := func(entries []Entry) error {
		if n := len(entries); n > maxEntries {
			return fmt.Errorf("%w: a descriptor has %d entries, must have at most %d", throttler.ErrInvalidIdentifier, n, maxEntries)
		}
		for i := range entries {
			length += len(entries[i].Key) + len(entries[i].Value)
		}
		return nil
	}
	err := count(r.Entries)
	for i := 0; i < len(r.Descriptors) && err == nil; i++ {
		err = count(r.Descriptors[i].Entries)
	}
	if err == nil && length > maxEntryLength {
		err = fmt.Errorf("%w: the entries have %d bytes, must have at most %d", throttler.ErrInvalidIdentifier, length, maxEntryLength)
	}
	return err
}

func (p *plan) make(set *Set, r *Request) error {
	if err := r.bounded(); err != nil {
		return err
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
	asking := matched
	if slices.ContainsFunc(descriptors, func(d Descriptor) bool { return d.GiveBack }) {
		asking = matchedByAsking(descriptors, matched, counts)
	}
	p.applied, p.partOf, p.parts = make([]Applied, 0, len(matched)), make([]int, 0, len(matched)), make([]part, 0, len(matched))
	at := 0
	for i := range descriptors {
		// A rule is also replaced by a rule that another descriptor matched. But a descriptor that only gives back takes no
		// limit from those that ask: whoever may give back could otherwise ask for more than the limit.
		by := asking
		if descriptors[i].GiveBack {
			by = matched
		}
		for _, rule := range matched[at : at+counts[i]] {
			if isReplaced(rule, by) {
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

// matchedByAsking returns the rules that descriptors matched which do not give back. counts says how many each matched.
func matchedByAsking(descriptors []Descriptor, matched []*Rule, counts []int) (asking []*Rule) {
	at := 0
	for i, n := range counts {
		if !descriptors[i].GiveBack {
			asking = append(asking, matched[at:at+n]...)
		}
		at += n
	}
	return asking
}

// add records what a rule asks for a descriptor.
func (p *plan) add(rule *Rule, i int, d *Descriptor) error {
	base := int64(1)
	if d.Cost != nil {
		base = *d.Cost
	}
	cost, err := rule.cost.of(rule, base, d.Entries)
	if err != nil {
		return err
	}
	fromEntry := rule.cost.entry(d.Entries) >= 0
	p.applied = append(p.applied, Applied{Rule: rule, Descriptor: i, Cost: cost, fromEntry: fromEntry, back: d.GiveBack})
	index := -1
	if !rule.Unlimited {
		index = p.part(part{rule.identifier(d.Entries), rule, cost, d.GiveBack})
	}
	p.partOf = append(p.partOf, index)
	if p.asked > maxParts {
		return fmt.Errorf("%w: the rules limit over %d of them", throttler.ErrInvalidIdentifier, maxParts)
	}
	return nil
}

// part adds a cost to what is asked of an identifier and returns the index of the part. If a request brings two limits of
// the same name, period and kind for one identifier, they become one part with the smaller limit; others are kept apart.
// So are silent parts and those of Charge rules, because they are asked separately, and parts that are given back.
func (p *plan) part(new part) int {
	for i := range p.parts {
		have := &p.parts[i]
		if have.id != new.id || have.back != new.back || !have.back && have.silent() != new.silent() {
			continue
		}
		if !have.rule.isLike(new.rule) {
			p.shared = true
			continue
		}
		have.cost = add(have.cost, new.cost)
		if new.rule.Limits[0].Capacity() < have.rule.Limits[0].Capacity() {
			have.rule = new.rule
		}
		return i
	}
	p.parts = append(p.parts, new)
	if new.back || !new.silent() {
		p.asked++
	}
	return len(p.parts) - 1
}

// isLike reports whether two rules take from the same bucket, or are one rule.
func (r *Rule) isLike(other *Rule) bool {
	return r == other || r.Charge == other.Charge && len(r.Limits) == 1 && len(other.Limits) == 1 && isSame(r.Limits[0], other.Limits[0])
}

func isSame(a, b throttler.Bucket) bool {
	return a.Name() == b.Name() && a.Period() == b.Period() && a.Kind() == b.Kind()
}

// add returns the sum of two costs, at most maxCost.
func add(a, b int64) int64 {
	if a > maxCost-b {
		return maxCost
	}
	return a + b
}

func (p *plan) has(s step) bool {
	return slices.ContainsFunc(p.parts, func(part part) bool { return p.stepOf(&part) == s })
}

// ask asks for the parts of a step in one call and gives the rules the levels of their buckets.
func (p *plan) ask(ctx context.Context, s step) (v throttler.Verdict, err error) {
	asked := p.asks(s)
	if len(asked) == 0 {
		if v.Allowed = true; s == decide {
			err = ctx.Err() // the error that a storage would have returned
		}
		return v, err
	}
	switch {
	case s == charge && p.mode != Peek:
		return v, p.engine.t.ChargeAll(ctx, asked...)
	case s == look || s == back || p.mode == Peek:
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

// asks returns what a step asks of each identifier.
func (p *plan) asks(s step) (all []throttler.Part) {
	if !p.has(s) {
		return nil
	}
	all = make([]throttler.Part, 0, len(p.parts))
	options := make([]throttler.Option, 0, 2*len(p.parts)) // of all parts: a part has two unless it is shared
	for i := range p.parts {
		one := &p.parts[i]
		switch {
		case p.stepOf(one) != s:
		case !p.shared:
			n := len(options)
			options = append(options, one.rule.using, throttler.Cost(p.costOf(one, "")))
			all = append(all, throttler.For(one.id, options[n:n+2:n+2]...))
		case !slices.ContainsFunc(p.parts[:i], func(before part) bool { return p.isOneCall(one, &before) }):
			all = append(all, p.together(i))
		}
	}
	return all
}

// isOneCall reports whether two parts have one identifier and are asked in one step.
func (p *plan) isOneCall(a, b *part) bool { return a.id == b.id && p.stepOf(a) == p.stepOf(b) }

// together returns what the part i and those after it ask of their identifier, because a call may have an identifier only
// once. Of limits that are the same the smallest counts.
func (p *plan) together(i int) throttler.Part {
	first := &p.parts[i]
	var limits []throttler.Bucket
	for j := i; j < len(p.parts); j++ {
		if !p.isOneCall(first, &p.parts[j]) {
			continue
		}
		for _, b := range p.parts[j].rule.Limits {
			if k := slices.IndexFunc(limits, func(have throttler.Bucket) bool { return isSame(have, b) }); k < 0 {
				limits = append(limits, b)
			} else if b.Capacity() < limits[k].Capacity() {
				limits[k] = b
			}
		}
	}
	options := []throttler.Option{throttler.Using(limits...)}
	for _, b := range limits {
		options = append(options, throttler.CostOf(b.Name(), p.costOf(first, b.Name())))
	}
	return throttler.For(first.id, options...)
}

// costOf returns what the step of a part asks of a bucket of its identifier.
func (p *plan) costOf(part *part, bucket string) (sum int64) {
	switch s := p.stepOf(part); {
	case s == look:
		return 1
	case s == back, s == charge && p.mode == Peek: // a look at what is there
		return 0
	case s == shadow || !p.shared:
		return part.cost
	}
	for i := range p.parts {
		if other := &p.parts[i]; p.isOneCall(part, other) && slices.ContainsFunc(other.rule.Limits, func(b throttler.Bucket) bool { return b.Name() == bucket }) {
			sum = add(sum, other.cost)
		}
	}
	return sum
}

// spread distributes the levels of a verdict to the rules of the step. The levels come in the order of the parts, and
// within a part in the order of its limits, unless parts share an identifier.
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
		if p.shared {
			p.give(i, levelsOf(part, levels), tooLarge)
			continue
		}
		n := len(part.rule.Limits)
		p.give(i, levels[:n:n], tooLarge)
		levels = levels[n:]
	}
}

// levelsOf returns those of the levels that are a part's.
func levelsOf(part *part, levels []throttler.Level) (own []throttler.Level) {
	for _, b := range part.rule.Limits {
		for i := range levels {
			if l := &levels[i]; l.Identifier == part.id && l.Bucket == b.Name() {
				own = append(own, *l)
			}
		}
	}
	return own
}

// give gives the levels of a part to all rules that share it. They denied if a level has a RetryAfter, or if its limit is
// below the cost: waiting does not help then, so such a level has none.
func (p *plan) give(index int, levels []throttler.Level, tooLarge bool) {
	denied, part := false, &p.parts[index]
	for i := range levels {
		denied = denied || levels[i].RetryAfter > 0 || tooLarge && levels[i].Limit < p.costOf(part, levels[i].Bucket)
	}
	for i := range p.applied {
		if p.partOf[i] == index {
			p.applied[i].Levels, p.applied[i].Denied = levels, denied
		}
	}
}

// shadows decides the Shadow and Quota rules. Their errors are dropped, because they must not affect the answer.
func (p *plan) shadows(ctx context.Context) {
	for i := range p.parts {
		part := &p.parts[i]
		if p.stepOf(part) != shadow {
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

// giveBack gives back what the descriptors name, and looks what is left then. Errors of Shadow and Quota rules are
// dropped, as in shadows, and so is one of the look.
func (p *plan) giveBack(ctx context.Context) error {
	var failed []error
	for i := range p.parts {
		part := &p.parts[i]
		if !part.back || p.mode == Peek {
			continue
		}
		if err := p.engine.t.GiveBack(ctx, part.id, part.rule.using, throttler.Cost(part.cost)); err != nil && !part.silent() {
			failed = append(failed, err)
		}
	}
	if failed == nil {
		_, _ = p.ask(ctx, back)
	}
	return errors.Join(failed...)
}

// match appends the rules for a descriptor: those that match, or the one of the limit that it brings.
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

// overrides caches the rules of limits that requests bring, by domain and the words of the limit. At maxOverrides it
// starts anew: that costs only the time to make the rules again. A rule holds nothing of the entries, so all of them take
// at most about two megabytes.
type overrides struct {
	mu    sync.Mutex
	known map[override]*Rule
}

type override struct {
	domain, words string
}

const maxOverrides = 1024

// rule returns the rule for the limit of a descriptor. Consumption is found by the entries and by the period and kind of
// the limit, as with rules of files. A client that keeps changing the capacity of its limit therefore uses one bucket.
func (o *overrides) rule(d *domain, of *Descriptor) *Rule {
	key := override{d.name, of.Limit.String()}
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
		path: path{}, prefix: envoyPrefix(d.name), // of such a path the value of each entry counts
	}
	if r.Unlimited = of.Limit.Unlimited(); !r.Unlimited {
		r.Limits = []throttler.Bucket{limitNamed("", *of.Limit)}
		r.using = throttler.Using(r.Limits...)
	}
	o.known[key] = r
	return r
}
