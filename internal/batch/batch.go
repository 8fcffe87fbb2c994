// Package batch lets the concurrent calls of one process share round trips to a server.
//
// A call that finds a flight free takes off at once, alone: no call ever waits for company. The
// calls that come while all flights are in the air stand in line, and the next flight to land takes
// them along. So flights are as large as the server makes them wait, and no larger.
//
//	c := q.Get()
//	defer q.Put(c)
//	c.Query = query
//	if err := q.Do(ctx, c); err != nil {
//		return c.Sent(), err // when it was not sent, it was not and will not be executed
//	}
//	use(c.Answer)
//
// Flights have goroutines of their own, so that callers wait for the queue and never for a socket, unless they
// choose to with DoInline. An idle queue has none.
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

// stuck is how many flights that were given up may be in the air besides Options.Flights.
const stuck = 16

// Options of a Queue. Timeout is required.
type Options struct {
	Flights int           // most flights in the air at a time, by default 2; stuck ones may add 16
	Size    int           // most calls of one flight, by default 128
	Timeout time.Duration // the longest that a call waits, in line and in flight, and that a flight is waited for
}

// Call is one query and its answer. It comes from Get, is for one Do, and goes back with Put.
type Call[Q, A any] struct {
	Query  Q
	Answer A     // set by run; the caller's once Do returned nil
	Err    error // set by run, and returned by Do

	next, prev *Call[Q, A]   // the neighbours in line, nil outside of it
	done       chan struct{} // has room for the one token that says that Answer and Err are set
	timer      *time.Timer
	sent       bool
	lost       bool // the caller left, and the flight may still touch the call
}

// Sent reports, after Do returned an error, whether the call was taken into a flight. If it was, it
// may have been executed, or may be later. If it was not, it never is.
func (c *Call[Q, A]) Sent() bool { return c.sent }

// Queue gathers calls into flights. All methods are safe for concurrent use.
type Queue[Q, A any] struct {
	run     func(ctx context.Context, flight []*Call[Q, A])
	options Options
	calls   sync.Pool
	landed  chan struct{} // closed when the queue is closed and nothing is in the air

	// mu guards all below, the links and sent of calls that are in line, and the up, late and deadline of
	// flights. Whoever unlocks it leaves no call in line while a flight may start.
	mu       sync.Mutex
	line     Call[Q, A] // its next is the first in line, its prev the last
	inTheAir int        // flights, also late ones
	late     int        // those that have taken longer than Timeout
	idle     []*flight[Q, A]
	closed   bool
}

// New returns a queue whose flights are executed by run: it sets Answer and Err of each call, which are
// zero and remain so where it does not, and keeps neither the calls nor the slice. The calls are in the
// order of their arrival. The context ends after Options.Timeout and when run returns. If run panics,
// the calls that have no Err get one that holds the panic and its stack. New panics without a Timeout.
func New[Q, A any](o Options, run func(ctx context.Context, flight []*Call[Q, A])) *Queue[Q, A] {
	if o.Timeout <= 0 {
		panic(fmt.Sprintf("batch: Options.Timeout is %v and must be above zero", o.Timeout))
	}
	if o.Flights <= 0 {
		o.Flights = 2
	}
	if o.Size <= 0 {
		o.Size = 128
	}
	q := &Queue[Q, A]{run: run, options: o, landed: make(chan struct{})}
	q.line.next, q.line.prev = &q.line, &q.line
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

// DoInline is Do without the two handovers between goroutines: if a flight may start at once, the caller executes run
// itself, in place of the queue's. It is for a context that can never end, and run must return when its own context
// ends: nothing else ends the call.
func (q *Queue[Q, A]) DoInline(ctx context.Context, c *Call[Q, A], run func(ctx context.Context, flight []*Call[Q, A])) error {
	if f := q.board(c); f != nil {
		f.run = run
		return f.flyOwn(c)
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

// enter puts the call in line, unless the queue is closed.
func (q *Queue[Q, A]) enter(c *Call[Q, A]) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return false
	}
	c.prev, c.next = q.line.prev, &q.line
	c.prev.next, c.next.prev = c, c
	q.start()
	return true
}

// board returns a flight that has taken the call alone, for its caller to fly, or nil if none may start.
func (q *Queue[Q, A]) board(c *Call[Q, A]) *flight[Q, A] {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || q.line.next != &q.line || q.full() {
		return nil
	}
	q.line.next, q.line.prev, c.next, c.prev = c, c, &q.line, &q.line
	return q.takeOff()
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

// Close answers the calls in line, and those that come later, with storage.ErrClosed. It waits for the
// flights in the air, but not longer than Options.Timeout. If the context ends before, it returns its error.
func (q *Queue[Q, A]) Close(ctx context.Context) error {
	q.shut()
	select {
	case <-q.landed: // also when the context has ended
		return nil
	default:
	}
	select {
	case <-q.landed:
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
	for c := q.line.next; c != &q.line; c = q.line.next {
		c.unlink()
		c.Err = storage.ErrClosed
		c.done <- struct{}{}
	}
	if q.inTheAir == 0 {
		close(q.landed)
	}
}

// flight is what a goroutine flies in, one flight after the other.
type flight[Q, A any] struct {
	queue    *Queue[Q, A]
	run      func(ctx context.Context, flight []*Call[Q, A])
	calls    []*Call[Q, A]
	begin    func()      // is fly: a go statement with a method would allocate
	timer    *time.Timer // calls overdue
	deadline time.Time
	up       bool // it is in the air
	late     bool // and is counted as late
}

// start starts a flight if one may. The caller holds mu.
func (q *Queue[Q, A]) start() {
	if q.ready() {
		go q.takeOff().begin()
	}
}

// takeOff returns a flight that has boarded. The caller holds mu.
func (q *Queue[Q, A]) takeOff() *flight[Q, A] {
	if len(q.idle) == 0 {
		f := &flight[Q, A]{queue: q}
		f.begin, f.timer = f.fly, time.AfterFunc(q.options.Timeout, f.overdue)
		q.idle = append(q.idle, f)
	}
	last := len(q.idle) - 1
	f := q.idle[last]
	q.idle = q.idle[:last]
	f.board()
	return f
}

// ready reports whether calls are in line and a flight may take them. The caller holds mu.
func (q *Queue[Q, A]) ready() bool { return q.line.next != &q.line && !q.full() }

// full reports whether no flight may start. A late flight has made room for another one, unless too many are late. The
// caller holds mu.
func (q *Queue[Q, A]) full() bool { return q.inTheAir >= q.options.Flights+min(q.late, stuck) }

// board takes the first in line along. The caller holds mu.
func (f *flight[Q, A]) board() {
	q := f.queue
	for c := q.line.next; c != &q.line && len(f.calls) < q.options.Size; c = q.line.next {
		c.unlink()
		c.sent = true
		f.calls = append(f.calls, c)
	}
	q.inTheAir++
	f.run = q.run
	f.up, f.deadline = true, time.Now().Add(q.options.Timeout)
	f.timer.Reset(q.options.Timeout)
}

func (f *flight[Q, A]) fly() {
	for f.once() {
	}
}

// flyOwn is fly in the goroutine of the only caller. What came meanwhile is not left to it.
func (f *flight[Q, A]) flyOwn(c *Call[Q, A]) error {
	if f.once() {
		go f.begin()
	}
	<-c.done
	return c.Err
}

// once executes what boarded, and reports whether there is more.
func (f *flight[Q, A]) once() (more bool) {
	ctx, cancel := context.WithDeadline(context.Background(), f.deadline)
	returned := false
	defer func() {
		cancel()
		fault := recover()
		exits := !returned && fault == nil // run called runtime.Goexit, as a test that fails does
		if exits {
			fault = "runtime.Goexit"
		}
		if !returned {
			f.fail(fault)
		}
		more = f.land()
		if exits && more {
			go f.begin() // as this goroutine ends
		}
	}()
	f.run(ctx, f.calls)
	returned = true
	return
}

// fail answers the calls of a run that did not return. It overrides no Err, but every Answer without
// one: which of them are complete is not known.
func (f *flight[Q, A]) fail(fault any) {
	err := fmt.Errorf("%w: batch: run panicked: %v\n\n%s", storage.ErrUnavailable, fault, debug.Stack())
	for _, c := range f.calls {
		if c.Err == nil {
			c.Err = err
		}
	}
}

// land lets the callers go, and takes the next ones along if it may.
func (f *flight[Q, A]) land() (more bool) {
	f.timer.Stop()
	for _, c := range f.calls {
		c.done <- struct{}{} // from here on it is the caller's
	}
	if len(f.calls) > 1 {
		runtime.Gosched() // those callers that go on at once are in line for the next flight
	}
	clear(f.calls)
	f.calls = f.calls[:0]
	q := f.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	q.inTheAir--
	if f.late {
		q.late--
	}
	f.up, f.late = false, false
	if q.ready() {
		f.board()
		return true
	}
	q.idle = append(q.idle, f)
	if q.closed && q.inTheAir == 0 {
		close(q.landed)
	}
	return false
}

// overdue counts the flight as late, so that another one may start. The timer may have run out just
// before the flight landed, and then another flight may be up meanwhile, which the deadline tells.
func (f *flight[Q, A]) overdue() {
	q := f.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	if !f.up || f.late || time.Now().Before(f.deadline) {
		return
	}
	f.late = true
	q.late++
	q.start()
}
