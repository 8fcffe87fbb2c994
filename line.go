// The callers that wait: which line they are in, whose turn it is to ask, and how news reaches them.

package throttler

import (
	"container/list"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// waiters has a line for each identifier that somebody waits for. Two identifiers share no lock, so a crowd that leaves one
// delays nobody at another.
type waiters struct {
	most  int          // Config.MaxWaiters
	lines sync.Map     // identifier -> *line
	n     atomic.Int64 // upper bound of the number of lines; mostly 0, which saves looking into lines
}

// line has the callers that wait for one identifier.
type line struct {
	id string

	// Held for reading to reserve, and for writing to give back. So nothing is reserved while the last reservations are given
	// back.
	giving sync.RWMutex

	mu   sync.Mutex // guards what follows
	all  list.List  // of *waiter: those in the queue, in turns, and those that ask
	gone bool       // removed from waiters.lines: newcomers need another line

	// The denied callers, in the order of their arrival. Some at the front ask, or pause before they ask again; the others
	// wait for their turn. When nobody asks any more, the next ones do: as many as there are tokens for, but at least one.
	queue  list.List
	asking int
	tokens int64 // left when the last of those who ask was admitted; 0 if one was denied
	ahead  int64 // tokens that all in the queue take from each bucket, at least

	turns map[string]*turns // the callers that have reserved, by the shape of their reservation
}

// waiter is one call of Wait that has to wait.
type waiter struct {
	lines []*line
	seats []*list.Element // its places in line.all, one for each of lines
	turn  chan struct{}   // receives when it is this waiter's turn to ask
	poke  chan struct{}   // receives when news has changed
	news  atomic.Int32

	attempts int   // how often it has asked
	least    int64 // tokens that it takes from each of its buckets, at least

	// Where it waits: in the queue of a line, or in turns. One that reserves while it is in the queue is in both for a moment.
	// The waiter itself sets queue and turns; the mutex of the line guards the rest.
	queue   *line
	inQueue *list.Element
	turns   *turns
	inTurns *list.Element
	asks    bool
}

// again counts an attempt and returns its number, from 1. A call that is no waiter yet makes its first.
func (w *waiter) again() int {
	if w == nil {
		return 1
	}
	w.attempts++
	return w.attempts
}

// news is what happened to the buckets of a waiter. A higher one replaces a lower one that was not read yet.
type news int32

const (
	nothing  news = iota
	freed         // there may be tokens, or a place at the front
	changed       // AddBucket or RemoveBucket was called
	wasReset      // the storage has forgotten the reservations
	askAgain      // another waiter has ended the turns: reserve anew
)

// none reports whether nobody waits for an identifier.
func (ws *waiters) none(id string) bool {
	if ws.n.Load() == 0 {
		return true
	}
	_, found := ws.lines.Load(id)
	return !found
}

// enter makes a call a waiter. If too many wait for one of its identifiers, it returns nil and that identifier.
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
			id = strings.Clone(id) // the caller may reuse the memory of its own
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

// exit takes a waiter out of everything that it is in. If it returns turns, the caller has to flush them. It takes the lock of
// a line once and does constant work under it, since a crowd may leave at the same time.
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

// close removes an empty line. A line is kept while reservations of it are still to be given back: newcomers have to wait for
// that, or they would reserve behind them. The caller holds the line's mutex.
func (ws *waiters) close(l *line) {
	if l.gone || l.all.Len() > 0 || len(l.turns) > 0 {
		return
	}
	l.gone = true
	ws.lines.CompareAndDelete(l.id, l)
	ws.n.Add(-1)
}

// tell wakes the waiters of an identifier. Freed tokens concern the first in the queue only.
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
	if n == wasReset { // at once, so that nobody puts a new reservation among those that are forgotten
		for _, s := range l.turns {
			s.over = true
		}
		clear(l.turns)
	}
	// All have the news before the first wakes up. Else it would reach those late who have already asked because others did.
	for e := l.all.Front(); e != nil; e = e.Next() {
		e.Value.(*waiter).note(n)
	}
	for e := l.all.Front(); e != nil; e = e.Next() {
		e.Value.(*waiter).wake()
	}
}

func (w *waiter) tell(n news) {
	w.note(n)
	w.wake()
}

func (w *waiter) note(n news) {
	for {
		if old := w.news.Load(); news(old) >= n || w.news.CompareAndSwap(old, int32(n)) {
			return
		}
	}
}

func (w *waiter) wake() {
	select {
	case w.poke <- struct{}{}:
	default:
	}
}

// behind returns a line of the waiter in whose queue others are, or nil.
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

// lineOf returns the waiter's line of an identifier.
func (w *waiter) lineOf(id string) *line {
	if i := slices.IndexFunc(w.lines, func(l *line) bool { return l.id == id }); i >= 0 {
		return w.lines[i]
	}
	return w.lines[0]
}

// join puts a waiter at the end of the queue. It returns how many tokens those before it take from each bucket, at least, and
// whether it is the first.
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

// denied is called by a waiter that was denied. It reports whether the waiter is the first, and so may ask again after a pause.
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

// admitted takes a waiter out of the queue whose admission left so many tokens.
func (l *line) admitted(w *waiter, tokens int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.leave(w, tokens)
}

// leave takes a waiter out of the queue. The caller holds the mutex.
func (l *line) leave(w *waiter, tokens int64) {
	l.queue.Remove(w.inQueue)
	w.queue = nil
	l.ahead -= w.least
	if w.asks {
		l.tokens = min(l.tokens, tokens)
		l.asked(w)
	}
}

// asked is called for a waiter that no longer asks. If it was the last that did, the next ones may ask.
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
