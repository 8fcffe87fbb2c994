// The callers that have reserved and wait until they may act.

package throttler

import (
	"container/list"
	"context"
	"fmt"
	"runtime"
	"strings"
	"time"

	"github.com/go-throttler/throttler/storage"
)

// turns are waiters of one line with equal reservations: the same costs from the same buckets. Nobody owns a particular
// reservation. The first waiter takes the one that is due first, and one that leaves gives up the one that is due last. So
// those behind a waiter that leaves move up, and no reserved token is wasted. The line's mutex guards all fields.
type turns struct {
	l   *line
	key string

	waiting list.List // of *waiter, in the order of their arrival
	due     list.List // of *Verdict, the reservations, by when they are due
	over    bool      // the reservations are void: all have to ask again

	left    int  // waiters that have left, but whose reservations are still in due
	flushes bool // a caller of flush is going to give them back
}

// reserved puts a waiter and its reservation among the equal ones.
func (w *waiter) reserved(v *Verdict) {
	l, key := w.lines[0], shape(v)
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.turns[key]
	if s == nil {
		s = &turns{l: l, key: key}
		if l.turns == nil {
			l.turns = make(map[string]*turns)
		}
		l.turns[key] = s
	}
	w.turns, w.inTurns = s, s.waiting.PushBack(w)
	before := s.due.Back()
	for before != nil && dueAt(before.Value.(*Verdict)) > dueAt(v) {
		before = before.Prev()
	}
	due := *v
	if before == nil {
		s.due.PushFront(&due)
		s.callFirst() // it may have to wake up earlier
	} else {
		s.due.InsertAfter(&due, before)
	}
}

// shape is equal for verdicts whose reservations may be exchanged.
func shape(v *Verdict) string {
	var key strings.Builder
	for _, p := range v.parts() {
		fmt.Fprintf(&key, "%q %p ", p.Identifier, p.Rules)
	}
	fmt.Fprint(&key, v.asked())
	return key.String()
}

// dueAt is when a reservation may be used.
func dueAt(v *Verdict) int64 { return v.at + v.Delay.Microseconds() }

// first is when the next reservation is due if w is the first waiter, else never.
func (s *turns) first(w *waiter) (at int64) {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	if s.over || s.waiting.Front() != w.inTurns {
		return never
	}
	return dueAt(s.due.Front().Value.(*Verdict))
}

// last is when the last reservation is due; 0 if there is none.
func (s *turns) last() int64 {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	if last := s.due.Back(); last != nil {
		return dueAt(last.Value.(*Verdict))
	}
	return 0
}

// take gives the first waiter the reservation that is due. It returns nil if all have to ask again.
func (s *turns) take(w *waiter) *Verdict {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	if s.over {
		return nil
	}
	s.remove(w)
	return s.due.Remove(s.due.Front()).(*Verdict)
}

// quit takes out a waiter that leaves without a reservation. It reports whether the waiter has to flush, which one of a crowd
// does for all. The caller holds the mutex.
func (s *turns) quit(w *waiter) (flush bool) {
	if s.over {
		return false
	}
	s.left++
	s.remove(w)
	flush, s.flushes = !s.flushes, true
	return flush
}

// remove takes out a waiter, and wakes the next one if it was the first.
func (s *turns) remove(w *waiter) {
	first := s.waiting.Front() == w.inTurns
	s.waiting.Remove(w.inTurns)
	w.turns = nil
	if first {
		s.callFirst()
	}
	s.forget()
}

// forget removes turns without waiters and reservations from the line.
func (s *turns) forget() {
	if s.waiting.Len() == 0 && s.left == 0 && s.l.turns[s.key] == s {
		delete(s.l.turns, s.key)
	}
}

// callFirst wakes the first waiter, to look when the next reservation is due.
func (s *turns) callFirst() {
	if first := s.waiting.Front(); first != nil {
		first.Value.(*waiter).tell(freed)
	}
}

// left takes out the reservations of those who have left, the ones that are due last: n times what v took. With n = 0 the flush
// has ended.
func (ws *waiters) left(s *turns) (v *Verdict, n int) {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	for ; s.left > 0 && !s.over; s.left-- {
		last := s.due.Remove(s.due.Back()).(*Verdict)
		if n++; v == nil {
			v = last
		}
	}
	s.flushes = n > 0
	s.forget()
	ws.close(s.l)
	return v, n
}

// end makes the reservations void. It returns them, n times what v took, and all waiters, who have to be told. If another caller
// has ended the turns already, it returns nothing.
func (s *turns) end() (v *Verdict, n int, all []*waiter) {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	if s.over {
		return nil, 0, nil
	}
	s.over = true
	if s.l.turns[s.key] == s {
		delete(s.l.turns, s.key)
	}
	for e := s.waiting.Front(); e != nil; e = e.Next() {
		all = append(all, e.Value.(*waiter))
	}
	return s.due.Back().Value.(*Verdict), s.due.Len(), all
}

// due sleeps until it is the waiter's turn, and then v is the reservation that it takes. All waiters have to ask again when the
// buckets were changed, and after a Reset, which has voided the reservations. Once a second the first waiter looks for what
// other processes did.
func (t *Throttler) due(ctx context.Context, w *waiter, v *Verdict, parts []Part) (again bool, err error) {
	if v.Delay == 0 {
		return false, nil
	}
	s := w.turns
	for {
		at, until := s.first(w), never
		if at != never {
			until = min(at, t.micros()+notice.Microseconds())
		}
		news, err := t.sleep(ctx, w, until)
		switch {
		case err != nil:
			denied(v)
			return false, err
		case news >= changed, news == nothing && until < at && t.forgotten(ctx, w, at, parts):
			t.end(ctx, s, w, news == changed)
			return true, nil
		case news == nothing && until == at:
			if turn := s.take(w); turn != nil {
				*v = *turn
				return false, nil
			}
		}
	}
}

// forgotten reports whether less is spent than is reserved here. Then another process has called Reset, or has given back so
// much that there are tokens now. The reservations are not given back in either case: after a Reset, that would free tokens
// which others have taken since.
//
// It looks no longer than until at, when the turn of w is due: a slow storage must not delay that.
func (t *Throttler) forgotten(ctx context.Context, w *waiter, at int64, parts []Part) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(at-t.micros())*time.Microsecond)
	defer cancel()
	var now Verdict
	if err := t.decideAll(ctx, &now, storage.Peek, 0, w.again(), parts); err != nil || now.degraded {
		return false // the storage failed, or AddBucket made the call wrong, which is told as news
	}
	longest := int64(0)
	for _, c := range now.all() {
		longest = max(longest, c.ResetAfter)
	}
	return now.Allowed || longest < w.turns.last()-now.at
}

// end makes all waiters of s ask again, and gives back their reservations if give is set. It returns when that is done, also
// by another waiter.
func (t *Throttler) end(ctx context.Context, s *turns, w *waiter, give bool) {
	s.l.giving.Lock()
	defer s.l.giving.Unlock()
	last, n, all := s.end()
	if n > 0 && give {
		t.giveBack(ctx, last, int64(n))
	}
	for _, other := range all {
		if other != w {
			other.tell(askAgain)
		}
	}
}

// never is later than any time of an injected clock.
const never = int64(1)<<53 - 1

// leave ends the waiting. One waiter gives back the reservations of all who leave at the same time, in one call. It yields
// first, so that the others of a crowd have left by then: otherwise each would make a call of its own.
func (t *Throttler) leave(ctx context.Context, w *waiter) {
	s := t.waiters.exit(w)
	for more := s != nil; more; {
		runtime.Gosched()
		more = t.flush(ctx, s)
	}
}

// flush gives back the reservations of those who have left. It reports whether there were any.
func (t *Throttler) flush(ctx context.Context, s *turns) bool {
	s.l.giving.Lock()
	defer s.l.giving.Unlock()
	v, n := t.waiters.left(s)
	if n > 0 {
		t.giveBack(ctx, v, int64(n))
	}
	return n > 0
}

// giveBack gives back n times what v took, even if the context has ended.
func (t *Throttler) giveBack(ctx context.Context, v *Verdict, n int64) {
	ctx = context.WithoutCancel(ctx)
	charges, err := t.refunds(v, nil)
	if err != nil {
		return
	}
	for _, c := range charges {
		for i := range c.Amounts {
			c.Amounts[i].N *= n
		}
		_ = t.change(ctx, v, &c)
	}
}

// denied turns a verdict into a denial, after its tokens were given back.
func denied(v *Verdict) { v.Allowed, v.RetryAfter, v.Delay = false, v.Delay, 0 }
