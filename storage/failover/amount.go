package failover

// The amounts that a bucket owes the ledger (Rule 2): how they are merged, and what is left of them when they are
// charged. Package law alone defines how tokens come back. This file needs a few of its numbers without a State,
// because it runs for each admission; tests compare each of them with package law.

import (
	"math/bits"
	"slices"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// bucket is what one bucket of an identifier owes the ledger, and what Redis has shown of it. Times are in
// microseconds, by the clock of the entry.
//
// Taken and refunded tokens are kept apart because a refund cannot be subtracted from what was taken: it gives back the
// tokens of one particular decision, and these may be back earlier or later than the others.
type bucket struct {
	rule     *law.Rule
	near     int64 // amounts that end within this time of each other are merged
	taken    []amount
	refunded []amount // their n is above 0 too
	unshown  bool     // a Charge took or gave back tokens, and Redis reports no level after a Charge
	spent    int64    // tokens that Redis showed as spent after its last admission
	resetAt  int64    // when all of these are back, as Redis said then
}

// amount is n tokens that are all back at the time at. Single tokens of most kinds are back at once, so from is at. The
// tokens of a level, and merged ones, come back evenly between from and at.
type amount struct{ n, from, at int64 }

// Bounds of what a bucket owes while the ledger is away: more amounts than a flush that is on time ever has, and more
// tokens than any bucket holds. They bound the memory of a long outage, and the products in amount.left.
const (
	mostAmounts = 1024
	mostTokens  = 1 << 53
)

// use makes r the rule of the bucket. Amounts of a Continuous bucket are merged only if they end within 1/64 of its
// drain time: another process's tokens may lie between them. In buckets of the other kinds it is 1/2048 of the period.
func (b *bucket) use(r *law.Rule) {
	b.rule, b.near = r, r.Period/2048
	if r.Kind == law.Continuous {
		b.near = drains(r, r.Capacity) / 64
	}
}

// add adds n tokens that are back at a time to one of the bucket's two lists. They join the last amount if both are
// back at about the same time. If the list is full the two oldest amounts are merged, whatever lies between them: then
// the total stays exact and only the times become coarse.
func (b *bucket) add(list *[]amount, n, at int64) {
	next := amount{n, at, at}
	if b.rule.Kind == law.Continuous {
		next.from -= drains(b.rule, n)
	}
	all := *list
	if i := len(all) - 1; i >= 0 { // one amount of many tokens may be longer than near; then others join within its length
		if both := all[i].and(next); both.at-both.from <= max(b.near, all[i].at-all[i].from) {
			all[i] = both
			return
		}
	}
	if len(all) == mostAmounts {
		all[1] = all[0].and(all[1])
		all = slices.Delete(all, 0, 1)
	}
	*list = append(all, next)
}

// and merges two amounts into one that lasts from the earlier begin to the later end.
func (a amount) and(o amount) amount {
	return amount{min(a.n+o.n, mostTokens), min(a.from, o.from), max(a.at, o.at)}
}

// drains returns how long n tokens of a Continuous bucket take to come back, in microseconds. More tokens than the
// ceiling are never out, so more do not count. law.State.FullAt says the same of a state that was charged with n
// tokens. The formula is repeated here because it runs for each admission, under the journal's lock; a test compares
// the two.
func drains(r *law.Rule, n int64) int64 {
	return (min(n, r.Ceiling())*r.One + r.Drain - 1) / r.Drain * r.Tick
}

// left returns what the bucket owes and has not come back by now, refunds as negative amounts. Tokens that are back
// already are not charged: the ledger would have forgotten them as well.
func (b *bucket) left(now int64) (out []storage.Amount) {
	for _, a := range b.taken {
		if left := a.left(now); left.In > 0 {
			out = append(out, left)
		}
	}
	for _, a := range b.refunded {
		if left := a.left(now); left.In > 0 {
			out = append(out, storage.Amount{N: -left.N, In: left.In})
		}
	}
	return out
}

// left returns how many tokens of an amount have not come back, rounded up, and the time until all of them have.
//
// For the tokens of a single level the count would not matter, since the ledger cuts it to what can be left in that
// time (law.State.Charge). Merged tokens need it: they last longer than their own number takes to drain, because the
// tokens of others lie between them. The product has 128 bits, as n may be 2^53 and a time 2^50.
func (a amount) left(now int64) storage.Amount {
	n, in := a.n, max(0, a.at-now)
	if now > a.from && in > 0 {
		hi, lo := bits.Mul64(uint64(n), uint64(in))
		whole, rest := bits.Div64(hi, lo, uint64(a.at-a.from))
		if n = int64(whole); rest > 0 {
			n++
		}
	}
	return storage.Amount{N: n, In: in}
}

// held returns how many tokens of a debt count as spent, and the time until the last of them is back. A hold of a
// SlidingWindow that fades counts in part, as in law.Decide; a test compares the two.
func held(r *law.Rule, debt []storage.Amount) (n, last int64) {
	for _, a := range debt {
		tokens := min(a.N, r.Ceiling()) // a larger number may overflow the product
		if r.Kind == law.SlidingWindow {
			tokens = tokens * min((a.In+r.Tick-1)/r.Tick, r.One) / r.One
		}
		n, last = n+tokens, max(last, a.In)
	}
	return n, last
}
