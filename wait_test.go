package throttler_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
	memstore "github.com/go-throttler/throttler/storage/runtime"
)

// leaky returns a Throttler that admits one call per 100 ms.
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

func TestWhoWaitsAcrossThrottlersIsAdmittedInTheOrderOfArrival(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memstore.New(nil)
		var all []*throttler.Throttler
		for range 3 {
			th, err := throttler.New(throttler.Config{Storage: store, Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 10).Continuous().Burst(1)}})
			require.NoError(t, err)
			all = append(all, th)
		}
		w := &waits{start: time.Now()}
		for i := range 9 {
			w.begin(t.Context(), all[i*i%3], "a", i)
		}
		<-time.After(time.Second)
		assert.Equal(t, []string{
			"0 ok at 0s", "1 ok at 100ms", "2 ok at 200ms", "3 ok at 300ms", "4 ok at 400ms", "5 ok at 500ms", "6 ok at 600ms", "7 ok at 700ms", "8 ok at 800ms",
		}, w.said())
	})
}

func TestWhoLeavesLetsThoseBehindMoveUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, w := leaky(t), &waits{start: time.Now()}
		ctx, leave := context.WithCancel(t.Context())
		w.begin(t.Context(), th, "a", "first")
		w.begin(ctx, th, "a", "leaver")
		w.begin(t.Context(), th, "a", "second")
		w.begin(ctx, th, "a", "leaver")
		w.begin(t.Context(), th, "a", "third")
		<-time.After(50 * time.Millisecond)
		leave()
		synctest.Wait()
		w.begin(t.Context(), th, "a", "fourth")
		<-time.After(time.Second)
		assert.Equal(t, []string{"first ok at 0s", "leaver left at 50ms", "leaver left at 50ms", "second ok at 100ms", "third ok at 200ms", "fourth ok at 300ms"}, w.said())
	})
}

func TestAResetAndARaisedLimitCountAtOnceForThoseWhoWait(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		bucket throttler.Bucket
		change func(t *testing.T, th *throttler.Throttler)
	}{
		"continuous, reset": {throttler.NewBucket(time.Hour, 1).Continuous().Named("b"), func(t *testing.T, th *throttler.Throttler) {
			require.NoError(t, th.Reset(t.Context(), "a"))
		}},
		"continuous, raised": {throttler.NewBucket(time.Hour, 1).Continuous().Named("b"), func(t *testing.T, th *throttler.Throttler) {
			require.NoError(t, th.AddBucket("a", throttler.NewBucket(time.Hour, 3600_000).Continuous().Burst(10).Named("b")))
		}},
		"replenish, reset": {throttler.NewBucket(time.Hour, 1).Named("b"), func(t *testing.T, th *throttler.Throttler) {
			require.NoError(t, th.Reset(t.Context(), "a"))
		}},
		"replenish, raised": {throttler.NewBucket(time.Hour, 1).Named("b"), func(t *testing.T, th *throttler.Throttler) {
			require.NoError(t, th.AddBucket("a", throttler.NewBucket(time.Hour, 10).Named("b")))
		}},
		"replenish, none left": {throttler.NewBucket(time.Hour, 1).Named("b"), func(t *testing.T, th *throttler.Throttler) {
			require.NoError(t, th.AddBucket("a", throttler.NewBucket(time.Hour, 10).Named("c")))
			require.True(t, th.RemoveBucket("a", "c"))
			require.NoError(t, th.Reset(t.Context(), "a"))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{test.bucket}})
				require.NoError(t, err)
				w := &waits{start: time.Now()}
				w.begin(t.Context(), th, "a", 0)
				w.begin(t.Context(), th, "a", 1)
				<-time.After(10 * time.Second)
				require.Len(t, w.said(), 1)
				test.change(t, th)
				<-time.After(5 * time.Millisecond)
				require.Len(t, w.said(), 2)
			})
		})
	}
}

func TestABucketThatIsNotThereIsRemovedWithoutTroublingThoseWhoWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		th, err := throttler.New(throttler.Config{
			Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 1).Continuous()},
			Observe: func(_ context.Context, e *throttler.Event) { asked.Add(int64(min(e.Attempt, 1))) },
		})
		require.NoError(t, err)
		require.NoError(t, th.AddBucket("own", throttler.NewBucket(time.Minute, 1).Continuous().Named("own")))
		for _, id := range []string{"own", "default"} {
			require.True(t, allowed(t, th, id))
			go func() { _, _ = th.Wait(t.Context(), id) }()
		}
		synctest.Wait()
		before := asked.Load()
		assert.False(t, th.RemoveBucket("own", "another"))
		th.RemoveBuckets("default")
		synctest.Wait()
		assert.Equal(t, before, asked.Load(), "nobody reserves again")
		assert.True(t, th.RemoveBucket("own", "own"))
		synctest.Wait()
		assert.Greater(t, asked.Load(), before)
	})
}

func TestALoweredLimitDoesNotMakeThoseWhoWaitPayTwice(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 10).Continuous().Burst(1).Named("b")}})
		require.NoError(t, err)
		w := &waits{start: time.Now()}
		for i := range 4 {
			w.begin(t.Context(), th, "a", i)
		}
		require.NoError(t, th.AddBucket("a", throttler.NewBucket(time.Second, 1).Continuous().Named("b")))
		<-time.After(time.Minute)
		require.Len(t, w.said(), 4)
		assert.Contains(t, w.last(), "3s", w.said())
	})
}

func TestARefundAndAChargeOfAnotherAreHeardByALine(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memstore.New(nil)
		c := throttler.Config{Storage: store, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 2)}}
		th, err := throttler.New(c)
		require.NoError(t, err)
		other, err := throttler.New(c)
		require.NoError(t, err)
		own, err := th.Consume("a")
		require.NoError(t, err)
		theirs, err := other.Consume("a")
		require.NoError(t, err)
		w := &waits{start: time.Now()}
		w.begin(t.Context(), th, "a", "first")
		w.begin(t.Context(), th, "a", "second")
		<-time.After(100 * time.Millisecond)
		require.NoError(t, th.Refund(t.Context(), own))
		synctest.Wait()
		require.Equal(t, []string{"first ok at 100ms"}, w.said())
		require.NoError(t, other.Refund(t.Context(), theirs))
		<-time.After(time.Second)
		require.Len(t, w.said(), 2, "within a second")
	})
}

func TestARefundOfEitherIdentifierIsHeardByWhoWaitsForBoth(t *testing.T) {
	t.Parallel()
	for _, order := range [][2]int{{0, 1}, {1, 0}} {
		synctest.Test(t, func(t *testing.T) {
			th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 1)}})
			require.NoError(t, err)
			user, err := th.Consume("user")
			require.NoError(t, err)
			org, err := th.Consume("org")
			require.NoError(t, err)
			w := &waits{start: time.Now()}
			go func() {
				_, err := th.WaitAll(t.Context(), throttler.For("user"), throttler.For("org"))
				w.note("both", err)
			}()
			for _, i := range order {
				require.Empty(t, w.said())
				require.NoError(t, th.Refund(t.Context(), [...]throttler.Verdict{user, org}[i]))
			}
			assert.Equal(t, []string{"both ok at 0s"}, w.said())
		})
	}
}

func TestWhatHappensDuringTheFirstDenialIsNotSleptThrough(t *testing.T) {
	t.Parallel()
	for what, happens := range map[string]func(*throttler.Throttler, throttler.Verdict) error{
		"refund": func(th *throttler.Throttler, v throttler.Verdict) error { return th.Refund(context.Background(), v) },
		"reset":  func(th *throttler.Throttler, _ throttler.Verdict) error { return th.Reset(context.Background(), "a") },
		"bucket": func(th *throttler.Throttler, _ throttler.Verdict) error {
			return th.AddBucket("a", throttler.NewBucket(time.Minute, 5))
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			store := &late{Storage: memstore.New(nil)}
			th, err := throttler.New(throttler.Config{Storage: store, Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 1)}})
			require.NoError(t, err)
			v, err := th.Consume("a")
			require.NoError(t, err)
			store.takes.Store(int64(10 * time.Millisecond))
			w := &waits{start: time.Now()}
			w.begin(t.Context(), th, "a", what)
			require.NoError(t, happens(th, v))
			<-time.After(time.Second)
			assert.Equal(t, []string{what + " ok at 20ms"}, w.said(), "its first answer was on the way")
		})
	}
}

func TestAsManyAsThereAreTokensAskTogether(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &slow{Storage: memstore.New(nil), takes: time.Millisecond}
		th, err := throttler.New(throttler.Config{Storage: store, Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 1000)}})
		require.NoError(t, err)
		_, err = th.Consume("a", throttler.Cost(1000))
		require.NoError(t, err)
		w := &waits{start: time.Now()}
		for i := range 1000 {
			go func() {
				_, err := th.Wait(t.Context(), "a")
				w.note(i, err)
			}()
		}
		<-time.After(time.Minute + 10*time.Millisecond)
		synctest.Wait()
		assert.Len(t, w.said(), 1000)
	})
}

func TestALineThatCannotBeOverInTimeIsNotJoined(t *testing.T) {
	t.Parallel()
	for _, b := range []throttler.Bucket{throttler.NewBucket(time.Minute, 2), throttler.NewBucket(time.Minute, 2).FixedWindow(), throttler.NewBucket(time.Minute, 2).Continuous()} {
		t.Run(b.Name(), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{b}})
				require.NoError(t, err)
				_, err = th.Consume("a", throttler.Cost(2))
				require.NoError(t, err)
				w := &waits{start: time.Now()}
				ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
				defer cancel()
				for i := range 20 {
					w.begin(ctx, th, "a", i)
				}
				joined := 0
				for _, l := range w.said() {
					require.Contains(t, l, "left at 0s")
				}
				joined = 20 - len(w.said())
				<-time.After(90 * time.Second)
				synctest.Wait()
				require.Len(t, w.said(), 20)
				in := 0
				for _, l := range w.said() {
					if strings.Contains(l, "ok") {
						in++
					}
				}
				assert.Equal(t, in, joined, "who cannot be admitted in time leaves at once: %v", w.said())
			})
		})
	}
}

func TestADebtIsWaitedForNoLongerThanRetryAfter(t *testing.T) {
	t.Parallel()
	for _, kind := range kinds {
		synctest.Test(t, func(t *testing.T) {
			th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{kind(throttler.NewBucket(time.Minute, 10))}})
			require.NoError(t, err)
			require.NoError(t, th.Charge(t.Context(), "a", throttler.Cost(40)))
			v, err := th.Peek(t.Context(), "a")
			require.NoError(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), v.RetryAfter+time.Second)
			defer cancel()
			start := time.Now()
			_, err = th.Wait(ctx, "a")
			require.NoError(t, err)
			assert.Equal(t, v.RetryAfter, time.Since(start))
		})
	}
}

func TestALineOfCenturiesIsNotJoinedEither(t *testing.T) {
	t.Parallel()
	for _, kind := range kinds {
		synctest.Test(t, func(t *testing.T) {
			th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{kind(throttler.NewBucket(366*24*time.Hour, 1))}})
			require.NoError(t, err)
			require.True(t, allowed(t, th, "a"))
			for range 400 {
				go func() { _, _ = th.Wait(t.Context(), "a") }()
			}
			synctest.Wait()
			w := &waits{start: time.Now()}
			ctx, cancel := context.WithTimeout(t.Context(), 3*366*24*time.Hour)
			defer cancel()
			w.begin(ctx, th, "a", "the last")
			assert.Equal(t, []string{"the last left at 0s"}, w.said())
		})
	}
}

func TestWhoIsNeverAdmittedWaitsForNobodyAndNobodyForIt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 1)}})
		require.NoError(t, err)
		require.True(t, allowed(t, th, "a"))
		w := &waits{start: time.Now()}
		w.begin(t.Context(), th, "a", "first")
		go func() {
			v, err := th.Wait(t.Context(), "a", throttler.Cost(1000))
			assert.ErrorIs(t, err, throttler.ErrCostExceedsCapacity)
			assert.Len(t, v.Levels(), 1)
			_, err = th.Wait(t.Context(), "a", throttler.CostOf("none", 1))
			w.note("wrong", err)
		}()
		require.Equal(t, []string{"wrong left at 0s"}, w.said())
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		w.begin(ctx, th, "a", "behind")
		<-time.After(2 * time.Minute)
		assert.Equal(t, []string{"first ok at 1m0s", "behind ok at 2m0s"}, w.said()[1:])
	})
}

func TestWhomNothingLimitsWaitsForNobody(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, err := throttler.New(throttler.Config{MaxWaiters: 1, Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 1)}})
		require.NoError(t, err)
		require.True(t, allowed(t, th, "a"))
		w := &waits{start: time.Now()}
		w.begin(t.Context(), th, "a", "first")
		go func() {
			v, err := th.Wait(t.Context(), "a", throttler.Using(throttler.Unlimited()), throttler.Cost(5))
			assert.Equal(t, int64(5), v.Tokens())
			w.note("unlimited", err)
		}()
		assert.Equal(t, []string{"unlimited ok at 0s"}, w.said())
	})
}

func TestMoreThanMaxWaitersAreAnError(t *testing.T) {
	t.Parallel()
	for _, b := range []throttler.Bucket{throttler.NewBucket(time.Minute, 1), throttler.NewBucket(time.Minute, 1).Continuous()} {
		t.Run(b.Name(), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				th, err := throttler.New(throttler.Config{MaxWaiters: 2, Buckets: []throttler.Bucket{b}})
				require.NoError(t, err)
				w := &waits{start: time.Now()}
				ctx, cancel := context.WithCancel(t.Context())
				for i := range 3 {
					w.begin(ctx, th, "a", i)
				}
				_, err = th.Wait(t.Context(), "a")
				require.ErrorIs(t, err, throttler.ErrTooManyWaiters)
				_, err = th.WaitAll(t.Context(), throttler.For("b"), throttler.For("a"))
				require.ErrorIs(t, err, throttler.ErrTooManyWaiters)
				_, err = th.Wait(t.Context(), "b")
				require.NoError(t, err)
				cancel()
				synctest.Wait()
				w.begin(t.Context(), th, "a", "next")
				<-time.After(time.Minute)
				assert.Equal(t, "next ok at 1m0s", w.last())
			})
		})
	}
	_, err := throttler.New(throttler.Config{MaxWaiters: -1})
	require.ErrorContains(t, err, "MaxWaiters")
}

func TestWaitAllTakesFromAllOrNone(t *testing.T) {
	t.Parallel()
	for _, b := range []throttler.Bucket{throttler.NewBucket(time.Minute, 1), throttler.NewBucket(time.Minute, 1).Continuous()} {
		t.Run(b.Name(), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{b}})
				require.NoError(t, err)
				require.True(t, allowed(t, th, "org"))
				w := &waits{start: time.Now()}
				go func() {
					v, err := th.WaitAll(t.Context(), throttler.For("user"), throttler.For("org"))
					assert.Len(t, v.Levels(), 2)
					w.note("both", err)
				}()
				<-time.After(2 * time.Minute)
				require.Equal(t, []string{"both ok at 1m0s"}, w.said())
				_, err = th.WaitAll(t.Context())
				require.ErrorIs(t, err, throttler.ErrUnknownIdentifier)
			})
		})
	}
}

func TestADearCallIsNotOvertakenByACheaperOne(t *testing.T) {
	t.Parallel()
	for _, costs := range [][]int64{{5, 6, 3}, {1, 5, 6, 3}, {1, 1, 9, 1, 1, 1}} {
		synctest.Test(t, func(t *testing.T) {
			th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 10)}})
			require.NoError(t, err)
			_, err = th.Consume("a", throttler.Cost(10))
			require.NoError(t, err)
			start, at := time.Now(), make([]time.Duration, len(costs))
			for i, n := range costs {
				go func() {
					_, err := th.Wait(t.Context(), "a", throttler.Cost(n))
					assert.NoError(t, err)
					at[i] = time.Since(start)
				}()
				synctest.Wait()
			}
			<-time.After(time.Minute)
			synctest.Wait()
			assert.True(t, slices.IsSorted(at), "%v were admitted after %v", costs, at)
		})
	}
}

func TestAWaitHasNoDelayAfterwards(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 10).Continuous().Burst(1)}})
		require.NoError(t, err)
		for range 3 {
			v, err := th.Wait(t.Context(), "a")
			require.NoError(t, err)
			assert.Zero(t, v.Delay)
		}
	})
}

func TestAWaitThatIsContentWithLessTakesWhatIsThere(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 10).Continuous()}})
		require.NoError(t, err)
		v, err := th.Wait(t.Context(), "a", throttler.AtMost(100))
		require.NoError(t, err)
		assert.EqualValues(t, 10, v.Tokens())
		start := time.Now()
		v, err = th.Wait(t.Context(), "a", throttler.AtMost(100))
		require.NoError(t, err)
		assert.EqualValues(t, 1, v.Tokens())
		assert.Equal(t, 100*time.Millisecond, time.Since(start))
	})
}

// jumpy is a clock that moves between being read and making a timer.
type jumpy struct {
	*clock.Mock
	by time.Duration
}

func (c *jumpy) After(d time.Duration) <-chan time.Time {
	c.Add(c.by)
	return c.Mock.After(d)
}

func TestAClockThatMovesBeforeTheTimerIsMadeIsNotMissed(t *testing.T) {
	t.Parallel()
	for _, b := range []throttler.Bucket{throttler.NewBucket(time.Minute, 1), throttler.NewBucket(time.Minute, 1).Continuous()} {
		for _, by := range []time.Duration{time.Minute, 10 * time.Second, time.Hour} {
			th, err := throttler.New(throttler.Config{Clock: &jumpy{clock.NewMock(), by}, Buckets: []throttler.Bucket{b}})
			require.NoError(t, err)
			for range 3 {
				_, err = th.Wait(t.Context(), "a")
				require.NoError(t, err)
			}
		}
	}
}

// slow is a storage whose calls take a while. It serves any number of them at the same time.
type slow struct {
	*memstore.Storage
	takes   time.Duration
	charges atomic.Int64
}

func (s *slow) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	<-time.After(s.takes)
	return s.Storage.Decide(ctx, r, a)
}

func (s *slow) Charge(ctx context.Context, c *storage.Charge) error {
	s.charges.Add(1)
	<-time.After(s.takes)
	return s.Storage.Charge(ctx, c)
}

func TestMoreWaitersThanCanReserveAreAllAdmittedInTheirOrder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, w := leaky(t), &waits{start: time.Now()}
		var want []string
		for i := range 60 { // 40 of them reserve
			w.begin(t.Context(), th, "a", i)
			want = append(want, fmt.Sprint(i, " ok at ", time.Duration(i)*100*time.Millisecond))
		}
		<-time.After(10 * time.Second)
		assert.Equal(t, want, w.said())
	})
}

func TestAResetIsHeardOnceByThoseBehindTheReservations(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, w := leaky(t), &waits{start: time.Now()}
		for i := range 60 { // 40 of them reserve
			w.begin(t.Context(), th, "a", i)
		}
		<-time.After(50 * time.Millisecond)
		require.NoError(t, th.Reset(t.Context(), "a"))
		<-time.After(5900 * time.Millisecond)
		assert.Len(t, w.said(), 60)
	})
}

func TestThoseWhoLeaveTogetherAreGivenBackTogether(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &slow{Storage: memstore.New(nil), takes: time.Millisecond}
		th, err := throttler.New(throttler.Config{Storage: store, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1000).Continuous().Burst(1)}})
		require.NoError(t, err)
		w := &waits{start: time.Now()}
		ctx, leave := context.WithCancel(t.Context())
		for i := range 1000 {
			go func() {
				_, err := th.Wait(ctx, "a")
				w.note(i, err)
			}()
		}
		<-time.After(10 * time.Millisecond)
		require.Len(t, w.said(), 1, "the first may act at once")
		leave()
		<-time.After(10 * time.Millisecond)
		assert.Len(t, w.said(), 1000)
		assert.LessOrEqual(t, store.charges.Load(), int64(3))
		v, err := th.Reserve(t.Context(), "a", time.Hour)
		require.NoError(t, err)
		assert.Less(t, v.Delay, 4*time.Second, "all of it was given back")
	})
}

func TestWhoHasReservedNoticesWithinASecondWhatAnotherThrottlerDid(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		change func(ctx context.Context, other *throttler.Throttler, took throttler.Verdict) error
		soon   int // how many of three are admitted within a second
	}{
		"reset": {func(ctx context.Context, other *throttler.Throttler, _ throttler.Verdict) error {
			return other.Reset(ctx, "a")
		}, 3},
		"reset, and reserved anew": {func(ctx context.Context, other *throttler.Throttler, _ throttler.Verdict) error {
			err := other.Reset(ctx, "a")
			for range 6 {
				if err == nil {
					_, err = other.Reserve(ctx, "a", 2*time.Hour)
				}
			}
			return err
		}, 0},
		"refund": {func(ctx context.Context, other *throttler.Throttler, took throttler.Verdict) error {
			return other.Refund(ctx, took)
		}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := throttler.Config{Storage: memstore.New(nil), Buckets: []throttler.Bucket{throttler.NewBucket(10*time.Hour, 10).Continuous().Burst(5)}}
				own, err := throttler.New(c)
				require.NoError(t, err)
				other, err := throttler.New(c)
				require.NoError(t, err)
				took, err := other.Consume("a", throttler.Cost(5))
				require.NoError(t, err)
				w := &waits{start: time.Now()}
				for i := range 3 {
					w.begin(t.Context(), own, "a", i)
				}
				<-time.After(10500 * time.Millisecond)
				require.Empty(t, w.said())
				require.NoError(t, test.change(t.Context(), other, took))
				<-time.After(time.Second)
				require.Len(t, w.said(), test.soon)
				<-time.After(4 * time.Hour)
				require.Len(t, w.said(), 3)
			})
		})
	}
}

func TestACrowdThatComesAndGoesKeepsTheLimitAndLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	for burst, b := range map[int]throttler.Bucket{
		1:  throttler.NewBucket(time.Second, 10).Continuous().Burst(1),
		20: throttler.NewBucket(time.Second, 10), // all tokens are refilled at once, so 20 may be used within a second
	} {
		for _, upset := range []bool{false, true} {
			t.Run(fmt.Sprint(b.Name(), " ", upset), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) { comesAndGoes(t, b, burst, upset) })
			})
		}
	}
}

// comesAndGoes runs 100 callers for ten seconds. The contexts of half of them end while they wait. With upset, Reset is called
// every 1.7 seconds.
func comesAndGoes(t *testing.T, b throttler.Bucket, burst int, upset bool) {
	t.Helper()
	th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{b}})
	require.NoError(t, err)
	end, start := time.After(10*time.Second), time.Now()
	over, stop := context.WithCancel(t.Context())
	var mu sync.Mutex
	var log []time.Duration
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			for over.Err() == nil {
				ctx, leave := context.WithCancel(over)
				if i%2 == 0 {
					time.AfterFunc(time.Duration(1+i)*7*time.Millisecond, leave)
				}
				if _, err := th.Wait(ctx, "a"); err == nil {
					mu.Lock()
					log = append(log, time.Since(start))
					mu.Unlock()
				}
				leave()
			}
		})
	}
	for ended := false; !ended; {
		select {
		case <-end:
			ended = true
		case <-time.After(1700 * time.Millisecond):
			if upset {
				require.NoError(t, th.Reset(t.Context(), "a"))
			}
		}
	}
	stop()
	all.Wait()
	require.Greater(t, len(log), 95)
	if !upset {
		for i, from := range log {
			for j, to := range log[i:] {
				require.LessOrEqual(t, j+1, burst+int((to-from+time.Microsecond)/step), "from %v to %v", from, to)
			}
		}
	}
	<-time.After(time.Second)
	v, err := th.Wait(t.Context(), "a")
	require.NoError(t, err)
	assert.Zero(t, v.Delay, "all was given back")
}
