// A Transport and its rules, and the flow of one request through it.

package throttlerhttp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/go-throttler/throttler"
)

// Transport is an http.RoundTripper for clients of servers that limit rates. It waits and sends again when a server
// denies a request, and slows down before that. Use one for each account that the server knows: its requests share what
// the server said. NewTransport makes it. It is safe for concurrent use, leaves no goroutines behind, and does not
// modify requests.
//
// # Rules
//
// A denial is a 429, or a 503 with a Retry-After. Other answers, and errors, are returned.
//
//  1. A 503, and a 429 without a RateLimit, closes the host (scheme, name and port). A 429 with a RateLimit closes its
//     route (method and path) and the policies of which nothing remains, by name and partition key.
//  2. A request waits for its host, its route, and the policies that the last answer to its route listed.
//  3. They stay closed until the Retry-After has passed (seconds, or a date after the Date of the answer, else after this
//     machine's clock); without one, for the longest t of a policy of which nothing remains. Nothing is sent earlier.
//  4. A denial that names no time in the future closes for 1 s, then 2 s, 4 s and so on up to 16 s, until another answer.
//  5. Up to 10 % are added to each wait at random, if there is room for that.
//  6. When the time has passed one request goes first. If it is denied the others wait on. Each other answer lets one
//     more be in flight, so those who wait follow as fast as the server serves.
//  7. After a denial, routes whose policies are not known go one at a time. If one of them is denied too, the others wait
//     for 1 s, then 2 s, 4 s and so on, at most for as long as that denial said.
//  8. A denied request is sent again after a 429, which was not served; after a 503 only if the method is GET, HEAD,
//     OPTIONS, TRACE, PUT or DELETE or there is an Idempotency-Key. A body needs a GetBody: http.NewRequest sets that
//     for strings and bytes.
//  9. The denial is returned at once if the wait would exceed MaxWait or the deadline of the request's context (a Timeout
//     of the http.Client is one), or Attempts or the budget are used up.
//  10. A request that cannot wait so long for what others were told fails at once, unsent, with a *NotSentError. One
//     whose context ends while it waits returns the error of that.
//
// # Slowing down
//
// RateLimit is that of draft-ietf-httpapi-ratelimit-headers-10, a list of policies such as "5/10s";r=5;t=8, which
// says that 5 remain, and that there will be more in 8 seconds. No more than r are sent before t has passed; then one
// goes first. With r from 1 to 10, and t above 1, they are sent t/(r+1) apart. Of several policies the longest wait
// counts, and a later answer replaces what an earlier one said. This is a forecast and no denial: a request that cannot
// wait so long is sent, and the server decides; if nothing remains, one at a time.
//
// # A limit of one's own
//
// With TransportOptions.Limit a request, each time before it is sent, also waits until a Throttler admits it: so several
// processes that share a storage keep to a limit that the server does not tell, or tells too late. It waits for that first
// and then for the server. What it took is given back if it is not sent. The rules 9 and 10 hold for this wait as well.
//
// Fields that cannot be parsed or have more than 16 KiB are ignored, and so are those of an answer with an Age above 0,
// which a cache gave. Hosts, routes and policies that said something are 1,000 at most: of more, those whose waits end
// first are forgotten. Of more than 1,000 routes whose policies are known, the first is.
type Transport struct {
	base     http.RoundTripper
	limit    *throttler.Throttler
	key      func(*http.Request) string
	maxWait  time.Duration
	attempts int
	budget   retryBudget
	gates    gates
}

// TransportOptions of a Transport. A field that is zero has its default.
type TransportOptions struct {
	// MaxWait bounds how long one request waits in all, before it is first sent and between its sends, without the
	// time of the server's answers. 0 is a minute; below 0 a request is sent at once, or fails at once.
	MaxWait time.Duration

	// Attempts is how often one request is sent in all. 0 is 3; 1, or below 0, never sends again.
	Attempts int

	// RetryPercent and RetryBurst are the budget that all requests of the Transport share, so that sending again
	// does not add to the load of a server that denies. At most this percentage of all requests are sent again, and
	// RetryBurst more; what is saved beyond the burst is lost. 0 is 10 % and 10; below 0 is none, and each is at
	// most 1,000,000. Without a burst nothing is sent again.
	RetryPercent int
	RetryBurst   int

	// Limit is a limit of one's own, in which Wait takes the cost of each send. An error of it, such as that of a storage
	// that fails, is the error of the request. Nil is none.
	Limit *throttler.Throttler

	// Key returns for which identifier of Limit a request counts; "" counts for none. Nil is the scheme, name and port of
	// the host, "https://api.example.com". It must be safe for concurrent use.
	Key func(*http.Request) string
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
	maxWait, key := orDefault(o.MaxWait, time.Minute), o.Key
	if key == nil {
		key = func(r *http.Request) string { return hostOf(r.URL) }
	}
	return &Transport{
		base: base, limit: o.Limit, key: key, maxWait: maxWait, attempts: orDefault(o.Attempts, 3),
		budget: retryBudget{percent: percent, full: 100 * burst, left: 100 * burst},
		gates:  gates{longest: max(maxWait, time.Minute), known: map[string]*gate{}, routes: map[string][]string{}},
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

// NotSentError is why a request was not sent, or not sent again: the server may not be asked before the request's
// deadline, or within MaxWait. It wraps context.DeadlineExceeded.
type NotSentError struct {
	Host  string    // scheme, name and port
	At    time.Time // when the server, or Limit, may be asked again; if that is not after Until, others were asking
	Until time.Time // until when the request could wait
}

func (e *NotSentError) Error() string {
	may := "may be asked again at " + e.At.Format(time.RFC3339Nano)
	if !e.At.After(e.Until) {
		may = "has not yet answered the request that asks it again"
	}
	return fmt.Sprintf("throttlerhttp: not sent: %s %s, this request can wait until %s", e.Host, may, e.Until.Format(time.RFC3339Nano))
}

// Unwrap returns context.DeadlineExceeded.
func (e *NotSentError) Unwrap() error { return context.DeadlineExceeded }

// Timeout is true: it makes that of the url.Error true.
func (e *NotSentError) Timeout() bool { return true }

// hostOf is the scheme, the name and the port, which is left out if it is the default of the scheme.
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
	c := newCall(t, req)
	if err := c.hold(); err != nil {
		if req.Body != nil {
			_ = req.Body.Close()
		}
		return nil, err
	}
	resp, err := c.send(req)
	for sent := 1; err == nil && c.again(resp, sent); sent++ {
		c.drain(resp)
		resp, err = c.resend()
	}
	return resp, err
}

// call is one request.
type call struct {
	*Transport

	req   *http.Request
	host  string
	route string        // the host, method and path
	other string        // the routes of the host of which nothing is known
	left  time.Duration // of MaxWait

	closed closing // what its own denials said, in case the gates have been forgotten
	paced  bool    // whether it had its turn
	passed []pass  // the gates through which it was sent
	heard  news    // of the last answer
}

func newCall(t *Transport, req *http.Request) *call {
	host, method := hostOf(req.URL), req.Method
	if method == "" {
		method = http.MethodGet
	}
	route := host + "\n" + method + " " + req.URL.EscapedPath()
	return &call{Transport: t, req: req, host: host, route: route, other: host + "\r", left: t.maxWait}
}

// hold waits until the request may be sent: first for a limit of one's own, then for the server.
func (c *call) hold() error {
	v, err := c.admitted()
	if err != nil {
		return err
	}
	if err = c.heed(); err != nil && c.limit != nil {
		_ = c.limit.Refund(context.WithoutCancel(c.req.Context()), v)
	}
	return err
}

// admitted waits for a limit of one's own.
func (c *call) admitted() (v throttler.Verdict, err error) {
	if c.limit == nil {
		return v, nil
	}
	id := c.key(c.req)
	if id == "" {
		return v, nil
	}
	start := time.Now()
	until := start.Add(c.room(start))
	ctx, cancel := context.WithDeadline(c.req.Context(), until)
	defer cancel()
	v, err = c.limit.Wait(ctx, id)
	c.left -= time.Since(start)
	if err != nil && errors.Is(err, context.DeadlineExceeded) && c.req.Context().Err() == nil {
		err = &NotSentError{Host: c.host, At: start.Add(v.RetryAfter), Until: until}
	}
	return v, err
}

// heed waits for the server.
func (c *call) heed() error {
	for {
		s, err := c.gates.enter(c)
		if err == nil && s.wait == 0 {
			return nil
		}
		if done := c.req.Context().Err(); done != nil {
			return done
		}
		if err != nil {
			return err
		}
		if err := c.sleep(s); err != nil {
			return err
		}
	}
}

// room is how long the request can wait, and still be sent before its deadline.
func (c *call) room(now time.Time) time.Duration {
	if deadline, ok := c.req.Context().Deadline(); ok {
		return max(min(c.left, deadline.Sub(now)-1), 0)
	}
	return max(c.left, 0)
}

// sleep waits for the end of the stay, or of the context.
func (c *call) sleep(s stay) error {
	start := time.Now()
	defer func() { c.left -= time.Since(start) }()
	timer := time.NewTimer(s.wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-s.changed:
		return nil
	case <-c.req.Context().Done():
		return c.req.Context().Err()
	}
}

// send sends the request, and tells the gates of the answer.
func (c *call) send(req *http.Request) (resp *http.Response, err error) {
	defer func() { // also when the base panics
		c.heard = readNews(resp)
		c.gates.leave(c)
	}()
	return c.base.RoundTrip(req)
}

// again reports whether the request has to be sent again.
func (c *call) again(resp *http.Response, sent int) bool {
	now := time.Now()
	return c.heard.denied && (resp.StatusCode == http.StatusTooManyRequests || c.idempotent()) && sent < c.attempts &&
		c.replayable() && c.closed.until.Sub(now) <= c.room(now) && c.budget.take()
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

// drain reads and closes the body of a denial: a connection is used again only after the end of the body. A body that
// stalls is closed after a second.
func (c *call) drain(denial *http.Response) {
	if denial.Body == nil {
		return
	}
	ctx, cancel := context.WithTimeout(c.req.Context(), time.Second)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = denial.Body.Close() })
	_, _ = io.CopyN(io.Discard, denial.Body, 64<<10)
	if stop() {
		_ = denial.Body.Close()
	}
}

// resend sends a copy of a request that was denied.
func (c *call) resend() (*http.Response, error) {
	if err := c.hold(); err != nil {
		return nil, err
	}
	req := c.req.Clone(c.req.Context())
	if c.hasBody() {
		body, err := c.req.GetBody()
		if err != nil {
			c.heard = news{}
			c.gates.leave(c)
			return nil, err
		}
		req.Body = body
	}
	return c.send(req)
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
