package failover_test

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/failover"
	"github.com/go-throttler/throttler/storage/lease"
)

// The simulation runs the storage itself in several processes, in virtual time, on stores and links that fail as a seed
// determines. Afterwards an independent check compares what was admitted with the bound of docs/failover.md. A seed
// that fails is printed, and THROTTLER_SEED runs it again.

// admission is one that a process was told of.
type admission struct {
	at      time.Duration // since the beginning
	process int
	by      string
	n       int64
}

// world is one run.
type world struct {
	t     *testing.T
	seed  uint64
	rnd   *rand.Rand
	began time.Time
	redis *store
	pg    *store
	rules []law.Rule
	ids   []string
	life  time.Duration // of the leases that processes take; 0: they take none

	processes []*process
	wait      sync.WaitGroup // of the load and the faults

	mu       sync.Mutex // guards what follows
	admitted map[string][]admission
	errors   int
	lag      time.Duration // the longest time until something was recorded
	lost     int64         // the most tokens that crashed processes and servers may have lost
	losses   []loss        // what servers that crashed may have lost beside
	steps    []time.Duration
}

// loss is a time in which what was admitted by Redis, or by leases from it, may be lost.
type loss struct{ from, to time.Duration }

type process struct {
	number  int
	storage *failover.Storage
	leases  *lease.Storage // in front of it; nil: none
	redis   *link
	pg      *link
	stop    chan struct{}
	stopped bool
}

const (
	interval = failover.DefaultFlushInterval
	trip     = time.Millisecond // one way, on average
)

func newWorld(t *testing.T, seed uint64, kind law.Kind) *world { return newWorldOf(t, seed, kind, 0) }

func newWorldOf(t *testing.T, seed uint64, kind law.Kind, life time.Duration) *world {
	w := &world{life: life, t: t, seed: seed, rnd: rand.New(rand.NewPCG(seed, 1)), began: time.Now(), redis: newStore("redis"), pg: newStore("postgres"), admitted: map[string][]admission{}}
	period := time.Duration(1+w.rnd.IntN(4)) * time.Second
	capacity := 10 + w.rnd.Int64N(40)
	if life > 0 { // and as many more calls
		capacity *= 10
	}
	rule, faults := law.NewRule("limit", kind, period, capacity, capacity)
	require.Empty(t, faults)
	w.rules = []law.Rule{rule}
	w.redis.ahead, w.pg.ahead = w.rnd.Int64N(2*period.Microseconds()), w.rnd.Int64N(2*period.Microseconds())
	for i := range 1 + w.rnd.IntN(3) {
		w.ids = append(w.ids, fmt.Sprint("id", i))
	}
	for range 1 + w.rnd.IntN(4) {
		w.start()
	}
	return w
}

func (w *world) now() time.Duration { return time.Since(w.began) }

// start starts a process and its load.
func (w *world) start() {
	n := len(w.processes)
	p := &process{number: n, stop: make(chan struct{})}
	p.redis = &link{to: w.redis, seed: w.rnd.Uint64(), trip: trip}
	p.pg = &link{to: w.pg, seed: w.rnd.Uint64(), trip: 2 * trip, timeout: 250 * time.Millisecond}
	var err error
	p.storage, err = failover.Open(p.redis, p.pg, &failover.Options{Observe: w.observe}, w.rnd.Uint64())
	require.NoError(w.t, err)
	if w.life > 0 {
		p.leases, err = lease.New(p.storage, &lease.Options{Lifetime: w.life})
		require.NoError(w.t, err)
	}
	w.processes = append(w.processes, p)
	rnd := rand.New(rand.NewPCG(w.seed, uint64(100+n)))
	w.wait.Go(func() { w.load(p, rnd) })
}

func (w *world) observe(e failover.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if e.Kind == failover.Flushed || e.Kind == failover.FlushFailed {
		w.lag = max(w.lag, e.Lag)
	}
}

// load asks for tokens in bursts, for more than are admitted.
func (w *world) load(p *process, rnd *rand.Rand) {
	for {
		pause := time.Duration(rnd.IntN(40_000)) * time.Microsecond
		if rnd.IntN(50) == 0 {
			pause += time.Duration(rnd.IntN(3_000_000)) * time.Microsecond
		}
		select {
		case <-p.stop:
			return
		case <-time.After(pause):
		}
		calls := 1 + rnd.IntN(3)*rnd.IntN(4)
		if w.life > 0 {
			calls *= 10
		}
		for range calls {
			which, cost, wait := rnd.IntN(len(w.ids)), 1+rnd.Int64N(2)*rnd.Int64N(4), time.Duration(rnd.IntN(1000))*time.Microsecond
			w.wait.Go(func() {
				<-time.After(wait)
				w.take(p, w.ids[which], cost)
			})
		}
	}
}

func (w *world) take(p *process, id string, cost int64) bool {
	began, asked, most := time.Now(), storage.Storage(p.storage), 310*time.Millisecond // with Redis asked once more
	if p.leases != nil {
		asked, most = p.leases, 4*most // after one that takes ahead, and a return
	}
	v, err := storecheck.Decide(context.Background(), asked, storecheck.Request{Name: "sim", Parts: []storecheck.Part{storecheck.NewPart(id, w.rules, min(cost, w.rules[0].Capacity))}})
	took := time.Since(began)
	w.mu.Lock()
	defer w.mu.Unlock()
	assert.LessOrEqual(w.t, took, most, "seed %d", w.seed)
	if err != nil {
		w.errors++
		assert.Less(w.t, p.pg.healthy(), time.Second, "seed %d: %v", w.seed, err)
		assert.Less(w.t, p.redis.healthy(), 6*time.Second, "seed %d: %v", w.seed, err)
		return false
	}
	if v.Allowed {
		w.admitted[id] = append(w.admitted[id], admission{w.now(), p.number, v.Source(), min(cost, w.rules[0].Capacity)})
	}
	return v.Allowed
}

// crash ends a process. What is pending in it is lost.
func (w *world) crash(p *process) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if p.stopped {
		return
	}
	p.stopped = true
	close(p.stop)
	p.redis.set(refuses)
	p.pg.set(refuses)
	pending := w.now() - p.storage.State().Lag - 50*time.Millisecond
	for _, all := range w.admitted {
		for _, a := range all {
			if a.process == p.number && a.at >= pending {
				w.lost += a.n
			}
		}
	}
}

// harm begins one fault, which ends after a while.
func (w *world) harm() {
	p := w.processes[w.rnd.IntN(len(w.processes))]
	d := time.Duration(50+w.rnd.IntN(3000)) * time.Millisecond
	faults := []fault{refuses, swallows, loses, sometimes, stalls}
	f := faults[w.rnd.IntN(len(faults))]
	switch w.rnd.IntN(10) {
	case 0, 1, 2: // a process does not see Redis
		w.cut(p.redis, f, d)
	case 3: // no process sees Redis
		for _, p := range w.processes {
			w.cut(p.redis, f, d)
		}
	case 4: // a link to Redis comes and goes
		for range 1 + w.rnd.IntN(20) {
			w.cut(p.redis, f, time.Duration(20+w.rnd.IntN(100))*time.Millisecond)
			w.sleep(time.Duration(20+w.rnd.IntN(150)) * time.Millisecond)
		}
	case 5: // Redis restarts, as it was or empty
		w.redis.setDown(true)
		after := w.redis.snapshot()
		if w.rnd.IntN(2) == 0 {
			after = map[id]map[law.BucketID]law.State{}
		}
		w.sleep(d)
		w.redis.restore(after)
	case 6: // a replica of Redis takes over that lacks the last writes
		behind := time.Duration(w.rnd.IntN(100)) * time.Millisecond
		after, from := w.redis.snapshot(), w.now()
		w.sleep(behind)
		w.lose(from)
		w.redis.setDown(true)
		w.sleep(time.Duration(w.rnd.IntN(500)) * time.Millisecond)
		w.redis.restore(after)
	case 7: // no process sees Postgres
		for _, p := range w.processes {
			w.cut(p.pg, f, d)
		}
	case 8: // a process crashes, and another starts
		if len(w.processes) < 8 {
			w.crash(p)
			w.start()
		}
	case 9: // the clock of a server steps
		by := time.Duration(w.rnd.IntN(4000)-2000) * time.Millisecond
		s := []*store{w.redis, w.pg}[w.rnd.IntN(2)]
		s.step(by.Microseconds())
		w.mu.Lock()
		w.steps = append(w.steps, by)
		w.mu.Unlock()
	}
}

// lose counts what Redis has admitted since a time as lost, with what leases from it may still admit.
func (w *world) lose(from time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.losses = append(w.losses, loss{from - 50*time.Millisecond, w.now() + w.life})
}

func (w *world) cut(l *link, f fault, d time.Duration) {
	l.set(f)
	w.wait.Go(func() {
		<-time.After(d)
		l.heal(f)
	})
}

func (w *world) sleep(d time.Duration) { <-time.After(d) }

// end stops the load and closes everything.
func (w *world) end() {
	for _, p := range w.processes {
		if !p.stopped {
			p.stopped = true
			close(p.stop)
		}
	}
	w.wait.Wait()
	for _, p := range w.processes {
		if p.leases != nil {
			_ = p.leases.Close(context.Background())
		}
		_ = p.storage.Close(context.Background())
	}
	<-time.After(10 * time.Second) // for calls that are still on their way
}

// TestTheBoundHoldsWhateverFails tests the safety of the protocol: with faults all along, no more is admitted than the
// bound.
func TestTheBoundHoldsWhateverFails(t *testing.T) {
	t.Parallel()
	from, to := storecheck.Seeds(t, 60)
	for seed := from; seed < to; seed++ {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, seed, law.Kind(seed%5))
			for range 4 + w.rnd.IntN(6) {
				w.sleep(time.Duration(w.rnd.IntN(2500)) * time.Millisecond)
				w.harm()
			}
			w.sleep(time.Second)
			w.end()
			w.check()
		})
		if t.Failed() {
			t.Fatalf("again: THROTTLER_SEED=%d go test -run %s ./storage/failover", seed, t.Name())
		}
	}
}

// TestTheBoundHoldsUnderLeases is the same with leases in front of each process: what is handed out twice are tokens that were
// taken in that time, and they are used within a Lifetime.
func TestTheBoundHoldsUnderLeases(t *testing.T) {
	t.Parallel()
	from, to := storecheck.Seeds(t, 6)
	local := int64(0)
	for seed := from; seed < to; seed++ {
		synctest.Test(t, func(t *testing.T) {
			w := newWorldOf(t, seed, law.Kind(seed%5), lease.DefaultLifetime)
			for range 4 + w.rnd.IntN(6) {
				w.sleep(time.Duration(w.rnd.IntN(2500)) * time.Millisecond)
				w.harm()
			}
			w.sleep(time.Second)
			w.end()
			w.check()
			for _, p := range w.processes {
				local += p.leases.State().Local
			}
		})
		if t.Failed() {
			t.Fatalf("again: THROTTLER_SEED=%d go test -run %s ./storage/failover", seed, t.Name())
		}
	}
	t.Log(local, "were admitted by leases")
	if to-from >= 20 {
		require.Positive(t, local)
	}
}

// check compares what was admitted with the bound of docs/failover.md. Both come from the record of the run: A(d) is
// burst, X the longest lag, L what was lost, and R four trips.
func (w *world) check() {
	rule := &w.rules[0]
	period := time.Duration(rule.Period) * time.Microsecond
	for id, all := range w.admitted {
		slices.SortFunc(all, func(a, b admission) int { return cmp.Compare(a.at, b.at) })
		e := burst(all, 2*(max(interval, w.lag)+4*trip)+w.life) + w.lost + lostBy(w.losses, all)
		for _, by := range w.steps { // what came back too early by a clock that stepped
			e += min(rule.Capacity, int64(by.Abs()*time.Duration(rule.Capacity)/period)+1)
		}
		where := fmt.Sprintf("seed %d: %s, %v, %d processes, lag %v, lost %d", w.seed, id, rule.Kind, len(w.processes), w.lag, w.lost)
		windows := 2 + int64((all[len(all)-1].at-all[0].at)/period) // the most that the admissions touch
		switch rule.Kind {
		case law.Continuous:
			e += int64(w.life) * rule.Refill / int64(period)
			require.LessOrEqual(w.t, excess(all, rule), e, where)
		case law.SlidingLog: // the excess may come again in every period
			require.LessOrEqual(w.t, burst(all, period), rule.Capacity+2*e, where)
		default:
			require.LessOrEqual(w.t, burst(all, time.Hour), windows*(rule.Capacity+e), where)
		}
	}
}

// lostBy is how much of what was admitted may be lost.
func lostBy(losses []loss, all []admission) (n int64) {
	for _, l := range losses {
		for _, a := range all {
			if (a.by == "redis" || a.by == lease.Source) && a.at >= l.from && a.at <= l.to {
				n += a.n
			}
		}
	}
	return n
}

// burst returns the most that was admitted in any interval of the length d.
func burst(all []admission, d time.Duration) (most int64) {
	sum, first := int64(0), 0
	for i, a := range all {
		sum += a.n
		for ; all[first].at < all[i].at-d; first++ {
			sum -= all[first].n
		}
		most = max(most, sum)
	}
	return most
}

// excess returns the most that was admitted beyond capacity and refill in any interval.
func excess(all []admission, r *law.Rule) int64 {
	level, most, last := 0.0, 0.0, time.Duration(0)
	for _, a := range all {
		level = max(0, level-float64(a.at-last)/1000*float64(r.Refill)/float64(r.Period))
		level, last = level+float64(a.n), a.at
		most = max(most, level-float64(r.Capacity))
	}
	return int64(most + 0.999)
}

// TestAllIsBackWithinSixSecondsAfterTheLastFault tests the liveness of the protocol: what works again once nothing
// fails.
func TestAllIsBackWithinSixSecondsAfterTheLastFault(t *testing.T) {
	t.Parallel()
	from, to := storecheck.Seeds(t, 60)
	for seed := from; seed < to; seed++ {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, seed, law.Kind(seed%5))
			for range 2 + w.rnd.IntN(4) {
				w.sleep(time.Duration(w.rnd.IntN(1500)) * time.Millisecond)
				w.harm()
			}
			w.redis.setDown(false)
			for _, p := range w.processes {
				if !p.stopped {
					p.redis.set(fine)
					p.pg.set(fine)
				}
			}
			w.sleep(6 * time.Second)
			w.fresh()
			w.end()
		})
		if t.Failed() {
			t.Fatalf("again: THROTTLER_SEED=%d go test -run %s ./storage/failover", seed, t.Name())
		}
	}
}

// fresh requires that Redis decides in every process, and that a fresh bucket admits exactly its capacity.
func (w *world) fresh() {
	rule, _ := law.NewRule("hourly", w.rules[0].Kind, time.Hour, 50, 50)
	before := w.errors
	var mu sync.Mutex
	var wait sync.WaitGroup
	admitted := 0
	for _, p := range w.processes {
		if p.stopped {
			continue
		}
		st := p.storage.State()
		require.False(w.t, st.Degraded, "seed %d: %v", w.seed, st.Cause)
		require.NoError(w.t, st.FlushError, "seed %d", w.seed)
		require.LessOrEqual(w.t, st.Lag, 2*interval, "seed %d", w.seed)
		for range 40 {
			wait.Go(func() {
				v, err := storecheck.Decide(context.Background(), p.storage, storecheck.Request{Name: "sim", Parts: []storecheck.Part{storecheck.NewPart("fresh", []law.Rule{rule}, 1)}})
				require.NoError(w.t, err, "seed %d", w.seed)
				require.Equal(w.t, "redis", v.Source(), "seed %d", w.seed)
				mu.Lock()
				defer mu.Unlock()
				if v.Allowed {
					admitted++
				}
			})
		}
	}
	wait.Wait()
	live := 0
	for _, p := range w.processes {
		if !p.stopped {
			live++
		}
	}
	require.Equal(w.t, min(50, 40*live), admitted, "seed %d", w.seed)
	require.Equal(w.t, before, w.errors, "seed %d", w.seed)
}
