package lease_test

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/lease"
)

// The simulation runs the real lease storage in virtual time, in several processes that share one storage. A seed determines
// when the processes send bursts of calls, pause and crash. An independent check compares the admitted calls with the
// bound. The seed of a failure is printed; THROTTLER_SEED runs it again.

// server is the shared storage. Its own clock is ahead of that of the processes and runs a little faster or slower.
type server struct {
	ahead int64 // µs
	drift int64 // µs per second
	calls atomic.Int64

	mu    sync.Mutex
	spent map[string]*storage.Spent
	ends  map[string][]int64 // ends of the periods of a Replenish bucket, as the answers reported them
}

// clock converts a time of the processes' clock to the server's clock.
func (s *server) clock(at int64) int64 {
	return at + s.ahead + (at-946684800_000_000)*s.drift/1_000_000 // synctest begins at the start of the year 2000
}

func (s *server) of(id string) *storage.Spent {
	if s.spent[id] == nil {
		s.spent[id] = &storage.Spent{}
	}
	return s.spent[id]
}

// link connects a process to the server. Once it is cut, neither requests nor answers arrive.
type link struct {
	*server
	cut atomic.Bool

	mu       sync.Mutex    // guards the fields below
	shortest time.Duration // round trip
	rnd      *rand.Rand    // nil: all round trips are the shortest
}

// way sleeps for one direction of a round trip. That takes between half of the shortest round trip and all of it, in one of
// 20 cases up to five times as long in addition, and never more than 25 ms.
func (l *link) way() {
	l.mu.Lock()
	d := l.shortest / 2
	if l.rnd != nil {
		d += time.Duration(l.rnd.Int64N(int64(d)))
		if l.rnd.IntN(20) == 0 {
			d += time.Duration(l.rnd.Int64N(int64(5 * l.shortest)))
		}
	}
	l.mu.Unlock()
	<-time.After(min(d, 25*time.Millisecond).Truncate(time.Microsecond))
}

func (l *link) takes(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shortest = d
}

var errCut = fmt.Errorf("%w: the process has crashed", storage.ErrUnavailable)

func (l *link) call(ctx context.Context, do func(now int64) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	l.calls.Add(1)
	l.way()
	if l.cut.Load() {
		return errCut
	}
	l.server.mu.Lock()
	err := do(l.clock(law.Monotonic()))
	l.server.mu.Unlock()
	l.way()
	if l.cut.Load() {
		return errCut
	}
	return err
}

func (l *link) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	return l.call(ctx, func(now int64) error {
		var spent []*storage.Spent
		for _, p := range r.Parts {
			spent = append(spent, l.of(p.Identifier))
		}
		a.Source, a.Degraded = "server", false
		err := storage.Decide(r, a, now, spent...)
		for i, p := range r.Parts[:1] {
			if first := &p.Rules.Rules[0]; err == nil && a.Allowed && r.Mode == storage.Take && first.Kind == law.Replenish && r.Costs[i] > 0 {
				l.ends[p.Identifier] = append(l.ends[p.Identifier], now+a.Counts[i].HeldFor)
			}
		}
		return err
	})
}

func (l *link) Charge(ctx context.Context, c *storage.Charge) error {
	return l.call(ctx, func(now int64) error { return l.of(c.Identifier).Charge(c, now) })
}

func (l *link) Reset(ctx context.Context, _, identifier string) error {
	return l.call(ctx, func(int64) error { delete(l.spent, identifier); return nil })
}

// admission is an admission that a process received.
type admission struct {
	at    int64 // by the clock of the server
	costs [2]int64
	local bool
}

// world is one run of the simulation.
type world struct {
	t        *testing.T
	seed     uint64
	rnd      *rand.Rand
	server   *server
	options  lease.Options
	rules    []law.Rule
	shortest time.Duration

	processes []*process
	load      sync.WaitGroup

	mu       sync.Mutex // guards the fields below
	admitted map[string][]admission
	denied   int
}

type process struct {
	*lease.Storage
	link    *link
	crashed atomic.Bool
}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{t: t, seed: seed, rnd: rand.New(rand.NewPCG(seed, 1)), admitted: map[string][]admission{}}
	w.server = &server{spent: map[string]*storage.Spent{}, ends: map[string][]int64{}}
	w.server.ahead, w.server.drift = w.rnd.Int64N(10_000_000), w.rnd.Int64N(200)-100
	w.shortest = time.Duration(500+w.rnd.IntN(20_000)*w.rnd.IntN(2)) * time.Microsecond
	w.options.Lifetime = []time.Duration{0, 0, 0, 50 * time.Millisecond, time.Second}[w.rnd.IntN(5)]
	return w
}

// random sets a random rule of the kind, in a third of the worlds with a second, Continuous bucket.
func (w *world) random(kind law.Kind) {
	period := time.Duration(400+w.rnd.IntN(1600)) * time.Millisecond
	capacity := 50 + w.rnd.Int64N(1000)
	if kind == law.SlidingLog {
		capacity = 50 + w.rnd.Int64N(200)
	}
	refill := capacity
	if kind == law.Continuous {
		refill = []int64{capacity, 5 * capacity, capacity/10 + 1}[w.rnd.IntN(3)]
	}
	w.rules = []law.Rule{w.rule("first", kind, period, capacity, refill)}
	if w.rnd.IntN(3) == 0 {
		w.rules = append(w.rules, w.rule("second", law.Continuous, time.Second, 2*capacity, 2*capacity))
	}
}

func (w *world) rule(name string, kind law.Kind, period time.Duration, capacity, refill int64) law.Rule {
	r, faults := law.NewRule(name, kind, period, capacity, refill)
	require.Empty(w.t, faults)
	return r
}

func (w *world) start() *process {
	p := &process{link: &link{server: w.server, shortest: w.shortest, rnd: rand.New(rand.NewPCG(w.seed, uint64(len(w.processes))))}}
	var err error
	p.Storage, err = lease.New(p.link, &w.options)
	require.NoError(w.t, err)
	w.processes = append(w.processes, p)
	w.t.Cleanup(func() { _ = p.Close(context.Background()) })
	return p
}

// take asks once and records the verdict.
func (w *world) take(p *process, id string, costs ...int64) storecheck.Verdict {
	part := storecheck.NewPart(id, w.rules, 1)
	copy(part.Costs, costs)
	v, err := storecheck.Decide(context.Background(), p, storecheck.Request{Name: "sim", Parts: []storecheck.Part{part}})
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case err != nil:
		assert.True(w.t, p.crashed.Load(), "seed %d: %v", w.seed, err)
	case v.Allowed:
		a := admission{at: w.server.clock(v.At()), local: v.Source() == lease.Source}
		copy(a.costs[:], part.Costs)
		w.admitted[id] = append(w.admitted[id], a)
	default:
		w.denied++
		assert.Positive(w.t, v.RetryAfter, "seed %d: denied for ever", w.seed)
	}
	return v
}

// storm makes so many calls with random pauses of the given mean. It does not wait for the answers.
func (w *world) storm(p *process, rnd *rand.Rand, calls int, pause time.Duration) {
	for range calls {
		<-time.After(time.Duration(rnd.Int64N(2*int64(pause) + 1)))
		cost := int64(1)
		if rnd.IntN(20) == 0 {
			cost += rnd.Int64N(5)
		}
		w.load.Go(func() { w.take(p, "id", cost, 1) })
	}
}

// crash cuts a process off, so that its leased tokens are lost.
func (w *world) crash(p *process) {
	p.crashed.Store(true)
	p.link.cut.Store(true)
}

// end waits for all calls and closes all processes. Close must succeed for those that have not crashed.
func (w *world) end() {
	w.load.Wait()
	for _, p := range w.processes {
		if err := p.Close(context.Background()); !p.crashed.Load() {
			require.NoError(w.t, err, "seed %d", w.seed)
		}
	}
}

func (w *world) local() (n int) {
	for _, all := range w.admitted {
		for _, a := range all {
			if a.local {
				n++
			}
		}
	}
	return n
}

// check compares the admitted calls with the bound of each bucket. A Continuous bucket may exceed its rule by the refill of
// one Lifetime.
func (w *world) check() {
	for id, all := range w.admitted {
		slices.SortFunc(all, func(a, b admission) int { return cmp.Compare(a.at, b.at) })
		for i := range w.rules {
			r := &w.rules[i]
			takes := make([]take, len(all))
			for j, a := range all {
				takes[j] = take{a.at, a.costs[i]}
			}
			over, allowed := excess(takes, r, w.server.ends[id]), int64(0)
			if r.Kind == law.Continuous {
				life := cmp.Or(w.options.Lifetime, lease.DefaultLifetime).Microseconds()
				allowed = min(r.Capacity, (r.Refill*life+r.Period-1)/r.Period+1)
			}
			require.LessOrEqual(w.t, over, allowed, "seed %d: %v of %d in %d µs, refill %d, was exceeded", w.seed, r.Kind, r.Capacity, r.Period, r.Refill)
		}
	}
}

// take is n tokens taken at the time at.
type take struct{ at, n int64 }

// excess returns by how many tokens the takes exceed a rule at most. The takes must be in order of time. It shares no
// arithmetic with package law, and implements only what the docs say about each kind.
func excess(all []take, r *law.Rule, ends []int64) (most int64) {
	sums := map[int64]int64{} // tokens of each period or window
	level, last := 0.0, int64(0)
	for i, t := range all {
		sum := int64(0)
		switch r.Kind {
		case law.Continuous:
			level = max(0, level-float64(t.at-last)*float64(r.Refill)/float64(r.Period)) + float64(t.n)
			last, sum = t.at, int64(level)
		case law.FixedWindow, law.SlidingWindow:
			window := t.at / r.Period
			sums[window] += t.n
			sum = sums[window]
			if r.Kind == law.SlidingWindow {
				sum += int64(float64(sums[window-1]) * float64((window+1)*r.Period-t.at-1) / float64(r.Period))
			}
		case law.Replenish:
			j, _ := slices.BinarySearch(ends, t.at+1)
			if j == len(ends) || ends[j]-r.Period > t.at {
				return all[len(all)-1].at // outside all periods: the time serves as a hopelessly large excess
			}
			sums[ends[j]] += t.n
			sum = sums[ends[j]]
		case law.SlidingLog:
			for j := i; j >= 0 && all[j].at > t.at-r.Period; j-- {
				sum += all[j].n
			}
		}
		most = max(most, sum-r.Capacity)
	}
	return most
}
