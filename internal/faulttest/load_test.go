package faulttest_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/storage"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// patient is for tests of what is decided, which must not depend on how fast the machine is.
const patient = 20 * time.Second

// open returns a storage on the server of a URL, which is closed after the test.
func open(t testing.TB, url string, timeout time.Duration) *redisstore.Storage {
	t.Helper()
	s, err := redisstore.Open(url, &redisstore.Options{Timeout: timeout})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close()) })
	return s
}

// stubborn returns a client that tries again, soon and often.
func stubborn(t testing.TB, addr string) *goredis.Client {
	t.Helper()
	c := goredis.NewClient(&goredis.Options{Addr: addr, MaxRetries: 5, MinRetryBackoff: time.Millisecond, MaxRetryBackoff: time.Millisecond, DialerRetries: 1})
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	return c
}

// on returns a storage on the client, which is closed after the test.
func on(t testing.TB, c *goredis.Client, timeout time.Duration) *redisstore.Storage {
	t.Helper()
	s := redisstore.New(c, &redisstore.Options{Timeout: timeout})
	t.Cleanup(func() { assert.NoError(t, s.Close()) })
	return s
}

// hourly asks for one token of n an hour.
func hourly(t testing.TB, id string, n int64) storage.Request {
	t.Helper()
	r, faults := storage.NewRule("hourly", storage.Replenish, time.Hour, n, n)
	require.NoError(t, errors.Join(faults...))
	return storage.Request{Part: storage.NewPart(id, []storage.Rule{r}, 1)}
}

// spent is how many tokens are out.
func spent(t testing.TB, s storage.Storage, r storage.Request) int64 {
	t.Helper()
	r.Mode, r.Part = storage.Peek, storage.NewPart(r.Part.Identifier, r.Part.Rules, 0)
	v, err := s.Decide(t.Context(), r)
	require.NoError(t, err)
	return r.Part.Rules[0].Capacity - v.Count(0).Remaining
}

// crowd runs f in n goroutines, and waits for them.
func crowd(n int, f func(i int)) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { f(i) })
	}
	all.Wait()
}

// told counts what callers were told.
type told struct{ admitted, denied, failed atomic.Int64 }

func (c *told) ask(s storage.Storage, r storage.Request) error {
	v, err := s.Decide(context.Background(), r)
	switch {
	case err != nil:
		c.failed.Add(1)
	case v.Allowed:
		c.admitted.Add(1)
	default:
		c.denied.Add(1)
	}
	return err
}

// assertAccount holds what was taken to what callers were told: what failed was taken once, or not.
func (c *told) assertAccount(t testing.TB, taken, limit int64) {
	t.Helper()
	assert.GreaterOrEqual(t, taken, c.admitted.Load(), "something was admitted and not taken")
	assert.LessOrEqual(t, taken, c.admitted.Load()+c.failed.Load(), "something was taken twice")
	assert.LessOrEqual(t, c.admitted.Load(), limit, "more than the limit was admitted")
}

// assertExact has 50 goroutines take of 300 tokens, and holds the storage to exactly that.
func assertExact(t testing.TB, s storage.Storage, id string) {
	t.Helper()
	const limit = 300
	var c told
	r := hourly(t, id, limit)
	crowd(50, func(int) {
		for range 8 {
			assert.NoError(t, c.ask(s, r))
		}
	})
	assert.Equal(t, int64(limit), c.admitted.Load(), "admitted")
	assert.Equal(t, int64(100), c.denied.Load(), "denied")
	assert.Equal(t, int64(limit), spent(t, s, r), "taken")
}

// assertUnderFire has 50 goroutines ask for two seconds, in which harm is done again and again, of one
// identifier that all share and one of their own, and holds the storage to its accounts.
func assertUnderFire(t *testing.T, s storage.Storage, harm func()) {
	t.Helper()
	var shared told
	var own [50]told
	hot, mine := hourly(t, "shared", 1000), func(i int) storage.Request { return hourly(t, fmt.Sprint("own-", i), 1<<40) }
	end := time.Now().Add(2 * time.Second)
	var fire sync.WaitGroup
	harms := 0
	fire.Go(func() {
		for ; time.Now().Before(end); harms++ {
			harm()
		}
	})
	crowd(len(own), func(i int) {
		for r := mine(i); time.Now().Before(end); {
			_, _ = shared.ask(s, hot), own[i].ask(s, r)
		}
	})
	fire.Wait()
	lost := spent(t, s, hot) - shared.admitted.Load()
	shared.assertAccount(t, spent(t, s, hot), 1000)
	failed := int64(0)
	for i := range own {
		taken := spent(t, s, mine(i))
		own[i].assertAccount(t, taken, 1<<40)
		failed += own[i].failed.Load()
		lost += taken - own[i].admitted.Load()
	}
	t.Logf("harmed %d times; %d calls failed, of which %d had taken", harms, failed+shared.failed.Load(), lost)
	assert.Positive(t, failed, "no call noticed")
	assert.Positive(t, shared.admitted.Load(), "no call was admitted")
}

// recovery calls try until it succeeds, and returns how long that took.
func recovery(t testing.TB, within time.Duration, try func() error) time.Duration {
	t.Helper()
	began := time.Now()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		took := time.Since(began)
		if err == nil {
			return took
		}
		require.Less(t, took, within, "it still fails: %v", err)
		<-tick.C
	}
}

// assertBackAfter makes calls, and holds them to the time after which they must return: half of them to
// 50 ms more, ten times the promise, and all of them to a second, on a machine that does other things too.
func assertBackAfter(t testing.TB, limit time.Duration, call func()) {
	t.Helper()
	var took []time.Duration
	for range 7 {
		began := time.Now()
		call()
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	t.Logf("after %v: median %v, longest %v", limit, took[len(took)/2], took[len(took)-1])
	assert.GreaterOrEqual(t, took[0], limit-5*time.Millisecond, "a call gave up early")
	assert.Less(t, took[len(took)/2], limit+50*time.Millisecond, "calls outlast their time")
	assert.Less(t, took[len(took)-1], limit+time.Second, "a call hung")
}
