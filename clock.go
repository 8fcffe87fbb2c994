package throttler

import "time"

// Clock tells the time and waits. The clocks of github.com/benbjohnson/clock satisfy it. It must be safe for concurrent
// use, and its time must be in the years 1970 to 2184; otherwise calls fail with ErrInvalidClock.
type Clock interface {
	Now() time.Time
	After(d time.Duration) <-chan time.Time
}
