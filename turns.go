// The callers that hold a reservation and wait until it is due.

package throttler

import (
	"container/list"
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/go-throttler/throttler/storage"
)

// turns holds the waiters of one line with equal reservations: the same costs from the same buckets. No waiter owns a
// particular reservation. The first waiter takes the reservation that is due first, and a waiter that leaves gives up the one
// that is due last. So the waiters behind it move up, and no reserved token is wasted. The line's mutex guards all fields.
type turns struct {
	l   *line
	key string

	waiting list.List  // of *waiter, in the order of their arrival
	due     []*Verdict // the reservations, earliest first
	over    bool       // the reservations are void; all waiters have to ask again

	left    int    // waiters that have left while their reservations are still in due
	mark    uint64 // resets.ended when the last of them left
	flushes bool   // a caller has undertaken to flush, which gives these back
}

// reserved adds a waiter and its reservation to the turns of its shape. It does nothing and returns false if one of the
// identifiers was reset since the number of Resets was mark.
func (ws *waiters) reserved(w *waiter, v *Verdict, mark uint64) bool {
	l, key := w.home, shape(v)
	l.mu.Lock()
	defer l.mu.Unlock()
	if ws.resets.since(mark, v.parts()) { // under the lock: a Reset from here on makes the turns void
		return false
	}
	s := l.turns[key]
	if s == nil {
		s = &turns{l: l, key: key}
		if l.turns == nil {
			l.turns = make(map[string]*turns)
		}
		l.turns[key] = s
	}
	w.turns, w.inTurns = s, s.waiting.PushBack(w)
	i := len(s.due)
	for i > 0 && dueAt(s.due[i-1]) > dueAt(v) {
		i--
	}
	due := *v
	s.due = slices.Insert(s.due, i, &due)
	if i == 0 {
		s.callFirst() // the first waiter may have to wake up earlier
	}
	return true
}

// shape returns a string that is equal for verdicts whose reservations are interchangeable.
func shape(v *Verdict) string {
	var key strings.Builder
	for _, p := range v.parts() {
		fmt.Fprintf(&key, "%q %p ", p.Identifier, p.Rules)
	}
	fmt.Fprint(&key, v.asked())
	return key.String()
}

// dueAt returns when a reservation may be used.
func dueAt(v *Verdict) int64 { return v.at + v.Delay.Microseconds() }

// first returns when the next reservation is due if w is the first waiter. Otherwise it returns never.
func (s *turns) first(w *waiter) (at int64) {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	if s.over || s.waiting.Front() != w.inTurns {
		return never
	}
	return dueAt(s.due[0])
}

// void reports whether the reservations are void.
func (s *turns) void() bool {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	return s.over
}

// last returns when the last reservation is due, or 0 if there is none.
func (s *turns) last() int64 {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	if n := len(s.due); n > 0 {
		return dueAt(s.due[n-1])
	}
	return 0
}

// take removes the first waiter and returns the reservation that is due first. It returns nil if all have to ask again.
func (s *turns) take(w *waiter) *Verdict {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	if s.over {
		return nil
	}
	first := s.due[0]
	s.due[0] = nil // or the array would keep it in memory
	s.due = s.due[1:]
	s.remove(w)
	return first
}

// quit removes a waiter that gives up its turn. It reports whether the waiter has to flush: of a crowd that leaves, one waiter
// does that for all. The caller holds the mutex.
func (s *turns) quit(w *waiter) (flush bool) {
	if s.over {
		return false
	}
	s.left++
	s.remove(w)
	flush, s.flushes = !s.flushes, true
	return flush
}

// remove removes a waiter, and wakes the next one if it was the first. The caller holds the mutex.
func (s *turns) remove(w *waiter) {
	first := s.waiting.Front() == w.inTurns
	s.waiting.Remove(w.inTurns)
	w.turns = nil
	if first {
		s.callFirst()
	}
	s.forget()
}

// forget removes the turns from the line if there are neither waiters nor reservations to give back.
func (s *turns) forget() {
	if s.waiting.Len() == 0 && s.left == 0 && s.l.turns[s.key] == s {
		delete(s.l.turns, s.key)
	}
}

// callFirst wakes the first waiter, so that it looks again when the next reservation is due.
func (s *turns) callFirst() {
	if first := s.waiting.Front(); first != nil {
		first.Value.(*waiter).tell(freed)
	}
}

// left removes one reservation for each waiter that has left, those due last. They amount to n times what v took. If n is 0,
// there was nothing more to give back, and the flush has ended.
func (ws *waiters) left(s *turns) (v *Verdict, n int) {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	if s.waiting.Len() == 0 && s.left > 0 && !s.over && ws.resets.since(s.mark, s.due[0].parts()) {
		s.over = true // a Reset of another identifier of WaitAll finds these turns by their waiters only
		delete(s.l.turns, s.key)
	}
	if s.left > 0 && !s.over {
		rest := len(s.due) - s.left
		v, n = s.due[len(s.due)-1], s.left
		clear(s.due[rest:])
		s.due, s.left = s.due[:rest], 0
	}
	s.flushes = n > 0
	s.forget()
	ws.close(s.l)
	return v, n
}

// end makes the reservations void. They amount to n times what v took. It also returns all waiters, which the caller has to
// notify. If another caller has ended the turns already, n is 0.
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
	return s.due[len(s.due)-1], len(s.due), all
}

// due sleeps until it is the waiter's turn, and sets v to the reservation that it takes. It returns again if the waiter has to
// ask again: the buckets were changed, or a Reset has voided the reservations. Once a second the first waiter checks what
// other processes did, on behalf of all.
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
			t.end(ctx, s, w, news >= changed)
			return true, nil
		case news == nothing && until == at:
			if turn := s.take(w); turn != nil {
				*v = *turn
				v.Delay = 0 // it has passed
				return false, nil
			}
		}
	}
}

// forgotten reports whether the storage counts fewer tokens as spent than are reserved here. Then another process has called
// Reset, or has given back so many that there are tokens now. In either case the reservations are not given back: after a
// Reset, that would free tokens which other callers have taken since.
//
// The time of the reservations cannot be compared with that of other buckets. Those of the call have changed if the share of
// an elastic one has: with a larger refill, the same tokens are back earlier.
//
// The Peek ends at the time at, when the turn of w is due, since a slow storage must not delay that.
func (t *Throttler) forgotten(ctx context.Context, w *waiter, at int64, parts []Part) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(at-t.micros())*time.Microsecond)
	defer cancel()
	var now Verdict
	if err := t.decideAll(ctx, &now, storage.Peek, 0, w.again(), parts); err != nil || now.degraded {
		return false // the storage failed, or AddBucket made the call invalid, and that arrives as news
	}
	longest := int64(0)
	for _, c := range now.all() {
		longest = max(longest, c.ResetAfter)
	}
	return now.Allowed || shape(&now) == w.turns.key && longest < w.turns.last()-now.at
}

// end makes all waiters of s ask again, and gives back their reservations if give is set. It holds giving meanwhile, so nobody
// reserves again before the tokens are free. If the reservations are void already, it does nothing.
func (t *Throttler) end(ctx context.Context, s *turns, w *waiter, give bool) {
	if s.void() {
		return
	}
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

// never is later than any time that an injected clock may return.
const never = int64(1)<<53 - 1

// leave ends the waiting of a call. If many leave at the same time, one of them gives back the reservations of all in one call
// to the storage. It yields first, so that the others have left by then; otherwise each would make a call of its own.
func (t *Throttler) leave(ctx context.Context, w *waiter) {
	s := t.waiters.exit(w)
	for more := s != nil; more; {
		runtime.Gosched()
		more = t.flush(ctx, s)
	}
}

// flush gives back the reservations of waiters that have left. It reports whether there were any.
func (t *Throttler) flush(ctx context.Context, s *turns) bool {
	s.l.giving.Lock()
	defer s.l.giving.Unlock()
	v, n := t.waiters.left(s)
	if n > 0 {
		t.giveBack(ctx, v, int64(n))
	}
	return n > 0
}

// giveBack gives back n times what v took, even if the context has ended. Errors are ignored: the tokens are then refilled as if
// they had been used. From a Reset on nothing is given back, since the storage may have forgotten v already.
func (t *Throttler) giveBack(ctx context.Context, v *Verdict, n int64) {
	mark := t.waiters.resets.ended.Load()
	ctx = context.WithoutCancel(ctx)
	charges, err := t.refunds(v, nil)
	if err != nil {
		return
	}
	for _, c := range charges {
		if t.waiters.resets.runs(v.parts()) || t.waiters.resets.since(mark, v.parts()) {
			return
		}
		for i := range c.Amounts {
			c.Amounts[i].N *= n
		}
		_ = t.change(ctx, v, &c)
	}
}

// denied turns a reservation into a denial, after its tokens were given back: its Delay becomes the RetryAfter.
func denied(v *Verdict) { v.Allowed, v.RetryAfter, v.Delay = false, v.Delay, 0 }
