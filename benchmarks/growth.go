package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
)

// curve is the rows at each place of the axis.
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

// moreBuckets is the hot identifier, on one processor.
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

// sizes of moreIdentifiers. The last one takes half a minute, and so is reached in the first round only, and by
// those of far only.
var (
	sizes = []int{1000, 10_000, 100_000, million, 10 * million}
	far   = []string{"throttler", "x/time/rate in a map", "go-limiter, memory", "counters by hand"}
)

// moreIdentifiers grows each contender from the first size to the last in one round and makes decisions
// at each of them, on identifiers that are all as likely.
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

// growTo stops before the memory of the machine is exceeded.
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

// fits says whether the memory of the machine suffices when what came to the heap since before gets so many
// times as much. The heap may grow to twice of what lives in it until it is collected.
func fits(before, times float64) bool {
	free := available()
	return free == 0 || 3*times*(heap()-before) < free
}

// someOf are 2^16 identifiers of n, so that the strings themselves take as much of the caches for each n.
func someOf(n int) []string {
	random := rand.New(rand.NewPCG(1, uint64(n)))
	out := make([]string, 1<<16)
	for i := range out {
		out[i] = identifier(random.IntN(n))
	}
	return out
}
