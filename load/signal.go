// What says how loaded the process is.

package load

import (
	"math"
	"math/bits"
	"runtime/metrics"
	"slices"
	"sync/atomic"
	"time"
)

// Signal tells how loaded the process is: 1 is as much as should be, and above it is too much. NaN says nothing. A Controller
// calls it once an interval, from one goroutine; those of this package tell what happened since their last call, so each
// Controller needs its own. It should return at once.
//
// Any function is one, such as the length of a queue divided by the length that it should have, or the used part of the
// processor divided by 0.8.
type Signal func() float64

// safely is what the signal tells, NaN if it panics.
func (s Signal) safely() (now float64) {
	defer func() {
		if recover() != nil {
			now = math.NaN()
		}
	}()
	return s()
}

// Most is the largest of several signals that say something. One that panics is left out.
func Most(signals ...Signal) Signal {
	signals = slices.Clone(signals)
	return func() float64 {
		most := math.NaN()
		for _, s := range signals {
			if now := s.safely(); !(now <= most) && !math.IsNaN(now) {
				most = now
			}
		}
		return most
	}
}

// Scheduler tells how long goroutines waited to run, when they could: the 90th percentile of the last interval, divided by
// the target, which is above 0. It sees a processor that does not suffice, whoever else uses it, and needs no right or
// library. It does not see goroutines that wait for a lock, a pool or a server: Latency does.
//
// Goroutines wait for some milliseconds where a processor is busy, and for hundreds where it does not suffice: 20 ms is a
// good target.
func Scheduler(target time.Duration) Signal {
	waited := []metrics.Sample{{Name: "/sched/latencies:seconds"}}
	var w window
	return func() float64 {
		metrics.Read(waited)
		if waited[0].Value.Kind() != metrics.KindFloat64Histogram { // of a runtime that has no such metric
			return math.NaN()
		}
		h := waited[0].Value.Float64Histogram()
		i := w.p90(h.Counts)
		if i < 0 {
			return 0
		}
		return max(0, h.Buckets[i]) / target.Seconds()
	}
}

// Latency is told how long things took, and makes a Signal of it. Took suits Options.Took of the package throttlerhttp. The
// zero value is ready. It is safe for concurrent use, and not to be copied.
type Latency struct {
	counts [octaves * steps]atomic.Uint64
}

// Each octave of nanoseconds is counted in steps.
const (
	octaves = 61
	steps   = 8
)

// Took records a duration. It allocates nothing and takes no lock.
func (l *Latency) Took(d time.Duration) { l.counts[step(d)].Add(1) }

// Signal tells the 90th percentile of what was recorded since it was last asked, rounded down by up to an eighth, and
// divided by the target, which is above 0. It is 0 if nothing was: what never ends is not seen.
func (l *Latency) Signal(target time.Duration) Signal {
	var w window
	now := make([]uint64, len(l.counts))
	return func() float64 {
		for i := range now {
			now[i] = l.counts[i].Load()
		}
		i := w.p90(now)
		if i < 0 {
			return 0
		}
		return float64(lowest(i)) / float64(target)
	}
}

// step is where a duration is counted: durations below 16 ns each for itself, others by their first four bits.
func step(d time.Duration) int {
	n := uint64(max(0, d))
	shift := max(0, bits.Len64(n)-4)
	return shift*steps + int(n>>shift)
}

// lowest is the shortest duration that is counted in a step.
func lowest(step int) time.Duration {
	shift := max(0, step/steps-1)
	return time.Duration(step-shift*steps) << shift
}

// window tells what was counted since it was last asked.
type window struct{ before []uint64 }

// p90 is the place in which 90 % of what was counted is reached, -1 if there is nothing.
func (w *window) p90(counts []uint64) (at int) {
	if w.before == nil {
		w.before = make([]uint64, len(counts))
	}
	total, sum := uint64(0), uint64(0)
	for i, n := range counts {
		total += n - w.before[i]
	}
	for at = -1; at+1 < len(counts) && sum*10 < total*9; at++ {
		sum += counts[at+1] - w.before[at+1]
	}
	copy(w.before, counts)
	return at
}
