// Signals: functions that say how loaded the process is.

package load

import (
	"math"
	"math/bits"
	"runtime/metrics"
	"slices"
	"sync/atomic"
	"time"
)

// Signal returns how loaded the process is. 1 is the load that it should have at most, and anything above is too much. NaN
// means unknown. A Controller calls it once per interval, from one goroutine, and it should return at once. The signals of
// this package report what happened since their last call, so each Controller needs a Signal of its own.
//
// Any function may be a Signal: for example the length of a queue divided by the length that it should have at most, or
// the used fraction of the processor divided by 0.8.
type Signal func() float64

// safely returns the signal, or NaN if it panics.
func (s Signal) safely() (now float64) {
	defer func() {
		if recover() != nil {
			now = math.NaN()
		}
	}()
	return s()
}

// Most returns the largest of several signals. NaN, and a signal that panics, is left out; it is NaN if all are.
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

// Scheduler returns a Signal of how long runnable goroutines waited for a processor: the 90th percentile since the last
// call, divided by target, which must be above 0. It notices when the processors do not suffice, whichever process uses
// them, and needs no privileges and no library. It does not notice goroutines that wait for a lock, a pool or a server;
// Latency does.
//
// On a busy processor goroutines wait for some milliseconds, and for hundreds of them when the processor does not suffice.
// So 20 ms is a good target. The percentiles come from the metric /sched/latencies:seconds of package runtime/metrics.
func Scheduler(target time.Duration) Signal {
	waited := []metrics.Sample{{Name: "/sched/latencies:seconds"}}
	var w window
	return func() float64 {
		metrics.Read(waited)
		if waited[0].Value.Kind() != metrics.KindFloat64Histogram { // a future runtime may drop the metric
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

// Latency records how long things took and makes a Signal of it. Its Took fits Options.Took of package throttlerhttp. The
// zero value is ready to use. It is safe for concurrent use and must not be copied.
type Latency struct {
	counts [octaves * steps]atomic.Uint64
}

// Durations are counted in a histogram: each octave of nanoseconds, from one power of two to the next, has equal steps.
const (
	octaves = 61
	steps   = 8
)

// Took records a duration. It allocates nothing and takes no lock.
func (l *Latency) Took(d time.Duration) { l.counts[step(d)].Add(1) }

// Signal returns a Signal of the 90th percentile of what was recorded since its last call, rounded down by up to an eighth
// and divided by target, which must be above 0. It is 0 if nothing was recorded, so work that never ends goes unnoticed.
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

// step returns the step that counts a duration. Below 16 ns each nanosecond has a step of its own; above, a duration's
// first four bits choose it.
func step(d time.Duration) int {
	n := uint64(max(0, d))
	shift := max(0, bits.Len64(n)-4)
	return shift*steps + int(n>>shift)
}

// lowest returns the shortest duration that is counted in a step.
func lowest(step int) time.Duration {
	shift := max(0, step/steps-1)
	return time.Duration(step-shift*steps) << shift
}

// window turns total counts into counts since its last call.
type window struct{ before []uint64 }

// p90 returns the index at which 90 % of what was counted since the last call is reached, or -1 if that is nothing.
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
