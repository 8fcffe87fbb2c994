package failover

// The amounts that a bucket owes the ledger: how they are merged, and what is left of them. How tokens come back is
// defined by package storage alone. The few numbers that are needed here without a State are compared with it by tests.

import (
	"math/bits"
	"slices"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// bucket is what one bucket of an identifier owes the ledger, and what Redis has shown of it. Taken and refunded tokens
// are apart, as a refund cannot be subtracted: it goes to the hold that its own decision made.
type bucket struct {
	rule     *law.Rule
	near     int64 // amounts that end within this time of each other are merged
	taken    []amount
	refunded []amount // their n is above 0 too
	unshown  bool     // a Charge took, after which Redis reports no level
	spent    int64    // tokens, after the last admission by Redis
	resetAt  int64    // when they are all back, as Redis said then
}

// amount is n tokens that are all back at a time. Those of a level, and merged ones, come back evenly from another time
// on.
type amount struct{ n, from, at int64 }

// Bounds of what a bucket owes while the ledger is away: more amounts than a flush in time ever has, and more tokens
// than any bucket holds.
const (
	mostAmounts = 1024
	mostTokens  = 1 << 53
)

// use makes a rule the bucket's. Amounts of a Continuous bucket are merged only if they end within 1/64 of its drain
// time: another process's tokens may lie between them.
func (b *bucket) use(r *law.Rule) {
	b.rule, b.near = r, r.Period/2048
	if r.Kind == law.Continuous {
		b.near = drains(r, r.Capacity) / 64
	}
}

// add adds tokens that come back at a time to one of the bucket's lists. They join the last amount if both come back at
// about the same time. When the list is full the two oldest join, whatever lies between them.
func (b *bucket) add(list *[]amount, n, at int64) {
	next := amount{n, at, at}
	if b.rule.Kind == law.Continuous {
		next.from -= drains(b.rule, n)
	}
	all := *list
	if i := len(all) - 1; i >= 0 { // a single amount may be longer than near; then others join within its own length
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

// and is two amounts as one.
func (a amount) and(o amount) amount {
	return amount{min(a.n+o.n, mostTokens), min(a.from, o.from), max(a.at, o.at)}
}

// drains is how long n tokens of a Continuous bucket take to come back, of at most the ceiling. It is what
// law.State.FullAt says of a state that was charged with them, without the state: it runs for each admission, under
// the journal's lock. A test compares the two.
func drains(r *law.Rule, n int64) int64 {
	return (min(n, r.Ceiling())*r.One + r.Drain - 1) / r.Drain * r.Tick
}

// left returns what has not come back of what the bucket owes, refunds as negative amounts.
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

// left is what has not come back of an amount, rounded up, and the time until all has. The ledger cuts the tokens of a
// level to what can be left in that time (State.Charge). So it is for merged tokens, with those of others between them,
// that they are counted here. The product has 128 bits: n may be 2^53 and a time 2^50.
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

// held is how many tokens a debt has, and when the last of them comes back. A SlidingWindow counts a hold that fades as
// law.Decide does: a test compares the two.
func held(r *law.Rule, debt []storage.Amount) (n, last int64) {
	for _, a := range debt {
		tokens := min(a.N, r.Ceiling()) // or the product may be too large
		if r.Kind == law.SlidingWindow {
			tokens = tokens * min((a.In+r.Tick-1)/r.Tick, r.One) / r.One
		}
		n, last = n+tokens, max(last, a.In)
	}
	return n, last
}
