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

	mu   sync.Mutex           // guards what follows
	all  map[*waiter]struct{} // also those who sleep until what they have reserved is due
	gone bool                 // all have left: whoever comes needs another line

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
	turns *turns        // in which it is, with what it has reserved
	turn  chan struct{} // it is its turn to ask
	poke  chan struct{} // there is news
	news  atomic.Int32

	attempts int           // how often it has asked
	least    int64         // tokens that it asks of each of its buckets, at least
	place    *list.Element // in the queue of a line or in turns; the line's mutex guards this and what follows
	asks     bool
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
		l := ws.join(parts[i].id, w)
		if l == nil {
			ws.exit(w)
			return nil, parts[i].id
		}
		w.lines = append(w.lines, l)
	}
	return w, ""
}

func (ws *waiters) join(id string, w *waiter) *line {
	for {
		found, ok := ws.lines.Load(id)
		if !ok {
			id = strings.Clone(id) // as the caller may use its memory again
			ws.n.Add(1)
			if found, ok = ws.lines.LoadOrStore(id, &line{id: id, all: make(map[*waiter]struct{})}); ok {
				ws.n.Add(-1)
			}
		}
		l := found.(*line)
		l.mu.Lock()
		gone, full := l.gone, ws.most > 0 && len(l.all) >= ws.most
		if !gone && !full {
			l.all[w] = struct{}{}
		}
		l.mu.Unlock()
		switch {
		case full:
			return nil
		case !gone:
			return l
		}
	}
}

// exit ends the waiting.
func (ws *waiters) exit(w *waiter) {
	for _, l := range w.lines {
		l.mu.Lock()
		delete(l.all, w)
		if l.gone = len(l.all) == 0; l.gone {
			ws.lines.CompareAndDelete(l.id, l)
			ws.n.Add(-1)
		}
		l.mu.Unlock()
	}
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
	for w := range l.all {
		w.tell(n)
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
	w.place = l.queue.PushBack(w)
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
	if l.queue.Front() == w.place {
		return true
	}
	l.asked(w)
	return false
}

// leave takes a waiter out. It was admitted if that left any tokens.
func (l *line) leave(w *waiter, tokens int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue.Remove(w.place)
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
