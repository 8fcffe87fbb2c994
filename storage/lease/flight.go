package lease

import (
	"context"
	"hash/maphash"
	"slices"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// margin is how many microseconds before its tokens are back a lease ends. In the longest Lifetime of 10 s clocks of
// servers and processes drift apart by as much, at a ten-thousandth.
const margin = 1000

// lease is what a process may hand out. The zero lease is none.
type lease struct {
	rules    *storage.RuleSet
	end      int64   // it may be used before that
	degraded bool    // a fallback of the shared storage gave it
	grants   []grant // one for each bucket
}

// grant is the part of a lease from one bucket.
type grant struct {
	left int64 // tokens not used
	held int64 // when all of them are back by themselves, not later than in truth
	full int64 // when the bucket is full, as the answer that brought the lease told
	next int64 // when it has one token more
}

// grantOf is what an answer brought that was asked for more than the call's cost. All ends are counted from before the
// question: the shared storage decided later, so there they are later.
func grantOf(rules *storage.RuleSet, extra []int64, a *storage.Answer, sent, life int64) lease {
	l := lease{rules: rules, end: sent + life, degraded: a.Degraded, grants: make([]grant, len(extra))}
	for i, n := range extra {
		r, c := &rules.Rules[i], &a.Counts[i]
		l.grants[i] = grant{n, sent + c.HeldFor, sent + c.ResetAfter, sent + c.NextAfter}
		if n == 0 || r.Kind == law.Continuous {
			continue // a level drains: there is no moment at which a token is back
		}
		end := sent + c.HeldFor - margin
		if r.Kind == law.SlidingWindow {
			end -= r.Period // after its window a token counts less and less, but one that is used then would be a whole one
		}
		l.end = min(l.end, end)
	}
	return l
}

// drains is how long n tokens of a level drain.
func drains(r *law.Rule, n int64) int64 {
	if r.Kind != law.Continuous || n == 0 {
		return 0
	}
	return (n*r.One + r.Drain - 1) / r.Drain * r.Tick
}

// count is what a decision by the lease tells. What is left will be given back, and so it counts as if it were there.
func (g *grant) count(r *law.Rule, rest int64, took bool, now int64) storage.Count {
	ahead := drains(r, g.left)
	c := storage.Count{Remaining: min(r.Capacity, rest+g.left), ResetAfter: max(0, g.full-now-ahead)}
	c.NextAfter = min(c.ResetAfter, max(1, g.next-now))
	if took {
		c.HeldFor = max(0, g.held-now-ahead)
	}
	return c
}

// countIn counts what is left of the lease as there, in what the shared storage has told.
func (l *lease) countIn(counts []storage.Count) {
	for i := range l.grants {
		left, c, r := l.grants[i].left, &counts[i], &l.rules.Rules[i]
		ahead := drains(r, left)
		c.Remaining = min(c.Remaining+left, max(c.Remaining, r.Capacity))
		c.ResetAfter, c.HeldFor = max(0, c.ResetAfter-ahead), max(0, c.HeldFor-ahead)
		c.NextAfter = min(c.NextAfter, c.ResetAfter)
	}
}

// back is what gives the lease back, or nil if there is nothing to give. What has come back by itself is not given back a
// second time. On the way a level drains further; but held is too early by as much as the question was on its way.
func (l *lease) back(k key, now int64) *storage.Charge {
	amounts, some := make([]storage.Amount, len(l.grants)), false
	for i := range l.grants {
		g := &l.grants[i]
		if in := g.held - now; g.left > 0 && in > 0 {
			amounts[i], some = storage.Amount{N: -g.left, In: in}, true
		}
	}
	if !some {
		return nil
	}
	return &storage.Charge{Name: k.name, Identifier: k.identifier, Rules: l.rules, Amounts: amounts}
}

// any says that something is left.
func (l *lease) any() bool {
	return slices.ContainsFunc(l.grants, func(g grant) bool { return g.left > 0 })
}

// empty takes the lease out of a pool.
func (p *pool) empty() lease {
	l := p.lease
	p.lease = lease{}
	delete(p.shard.leased, p)
	return l
}

// flight is a question for a call's cost and a lease. It does not end with the call's context, but when Close gives up: so a
// caller that leaves loses no tokens. What is written until done is closed is the goroutine's of the flight.
type flight struct {
	pool   *pool
	rules  *storage.RuleSet
	resets int     // pool.resets when it began
	costs  []int64 // of the call
	extra  []int64 // what it takes ahead
	back   lease   // what the pool had left, but not enough for the call
	away   bool    // something is being given back

	// Rule 4. What the flight takes and nobody waits for, guarded by the lock of the shard; nil once nobody shall.
	free []int64

	done   chan struct{}
	answer storage.Answer
	err    error
}

// flightFor is the flight that a call is to wait for, nil for none, and whether it is the call's own. Who has waited once
// waits for no other. The shard is locked.
func (s *Storage) flightFor(ctx context.Context, p *pool, r *storage.Request, now int64, waited bool) (f *flight, own bool) {
	switch f = p.flight; {
	case r.Mode != storage.Take || !plain(r):
		return nil, false
	case f == nil:
		return s.start(ctx, p, r.Costs, now), true
	case waited || !f.claim(r.Parts[0].Rules, r.Costs):
		return nil, false
	}
	return f, false
}

// start starts a flight, if it is worth to take ahead. The shard is locked.
func (s *Storage) start(ctx context.Context, p *pool, costs []int64, now int64) *flight {
	extra := p.ahead(s, costs, now)
	if extra == nil {
		return nil
	}
	f := &flight{pool: p, rules: p.rules, resets: p.resets, costs: slices.Clone(costs), extra: extra, free: slices.Clone(extra),
		back: p.empty(), away: p.returning != nil, done: make(chan struct{}), answer: storage.Answer{Counts: make([]storage.Count, len(costs))}}
	p.flight = f
	s.running.Go(func() {
		ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		defer cancel()
		defer context.AfterFunc(s.lasting, cancel)()
		s.fly(ctx, f)
	})
	return f
}

// claim keeps Rule 4: it reports whether the flight takes enough for one more call.
func (f *flight) claim(rules *storage.RuleSet, costs []int64) bool {
	if f.free == nil || f.rules != rules {
		return false
	}
	for i, n := range f.free {
		if n < costs[i] {
			return false
		}
	}
	for i := range f.free {
		f.free[i] -= costs[i]
	}
	return true
}

// fly asks for the cost and the lease. If that is denied it gives back what this process holds, and asks for the cost alone.
//
// Where the cost is one token AtMost does both in one question: it brings what there is, if that is one at least.
func (s *Storage) fly(ctx context.Context, f *flight) {
	atMost := true
	for i, cost := range f.costs {
		atMost = atMost && (cost == 1 || cost == 0 && f.extra[i] == 0)
	}
	sent, err := s.question(ctx, f, atMost)
	if err == nil && !f.answer.Allowed && (f.back.any() || f.away || !atMost) {
		s.bringBack(f)
		clear(f.extra)
		sent, err = s.question(ctx, f, false)
	}
	if err != nil && ctx.Err() != nil {
		err = storage.ErrClosed
	}
	s.land(f, sent, err)
}

// bringBack gives back what the pool had left, and waits until all that it has given back is there.
func (s *Storage) bringBack(f *flight) {
	p, sh := f.pool, f.pool.shard
	sh.mu.Lock()
	s.giveBack(p, f.back)
	f.back = lease{}
	done := p.returning
	sh.mu.Unlock()
	if done != nil {
		<-done
	}
}

// question asks, and sets extra to what the answer brought.
func (s *Storage) question(ctx context.Context, f *flight, atMost bool) (sent int64, err error) {
	q := &storage.Request{Name: f.pool.name, Costs: make([]int64, len(f.costs)),
		Parts: []storage.Part{{Identifier: f.pool.identifier, Rules: f.rules, AtMost: atMost}}}
	for i := range q.Costs {
		q.Costs[i] = f.costs[i] + f.extra[i]
	}
	sent = law.Monotonic()
	err = s.ask(ctx, q, &f.answer)
	if atMost && err == nil && f.answer.Allowed {
		for i := range f.extra {
			f.extra[i] = min(f.costs[i]+f.extra[i], f.answer.Tokens) - f.costs[i]
		}
	}
	f.answer.Tokens = 0 // the caller has not asked for AtMost
	return sent, err
}

// land makes what a flight has brought the lease of its pool, and wakes who waits. It is given back at once if the pool has
// other rules by now or the storage is closed.
func (s *Storage) land(f *flight, sent int64, err error) {
	p, sh, a := f.pool, f.pool.shard, &f.answer
	sh.mu.Lock()
	defer sh.mu.Unlock()
	defer close(f.done)
	p.flight, f.err = nil, err
	s.giveBack(p, f.back)
	if err != nil {
		return
	}
	same := p.rules == f.rules
	if same {
		p.heard(a.Counts, sent)
	}
	if !a.Allowed {
		if same {
			p.deny(f.costs, a, s)
		}
		return
	}
	l := grantOf(f.rules, f.extra, a, sent, s.life)
	l.countIn(a.Counts)
	switch {
	case p.resets != f.resets: // it may have been forgotten
	case !same || sh.closed:
		s.giveBack(p, l)
	case l.any():
		p.lease = l
		sh.leased[p] = struct{}{}
	}
}

// tell is the answer for the call that began the flight.
func (f *flight) tell(a *storage.Answer) error {
	if f.err != nil {
		return f.err
	}
	copy(a.Counts, f.answer.Counts)
	counts := a.Counts
	*a = f.answer
	a.Counts = counts
	return nil
}

// sweep keeps Rule 5: it gives back what nobody uses, and what is over. And it forgets pools that are not used.
func (s *Storage) sweep() {
	tick := time.NewTicker(time.Duration(s.half) * time.Microsecond)
	defer tick.Stop()
	for turn := 0; ; turn++ {
		select {
		case <-tick.C:
		case <-s.closing:
			return
		}
		now := law.Monotonic()
		for i := range s.shards {
			s.sweepShard(&s.shards[i], now, (i+turn)%16 == 0)
		}
	}
}

func (s *Storage) sweepShard(sh *shard, now int64, forget bool) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if sh.closed {
		return
	}
	for p := range sh.leased {
		if now >= p.lease.end || now-p.used > s.half {
			s.giveBack(p, p.empty())
		}
	}
	if !forget {
		return
	}
	for k, p := range sh.pools {
		if p.idle(now, 10*s.life) {
			delete(sh.pools, k)
			s.pools.Add(-1)
		}
	}
}

// returning is what is being given back of a request's identifiers, with their leases if these shall be.
func (s *Storage) returning(r *storage.Request, leases bool) (all []chan struct{}) {
	for i := range r.Parts {
		sh := s.shardOf(r.Parts[i].Identifier)
		sh.mu.Lock()
		if p := sh.pools[key{r.Name, r.Parts[i].Identifier}]; p != nil {
			if leases && !sh.closed {
				s.giveBack(p, p.empty())
			}
			if p.returning != nil {
				all = append(all, p.returning)
			}
		}
		sh.mu.Unlock()
	}
	return all
}

// wait waits until all is back, or the caller leaves.
func wait(ctx context.Context, all []chan struct{}) {
	for _, done := range all {
		select {
		case <-done:
		case <-ctx.Done():
		}
	}
}

// giveBack keeps Rule 5, in the background: so a caller that leaves loses no tokens. It gives back once: after an error it is
// not known whether it was done, and the tokens are back when they come back by themselves. The shard is locked, and not
// closed unless the goroutine that calls is one of the storage's.
func (s *Storage) giveBack(p *pool, l lease) {
	if !l.any() {
		return
	}
	before, done := p.returning, make(chan struct{})
	p.returning = done
	s.running.Go(func() {
		if before != nil {
			<-before
		}
		var err error
		if c := l.back(p.key, law.Monotonic()); c != nil {
			s.returned.Add(1)
			err = s.charge(s.lasting, c)
		}
		p.shard.mu.Lock()
		defer p.shard.mu.Unlock()
		if p.returning == done {
			p.returning = nil
		}
		if err != nil && p.shard.closed {
			s.lost.CompareAndSwap(nil, &err)
		}
		close(done)
	})
}

func (s *Storage) shardOf(identifier string) *shard {
	return &s.shards[maphash.String(s.seed, identifier)>>56]
}
