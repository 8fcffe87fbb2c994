package runtime_test

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	memstore "github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/storage/storagetest"
)

func TestTheRuntimeStoragePassesTheSuite(t *testing.T) {
	t.Parallel()
	storagetest.Run(t, func(testing.TB) storage.Storage { return memstore.New(nil) })
}

func TestManyIdentifiersInOneStorageAgreeWithTheSuite(t *testing.T) {
	t.Parallel()
	shared := memstore.New(&memstore.Options{MaxIdentifiers: 1_000_000})
	storagetest.Run(t, func(testing.TB) storage.Storage { return shared })
}

// clocked returns a Throttler over s by a mock clock.
func clocked(t *testing.T, s *memstore.Storage, b ...throttler.Bucket) (*throttler.Throttler, *clock.Mock) {
	t.Helper()
	mock := clock.NewMock()
	th, err := throttler.New(throttler.Config{Storage: s, Clock: mock, Buckets: b})
	require.NoError(t, err)
	return th, mock
}

func consume(t *testing.T, th *throttler.Throttler, id string, o ...throttler.Option) bool {
	t.Helper()
	v, err := th.Consume(id, o...)
	require.NoError(t, err)
	return v.Allowed
}

func TestFullIdentifiersGoAwayInBoundedSweepsAndTheirMemoryIsReused(t *testing.T) {
	t.Parallel()
	s := memstore.New(nil)
	th, mock := clocked(t, s, throttler.NewBucket(10*time.Second, 5), throttler.NewBucket(time.Minute, 50).SlidingLog())
	const n = 20_000
	for i := range n {
		require.True(t, consume(t, th, fmt.Sprint("old-", i)))
	}
	require.Equal(t, n, s.Len())
	mock.Add(time.Minute - time.Microsecond)
	require.True(t, consume(t, th, "late"))
	require.Equal(t, n+1, s.Len(), "none that is not full was removed")
	mock.Add(time.Microsecond)
	for i := range n {
		before := s.Visited()
		require.True(t, consume(t, th, fmt.Sprint("new-", i)))
		require.LessOrEqual(t, s.Visited()-before, 64)
	}
	assert.Less(t, s.Len(), n+n/10, "twice as many came by")
	mock.Add(time.Minute)
	for range 100 {
		before := s.Visited()
		for range 1000 {
			require.True(t, consume(t, th, fmt.Sprint("busy-", rand.IntN(4096)), throttler.Using(throttler.NewBucket(time.Millisecond, 1000))))
		}
		require.LessOrEqual(t, s.Visited()-before, 1000*64)
		mock.Add(time.Millisecond)
	}
	assert.Less(t, s.Len(), 3000)
	assert.Less(t, s.Room(), 3000+256*64, "the memory went with them")
	assert.LessOrEqual(t, s.Layouts(), 2*256)
}

func TestSteadyChurnStaysTheSizeOfTheLiveIdentifiers(t *testing.T) {
	t.Parallel()
	s := memstore.New(nil)
	th, mock := clocked(t, s, throttler.NewBucket(10*time.Second, 5))
	const perSecond, live = 1000, 10_000
	for second := range 60 {
		for i := range perSecond {
			require.True(t, consume(t, th, fmt.Sprint(second, "-", i)))
		}
		mock.Add(time.Second)
	}
	assert.Less(t, s.Len(), live*3/2)
}

func TestAtMaxIdentifiersANewOneIsUnavailableUntilOneIsFull(t *testing.T) {
	t.Parallel()
	s := memstore.New(&memstore.Options{MaxIdentifiers: 3})
	th, mock := clocked(t, s, throttler.NewBucket(10*time.Second, 5))
	for _, id := range []string{"a", "b", "c"} {
		require.True(t, consume(t, th, id))
		mock.Add(time.Second)
	}
	_, err := th.Consume("d")
	require.ErrorIs(t, err, throttler.ErrUnavailable)
	require.True(t, consume(t, th, "a"), "those it has go on")
	v, err := th.Peek(t.Context(), "d")
	require.NoError(t, err, "a peek needs no room")
	require.True(t, v.Allowed)
	require.Equal(t, 3, s.Len())

	mock.Add(7 * time.Second) // a is full
	require.True(t, consume(t, th, "d"))
	_, err = th.Consume("e")
	require.ErrorIs(t, err, throttler.ErrUnavailable)
	require.NoError(t, th.Reset(t.Context(), "d"))
	require.True(t, consume(t, th, "e"))

	_, err = th.ConsumeAll(t.Context(), throttler.For("b"), throttler.For("x"), throttler.For("y"))
	require.ErrorIs(t, err, throttler.ErrUnavailable)
	v, err = th.Peek(t.Context(), "b", throttler.Cost(0))
	require.NoError(t, err)
	require.Equal(t, int64(4), v.Levels()[0].Remaining, "the part that had room was not charged")
	require.Equal(t, 3, s.Len())
}

func TestACallThatNeedsNoRoomOrTwoRoomsGetsThemAtMaxIdentifiers(t *testing.T) {
	t.Parallel()
	s := memstore.New(&memstore.Options{MaxIdentifiers: 2})
	th, mock := clocked(t, s, throttler.NewBucket(10*time.Second, 5))
	v, err := th.Consume("a")
	require.NoError(t, err)
	require.True(t, consume(t, th, "b"))
	require.True(t, consume(t, th, "new", throttler.Cost(0)), "it writes nothing")
	mock.Add(10 * time.Second)
	both, err := th.ConsumeAll(t.Context(), throttler.For("x"), throttler.For("y"))
	require.NoError(t, err, "both that were there are full")
	require.True(t, both.Allowed)
	require.NoError(t, th.Refund(t.Context(), v), "nothing is left of it")
	require.Equal(t, 2, s.Len())
}

func TestNoNameOfARequestMeetsAnother(t *testing.T) {
	t.Parallel()
	s := memstore.New(nil)
	hour, faults := law.NewRule("b", law.Replenish, time.Hour, 1, 0)
	require.Empty(t, faults)
	for i := range 3 {
		for _, r := range []storecheck.Request{{Name: "x", Clocked: true}, {Name: "!x"}, {Name: "\x01x"}, {Name: ""}} {
			r.Parts = []storecheck.Part{storecheck.NewPart("a", []law.Rule{hour}, 1)}
			v, err := storecheck.Decide(t.Context(), s, r)
			require.NoError(t, err)
			require.Equal(t, i == 0, v.Allowed, "%q", r.Name)
		}
	}
}

func TestAGlitchOfTheClockPinsNobody(t *testing.T) {
	t.Parallel()
	s := memstore.New(&memstore.Options{MaxIdentifiers: 1})
	th, mock := clocked(t, s, throttler.NewBucket(10*time.Second, 5))
	mock.Set(time.Unix(4_000_000_000, 0))
	require.True(t, consume(t, th, "glitch"))
	mock.Set(time.Unix(1_700_000_000, 0))
	require.True(t, consume(t, th, "b"))
}

func TestMaxIdentifiersHoldsUnderConcurrency(t *testing.T) {
	t.Parallel()
	s := memstore.New(&memstore.Options{MaxIdentifiers: 50})
	th, _ := clocked(t, s, throttler.NewBucket(10*time.Second, 5))
	var admitted atomic.Int64
	t.Run("", func(t *testing.T) {
		for g := range 8 {
			t.Run("", func(t *testing.T) {
				t.Parallel()
				for i := range 200 {
					if v, err := th.Consume(fmt.Sprint(g, "-", i)); err == nil && v.Allowed {
						admitted.Add(1)
					} else {
						assert.ErrorIs(t, err, throttler.ErrUnavailable)
					}
				}
			})
		}
	})
	assert.Equal(t, int64(50), admitted.Load())
	assert.Equal(t, 50, s.Len())
}

func TestARefusedOrEmptyCallKeepsNoIdentifier(t *testing.T) {
	t.Parallel()
	s := memstore.New(nil)
	th, _ := clocked(t, s, throttler.NewBucket(10*time.Second, 5))
	require.True(t, consume(t, th, "a", throttler.Cost(0)))
	_, err := th.Peek(t.Context(), "b")
	require.NoError(t, err)
	require.True(t, consume(t, th, "full", throttler.Cost(5)))
	v, err := th.ConsumeAll(t.Context(), throttler.For("new"), throttler.For("full"))
	require.NoError(t, err)
	require.False(t, v.Allowed)
	assert.Equal(t, 1, s.Len())
}

func TestTimeOfOneClockRemovesNothingOfAnother(t *testing.T) {
	t.Parallel()
	s := memstore.New(nil)
	mocked, _ := clocked(t, s, throttler.NewBucket(10*time.Second, 5))
	require.True(t, consume(t, mocked, "a", throttler.Cost(5)))
	later, mock := clocked(t, s, throttler.NewBucket(10*time.Second, 5))
	real, err := throttler.New(throttler.Config{Name: "real", Storage: s, Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 5)}})
	require.NoError(t, err)
	named, err := throttler.New(throttler.Config{Name: "named", Storage: s, Clock: mock, Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 5)}})
	require.NoError(t, err)
	for i := range 5000 {
		require.True(t, consume(t, real, fmt.Sprint(i)))
	}
	mock.Add(time.Hour)
	for i := range 5000 {
		require.True(t, consume(t, named, fmt.Sprint(i)))
	}
	assert.False(t, consume(t, mocked, "a"))
	assert.True(t, consume(t, later, "a"), "its own clock says that the bucket is full")
}

func TestAMillionIdentifiersTakeAtMost120BytesEach(t *testing.T) {
	all := ids(1_000_000)
	before := heap()
	s := memstore.New(nil)
	th, err := throttler.New(throttler.Config{Storage: s, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 10), throttler.NewBucket(10*time.Hour, 100).SlidingWindow()}})
	require.NoError(t, err)
	for _, id := range all {
		require.True(t, consume(t, th, id))
	}
	assert.LessOrEqual(t, float64(heap()-before)/float64(len(all)), 120.0)
	runtime.KeepAlive(s)
}

func TestNoCallLooksAtMoreThan64Entries(t *testing.T) {
	t.Parallel()
	s := memstore.New(&memstore.Options{MaxIdentifiers: 500})
	th, mock := clocked(t, s, throttler.NewBucket(10*time.Second, 5))
	var parts []throttler.Part
	for i := range 500 {
		id := fmt.Sprint("user-", i)
		require.True(t, consume(t, th, id))
		if i%2 == 0 {
			parts = append(parts, throttler.For(id))
		}
	}
	visited := func(call func()) int {
		before := s.Visited()
		call()
		return s.Visited() - before
	}
	for range 20 {
		assert.LessOrEqual(t, visited(func() {
			_, err := th.Consume("one more")
			assert.ErrorIs(t, err, throttler.ErrUnavailable)
		}), 64)
		assert.LessOrEqual(t, visited(func() {
			_, err := th.ConsumeAll(t.Context(), parts...)
			assert.NoError(t, err)
		}), 64)
	}
	mock.Add(10 * time.Second)
	for i := range 500 {
		tries, err := 0, throttler.ErrUnavailable
		for ; err != nil; tries++ {
			assert.LessOrEqual(t, visited(func() { _, err = th.Consume(fmt.Sprint("new-", i)) }), 64)
		}
		assert.LessOrEqual(t, tries, 500/32+2, "a search goes on where the last one ended")
	}
}

func TestALargeLevelDrainsForAsLongAsItMay(t *testing.T) {
	t.Parallel()
	c := clock.NewMock()
	th, err := throttler.New(throttler.Config{Clock: c, Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 1<<40).Continuous()}})
	require.NoError(t, err)
	for days := range 366 {
		v, err := th.Consume("user:42", throttler.Cost(1<<40))
		require.NoError(t, err)
		require.True(t, v.Allowed, days)
		c.Add(time.Duration(days+1) * 24 * time.Hour)
	}
}
