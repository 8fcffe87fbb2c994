// Package batch lets the concurrent calls of one process share round trips to a server.
//
// A call that finds fewer than Options.InFlight batches in flight is sent at once, alone: no call ever waits for
// company. The calls that come while all batches are in flight wait in the queue, and the next batch to be answered
// takes them along. So batches are as large as the server makes callers wait, and no larger.
//
//	c := q.Get()
//	defer q.Put(c)
//	c.Query = query
//	if err := q.Do(ctx, c); err != nil {
//		return c.Sent(), err // what was not sent is never executed
//	}
//	use(c.Answer)
//
// Batches run in goroutines of their own, so that a caller waits for the queue and never for a socket, unless it
// chooses to with DoInline. An idle queue has no goroutine.
package batch

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/go-throttler/throttler/storage"
)

// ErrTimeout is returned to a call that was not answered within Options.Timeout.
var ErrTimeout = errors.New("batch: no answer in time")

// stuck is how many batches that were given up may be in flight besides Options.InFlight.
const stuck = 16

// Options of a Queue. Timeout is required.
type Options struct {
	InFlight int           // most batches in flight at a time, by default 2; stuck ones may add 16
	Size     int           // most calls of one batch, by default 128
	Timeout  time.Duration // the longest that a call waits, queued and in flight together, and that a batch is waited for
}

// Call is one query and its answer. It comes from Get, is for one Do, and goes back with Put.
type Call[Q, A any] struct {
	Query  Q
	Answer A     // set by run; the caller's once Do returned nil
	Err    error // set by run, and returned by Do

	next, prev *Call[Q, A]   // the neighbours in the queue, nil outside of it
	done       chan struct{} // has room for the one token that says that Answer and Err are set
	timer      *time.Timer
	sent       bool
	lost       bool // the caller left, and the batch may still touch the call
}

// Sent reports, after Do returned an error, whether the call was taken into a batch. If it was, it
// may have been executed, or may be later. If it was not, it never is.
func (c *Call[Q, A]) Sent() bool { return c.sent }

// Queue gathers calls into batches. All methods are safe for concurrent use.
type Queue[Q, A any] struct {
	run     func(ctx context.Context, calls []*Call[Q, A])
	options Options
	calls   sync.Pool
	drained chan struct{} // closed when the queue is closed and nothing is in flight

	// mu guards all below, the links and sent of calls that are in the queue, and the running, late and
	// deadline of batches. Whoever unlocks it leaves no call in the queue while a batch may start.
	mu       sync.Mutex
	waiting  Call[Q, A] // its next is the first in the queue, its prev the last
	inFlight int        // batches, also late ones
	late     int        // those that have taken longer than Timeout
	idle     []*batch[Q, A]
	closed   bool
}

// New returns a queue whose batches are executed by run: it sets Answer and Err of each call, which are
// zero and remain so where it does not, and keeps neither the calls nor the slice. The calls are in the
// order of their arrival. The context ends after Options.Timeout and when run returns. If run panics,
// the calls that have no Err get one that holds the panic and its stack. New panics without a Timeout.
func New[Q, A any](o Options, run func(ctx context.Context, calls []*Call[Q, A])) *Queue[Q, A] {
	if o.Timeout <= 0 {
		panic(fmt.Sprintf("batch: Options.Timeout is %v and must be above zero", o.Timeout))
	}
	if o.InFlight <= 0 {
		o.InFlight = 2
	}
	if o.Size <= 0 {
		o.Size = 128
	}
	q := &Queue[Q, A]{run: run, options: o, drained: make(chan struct{})}
	q.waiting.next, q.waiting.prev = &q.waiting, &q.waiting
	q.calls.New = func() any {
		c := &Call[Q, A]{done: make(chan struct{}, 1), timer: time.NewTimer(o.Timeout)}
		c.timer.Stop()
		return c
	}
	return q
}

// Get returns a call whose Query is to be set.
func (q *Queue[Q, A]) Get() *Call[Q, A] { return q.calls.Get().(*Call[Q, A]) }

// Put takes back a call that nobody will use any more, whatever became of it.
func (q *Queue[Q, A]) Put(c *Call[Q, A]) {
	if c.lost {
		return
	}
	*c = Call[Q, A]{done: c.done, timer: c.timer}
	q.calls.Put(c)
}

// Do waits until the call was answered, and returns its Err. If the context ends before, it returns
// the context's error at once, after Options.Timeout ErrTimeout, and storage.ErrClosed if the queue
// was closed before the call was sent. When the context has ended too, that is the error in place of ErrTimeout or
// of a storage.ErrUnavailable. What it sent it cannot call back: when Sent is true after one
// of these errors, what Query refers to must never change again, and Answer and Err are not the caller's.
func (q *Queue[Q, A]) Do(ctx context.Context, c *Call[Q, A]) error {
	err := q.do(ctx, c)
	if ended := ctx.Err(); ended != nil && (errors.Is(err, ErrTimeout) || errors.Is(err, storage.ErrUnavailable)) {
		return ended
	}
	return err
}

// DoInline is Do without the two handovers between goroutines: if a batch may start at once, the caller executes run
// itself, in place of the queue's. It is for a context that can never end, and run must return when its own context
// ends: nothing else ends the call.
func (q *Queue[Q, A]) DoInline(ctx context.Context, c *Call[Q, A], run func(ctx context.Context, calls []*Call[Q, A])) error {
	if b := q.alone(c); b != nil {
		b.run = run
		return b.runInline(c)
	}
	return q.Do(ctx, c)
}

func (q *Queue[Q, A]) do(ctx context.Context, c *Call[Q, A]) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c.timer.Reset(q.options.Timeout)
	defer c.timer.Stop()
	if !q.enter(c) {
		return storage.ErrClosed
	}
	select {
	case <-c.done:
		return c.Err
	case <-ctx.Done():
		return q.leave(c, ctx.Err())
	case <-c.timer.C:
		return q.leave(c, ErrTimeout)
	}
}

// enter puts the call in the queue, unless the queue is closed.
func (q *Queue[Q, A]) enter(c *Call[Q, A]) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return false
	}
	c.prev, c.next = q.waiting.prev, &q.waiting
	c.prev.next, c.next.prev = c, c
	q.start()
	return true
}

// alone returns a batch of this call only, for its caller to run, or nil if none may start.
func (q *Queue[Q, A]) alone(c *Call[Q, A]) *batch[Q, A] {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || q.waiting.next != &q.waiting || q.full() {
		return nil
	}
	q.waiting.next, q.waiting.prev, c.next, c.prev = c, c, &q.waiting, &q.waiting
	return q.next()
}

// leave ends the call with err, or with its answer if that came meanwhile.
func (q *Queue[Q, A]) leave(c *Call[Q, A], err error) error {
	q.mu.Lock()
	if c.next != nil {
		c.unlink()
	}
	q.mu.Unlock()
	select {
	case <-c.done:
		return c.Err
	default:
		c.lost = c.sent
		return err
	}
}

func (c *Call[Q, A]) unlink() {
	c.prev.next, c.next.prev = c.next, c.prev
	c.next, c.prev = nil, nil
}

// Close answers the calls in the queue, and those that come later, with storage.ErrClosed. It waits for the
// batches in flight, but not longer than Options.Timeout. If the context ends before, it returns its error.
func (q *Queue[Q, A]) Close(ctx context.Context) error {
	q.shut()
	select {
	case <-q.drained: // also when the context has ended
		return nil
	default:
	}
	select {
	case <-q.drained:
	case <-time.After(q.options.Timeout):
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

func (q *Queue[Q, A]) shut() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return
	}
	q.closed = true
	for c := q.waiting.next; c != &q.waiting; c = q.waiting.next {
		c.unlink()
		c.Err = storage.ErrClosed
		c.done <- struct{}{}
	}
	if q.inFlight == 0 {
		close(q.drained)
	}
}

// batch is reused: a goroutine fills and runs it until the queue is empty.
type batch[Q, A any] struct {
	queue    *Queue[Q, A]
	run      func(ctx context.Context, calls []*Call[Q, A])
	calls    []*Call[Q, A]
	begin    func()      // is loop: a go statement with a method would allocate
	timer    *time.Timer // calls overdue
	deadline time.Time
	running  bool // in flight
	late     bool // and counted as late
}

// start starts a batch if one may. The caller holds mu.
func (q *Queue[Q, A]) start() {
	if q.ready() {
		go q.next().begin()
	}
}

// next returns a batch with the first calls of the queue. The caller holds mu.
func (q *Queue[Q, A]) next() *batch[Q, A] {
	if len(q.idle) == 0 {
		b := &batch[Q, A]{queue: q}
		b.begin, b.timer = b.loop, time.AfterFunc(q.options.Timeout, b.overdue)
		q.idle = append(q.idle, b)
	}
	last := len(q.idle) - 1
	b := q.idle[last]
	q.idle = q.idle[:last]
	b.fill()
	return b
}

// ready reports whether calls are in the queue and a batch may take them. The caller holds mu.
func (q *Queue[Q, A]) ready() bool { return q.waiting.next != &q.waiting && !q.full() }

// full reports whether no batch may start. A late batch has made room for another one, unless too many are late. The
// caller holds mu.
func (q *Queue[Q, A]) full() bool { return q.inFlight >= q.options.InFlight+min(q.late, stuck) }

// fill moves the first calls of the queue into the batch. The caller holds mu.
func (b *batch[Q, A]) fill() {
	q := b.queue
	for c := q.waiting.next; c != &q.waiting && len(b.calls) < q.options.Size; c = q.waiting.next {
		c.unlink()
		c.sent = true
		b.calls = append(b.calls, c)
	}
	q.inFlight++
	b.run = q.run
	b.running, b.deadline = true, time.Now().Add(q.options.Timeout)
	b.timer.Reset(q.options.Timeout)
}

func (b *batch[Q, A]) loop() {
	for b.once() {
	}
}

// runInline runs a batch in the goroutine of its only caller. The calls that came meanwhile get another goroutine, so
// that they do not hold the caller up.
func (b *batch[Q, A]) runInline(c *Call[Q, A]) error {
	if b.once() {
		go b.begin()
	}
	<-c.done
	return c.Err
}

// once runs the batch, and reports whether it has been filled again.
func (b *batch[Q, A]) once() (more bool) {
	ctx, cancel := context.WithDeadline(context.Background(), b.deadline)
	returned := false
	defer func() {
		cancel()
		fault := recover()
		exits := !returned && fault == nil // run called runtime.Goexit, as a test that fails does
		if exits {
			fault = "runtime.Goexit"
		}
		if !returned {
			b.fail(fault)
		}
		more = b.finish()
		if exits && more {
			go b.begin() // as this goroutine ends
		}
	}()
	b.run(ctx, b.calls)
	returned = true
	return
}

// fail answers the calls of a run that did not return. It overrides no Err, but every Answer without
// one: which of them are complete is not known.
func (b *batch[Q, A]) fail(fault any) {
	err := fmt.Errorf("%w: batch: run panicked: %v\n\n%s", storage.ErrUnavailable, fault, debug.Stack())
	for _, c := range b.calls {
		if c.Err == nil {
			c.Err = err
		}
	}
}

// finish wakes the callers, and fills the batch again if it may.
func (b *batch[Q, A]) finish() (more bool) {
	b.timer.Stop()
	for _, c := range b.calls {
		c.done <- struct{}{} // from here on it is the caller's
	}
	if len(b.calls) > 1 {
		runtime.Gosched() // those callers that go on at once are in the queue for the next batch
	}
	clear(b.calls)
	b.calls = b.calls[:0]
	q := b.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	q.inFlight--
	if b.late {
		q.late--
	}
	b.running, b.late = false, false
	if q.ready() {
		b.fill()
		return true
	}
	q.idle = append(q.idle, b)
	if q.closed && q.inFlight == 0 {
		close(q.drained)
	}
	return false
}

// overdue counts the batch as late, so that another may start. The timer may have run out just
// before the batch finished, and it may be running again: the deadline tells.
func (b *batch[Q, A]) overdue() {
	q := b.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	if !b.running || b.late || time.Now().Before(b.deadline) {
		return
	}
	b.late = true
	q.late++
	q.start()
}
