package throttler

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// Wait blocks until the call is admitted and takes the cost. It returns an error, never a denied Verdict
// without one. Without a deadline it waits as long as it must. Calls of Wait for one identifier on one
// Throttler are admitted in the order of their arrival, whatever their buckets, and wait by
// Config.Clock; whoever leaves holds up nobody. With Continuous().Burst(1) it is a leaky bucket.
//
// When the context's deadline is nearer than RetryAfter it returns at once the denied Verdict and an
// error that wraps context.DeadlineExceeded. In a queue that is the time which the first in line would
// have to wait: those further back may wait until their deadline in vain. A context that ends later
// returns its own error. With Config.Clock the deadline must be by that clock too.
func (t *Throttler) Wait(ctx context.Context, id string, o ...Option) (Verdict, error) {
	id = strings.Clone(id) // those behind find the line by it, also once this one has left
	start := law.Elapsed()
	v, err := t.wait(ctx, id, o)
	if t.observe != nil {
		t.tell(ctx, t.event(OpWait, 0, id, largestCost(&v)), &v, err, start, law.Elapsed())
	}
	return v, err
}

func (t *Throttler) wait(ctx context.Context, id string, o []Option) (v Verdict, err error) {
	turn, attempt := t.lines.join(id), 1
	defer t.lines.leave(id, turn)
	select {
	case <-turn:
	default:
		if v, err := t.queue(ctx, turn, id, o); err != nil {
			return v, err
		}
		attempt++
	}
	for ; ; attempt++ {
		v = Verdict{}
		if err = t.decide(ctx, &v, storage.Take, attempt, id, o); err != nil || v.Allowed {
			return v, err
		}
		if err := t.tooLate(ctx, v.RetryAfter, id); err != nil {
			return v, err
		}
		pause := v.RetryAfter
		if pause <= 0 { // against the contract; a storage that does so is not asked without end
			pause = time.Millisecond
		}
		select {
		case <-t.after(pause):
		case <-ctx.Done():
			return v, ctx.Err()
		}
	}
}

// queue waits for the turn, unless the deadline is nearer than even the first in line would have
// to wait. Its look is the first attempt.
func (t *Throttler) queue(ctx context.Context, turn <-chan struct{}, id string, o []Option) (v Verdict, err error) {
	if err = t.decide(ctx, &v, storage.Peek, 1, id, o); err != nil {
		return v, err
	}
	v.Allowed = false
	if err := t.tooLate(ctx, v.RetryAfter, id); err != nil {
		return v, err
	}
	select {
	case <-turn:
		return v, nil
	case <-ctx.Done():
		return v, ctx.Err()
	}
}

func (t *Throttler) tooLate(ctx context.Context, retry time.Duration, id string) error {
	now := time.Now
	if t.clock != nil {
		now = t.clock.Now
	}
	if deadline, ok := ctx.Deadline(); ok && deadline.Before(now().Add(retry)) {
		return fmt.Errorf("throttler: %.64q has to wait for %v: %w", id, retry, context.DeadlineExceeded)
	}
	return nil
}

func (t *Throttler) after(d time.Duration) <-chan time.Time {
	if t.clock != nil {
		return t.clock.After(d)
	}
	return time.After(d)
}

// lines are the queues of Wait, one an identifier. Who is first in one has a closed channel.
type lines struct {
	mu      sync.Mutex
	waiting map[string][]chan struct{}
}

func (l *lines) join(id string) chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting == nil {
		l.waiting = make(map[string][]chan struct{})
	}
	turn := make(chan struct{})
	if l.waiting[id] = append(l.waiting[id], turn); len(l.waiting[id]) == 1 {
		close(turn)
	}
	return turn
}

func (l *lines) leave(id string, turn chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := slices.Index(l.waiting[id], turn)
	rest := slices.Delete(l.waiting[id], at, at+1)
	if len(rest) == 0 {
		delete(l.waiting, id)
		return
	}
	l.waiting[id] = rest
	if at == 0 {
		close(rest[0])
	}
}
