package redis

import (
	"context"
	"errors"
	"net"
	"time"

	goredis "github.com/redis/go-redis/v9"
)

// refusal is the reason why a server could not be reached.
type refusal struct {
	err   error
	until time.Time // errors of calls include err until then
}

// redials reports whether the client repeats a dial that failed: by default go-redis dials five times within half a
// second. It returns the error only after the last attempt, when the callers have already given up.
func (s *Storage) redials() bool {
	switch c := s.client.(type) {
	case *goredis.Client:
		return c.Options().DialerRetries > 1
	case *goredis.ClusterClient:
		return c.Options().DialerRetries > 1
	}
	return false
}

// sendTo returns the function that sends a batch to the server at an address, "" without a cluster. If the client would
// return the cause of a failure too late, each batch is accompanied by a probe.
func (s *Storage) sendTo(address string) func(context.Context, []*call) {
	if !s.redials() {
		return s.sendBatch
	}
	return func(ctx context.Context, calls []*call) {
		defer s.probeLater(s.options.Timeout, address)()
		s.sendBatch(ctx, calls)
	}
}

// probeLater dials once when half of Options.Timeout has passed, so that the cause is known before the callers give up.
// It returns the function that cancels the probe. Errors of calls include the result for as long as told.
func (s *Storage) probeLater(told time.Duration, addresses ...string) (stop func() bool) {
	return time.AfterFunc(s.options.Timeout/2, func() { s.probe(told, addresses) }).Stop
}

// probe sets refused if none of the addresses can be reached. A dial that got no answer in time is not recorded: it
// tells the callers nothing new, and its error would look like the end of their contexts.
func (s *Storage) probe(told time.Duration, addresses []string) {
	defer func() { _ = recover() }() // a Dialer of the user may panic
	ctx, cancel := context.WithTimeout(context.Background(), s.options.Timeout/2)
	defer cancel()
	var failed error
	for _, address := range addresses {
		conn, err := s.dialOnce(ctx, address)
		switch {
		case err == nil:
			_ = conn.Close()
			return
		case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
			return
		}
		failed = err
	}
	s.refused.Store(&refusal{failed, time.Now().Add(told)})
}

// dialOnce dials as the client does, but without its retries. The address is used only in a cluster.
func (s *Storage) dialOnce(ctx context.Context, address string) (net.Conn, error) {
	if s.cluster == nil {
		o := s.client.(*goredis.Client).Options()
		return o.Dialer(ctx, o.Network, o.Addr)
	}
	o := s.cluster.Options()
	dial := o.Dialer
	if dial == nil {
		dial = goredis.NewDialer(&goredis.Options{DialTimeout: s.options.Timeout, TLSConfig: o.TLSConfig})
	}
	return dial(ctx, "tcp", address)
}
