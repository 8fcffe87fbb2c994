package redis

import (
	"context"
	"errors"
	"net"
	"time"

	goredis "github.com/redis/go-redis/v9"
)

// refusal is why a server could not be reached.
type refusal struct {
	err   error
	until time.Time // then it is out of date
}

// redials says that the client dials again after an error, by default five times within half a second. It tells
// the error after the last time, when the callers have gone.
func (s *Storage) redials() bool {
	switch c := s.client.(type) {
	case *goredis.Client:
		return c.Options().DialerRetries > 1
	case *goredis.ClusterClient:
		return c.Options().DialerRetries > 1
	}
	return false
}

// sendTo is sendBatch to the server with an address, which is empty when there is only one.
func (s *Storage) sendTo(address string) func(context.Context, []*call) {
	if !s.redials() {
		return s.sendBatch
	}
	return func(ctx context.Context, calls []*call) {
		defer s.probeLater(s.options.Timeout, address)()
		s.sendBatch(ctx, calls)
	}
}

// probeLater dials for once when half of the time for a call is over, so that the error is known before the callers
// go. It returns what calls it off. What it finds out is told for so long.
func (s *Storage) probeLater(told time.Duration, addresses ...string) (stop func() bool) {
	return time.AfterFunc(s.options.Timeout/2, func() { s.probe(told, addresses) }).Stop
}

// probe remembers why none of the addresses can be reached. That no answer came in time says no more than the callers
// know, and must not look like the end of their contexts.
func (s *Storage) probe(told time.Duration, addresses []string) {
	defer func() { _ = recover() }() // of a Dialer that is the caller's
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
