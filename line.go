// The waiting callers: which line they are in, whose turn it is to ask, and how they get news.

package throttler

import (
	"container/list"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// waiters has a line for each identifier that somebody waits for. Each line has its own locks, so a crowd that leaves one
// identifier delays nobody at another.
type waiters struct {
	most  int          // Config.MaxWaiters
	lines sync.Map     // identifier -> *line
	n     atomic.Int64 // upper bound of the number of lines; it is mostly 0, which saves a lookup in lines

	told   atomic.Uint64 // calls of tell
	resets resets
}

// moment is what had been told before a call asked.
type moment struct{ told, resets uint64 }

func (ws *waiters) moment() moment { return moment{ws.told.Load(), ws.resets.ended.Load()} }

// line has the callers that wait for one identifier. Whoever needs both locks takes giving first, then mu.
type line struct {
	id string

	// giving is held for reading while a call reserves, and for writing while reservations are given back. So no call
	// reserves behind reservations that are just being given back.
	giving sync.RWMutex

	mu   sync.Mutex // guards the fields below
	all  list.List  // of *waiter: those in the queue or in turns, and those that are asking
	gone bool       // removed from waiters.lines; newcomers need a new line
	more int        // those of all that are in other lines too

	// queue has the denied callers in the order of their arrival. Some at the front are asking, or pause before they ask
	// again; the others wait for their turn. When the last of them has asked, the next ones do: as many as there are tokens for,
	// but at least one.
	queue  list.List
	asking int
	tokens int64 // fewest tokens left after an admission of those that ask; 0 if one was denied or left
	ahead  int64 // lower bound of the tokens that the whole queue takes from each bucket

	turns map[string]*turns // the callers with a reservation, by the shape of it
}

// waiter is one call of Wait that has to wait.
type waiter struct {
	home    *line // the first of lines; its turns have the waiter's reservation
	lines   []*line
	seats   []*list.Element // its elements in line.all, one for each of lines
	several bool            // it waits for several identifiers
	turn    chan struct{}   // receives when this waiter may ask
	poke    chan struct{}   // receives when news has changed
	news    atomic.Int32

	attempts int    // how often it has asked
	before   moment // when it asked last
	least    int64  // lower bound of the tokens that it takes from each of its buckets

	// It waits in the queue of a line, or in turns; in both for a moment if it reserves while it is queued. Only the waiter's
	// own goroutine sets queue and turns. The mutex of the line guards the other fields.
	queue   *line
	inQueue *list.Element
	turns   *turns
	inTurns *list.Element
	asks    atomic.Bool // read without the mutex by the other lines
}

// again counts an attempt and returns its number, from 1. For a nil waiter, a call that does not wait yet, it is the first.
func (w *waiter) again() int {
	if w == nil {
		return 1
	}
	w.attempts++
	return w.attempts
}

// news is what happened to the buckets of a waiter. Unread news is replaced only by higher news.
type news int32

const (
	nothing  news = iota
	freed         // there may be tokens, or the waiter may be at the front now
	changed       // AddBucket or RemoveBucket was called
	wasReset      // the storage has forgotten the reservations
	askAgain      // another waiter has ended the turns, so reserve again
)

// none reports whether nobody waits for an identifier.
func (ws *waiters) none(id string) bool {
	if ws.n.Load() == 0 {
		return true
	}
	_, found := ws.lines.Load(id)
	return !found
}

// enter makes a call a waiter. If MaxWaiters callers wait for one of its identifiers already, it returns nil and that
// identifier.
func (ws *waiters) enter(parts []Part, least int64) (w *waiter, full string) {
	w = &waiter{several: len(parts) > 1, least: least, turn: make(chan struct{}, 1), poke: make(chan struct{}, 1)}
	for i := range parts {
		if !ws.join(parts[i].id, w) {
			ws.exit(w)
			return nil, parts[i].id
		}
	}
	return w, ""
}

// join adds a waiter to the line of an identifier. It reports whether there was room. A line may be removed between its lookup
// and its lock; then join looks for another.
func (ws *waiters) join(id string, w *waiter) bool {
	for {
		found, ok := ws.lines.Load(id)
		if !ok {
			id = strings.Clone(id) // the caller may reuse the memory of its string
			ws.n.Add(1)
			if found, ok = ws.lines.LoadOrStore(id, &line{id: id}); ok {
				ws.n.Add(-1)
			}
		}
		l := found.(*line)
		l.mu.Lock()
		gone, full := l.gone, ws.most > 0 && l.all.Len() >= ws.most
		if !gone && !full {
			if w.home == nil {
				w.home = l
			}
			w.lines, w.seats = append(w.lines, l), append(w.seats, l.all.PushBack(w))
			if w.several {
				l.more++
			}
		}
		l.mu.Unlock()
		if !gone {
			return !full
		}
	}
}

// exit takes a waiter out of its lines, the queue and turns. If it returns turns, the caller has to flush them. It takes each
// line's lock once and does constant work under it, since a large crowd may leave at the same time.
func (ws *waiters) exit(w *waiter) (flush *turns) {
	for i, l := range w.lines {
		l.mu.Lock()
		if w.queue == l {
			l.leave(w, 0)
		}
		if s := w.turns; s != nil && s.l == l {
			if s.quit(w) {
				flush = s
			}
			s.mark = ws.resets.ended.Load()
		}
		l.all.Remove(w.seats[i])
		if w.several {
			l.more--
		}
		ws.close(l)
		l.mu.Unlock()
	}
	return flush
}

// close removes a line if it is empty. A line stays while some of its reservations have yet to be given back: newcomers have to
// wait for that, since otherwise they would reserve behind them. The caller holds the line's mutex.
func (ws *waiters) close(l *line) {
	if l.gone || l.all.Len() > 0 || len(l.turns) > 0 {
		return
	}
	l.gone = true
	ws.lines.CompareAndDelete(l.id, l)
	ws.n.Add(-1)
}

// whileReset calls reset, which resets the buckets of an identifier in the storage. Then it makes all reservations of the
// waiters void, and tells them. If reset fails it does neither: if the storage has made the Reset all the same, the first
// waiter notices within a second.
func (ws *waiters) whileReset(id string, reset func() error) error {
	ws.resets.begin(id)
	defer ws.resets.end(id)
	if err := reset(); err != nil {
		return err
	}
	ws.resets.note(id) // first: what is registered before it is voided here, and what is registered later was asked later
	for home := range ws.homes(id) {
		home.void(id)
	}
	ws.tell(id, wasReset)
	return nil
}

// homes returns the lines whose turns may have reservations of an identifier: its own line, and with WaitAll those of other
// identifiers.
func (ws *waiters) homes(id string) map[*line]bool {
	found, ok := ws.lines.Load(id)
	if !ok {
		return nil
	}
	l := found.(*line)
	homes := map[*line]bool{l: true}
	l.mu.Lock()
	defer l.mu.Unlock()
	for e := l.all.Front(); e != nil; e = e.Next() {
		homes[e.Value.(*waiter).home] = true
	}
	return homes
}

// void makes the reservations void that include tokens of an identifier.
func (l *line) void(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for key, s := range l.turns {
		for _, p := range s.due[0].parts() {
			if p.Identifier == id {
				s.over = true
				delete(l.turns, key)
			}
		}
	}
}

// tell sends news to the waiters of an identifier. Freed tokens concern only the first in the queue, and those that ask in the
// queue of another identifier for tokens of both.
func (ws *waiters) tell(id string, n news) {
	ws.told.Add(1) // first, for those that are about to join the queue (Throttler.queue)
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
		for e := l.all.Front(); e != nil && l.more > 0; e = e.Next() {
			if w := e.Value.(*waiter); w.asks.Load() {
				w.tell(n)
			}
		}
		return
	}
	// All waiters have the news before the first wakes up. Otherwise the first could make others ask again that do not
	// have the news yet. It would reach these after they have asked, and they would ask once more.
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

// note stores news unless there is higher unread news.
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

// behind returns one of the waiter's lines whose queue is not empty, or nil.
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

// lineOf returns the waiter's line of an identifier, or its first line if it has none of that identifier.
func (w *waiter) lineOf(id string) *line {
	if i := slices.IndexFunc(w.lines, func(l *line) bool { return l.id == id }); i >= 0 {
		return w.lines[i]
	}
	return w.home
}

// join adds a waiter to the end of the queue. It returns a lower bound of the tokens that those before it take from each bucket,
// and whether it is the first, which may ask at once.
func (l *line) join(w *waiter) (ahead int64, first bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ahead, first = l.ahead, l.queue.Len() == 0
	w.queue, w.inQueue = l, l.queue.PushBack(w)
	l.ahead += w.least
	if first {
		w.asks.Store(true)
		l.tokens = 1 << 62
		l.asking++
	}
	return ahead, first
}

// denied ends a waiter's attempt that was denied. If it returns true, the waiter is the first in the queue and asks again after
// a pause. Otherwise it has to wait for its next turn.
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

// admitted takes out of the queue a waiter whose admission left that many tokens.
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
	if w.asks.Load() {
		l.tokens = min(l.tokens, tokens)
		l.asked(w)
	}
}

// asked ends the asking of a waiter. If it was the last that asked, the next ones may ask: as many as there are tokens for, but
// at least one. So a call never asks together with a dearer one before it that has to be denied. The caller holds the mutex.
func (l *line) asked(w *waiter) {
	w.asks.Store(false)
	if l.asking--; l.asking > 0 {
		return
	}
	tokens := l.tokens
	for e := l.queue.Front(); e != nil; e = e.Next() {
		next := e.Value.(*waiter)
		if tokens -= max(1, next.least); tokens < 0 && l.asking > 0 {
			break
		}
		next.asks.Store(true)
		l.asking++
		next.turn <- struct{}{}
	}
	l.tokens = 1 << 62
}
