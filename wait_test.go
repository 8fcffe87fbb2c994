package throttler_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
)

// leaky is one call each 100 ms.
func leaky(t *testing.T) *throttler.Throttler {
	t.Helper()
	th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 10).Continuous().Burst(1)}})
	require.NoError(t, err)
	return th
}

func TestWaitPacesCallersAtTheRefillRateInTheOrderOfTheirArrival(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, start := leaky(t), time.Now()
		var mu sync.Mutex
		var order []string
		for i := range 10 {
			go func() {
				_, err := th.Wait(t.Context(), "printer")
				assert.NoError(t, err)
				mu.Lock()
				defer mu.Unlock()
				order = append(order, fmt.Sprint(i, " at ", time.Since(start)))
			}()
			synctest.Wait()
		}
		<-time.After(time.Second)
		synctest.Wait()
		assert.Equal(t, []string{
			"0 at 0s", "1 at 100ms", "2 at 200ms", "3 at 300ms", "4 at 400ms", "5 at 500ms", "6 at 600ms", "7 at 700ms", "8 at 800ms", "9 at 900ms",
		}, order)
	})
}

func TestWaitGivesUpAtOnceWhenTheDeadlineIsNearerThanRetryAfter(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th := leaky(t)
		require.True(t, allowed(t, th, "a"))
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 99*time.Millisecond)
		defer cancel()
		v, err := th.Wait(ctx, "a")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.False(t, v.Allowed)
		assert.Equal(t, 100*time.Millisecond, v.RetryAfter)
		assert.Zero(t, time.Since(start))

		go func() { _, _ = th.Wait(t.Context(), "a") }()
		synctest.Wait()
		v, err = th.Wait(ctx, "a")
		require.ErrorIs(t, err, context.DeadlineExceeded, "behind another, too")
		assert.False(t, v.Allowed)
		assert.Zero(t, time.Since(start))
		<-time.After(100 * time.Millisecond)
	})
}

func TestAWaiterThatLeavesBlocksNobody(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, start := leaky(t), time.Now()
		require.True(t, allowed(t, th, "a"))
		first, leaveFirst := context.WithCancel(t.Context())
		second, leaveSecond := context.WithCancel(t.Context())
		failed := make(chan error, 2)
		for _, ctx := range []context.Context{first, second} {
			go func() {
				v, err := th.Wait(ctx, "a")
				assert.False(t, v.Allowed)
				failed <- err
			}()
			synctest.Wait()
		}
		admitted := make(chan time.Duration, 1)
		go func() {
			_, err := th.Wait(t.Context(), "a")
			assert.NoError(t, err)
			admitted <- time.Since(start)
		}()
		synctest.Wait()
		<-time.After(10 * time.Millisecond)
		leaveSecond()
		leaveFirst()
		require.ErrorIs(t, <-failed, context.Canceled)
		require.ErrorIs(t, <-failed, context.Canceled)
		assert.Equal(t, 100*time.Millisecond, <-admitted)
	})
}

func TestWaitersOfDifferentIdentifiersDoNotWaitForEachOther(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, start := leaky(t), time.Now()
		require.True(t, allowed(t, th, "a"))
		go func() { _, _ = th.Wait(t.Context(), "a") }()
		synctest.Wait()
		_, err := th.Wait(t.Context(), "b")
		require.NoError(t, err)
		assert.Zero(t, time.Since(start))
		<-time.After(100 * time.Millisecond)
	})
}

func TestWaitWaitsByTheInjectedClock(t *testing.T) {
	t.Parallel()
	mock := clock.NewMock()
	th, err := throttler.New(throttler.Config{Clock: mock, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1)}})
	require.NoError(t, err)
	require.True(t, allowed(t, th, "a"))
	ctx, cancel := mock.WithTimeout(t.Context(), 59*time.Minute)
	defer cancel()
	_, err = th.Wait(ctx, "a")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	done := make(chan error)
	go func() {
		_, err := th.Wait(t.Context(), "a")
		done <- err
	}()
	for {
		select {
		case err := <-done:
			require.NoError(t, err)
			assert.False(t, mock.Now().Before(time.Unix(3600, 0)))
			return
		default:
			mock.Add(time.Minute)
		}
	}
}
