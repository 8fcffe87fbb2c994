package batch_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/go-throttler/throttler/internal/batch"
	"github.com/go-throttler/throttler/storage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type (
	queue = batch.Queue[string, string]
	call  = batch.Call[string, string]
)

// server answers each query in capital letters. A batch waits until a test sends a token to land; closing land
// releases all batches.
type server struct {
	land chan struct{}

	mu      sync.Mutex // guards batches
	batches []string   // the queries of each batch, in the order in which the batches began
}

// run executes a batch.
func (s *server) run(_ context.Context, calls []*call) {
	var queries []string
	for _, c := range calls {
		queries = append(queries, c.Query)
	}
	s.mu.Lock()
	s.batches = append(s.batches, strings.Join(queries, " "))
	s.mu.Unlock()
	<-s.land
	for _, c := range calls {
		c.Answer = strings.ToUpper(c.Query)
	}
}

// log returns the batches so far, once all goroutines of the bubble are blocked.
func (s *server) log() []string {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.batches...)
}

// landed lets n batches be answered.
func (s *server) landed(n int) {
	for range n {
		s.land <- struct{}{}
	}
	synctest.Wait()
}

// outcome is the result of a call, and how long it took.
type outcome struct {
	answer string
	err    error
	sent   bool
	after  time.Duration
}

// do makes a call.
func do(ctx context.Context, q *queue, query string) outcome {
	start := time.Now()
	c := q.Get()
	defer q.Put(c)
	c.Query = query
	if err := q.Do(ctx, c); err != nil {
		return outcome{err: err, sent: c.Sent(), after: time.Since(start)}
	}
	return outcome{answer: c.Answer, sent: c.Sent(), after: time.Since(start)}
}

// send makes a call in another goroutine, and returns when the call waits or has its outcome.
func send(ctx context.Context, q *queue, query string) <-chan outcome {
	out := make(chan outcome, 1)
	go func() { out <- do(ctx, q, query) }()
	synctest.Wait()
	return out
}

// inBubble runs a test in a bubble, with a queue and its server. No test but those of Close closes the queue: the bubble
// reports a goroutine that outlives the test, so all the other tests check that an idle queue has none.
func inBubble(t *testing.T, o batch.Options, test func(t *testing.T, q *queue, s *server)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		if o.Timeout == 0 {
			o.Timeout = time.Second
		}
		s := &server{land: make(chan struct{})}
		test(t, batch.New(o, s.run), s)
	})
}

func TestTheFirstCallIsSentAloneAndOthersShare(t *testing.T) {
	inBubble(t, batch.Options{InFlight: 1}, func(t *testing.T, q *queue, s *server) {
		first := send(t.Context(), q, "a")
		require.Equal(t, []string{"a"}, s.log())
		var others []<-chan outcome
		for _, query := range []string{"b", "c", "b", "d"} {
			others = append(others, send(t.Context(), q, query))
		}
		require.Equal(t, []string{"a"}, s.log())
		s.landed(1)
		require.Equal(t, outcome{answer: "A", sent: true}, <-first)
		require.Equal(t, []string{"a", "b c b d"}, s.log(), "in the order of arrival, also those that are equal")
		close(s.land)
		for i, answer := range []string{"B", "C", "B", "D"} {
			assert.Equal(t, outcome{answer: answer, sent: true}, <-others[i])
		}
		assert.Equal(t, outcome{answer: "E", sent: true}, do(t.Context(), q, "e"), "without any wait")
	})
}

func TestByDefaultTwoBatchesOf128AreInFlight(t *testing.T) {
	inBubble(t, batch.Options{}, func(t *testing.T, q *queue, s *server) {
		for i := range 2 + 128 + 1 {
			send(t.Context(), q, fmt.Sprint(i))
		}
		require.Equal(t, []string{"0", "1"}, s.log())
		s.landed(2)
		batches := s.log()
		require.Len(t, batches, 4)
		next := batches[2:] // both are in flight, in either order
		slices.SortFunc(next, func(a, b string) int { return len(b) - len(a) })
		assert.Len(t, strings.Fields(next[0]), 128)
		assert.Equal(t, "130", next[1])
		close(s.land)
	})
}

func TestOneBatchOfOneCallServesInTheOrderOfArrival(t *testing.T) {
	inBubble(t, batch.Options{InFlight: 1, Size: 1}, func(t *testing.T, q *queue, s *server) {
		var want []string
		for i := range 100 {
			want = append(want, fmt.Sprint(i))
			send(t.Context(), q, want[i])
		}
		close(s.land)
		assert.Equal(t, want, s.log())
	})
}

func TestACallWhoseContextIsDoneIsNotSent(t *testing.T) {
	inBubble(t, batch.Options{}, func(t *testing.T, q *queue, s *server) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		assert.Equal(t, outcome{err: context.Canceled}, do(ctx, q, "a"))
		assert.Empty(t, s.log())
		assert.NoError(t, q.Close(t.Context()))
		assert.Equal(t, outcome{err: context.Canceled}, do(ctx, q, "a"), "also by a closed queue")
	})
}

func TestACallerThatLeavesTheQueueIsNeverSentAndTakesNoPlace(t *testing.T) {
	inBubble(t, batch.Options{InFlight: 1, Size: 2}, func(t *testing.T, q *queue, s *server) {
		send(t.Context(), q, "a")
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		var leave []<-chan outcome
		for _, query := range []string{"x", "b", "y", "z", "c", "d"} {
			if query < "x" {
				send(t.Context(), q, query)
			} else {
				leave = append(leave, send(ctx, q, query))
			}
		}
		for _, out := range leave {
			assert.Equal(t, outcome{err: context.DeadlineExceeded, after: 100 * time.Millisecond}, <-out)
		}
		close(s.land)
		assert.Equal(t, []string{"a", "b c", "d"}, s.log())
	})
}

func TestACallerThatLeavesABatchDisturbsNobody(t *testing.T) {
	inBubble(t, batch.Options{InFlight: 1}, func(t *testing.T, q *queue, s *server) {
		send(t.Context(), q, "a")
		ctx, cancel := context.WithCancel(t.Context())
		before, left, after := send(t.Context(), q, "b"), send(ctx, q, "x"), send(t.Context(), q, "c")
		s.landed(1)
		require.Equal(t, []string{"a", "b x c"}, s.log())
		cancel()
		require.Equal(t, outcome{err: context.Canceled, sent: true}, <-left)
		others := make([]*call, 100)
		for i := range others {
			others[i] = q.Get()
		}
		close(s.land)
		assert.Equal(t, outcome{answer: "B", sent: true}, <-before)
		assert.Equal(t, outcome{answer: "C", sent: true}, <-after)
		for _, c := range others {
			assert.Empty(t, c.Answer, "the call that left is not used again")
		}
	})
}

// unnoticed is a context whose end is noticed later than anything else, as may happen on a busy machine.
type unnoticed struct{ context.Context }

func (unnoticed) Done() <-chan struct{} { return nil }

func TestACallerWhoseContextHasEndedIsToldSo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for name, run := range map[string]func(context.Context, []*call){
			"the batch fails as well": func(_ context.Context, calls []*call) {
				<-time.After(500 * time.Millisecond)
				calls[0].Err = fmt.Errorf("%w: i/o timeout", storage.ErrUnavailable)
			},
			"the batch takes too long as well": func(context.Context, []*call) { <-time.After(2 * time.Second) },
		} {
			q := batch.New(batch.Options{Timeout: time.Second}, run)
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			c := q.Get()
			assert.ErrorIs(t, q.Do(unnoticed{ctx}, c), context.DeadlineExceeded, name)
			assert.True(t, c.Sent(), name)
			q.Put(c)
			cancel()
			<-time.After(2 * time.Second)
			assert.NoError(t, q.Close(t.Context()))
		}
	})
}

func TestAnAnswerThatIsThereCountsEvenWhenTheCallerWouldLeave(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for range 100 {
			ctx, cancel := context.WithCancel(t.Context())
			q := batch.New(batch.Options{Timeout: time.Second}, func(_ context.Context, calls []*call) {
				calls[0].Answer = "there"
			})
			landed := &ending{Context: ctx, end: func() { cancel(); synctest.Wait() }}
			assert.Equal(t, "there", do(landed, q, "a").answer)
		}
	})
}

// ending is a context that ends at the moment when a caller begins to wait for it. Its call is in the queue by then.
type ending struct {
	context.Context
	end func()
}

func (e *ending) Done() <-chan struct{} {
	e.end()
	return e.Context.Done()
}

func TestNoCallWaitsLongerThanTheTimeoutInLineAndBatch(t *testing.T) {
	inBubble(t, batch.Options{InFlight: 1}, func(t *testing.T, q *queue, s *server) {
		flying := send(t.Context(), q, "a")
		<-time.After(300 * time.Millisecond)
		both := send(t.Context(), q, "b")
		<-time.After(300 * time.Millisecond)
		s.landed(1)
		require.Equal(t, outcome{answer: "A", sent: true, after: 600 * time.Millisecond}, <-flying)
		inLine := send(t.Context(), q, "c")
		assert.Equal(t, outcome{err: batch.ErrTimeout, sent: true, after: time.Second}, <-both)
		assert.Equal(t, []string{"a", "b"}, s.log())
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		assert.Equal(t, outcome{err: context.DeadlineExceeded, after: 100 * time.Millisecond}, do(ctx, q, "d"))
		s.landed(1)
		s.landed(1)
		assert.Equal(t, outcome{answer: "C", sent: true, after: 800 * time.Millisecond}, <-inLine)
	})
}

func TestCallsThatEnterAtAnyMomentWaitForTheWholeTimeout(t *testing.T) {
	inBubble(t, batch.Options{InFlight: 1}, func(t *testing.T, q *queue, s *server) {
		first := send(t.Context(), q, "first")
		var all []<-chan outcome
		for range 40 { // for four times half of the timeout, after which an alarm rings
			<-time.After(50 * time.Millisecond)
			all = append(all, send(t.Context(), q, "a"))
		}
		assert.Equal(t, outcome{err: batch.ErrTimeout, sent: true, after: time.Second}, <-first)
		for i, one := range all {
			assert.Equal(t, time.Second, (<-one).after, i)
		}
		<-time.After(time.Hour) // no alarm is left
		late := send(t.Context(), q, "late")
		<-time.After(750 * time.Millisecond)
		close(s.land)
		assert.Equal(t, outcome{answer: "LATE", sent: true, after: 750 * time.Millisecond}, <-late)
	})
}

func TestACallThatTimesOutInLineWasNotSent(t *testing.T) {
	inBubble(t, batch.Options{InFlight: 1}, func(t *testing.T, q *queue, s *server) {
		stuck(t, q, 17)
		assert.Equal(t, outcome{err: batch.ErrTimeout, after: time.Second}, do(t.Context(), q, "a"))
		close(s.land)
		assert.Len(t, s.log(), 17)
	})
}

// stuck sends calls one after another whose batches are not answered, until the given number of batches is in flight.
func stuck(t *testing.T, q *queue, batches int) {
	t.Helper()
	for i := range batches {
		out := <-send(t.Context(), q, fmt.Sprint("stuck ", i))
		require.Equal(t, outcome{err: batch.ErrTimeout, sent: true, after: time.Second}, out)
	}
}

func TestABatchThatIsStuckGivesItsPlaceToOthers(t *testing.T) {
	inBubble(t, batch.Options{InFlight: 1}, func(t *testing.T, q *queue, s *server) {
		send(t.Context(), q, "a")
		<-time.After(500 * time.Millisecond)
		s.landed(1)
		send(t.Context(), q, "stuck")
		<-time.After(999 * time.Millisecond)
		next := send(t.Context(), q, "b")
		require.Equal(t, []string{"a", "stuck"}, s.log())
		<-time.After(time.Millisecond)
		require.Equal(t, []string{"a", "stuck", "b"}, s.log(), "as soon as it is given up")
		send(t.Context(), q, "c")
		require.Equal(t, []string{"a", "stuck", "b"}, s.log(), "it gave one place and not more")
		close(s.land)
		assert.Equal(t, outcome{answer: "B", sent: true, after: time.Millisecond}, <-next)
		assert.Equal(t, []string{"a", "stuck", "b", "c"}, s.log())
	})
}

func TestAStuckBatchThatReturnsTakesNothingAlongWhileItsPlaceIsTaken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		land := map[string]chan struct{}{"stuck": make(chan struct{}), "b": make(chan struct{}), "c": make(chan struct{})}
		q := batch.New(batch.Options{InFlight: 1, Timeout: time.Second}, func(_ context.Context, calls []*call) {
			<-land[calls[0].Query]
			calls[0].Answer = "landed"
		})
		stuck := send(t.Context(), q, "stuck")
		<-time.After(time.Second)
		require.Equal(t, batch.ErrTimeout, (<-stuck).err)
		b, c := send(t.Context(), q, "b"), send(t.Context(), q, "c")
		close(land["c"])
		close(land["stuck"])
		synctest.Wait()
		require.Empty(t, c, "b is in flight, and one batch at a time is allowed again")
		close(land["b"])
		assert.Equal(t, "landed", (<-b).answer)
		assert.Equal(t, "landed", (<-c).answer)
	})
}

func TestABatchThatLandsAsItIsGivenUpGivesNoPlace(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		land := make(chan struct{})
		var others atomic.Int32
		q := batch.New(batch.Options{InFlight: 1, Size: 1, Timeout: time.Second}, func(_ context.Context, calls []*call) {
			if calls[0].Query == "in the last moment" {
				<-time.After(time.Second)
				return
			}
			others.Add(1)
			<-land
			others.Add(-1)
		})
		for i := range 400 { // often, because the timer and the answer come at the same moment, in either order
			send(t.Context(), q, "in the last moment")
			if i%2 == 0 { // otherwise the queue is idle after it
				<-time.After(time.Millisecond)
				send(t.Context(), q, "it takes this along")
			}
			<-time.After(time.Second - time.Duration((i+1)%2)*time.Millisecond)
			send(t.Context(), q, "next")
			send(t.Context(), q, "next")
			require.EqualValues(t, 1, others.Load())
			for range 3 - i%2 {
				land <- struct{}{}
			}
			synctest.Wait()
		}
	})
}

func TestNoMoreThanSixteenStuckBatchesGiveTheirPlaces(t *testing.T) {
	inBubble(t, batch.Options{InFlight: 1}, func(t *testing.T, q *queue, s *server) {
		stuck(t, q, 17)
		require.Len(t, s.log(), 17)
		out := send(t.Context(), q, "waits")
		require.Len(t, s.log(), 17)
		s.landed(1)
		require.Equal(t, "waits", s.log()[17], "one that returns makes room")
		send(t.Context(), q, "next")
		require.Len(t, s.log(), 18)
		s.landed(17)
		assert.Equal(t, outcome{answer: "WAITS", sent: true}, <-out)
		assert.Equal(t, "next", s.log()[18])
		one := send(t.Context(), q, "and again one at a time")
		require.Len(t, s.log(), 19)
		close(s.land)
		assert.NoError(t, (<-one).err)
	})
}

func TestTheContextOfABatchEndsAfterTheTimeoutAndWhenRunReturns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		contexts := make(chan context.Context, 1)
		q := batch.New(batch.Options{Timeout: time.Second}, func(ctx context.Context, calls []*call) {
			contexts <- ctx
			if calls[0].Query == "stuck" {
				<-ctx.Done()
			}
		})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		start := time.Now()
		send(ctx, q, "stuck")
		flown := <-contexts
		deadline, _ := flown.Deadline()
		assert.Equal(t, time.Second, deadline.Sub(start))
		cancel()
		synctest.Wait()
		assert.NoError(t, flown.Err(), "the batch goes on without its callers")
		<-time.After(time.Second)
		synctest.Wait()
		assert.Equal(t, context.DeadlineExceeded, flown.Err())

		require.NoError(t, do(t.Context(), q, "a").err)
		synctest.Wait()
		assert.Equal(t, context.Canceled, (<-contexts).Err())
	})
}

func TestTheErrorsOfRunAreReturnedAndWhatItForgetsIsZero(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		broken, land := errors.New("broken"), make(chan struct{})
		q := batch.New(batch.Options{InFlight: 1, Timeout: time.Second}, func(_ context.Context, calls []*call) {
			<-land
			for _, c := range calls {
				switch c.Query {
				case "err":
					c.Answer, c.Err = "half", broken
				case "answer":
					c.Answer = "whole"
				}
			}
		})
		for range 3 { // more than once, so that calls of the pool are used again
			var out []<-chan outcome
			for _, query := range []string{"first", "err", "answer", "forget"} {
				out = append(out, send(t.Context(), q, query))
			}
			land <- struct{}{}
			land <- struct{}{}
			assert.Equal(t, outcome{sent: true}, <-out[0])
			assert.Equal(t, outcome{sent: true, err: broken}, <-out[1])
			assert.Equal(t, outcome{sent: true, answer: "whole"}, <-out[2])
			assert.Equal(t, outcome{sent: true}, <-out[3])
		}
	})
}

func TestARunThatPanicsAnswersItsBatchAndTheQueueGoesOn(t *testing.T) {
	for name, end := range map[string]func(){
		"the teapot broke": func() { panic("the teapot broke") },
		"runtime.Goexit":   runtime.Goexit,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				known, land := errors.New("known"), make(chan struct{})
				q := batch.New(batch.Options{InFlight: 1, Size: 2, Timeout: time.Second}, func(_ context.Context, calls []*call) {
					<-land
					if calls[0].Query == "known" {
						calls[0].Err = known
						end()
					}
					for _, c := range calls {
						c.Answer = strings.ToUpper(c.Query)
					}
				})
				var out []<-chan outcome
				for _, query := range []string{"a", "known", "unknown", "b"} {
					out = append(out, send(t.Context(), q, query))
				}
				close(land)
				assert.Equal(t, outcome{sent: true, answer: "A"}, <-out[0])
				assert.Equal(t, outcome{sent: true, err: known}, <-out[1])
				unknown := <-out[2]
				assert.True(t, unknown.sent)
				assert.ErrorContains(t, unknown.err, name)
				assert.ErrorContains(t, unknown.err, "batch_test.go:", "the stack")
				assert.Equal(t, outcome{sent: true, answer: "B"}, <-out[3])
				synctest.Wait()

				require.Equal(t, known, do(t.Context(), q, "known").err, "with nobody in the queue, too")
				assert.Equal(t, "C", do(t.Context(), q, "c").answer)
			})
		})
	}
}

func TestCloseEndsTheQueueAndWaitsForTheBatchesInFlight(t *testing.T) {
	inBubble(t, batch.Options{InFlight: 1}, func(t *testing.T, q *queue, s *server) {
		flying := send(t.Context(), q, "a")
		inLine := []<-chan outcome{send(t.Context(), q, "b"), send(t.Context(), q, "c")}
		closed := make(chan error)
		for range 3 {
			go func() { closed <- q.Close(t.Context()) }()
		}
		for _, out := range inLine {
			assert.Equal(t, outcome{err: storage.ErrClosed}, <-out)
		}
		assert.Equal(t, outcome{err: storage.ErrClosed}, do(t.Context(), q, "d"))
		synctest.Wait()
		assert.Empty(t, closed)
		s.land <- struct{}{}
		assert.Equal(t, outcome{answer: "A", sent: true}, <-flying)
		for range 3 {
			assert.NoError(t, <-closed)
		}
		assert.NoError(t, q.Close(t.Context()))
		assert.Equal(t, outcome{err: storage.ErrClosed}, do(t.Context(), q, "d"))
		assert.Equal(t, []string{"a"}, s.log())
	})
}

func TestCloseWaitsNoLongerThanTheTimeout(t *testing.T) {
	inBubble(t, batch.Options{}, func(t *testing.T, q *queue, s *server) {
		q2 := batch.New(batch.Options{Timeout: time.Second}, s.run)
		start := time.Now()
		assert.NoError(t, q2.Close(t.Context()))
		assert.Zero(t, time.Since(start), "a queue that never flew")

		stuck(t, q, 5)
		start = time.Now()
		assert.NoError(t, q.Close(t.Context()))
		assert.Equal(t, time.Second, time.Since(start))
		close(s.land)
		synctest.Wait()
		start = time.Now()
		assert.NoError(t, q.Close(t.Context()))
		assert.Zero(t, time.Since(start))
	})
}

func TestACallRunsInlineWhenABatchMayStart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		caller, land := make(chan string, 1), make(chan struct{})
		run := func(ctx context.Context, calls []*call) {
			caller <- string(debug.Stack())
			select {
			case <-land:
			case <-ctx.Done():
			}
			for _, c := range calls {
				if c.Answer, c.Err = strings.ToUpper(c.Query), ctx.Err(); c.Query == "panic" {
					panic("inline")
				}
			}
		}
		q := batch.New(batch.Options{InFlight: 1, Timeout: time.Second}, run)
		doInline := func(query string) outcome {
			start, c := time.Now(), q.Get()
			defer q.Put(c)
			c.Query = query
			err := q.DoInline(context.Background(), c, run)
			return outcome{answer: c.Answer, err: err, sent: c.Sent(), after: time.Since(start)}
		}
		sendInline := func(query string) <-chan outcome {
			out := make(chan outcome, 1)
			go func() { out <- doInline(query) }()
			synctest.Wait()
			return out
		}
		inline := func() bool { return strings.Contains(<-caller, "DoInline") }
		one := sendInline("a")
		assert.True(t, inline())
		two, three := sendInline("b"), send(t.Context(), q, "c")
		land <- struct{}{}
		assert.Equal(t, outcome{answer: "A", sent: true}, <-one, "the others do not hold it up")
		assert.False(t, inline(), "they share a batch")
		land <- struct{}{}
		assert.Equal(t, "B", (<-two).answer)
		assert.Equal(t, "C", (<-three).answer)
		synctest.Wait()

		stuck := sendInline("e")
		assert.True(t, inline())
		assert.Equal(t, outcome{answer: "E", err: context.DeadlineExceeded, sent: true, after: time.Second}, <-stuck)
		panics := sendInline("panic")
		assert.True(t, inline())
		land <- struct{}{}
		assert.ErrorContains(t, (<-panics).err, "inline")
		assert.NoError(t, q.Close(t.Context()))
		assert.Equal(t, storage.ErrClosed, doInline("f").err)
	})
}

func TestCloseEndsWithItsContext(t *testing.T) {
	inBubble(t, batch.Options{}, func(t *testing.T, q *queue, s *server) {
		out := send(t.Context(), q, "a")
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		start := time.Now()
		assert.Equal(t, context.DeadlineExceeded, q.Close(ctx))
		assert.Equal(t, 100*time.Millisecond, time.Since(start))
		close(s.land)
		assert.Equal(t, "A", (<-out).answer, "what was sent is answered all the same")
		synctest.Wait()
		for range 100 {
			require.NoError(t, q.Close(ctx), "nothing is left")
		}
	})
}

func TestCloseDuringLoadLosesNoCall(t *testing.T) {
	t.Parallel()
	for range 20 {
		var running, answered atomic.Int64
		q := batch.New(batch.Options{Timeout: time.Minute}, func(_ context.Context, calls []*call) {
			running.Add(1)
			defer running.Add(-1)
			runtime.Gosched()
			for _, c := range calls {
				c.Answer = c.Query
			}
		})
		var callers sync.WaitGroup
		for i := range 50 {
			callers.Go(func() {
				for {
					out := do(t.Context(), q, fmt.Sprint(i))
					if out.err != nil {
						assert.Equal(t, storage.ErrClosed, out.err)
						assert.False(t, out.sent)
						return
					}
					assert.Equal(t, fmt.Sprint(i), out.answer)
					answered.Add(1)
				}
			})
		}
		for answered.Load() < 500 {
			runtime.Gosched()
		}
		assert.NoError(t, q.Close(t.Context()))
		assert.Zero(t, running.Load())
		callers.Wait()
	}
}

func TestEveryCallIsAnsweredOnceOrItsCallerLeft(t *testing.T) {
	t.Parallel()
	const size, timeout = 16, 2 * time.Millisecond
	t.Run("in a bubble", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) { storm(t, batch.Options{Size: size, Timeout: timeout}) })
	})
	t.Run("in real time", func(t *testing.T) {
		t.Parallel()
		storm(t, batch.Options{Size: size, Timeout: timeout})
	})
}

// storm lets 1,000 callers, which leave at random, use a server that is slow, gets stuck or panics at random. A call
// must be executed at most once, and never if it was not sent.
func storm(t *testing.T, o batch.Options) {
	t.Helper()
	const callers = 1000
	broken := errors.New("broken")
	var executed [callers]atomic.Int32
	q := batch.New(o, func(_ context.Context, calls []*batch.Call[int, int]) {
		assert.LessOrEqual(t, len(calls), o.Size)
		switch d := rand.N(200 * time.Microsecond); rand.N(50) {
		case 0:
			<-time.After(20 * d) // up to twice the timeout
		default:
			<-time.After(d)
		}
		last := -1
		if rand.N(20) == 0 {
			last = rand.N(len(calls))
		}
		for i, c := range calls {
			if i == last {
				panic(broken)
			}
			executed[c.Query].Add(1)
			c.Answer = -c.Query
		}
	})
	type result struct {
		answer int
		err    error
		sent   bool
	}
	var results [callers]result
	var all sync.WaitGroup
	for i := range callers {
		all.Go(func() {
			<-time.After(rand.N(10 * time.Millisecond))
			ctx, cancel := context.WithTimeout(t.Context(), rand.N(3*time.Millisecond))
			defer cancel()
			c := q.Get()
			defer q.Put(c)
			c.Query = i
			if err := q.Do(ctx, c); err != nil {
				results[i] = result{err: err, sent: c.Sent()}
				return
			}
			results[i] = result{answer: c.Answer, sent: c.Sent()}
		})
	}
	all.Wait()
	assert.NoError(t, q.Close(t.Context()))
	<-time.After(10 * time.Millisecond) // until the stuck batches have ended too
	counts := map[string]int{}
	for i, r := range results {
		n := executed[i].Load()
		switch {
		case r.err == nil:
			counts["answered"]++
			assert.Equal(t, result{answer: -i, sent: true}, r)
			assert.EqualValues(t, 1, n)
		case !r.sent:
			counts["left the queue"]++
			assert.Zero(t, n, "call %d was not sent: %v", i, r.err)
		case strings.Contains(r.err.Error(), broken.Error()):
			counts["panicked"]++
			assert.LessOrEqual(t, n, int32(1))
		default:
			counts["left the batch"]++
			assert.LessOrEqual(t, n, int32(1))
			assert.Contains(t, []error{context.DeadlineExceeded, batch.ErrTimeout}, r.err)
		}
	}
	t.Log(counts)
}

// This test measures memory, so it is not parallel.
func TestCallersWhoLeaveTheQueueOfAStuckQueueTakeNoMemory(t *testing.T) {
	land := make(chan struct{})
	type large [1 << 14]byte
	q := batch.New(batch.Options{InFlight: 1, Timeout: time.Minute}, func(context.Context, []*batch.Call[large, int]) { <-land })
	do := func(ctx context.Context) {
		c := q.Get()
		defer q.Put(c)
		assert.ErrorIs(t, q.Do(ctx, c), context.Canceled)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var callers sync.WaitGroup
	callers.Go(func() { do(ctx) })
	before := heap()
	for range 5000 { // 80 MB
		ctx, cancel := context.WithCancel(t.Context())
		do(&ending{Context: ctx, end: cancel})
	}
	assert.Less(t, heap()-before, int64(8<<20))
	cancel()
	callers.Wait()
	close(land)
	assert.NoError(t, q.Close(t.Context()))
}

// heap returns the size of the live heap in bytes.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// This test counts allocations, so it is not parallel.
func TestACallAllocatesNothingButTheContextOfItsBatch(t *testing.T) {
	ofContext := testing.AllocsPerRun(1000, func() {
		_, cancel := context.WithDeadline(context.Background(), time.Now().Add(time.Minute))
		cancel()
	})
	q := batch.New(batch.Options{Timeout: time.Minute}, func(_ context.Context, calls []*batch.Call[query, answer]) { echo(calls) })
	sequential := testing.AllocsPerRun(1000, func() {
		assert.NoError(t, ask(t.Context(), q, 1))
	})
	assert.NoError(t, q.Close(t.Context()))
	info, _ := debug.ReadBuildInfo()
	if slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		ofContext++ // with the race detector a sync.Pool drops a quarter of what is put into it
	}
	assert.LessOrEqual(t, sequential, ofContext)
}

func TestAQueueWithoutATimeoutIsRefused(t *testing.T) {
	t.Parallel()
	for _, timeout := range []time.Duration{0, -time.Second} {
		assert.PanicsWithValue(t, fmt.Sprintf("batch: Options.Timeout is %v and must be above zero", timeout), func() {
			batch.New(batch.Options{Timeout: timeout}, func(context.Context, []*call) {})
		})
	}
}
