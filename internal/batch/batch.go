// Package batch lets the concurrent calls of one process share round trips to a server.
//
// A call that finds fewer than Options.InFlight batches in flight is sent at once, alone: no call is ever held back
// to fill a batch. Calls that come while all batches are in flight wait in the queue. The next batch to be answered
// takes them along. So the size of batches follows from how long the server makes callers wait.
//
//	c := q.Get()
//	defer q.Put(c)
//	c.Query = query
//	if err := q.Do(ctx, c); err != nil {
//		return c.Sent(), err // a call that was not sent is never executed
//	}
//	use(c.Answer)
//
// Batches run in goroutines of their own. A caller therefore waits for the queue and never for a socket, unless it uses
// DoInline. An idle queue has no goroutine.
//
// # Who owns a call
//
// A Call passes from hand to hand, and only its present owner may touch it:
//
//   - the caller, from Get until Do enters it into the queue;
//   - the queue, under its lock, while the call waits;
//   - the batch, from fill until finish sends the token on done;
//   - the caller again, once it has received that token, or once it has left a queue that had not sent the call.
//
// A caller that leaves after its call was sent never gets it back: the batch may still touch it, so the call is lost
// and Put does not reuse it. Whoever takes a call out of the queue (fill, leave or shut) does so under the lock, so
// exactly one of them does.
package batch

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// ErrTimeout is the error of a call that was not answered within Options.Timeout.
var ErrTimeout = errors.New("batch: no answer in time")

// stuck is how many overdue batches may be in flight in addition to Options.InFlight. An overdue batch makes room for
// another one, so that a connection which hangs does not stop the queue. The bound keeps a server that answers nothing
// from collecting goroutines and connections.
const stuck = 16

// Options of a Queue. Timeout is required.
type Options struct {
	InFlight int           // most batches in flight at a time, by default 2; up to 16 overdue ones come on top
	Size     int           // most calls in a batch, by default 128
	Timeout  time.Duration // longest time for a call, in the queue and in flight together, and for a batch
}

// Call is one query and its answer. It comes from Get, is used for one Do, and is given back by Put.
type Call[Q, A any] struct {
	Query  Q
	Answer A     // set by run; valid for the caller once Do has returned nil
	Err    error // set by run, and returned by Do

	next, prev *Call[Q, A]   // the neighbours in the queue, nil outside of it
	done       chan struct{} // gets one token when Answer and Err are set; its buffer keeps the sender from waiting
	alarm      chan struct{} // of the queue when the call entered
	sent       bool          // taken into a batch
	lost       bool          // the caller left after the call was sent: the batch may still touch it
}

// Sent reports, after Do returned an error, whether the call was taken into a batch. If it was, it may have been
// executed, or may be executed later. If it was not, it never will be.
func (c *Call[Q, A]) Sent() bool { return c.sent }

// Queue gathers calls into batches. All methods are safe for concurrent use.
type Queue[Q, A any] struct {
	run     func(ctx context.Context, calls []*Call[Q, A])
	options Options
	calls   sync.Pool
	drained chan struct{} // closed when the queue is closed and nothing is in flight

	// mu guards the fields below, the links, alarm and sent of calls in the queue, and running, late and deadline of all
	// batches. It is held for short steps only, and never while run executes.
	//
	// The invariant: when mu is unlocked, either the queue is empty or no further batch may start. Everything that adds
	// a call or ends a batch or makes one overdue restores it, so no call can be forgotten.
	mu       sync.Mutex
	waiting  Call[Q, A]     // the head of a ring: next is the first call in the queue, prev the last
	inFlight int            // batches, including the overdue ones
	late     int            // overdue batches: in flight for longer than Timeout
	idle     []*batch[Q, A] // batches to be used again
	closed   bool           // never set back; then the queue stays empty

	alarm, before chan struct{} // of the calls that have entered since the last ring, and of those before; nil for none
	bell          *time.Timer   // calls ring if there is any
}

// New returns a queue. Run executes a batch, whose calls are in the order of their arrival. It sets Answer and Err of
// each call; both are zero before and stay so if it does not. It must not keep the calls or the slice after it has
// returned. Its context ends after Options.Timeout, and when run returns. Different batches call run concurrently.
//
// If run panics, the calls without an Err get one that wraps storage.ErrUnavailable and has the panic and its stack.
// New panics if Options.Timeout is not above zero.
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
		return &Call[Q, A]{done: make(chan struct{}, 1)}
	}
	return q
}

// Get returns an empty call, for the caller to set its Query.
func (q *Queue[Q, A]) Get() *Call[Q, A] { return q.calls.Get().(*Call[Q, A]) }

// Put takes back a call of Get, whatever Do returned. The caller must not use it any more.
func (q *Queue[Q, A]) Put(c *Call[Q, A]) {
	if c.lost { // a batch may still set its Answer, which another caller would get
		return
	}
	*c = Call[Q, A]{done: c.done}
	q.calls.Put(c)
}

// Do enters the call into the queue, waits for its answer, and returns its Err. There are other errors:
//
//   - the context's as soon as it ends, also in place of an ErrTimeout or storage.ErrUnavailable that came first
//   - ErrTimeout after Options.Timeout
//   - storage.ErrClosed if the queue was closed before the call was sent
//
// A call that was sent cannot be called back. If Sent is true after one of these errors, the memory to which Query
// refers must never change again, and the caller must not read Answer and Err.
func (q *Queue[Q, A]) Do(ctx context.Context, c *Call[Q, A]) error {
	err := q.do(ctx, c)
	if ended := ctx.Err(); ended != nil && (errors.Is(err, ErrTimeout) || errors.Is(err, storage.ErrUnavailable)) {
		return ended
	}
	return err
}

// DoInline is Do without the two handovers between goroutines, which take about half of the time of a fast round
// trip. If a batch may start at once, the caller executes it in its own goroutine, with the run that is given here
// instead of the queue's.
//
// Ctx must be one that can never end, and run must return when its own context ends: nothing else ends the call.
func (q *Queue[Q, A]) DoInline(ctx context.Context, c *Call[Q, A], run func(ctx context.Context, calls []*Call[Q, A])) error {
	if b := q.alone(c); b != nil {
		b.run = run
		return b.runInline(c)
	}
	return q.Do(ctx, c)
}

// do is Do without the preference for the context's error.
func (q *Queue[Q, A]) do(ctx context.Context, c *Call[Q, A]) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	entered := law.Elapsed()
	if !q.enter(c) {
		return storage.ErrClosed
	}
	select {
	case <-c.done:
		return c.Err
	case <-ctx.Done():
		return q.leave(c, ctx.Err())
	case <-c.alarm:
	}
	rest := time.NewTimer(entered + q.options.Timeout - law.Elapsed())
	defer rest.Stop()
	select {
	case <-c.done:
		return c.Err
	case <-ctx.Done():
		return q.leave(c, ctx.Err())
	case <-rest.C:
		return q.leave(c, ErrTimeout)
	}
}

// enter puts the call at the end of the queue, unless the queue is closed, and starts a batch if one may start.
func (q *Queue[Q, A]) enter(c *Call[Q, A]) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return false
	}
	c.prev, c.next = q.waiting.prev, &q.waiting
	c.prev.next, c.next.prev = c, c
	c.alarm = q.setAlarm()
	q.start()
	return true
}

// setAlarm returns a channel that is closed after half of the Timeout at the earliest, and after the whole at the latest. A
// call that still waits then makes a timer of its own. Few do, and a timer for every call would take a tenth of a decision.
// The caller holds mu.
func (q *Queue[Q, A]) setAlarm() chan struct{} {
	if q.alarm == nil {
		q.alarm = make(chan struct{})
		if q.before == nil { // otherwise the next ring is due already
			q.ringLater()
		}
	}
	return q.alarm
}

// ringLater rings after half of the Timeout. The caller holds mu.
func (q *Queue[Q, A]) ringLater() {
	if q.bell == nil {
		q.bell = time.AfterFunc(q.options.Timeout/2, q.ring)
	} else {
		q.bell.Reset(q.options.Timeout / 2)
	}
}

// ring closes the alarm of the calls that entered before the last ring.
func (q *Queue[Q, A]) ring() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.before != nil {
		close(q.before)
	}
	q.before, q.alarm = q.alarm, nil
	if q.before != nil {
		q.ringLater()
	}
}

// alone returns a batch with only this call, for its caller to run. It returns nil if other calls wait, as they come
// first, or if no batch may start.
func (q *Queue[Q, A]) alone(c *Call[Q, A]) *batch[Q, A] {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || q.waiting.next != &q.waiting || q.full() {
		return nil
	}
	q.waiting.next, q.waiting.prev, c.next, c.prev = c, c, &q.waiting, &q.waiting
	return q.next()
}

// leave ends the call with err, or with its answer if that has come in the meantime. A call that still waits is taken
// out of the queue, so that it is never sent.
func (q *Queue[Q, A]) leave(c *Call[Q, A], err error) error {
	q.mu.Lock()
	if c.next != nil { // still in the queue: neither fill nor shut has taken it
		c.unlink()
	}
	q.mu.Unlock()
	select {
	case <-c.done:
		return c.Err
	default:
		// Without the lock: sent is set only while the call is in the queue, and it is not there any more.
		c.lost = c.sent
		return err
	}
}

// unlink takes the call out of the queue. The caller holds mu.
func (c *Call[Q, A]) unlink() {
	c.prev.next, c.next.prev = c.next, c.prev
	c.next, c.prev = nil, nil
}

// Close answers the calls in the queue, and later ones, with storage.ErrClosed. Then it waits for the batches in
// flight, for at most Options.Timeout, and returns nil. If ctx ends first it returns the error of ctx. Closing twice
// is harmless: each Close waits.
func (q *Queue[Q, A]) Close(ctx context.Context) error {
	q.shut()
	select {
	case <-q.drained: // first, because select chooses at random if the context has ended too
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

// shut closes the queue and empties it. If no batch is in flight the queue is drained; otherwise finish says so later.
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

// batch is a set of calls in flight. A goroutine fills it and runs it, again and again until the queue is empty. Then
// it is idle until the queue uses it again, with its slice and its timer.
type batch[Q, A any] struct {
	queue    *Queue[Q, A]
	run      func(ctx context.Context, calls []*Call[Q, A]) // the queue's, or that of a DoInline
	calls    []*Call[Q, A]
	begin    func()      // the method loop: a go statement with a method value would allocate
	timer    *time.Timer // calls overdue at the deadline
	deadline time.Time
	running  bool // in flight
	late     bool // in flight, overdue and counted in the queue's late
}

// start starts a batch in a goroutine of its own, if one may start. The caller holds mu.
func (q *Queue[Q, A]) start() {
	if q.ready() {
		go q.next().begin()
	}
}

// next takes an idle batch, or makes one, and fills it with the first calls of the queue. The caller holds mu, and
// must run the batch.
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

// ready reports whether calls wait and a batch may take them. The caller holds mu.
func (q *Queue[Q, A]) ready() bool { return q.waiting.next != &q.waiting && !q.full() }

// full reports whether no batch may start. Each overdue batch makes room for another one, up to stuck of them. The
// caller holds mu.
func (q *Queue[Q, A]) full() bool { return q.inFlight >= q.options.InFlight+min(q.late, stuck) }

// fill moves the first calls of the queue into the batch, at most Options.Size, and puts the batch in flight. The
// calls are sent from now on: they belong to the batch, and leave cannot take them out any more. The caller holds mu.
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

// loop runs the batch until the queue is empty.
func (b *batch[Q, A]) loop() {
	for b.once() {
	}
}

// runInline runs a batch in the goroutine of its only caller. If calls have come in the meantime, a goroutine of its
// own goes on with them, so that the caller need not.
func (b *batch[Q, A]) runInline(c *Call[Q, A]) error {
	if b.once() {
		go b.begin()
	}
	<-c.done
	return c.Err
}

// once runs the batch, answers its calls, and reports whether it has been filled again. Whatever run does, the calls
// are answered and the batch is no longer in flight: otherwise the queue could run one batch fewer for ever.
func (b *batch[Q, A]) once() (more bool) {
	ctx, cancel := context.WithDeadline(context.Background(), b.deadline)
	returned := false
	defer func() {
		cancel()
		fault := recover()
		exits := !returned && fault == nil // run called runtime.Goexit, as t.FailNow does
		if exits {
			fault = "runtime.Goexit"
		}
		if !returned {
			b.fail(fault)
		}
		more = b.finish()
		if exits && more {
			go b.begin() // this goroutine ends, and its loop with it
		}
	}()
	b.run(ctx, b.calls)
	returned = true
	return
}

// fail gives an Err to the calls of a run that did not return, unless they have one. That includes calls with an
// Answer, because it is unknown whether it is complete.
func (b *batch[Q, A]) fail(fault any) {
	err := fmt.Errorf("%w: batch: run panicked: %v\n\n%s", storage.ErrUnavailable, fault, debug.Stack())
	for _, c := range b.calls {
		if c.Err == nil {
			c.Err = err
		}
	}
}

// finish wakes the callers, and fills the batch again if calls wait and it may. Otherwise the batch becomes idle.
func (b *batch[Q, A]) finish() (more bool) {
	b.timer.Stop()
	for _, c := range b.calls {
		c.done <- struct{}{} // never blocks; from here on the call is its caller's
	}
	if len(b.calls) > 1 {
		runtime.Gosched() // callers that call again at once are then in time for the next batch
	}
	clear(b.calls) // or idle batches would keep calls, and what they refer to, in memory
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

// overdue counts the batch as late, so that another one may start in its place. The timer calls it at the deadline.
// If the batch finishes at that moment, Stop comes too late, and the batch may even be in flight again with other
// calls. So overdue checks under the lock that the deadline of those calls has passed.
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
