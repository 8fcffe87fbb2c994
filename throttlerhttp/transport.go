package throttlerhttp

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
)

// TransportOptions of a Transport. A field that is zero has its default.
type TransportOptions struct {
	// MaxWait is the longest that one request is held back in all, before it is first sent and between its
	// sends. 0 is a minute; below 0 a request is sent at once, or fails at once. The time that the server takes
	// to answer it does not count.
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
// # What is sent again
//
// A 429 says that the request was not served: it is sent again, whatever its method. A 503 does not say so: it
// is sent again if it has a Retry-After, and the method is GET, HEAD, OPTIONS, TRACE, PUT or DELETE or the
// request has an Idempotency-Key. These answers are refusals. Other answers, and errors, are returned. The
// refusal itself is returned, at once, when the wait would exceed MaxWait or outlast the deadline of the
// request's context, which a Timeout of the http.Client is too, when Attempts or the budget are used up, and
// when there is a body and no GetBody; http.NewRequest sets that for strings and bytes.
//
// # When
//
// Nothing is sent before the time that a refusal names: its Retry-After in seconds, or as a date after the Date
// of the answer, without which this machine's clock counts; else the longest t of a RateLimit with nothing
// remaining. One that names no time in the future (0, a past date, garbage, no field) closes for 1 s, then 2 s,
// 4 s and so on up to 16 s, until there is another answer. Up to 10 % are added at random, if there is room for
// that.
//
// When the time has passed one request goes first, whoever waits. If it is refused all others wait on. Each
// answer that is no refusal lets one more be on its way at a time, so those who wait follow as fast as the
// server serves.
//
// A request that cannot wait so long, by its deadline or by MaxWait, is not sent: it fails at once with a
// *NotSentError, which wraps context.DeadlineExceeded and tells when the server may be asked again. While a
// request waits the error of its context is returned as soon as there is one.
//
// # What is closed
//
// A 503, and a 429 without a RateLimit, closes the host, which is a scheme, name and port. A 429 with a RateLimit
// closes its route, which is a method and a path of the host, and the policies of which nothing remains, by name
// and partition key. A request waits for the policies that the last answer to its route listed: one exhausted
// policy does not stop the routes that it does not limit. Of routes without such an answer nothing is known. After
// a refusal they are asked one at a time, and when one of them is refused too, the others wait for 1 s, then 2 s,
// 4 s and so on, at most for as long as that refusal said.
//
// # How it slows down
//
// RateLimit is that of draft-ietf-httpapi-ratelimit-headers-10, a list of policies such as "5/10s";r=5;t=8, which
// says that 5 remain, and that there will be more in 8 seconds:
//
//   - no more than r are sent before t has passed; the others wait, and then one goes first;
//   - with r from 1 to 10, and t above 1, they are sent t/(r+1) apart: what remains is spread over the time for
//     which it has to last.
//
// Of several policies the longest wait counts, and a later answer replaces what an earlier one said of a policy.
// That is a forecast and no refusal: a request that cannot wait so long is sent, and the server decides; if nothing
// remains, one at a time.
//
// Fields that cannot be parsed are ignored, and so are those of an answer with an Age above 0, which a cache gave.
// Hosts, routes and policies that said something are 1,000 at most: of more, those whose waits end first are
// forgotten. Of more than 1,000 routes whose policies are known, the first is.
//
// A Transport is safe for concurrent use, leaves no goroutines behind, and does not modify requests. Use one for
// each account that the server knows, since its requests share what the server said. It is made by NewTransport.
type Transport struct {
	base     http.RoundTripper
	maxWait  time.Duration
	attempts int
	budget   retryBudget
	gates    gates
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
	maxWait := orDefault(o.MaxWait, time.Minute)
	return &Transport{
		base: base, maxWait: maxWait, attempts: orDefault(o.Attempts, 3),
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

// NotSentError is why a request was not sent, or not again: the server may not be asked before the request's
// deadline, or it would have had to wait for more than MaxWait. It wraps context.DeadlineExceeded.
type NotSentError struct {
	Host  string    // scheme, name and port
	At    time.Time // when the server may be asked again; if that is not after Until, others were asking
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
	left  time.Duration // of MaxWait

	closed closing // what it was told itself, should the gates have been forgotten
	paced  bool    // whether it had its turn
	passed []pass  // the gates through which it was sent
	heard  news    // of the last answer
}

func newCall(t *Transport, req *http.Request) *call {
	host, method := hostOf(req.URL), req.Method
	if method == "" {
		method = http.MethodGet
	}
	return &call{Transport: t, req: req, host: host, route: host + "\n" + method + " " + req.URL.EscapedPath(), left: t.maxWait}
}

// hold waits until the request may be sent.
func (c *call) hold() error {
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

// sleep stays that long.
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

// again returns whether the request has to be sent again.
func (c *call) again(resp *http.Response, sent int) bool {
	now := time.Now()
	return c.heard.refused && (resp.StatusCode == http.StatusTooManyRequests || c.idempotent()) && sent < c.attempts &&
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

// drain reads and closes the body of a refusal. A connection is used again only after the end of the body, which
// need not be waited for.
func (c *call) drain(refusal *http.Response) {
	if refusal.Body == nil {
		return
	}
	ctx, cancel := context.WithTimeout(c.req.Context(), time.Second)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = refusal.Body.Close() })
	_, _ = io.CopyN(io.Discard, refusal.Body, 64<<10)
	if stop() {
		_ = refusal.Body.Close()
	}
}

// resend sends a copy of a request that was refused.
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
