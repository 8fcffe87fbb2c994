package throttlerhttp

import (
	"bufio"
	"context"
	"net"
	"net/http"
)

// recorder remembers the status of an answer.
type recorder struct {
	http.ResponseWriter

	status   int
	returned bool // the handler has, and did not panic
}

func (r *recorder) WriteHeader(status int) {
	if r.status == 0 && (status >= 200 || status == http.StatusSwitchingProtocols) {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(b []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	return r.ResponseWriter.Write(b)
}

// Flush is for handlers that do not use an http.ResponseController.
func (r *recorder) Flush() { _ = r.FlushError() }

// FlushError is for http.ResponseController.
func (r *recorder) FlushError() error {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	return http.NewResponseController(r.ResponseWriter).Flush()
}

// Hijack is for handlers that do not use an http.ResponseController, such as those of websockets.
func (r *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffer, err := http.NewResponseController(r.ResponseWriter).Hijack()
	if err == nil && r.status == 0 {
		r.status = http.StatusSwitchingProtocols
	}
	return conn, buffer, err
}

// Unwrap is for http.ResponseController.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// final is the status for RefundIf.
func (r *recorder) final(ctx context.Context) int {
	switch {
	case !r.returned && r.status < 400:
		return http.StatusInternalServerError // nothing of it may have been sent
	case r.status != 0:
		return r.status
	case ctx.Err() != nil:
		return statusClientClosed
	}
	return http.StatusOK
}

// statusClientClosed is what nginx logs for a client that did not wait for the answer.
const statusClientClosed = 499
