// Those who wait for what they have reserved.

package throttler

import (
	"container/list"
	"context"
	"fmt"
	"runtime"
	"strings"

	"github.com/go-throttler/throttler/storage"
)

// turns are the waiters of one line who have reserved alike: the same costs of the same buckets. Their reservations are not
// their own. When one is due the first waiter takes it, and a waiter that leaves gives back the one that is due last. So
// leaving holds up nobody, and nothing that was reserved is lost. The line's mutex guards it.
type turns struct {
	l   *line
	key string

	waiting list.List // of *waiter, in the order of their arrival
	due     list.List // of *Verdict, in the order of their time: as many
	over    bool      // all have to ask again

	left    int  // waiters that have left, and whose reservations are still there
	flushes bool // one of them gives those back that are due last, as many
}

// reserved puts a waiter and what it has reserved among those alike.
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
		s.callFirst() // it may have to get up earlier
	} else {
		s.due.InsertAfter(&due, before)
	}
}

// shape is equal for verdicts that may be exchanged.
func shape(v *Verdict) string {
	var key strings.Builder
	for _, p := range v.parts() {
		fmt.Fprintf(&key, "%q %p ", p.Identifier, p.Rules)
	}
	fmt.Fprint(&key, v.asked())
	return key.String()
}

// dueAt is when what was reserved may be used.
func dueAt(v *Verdict) int64 { return v.at + v.Delay.Microseconds() }

// first is when the next turn is due, if it is the waiter's; else never.
func (s *turns) first(w *waiter) (at int64) {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	if s.over || s.waiting.Front() != w.inTurns {
		return never
	}
	return dueAt(s.due.Front().Value.(*Verdict))
}

// last is when the last turn is due.
func (s *turns) last() int64 {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	if last := s.due.Back(); last != nil {
		return dueAt(last.Value.(*Verdict))
	}
	return 0
}

// take is the turn of the first waiter. It is nil if all have to ask again.
func (s *turns) take(w *waiter) *Verdict {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	if s.over {
		return nil
	}
	s.remove(w)
	return s.due.Remove(s.due.Front()).(*Verdict)
}

// quit takes out a waiter that leaves, and reports whether it has to give back what all such have left. The line is locked.
func (s *turns) quit(w *waiter) (flush bool) {
	if s.over {
		return false
	}
	s.left++
	s.remove(w)
	flush, s.flushes = !s.flushes, true
	return flush
}

// remove takes out a waiter.
func (s *turns) remove(w *waiter) {
	first := s.waiting.Front() == w.inTurns
	s.waiting.Remove(w.inTurns)
	w.turns = nil
	if first {
		s.callFirst()
	}
	s.forget()
}

// forget lets the line forget turns that nobody needs.
func (s *turns) forget() {
	if s.waiting.Len() == 0 && s.left == 0 && s.l.turns[s.key] == s {
		delete(s.l.turns, s.key)
	}
}

func (s *turns) callFirst() {
	if first := s.waiting.Front(); first != nil {
		first.Value.(*waiter).tell(freed)
	}
}

// left is what those who have left are to give back: n times what v took. None is the end of it.
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

// end makes all ask again. It returns what they had reserved, n times what v took, and those who are to be told; none if
// another has done so.
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

// due sleeps until what was reserved may be used, and takes that or another's that is alike. All have to ask again after a
// Reset, which has forgotten it, and after the buckets were changed. The first of them looks each second for what other
// processes did.
func (t *Throttler) due(ctx context.Context, w *waiter, v *Verdict, parts []Part) (again bool, err error) {
	if v.Delay == 0 {
		return false, nil
	}
	s := w.turns
	for {
		at, until := s.first(w), int64(never)
		if at != never {
			until = min(at, t.micros()+notice.Microseconds())
		}
		news, err := t.sleep(ctx, w, until)
		switch {
		case err != nil:
			denied(v)
			return false, err
		case news == askAgain:
			return true, nil
		case news >= changed, news == nothing && until < at && t.forgotten(ctx, w, s, parts):
			if t.end(ctx, s, w, news == changed) {
				return true, nil
			}
		case news == nothing && until == at:
			if turn := s.take(w); turn != nil {
				*v = *turn
				return false, nil
			}
		}
	}
}

// forgotten reports whether less is spent than the turns have reserved: another process has reset it, or has given so much
// back that the next one may act. What they have reserved is not given back then, as it may be others' by now.
func (t *Throttler) forgotten(ctx context.Context, w *waiter, s *turns, parts []Part) bool {
	var now Verdict
	if err := t.decideAll(ctx, &now, storage.Peek, 0, w.again(), parts); err != nil {
		return false // the storage fails, or the buckets were changed, of which there is news
	}
	longest := int64(0)
	for _, c := range now.all() {
		longest = max(longest, c.ResetAfter)
	}
	return now.Allowed || longest < s.last()-now.at
}

// end makes all ask again, and gives back what they had reserved, unless a Reset has. It reports false if another does so.
func (t *Throttler) end(ctx context.Context, s *turns, w *waiter, give bool) bool {
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
	return n > 0
}

// never is after all times of an injected clock.
const never = int64(1)<<53 - 1

// leave ends the waiting. What those who leave together had reserved is given back in one call: so the others may leave
// first.
func (t *Throttler) leave(ctx context.Context, w *waiter) {
	s := t.waiters.exit(w)
	for more := s != nil; more; {
		runtime.Gosched()
		more = t.flush(ctx, s)
	}
}

// flush gives back what those who have left until now had reserved. It reports whether there was anything.
func (t *Throttler) flush(ctx context.Context, s *turns) bool {
	s.l.giving.Lock()
	defer s.l.giving.Unlock()
	v, n := t.waiters.left(s)
	if n > 0 {
		t.giveBack(ctx, v, int64(n))
	}
	return n > 0
}

// giveBack gives back n times what v took, also when the context has ended.
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

// denied makes a verdict whose tokens were given back a denial.
func denied(v *Verdict) { v.Allowed, v.RetryAfter, v.Delay = false, v.Delay, 0 }
