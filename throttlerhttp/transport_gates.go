// What a Transport remembers of hosts, routes and policies, and whom it lets through.

package throttlerhttp

import (
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// gate is what asked for waits: a host, a route, a policy, or all routes of a host whose policies are not known. It is
// closed until a time (rules 3 and 4), then lets so many through as answers have come (rule 6), and paces what it lets
// through by the last forecast.
type gate struct {
	closing

	denials int           // in a row, without one that was sent before the last
	epoch   int           // of the last denial: an answer to what was sent before it says nothing about the time after
	sent    int           // requests in flight
	window  int           // how many may be in flight
	narrow  time.Time     // until when the window counts
	longest time.Duration // that anyone waits
	changed chan struct{} // is closed when an answer comes; nil if nobody waits

	passes    int64         // requests that were ever sent
	remaining int64         // how many more may be sent before the reset
	last      time.Time     // when the last one was sent, or the forecast came
	pause     time.Duration // between two of them
	reset     time.Time     // when the forecast ends
}

// closing is a time before which nothing is sent.
type closing struct {
	until time.Time
	late  time.Duration // comes on top if there is room
}

// later is the one that ends last.
func (c closing) later(d closing) closing {
	if d.until.After(c.until) {
		return d
	}
	return c
}

// wait is how long nothing is sent, and whether there is room for that.
func (c closing) wait(now time.Time, room time.Duration) (time.Duration, bool) {
	wait := c.until.Sub(now)
	if wait+c.late <= room {
		wait += c.late
	}
	return max(wait, 0), wait <= max(room, 0)
}

// full reports whether an answer has to come first. While a forecast paces the requests there is no window.
func (g *gate) full(now time.Time) bool {
	return now.Before(g.narrow) && g.sent >= g.window && !now.Before(g.reset)
}

// oneFirst has one request go first when the gate opens. The window ends when all who waited then have given up.
func (g *gate) oneFirst(opens time.Time) {
	g.window, g.narrow = 1, later(g.narrow, opens.Add(g.longest))
}

// change is a channel that is closed when the next answer comes.
func (g *gate) change() <-chan struct{} {
	if g.changed == nil {
		g.changed = make(chan struct{})
	}
	return g.changed
}

// tell wakes those who wait for a change.
func (g *gate) tell() {
	if g.changed != nil {
		close(g.changed)
		g.changed = nil
	}
}

// turn is when the next request may be sent: at its pace while something remains, else at the reset, which then all who
// wait share.
func (g *gate) turn(now time.Time) (at time.Time, shared bool) {
	if !now.Before(g.reset) {
		return now, false
	}
	at = later(g.last.Add(g.pause), now)
	if g.remaining == 0 || !at.Before(g.reset) {
		return g.reset, true
	}
	return at, false
}

// deny closes the gate for the time that a denial named, or for one that doubles. A denial counts for that if it is the
// first, or answers a request that was sent after the last one.
func (g *gate) deny(now time.Time, counts bool, named, longest time.Duration) {
	if counts {
		g.denials++
		g.epoch++
	}
	wait := named
	if wait == 0 {
		wait = min(time.Second<<min(max(g.denials-1, 0), 30), longest)
	}
	g.closing = g.later(closing{now.Add(wait), rand.N(wait/10 + 1)})
	g.oneFirst(g.until)
	g.reset = time.Time{}
}

// longestPause is the longest after denials that name no time.
const longestPause = 16 * time.Second

// pass is a gate through which a request was sent.
type pass struct {
	*gate

	at  int   // the epoch at that time
	nth int64 // its number among the passes
}

// gates are what a Transport remembers. There is a gate only for what asked for waits.
type gates struct {
	longest time.Duration // that anyone waits, at least a minute

	mu     sync.Mutex
	known  map[string]*gate
	routes map[string][]string // the policies that the last answer to a route listed
	order  []string            // of the routes, the first known first
}

// mostGates, and as many routes, bound the memory.
const mostGates = 1000

func policyOf(host string, l rateLimit) string { return host + "\x00" + l.policy }

// of are the gates through which a request has to go.
func (g *gates) of(c *call) (all []*gate) {
	add := func(keys ...string) {
		for _, key := range keys {
			if at := g.known[key]; at != nil {
				all = append(all, at)
			}
		}
	}
	add(c.host, c.route)
	if policies, known := g.routes[c.route]; known {
		add(policies...)
	} else {
		add(c.other)
	}
	return all
}

// stay is how long a request waits before it looks at the gates again, and what ends that earlier. 0 is no wait.
type stay struct {
	wait    time.Duration
	changed <-chan struct{}
}

// enter lets a request through, or returns how long it has to stay.
func (g *gates) enter(c *call) (stay, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	all, room := g.of(c), c.room(now)
	s, err := c.closedAt(all, now, room)
	if err == nil && s.wait == 0 {
		s, err = c.behind(all, now, room)
	}
	if err != nil || s.wait > 0 {
		c.paced = false
		return s, err
	}
	if !c.paced {
		if s, err = c.turn(all, now, room); err != nil || s.wait > 0 {
			return s, err
		}
	}
	for _, at := range all {
		at.sent++
		at.passes++
		c.passed = append(c.passed, pass{at, at.epoch, at.passes})
	}
	return stay{}, nil
}

// closedAt is the stay until the last of the gates opens.
func (c *call) closedAt(all []*gate, now time.Time, room time.Duration) (s stay, err error) {
	closed := c.closed
	for _, at := range all {
		if at.until.After(now) && at.until.After(closed.until) {
			closed, s.changed = at.closing, at.change()
		}
	}
	wait, fits := closed.wait(now, room)
	if !fits {
		return s, &NotSentError{c.host, closed.until, now.Add(room)}
	}
	s.wait = wait
	return s, nil
}

// behind is the stay until an answer to those who went first.
func (c *call) behind(all []*gate, now time.Time, room time.Duration) (stay, error) {
	for _, at := range all {
		if at.full(now) {
			return c.answer(at, now, room)
		}
	}
	return stay{}, nil
}

// answer is the stay until the next answer to a request that was sent through the gate.
func (c *call) answer(at *gate, now time.Time, room time.Duration) (stay, error) {
	if room == 0 {
		return stay{}, &NotSentError{c.host, now, now}
	}
	return stay{room, at.change()}, nil
}

// turn is the stay until the last of the turns for which the request has room. A request without room for a turn is sent
// all the same, and the server decides; where nothing remains such requests go one at a time.
func (c *call) turn(all []*gate, now time.Time, room time.Duration) (s stay, err error) {
	for _, at := range all {
		next, _ := at.turn(now)
		if next.Sub(now) > room && at.remaining == 0 && at.sent > 0 && (room > 0 || c.left < c.maxWait) {
			return c.answer(at, now, room)
		}
	}
	for _, at := range all {
		next, shared := at.turn(now)
		if wait := next.Sub(now); shared && wait <= room && wait > s.wait {
			at.oneFirst(next)
			s = stay{wait, at.change()} // the turn is taken after the reset
		}
	}
	if c.paced = s.wait == 0; c.paced {
		s.wait = c.take(all, now, room)
	}
	if s.wait > 0 {
		s.wait += rand.N(min(s.wait/10, room-s.wait) + 1)
	}
	return s, nil
}

// take takes a turn of each gate, and returns how long the request has to wait for all for which there is room.
func (c *call) take(all []*gate, now time.Time, room time.Duration) (wait time.Duration) {
	for _, at := range all {
		next, _ := at.turn(now)
		at.remaining = max(at.remaining-1, 0)
		if next.Sub(now) <= room {
			at.last = next
			wait = max(wait, next.Sub(now))
		}
	}
	return wait
}

// leave takes a request that was answered out of its gates, and learns from the answer.
func (g *gates) leave(c *call) {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := c.heard
	for _, p := range c.passed {
		p.sent--
		if n.served && p.at == p.epoch {
			p.denials = 0
			p.window++
		}
		p.tell()
	}
	now := time.Now()
	if n.denied {
		g.deny(c, n, now)
	}
	g.learn(c, n, now)
	c.passed, c.paced = c.passed[:0], false
}

// deny closes what a denial is about.
func (g *gates) deny(c *call, n news, now time.Time) {
	if n.all {
		g.close(c, c.host, n.wait, longestPause, now)
		c.closed = c.closed.later(g.known[c.host].closing)
		return
	}
	about := []string{c.route}
	for _, l := range n.limits {
		if l.remaining == 0 {
			about = append(about, policyOf(c.host, l))
		}
	}
	for _, key := range about {
		g.close(c, key, n.wait, longestPause, now)
		c.closed = c.closed.later(g.known[key].closing)
	}
	unknown := g.at(c.other)
	if c.through(unknown) {
		g.close(c, c.other, 0, c.closed.until.Sub(now), now)
	}
	unknown.oneFirst(c.closed.until)
}

func (g *gates) close(c *call, key string, named, longest time.Duration, now time.Time) {
	at := g.at(key)
	at.deny(now, at.epoch == 0 || c.through(at), named, longest)
}

// through returns whether the request was sent through the gate after the last denial.
func (c *call) through(at *gate) bool {
	for _, p := range c.passed {
		if p.gate == at && p.at == at.epoch {
			return true
		}
	}
	return false
}

// learn keeps the policies of a route and their forecasts. An answer without policies changes nothing for a route that
// had some, as it may have left them out; a route without any that is served has none, and waits for no unknown ones.
func (g *gates) learn(c *call, n news, now time.Time) {
	if _, known := g.routes[c.route]; len(n.limits) == 0 && (known || !n.served || g.known[c.other] == nil) {
		return
	}
	policies := make([]string, len(n.limits))
	for i, l := range n.limits {
		policies[i] = policyOf(c.host, l)
		if l.remaining > 0 || n.served {
			g.forecast(c, policies[i], l, now)
		}
	}
	if _, known := g.routes[c.route]; !known {
		g.order = append(g.order, c.route)
	}
	g.routes[c.route] = policies
	if len(g.order) > mostGates {
		delete(g.routes, g.order[0])
		g.order = g.order[1:]
	}
}

// forecast replaces what is known of a policy. Requests sent after the one that was answered were not counted by the
// server yet, so they are subtracted. A reset in one second may be any moment from now on: nothing is spread over it.
func (g *gates) forecast(c *call, policy string, l rateLimit, now time.Time) {
	if l.reset == 0 && g.known[policy] == nil {
		return
	}
	at := g.at(policy)
	at.last, at.remaining, at.pause, at.reset = later(at.last, now), l.remaining, 0, now.Add(l.reset)
	if l.remaining <= 10 && l.reset > time.Second {
		at.pause = l.reset / time.Duration(l.remaining+1)
	}
	for _, p := range c.passed {
		if p.gate == at {
			at.remaining = max(l.remaining-(at.passes-p.nth), 0)
		}
	}
}

// at is the gate of the key.
func (g *gates) at(key string) *gate {
	at := g.known[key]
	if at == nil {
		if len(g.known) >= mostGates {
			g.forget()
		}
		at = &gate{longest: g.longest}
		g.known[key] = at
	}
	return at
}

// forget removes a tenth: the gates whose waits end first.
func (g *gates) forget() {
	keys := slices.SortedFunc(maps.Keys(g.known), func(a, b string) int { return g.known[a].ends().Compare(g.known[b].ends()) })
	for _, key := range keys[:mostGates/10] {
		delete(g.known, key)
	}
}

// ends is when nobody has to wait any more.
func (g *gate) ends() time.Time {
	if g.remaining == 0 || g.pause > 0 {
		return later(g.until, g.reset)
	}
	return g.until
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
