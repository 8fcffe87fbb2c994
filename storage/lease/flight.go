package lease

import (
	"context"
	"hash/maphash"
	"math/bits"
	"slices"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// margin is how many microseconds a lease ends before the shared storage refills its tokens. The clocks of a server and a
// process drift apart by this much in 10 s, the longest Lifetime, if their rates differ by a ten-thousandth.
const margin = 1000

// lease is the tokens of one identifier that this process may hand out. The zero lease has none. Times are in microseconds,
// by law.Monotonic.
type lease struct {
	rules    *storage.RuleSet
	end      int64   // the lease may be used before this time
	degraded bool    // a fallback of the shared storage granted it
	grants   []grant // one per bucket
}

// grant is the part of a lease from one bucket.
type grant struct {
	left int64 // unused tokens
	held int64 // when all of them are refilled without being given back; may be early, never late
	full int64 // when the bucket is full, by the answer that granted the lease
	next int64 // when the bucket has one token more
}

// grantOf returns the lease from an answer that granted the tokens extra besides the call's cost. All times are counted from
// sent, when the request was sent. The shared storage decided later than that, so the tokens really expire later, and an
// early end is safe.
func grantOf(rules *storage.RuleSet, extra []int64, a *storage.Answer, sent, life int64) lease {
	l := lease{rules: rules, end: sent + life, degraded: a.Degraded, grants: make([]grant, len(extra))}
	for i, n := range extra {
		r, c := &rules.Rules[i], &a.Counts[i]
		l.grants[i] = grant{n, sent + c.HeldFor, sent + c.ResetAfter, sent + c.NextAfter}
		if n == 0 || r.Kind == law.Continuous {
			continue // a level drains steadily, so the tokens are not refilled at one moment
		}
		end := sent + c.HeldFor - margin
		if r.Kind == law.SlidingWindow {
			end -= r.Period // after its window a token counts only in part, but a token used then would count in full
		}
		l.end = min(l.end, end)
	}
	return l
}

// drains returns how many microseconds a Continuous bucket takes to drain n tokens, rounded up to a tick; 0 for other kinds.
func drains(r *law.Rule, n int64) int64 {
	if r.Kind != law.Continuous || n == 0 {
		return 0
	}
	return (n*r.One + r.Drain - 1) / r.Drain * r.Tick
}

// count sets the Count that a decision by the lease reports. The unused tokens of the lease are counted as remaining, since
// they will be used or given back. rest is what was last seen to remain in the shared storage. It writes each field in place:
// a copy of a Count waits until the fields just written have reached the cache, which took a third of a decision.
func (g *grant) count(c *storage.Count, r *law.Rule, rest int64, took bool, now int64) {
	ahead := drains(r, g.left)
	c.Remaining, c.RetryAfter, c.HeldFor = min(r.Capacity, rest+g.left), 0, 0
	c.ResetAfter = max(0, g.full-now-ahead)
	c.NextAfter = min(c.ResetAfter, max(1, g.next-now))
	if took {
		c.HeldFor = max(0, g.held-now-ahead)
	}
}

// countIn adds the unused tokens of the lease to counts, which come from the shared storage.
func (l *lease) countIn(counts []storage.Count) {
	for i := range l.grants {
		left, c, r := l.grants[i].left, &counts[i], &l.rules.Rules[i]
		ahead := drains(r, left)
		c.Remaining = min(c.Remaining+left, max(c.Remaining, r.Capacity))
		c.ResetAfter, c.HeldFor = max(0, c.ResetAfter-ahead), max(0, c.HeldFor-ahead)
		c.NextAfter = min(c.NextAfter, c.ResetAfter)
	}
}

// back returns the Charge that gives the lease back, or nil if there is nothing to give. Tokens that were refilled already are
// not given back a second time.
//
// A level goes on draining while the Charge is on its way, so the Charge may ask for too much. held makes up for that: it
// is too early by the time that the request for the lease was on its way.
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

// any reports whether the lease has unused tokens.
func (l *lease) any() bool {
	return slices.ContainsFunc(l.grants, func(g grant) bool { return g.left > 0 })
}

// empty removes the lease from the pool and returns it. The shard is locked.
func (p *pool) empty() lease {
	l := p.lease
	p.lease = lease{}
	delete(p.shard.leased, p)
	return l
}

// flight is one request to the shared storage for a call's cost and a lease. It does not end with the call's context but
// when Close gives up, so no tokens are lost if the caller leaves. Only the flight's goroutine writes extra, back, answer
// and err. Others may read answer and err once done is closed.
type flight struct {
	pool   *pool
	rules  *storage.RuleSet
	resets int     // pool.resets when the flight began
	costs  []int64 // of the call
	extra  []int64 // tokens that it takes ahead
	back   lease   // the pool's previous lease, which did not cover the call
	away   bool    // a return was in progress when the flight began

	// Rule 4. free has the tokens of extra that no waiting call has claimed yet. It is nil once no further call may wait for
	// this flight. The lock of the shard guards it.
	free []int64

	done   chan struct{}
	answer storage.Answer
	err    error
}

// flightFor returns the flight that a call has to wait for, or nil, and whether the call started it itself. A call that has
// waited already joins no other call's flight. The shard is locked.
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

// start starts a flight if there are tokens to take ahead, and returns nil otherwise. The shard is locked. The pool's lease
// goes into the flight, so that no two leases of a pool exist at a time.
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

// claim implements rule 4. It reports whether the flight takes enough tokens for one more call, and sets them aside for it.
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

// fly asks for the cost and the lease. If that is denied, it gives back what this process holds and asks for the cost alone.
//
// If the cost is one token, one AtMost request does both: it grants as many tokens as there are, if there is at least one.
// After a denied AtMost there is nothing to ask for again, unless tokens were given back.
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
	if err != nil && ctx.Err() != nil { // only Close cancels ctx
		err = storage.ErrClosed
	}
	s.land(f, sent, err)
}

// bringBack gives the previous lease back, and waits until all returns of the pool have reached the shared storage. As in
// land, the lease is dropped if the identifier was reset during the flight.
func (s *Storage) bringBack(f *flight) {
	p, sh := f.pool, f.pool.shard
	sh.mu.Lock()
	if p.resets == f.resets {
		s.giveBack(p, f.back)
	}
	f.back = lease{}
	done := p.returning
	sh.mu.Unlock()
	if done != nil {
		<-done
	}
}

// question sends one request, and reduces extra to what the answer granted. It returns the moment just before it was sent.
func (s *Storage) question(ctx context.Context, f *flight, atMost bool) (sent moment, err error) {
	q := &storage.Request{Name: f.pool.name, Costs: make([]int64, len(f.costs)),
		Parts: []storage.Part{{Identifier: f.pool.identifier, Rules: f.rules, AtMost: atMost}}}
	for i := range q.Costs {
		q.Costs[i] = f.costs[i] + f.extra[i]
	}
	sent = s.moment(q)
	err = s.ask(ctx, q, &f.answer)
	if atMost && err == nil && f.answer.Allowed {
		for i := range f.extra {
			f.extra[i] = min(f.costs[i]+f.extra[i], f.answer.Tokens) - f.costs[i]
		}
	}
	f.answer.Tokens = 0 // the caller's own request was no AtMost
	return sent, err
}

// land makes the granted tokens the lease of the pool, and wakes the calls that wait for the flight. The tokens are given back
// at once if the pool has other rules by now or the storage is closed. They are dropped if the identifier was reset during
// the flight: then the shared storage may count them as free already, and giving them back would free them twice.
func (s *Storage) land(f *flight, sent moment, err error) {
	p, sh, a := f.pool, f.pool.shard, &f.answer
	sh.mu.Lock()
	defer sh.mu.Unlock()
	defer close(f.done)
	p.flight, f.err = nil, err
	if p.resets == f.resets { // otherwise the shared storage has forgotten these tokens
		s.giveBack(p, f.back) // empty if bringBack has done so
	}
	if err != nil {
		return
	}
	same := p.rules == f.rules
	if same {
		p.heard(a.Counts, sent.at)
	}
	if !a.Allowed {
		if same && s.freesOf(s.hash(p.name, p.identifier)).Load() == sent.freed {
			p.deny(f.costs, a, s)
		}
		return
	}
	p.took(f.costs, sent.at)
	l := grantOf(f.rules, f.extra, a, sent.at, s.life)
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

// tell copies the answer for the call that started the flight, or returns the flight's error, which all its callers get.
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

// sweep implements rule 5: every half Lifetime it gives back leases that are over or were not used for half a Lifetime. It also
// removes idle pools, from a sixteenth of the shards at a time.
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
	if sh.closed { // Close has given everything back
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

// landed waits until the flights in progress for a request's identifiers have landed, or ctx ends.
func (s *Storage) landed(ctx context.Context, r *storage.Request) {
	for i := range r.Parts {
		h := s.hash(r.Name, r.Parts[i].Identifier)
		sh := s.shard(h)
		sh.mu.Lock()
		var done chan struct{}
		if p := sh.pool(h, r.Name, r.Parts[i].Identifier); p != nil && p.flight != nil {
			done = p.flight.done
		}
		sh.mu.Unlock()
		if done != nil {
			wait(ctx, []chan struct{}{done})
		}
	}
}

// returning returns the done channels of the returns in progress for a request's identifiers. If leases is set, it gives
// their leases back first.
func (s *Storage) returning(r *storage.Request, leases bool) (all []chan struct{}) {
	for i := range r.Parts {
		h := s.hash(r.Name, r.Parts[i].Identifier)
		sh := s.shard(h)
		sh.mu.Lock()
		if p := sh.pool(h, r.Name, r.Parts[i].Identifier); p != nil {
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

// wait waits until all of these channels are closed, or ctx ends.
func wait(ctx context.Context, all []chan struct{}) {
	for _, done := range all {
		select {
		case <-done:
		case <-ctx.Done():
		}
	}
}

// giveBack implements rule 5. It gives a lease back in the background, so no tokens are lost if the caller leaves. It tries
// only once: after an error it is unknown whether the tokens were given back, and a second return could free them twice.
// Without it the shared storage refills them as if they had been used.
//
// Each return of a pool waits for the one before, so that the last one's done channel stands for all of them. The shard is
// locked. It is not closed, unless the caller is one of the storage's goroutines.
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
		// The Charge is made only now: while this return waited, more tokens may have been refilled.
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

// hash returns the place of an identifier. Another identifier may have the same, however unlikely that is.
func (s *Storage) hash(name, identifier string) uint64 {
	h := maphash.String(s.seed, identifier)
	if name != "" {
		h ^= bits.RotateLeft64(maphash.String(s.seed, name), 1)
	}
	return h
}

func (s *Storage) shard(h uint64) *shard { return &s.shards[h>>56] }
