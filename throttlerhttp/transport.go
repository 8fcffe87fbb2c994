package throttlerhttp

import (
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/dunglas/httpsfv"
)

// TransportOptions of a Transport. A field that is zero has its default.
type TransportOptions struct {
	// MaxWait is the longest that one request is held back in all, before it is first sent and between its
	// sends. 0 is a minute; below 0 nothing is held back. The time that the server takes does not count.
	MaxWait time.Duration

	// Attempts is how often one request is sent in all. 0 is 3; 1, or below 0, never sends again.
	Attempts int

	// RetryPercent and RetryBurst are the budget that all requests of the Transport share, so that clients who
	// are refused do not make it worse: the requests that are sent again are at most this percentage of all
	// requests, and RetryBurst more; what was not used beyond the burst is lost. 0 is 10 % and 10; below 0 is
	// none, and each is at most 1,000,000. Without a burst nothing is sent again.
	RetryPercent int
	RetryBurst   int
}

// Transport is an http.RoundTripper for clients of servers that limit rates. It waits and sends again when a
// server says that it has had enough, and slows down before that.
//
// A 429 says that the request was not served: it is sent again, whatever its method. A 503 does not say so: it
// is sent again if it has a Retry-After, and the method is GET, HEAD, OPTIONS, TRACE, PUT or DELETE or the
// request has an Idempotency-Key. Other answers, and errors, are returned.
//
// It is sent again after Retry-After, in seconds or a date by this machine's clock. On a 429 where that is
// missing, malformed, negative or past, it is after the reset of a RateLimit with nothing remaining, else after
// 1 s, then 2 s, 4 s and so on. Up to 10 % are added at random to each wait, so that not all come back at once;
// nothing is sent earlier than the server said. The refusal itself is returned, at once, when the wait would
// exceed MaxWait or outlast the deadline of the request's context, when Attempts or the budget are used up, and
// when there is a body and no GetBody; http.NewRequest sets that for strings and bytes. While it waits it
// returns the context's error as soon as there is one.
//
// Other requests to the same host (scheme, name and port) wait for a Retry-After of a 429 or 503 as well. They
// also heed the field RateLimit of draft-ietf-httpapi-ratelimit-headers-10, a list of limits such as
// "5/10s";r=5;t=8, which says that 5 remain for the next 8 seconds:
//
//   - with r = 0, nothing is sent until t has passed;
//   - with r from 1 to 10, requests are sent t/(r+1) apart, and none waits longer than t: what remains is spread
//     over the time for which it has to last;
//   - with a larger r there is no pause.
//
// Of several limits the longest wait counts, and a later answer replaces the pause of an earlier one. A
// request that would have to wait longer than MaxWait or its deadline is sent at once: the server decides.
// Fields that cannot be parsed are ignored. Of more than 1,000 hosts that asked for waits, the one whose waits
// end first is forgotten.
//
// A Transport is safe for concurrent use, leaves no goroutines behind, and does not modify requests. Use one for each
// account that the server knows, since all requests by it to a host share what that host said. It is made by
// NewTransport.
type Transport struct {
	base     http.RoundTripper
	maxWait  time.Duration
	attempts int
	budget   retryBudget
	hosts    heldHosts
}

// NewTransport returns a Transport that sends by base, of which nil is http.DefaultTransport. Nil options are
// the defaults.
func NewTransport(base http.RoundTripper, o *TransportOptions) *Transport {
	if base == nil {
		base = http.DefaultTransport
	}
	if o == nil {
		o = &TransportOptions{}
	}
	percent, burst := min(orDefault(o.RetryPercent, 10), 1e6), min(orDefault(o.RetryBurst, 10), 1e6)
	return &Transport{
		base: base, maxWait: orDefault(o.MaxWait, time.Minute), attempts: orDefault(o.Attempts, 3),
		budget: retryBudget{percent: percent, full: 100 * burst, left: 100 * burst},
		hosts:  heldHosts{hosts: map[string]*heldHost{}},
	}
}

// orDefault is d for 0, and 0 for what is less.
func orDefault[N int | time.Duration](n, d N) N {
	if n == 0 {
		return d
	}
	return max(n, 0)
}

// CloseIdleConnections closes those of the base, if it can.
func (t *Transport) CloseIdleConnections() {
	if c, ok := t.base.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// hostOf is the scheme, name and port, of which that of the scheme is left out.
func hostOf(u *url.URL) string {
	host := strings.ToLower(u.Scheme + "://" + u.Host)
	if port := map[string]string{"https": ":443", "http": ":80"}[strings.ToLower(u.Scheme)]; port != "" {
		host = strings.TrimSuffix(host, port)
	}
	return host
}

// RoundTrip sends the request, and sends it again as the Transport says.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL == nil {
		return t.base.RoundTrip(req) // which knows what to say
	}
	t.budget.earn()
	c := call{Transport: t, req: req, host: hostOf(req.URL), left: t.maxWait}
	if err := c.hold(); err != nil {
		if req.Body != nil {
			_ = req.Body.Close()
		}
		return nil, err
	}
	resp, err := t.base.RoundTrip(req)
	for sent := 1; err == nil; sent++ {
		wait, again := c.heed(resp, sent)
		if !again {
			break
		}
		resp, err = c.resend(resp, wait)
	}
	return resp, err
}

// call is one request.
type call struct {
	*Transport

	req  *http.Request
	host string
	left time.Duration // of MaxWait
}

// hold waits until the host may be asked, or returns at once if that is too long. A wait may end with another
// one, which the host asked for meanwhile.
func (c *call) hold() error {
	for paced := false; ; {
		wait := c.hosts.closed(c.host)
		if wait == 0 && !paced {
			wait, paced = c.hosts.turn(c.host, c.room()), true
		}
		if wait == 0 || wait > c.room() {
			return nil
		}
		if err := c.sleep(wait); err != nil {
			return err
		}
	}
}

// room is how long the request can wait, and still be sent before its deadline.
func (c *call) room() time.Duration {
	if deadline, ok := c.req.Context().Deadline(); ok {
		return min(c.left, time.Until(deadline)-1)
	}
	return c.left
}

// sleep waits at least this long, and up to a tenth longer.
func (c *call) sleep(wait time.Duration) error {
	wait += rand.N(max(min(wait/10, c.room()-wait), 0) + 1)
	c.left -= wait
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-c.req.Context().Done():
		return c.req.Context().Err()
	}
}

// heed remembers what an answer says, and returns whether the request has to be sent again, and after how long.
func (c *call) heed(resp *http.Response, sent int) (wait time.Duration, again bool) {
	limited, unavailable := resp.StatusCode == http.StatusTooManyRequests, resp.StatusCode == http.StatusServiceUnavailable
	said := parseRateLimit(resp.Header.Values("RateLimit"), c.maxWait)
	after, told := parseRetryAfter(resp.Header.Get("Retry-After"))
	if told && (limited || unavailable) {
		said.closed = after
	}
	c.hosts.remember(c.host, said, c.maxWait)
	wait = said.closed
	if limited && !told && wait == 0 {
		wait = time.Second << min(sent-1, 30)
	}
	again = limited || unavailable && told && c.idempotent()
	return wait, again && sent < c.attempts && c.replayable() && wait <= c.room() && c.budget.take()
}

func (c *call) idempotent() bool {
	switch c.req.Method {
	case "", http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return true
	}
	return c.req.Header.Get("Idempotency-Key") != ""
}

func (c *call) hasBody() bool { return c.req.Body != nil && c.req.Body != http.NoBody }

func (c *call) replayable() bool { return !c.hasBody() || c.req.GetBody != nil }

// resend sends a copy of a request that was refused.
func (c *call) resend(refusal *http.Response, wait time.Duration) (*http.Response, error) {
	// A connection is used again only after the end of the body, which need not be waited for.
	late := time.AfterFunc(time.Second, func() { _ = refusal.Body.Close() })
	_, _ = io.CopyN(io.Discard, refusal.Body, 64<<10)
	late.Stop()
	_ = refusal.Body.Close()
	if err := c.sleep(wait); err != nil {
		return nil, err
	}
	if err := c.hold(); err != nil {
		return nil, err
	}
	req := c.req.Clone(c.req.Context())
	if c.hasBody() {
		body, err := c.req.GetBody()
		if err != nil {
			return nil, err
		}
		req.Body = body
	}
	return c.base.RoundTrip(req)
}

// parseRetryAfter reads seconds or a date that is not past.
func parseRetryAfter(field string) (time.Duration, bool) {
	n, err := strconv.ParseUint(field, 10, 64)
	if err == nil || errors.Is(err, strconv.ErrRange) {
		return wholeSeconds(n), true
	}
	at, err := http.ParseTime(field)
	wait := time.Until(at)
	return wait, err == nil && wait >= 0
}

// wholeSeconds are at most 68 years, so that they can be added to a time.
func wholeSeconds(n uint64) time.Duration { return time.Duration(min(n, 1<<31)) * time.Second }

// rateLimit is what an answer says about the next ones.
type rateLimit struct {
	closed time.Duration // nothing is served until then
	pause  time.Duration // from one request to the next
	reset  time.Duration // when the pauses end
	known  bool          // whether there was a field with a limit
}

// parseRateLimit reads the fields. A pause of more than the longest is none.
func parseRateLimit(fields []string, longest time.Duration) (said rateLimit) {
	limits, err := httpsfv.UnmarshalList(fields)
	if err != nil {
		return rateLimit{}
	}
	for _, limit := range limits {
		remaining, reset, ok := parseLimit(limit)
		pause := reset / time.Duration(remaining+1)
		said.known = said.known || ok
		switch {
		case ok && remaining == 0:
			said.closed = max(said.closed, reset)
		case ok && remaining <= 10 && pause <= longest && pause > said.pause:
			said.pause, said.reset = pause, reset
		}
	}
	return said
}

// parseLimit reads one limit, such as "5/10s";r=5;t=8.
func parseLimit(limit httpsfv.Member) (remaining int64, reset time.Duration, ok bool) {
	item, ok := limit.(httpsfv.Item)
	if !ok {
		return 0, 0, false
	}
	_, named := item.Value.(string)
	r, _ := item.Params.Get("r")
	t, _ := item.Params.Get("t")
	remaining, counted := r.(int64)
	seconds, timed := t.(int64)
	if !named || !counted || !timed || remaining < 0 || seconds < 0 {
		return 0, 0, false
	}
	return remaining, wholeSeconds(uint64(seconds)), true
}

// heldHosts are the hosts that asked for waits. There is an entry only for one that did.
type heldHosts struct {
	mu    sync.Mutex
	hosts map[string]*heldHost
}

// maxHeldHosts bounds the memory: of more, the one whose waits end first is forgotten.
const maxHeldHosts = 1000

// heldHost is what one host asked for.
type heldHost struct {
	closed time.Time     // nothing is sent before
	last   time.Time     // the last turn that was given, or the last answer if it was later
	pause  time.Duration // from one turn to the next
	reset  time.Time     // when the pauses end
}

// closed is how long nothing is sent to the host.
func (h *heldHosts) closed(host string) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if held := h.hosts[host]; held != nil {
		return max(time.Until(held.closed), 0)
	}
	return 0
}

// turn is how long to wait for the next turn, which is taken if there is room for the wait.
func (h *heldHosts) turn(host string, room time.Duration) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	now, held := time.Now(), h.hosts[host]
	if held == nil || held.pause == 0 {
		return 0
	}
	at := earlier(later(held.last.Add(held.pause), now), held.reset)
	wait := max(at.Sub(now), 0)
	if wait <= room {
		held.last = at
	}
	return wait
}

// remember keeps what a host said. Waits of more than the longest would hold nobody.
func (h *heldHosts) remember(host string, said rateLimit, longest time.Duration) {
	if said.closed > longest {
		said.closed = 0
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	held := h.hosts[host]
	if held == nil {
		if said.closed == 0 && said.pause == 0 {
			return
		}
		held = h.add(host)
	}
	now := time.Now()
	held.closed = later(held.closed, now.Add(said.closed))
	if said.known {
		held.last, held.pause, held.reset = later(held.last, now), said.pause, now.Add(said.reset)
	}
}

func (h *heldHosts) add(host string) *heldHost {
	if len(h.hosts) >= maxHeldHosts {
		h.forget()
	}
	held := &heldHost{}
	h.hosts[host] = held
	return held
}

// forget removes the host whose waits end first.
func (h *heldHosts) forget() {
	var first string
	var end time.Time
	for host, held := range h.hosts {
		if ends := later(held.closed, held.reset); first == "" || ends.Before(end) {
			first, end = host, ends
		}
	}
	delete(h.hosts, first)
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// retryBudget counts hundredths of sends.
type retryBudget struct {
	mu                  sync.Mutex
	percent, full, left int
}

// earn is for a request that is first sent.
func (b *retryBudget) earn() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.left = min(b.left+b.percent, b.full)
}

// take is for one that is sent again.
func (b *retryBudget) take() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.left < 100 {
		return false
	}
	b.left -= 100
	return true
}
