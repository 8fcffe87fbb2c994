// The ResponseWriter of an admitted request.

package throttlerhttp

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/go-throttler/throttler"
)

// recorder is the ResponseWriter of an admitted request. Before the header of the answer is sent it asks RefundIf, and
// merges the fields of all limiters into one set. It belongs to one request and, like any ResponseWriter, is not safe for
// concurrent use.
type recorder struct {
	http.ResponseWriter

	l        *limit
	r        *http.Request
	id       string             // the identifier of the first part of the request; "" with Options.Decide
	v        *throttler.Verdict // to be refunded; nil if there is no RefundIf
	said     said
	admitted time.Time // set if the middleware has a Took
	status   int       // of the answer; 0 until the answer begins
	told     bool      // an informational (1xx) answer was sent; a ReverseProxy then removes all fields
	refunded bool
	returned bool // the handler returned and did not panic
}

// recorded returns the outermost recorder in the chain of ResponseWriters that begins with w, or nil.
func recorded(w http.ResponseWriter) *recorder {
	for {
		switch inner := w.(type) {
		case interface{ self() *recorder }:
			return inner.self()
		case interface{ Unwrap() http.ResponseWriter }:
			w = inner.Unwrap()
		default:
			return nil
		}
	}
}

func (r *recorder) self() *recorder { return r }

// asked reports whether the same middleware is also further out, and counted this request for the same identifier there.
func (l *limit) asked(w http.ResponseWriter, r *http.Request) bool {
	for outer := recorded(w); outer != nil; outer = recorded(outer.ResponseWriter) {
		if outer.l != l {
			continue
		}
		if l.m.Decide != nil {
			return true
		}
		if key := l.key(r); key != "" && outer.id == l.identifier(key) {
			return true
		}
	}
	return false
}

// Unwrap is for http.ResponseController.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

func (r *recorder) WriteHeader(status int) {
	switch {
	case status >= 200 || status == http.StatusSwitchingProtocols:
		r.begin(status)
	case r.status == 0:
		r.told = true
	}
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(b []byte) (int, error) {
	r.begin(http.StatusOK)
	return r.ResponseWriter.Write(b)
}

// WriteString is for io.WriteString.
func (r *recorder) WriteString(s string) (int, error) {
	r.begin(http.StatusOK)
	return io.WriteString(r.ResponseWriter, s)
}

// FlushError is for http.ResponseController.
func (r *recorder) FlushError() error {
	if can[http.Flusher](r.ResponseWriter) || can[interface{ FlushError() error }](r.ResponseWriter) {
		r.begin(http.StatusOK)
	}
	return http.NewResponseController(r.ResponseWriter).Flush()
}

func (r *recorder) flush() { _ = r.FlushError() }

func (r *recorder) hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffer, err := http.NewResponseController(r.ResponseWriter).Hijack()
	if err == nil {
		r.begin(http.StatusSwitchingProtocols)
	}
	return conn, buffer, err
}

func (r *recorder) push(target string, o *http.PushOptions) error {
	return r.ResponseWriter.(http.Pusher).Push(target, o)
}

// ReadFrom is for io.Copy. It begins the answer only when there are bytes to send, so that the handler may still answer
// otherwise after a copy that fails before that.
func (r *recorder) ReadFrom(from io.Reader) (n int64, err error) {
	if r.status == 0 {
		const first = 512 // net/http reads as many to detect the content type, before it begins its answer
		n, err = io.Copy(struct{ io.Writer }{r}, io.LimitReader(from, first))
		if err != nil || n < first {
			return n, err
		}
	}
	var rest int64
	if w, ok := r.ResponseWriter.(io.ReaderFrom); ok { // that of net/http uses sendfile where it can
		rest, err = w.ReadFrom(from)
	} else {
		rest, err = io.Copy(r.ResponseWriter, from)
	}
	return n + rest, err
}

// CloseNotify is for routers that require it, such as gin.
func (r *recorder) CloseNotify() <-chan bool {
	gone := make(chan bool, 1)
	context.AfterFunc(r.r.Context(), func() { gone <- true })
	return gone
}

// begin runs once, right before the header of the answer is sent. Only the first status counts, as with any ResponseWriter.
func (r *recorder) begin(status int) {
	if r.status != 0 {
		return
	}
	r.status = status
	if took := r.l.m.Took; took != nil {
		took(time.Since(r.admitted))
	}
	now := &r.said
	v := r.refund(status)
	if levels := v.Levels(); len(levels) > 0 {
		now = &said{}
		now.tell(r.l, &v, levels)
	}
	now.put(r.Header(), &r.said, r.told, status)
}

// refund asks RefundIf and gives the cost back at most once. It returns the state of the buckets after it, or a zero Verdict
// if nothing was given back. The client may have left by then, so it ignores that the request's context has ended.
func (r *recorder) refund(status int) (after throttler.Verdict) {
	v := r.v
	if v == nil || r.refunded || !r.l.refundIf(status) {
		return after
	}
	r.refunded = true
	if r.l.m.t.Refund(context.WithoutCancel(r.r.Context()), *v) != nil || !v.Taken() { // Observe gets the error
		return after
	}
	after, _ = r.l.look(r.r, v) // after an error the fields stay as they are
	return after
}

// end is called when the handler has returned or panicked.
func (r *recorder) end() {
	switch {
	case !r.returned && r.status == 0:
		r.begin(http.StatusInternalServerError)
	case !r.returned && r.status < 400:
		r.refund(http.StatusInternalServerError) // the client may have got none of the answer that has begun
	case r.status == 0 && r.r.Context().Err() != nil:
		r.begin(statusClientClosed)
	default:
		r.begin(http.StatusOK)
	}
}

// statusClientClosed is the status that nginx logs for a client that left before the answer.
const statusClientClosed = 499

// as returns the recorder with those methods of http.Flusher, http.Hijacker and http.Pusher that its ResponseWriter has,
// since handlers test for them. It is an http.Hijacker even if only http.ResponseController finds one further inside.
// Otherwise Hijack would bypass the recorder.
func (r *recorder) as() http.ResponseWriter {
	_, f := r.ResponseWriter.(http.Flusher)
	_, p := r.ResponseWriter.(http.Pusher)
	h := can[http.Hijacker](r.ResponseWriter)
	switch {
	case f && h && p:
		return withFHP{withFH{withF{r}}}
	case f && h:
		return withFH{withF{r}}
	case f && p:
		return withFP{withF{r}}
	case h && p:
		return withHP{withH{r}}
	case f:
		return withF{r}
	case h:
		return withH{r}
	case p:
		return withP{r}
	}
	return r
}

// can reports whether w has an interface, searching through Unwrap as http.ResponseController does.
func can[T any](w http.ResponseWriter) bool {
	for {
		if _, ok := w.(T); ok {
			return true
		}
		outer, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			return false
		}
		w = outer.Unwrap()
	}
}

// The types that as returns are named after the first letters of their interfaces. Each is a single pointer, so converting
// it to an interface does not allocate.
type (
	withF   struct{ *recorder }
	withH   struct{ *recorder }
	withP   struct{ *recorder }
	withFH  struct{ withF }
	withFP  struct{ withF }
	withHP  struct{ withH }
	withFHP struct{ withFH }
)

func (w withF) Flush() { w.flush() }

func (w withH) Hijack() (net.Conn, *bufio.ReadWriter, error)  { return w.hijack() }
func (w withFH) Hijack() (net.Conn, *bufio.ReadWriter, error) { return w.hijack() }

func (w withP) Push(target string, o *http.PushOptions) error   { return w.push(target, o) }
func (w withFP) Push(target string, o *http.PushOptions) error  { return w.push(target, o) }
func (w withHP) Push(target string, o *http.PushOptions) error  { return w.push(target, o) }
func (w withFHP) Push(target string, o *http.PushOptions) error { return w.push(target, o) }
