package lease

import (
	"slices"
	"strings"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

const (
	hot   = 8      // an identifier is hot from this many calls in two half Lifetimes on: this one and the last
	share = 8      // a lease takes at most 1/share of the tokens that were last seen to remain
	pause = 10_000 // microseconds a denial is extended to at most, while refilled tokens gather
)

type key struct{ name, identifier string }

// pool is what this process knows about one identifier. The lock of its shard guards it.
type pool struct {
	key
	shard     *shard
	rules     *storage.RuleSet
	buckets   []bucket
	lease     lease
	flight    *flight       // the request for a lease in progress, or nil
	returning chan struct{} // closed when the last return has finished; nil if none is in progress
	resets    int           // number of Resets; a lease that was requested before the last one is not used

	// If a Charge and a request overlap, the shared storage may have processed them in either order, so it is unknown
	// whether the answer includes the Charge. vague marks that case.
	charging int   // calls of Charge in progress
	charged  int64 // when the last of them ended
	heardAt  int64 // when the last answer set rest
	vague    bool  // rest may be off by a Charge, so a Peek asks the shared storage

	since         int64 // when this half Lifetime began
	calls, before int64 // calls in this half Lifetime, and in the one before
	used          int64 // time of the last call

	// Rule 1. The last denial was made at the time denied and is believed until the time until.
	denied, until int64
	degraded      bool // a fallback of the shared storage made the denial
}

// bucket is what a pool knows about one bucket.
type bucket struct {
	rest          int64 // tokens that remained in the shared storage at its last answer
	asked, before int64 // tokens asked for in this half Lifetime, and in the one before
	cost          int64 // the cost that was denied
	denial        storage.Count
}

// poolOf returns the pool of a request's identifier. It adds a pool if the identifier is asked for often enough, and
// returns nil if there is none. A pool has one set of rules at a time: if the request has other rules, the lease from the
// old ones is given back, and no more calls join a flight for them.
func (s *Storage) poolOf(sh *shard, h uint64, r *storage.Request, now int64) *pool {
	part := &r.Parts[0]
	p := sh.pool(h, r.Name, part.Identifier)
	switch {
	case p == nil:
		if sh.closed || r.Mode != storage.Take || s.options.DenialsOnly || !s.warms(h, now) {
			return nil
		}
		if p = s.add(sh, h, r, now); p == nil {
			return nil
		}
		p.calls = hot
		for i := range p.buckets { // an estimate, since the earlier calls' costs were not recorded
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

// warms counts a call for an identifier without a pool, and reports whether the identifier is hot. The count halves at each
// half Lifetime, and drops to zero after two without a call. Two identifiers may share a counter: then one gets a pool
// although it is not hot, which only costs memory. A cell is not updated atomically as a whole; a lost count only delays
// the pool by a call.
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

// pool returns the pool of an identifier with the hash h, or nil.
func (sh *shard) pool(h uint64, name, identifier string) *pool {
	if p := sh.pools[h]; p != nil && p.identifier == identifier && p.name == name {
		return p
	}
	return nil
}

// add adds a pool, or returns nil if there are MaxIdentifiers already, or if another identifier with the same hash has one.
// The strings are cloned, because the caller may reuse their memory.
func (s *Storage) add(sh *shard, h uint64, r *storage.Request, now int64) *pool {
	if s.pools.Load() >= int64(s.options.MaxIdentifiers) || sh.pools[h] != nil {
		return nil
	}
	s.pools.Add(1)
	part := &r.Parts[0]
	p := &pool{key: key{strings.Clone(r.Name), strings.Clone(part.Identifier)}, shard: sh, rules: part.Rules,
		buckets: make([]bucket, len(part.Rules.Rules)), since: now, used: now}
	sh.pools[h] = p
	return p
}

// idle reports whether the pool can be removed without losing anything.
func (p *pool) idle(now, after int64) bool {
	return p.flight == nil && p.returning == nil && len(p.lease.grants) == 0 && p.until <= now && now-p.used > after
}

// count adds a call to the demand of this half Lifetime, after starting a new one if the old is over.
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

// turn starts a new half Lifetime. If it does not directly follow the current one, the demand in between was zero.
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

// decides answers a request from the lease or the remembered denial, and reports whether it could.
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

// admits implements rule 2: the lease admits the call if it covers the cost in every bucket. A Peek takes nothing, and is not
// answered here while the known balance may be wrong.
func (p *pool) admits(r *storage.Request, a *storage.Answer, now int64) bool {
	l := &p.lease
	if now >= l.end || r.Mode == storage.Peek && (p.returning != nil || p.vague) { // the balance may be wrong
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
		g.count(&a.Counts[i], &p.rules.Rules[i], p.buckets[i].rest, cost > 0, now)
		if r.Mode == storage.Peek {
			g.left = before
		}
		if r.Parts[0].AtMost {
			a.Tokens = max(a.Tokens, cost)
		}
	}
	return true
}

// denies implements rule 1: a call with the same costs is denied as before until the denial may be over. The waits in the
// answer are reduced by the denial's age.
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

// deny remembers a denial until its RetryAfter has passed, for MaxDenial at most. Near a limit tokens are refilled one by
// one. If every process asked for each of them, most of those calls would be denied. So deny raises RetryAfter to at least
// gather, in the answer as well, which lets a few tokens accumulate. With DenialsOnly RetryAfter stays unchanged.
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

// took forgets the denial if a call took tokens that was sent after it: the call that was denied has to wait longer now. A
// call that was on its way meanwhile may have been decided before.
func (p *pool) took(costs []int64, sent int64) {
	if sent >= p.denied && slices.ContainsFunc(costs, func(n int64) bool { return n > 0 }) {
		p.until = 0
	}
}

// gather returns how many microseconds a denial lasts at least: pause, but no more than an eighth of the shortest fill time
// of the buckets.
func (p *pool) gather() int64 {
	most := int64(pause)
	for i := range p.rules.Rules {
		most = min(most, p.rules.Rules[i].Window/8)
	}
	return most
}

// heard records the tokens that remain in the shared storage, from its answer to a request sent at the time sent. They are
// vague if a Charge was in progress at any time between the request and its answer.
func (p *pool) heard(counts []storage.Count, sent int64) {
	p.heardAt, p.vague = law.Monotonic(), p.charging > 0 || p.charged >= sent
	for i := range counts {
		p.buckets[i].rest = counts[i].Remaining
	}
}

// wasCharged applies a Charge that began at the time began to the tokens known to remain. If it failed, or an answer arrived
// during it, it is unknown whether the balance includes the Charge already: then the balance becomes vague instead.
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

// ahead implements rule 3. It returns the tokens of each bucket that a call takes ahead along with its cost, or nil for none.
// That is the demand of the last half Lifetime, but at most 1/share of the tokens that were last seen to remain. So in a
// bucket that every process draws on, most tokens stay available to the others.
//
// All buckets are scaled down by the same factor. A bucket with few tokens would otherwise strand the tokens leased from
// the others, since a lease decides only while it covers the cost in every bucket.
//
// A lease never starts the period of a Replenish bucket that no call has used: nothing is taken ahead of one that the call
// itself takes nothing from. Such a period would end too early for the tokens that are used later.
func (p *pool) ahead(s *Storage, costs []int64, now int64) []int64 {
	if s.options.DenialsOnly || p.calls+p.before < hot || !leasable(p.rules.Rules, s.life) {
		return nil
	}
	// The fraction of this half Lifetime that is still to come. It weights the demand of the one before.
	left := float64(max(0, s.half-(now-p.since))) / float64(s.half)
	scale, want := 1.0, [law.MaxBuckets]float64{}
	for i := range p.buckets {
		b := &p.buckets[i]
		if costs[i] == 0 && p.rules.Rules[i].Kind == law.Replenish {
			continue
		}
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

// leasable reports whether these buckets may be leased. A SlidingLog is never leased, because its purpose is to record when
// each call was made. Buckets of a period under two Lifetimes are not leased either, except Continuous ones. A return
// finds its tokens by the time when they expire, accurate to half a period, so a late one could match those of the next
// period.
func leasable(rules []law.Rule, life int64) bool {
	for i := range rules {
		if r := &rules[i]; r.Kind == law.SlidingLog || r.Kind != law.Continuous && r.Period < 2*life {
			return false
		}
	}
	return true
}
