package lease

import (
	"strings"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

const (
	hot   = 8      // calls in a half Lifetime and the one before, from which on it is worth to take ahead
	share = 8      // a lease is at most one part in so many of what was last seen to remain
	pause = 10_000 // microseconds: the longest that tokens which come back a few at a time may gather
)

type key struct{ name, identifier string }

// pool is one identifier. The lock of its shard guards it.
type pool struct {
	key
	shard     *shard
	rules     *storage.RuleSet
	buckets   []bucket
	lease     lease
	flight    *flight       // the question for a lease that is on its way, if any
	returning chan struct{} // closed when all that was given back is back; nil: it is
	resets    int           // how often the identifier was reset, so that a lease from before is not used

	// A Charge and a question that overlap may have reached the shared storage in either order. So nobody knows whether
	// the answer has the Charge counted in.
	charging int   // calls of Charge on their way
	charged  int64 // when the last of them ended
	heardAt  int64 // when rest was last heard of
	vague    bool  // rest may be wrong by a Charge, so no Peek is told it

	since         int64 // when this half Lifetime began
	calls, before int64 // calls in it, and in the one before
	used          int64 // when something was asked last

	// Rule 1. The last denial, told at denied, is believed until then.
	denied, until int64
	degraded      bool // a fallback of the shared storage gave it
}

// bucket is what is known of one bucket of a pool.
type bucket struct {
	rest          int64 // what remained in the shared storage, when it was last heard of
	asked, before int64 // tokens asked in this half Lifetime, and in the one before
	cost          int64 // what was denied
	denial        storage.Count
}

// poolOf is the pool of a request's identifier, if it has one or asks often enough for one. A pool is of one set of rules:
// what it holds by others is given back.
func (s *Storage) poolOf(sh *shard, h uint64, r *storage.Request, now int64) *pool {
	part := &r.Parts[0]
	p := sh.pools[key{r.Name, part.Identifier}]
	switch {
	case p == nil:
		if sh.closed || r.Mode != storage.Take || s.options.DenialsOnly || !s.warms(h, now) {
			return nil
		}
		if p = s.add(sh, r, now); p == nil {
			return nil
		}
		p.calls = hot
		for i := range p.buckets { // about
			p.buckets[i].asked = hot * r.Costs[i]
		}
	case p.rules != part.Rules && !sh.closed:
		s.giveBack(p, p.empty())
		if p.flight != nil {
			p.flight.free = nil
		}
		p.rules, p.buckets = part.Rules, make([]bucket, len(part.Rules.Rules))
		p.calls, p.before, p.until = 0, 0, 0
	}
	return p
}

// warms counts a call of an identifier that has no pool, and reports whether it asks often. The count is halved with each
// half Lifetime. Identifiers may share one: that costs memory for the pool of one that asks less, and nothing else.
func (s *Storage) warms(h uint64, now int64) bool {
	cell, tick := &s.cold[h%uint64(len(s.cold))], uint32(now/s.half)
	old := cell.Load()
	n := uint32(old)
	switch tick - uint32(old>>32) {
	case 0:
	case 1:
		n /= 2
	default:
		n = 0
	}
	cell.Store(uint64(tick)<<32 | uint64(n+1))
	return n+1 >= hot
}

// add makes a pool, unless there are too many.
func (s *Storage) add(sh *shard, r *storage.Request, now int64) *pool {
	if s.pools.Load() >= int64(s.options.MaxIdentifiers) {
		return nil
	}
	s.pools.Add(1)
	part := &r.Parts[0]
	p := &pool{key: key{strings.Clone(r.Name), strings.Clone(part.Identifier)}, shard: sh, rules: part.Rules,
		buckets: make([]bucket, len(part.Rules.Rules)), since: now, used: now}
	sh.pools[p.key] = p
	return p
}

// idle says that nothing would be lost with the pool.
func (p *pool) idle(now, after int64) bool {
	return p.flight == nil && p.returning == nil && len(p.lease.grants) == 0 && p.until <= now && now-p.used > after
}

// count counts a call.
func (p *pool) count(costs []int64, now, half int64) {
	if ago := now - p.since; ago >= half {
		p.turn(ago < 2*half)
		p.since += ago / half * half
	}
	p.used = now
	p.calls++
	for i := range p.buckets {
		p.buckets[i].asked += costs[i]
	}
}

func (p *pool) turn(toTheNext bool) {
	if !toTheNext {
		p.calls = 0
	}
	p.before, p.calls = p.calls, 0
	for i := range p.buckets {
		b := &p.buckets[i]
		if !toTheNext {
			b.asked = 0
		}
		b.before, b.asked = b.asked, 0
	}
}

// decides answers a request, if that needs nobody else.
func (p *pool) decides(r *storage.Request, a *storage.Answer, now int64) bool {
	switch {
	case p.admits(r, a, now):
		p.shard.local++
	case plain(r) && p.denies(r, a, now):
		p.shard.remembered++
	default:
		return false
	}
	return true
}

// admits keeps Rule 2: the lease decides if it has the cost in every bucket.
func (p *pool) admits(r *storage.Request, a *storage.Answer, now int64) bool {
	l := &p.lease
	if now >= l.end || r.Mode == storage.Peek && (p.returning != nil || p.vague) { // it would be told less or more than there is
		return false
	}
	for i := range l.grants {
		if l.grants[i].left < r.Costs[i] {
			return false
		}
	}
	a.Allowed, a.Source, a.Degraded, a.At, a.Tokens = true, Source, l.degraded, now, 0
	for i := range l.grants {
		g, cost := &l.grants[i], r.Costs[i]
		before := g.left
		g.left -= cost
		a.Counts[i] = g.count(&p.rules.Rules[i], p.buckets[i].rest, cost > 0, now)
		if r.Mode == storage.Peek {
			g.left = before
		}
		if r.Parts[0].AtMost {
			a.Tokens = max(a.Tokens, cost)
		}
	}
	return true
}

// denies keeps Rule 1: the same question gets the same answer until it may be over.
func (p *pool) denies(r *storage.Request, a *storage.Answer, now int64) bool {
	if now >= p.until {
		return false
	}
	for i := range p.buckets {
		if p.buckets[i].cost != r.Costs[i] {
			return false
		}
	}
	a.Allowed, a.Source, a.Degraded, a.At, a.Tokens = false, Source, p.degraded, now, 0
	ago := now - p.denied
	for i := range p.buckets {
		c := p.buckets[i].denial
		c.ResetAfter, c.NextAfter = max(0, c.ResetAfter-ago), max(0, c.NextAfter-ago)
		if c.RetryAfter > 0 {
			c.RetryAfter = max(1, c.RetryAfter-ago)
		}
		a.Counts[i] = c
	}
	return true
}

// deny remembers a denial, and tells how long it is believed. Near a limit tokens come back one by one. A process that
// asked for each would be denied most of them, as others do the same; so they gather for a while.
func (p *pool) deny(costs []int64, a *storage.Answer, s *Storage) {
	retry, gather := int64(0), int64(0)
	for i := range a.Counts {
		retry = max(retry, a.Counts[i].RetryAfter)
	}
	if !s.options.DenialsOnly {
		gather = p.gather()
	}
	for i := range a.Counts {
		if c := &a.Counts[i]; c.RetryAfter == retry {
			c.RetryAfter = max(retry, gather)
		}
		p.buckets[i].cost, p.buckets[i].denial = costs[i], a.Counts[i]
	}
	p.denied, p.degraded = a.At, a.Degraded
	p.until = min(p.denied+max(retry, gather), law.Monotonic()+s.denial)
}

// gather is pause, or an eighth of what fills the bucket that is full first.
func (p *pool) gather() int64 {
	most := int64(pause)
	for i := range p.rules.Rules {
		most = min(most, p.rules.Rules[i].Window/8)
	}
	return most
}

// heard takes over what remains in the shared storage, as the answer to a question that was sent at a time says.
func (p *pool) heard(counts []storage.Count, sent int64) {
	p.heardAt, p.vague = law.Monotonic(), p.charging > 0 || p.charged >= sent
	for i := range counts {
		p.buckets[i].rest = counts[i].Remaining
	}
}

// wasCharged changes what remains by a Charge that began at a time, if nothing was heard meanwhile.
func (p *pool) wasCharged(c *storage.Charge, began int64, err error) {
	p.charged = law.Monotonic()
	if err != nil || p.heardAt >= began {
		p.vague = true
		return
	}
	if p.rules == c.Rules {
		for i := range p.buckets {
			b := &p.buckets[i]
			b.rest = min(b.rest-c.Amounts[i].Clamp().N, p.rules.Rules[i].Capacity)
		}
	}
}

// ahead keeps Rule 3: what a call takes ahead along with its cost, or nil for nothing. It is what was asked in the last half
// Lifetime, at most an eighth of what was last seen to remain, in equal proportion from all buckets: so of a bucket of
// which all ask little remains for others, and a bucket that gives less than the others strands none of their tokens.
//
// The lease begins with a use, the call's own: a period of a Replenish bucket never starts for nothing.
func (p *pool) ahead(s *Storage, costs []int64, now int64) []int64 {
	if s.options.DenialsOnly || p.calls+p.before < hot || !leasable(p.rules.Rules, s.life) {
		return nil
	}
	left := float64(max(0, s.half-(now-p.since))) / float64(s.half) // of this half Lifetime
	scale, want := 1.0, [law.MaxBuckets]float64{}
	for i := range p.buckets {
		b := &p.buckets[i]
		want[i] = float64(b.asked-costs[i]) + float64(b.before)*left
		if most := float64(b.rest-costs[i]) / share; want[i] >= 1 && want[i]*scale > most {
			scale = max(0, most/want[i])
		}
	}
	out, some := make([]int64, len(p.buckets)), false
	for i := range out {
		out[i] = max(0, int64(want[i]*scale))
		if costs[i] > 0 && out[i] == 0 {
			return nil
		}
		some = some || out[i] > 0
	}
	if !some {
		return nil
	}
	return out
}

// leasable says that the buckets can be leased. Who counts in a SlidingLog wants every call in its place. And where a hold
// that is given back too late could be taken for the next one there is no lease: a Refund finds its hold by when it ends,
// to half a period.
func leasable(rules []law.Rule, life int64) bool {
	for i := range rules {
		if r := &rules[i]; r.Kind == law.SlidingLog || r.Kind != law.Continuous && r.Period < 2*life {
			return false
		}
	}
	return true
}
