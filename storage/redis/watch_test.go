package redis_test

import (
	"context"
	"fmt"
	"sync"
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

// reports collects what Watch has reported.
type reports struct {
	mu  sync.Mutex
	all []error
}

// watchOf watches a storage, and returns its reports.
func watchOf(t testing.TB, s *redisstore.Storage, timeout time.Duration) *reports {
	t.Helper()
	r := new(reports)
	require.NoError(t, s.Watch(timeout, func(err error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.all = append(r.all, err)
	}))
	return r
}

// take returns the reports since the last take.
func (r *reports) take() []error {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := r.all
	r.all = nil
	return all
}

// next waits for exactly one report.
func (r *reports) next(t testing.TB) error {
	t.Helper()
	var all []error
	storecheck.Until(t, "a report", func() bool {
		all = r.take()
		return len(all) > 0
	})
	require.Len(t, all, 1)
	return all[0]
}

const short = 50 * time.Millisecond

func TestAWatchIsToldOnceOfEachFlightThatTheServerAnswers(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s, c := open(t, server.URL(), redisstore.Options{}), client(t, server.URL())
	seen := watchOf(t, s, storecheck.Patient)
	for _, call := range []string{"Take", "Take", "Peek", "Refund", "Force", "Charge", "Raise", "Debt", "Fresh", "Reset"} {
		_, err := allCalls[call](t.Context(), s, storecheck.FivePerHour(t, "a"))
		require.NoError(t, err)
		assert.Equal(t, []error{nil}, seen.take(), call)
	}
	_, err := storecheck.DecideFresh(t.Context(), s, storecheck.FivePerHour(t, "a"), ago(0))
	require.ErrorIs(t, err, redisstore.ErrStale)
	assert.Equal(t, []error{nil}, seen.take())
	require.NoError(t, c.ScriptFlush(t.Context()).Err())
	_, err = storecheck.DecideFresh(t.Context(), s, storecheck.FivePerHour(t, "a"), ago(-1))
	require.ErrorIs(t, err, redisstore.ErrStale)
	assert.Equal(t, []error{nil}, seen.take())

	do(t, c, "set", redisstore.DefaultPrefix+":foreign", "value")
	do(t, c, "hset", redisstore.DefaultPrefix+":hash", "field", "value")
	for _, id := range []string{"foreign", "hash"} {
		_, err := storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, id))
		require.ErrorIs(t, err, storage.ErrCorruptState)
		assert.Equal(t, []error{nil}, seen.take(), "the fault of a key is none of the server")
	}

	require.NoError(t, s.Close(context.Background()))
	_, err = storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, "a"))
	require.ErrorIs(t, err, storage.ErrClosed)
	assert.Empty(t, seen.take(), "nothing was sent")
}

func TestAWatchIsToldThatAServerIsDownAndThatItIsBack(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s := open(t, server.URL(), redisstore.Options{})
	seen, r := watchOf(t, s, storecheck.Patient), storecheck.FivePerHour(t, "a")
	storecheck.Take(t, s, r, 1)
	assert.Equal(t, []error{nil}, seen.take())
	require.NoError(t, server.Kill())
	for range 3 {
		_, err := storecheck.Decide(t.Context(), s, r)
		require.ErrorIs(t, err, storage.ErrUnavailable)
		assert.Equal(t, []error{err}, seen.take(), "as the caller sees it")
		assert.ErrorIs(t, err, syscall.ECONNREFUSED)
	}
	require.NoError(t, server.Start())
	storecheck.Recovery(t, storecheck.Patient, func() error { return s.Reset(t.Context(), "", "a") })
	all := seen.take()
	assert.NoError(t, all[len(all)-1])
}

func TestAWatchIsToldOfWhatAServerRefuses(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s := open(t, server.URL(), redisstore.Options{})
	seen, r := watchOf(t, s, storecheck.Patient), storecheck.FivePerHour(t, "a")
	sendWords(t, client(t, server.URL()), "replicaof 127.0.0.1 1")
	_, err := storecheck.Decide(t.Context(), s, r)
	assert.True(t, goredis.IsReadOnlyError(err), err)
	assert.Equal(t, []error{err}, seen.take())
}

// The batch is reported once as overdue, although its caller has left before. It is not reported again when it is
// answered, although the client still waits for that.
func TestAWatchIsToldOfAFrozenServerAlthoughTheCallerHasLeft(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s, r := open(t, server.URL(), redisstore.Options{}), storecheck.FivePerHour(t, "a")
	seen := watchOf(t, s, short)
	storecheck.Recovery(t, storecheck.Patient, func() error { return new(storecheck.Told).Ask(s, r) }) // even on a slow machine
	storecheck.Until(t, "the flights land", func() bool { all := seen.take(); return len(all) > 0 && all[len(all)-1] == nil })
	require.NoError(t, server.Freeze())
	_, err := storecheck.Decide(endsOnceBegun(t), s, r)
	require.ErrorIs(t, err, context.Canceled)
	err = seen.next(t)
	assert.ErrorIs(t, err, storage.ErrUnavailable)
	assert.NotErrorIs(t, err, context.Canceled, "the context that ended is not the caller's")
	assert.ErrorContains(t, err, fmt.Sprint(short))

	storecheck.AssertBackAfter(t, short, storecheck.Timed(1, func() {
		_, err = storecheck.Decide(t.Context(), s, r)
		assert.ErrorIs(t, err, storage.ErrUnavailable)
	}))
	assert.Equal(t, err, seen.next(t), "as the caller sees it")
	require.NoError(t, server.Thaw())
	storecheck.Recovery(t, storecheck.Patient, func() error { return s.Reset(t.Context(), "", "a") })
	require.NoError(t, s.Close(context.Background()))
	all := seen.take()
	assert.NoError(t, all[len(all)-1])
	for _, err := range all[:len(all)-1] {
		assert.Error(t, err, "a flight landed that was overdue")
	}
}

func TestAWatchIsToldOfAPanic(t *testing.T) {
	t.Parallel()
	c := client(t, servers.RedisURL(t))
	s := on(t, c, redisstore.Options{Timeout: storecheck.Patient})
	seen := watchOf(t, s, storecheck.Patient)
	c.AddHook(hook(func(context.Context, goredis.Cmder, goredis.ProcessHook) error { panic("in the hook") }))
	_, err := storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, "panic"))
	require.ErrorIs(t, err, storage.ErrUnavailable)
	assert.ErrorIs(t, seen.next(t), storage.ErrUnavailable)
}

func TestAWatchIsToldOfAClusterThatIsNotThere(t *testing.T) {
	t.Parallel()
	s := open(t, "redis://127.0.0.1:1?addr=127.0.0.1:2", redisstore.Options{})
	seen := watchOf(t, s, storecheck.Patient)
	for range 3 {
		_, err := storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, "a"))
		require.ErrorIs(t, err, storage.ErrUnavailable)
		assert.Equal(t, []error{err}, seen.take())
	}
	require.NoError(t, s.Close(context.Background()))
	_, err := storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, "a"))
	require.ErrorIs(t, err, storage.ErrClosed)
	assert.Empty(t, seen.take())
}

// begun is a context that ends 20 ms after a call has begun to wait for it. One that ends after a time may end before the call
// begins, on a busy machine, and then nothing is asked.
type begun struct {
	context.Context
	end func()
}

func (b *begun) Done() <-chan struct{} {
	time.AfterFunc(20*time.Millisecond, b.end)
	return b.Context.Done()
}

func endsOnceBegun(t *testing.T) context.Context {
	t.Helper()
	inside, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	return &begun{inside, cancel}
}

func TestAWatchIsToldOfAClusterThatIsFrozenAtFirst(t *testing.T) {
	t.Parallel()
	cluster := servers.RedisCluster(t, 1)
	addr := cluster.Addrs()[0]
	s := open(t, "redis://"+addr+"?addr="+addr, redisstore.Options{})
	seen := watchOf(t, s, short)
	require.NoError(t, cluster.Nodes[0].Freeze())
	_, err := storecheck.Decide(endsOnceBegun(t), s, storecheck.FivePerHour(t, "a"))
	require.ErrorIs(t, err, context.Canceled)
	assert.ErrorIs(t, seen.next(t), storage.ErrUnavailable)
	require.NoError(t, cluster.Nodes[0].Thaw())
	storecheck.Recovery(t, storecheck.Patient, func() error { return s.Reset(t.Context(), "", "a") })
	all := seen.take()
	assert.NoError(t, all[len(all)-1])
}

func TestAWatchOnAClusterIsToldOfTheNodeThatIsDown(t *testing.T) {
	t.Parallel()
	r := newRing(t)
	s, _ := r.open(t, time.Second)
	seen := watchOf(t, s, storecheck.Patient)
	ids := []string{r.idOn(t, 0), r.idOn(t, 1)}
	for _, id := range ids {
		storecheck.Take(t, s, storecheck.FivePerHour(t, id), 1)
		assert.Equal(t, []error{nil}, seen.take())
	}
	require.NoError(t, r.Nodes[1].Kill())
	storecheck.Take(t, s, storecheck.FivePerHour(t, ids[0]), 1)
	assert.Equal(t, []error{nil}, seen.take())
	_, err := storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, ids[1]))
	require.ErrorIs(t, err, storage.ErrUnavailable)
	assert.ErrorIs(t, seen.next(t), storage.ErrUnavailable)
}

func TestIdentifiersOfDifferentSlotsAreNoFailureOfTheServer(t *testing.T) {
	t.Parallel()
	r := newRing(t)
	s := open(t, r.Nodes[0].URL(), redisstore.Options{}) // a client that does not know that there are slots
	seen := watchOf(t, s, storecheck.Patient)
	both := storecheck.FivePerHour(t, r.idOn(t, 0))
	both.Parts = append(both.Parts, storecheck.NewPart(r.idOn(t, 0), both.Parts[0].Rules.Rules, 1))
	_, err := storecheck.Decide(t.Context(), s, both)
	require.ErrorIs(t, err, redisstore.ErrCrossSlot)
	assert.Equal(t, []error{nil}, seen.take())
}

func TestAWatchBeginsBeforeTheFirstCallAndOnce(t *testing.T) {
	t.Parallel()
	report := func(error) {}
	refused := func(err error, field string) {
		t.Helper()
		var fault *redisstore.OptionError
		require.ErrorAs(t, err, &fault)
		assert.Equal(t, field, fault.Field)
	}
	for _, url := range []string{"redis://127.0.0.1:1", "redis://127.0.0.1:1?addr=127.0.0.1:2"} {
		s := open(t, url, redisstore.Options{})
		_, err := storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, "a"))
		require.ErrorIs(t, err, storage.ErrUnavailable)
		refused(s.Watch(short, report), "Watch")

		s = open(t, url, redisstore.Options{})
		refused(s.Watch(0, report), "Timeout")
		refused(s.Watch(-1, report), "Timeout")
		require.NoError(t, s.Watch(short, report))
		refused(s.Watch(short, report), "Watch")
		require.NoError(t, s.Close(context.Background()))
		assert.ErrorIs(t, s.Watch(short, report), storage.ErrClosed)
	}
}

func TestEachWatchedProcessFindsOutThatAServerHasRestarted(t *testing.T) {
	t.Parallel()
	url := servers.RedisURL(t)
	missed := 0
	for range 10 { // of which two may have the same variant
		s := open(t, url, redisstore.Options{})
		require.NoError(t, s.Watch(storecheck.Patient, func(error) {}))
		if _, err := storecheck.DecideFresh(t.Context(), s, storecheck.Hourly(t, freshName(), 5), ago(-1)); err == nil {
			missed++
		} else {
			assert.ErrorIs(t, err, redisstore.ErrRestarted)
		}
		assert.Equal(t, 1, storecheck.Take(t, s, storecheck.Hourly(t, freshName(), 5), 1))
	}
	assert.LessOrEqual(t, missed, 3)
}
