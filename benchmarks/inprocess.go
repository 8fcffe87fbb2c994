package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"
)

const million = 1_000_000

// place is the conditions of a case in process: how many buckets an identifier has, and how many processors decide.
type place struct{ buckets, procs int }

func (p place) String() string { return fmt.Sprintf("buckets=%d/procs=%d", p.buckets, p.procs) }

func places() []place { return []place{{1, 1}, {2, 1}, {1, 2}, {2, 2}} }

// grid has the rows of each place.
type grid map[place][]row

func (b *bench) wants(name string) bool { return b.only.MatchString(name) }

// quick returns the length of a turn in process.
func (b *bench) quick() time.Duration { return b.d / 4 }

func (b *bench) inProcess(ctx context.Context) error {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	allowed, err := b.hot(ctx, "process/allowed", true, func(n int) []limit { return plenty(n, 1e9) })
	if err != nil {
		return err
	}
	denied, err := b.hot(ctx, "process/denied", false, tight)
	if err != nil {
		return err
	}
	zipf, err := b.zipf(ctx)
	if err != nil {
		return err
	}
	if len(allowed)+len(denied)+len(zipf) == 0 {
		return nil
	}
	checks, err := checkAll(ctx, inProcess, 20)
	if err != nil {
		return err
	}
	b.report.inProcess(allowed, denied, zipf, checks)
	return nil
}

// hot measures decisions that are all on one identifier.
func (b *bench) hot(ctx context.Context, name string, want bool, limits func(n int) []limit) (grid, error) {
	out, ids := grid{}, uniform(1)
	for _, p := range places() {
		if name := name + "/" + p.String(); b.wants(name) {
			rows, err := b.processCase(ctx, name, inProcess, func(c *contender) (turn, error) {
				return b.hotTurn(c, limits(p.buckets), p.procs, ids, want)
			})
			if err != nil {
				return nil, err
			}
			out[p] = rows
		}
	}
	return out, nil
}

func (b *bench) processCase(ctx context.Context, name string, all []contender, play func(*contender) (turn, error)) ([]row, error) {
	turns, err := rounds(ctx, b, name, len(all), func(i int) (turn, error) { return play(&all[i]) })
	if err != nil {
		return nil, err
	}
	return rowsOf(all, turns), nil
}

func rowsOf(all []contender, turns [][]turn) []row {
	rows := make([]row, len(all))
	for i := range all {
		rows[i] = row{all[i], turns[i]}
	}
	return rows
}

// hotTurn plays a turn on a new limiter, so that no turn depends on an earlier one.
func (b *bench) hotTurn(c *contender, limits []limit, procs int, ids []string, want bool) (turn, error) {
	a, done, err := c.open(limits)
	if err != nil {
		return turn{}, err
	}
	defer done()
	if _, err := a(ids[0]); err != nil { // takes the only token of a tight limit
		return turn{}, err
	}
	return spinOn(procs, b.quick(), ids, want || c.idle, a)
}

func spinOn(procs int, d time.Duration, ids []string, want bool, a allow) (turn, error) {
	runtime.GC()
	runtime.GOMAXPROCS(procs)
	work := func(stop *atomic.Bool) tally { return spin(ids, want, a, stop) }
	_, _, _ = load(procs, d/10, work) // a warm-up, which does not count
	t, _, err := load(procs, d, work)
	return t, t.check(err)
}

// zipf measures decisions on a million identifiers, and the memory that these take. A contender is filled once per round,
// for the turns on one processor and on two.
func (b *bench) zipf(ctx context.Context) (grid, error) {
	out, ids := grid{}, []string(nil)
	for _, buckets := range []int{1, 2} {
		name := fmt.Sprintf("process/zipf/buckets=%d", buckets)
		if !b.wants(name) {
			continue
		}
		if ids == nil {
			ids = skewed(million)
		}
		turns, err := rounds(ctx, b.fewer(), name, len(inProcess), func(i int) ([2]turn, error) {
			return b.zipfTurns(ctx, &inProcess[i], plenty(buckets, 1e9), ids)
		})
		if err != nil {
			return nil, err
		}
		for i, c := range inProcess {
			for procs := 1; procs <= 2; procs++ {
				r := row{contender: c}
				for _, both := range turns[i] {
					r.turns = append(r.turns, both[procs-1])
				}
				out[place{buckets, procs}] = append(out[place{buckets, procs}], r)
			}
		}
	}
	return out, nil
}

func (b *bench) zipfTurns(ctx context.Context, c *contender, limits []limit, ids []string) (out [2]turn, err error) {
	_ = heap() // a first collection frees what finalizers still keep
	before := heap()
	a, done, err := c.open(limits)
	if err != nil {
		return out, err
	}
	defer done()
	if !c.idle {
		err = fill(ctx, a, 0, million)
	}
	bytes := (heap() - before) / million
	for i := range out {
		if err == nil {
			out[i], err = spinOn(i+1, b.quick(), ids, true, a)
			out[i].bytes = bytes
		}
	}
	return out, err
}

// fill makes one decision on each identifier. Each identifier is a new string, as if it came with a request, so its memory
// counts for a contender that keeps it.
func fill(ctx context.Context, a allow, from, to int) error {
	runtime.GOMAXPROCS(runtime.NumCPU())
	if free := available(); free > 0 { // no garbage collection here: it would take most of the time
		defer debug.SetMemoryLimit(debug.SetMemoryLimit(int64(heap() + free/2)))
		defer debug.SetGCPercent(debug.SetGCPercent(-1))
	}
	for i := from; i < to; i++ {
		if i%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if _, err := a(identifier(i)); err != nil {
			return err
		}
	}
	return nil
}

// heap returns the bytes that are live on the heap.
func heap() float64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}

// available returns the machine's free memory in bytes, or 0 if it is not known.
func available() (n float64) {
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(info)) {
		if _, err := fmt.Sscanf(line, "MemAvailable: %f kB", &n); err == nil {
			return n * 1024
		}
	}
	return 0
}
