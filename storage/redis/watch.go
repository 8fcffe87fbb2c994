package redis

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/go-throttler/throttler/internal/batch"
	"github.com/go-throttler/throttler/storage"
)

// Watch reports the outcome of every batch to package failover. It also lowers Options.Timeout to timeout if that is
// shorter.
//
// Report is called once for each batch. Its argument is nil if the server answered, even with errors for single keys
// (ErrCorruptState, BucketError, ErrCrossSlot, ErrStale). Otherwise it is the error that the callers get. A batch that
// takes longer than Options.Timeout is reported when that has passed, and not again when it is answered. A failure to
// find the node of a key in a cluster is reported too. Callers that leave early do not change what is reported.
//
// Report must be quick and safe for concurrent use. It is called before the callers of the batch return, unless they
// have given up. It may be called until Options.Timeout after Close.
//
// Watch also replaces the decision script by one of 256 variants, at random. A process learns of a restart by
// ErrRestarted only if no other process has sent the new server the same variant before. A server caches each variant:
// about 15 kB of text.
//
// Watch must be called once, and before the first call. A second or late Watch, and a timeout that is not above 0, is
// an *OptionError.
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

// watch reports a timeout when ctx ends. If inTime is called before that it returns true, and nothing is reported. So
// exactly one side reports: watch, or its caller if inTime is true.
func (s *Storage) watch(ctx context.Context) (inTime func() bool) {
	return context.AfterFunc(ctx, func() { s.report(s.unavailable(batch.ErrTimeout)) })
}
