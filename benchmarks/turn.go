package main

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// turn is what one contender did in one turn.
type turn struct {
	decisions, failed int // failed counts errors and wrong verdicts, which are not decisions
	elapsed           time.Duration
	p50, p99          time.Duration // of the time that a decision took
	client, server    time.Duration // processor time; server is below 0 if it is not known
	bytes             float64       // memory of one identifier
}

func (t turn) perSecond() float64 { return float64(t.decisions) / t.elapsed.Seconds() }
func (t turn) nanoseconds() float64 {
	return float64(t.elapsed.Nanoseconds()) / max(1, float64(t.decisions))
}
func (t turn) share() float64 { return float64(t.failed) / max(1, float64(t.failed+t.decisions)) }

// check returns an error if all calls failed. If only some did, the report says so.
func (t turn) check(err error) error {
	if t.decisions > 0 {
		return nil
	}
	return fmt.Errorf("no decision was made as it should be; one of the errors: %w", err)
}

// tally is what one goroutine did.
type tally struct {
	decisions, failed int
	took              []time.Duration
	err               error // of one of the failed calls
}

// load lets this many goroutines work for the time d, and waits for them.
func load(goroutines int, d time.Duration, work func(stop *atomic.Bool) tally) (t turn, took []time.Duration, err error) {
	var stop atomic.Bool
	var wg sync.WaitGroup
	tallies := make([]tally, goroutines)
	began := time.Now()
	for i := range tallies {
		wg.Go(func() { tallies[i] = work(&stop) })
	}
	time.AfterFunc(d, func() { stop.Store(true) })
	wg.Wait()
	t.elapsed = time.Since(began)
	for _, one := range tallies {
		t.decisions, t.failed, took = t.decisions+one.decisions, t.failed+one.failed, append(took, one.took...)
		err = cmp.Or(err, one.err)
	}
	return t, took, err
}

// spin makes decisions in this process, on the identifiers in turn from a random one on. Their number must be a power of two.
// It looks at stop only every 64 decisions, since reading it takes time.
func spin(ids []string, want bool, a allow, stop *atomic.Bool) (t tally) {
	at := rand.IntN(len(ids))
	for !stop.Load() {
		for range 64 {
			at++
			if ok, err := a(ids[at&(len(ids)-1)]); ok != want || err != nil {
				t.failed, t.err = t.failed+1, cmp.Or(err, t.err)
				continue
			}
			t.decisions++
		}
	}
	return t
}

// wait makes decisions that take longer than those of spin, and measures each of them.
func wait(ids []string, a allow, stop *atomic.Bool) (t tally) {
	for at := rand.IntN(len(ids)); !stop.Load(); at++ {
		began := time.Now()
		if ok, err := a(ids[at&(len(ids)-1)]); !ok || err != nil {
			t.failed, t.err = t.failed+1, cmp.Or(err, t.err)
			continue
		}
		t.took = append(t.took, time.Since(began))
		t.decisions++
	}
	return t
}

// onServer plays a turn with a server. meter returns the server's processor time. A warm-up of a fifth of the time comes
// first.
func onServer(goroutines int, d time.Duration, ids []string, a allow, meter func() time.Duration) (turn, error) {
	work := func(stop *atomic.Bool) tally { return wait(ids, a, stop) }
	_, _, _ = load(goroutines, d/5, work) // the warm-up, which does not count
	server, client := meter(), ownTime()
	t, took, err := load(goroutines, d, work)
	if err := t.check(err); err != nil {
		return t, err
	}
	t.client, t.server = ownTime()-client, meter()-server
	if server < 0 {
		t.server = -1
	}
	slices.Sort(took)
	t.p50, t.p99 = took[len(took)/2], took[len(took)*99/100]
	return t, nil
}

// ownTime returns the processor time of this process.
func ownTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// uniform returns identifiers that are drawn at random from n; skewed draws them by Zipf's law.
func uniform(n int) []string {
	if n == 1 {
		return []string{identifier(0)}
	}
	return drawn(func() int { return rand.IntN(n) })
}

func skewed(n int) []string {
	zipf := rand.NewZipf(rand.New(rand.NewPCG(1, 2)), 1.1, 1, uint64(n-1))
	return drawn(func() int { return int(zipf.Uint64()) })
}

func drawn(draw func() int) []string {
	known := map[int]string{}
	out := make([]string, 1<<20)
	for i := range out {
		n := draw()
		if known[n] == "" {
			known[n] = identifier(n)
		}
		out[i] = known[n]
	}
	return out
}

// identifier returns "user:" and eleven digits, 16 bytes in all.
func identifier(n int) string {
	text := []byte("user:00000000000")
	for i := len(text) - 1; n > 0; i-- {
		text[i] += byte(n % 10)
		n /= 10
	}
	return string(text)
}
