package storagetest

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
)

const (
	sequences = 40
	steps     = 150
)

// randomSequences plays seeded random calls on the storage and on a Model, and compares every answer. Half of the steps
// are at a moment when something comes back, or a microsecond before or after it: other times hardly ever find a fault.
func randomSequences(t *testing.T, s storage.Storage) {
	for seed := range uint64(sequences) {
		g := newGame(t, s, seed, false)
		for i := range steps {
			g.now += g.pause()
			g.step(i)
		}
	}
}

// randomClock is randomSequences with a clock that also goes back, by less and by more than step 1 of a decision
// forgives. It uses one identifier, and each call charges each bucket. Otherwise the storage might have forgotten a
// full bucket, as it may, and the Model, which forgets none, would answer differently when the clock has gone back.
func randomClock(t *testing.T, s storage.Storage) {
	for seed := range uint64(sequences) {
		g := newGame(t, s, 1000+seed, true)
		g.ids = g.ids[:1]
		for i := range steps {
			g.now += g.pause()
			if g.rnd.IntN(5) == 0 {
				g.now = max(0, g.now-g.rnd.Int64N(1+[]int64{1000, 70_000_000, 8_000_000_000}[g.rnd.IntN(3)]))
			}
			g.step(i)
		}
	}
}

// randomChanges is randomSequences in which half of the steps are charges, refunds and debts that nearly fit what is
// out: the ends of amounts are moved to holds, and the faults are where they just fit or just do not.
func randomChanges(t *testing.T, s storage.Storage) {
	for seed := range uint64(sequences) {
		g := newGame(t, s, 2000+seed, false)
		g.ids, g.changes = g.ids[:2], true
		for i := range steps {
			g.now += g.pause()
			g.step(i)
		}
	}
}

// game is one sequence of calls.
type game struct {
	t       *testing.T
	seed    uint64
	rnd     *rand.Rand
	name    string
	ids     []string
	named   bool // every call charges every bucket, so that none is ever full after one
	changes bool // half of the steps are charges, refunds and debts
	rules   []law.Rule
	now     int64
	soon    []int64              // the times at which something of the last answer comes back
	taken   []storecheck.Verdict // admissions that may be refunded
	tested  storage.Storage
	model   *Model
}

func newGame(t *testing.T, s storage.Storage, seed uint64, named bool) *game {
	g := &game{t: t, seed: seed, named: named, rnd: rand.New(rand.NewPCG(seed, 42)), name: newName(), ids: []string{"a", "b", "c", "d", "e"}, tested: s, model: NewModel()}
	g.now = g.rnd.Int64N(2) * (1_700_000_000_000_000 + g.rnd.Int64N(1_000_000_000))
	for i := range 1 + g.rnd.IntN(5) {
		g.rules = append(g.rules, g.rule(i))
	}
	return g
}

// rule returns a random rule for bucket i. Half of the rules for a bucket that there is keep its kind and period. Every
// tenth has capacity 0, unless named.
func (g *game) rule(i int) law.Rule {
	periods := []time.Duration{time.Microsecond, 7 * time.Microsecond, 1500 * time.Microsecond, time.Second, 10 * time.Second, 7 * time.Second, time.Hour, 31 * 24 * time.Hour}
	kind := law.Kind(g.rnd.IntN(5))
	most := []int64{1, 3, 10, 300, 100_000}[g.rnd.IntN(5)]
	period := periods[g.rnd.IntN(len(periods))]
	if i < len(g.rules) && g.rnd.IntN(2) == 0 {
		kind, period = g.rules[i].Kind, time.Duration(g.rules[i].Period)*time.Microsecond
	}
	for {
		capacity := 1 + g.rnd.Int64N(most)
		if !g.named && g.rnd.IntN(10) == 0 {
			capacity = 0
		}
		r, faults := law.NewRule(fmt.Sprint("bucket-", i), kind, period, capacity, 1+g.rnd.Int64N(most))
		if faults == nil {
			return r
		}
		period = periods[g.rnd.IntN(len(periods))]
	}
}

// change gives bucket i another rule: often one of the same kind and period, always if named.
func (g *game) change(i int) {
	old := g.rules[i]
	g.rules = slices.Clone(g.rules)
	for g.rules[i] = g.rule(i); g.named && !g.rules[i].SameBucket(&old); { // another bucket would be a full one
		g.rules[i] = g.rule(i)
	}
}

// pause returns how many microseconds pass until the next step.
func (g *game) pause() int64 {
	if len(g.soon) > 0 && g.rnd.IntN(2) == 0 {
		return max(0, g.soon[g.rnd.IntN(len(g.soon))]-g.now+g.rnd.Int64N(3)-1)
	}
	switch g.rnd.IntN(6) {
	case 0, 1, 2:
		return 0
	case 3:
		return g.rnd.Int64N(10)
	default:
		return g.rnd.Int64N(2 * g.rules[g.rnd.IntN(len(g.rules))].Period)
	}
}

// step makes one random call on the storage and on the Model, which must answer alike.
func (g *game) step(i int) {
	ctx, where := g.t.Context(), fmt.Sprintf("seed %d step %d at %d µs", g.seed, i, g.now)
	what := g.rnd.IntN(20)
	if g.changes && what > 9 {
		what = 2 + what%3
	}
	switch what {
	case 0:
		g.change(g.rnd.IntN(len(g.rules)))
	case 1:
		id := g.id()
		require.NoError(g.t, g.tested.Reset(ctx, g.name, id), where)
		require.NoError(g.t, g.model.Reset(ctx, g.name, id), where)
	case 2, 3:
		c := g.charge()
		require.NoError(g.t, g.model.Charge(ctx, &c), where)
		require.NoError(g.t, g.tested.Charge(ctx, &c), where)
	case 4:
		if tested, ok := g.tested.(replica.Storage); ok {
			d := g.debt()
			require.NoError(g.t, g.model.Raise(ctx, d), where)
			require.NoError(g.t, tested.Raise(ctx, d), where)
			want, err := g.model.Debt(ctx, d)
			require.NoError(g.t, err, where)
			got, err := tested.Debt(ctx, d)
			require.NoError(g.t, err, where)
			require.Equal(g.t, want, got, where)
		}
	default:
		r := g.request()
		want, err := storecheck.Decide(ctx, g.model, r)
		require.NoError(g.t, err, where)
		got, err := storecheck.Decide(ctx, g.tested, r)
		require.NoError(g.t, err, where)
		require.Equal(g.t, format(&want), format(&got), "%s: %+v", where, r)
		require.Equal(g.t, want.RetryAfter, got.RetryAfter, where)
		require.Equal(g.t, want.Delay, got.Delay, where)
		require.Equal(g.t, want.Tokens(), got.Tokens(), where)
		for i := range counts(&r) {
			require.Equal(g.t, want.Count(i), got.Count(i), "%s: bucket %d of %+v", where, i, r)
		}
		require.Equal(g.t, want.At(), got.At(), where)
		g.remember(&want, r.Mode)
	}
}

// counts returns how many buckets a request has, in all parts.
func counts(r *storecheck.Request) (n int) {
	for i := range r.Parts {
		n += len(r.Parts[i].Costs)
	}
	return n
}

func (g *game) id() string { return g.ids[g.rnd.IntN(len(g.ids))] }

// request returns a random request: any Mode, every third a reservation, every fourth with more parts if they come up.
func (g *game) request() storecheck.Request {
	r := storecheck.Request{Name: g.name, Mode: []storage.Mode{storage.Take, storage.Take, storage.Take, storage.Peek, storage.Force}[g.rnd.IntN(5)], Clocked: true, Now: g.now}
	if g.named && r.Mode == storage.Peek { // during which the storage may forget a full identifier
		r.Mode = storage.Take
	}
	if g.rnd.IntN(3) == 0 {
		r.Within = g.within()
	}
	r.Parts = []storecheck.Part{g.part(g.id(), r.Mode)}
	if g.rnd.IntN(4) == 0 {
		for _, id := range g.ids {
			if id != r.Parts[0].Identifier && g.rnd.IntN(3) == 0 {
				r.Parts = append(r.Parts, g.part(id, r.Mode))
			}
		}
	}
	return r
}

// part returns a part with all buckets or, unless named, some of them in another order.
func (g *game) part(id string, mode storage.Mode) storecheck.Part {
	rules := g.rules
	if !g.named && g.rnd.IntN(3) == 0 {
		rules = slices.Clone(rules)
		g.rnd.Shuffle(len(rules), func(i, j int) { rules[i], rules[j] = rules[j], rules[i] })
		rules = rules[:1+g.rnd.IntN(len(rules))]
	}
	p := storecheck.NewPart(id, rules, 1)
	p.AtMost = g.rnd.IntN(5) == 0
	for i, r := range rules {
		n := min(r.Capacity, []int64{0, 1, 1, 1, r.Capacity, 1 + g.rnd.Int64N(max(1, r.Capacity))}[g.rnd.IntN(6)])
		if mode == storage.Force {
			n = []int64{n, 3 * r.Capacity, 1<<63 - 1}[g.rnd.IntN(3)]
		}
		if g.named {
			n = max(1, n)
		}
		p.Costs[i] = n
	}
	return p
}

// within returns the Within of a reservation: any, or about the time until something of the last answer comes back.
func (g *game) within() int64 {
	switch g.rnd.IntN(4) {
	case 0:
		return law.MaxWithin
	case 1:
		return g.rnd.Int64N(4 * g.rules[g.rnd.IntN(len(g.rules))].Period)
	}
	if len(g.soon) == 0 {
		return 1
	}
	return min(law.MaxWithin, max(0, g.soon[g.rnd.IntN(len(g.soon))]-g.now+g.rnd.Int64N(3)-1))
}

// charge returns a charge of small amounts, or one that gives back what an earlier decision took. If the game has
// changes, the refund may be of too much, of another time, or for another identifier.
func (g *game) charge() storage.Charge {
	c := storage.Charge{Name: g.name, Clocked: true, Now: g.now, Identifier: g.id(), Rules: law.NewRuleSet(g.rules...)}
	for _, r := range g.rules {
		c.Amounts = append(c.Amounts, storage.Amount{N: g.rnd.Int64N(2*r.Capacity+1) - r.Capacity/2, In: g.rnd.Int64N(2 * r.Period)})
	}
	if g.named {
		for i, r := range g.rules {
			c.Amounts[i] = storage.Amount{N: 1, In: 2 * r.Period}
		}
	}
	if g.named || len(g.taken) == 0 || g.rnd.IntN(3) == 0 {
		return c
	}
	v := g.taken[g.rnd.IntN(len(g.taken))]
	p := v.Part(0)
	c.Identifier, c.Rules, c.Amounts = p.Identifier, p.Rules, nil
	for i, r := range p.Rules.Rules {
		a := storage.Amount{N: -v.Cost(0, i), In: v.Count(i).HeldFor - (g.now - v.At())}
		if g.changes {
			a.N *= []int64{1, 1, 2, 1 << 40}[g.rnd.IntN(4)]
			a.In += (g.rnd.Int64N(3) - 1) * []int64{0, 1, r.Period / 512, r.Period / 256, r.Period / 2, 2 * r.Period}[g.rnd.IntN(6)]
		}
		c.Amounts = append(c.Amounts, a)
	}
	if g.changes && g.rnd.IntN(2) == 0 {
		c.Identifier, c.Rules = g.id(), law.NewRuleSet(g.rules...)
		c.Amounts = c.Amounts[:min(len(c.Amounts), len(g.rules))]
		for len(c.Amounts) < len(g.rules) {
			c.Amounts = append(c.Amounts, storage.Amount{})
		}
	}
	return c
}

// debt returns a debt with up to three amounts a bucket.
func (g *game) debt() replica.Debt {
	d := replica.Debt{Name: g.name, Clocked: true, Now: g.now, Identifier: g.id(), Rules: law.NewRuleSet(g.rules...), Amounts: make([][]storage.Amount, len(g.rules))}
	for i, r := range g.rules {
		for range g.rnd.IntN(4) {
			d.Amounts[i] = append(d.Amounts[i], storage.Amount{N: g.rnd.Int64N(max(1, 2*r.Capacity)) * []int64{1, 1, 1 << 20}[g.rnd.IntN(3)], In: g.rnd.Int64N(2 * r.Period)})
		}
		if g.named {
			d.Amounts[i] = append(d.Amounts[i], storage.Amount{N: 1, In: 2 * r.Period})
		}
	}
	return d
}

// remember notes when something of an answer comes back, and what it took.
func (g *game) remember(v *storecheck.Verdict, mode storage.Mode) {
	g.soon = g.soon[:0]
	for _, l := range v.Levels() {
		g.soon = append(g.soon, g.now+l.ResetAfter.Microseconds(), g.now+l.RetryAfter.Microseconds())
	}
	if v.Allowed && mode != storage.Peek {
		g.taken = append(g.taken, *v)
	}
}
