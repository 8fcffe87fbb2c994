package law

// The clock of whatever has none injected, and the bounds of those that are.

import "time"

var (
	started       = time.Now()
	startedMicros = started.UnixMicro()
)

// Elapsed is how long the process has been running, and MonotonicAt what Monotonic was then.
func Elapsed() time.Duration { return time.Since(started) }

// TimeAt is the time when Elapsed was elapsed, with a monotonic reading.
func TimeAt(elapsed time.Duration) time.Time { return started.Add(elapsed) }

// MonotonicAt is Monotonic at a time of Elapsed.
func MonotonicAt(elapsed time.Duration) int64 { return startedMicros + int64(elapsed/time.Microsecond) }

// Monotonic is the time in microseconds since the epoch, by a clock that starts with the process
// and is never set: the clock of whatever has none injected.
func Monotonic() int64 { return MonotonicAt(Elapsed()) }

// Clocked reports whether the arithmetic can hold a time in microseconds since the epoch: one of the years 1970 to 2184.
func Clocked(micros int64) bool { return micros >= 0 && micros < maxClock }

// Micros is t in microseconds since the epoch. It is not ok if the arithmetic cannot hold it.
func Micros(t time.Time) (micros int64, ok bool) {
	if s := t.Unix(); s < 0 || s >= maxClock/1_000_000 {
		return 0, false
	}
	return t.UnixMicro(), true
}
