package throttler

import "time"

// Clock tells the time and waits. The clocks of github.com/benbjohnson/clock satisfy it. It must
// be safe for concurrent use, and read between the years 1970 and 2184.
type Clock interface {
	Now() time.Time
	After(d time.Duration) <-chan time.Time
}
