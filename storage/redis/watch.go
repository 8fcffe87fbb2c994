package redis

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/go-throttler/throttler/internal/batch"
	"github.com/go-throttler/throttler/storage"
)

// Watch is for package failover. It lowers Options.Timeout to timeout if that is less. From then on report is
// called once for each batch of calls: with nil when the server has answered it, also where the answer is an
// error of single keys (ErrCorruptState, BucketError, ErrCrossSlot, ErrStale), else with the error, as the callers
// see it. A batch that has taken longer than the Timeout is reported then, and not again when it is answered. So is
// a failure to find the server of a key in a cluster. A caller that leaves early changes nothing.
//
// Report is called by several goroutines at a time, before the callers return unless they had to give up, and
// must be quick. It may be called until the Timeout after Close.
//
// The storage also uses one of 256 variants of its script, at random, so that each process finds out by ErrRestarted
// that a server has restarted, and not only the one that uses it first. The server keeps each, 15 kB of text.
//
// Watch must be called once, and before the first call has begun: after it, and for a timeout that is not above 0,
// it returns an *OptionError.
func (s *Storage) Watch(timeout time.Duration, report func(err error)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return storage.ErrClosed
	case s.begun:
		return &OptionError{"Watch", "must be called before the first call"}
	case s.report != nil:
		return &OptionError{"Watch", "must be called once"}
	case timeout <= 0:
		return &OptionError{"Timeout", fmt.Sprintf("of Watch is %v, must be above 0", timeout)}
	}
	s.options.Timeout = min(s.options.Timeout, timeout)
	s.report, s.decider = report, variant(rand.N(variants))
	return nil
}

// watch reports what is overdue when the context ends, unless inTime is called before, and then is true.
func (s *Storage) watch(ctx context.Context) (inTime func() bool) {
	return context.AfterFunc(ctx, func() { s.report(s.unavailable(batch.ErrTimeout)) })
}
