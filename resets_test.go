package throttler_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
	memstore "github.com/go-throttler/throttler/storage/runtime"
)

// late is a storage that does at once what it is asked, but answers later.
type late struct {
	*memstore.Storage
	takes, resets, charges atomic.Int64 // in nanoseconds
}

func (s *late) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	after := time.After(time.Duration(s.takes.Load()))
	err := s.Storage.Decide(ctx, r, a)
	<-after
	return err
}

func (s *late) Reset(ctx context.Context, name, id string) error {
	err := s.Storage.Reset(ctx, name, id)
	<-time.After(time.Duration(s.resets.Load()))
	return err
}

func (s *late) Charge(ctx context.Context, c *storage.Charge) error {
	err := s.Storage.Charge(ctx, c)
	<-time.After(time.Duration(s.charges.Load()))
	return err
}

// oneInTenSeconds returns a Throttler whose callers have to reserve, over a storage whose answers can be delayed.
func oneInTenSeconds(t *testing.T, mostWaiters int) (*throttler.Throttler, *late) {
	t.Helper()
	store := &late{Storage: memstore.New(nil)}
	th, err := throttler.New(throttler.Config{Storage: store, MaxWaiters: mostWaiters, Buckets: []throttler.Bucket{throttler.NewBucket(10*time.Second, 1).Continuous()}})
	require.NoError(t, err)
	return th, store
}

// inTenSeconds runs a test in virtual time, with a Throttler of oneInTenSeconds and a log of those who wait.
func inTenSeconds(t *testing.T, test func(t *testing.T, th *throttler.Throttler, store *late, w *waits)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, store := oneInTenSeconds(t, 0)
		test(t, th, store, &waits{start: time.Now()})
	})
}

func TestAReservationAnsweredAfterAResetVoidsNobodyElses(t *testing.T) {
	inTenSeconds(t, func(t *testing.T, th *throttler.Throttler, store *late, w *waits) {
		for range 3 {
			w.begin(t.Context(), th, "a", "a")
		}
		store.takes.Store(int64(time.Second))
		w.begin(t.Context(), th, "a", "a")
		store.takes.Store(0)
		require.NoError(t, th.Reset(t.Context(), "a"))
		<-time.After(time.Minute)
		assert.Equal(t, []string{"a ok at 0s", "a ok at 0s", "a ok at 10s", "a ok at 20s"}, w.said())
	})
}

func TestAResetOfWhichTheNewsComesLateVoidsNoLaterReservation(t *testing.T) {
	inTenSeconds(t, func(t *testing.T, th *throttler.Throttler, store *late, w *waits) {
		for range 4 {
			w.begin(t.Context(), th, "a", "a")
		}
		store.resets.Store(int64(2500 * time.Millisecond))
		require.NoError(t, th.Reset(t.Context(), "a"))
		<-time.After(time.Minute)
		assert.Equal(t, []string{"a ok at 0s", "a ok at 2.5s", "a ok at 12.5s", "a ok at 22.5s"}, w.said())
	})
}

func TestAResetOfOneIdentifierVoidsWhatIsReservedTogetherWithOthers(t *testing.T) {
	inTenSeconds(t, func(t *testing.T, th *throttler.Throttler, _ *late, w *waits) {
		_, err := th.Consume("b")
		require.NoError(t, err)
		for range 3 {
			go func() {
				_, err := th.WaitAll(t.Context(), throttler.For("a", throttler.Cost(0)), throttler.For("b"))
				w.note("a", err)
			}()
			synctest.Wait()
		}
		<-time.After(500 * time.Millisecond)
		require.NoError(t, th.Reset(t.Context(), "b"))
		<-time.After(time.Minute)
		assert.Equal(t, []string{"a ok at 500ms", "a ok at 10.5s", "a ok at 20.5s"}, w.said())
	})
}

func TestTwoResetsAtATimeVoidNoLaterReservation(t *testing.T) {
	inTenSeconds(t, func(t *testing.T, th *throttler.Throttler, store *late, w *waits) {
		for range 4 {
			w.begin(t.Context(), th, "a", "a")
		}
		store.resets.Store(int64(900 * time.Millisecond))
		go func() { assert.NoError(t, th.Reset(t.Context(), "a")) }()
		<-time.After(100 * time.Millisecond)
		store.resets.Store(0)
		require.NoError(t, th.Reset(t.Context(), "a"))
		<-time.After(time.Minute)
		assert.Equal(t, []string{"a ok at 0s", "a ok at 900ms", "a ok at 10.9s", "a ok at 20.9s"}, w.said())
	})
}

func TestAResetCountsHoweverManyOthersFollow(t *testing.T) {
	inTenSeconds(t, func(t *testing.T, th *throttler.Throttler, store *late, w *waits) {
		w.begin(t.Context(), th, "a", "a")
		store.takes.Store(int64(time.Second))
		w.begin(t.Context(), th, "a", "a")
		store.takes.Store(0)
		require.NoError(t, th.Reset(t.Context(), "a"))
		for i := range 2000 { // more than are remembered
			require.NoError(t, th.Reset(t.Context(), fmt.Sprint("b", i)))
		}
		<-time.After(time.Minute)
		assert.Equal(t, []string{"a ok at 0s", "a ok at 1s"}, w.said())
	})
}

func TestResetsOfOthersNeitherVoidNorDelayAReservation(t *testing.T) {
	inTenSeconds(t, func(t *testing.T, th *throttler.Throttler, store *late, w *waits) {
		w.begin(t.Context(), th, "a", "a")
		store.takes.Store(int64(time.Second))
		w.begin(t.Context(), th, "a", "a")
		for i := range 1000 {
			require.NoError(t, th.Reset(t.Context(), fmt.Sprint("b", i)))
		}
		store.resets.Store(int64(time.Minute))
		for i := range 1000 {
			go func() { assert.NoError(t, th.Reset(t.Context(), fmt.Sprint("b", i))) }()
		}
		w.begin(t.Context(), th, "a", "a")
		<-time.After(2 * time.Minute)
		assert.Equal(t, []string{"a ok at 0s", "a ok at 10s", "a ok at 20s"}, w.said())
	})
}

func TestAResetThatFailsVoidsNothing(t *testing.T) {
	inTenSeconds(t, func(t *testing.T, th *throttler.Throttler, _ *late, w *waits) {
		for i := range 3 {
			w.begin(t.Context(), th, "a", i)
		}
		ended, end := context.WithCancel(t.Context())
		end()
		require.ErrorIs(t, th.Reset(ended, "a"), context.Canceled)
		<-time.After(time.Minute)
		assert.Equal(t, []string{"0 ok at 0s", "1 ok at 10s", "2 ok at 20s"}, w.said())
	})
}

func TestNobodyGivesBackWhatAResetHasForgotten(t *testing.T) {
	t.Parallel()
	for _, all := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			th, store := oneInTenSeconds(t, 0)
			require.True(t, allowed(t, th, "b"))
			var leave [2]func()
			for i := range leave {
				ctx, cancel := context.WithCancel(t.Context())
				leave[i] = cancel
				go func() {
					if all {
						_, _ = th.WaitAll(ctx, throttler.For("a", throttler.Cost(0)), throttler.For("b"))
					} else {
						_, _ = th.Wait(ctx, "b")
					}
				}()
				synctest.Wait()
			}
			store.charges.Store(int64(time.Second))
			leave[0]() // gives back, and after that what the second leaves behind
			synctest.Wait()
			leave[1]()
			synctest.Wait()
			require.NoError(t, th.Reset(t.Context(), "b"))
			assert.True(t, allowed(t, th, "b"))
			<-time.After(3 * time.Second)
			assert.False(t, allowed(t, th, "b"), all)
		})
	}
}

func TestNobodyGivesBackDuringAReset(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, store := oneInTenSeconds(t, 0)
		require.True(t, allowed(t, th, "a"))
		w := &waits{start: time.Now()}
		ctx, leave := context.WithCancel(t.Context())
		w.begin(ctx, th, "a", 0)
		store.resets.Store(int64(8 * time.Second))
		go func() { assert.NoError(t, th.Reset(t.Context(), "a")) }()
		synctest.Wait()
		assert.True(t, allowed(t, th, "a"))
		leave()
		assert.Equal(t, []string{"0 left at 0s"}, w.said())
		assert.False(t, allowed(t, th, "a"))
		<-time.After(8 * time.Second)
	})
}

func TestTheOneWaiterTooManyDoesNotGiveBackWhatAResetHasForgotten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, store := oneInTenSeconds(t, 1)
		require.True(t, allowed(t, th, "a"))
		store.takes.Store(int64(time.Second))
		w := &waits{start: time.Now()}
		w.begin(t.Context(), th, "a", "a")
		w.begin(t.Context(), th, "a", "a")
		store.takes.Store(0)
		require.NoError(t, th.Reset(t.Context(), "a"))
		assert.True(t, allowed(t, th, "a"))
		<-time.After(1500 * time.Millisecond)
		v, err := th.Reserve(t.Context(), "a", time.Hour)
		require.NoError(t, err)
		assert.Equal(t, 18500*time.Millisecond, v.Delay, "after the one that waits")
		<-time.After(time.Minute)
		assert.Equal(t, []string{"a left at 1s", "a ok at 10s"}, w.said())
	})
}

func TestAResetThatHangsHoldsNobodyBackWhoseContextEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, store := oneInTenSeconds(t, 0)
		require.True(t, allowed(t, th, "a"))
		w := &waits{start: time.Now()}
		ctx, leave := context.WithCancel(t.Context())
		w.begin(ctx, th, "a", "reserved")
		store.resets.Store(int64(4 * time.Second))
		go func() { assert.NoError(t, th.Reset(t.Context(), "a")) }()
		synctest.Wait()
		inTime, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		w.begin(inTime, th, "a", "new")
		leave()
		assert.Equal(t, []string{"reserved left at 0s"}, w.said())
		<-time.After(10 * time.Second)
		assert.Equal(t, []string{"reserved left at 0s", "new left at 200ms"}, w.said())
	})
}

func TestAWaitThatFailsNeverComesWithAnAllowedVerdict(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(context.Context, *throttler.Throttler) error{
		"reset": func(ctx context.Context, th *throttler.Throttler) error { return th.Reset(ctx, "a") },
		"added": func(_ context.Context, th *throttler.Throttler) error {
			return th.AddBucket("a", throttler.NewBucket(10*time.Second, 1).Continuous(), throttler.NewBucket(time.Hour, 100).Continuous())
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			th, _ := oneInTenSeconds(t, 0)
			require.True(t, allowed(t, th, "a"))
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			got := make(chan throttler.Verdict, 1)
			go func() {
				v, err := th.Wait(ctx, "a")
				assert.ErrorIs(t, err, context.Canceled)
				got <- v
			}()
			synctest.Wait()
			for range 5 { // a queue, which the waiter joins when it asks again
				go func() { _, _ = th.Wait(t.Context(), "a", throttler.AtMost(1)) }()
				synctest.Wait()
			}
			require.NoError(t, change(t.Context(), th))
			synctest.Wait()
			leave()
			v := <-got
			assert.False(t, v.Allowed, name)
			assert.Zero(t, v.Delay, name)
			<-time.After(10 * time.Minute)
		})
	}
}
