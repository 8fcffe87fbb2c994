package runtime_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
	memstore "github.com/go-throttler/throttler/storage/runtime"
)

var once = throttler.NewBucket(time.Minute, 1)

// flood makes n identifiers.
func flood(t *testing.T, th *throttler.Throttler, prefix string, n int) {
	t.Helper()
	for i := range n {
		require.True(t, consume(t, th, fmt.Sprint(prefix, i)))
	}
}

// named returns a Throttler of this name by the storage's own clock.
func named(t *testing.T, s *memstore.Storage, name string, b ...throttler.Bucket) *throttler.Throttler {
	t.Helper()
	th, err := throttler.New(throttler.Config{Name: name, Storage: s, Buckets: b})
	require.NoError(t, err)
	return th
}

// world is an empty storage with throttlers by its own clock, in a synctest bubble, or by an injected one.
type world struct {
	*throttler.Throttler
	lenient *throttler.Throttler // allows unknown identifiers
	s       *memstore.Storage
	now     func() int64        // the time of the injected clock; nil for the storage's own
	pass    func(time.Duration) // lets time pass by that clock
}

func lenient(t *testing.T, s *memstore.Storage, c throttler.Clock) *throttler.Throttler {
	t.Helper()
	th, err := throttler.New(throttler.Config{Storage: s, Clock: c, OnUnknownIdentifier: throttler.Allow})
	require.NoError(t, err)
	return th
}

// worlds runs the test once by the storage's own clock and once by an injected one.
func worlds(t *testing.T, test func(t *testing.T, w world)) {
	t.Run("own clock", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			s := memstore.New(nil)
			test(t, world{named(t, s, "", once), lenient(t, s, nil), s, nil, func(d time.Duration) { <-time.After(d) }})
		})
	})
	t.Run("injected clock", func(t *testing.T) {
		t.Parallel()
		s := memstore.New(nil)
		th, mock := clocked(t, s, once)
		test(t, world{th, lenient(t, s, mock), s, func() int64 { return mock.Now().UnixMicro() }, mock.Add})
	})
}

func TestAFloodIsForgottenWhileOneIdentifierGoesOn(t *testing.T) {
	t.Parallel()
	worlds(t, func(t *testing.T, w world) {
		const n = 100_000
		flood(t, w.Throttler, "flood-", n)
		require.Equal(t, n, w.s.Len())
		w.pass(time.Minute)
		before := w.s.Visited()
		for range n {
			consume(t, w.Throttler, "hot")
		}
		assert.LessOrEqual(t, w.s.Len(), 10, "all but one are full")
		assert.LessOrEqual(t, w.s.Room(), 256*64, "their memory went with them")
		assert.LessOrEqual(t, w.s.Slots(), 256*8)
		assert.LessOrEqual(t, w.s.Visited()-before, 2*n)
	})
}

func TestEachCallSweepsWhateverItAsksAndIsAnswered(t *testing.T) {
	t.Parallel()
	large, log := throttler.Using(throttler.NewBucket(time.Minute, 1<<40)), throttler.Using(throttler.NewBucket(time.Minute, 20).SlidingLog())
	rules := []law.Rule{rule(t, time.Minute)}
	for _, test := range []struct {
		name string
		call func(t *testing.T, w world, i int) error
		want error
	}{
		{"admitted", func(_ *testing.T, w world, _ int) error { _, err := w.Consume("hot", large); return err }, nil},
		{"denied", func(_ *testing.T, w world, _ int) error { _, err := w.Consume("hot"); return err }, nil},
		{"of a log", func(_ *testing.T, w world, _ int) error { _, err := w.Consume("log", log); return err }, nil},
		{"cost 0", func(_ *testing.T, w world, i int) error {
			_, err := w.Consume(fmt.Sprint(i), throttler.Cost(0))
			return err
		}, nil},
		{"peek", func(t *testing.T, w world, _ int) error { _, err := w.Peek(t.Context(), "hot"); return err }, nil},
		{"peek at a new one", func(t *testing.T, w world, i int) error { _, err := w.Peek(t.Context(), fmt.Sprint(i)); return err }, nil},
		{"several", func(t *testing.T, w world, _ int) error {
			_, err := w.ConsumeAll(t.Context(), throttler.For("hot"), throttler.For("warm"))
			return err
		}, nil},
		{"charge", func(t *testing.T, w world, _ int) error { return w.Charge(t.Context(), "hot", large) }, nil},
		{"refund", func(t *testing.T, w world, _ int) error {
			c := storage.Charge{Identifier: "hot", Rules: law.NewRuleSet(rules...), Amounts: []storage.Amount{{N: -1}}}
			if w.now != nil {
				c.Clocked, c.Now = true, w.now()
			}
			return w.s.Charge(t.Context(), &c)
		}, nil},
		{"reset", func(t *testing.T, w world, i int) error { return w.Reset(t.Context(), fmt.Sprint(i)) }, nil},
		{"unknown", func(_ *testing.T, w world, _ int) error { _, err := w.Consume("hot", throttler.Using()); return err }, throttler.ErrUnknownIdentifier},
		{"unknown and allowed", func(t *testing.T, w world, _ int) error {
			var parts []throttler.Part
			for i := range 100 {
				parts = append(parts, throttler.For(fmt.Sprint("guest-", i), throttler.Using()))
			}
			_, err := w.lenient.ConsumeAll(t.Context(), parts...)
			return err
		}, nil},
		{"impossible", func(_ *testing.T, w world, _ int) error { _, err := w.Consume("hot", throttler.Cost(2)); return err }, throttler.ErrCostExceedsCapacity},
		{"cancelled", func(t *testing.T, w world, _ int) error { _, err := w.ConsumeContext(cancelled(t), "hot"); return err }, context.Canceled},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			worlds(t, func(t *testing.T, w world) {
				const n = 2000
				flood(t, w.Throttler, "flood-", n)
				w.pass(time.Minute)
				for i := range n {
					before := w.s.Visited()
					require.ErrorIs(t, test.call(t, w, i), test.want)
					most := 64
					if errors.Is(test.want, throttler.ErrCostExceedsCapacity) {
						most *= 2 // such a call makes a second one, a Peek for what the buckets have
					}
					require.LessOrEqual(t, w.s.Visited()-before, most)
				}
				assert.LessOrEqual(t, w.s.Len(), n/20)
			})
		})
	}
}

func cancelled(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

func rule(t *testing.T, period time.Duration) law.Rule {
	r, faults := law.NewRule("1/"+period.String(), law.Replenish, period, 1, 0)
	require.Empty(t, faults)
	return r
}

func TestALiveIdentifierStaysAndFewOthersDo(t *testing.T) {
	t.Parallel()
	hour := throttler.Using(throttler.NewBucket(time.Hour, 1))
	for _, n := range []struct{ before, among, dead, after int }{ // how many live ones came before, among and after the dead
		{0, 0, 300, 0}, {300, 0, 300, 300}, {0, 1000, 1000, 0}, {0, 5000, 20_000, 0}, {100_000, 0, 10_000, 0},
		{0, 10_000, 500, 0}, {0, 10_000, 2000, 0}, {10_000, 0, 1000, 0}, {10_000, 0, 5000, 0}, {0, 0, 1000, 10_000}, {0, 0, 5000, 10_000},
	} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			worlds(t, func(t *testing.T, w world) {
				live := n.before + n.among + n.after
				come := func(from, to int) {
					for i := from; i < to; i++ {
						require.True(t, consume(t, w.Throttler, fmt.Sprint("live-", i), hour))
					}
				}
				come(0, n.before)
				for i := range n.dead {
					require.True(t, consume(t, w.Throttler, fmt.Sprint("dead-", i)))
					come(n.before+n.among*i/n.dead, n.before+n.among*(i+1)/n.dead)
				}
				come(n.before+n.among, live)
				w.pass(time.Minute)
				for i := range n.dead {
					_, err := w.Peek(t.Context(), fmt.Sprint("other-", i))
					require.NoError(t, err)
				}
				assert.LessOrEqual(t, w.s.Len(), live+live/10+n.dead/20, "a few percent: which depends on where the random seed of the hash puts identifiers")
				for i := range live {
					require.False(t, consume(t, w.Throttler, fmt.Sprint("live-", i), hour))
				}
			})
		})
	}
}

func TestNoPatternOfCallsKeepsANameFromBeingSwept(t *testing.T) {
	t.Parallel()
	for _, of := range []int{2, 8, 32} { // one call of so many is under the name whose identifiers are full
		t.Run(fmt.Sprint(of), func(t *testing.T) {
			t.Parallel()
			s := memstore.New(nil)
			th, mock := clocked(t, s, once)
			other, err := throttler.New(throttler.Config{Name: "other", Storage: s, Clock: clock.NewMock(), Buckets: []throttler.Bucket{once}})
			require.NoError(t, err)
			const n = 2000
			flood(t, th, "flood-", n)
			flood(t, other, "flood-", n)
			mock.Add(time.Minute)
			for i := range n * of {
				if i%of == 0 {
					consume(t, th, "hot")
				} else {
					consume(t, other, "hot")
				}
			}
			assert.LessOrEqual(t, s.Len(), n+n/20)
			for i := range n {
				require.False(t, consume(t, other, fmt.Sprint("flood-", i)), "its clock stands")
			}
		})
	}
}

func TestCallsByAnInjectedClockSweepThoseByNoneToo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := memstore.New(nil)
		th, mock := clocked(t, s, once)
		const n = 2000
		flood(t, th, "flood-", n)
		flood(t, named(t, s, "real", once), "flood-", n)
		<-time.After(time.Minute) // of the bubble
		for range n {
			consume(t, th, "hot")
		}
		assert.LessOrEqual(t, s.Len(), n+n/20)
		assert.GreaterOrEqual(t, s.Len(), n, "the mock clock stands")
		mock.Add(time.Minute)
		for range n {
			consume(t, th, "hot")
			consume(t, named(t, s, "real", once), "hot")
		}
		assert.LessOrEqual(t, s.Len(), n/20)
	})
}

func TestAFloodAtMaxIdentifiersIsForgottenToo(t *testing.T) {
	t.Parallel()
	const n = 5000
	s := memstore.New(&memstore.Options{MaxIdentifiers: n})
	th, mock := clocked(t, s, once)
	flood(t, th, "flood-", n)
	_, err := th.Consume("more")
	require.ErrorIs(t, err, throttler.ErrUnavailable)
	mock.Add(time.Minute)
	for i := range n * 9 / 10 {
		before := s.Visited()
		require.True(t, consume(t, th, fmt.Sprint("next-", i)), "there is room")
		require.LessOrEqual(t, s.Visited()-before, 64)
	}
	mock.Add(time.Minute)
	for range n {
		consume(t, th, "hot")
	}
	assert.LessOrEqual(t, s.Len(), n/50)
}

func TestCallsOfManyIdentifiersAreSweptAsFastAsTheyMakeThem(t *testing.T) {
	t.Parallel()
	s := memstore.New(nil)
	th, mock := clocked(t, s, once)
	const calls, each = 500, 20
	for i := range calls {
		var parts []throttler.Part
		for j := range each {
			parts = append(parts, throttler.For(fmt.Sprint(i, "-", j)))
		}
		before := s.Visited()
		v, err := th.ConsumeAll(t.Context(), parts...)
		require.NoError(t, err)
		require.True(t, v.Allowed)
		require.LessOrEqual(t, s.Visited()-before, 64)
		mock.Add(time.Minute)
	}
	assert.LessOrEqual(t, s.Len(), calls*each/10)
}

func TestConcurrentFloodsAreForgottenAndNoLiveIdentifierIs(t *testing.T) {
	t.Parallel()
	s := memstore.New(nil)
	const names, n = 4, 5000
	var ths [names]*throttler.Throttler
	var mocks [names]*clock.Mock
	for i := range ths {
		mocks[i] = clock.NewMock()
		var err error
		ths[i], err = throttler.New(throttler.Config{Name: fmt.Sprint(i), Storage: s, Clock: mocks[i], Buckets: []throttler.Bucket{once}})
		require.NoError(t, err)
	}
	hour := throttler.Using(throttler.NewBucket(time.Hour, 1))
	var wait sync.WaitGroup
	for i, th := range ths {
		wait.Go(func() {
			for j := range n {
				v, err := th.Consume(fmt.Sprint("live-", j), hour)
				assert.True(t, v.Allowed && err == nil)
				v, err = th.Consume(fmt.Sprint("flood-", j))
				assert.True(t, v.Allowed && err == nil)
			}
			mocks[i].Add(time.Minute)
			for j := range n {
				v, err := th.Consume(fmt.Sprint("live-", j), hour)
				assert.True(t, !v.Allowed && err == nil, "it is live")
			}
		})
		wait.Go(func() {
			for range 10 {
				_, err := s.Sweep(t.Context())
				assert.NoError(t, err)
			}
		})
	}
	wait.Wait()
	for range n { // only calls of its own name remove what is left of each
		for _, th := range ths {
			consume(t, th, "live-0", hour)
		}
	}
	assert.GreaterOrEqual(t, s.Len(), names*n)
	assert.LessOrEqual(t, s.Len(), names*n+names*n/20)
}

func TestBucketsOfEachIdentifiersOwnAreForgottenWithIt(t *testing.T) {
	t.Parallel()
	s := memstore.New(nil)
	th, mock := clocked(t, s, once)
	const n = 5000
	for i := range n {
		require.True(t, consume(t, th, fmt.Sprint(i), throttler.Using(throttler.NewBucket(time.Minute, 1).Named(fmt.Sprint(i)))))
	}
	require.Equal(t, n, s.Layouts())
	mock.Add(time.Minute)
	for range n {
		consume(t, th, "hot")
	}
	assert.LessOrEqual(t, s.Layouts(), n/50)
}

func TestSweepRemovesFullIdentifiersAndNoOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := memstore.New(nil)
		th := named(t, s, "", once)
		mocked, mock := clocked(t, s, once)
		const n = 20_000
		flood(t, th, "minute-", n)
		for i := range n {
			require.True(t, consume(t, th, fmt.Sprint("hour-", i), throttler.Using(throttler.NewBucket(time.Hour, 1))))
		}
		flood(t, mocked, "mocked-", n)
		mock.Add(time.Hour)
		removed, err := s.Sweep(t.Context())
		require.NoError(t, err)
		require.Zero(t, removed)
		<-time.After(time.Minute) // of the bubble
		removed, err = s.Sweep(cancelled(t))
		require.ErrorIs(t, err, context.Canceled)
		require.Zero(t, removed)
		removed, err = s.Sweep(t.Context())
		require.NoError(t, err)
		assert.Equal(t, int64(n), removed)
		assert.Equal(t, 2*n, s.Len())
		<-time.After(time.Hour)
		removed, err = s.Sweep(t.Context())
		require.NoError(t, err)
		assert.Equal(t, int64(n), removed)
		assert.Equal(t, n, s.Len(), "those of the mock clock are for the calls by it")
	})
}

// A Sweep unlocks the shard between its pieces. Meanwhile others remove and make entries of the same shard.
func TestSweepMissesNoneThatIsFullWhileOthersComeAndGo(t *testing.T) {
	t.Parallel()
	s := memstore.New(nil)
	th := named(t, s, "", once)
	short := throttler.Using(throttler.NewBucket(time.Microsecond, 1))
	const n = 20_000
	var wait sync.WaitGroup
	for round := range 5 {
		for i := range n {
			_, err := th.Consume(fmt.Sprint("full-", round, "-", i), short)
			require.NoError(t, err)
		}
		for range 2 {
			wait.Go(func() {
				for i := range n / 10 {
					_, err := th.Consume(fmt.Sprint("live-", i))
					assert.NoError(t, err)
				}
			})
		}
		_, err := s.Sweep(t.Context())
		require.NoError(t, err)
		wait.Wait()
		require.LessOrEqual(t, s.Len(), n/10)
	}
	require.Equal(t, n/10, s.Len())
}
