// What a Transport remembers about hosts, routes and policies, and when they let requests through.

package throttlerhttp

import (
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// gate is a host, a route, a policy, or the group of a host's routes with unknown policies. It exists only if an answer asked
// for a wait. It is closed until a time (rules 3 and 4). After that it bounds how many requests are in flight, one more
// with each answer (rule 6), and it paces the requests by the last forecast.
type gate struct {
	closing

	denials int           // denials in a row, without answers to requests sent before the last one
	epoch   int           // number of denials that counted; an answer to a request of an earlier epoch proves nothing
	sent    int           // requests in flight
	window  int           // how many may be in flight
	narrow  time.Time     // the window counts until this time
	longest time.Duration // longest wait of any request
	changed chan struct{} // closed when the next answer arrives; nil if nobody waits for it

	passes    int64         // number of requests ever sent
	remaining int64         // how many more may be sent before the reset
	last      time.Time     // when the last request was or will be sent, or when the forecast arrived
	pause     time.Duration // between two requests
	reset     time.Time     // when the forecast ends
	forecasts int           // number of forecasts so far
}

// closing is a time before which no request is sent.
type closing struct {
	until time.Time
	late  time.Duration // added to the wait if there is room (rule 5)
}

// later returns the closing that ends last.
func (c closing) later(d closing) closing {
	if d.until.After(c.until) {
		return d
	}
	return c
}

// wait returns how long a request has to wait, and whether it has room for that.
func (c closing) wait(now time.Time, room time.Duration) (time.Duration, bool) {
	wait := c.until.Sub(now)
	if wait+c.late <= room {
		wait += c.late
	}
	return max(wait, 0), wait <= max(room, 0)
}

// full reports whether a request has to wait for an answer to another one. While a forecast paces the requests, the window
// does not count.
func (g *gate) full(now time.Time) bool {
	return now.Before(g.narrow) && g.sent >= g.window && !now.Before(g.reset)
}

// oneFirst makes one request go first when the gate opens (rule 6). The window ends once all requests that could be waiting at
// that time have given up.
func (g *gate) oneFirst(opens time.Time) {
	g.window, g.narrow = 1, later(g.narrow, opens.Add(g.longest))
}

// change returns a channel that is closed when the next answer arrives.
func (g *gate) change() <-chan struct{} {
	if g.changed == nil {
		g.changed = make(chan struct{})
	}
	return g.changed
}

// tell wakes the requests that wait for a change.
func (g *gate) tell() {
	if g.changed != nil {
		close(g.changed)
		g.changed = nil
	}
}

// turn returns when the next request may be sent: at the pace while something remains, otherwise at the reset. If shared is
// true, that time is the reset, and all waiting requests get it.
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

// deny closes the gate for the time that a denial named. If it named none, the time is 1 s and doubles with each denial that
// counts, up to longest. A denial counts if it is the first, or if its request was sent after the last denial: of many
// requests denied together only one doubles the time.
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

// longestPause is the longest wait after denials that name no time (rule 4).
const longestPause = 16 * time.Second

// pass records that a request was sent through a gate.
type pass struct {
	*gate

	at  int   // the gate's epoch at that time
	nth int64 // its number among the gate's passes
}

// turn is what a request has of a gate's forecast while it waits for its time.
type turn struct {
	*gate

	forecast int // the gate's forecasts at that time
}

// gates is the memory of a Transport. Its mutex guards all gates.
type gates struct {
	longest time.Duration // longest wait of any request, at least a minute

	mu     sync.Mutex
	known  map[string]*gate
	routes map[string][]string // keys of the policies in the last answer to a route
	order  []string            // keys of routes, oldest first
}

// mostGates bounds the number of gates, and also the number of routes with known policies.
const mostGates = 1000

func policyOf(host string, l rateLimit) string { return host + "\x00" + l.policy }

// of returns the gates that a request has to pass (rules 2 and 7).
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

// stay is how long a request waits before it looks at its gates again. changed may end the wait earlier. A zero wait means
// none.
type stay struct {
	wait    time.Duration
	changed <-chan struct{}
}

// enter lets a request through all of its gates, or returns how long it has to wait or why it cannot. It checks in this order:
// times when gates are closed, requests that go first, and the pace of forecasts. A request that had its turn loses it if
// it then has to wait for a closed gate or for an answer.
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
	c.paced = c.paced && c.counted(now)
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

// closedAt returns the stay until the last of the closed gates opens.
func (c *call) closedAt(all []*gate, now time.Time, room time.Duration) (s stay, err error) {
	closed := c.closed
	for _, at := range all {
		if at.until.After(now) && at.until.After(closed.until) {
			closed, s.changed = at.closing, at.change()
		}
	}
	wait, fits := closed.wait(now, room)
	if !fits {
		return s, &NotSentError{Host: c.host, At: closed.until, Until: now.Add(room)}
	}
	s.wait = wait
	return s, nil
}

// behind returns the stay until there is an answer to the requests that went first.
func (c *call) behind(all []*gate, now time.Time, room time.Duration) (stay, error) {
	for _, at := range all {
		if at.full(now) {
			return c.answer(at, now, room)
		}
	}
	return stay{}, nil
}

// answer returns the stay until the next answer to a request that was sent through the gate.
func (c *call) answer(at *gate, now time.Time, room time.Duration) (stay, error) {
	if room == 0 {
		return stay{}, &NotSentError{Host: c.host, At: now, Until: now}
	}
	return stay{room, at.change()}, nil
}

// turn returns the stay until the latest turn that the request has room for. If it has no room for a turn, it ignores that
// forecast, and the server decides. Where nothing remains, such requests are sent one at a time.
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
			s = stay{wait, at.change()} // the request takes its turn after the reset
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

// take takes a turn of each gate, and returns how long the request has to wait for those that it has room for. The
// others count the request as well, since it is sent.
func (c *call) take(all []*gate, now time.Time, room time.Duration) (wait time.Duration) {
	c.turns = c.turns[:0]
	for _, at := range all {
		c.turns = append(c.turns, turn{at, at.forecasts})
		next, _ := at.turn(now)
		at.remaining = max(at.remaining-1, 0)
		if next.Sub(now) <= room {
			at.last = next
			wait = max(wait, next.Sub(now))
		}
	}
	return wait
}

// counted makes the forecasts that are newer than the turns of the request count it too. It reports whether something
// remains by all of these: if not, the server has less than it had said, and the turns are lost.
func (c *call) counted(now time.Time) bool {
	c.turns = slices.DeleteFunc(c.turns, func(t turn) bool { return t.forecast == t.forecasts || !now.Before(t.reset) })
	for _, t := range c.turns {
		if t.remaining == 0 {
			return false
		}
	}
	for _, t := range c.turns {
		t.remaining--
	}
	return true
}

// leave ends the attempt of a request: it takes the request out of its gates and learns from the answer. Only an answer by the
// server itself to a request sent after the last denial widens the window; an error or a cached answer proves nothing.
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

// deny closes the gates that a denial is about (rules 1 and 7).
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

// close closes the gate of a key for a denial.
func (g *gates) close(c *call, key string, named, longest time.Duration, now time.Time) {
	at := g.at(key)
	at.deny(now, at.epoch == 0 || c.through(at), named, longest)
}

// through reports whether the request was sent through the gate after the gate's last denial.
func (c *call) through(at *gate) bool {
	for _, p := range c.passed {
		if p.gate == at && p.at == at.epoch {
			return true
		}
	}
	return false
}

// learn remembers the policies of a route and their forecasts. If an answer lists no policies, a route with known policies keeps
// them, since the answer may have left them out. If an unknown route is served without any, it counts as a route that has
// none, and no longer waits with the unknown ones.
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

// forecast replaces what is known about a policy. The server has not counted the requests that were sent after the answered
// one, so they are subtracted. t is in whole seconds, so a reset in one second may be at any moment from now on: requests are
// not spread over that. Where none are spread, none has to wait behind those that wait for their turns.
func (g *gates) forecast(c *call, policy string, l rateLimit, now time.Time) {
	if l.reset == 0 && g.known[policy] == nil {
		return
	}
	at := g.at(policy)
	at.last, at.remaining, at.pause, at.reset = later(at.last, now), l.remaining, 0, now.Add(l.reset)
	if l.remaining <= 10 && l.reset > time.Second {
		at.pause = l.reset / time.Duration(l.remaining+1)
	} else {
		at.last = now
	}
	at.forecasts++
	for _, p := range c.passed {
		if p.gate == at {
			at.remaining = max(l.remaining-(at.passes-p.nth), 0)
		}
	}
}

// at returns the gate of a key. It makes one if there is none.
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

// forget removes a tenth of the gates: those whose waits end first.
func (g *gates) forget() {
	keys := slices.SortedFunc(maps.Keys(g.known), func(a, b string) int { return g.known[a].ends().Compare(g.known[b].ends()) })
	for _, key := range keys[:mostGates/10] {
		delete(g.known, key)
	}
}

// ends returns when no request has to wait for the gate any more.
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
