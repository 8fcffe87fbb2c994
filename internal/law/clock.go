package law

// The clock that is used where none is injected, and the bounds of injected ones.

import "time"

var (
	started       = time.Now()
	startedMicros = started.UnixMicro()
)

// Elapsed returns how long the process has been running, by a clock that is never set. Reading it costs less than
// time.Now; TimeAt and MonotonicAt turn it into a time where one is needed.
func Elapsed() time.Duration { return time.Since(started) }

// TimeAt returns the time at which Elapsed returned elapsed, with a monotonic clock reading.
func TimeAt(elapsed time.Duration) time.Time { return started.Add(elapsed) }

// MonotonicAt returns what Monotonic returned when Elapsed returned elapsed.
func MonotonicAt(elapsed time.Duration) int64 { return startedMicros + int64(elapsed/time.Microsecond) }

// Monotonic returns the time in microseconds since the epoch, by a clock that takes the wall clock's time when the
// process starts and is never set afterwards. It is used wherever no clock is injected.
func Monotonic() int64 { return MonotonicAt(Elapsed()) }

// Clocked reports whether the arithmetic can hold a time, in microseconds since the epoch: it must be in the years 1970
// to 2184.
func Clocked(micros int64) bool { return micros >= 0 && micros < maxClock }

// Micros returns t in microseconds since the epoch. If the arithmetic cannot hold that, ok is false.
func Micros(t time.Time) (micros int64, ok bool) {
	if s := t.Unix(); s < 0 || s >= maxClock/1_000_000 {
		return 0, false
	}
	return t.UnixMicro(), true
}
