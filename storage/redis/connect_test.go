package redis_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// assertRefused asserts that calls fail in time, and that the error has the cause. One call in three must have it,
// because on a busy machine the probe may be late.
func assertRefused(t *testing.T, s *redisstore.Storage) {
	t.Helper()
	var err error
	for range 3 {
		took := storecheck.Timed(1, func() { _, err = storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, "a")) })
		assert.Less(t, took[0], prompt.Timeout+time.Second)
		assert.ErrorIs(t, err, storage.ErrUnavailable)
		if errors.Is(err, syscall.ECONNREFUSED) {
			return
		}
	}
	assert.ErrorIs(t, err, syscall.ECONNREFUSED)
}

func TestARefusedConnectionIsTheCauseForAnyClient(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]goredis.UniversalClient{
		"client":         goredis.NewClient(&goredis.Options{Addr: "127.0.0.1:1"}),
		"cluster client": goredis.NewClusterClient(&goredis.ClusterOptions{Addrs: []string{"127.0.0.1:1", "127.0.0.1:2"}}),
		"of one dial":    goredis.NewClient(&goredis.Options{Addr: "127.0.0.1:1", DialerRetries: 1}),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := on(t, c, prompt)
			assertRefused(t, s)
			assertRefused(t, s)
			assert.NoError(t, s.Close(context.Background()))
			assert.NoError(t, c.Close())
		})
	}
}

func TestARefusedConnectionIsTheCauseAfterItWorked(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	c := client(t, server.URL())
	s := on(t, c, prompt)
	t.Cleanup(func() { assert.NoError(t, s.Close(context.Background())) })
	require.Equal(t, 1, storecheck.Take(t, s, storecheck.FivePerHour(t, "a"), 1))
	require.NoError(t, server.Kill())
	assertRefused(t, s)
}

// link forwards connections to a server. It can forget its present connections, like a NAT: then nothing passes through
// them any more, and neither end is told.
type link struct {
	net.Listener
	server string
	age    atomic.Int64 // how often it has forgotten
	conns  sync.WaitGroup
}

func newLink(t *testing.T, server string) *link {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	l := &link{Listener: listener, server: server}
	l.conns.Go(l.accept)
	t.Cleanup(func() {
		assert.NoError(t, l.Close())
		l.conns.Wait()
	})
	return l
}

func (l *link) accept() {
	for {
		near, err := l.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("tcp", l.server)
		if err != nil {
			_ = near.Close()
			continue
		}
		born := l.age.Load()
		pass := func(to, from net.Conn) {
			_, _ = io.Copy(writer(func(b []byte) (int, error) {
				if l.age.Load() != born {
					return len(b), nil
				}
				return to.Write(b)
			}), from)
			_ = to.Close()
		}
		l.conns.Go(func() { pass(far, near) })
		l.conns.Go(func() { pass(near, far) })
	}
}

type writer func([]byte) (int, error)

func (w writer) Write(b []byte) (int, error) { return w(b) }

func TestAConnectionThatWasIdleForTooLongIsNotUsedAgain(t *testing.T) {
	t.Parallel()
	l := newLink(t, servers.Redis(t).Addr())
	s := open(t, "redis://"+l.Addr().String()+"?conn_max_idle_time=1ms", redisstore.Options{})
	r := storecheck.Hourly(t, "idle", 100)
	for range 3 {
		require.Equal(t, 1, storecheck.Take(t, s, r, 1))
		l.age.Add(1)
		idle := time.Now()
		storecheck.Until(t, "the connection is not idle for long enough", func() bool { return time.Since(idle) > 100*time.Millisecond }) // go-redis looks at its clock every 50 ms
	}
}

func TestOpenLimitsTheIdleTimeUnlessTheURLDoes(t *testing.T) {
	t.Parallel()
	for url, want := range map[string]time.Duration{
		"redis://127.0.0.1":                                        3 * time.Minute,
		"redis://127.0.0.1?addr=127.0.0.1:1":                       3 * time.Minute,
		"redis://127.0.0.1?master_name=main":                       3 * time.Minute,
		"redis://127.0.0.1?idle_timeout=7s":                        7 * time.Second,
		"redis://127.0.0.1?conn_max_idle_time=1h":                  time.Hour,
		"redis://127.0.0.1?conn_max_idle_time=0":                   -1,
		"redis://127.0.0.1?master_name=main&conn_max_idle_time=1m": time.Minute,
	} {
		s := open(t, url, redisstore.Options{})
		switch c := s.Client().(type) {
		case *goredis.Client:
			assert.Equal(t, want, c.Options().ConnMaxIdleTime, url)
		case *goredis.ClusterClient:
			assert.Equal(t, want, c.Options().ConnMaxIdleTime, url)
		}
	}
}

func TestTheErrorOfACallDoesNotTellThePassword(t *testing.T) {
	t.Parallel()
	old := servers.Redis(t, "--rename-command", "AUTH", "", "--rename-command", "HELLO", "")
	locked := servers.Redis(t, "--requirepass", "another")
	for _, addr := range []string{old.Addr(), locked.Addr(), "127.0.0.1:1"} {
		for _, user := range []string{"", "user"} {
			for _, more := range []string{"", "?addr=127.0.0.1:1", "?master_name=main&username=user&password=hunter2"} {
				s := open(t, "redis://"+user+":hunter2@"+addr+more, redisstore.Options{})
				for name, call := range allCalls {
					_, err := call(t.Context(), s, storecheck.FivePerHour(t, "a"))
					if assert.ErrorIs(t, err, storage.ErrUnavailable, name) {
						assert.NotContains(t, err.Error(), "hunter2", "%s of %s%s", name, addr, more)
					}
				}
			}
		}
	}
}
