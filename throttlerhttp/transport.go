// Transport, its rules, and the path of a request through it.

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

// Transport is an http.RoundTripper for clients of servers that limit rates. If a server denies a request, it waits and
// sends the request again, and it slows down before that happens. Use one Transport for each account that the server
// knows, so that all requests of the account share what the server said. NewTransport makes one. It is safe for
// concurrent use, leaves no goroutines behind, and does not modify requests.
//
// # Rules
//
// A denial is a 429, or a 503 with a Retry-After. All other answers, and errors, are returned.
//
//  1. A 503, or a 429 without a RateLimit, closes the host (scheme, name and port). A 429 with a RateLimit closes its
//     route (method and path), and each policy that has nothing left, by name and partition key.
//  2. A request waits for its host, its route, and the policies in the last answer to its route.
//  3. They stay closed until the Retry-After has passed. That is a number of seconds or a date, compared with the Date
//     of the answer, or with this machine's clock if there is none. Without a Retry-After they stay closed for the
//     longest t of a policy that has nothing left. Nothing is sent earlier.
//  4. A denial that names no time in the future closes for 1 s, then 2 s, 4 s and so on up to 16 s, until there is
//     another answer.
//  5. Up to 10 % are added to each wait at random, if the request can wait that much longer.
//  6. When the time has passed, one request goes first. If it is denied, the others go on waiting. Every other answer
//     lets one more be in flight, so the waiting requests follow as fast as the server serves them.
//  7. After a denial, requests to the host's routes with unknown policies go one at a time. If one of them is denied
//     too, the others wait for 1 s, then 2 s, 4 s and so on, but at most for as long as that denial said.
//  8. After a 429 a denied request is sent again, since the server did not process it. After a 503 it is sent again only
//     if the method is GET, HEAD, OPTIONS, TRACE, PUT or DELETE, or if there is an Idempotency-Key. A request with a
//     body needs a GetBody, which http.NewRequest sets for strings and bytes.
//  9. The denial is returned at once if the wait would exceed MaxWait or the deadline of the request's context (which
//     includes the Timeout of an http.Client), or if Attempts or the budget are used up.
//  10. A request may find a host, route or policy closed by the answer to another request. If it cannot wait that long,
//     it fails at once, unsent, with a *NotSentError. If its context ends while it waits, it returns the context's error.
//
// # Slowing down
//
// The RateLimit field is that of draft-ietf-httpapi-ratelimit-headers-10. It is a list of policies such as
// "5/10s";r=5;t=8, which says that 5 requests remain and that there will be more in 8 seconds. At most r requests are sent
// before t has passed; then one goes first. If r is from 1 to 10 and t is above 1, they are sent t/(r+1) apart. Of several
// policies the longest wait counts, and a later answer replaces an earlier one. This is a forecast and no denial: a request
// that cannot wait that long is sent, and the server decides. If nothing remains, such requests are sent one at a time.
//
// # A client-side limit
//
// With TransportOptions.Limit a request also waits until a Throttler admits it, each time before it is sent. So several
// processes that share a storage keep a limit together, even if the server does not announce it or does so too late. A
// request waits for Limit first and then for the server. If it is not sent, the tokens it took are given back. Rules 9 and
// 10 hold for this wait as well.
//
// # Bounds
//
// Fields that cannot be parsed or are longer than 16 KiB are ignored. So are the fields of an answer with an Age above 0,
// since that came from a cache. A Transport remembers waits and forecasts of at most 1,000 hosts, routes and policies;
// beyond that it forgets those whose waits end first. It also remembers the policies of at most 1,000 routes; beyond
// that it forgets the route that it learned of first.
type Transport struct {
	base     http.RoundTripper
	limit    *throttler.Throttler
	key      func(*http.Request) string
	maxWait  time.Duration
	attempts int
	budget   retryBudget
	gates    gates
}

// TransportOptions configures a Transport. A zero field has its default.
type TransportOptions struct {
	// MaxWait bounds how long one request waits in total, before it is first sent and between its attempts. The time
	// that the server takes to answer does not count. Zero means a minute. If it is negative, a request is sent at once
	// or fails at once.
	//
	// The time that the storage of Limit takes counts, if the request can wait for a millisecond or more. If it cannot,
	// Limit is asked once, and the answer is awaited.
	MaxWait time.Duration

	// Attempts is how often one request is sent at most. Zero means 3. With 1 or a negative number no request is sent
	// again.
	Attempts int

	// RetryPercent and RetryBurst are a retry budget that all requests of the Transport share. It keeps retries from
	// overloading a server that denies. Each request adds RetryPercent hundredths of a retry, but no more than RetryBurst
	// retries are saved, and that many are there at first. Zero means 10 % and 10, a negative number means none, and
	// values above 1,000,000 count as 1,000,000. Without a burst no request is sent again.
	RetryPercent int
	RetryBurst   int

	// Limit is a client-side limit. Before each attempt Limit.Wait takes the cost, or Limit.ConsumeContext if the request can
	// wait for less than a millisecond. Its errors, such as a failure of its storage, become the error of the request.
	// Nil means no limit.
	Limit *throttler.Throttler

	// Key returns the identifier of Limit that a request counts for. A request with the key "" is not limited. A nil Key
	// uses the scheme, name and port of the host, such as "https://api.example.com". Key must be safe for concurrent use.
	Key func(*http.Request) string
}

// NewTransport returns a Transport that sends requests with base, or with http.DefaultTransport if base is nil. A nil o
// selects the defaults.
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

// orDefault returns d for 0, 0 for a negative n, and n otherwise.
func orDefault[N int | time.Duration](n, d N) N {
	if n == 0 {
		return d
	}
	return max(n, 0)
}

// CloseIdleConnections closes the idle connections of the base, if the base can do that. http.Client calls it.
func (t *Transport) CloseIdleConnections() {
	if c, ok := t.base.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// NotSentError says why a request was not sent, or not sent again: the server, or Limit, may not be asked again before
// the request's deadline and within MaxWait. It wraps context.DeadlineExceeded.
type NotSentError struct {
	Host  string    // scheme, name and port
	Limit string    // the identifier that Limit could not admit in time; "" if the server closed the host, route or policy
	Until time.Time // how long the request could have waited

	// At is when the server, or Limit, may be asked again. If it is not after Until, other requests were going first. It
	// is zero if Limit has not answered.
	At time.Time
}

func (e *NotSentError) Error() string {
	who, may := e.Host, "may be asked again at "+e.At.Format(time.RFC3339Nano)
	if e.Limit != "" {
		who = fmt.Sprintf("the limit of %.64q", e.Limit)
	}
	switch first := !e.At.After(e.Until); {
	case e.At.IsZero():
		may = "has not answered"
	case first && e.Limit != "":
		may = "admits other requests first"
	case first:
		may = "has not yet answered the request that asks it again"
	}
	return fmt.Sprintf("throttlerhttp: not sent: %s %s, this request can wait until %s", who, may, e.Until.Format(time.RFC3339Nano))
}

// Unwrap returns context.DeadlineExceeded.
func (e *NotSentError) Unwrap() error { return context.DeadlineExceeded }

// Timeout returns true, so that the Timeout of the url.Error around the error is true as well.
func (e *NotSentError) Timeout() bool { return true }

// hostOf returns the scheme, the name and the port of a URL. The default port of the scheme is left out.
func hostOf(u *url.URL) string {
	host := strings.ToLower(u.Scheme + "://" + u.Host)
	if port := map[string]string{"https": ":443", "http": ":80"}[strings.ToLower(u.Scheme)]; port != "" {
		host = strings.TrimSuffix(host, port)
	}
	return host
}

// RoundTrip sends the request, waiting and retrying by the rules of Transport.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL == nil {
		return t.base.RoundTrip(req) // the base returns the usual error
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

// call is one request on its way through the Transport, with all of its attempts.
type call struct {
	*Transport

	req   *http.Request
	host  string
	route string        // host, method and path: the key of its gate
	other string        // key of the gate for the host's routes with unknown policies
	left  time.Duration // rest of MaxWait

	closed closing // wait that its own denials asked for; kept in case the gates are forgotten
	paced  bool    // it had its turn in the paces of its gates
	turns  []turn  // the turns, until it is sent
	passed []pass  // the gates through which it was sent
	heard  news    // news of the last answer
}

func newCall(t *Transport, req *http.Request) *call {
	host, method := hostOf(req.URL), req.Method
	if method == "" {
		method = http.MethodGet
	}
	route := host + "\n" + method + " " + req.URL.EscapedPath()
	return &call{Transport: t, req: req, host: host, route: route, other: host + "\r", left: t.maxWait}
}

// hold waits until the request may be sent: first for Limit, then for the server. If the second wait fails, it gives back
// what the first took.
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

// instant is the shortest time for which a request waits for Limit. The context of a shorter Wait could end before the
// storage has answered, so a request that cannot wait this long asks once.
const instant = time.Millisecond

// admitted waits for Limit.
func (c *call) admitted() (v throttler.Verdict, err error) {
	if c.limit == nil {
		return v, nil
	}
	id := c.key(c.req)
	if id == "" {
		return v, nil
	}
	start := time.Now()
	room := c.room(start)
	if room < instant {
		v, err = c.limit.ConsumeContext(c.req.Context(), id)
		if now := time.Now(); err == nil && !v.Allowed {
			err = &NotSentError{Host: c.host, Limit: id, At: now.Add(v.RetryAfter), Until: now}
		}
		return v, err
	}
	defer func() { c.left -= time.Since(start) }()
	return c.wait(id, start, start.Add(room))
}

// wait waits for Limit until a time. It turns the end of MaxWait or of the deadline into a NotSentError, unless the storage
// says that it is unavailable.
func (c *call) wait(id string, start, until time.Time) (throttler.Verdict, error) {
	ctx, cancel := context.WithDeadline(c.req.Context(), until)
	defer cancel()
	v, err := c.limit.Wait(ctx, id)
	if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, throttler.ErrUnavailable) || c.req.Context().Err() != nil {
		return v, err
	}
	unsent := &NotSentError{Host: c.host, Limit: id, Until: until}
	switch {
	case len(v.Levels()) == 0: // the storage has not answered
	case ctx.Err() == nil: // the last answer left too little time, which Wait found at once
		unsent.At = time.Now().Add(v.RetryAfter)
	default:
		unsent.At = start.Add(v.RetryAfter) // the last answer came later, but other requests go first anyhow
	}
	return v, unsent
}

// heed waits until all gates of the request let it through.
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

// room returns how long the request can wait and still be sent before its deadline and within MaxWait.
func (c *call) room(now time.Time) time.Duration {
	if deadline, ok := c.req.Context().Deadline(); ok {
		return max(min(c.left, deadline.Sub(now)-1), 0)
	}
	return max(c.left, 0)
}

// sleep waits for the end of the stay, a change of its gate, or the end of the context.
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

// send sends the request, and updates the gates with the answer.
func (c *call) send(req *http.Request) (resp *http.Response, err error) {
	defer func() { // even if the base panics, since the request counts as in flight until then
		c.heard = readNews(resp)
		c.gates.leave(c)
	}()
	return c.base.RoundTrip(req)
}

// again reports whether the request has to be sent again (rules 8 and 9). Only then it takes from the budget.
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

// drain reads up to 64 KiB of a denial's body and closes it, since a connection is reused only if its body was read to the
// end. A body that stalls is closed after a second.
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

// resend sends a copy of a denied request, with a new body. The body comes first: if there is none, nothing is sent, and so
// hold must not have taken anything.
func (c *call) resend() (*http.Response, error) {
	req := c.req.Clone(c.req.Context())
	if c.hasBody() {
		body, err := c.req.GetBody()
		if err != nil {
			return nil, err
		}
		req.Body = body
	}
	if err := c.hold(); err != nil {
		if req.Body != nil {
			_ = req.Body.Close()
		}
		return nil, err
	}
	return c.send(req)
}

// retryBudget counts in hundredths of a retry.
type retryBudget struct {
	mu                  sync.Mutex
	percent, full, left int
}

// earn adds the share of a new request.
func (b *retryBudget) earn() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.left = min(b.left+b.percent, b.full)
}

// take pays for a retry, and reports whether there was enough.
func (b *retryBudget) take() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.left < 100 {
		return false
	}
	b.left -= 100
	return true
}
