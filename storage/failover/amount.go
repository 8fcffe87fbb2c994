package failover

import (
	"math"
	"slices"

	"github.com/go-throttler/throttler/storage"
)

// bucket is what one bucket of an identifier owes the ledger, and what the primary has shown of it.
type bucket struct {
	rule    *storage.Rule
	taken   []amount
	given   []amount // back, with n above 0
	unshown bool     // a Charge took, of which the primary shows nothing
	spent   int64    // tokens, when the primary last admitted
	resetAt int64    // when the primary last said that they are all back
}

// amount is n tokens that come back at a time; of a level, evenly from another time on.
type amount struct{ n, from, at int64 }

// Bounds of what a bucket owes: more amounts than one has that is told in time, and more tokens than there are.
const (
	mostAmounts = 1024
	mostTokens  = 1 << 53
)

// add adds tokens that come back at a time to one of the bucket's lists: to the last amount there if that does at about
// the same time. Amounts of a level are told apart by a 64th of the time that it takes to drain, as between the tokens
// of this process may be those of others.
func (b *bucket) add(list *[]amount, n, at int64) {
	next, near := amount{n, at, at}, b.rule.Period/2048
	if b.rule.Kind == storage.Continuous {
		near = b.drains(b.rule.Capacity) / 64
		next.from -= b.drains(n)
	}
	all := *list
	if i := len(all) - 1; i >= 0 {
		if both := all[i].and(next); both.at-both.from <= max(near, all[i].at-all[i].from) {
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

func (a amount) and(o amount) amount {
	return amount{min(a.n+o.n, mostTokens), min(a.from, o.from), max(a.at, o.at)}
}

// drains is how long n tokens of a level take to come back.
func (b *bucket) drains(n int64) int64 {
	return int64(float64(n) * float64(b.rule.Period) / float64(b.rule.Refill))
}

// left is what has not come back of what the bucket owes.
func (b *bucket) left(now int64) (out []storage.Amount) {
	for _, a := range b.taken {
		if left := a.left(now); left.In > 0 {
			out = append(out, left)
		}
	}
	for _, a := range b.given {
		if left := a.left(now); left.In > 0 {
			out = append(out, storage.Amount{N: -left.N, In: left.In})
		}
	}
	return out
}

// left is what has not come back of an amount, and how long until all has.
func (a amount) left(now int64) storage.Amount {
	n := a.n
	if now > a.from && a.at > a.from {
		n = int64(math.Ceil(float64(n) * float64(max(0, a.at-now)) / float64(a.at-a.from)))
	}
	return storage.Amount{N: n, In: max(0, a.at-now)}
}

// held is how many tokens a debt has, and when the last of them comes back.
func held(r *storage.Rule, debt []storage.Amount) (n, last int64) {
	for _, a := range debt {
		if r.Kind == storage.SlidingWindow && a.In < r.Period { // it fades
			a.N = int64(float64(a.N) * float64(a.In) / float64(r.Period))
		}
		n, last = n+a.N, max(last, a.In)
	}
	return n, last
}
