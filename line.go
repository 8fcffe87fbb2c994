// The calls of Wait that wait: who is in line for an identifier, and who has to be told what.

package throttler

import (
	"container/list"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// waiters are the calls that wait, in a line for each identifier. No lock is shared by two identifiers, so that a crowd that
// leaves one holds up nobody at another.
type waiters struct {
	most  int          // Config.MaxWaiters
	lines sync.Map     // identifier -> *line
	n     atomic.Int64 // of lines, at least: most throttlers have none
}

// line is those who wait for one identifier.
type line struct {
	id string

	// Held to reserve, and for writing to give back: so what is given back was reserved last.
	giving sync.RWMutex

	mu   sync.Mutex // guards what follows
	all  list.List  // of *waiter: also those who sleep until what they have reserved is due
	gone bool       // all have left: whoever comes needs another line

	// Those who were denied, in the order of their arrival. Some at the front ask, or pause to ask again; the others wait
	// for their turn. When none of them asks any more the next ones do: as many as there are tokens left for, or one.
	queue  list.List
	asking int
	tokens int64 // that were left when the last of them was admitted; 0 if one was denied
	ahead  int64 // that all in the queue ask of each bucket, at least

	turns map[string]*turns // those who sleep, by the shape of what they have reserved
}

// waiter is a call that waits.
type waiter struct {
	lines []*line
	seats []*list.Element // in all of each line
	turn  chan struct{}   // it is its turn to ask
	poke  chan struct{}   // there is news
	news  atomic.Int32

	attempts int   // how often it has asked
	least    int64 // tokens that it asks of each of its buckets, at least

	// Where it is: in the queue of a line, or among those who have reserved, and between the two in both. The mutex of that
	// line guards it.
	queue   *line
	inQueue *list.Element
	turns   *turns
	inTurns *list.Element
	asks    bool
}

// again is the number of the next attempt.
func (w *waiter) again() int {
	if w == nil {
		return 1
	}
	w.attempts++
	return w.attempts
}

// news is what happened to the buckets of a waiter.
type news int32

const (
	nothing  news = iota
	freed         // there may be tokens
	changed       // the buckets are others
	wasReset      // what was reserved is forgotten
	askAgain      // what was reserved was given back
)

// none reports whether nobody waits for an identifier.
func (ws *waiters) none(id string) bool {
	if ws.n.Load() == 0 {
		return true
	}
	_, found := ws.lines.Load(id)
	return !found
}

// enter makes a waiter of a call. It returns nil, and for which identifier, if too many wait already.
func (ws *waiters) enter(parts []Part, least int64) (w *waiter, full string) {
	w = &waiter{least: least, turn: make(chan struct{}, 1), poke: make(chan struct{}, 1)}
	for i := range parts {
		if !ws.join(parts[i].id, w) {
			ws.exit(w)
			return nil, parts[i].id
		}
	}
	return w, ""
}

// join gives a waiter a seat in the line of an identifier. It reports whether there was room.
func (ws *waiters) join(id string, w *waiter) bool {
	for {
		found, ok := ws.lines.Load(id)
		if !ok {
			id = strings.Clone(id) // as the caller may use its memory again
			ws.n.Add(1)
			if found, ok = ws.lines.LoadOrStore(id, &line{id: id}); ok {
				ws.n.Add(-1)
			}
		}
		l := found.(*line)
		l.mu.Lock()
		gone, full := l.gone, ws.most > 0 && l.all.Len() >= ws.most
		if !gone && !full {
			w.lines, w.seats = append(w.lines, l), append(w.seats, l.all.PushBack(w))
		}
		l.mu.Unlock()
		if !gone {
			return !full
		}
	}
}

// exit ends the waiting, wherever the waiter is. It returns the turns whose reservations the caller has to give back, if it
// has to. Of a crowd that leaves each takes the lock once, and does little there.
func (ws *waiters) exit(w *waiter) (flush *turns) {
	for i, l := range w.lines {
		l.mu.Lock()
		if w.queue == l {
			l.leave(w, 0)
		}
		if s := w.turns; s != nil && s.l == l && s.quit(w) {
			flush = s
		}
		l.all.Remove(w.seats[i])
		ws.close(l)
		l.mu.Unlock()
	}
	return flush
}

// close forgets a line in which nobody is, unless something that was reserved is still to be given back. The line is locked.
func (ws *waiters) close(l *line) {
	if l.gone || l.all.Len() > 0 || len(l.turns) > 0 {
		return
	}
	l.gone = true
	ws.lines.CompareAndDelete(l.id, l)
	ws.n.Add(-1)
}

// tell wakes those who wait for an identifier: all, or of what was freed the first in line.
func (ws *waiters) tell(id string, n news) {
	if ws.n.Load() == 0 {
		return
	}
	found, ok := ws.lines.Load(id)
	if !ok {
		return
	}
	l := found.(*line)
	l.mu.Lock()
	defer l.mu.Unlock()
	if n == freed {
		if first := l.queue.Front(); first != nil {
			first.Value.(*waiter).tell(n)
		}
		return
	}
	for e := l.all.Front(); e != nil; e = e.Next() {
		e.Value.(*waiter).tell(n)
	}
}

func (w *waiter) tell(n news) {
	for {
		if old := w.news.Load(); news(old) >= n || w.news.CompareAndSwap(old, int32(n)) {
			break
		}
	}
	select {
	case w.poke <- struct{}{}:
	default:
	}
}

// behind is a line of the waiter in which others are.
func (w *waiter) behind() *line {
	for _, l := range w.lines {
		l.mu.Lock()
		n := l.queue.Len()
		l.mu.Unlock()
		if n > 0 {
			return l
		}
	}
	return nil
}

// lineOf is the waiter's line of an identifier.
func (w *waiter) lineOf(id string) *line {
	if i := slices.IndexFunc(w.lines, func(l *line) bool { return l.id == id }); i >= 0 {
		return w.lines[i]
	}
	return w.lines[0]
}

// join puts a waiter at the end. It reports how many tokens those before it ask of each bucket, and whether there is nobody.
func (l *line) join(w *waiter) (ahead int64, first bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ahead, first = l.ahead, l.queue.Len() == 0
	w.queue, w.inQueue = l, l.queue.PushBack(w)
	l.ahead += w.least
	if first {
		w.asks, l.tokens = true, 1<<62
		l.asking++
	}
	return ahead, first
}

// denied reports whether a waiter that was denied may ask again, after a pause: only the first.
func (l *line) denied(w *waiter) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tokens = 0
	if l.queue.Front() == w.inQueue {
		return true
	}
	l.asked(w)
	return false
}

// admitted takes a waiter out that was admitted, which left so many tokens.
func (l *line) admitted(w *waiter, tokens int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.leave(w, tokens)
}

// leave takes a waiter out. The line is locked.
func (l *line) leave(w *waiter, tokens int64) {
	l.queue.Remove(w.inQueue)
	w.queue = nil
	l.ahead -= w.least
	if w.asks {
		l.tokens = min(l.tokens, tokens)
		l.asked(w)
	}
}

// asked says that a waiter no longer asks, and begins the next turn if none does.
func (l *line) asked(w *waiter) {
	w.asks = false
	if l.asking--; l.asking > 0 {
		return
	}
	turns := max(1, l.tokens)
	for e := l.queue.Front(); e != nil && turns > 0; e, turns = e.Next(), turns-1 {
		next := e.Value.(*waiter)
		next.asks = true
		l.asking++
		next.turn <- struct{}{}
	}
	l.tokens = 1 << 62
}
