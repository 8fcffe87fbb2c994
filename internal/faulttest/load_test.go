package faulttest_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// open returns a storage on the server of a URL, which is closed after the test.
func open(t testing.TB, url string, timeout time.Duration) *redisstore.Storage {
	t.Helper()
	s, err := redisstore.Open(url, &redisstore.Options{Timeout: timeout})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close(context.Background())) })
	return s
}

// stubborn returns a client that retries soon and often.
func stubborn(t testing.TB, addr string) *goredis.Client {
	t.Helper()
	c := goredis.NewClient(&goredis.Options{Addr: addr, MaxRetries: 5, MinRetryBackoff: time.Millisecond, MaxRetryBackoff: time.Millisecond, DialerRetries: 1})
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	return c
}

// on returns a storage on the client, which is closed after the test.
func on(t testing.TB, c *goredis.Client, timeout time.Duration) *redisstore.Storage {
	t.Helper()
	s, err := redisstore.New(c, &redisstore.Options{Timeout: timeout})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close(context.Background())) })
	return s
}

// assertExact asserts that 50 goroutines, which make 400 calls, get exactly 300 tokens.
func assertExact(t testing.TB, s storage.Storage, id string) {
	t.Helper()
	const limit = 300
	var c storecheck.Told
	r := storecheck.Hourly(t, id, limit)
	storecheck.Crowd(50, func(int) {
		for range 8 {
			assert.NoError(t, c.Ask(s, r))
		}
	})
	assert.Equal(t, int64(limit), c.Admitted.Load(), "admitted")
	assert.Equal(t, int64(100), c.Denied.Load(), "denied")
	assert.Equal(t, int64(limit), storecheck.Spent(t, s, r), "taken")
}

// assertUnderFire calls harm again and again for two seconds, while 50 goroutines ask for a shared identifier and
// each for one of its own. It asserts that what was taken agrees with the answers.
func assertUnderFire(t *testing.T, s storage.Storage, harm func()) {
	t.Helper()
	var shared storecheck.Told
	var own [50]storecheck.Told
	hot, mine := storecheck.Hourly(t, "shared", 1000), func(i int) storecheck.Request { return storecheck.Hourly(t, fmt.Sprint("own-", i), 1<<40) }
	end := time.Now().Add(2 * time.Second)
	var fire sync.WaitGroup
	harms := 0
	fire.Go(func() {
		for ; time.Now().Before(end); harms++ {
			harm()
		}
	})
	storecheck.Crowd(len(own), func(i int) {
		for r := mine(i); time.Now().Before(end); {
			_, _ = shared.Ask(s, hot), own[i].Ask(s, r)
		}
	})
	fire.Wait()
	lost, failed := shared.AssertAccount(t, s, hot), int64(0)
	for i := range own {
		lost += own[i].AssertAccount(t, s, mine(i))
		failed += own[i].Failed.Load()
	}
	t.Logf("harmed %d times; %d calls failed, of which %d had taken", harms, failed+shared.Failed.Load(), lost)
	assert.Positive(t, failed, "no call noticed")
	assert.Positive(t, shared.Admitted.Load(), "no call was admitted")
}
