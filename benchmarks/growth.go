package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
)

// curve has the rows at each place on the axis.
type curve struct {
	at   []int
	rows [][]row
}

func (b *bench) growth(ctx context.Context) error {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	buckets, err := b.moreBuckets(ctx)
	if err != nil {
		return err
	}
	identifiers, err := b.moreIdentifiers(ctx)
	if err != nil {
		return err
	}
	b.report.growth(buckets, identifiers)
	return nil
}

// moreBuckets measures one identifier with more and more buckets, on one processor.
func (b *bench) moreBuckets(ctx context.Context) (out curve, err error) {
	ids := uniform(1)
	for _, n := range []int{1, 2, 3, 4, 6, 8} {
		name := fmt.Sprintf("growth/buckets=%d", n)
		if !b.wants(name) {
			continue
		}
		rows, err := b.processCase(ctx, name, inProcess, func(c *contender) (turn, error) {
			return b.hotTurn(c, plenty(n, 1e9), 1, ids, true)
		})
		if err != nil {
			return out, err
		}
		out.at, out.rows = append(out.at, n), append(out.rows, rows)
	}
	return out, nil
}

// The sizes of moreIdentifiers. The last one takes half a minute, so only the contenders in far reach it, in the first round
// only.
var (
	sizes = []int{1000, 10_000, 100_000, million, 10 * million}
	far   = []string{"throttler", "x/time/rate in a map", "go-limiter, memory", "counters by hand"}
)

// moreIdentifiers grows each contender from the first size to the last in one round, and makes decisions at each size. All
// identifiers are equally likely.
func (b *bench) moreIdentifiers(ctx context.Context) (out curve, err error) {
	if !b.wants("growth/identifiers") {
		return out, nil
	}
	ids := make([][]string, len(sizes))
	for i, n := range sizes {
		ids[i] = someOf(n)
	}
	turns := make([][][]turn, len(inProcess))
	for r := range b.fewer().rounds {
		one := bench{rounds: 1, d: b.d, first: r}
		grown, err := rounds(ctx, &one, "growth/identifiers", len(inProcess), func(i int) ([]turn, error) {
			to := len(sizes) - 1
			if r == 0 && slices.Contains(far, inProcess[i].name) {
				to++
			}
			return b.growTo(ctx, sizes[:to], &inProcess[i], ids)
		})
		if err != nil {
			return out, err
		}
		for i := range grown {
			turns[i] = append(turns[i], grown[i]...)
		}
	}
	for at, n := range sizes {
		out.at, out.rows = append(out.at, n), append(out.rows, make([]row, len(inProcess)))
		for i, c := range inProcess {
			out.rows[at][i].contender = c
			for _, t := range turns[i] {
				if at < len(t) {
					out.rows[at][i].turns = append(out.rows[at][i].turns, t[at])
				}
			}
		}
	}
	return out, nil
}

// growTo returns a turn for each size. It stops before the machine's memory is exceeded.
func (b *bench) growTo(ctx context.Context, sizes []int, c *contender, ids [][]string) (out []turn, err error) {
	before := heap()
	a, done, err := c.open(plenty(2, 1e9))
	if err != nil {
		return nil, err
	}
	defer done()
	filled := 0
	for i, n := range sizes {
		if ctx.Err() != nil || n > million && !fits(before, float64(n)/float64(filled)) {
			break
		}
		if !c.idle {
			if err := fill(ctx, a, filled, n); err != nil {
				return nil, err
			}
		}
		filled = n
		t, err := spinOn(1, b.quick(), ids[i], true, a)
		if err != nil {
			return nil, err
		}
		out = append(out, t)
	}
	return out, ctx.Err()
}

// fits reports whether the machine's memory suffices if what was added to the heap since before grows by this factor. Until
// it is collected, a heap may grow to twice its live size.
func fits(before, times float64) bool {
	free := available()
	return free == 0 || 3*times*(heap()-before) < free
}

// someOf returns 2^16 random identifiers out of n. The number is fixed, so that the strings themselves take the same part of
// the processor's caches for each n.
func someOf(n int) []string {
	random := rand.New(rand.NewPCG(1, uint64(n)))
	out := make([]string, 1<<16)
	for i := range out {
		out[i] = identifier(random.IntN(n))
	}
	return out
}
