package lease_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/lease"
	"github.com/go-throttler/throttler/storage/runtime"
)

func TestNewReturnsAllFaults(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		shared storage.Storage
		o      lease.Options
		want   []string
	}{
		{nil, lease.Options{}, []string{"Shared is nil"}},
		{(*runtime.Storage)(nil), lease.Options{}, []string{"Shared is nil"}},
		{runtime.New(nil), lease.Options{Lifetime: 9 * time.Millisecond}, []string{"Lifetime is 9ms, must be from 10ms to 10s"}},
		{runtime.New(nil), lease.Options{Lifetime: 11 * time.Second, MaxDenial: -1, MaxIdentifiers: -1}, []string{
			"Lifetime is 11s, must be from 10ms to 10s", "MaxDenial is -1ns, must be from 1ms to 1m", "MaxIdentifiers is -1, must be above 0, or 0 for 65536"}},
	} {
		s, err := lease.New(c.shared, &c.o)
		assert.Nil(t, s)
		var fault *lease.OptionError
		require.ErrorAs(t, err, &fault)
		for _, want := range c.want {
			assert.ErrorContains(t, err, "throttler: lease: "+want)
		}
	}
}

func TestADecisionByALeaseAllocatesNothing(t *testing.T) {
	s := over(t, runtime.New(nil), &lease.Options{Lifetime: 2 * time.Second})
	l, err := throttler.New(throttler.Config{Storage: s, Buckets: plenty})
	require.NoError(t, err)
	consume := func() throttler.Verdict {
		v, err := l.Consume("user:42")
		require.NoError(t, err)
		return v
	}
	for n := 0; s.State().Tokens < 2000 && n < 100_000; n++ {
		consume()
	}
	assert.Zero(t, testing.AllocsPerRun(1000, func() { _ = consume() }))
	storecheck.Until(t, "the shared storage decides", func() bool { v := consume(); return v.Source() == lease.Source })
}

func TestADenialThatIsRememberedAllocatesNothing(t *testing.T) {
	s := over(t, runtime.New(nil), nil)
	l, err := throttler.New(throttler.Config{Storage: s, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1)}})
	require.NoError(t, err)
	v, err := l.Consume("user:42")
	require.NoError(t, err)
	require.True(t, v.Allowed)
	assert.LessOrEqual(t, testing.AllocsPerRun(1000, func() { v, err = l.Consume("user:42") }), 0.1) // one call a second asks the server
	require.NoError(t, err)
	assert.False(t, v.Allowed)
	assert.Equal(t, lease.Source, v.Source())
	assert.Positive(t, v.RetryAfter)
}

func TestDenialsOnlyTakesNothingAhead(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 100, func(t *testing.T, w *world) {
		w.options.DenialsOnly = true
		p, other := w.steady(), w.steady()
		for n := range int64(100) {
			require.Equal(t, "server", w.source(p))
			require.Equal(t, 100-1-n, w.remaining())
		}
		require.False(t, w.take(other, "id", 1).Allowed)
		calls := w.server.calls.Load()
		assert.Zero(t, w.asks(other, 1000))
		assert.Equal(t, calls, w.server.calls.Load())
	})
}

func TestACallAfterCloseIsErrClosed(t *testing.T) {
	t.Parallel()
	s, err := lease.New(runtime.New(nil), nil)
	require.NoError(t, err)
	r := storecheck.FivePerHour(t, "a")
	require.Equal(t, 5, storecheck.Take(t, s, r, 40))
	require.NoError(t, s.Close(t.Context()))
	require.NoError(t, s.Close(t.Context()))
	_, err = storecheck.Decide(t.Context(), s, r)
	require.ErrorIs(t, err, storage.ErrClosed)
	r.Clocked = true
	_, err = storecheck.Decide(t.Context(), s, r)
	require.ErrorIs(t, err, storage.ErrClosed)
	require.ErrorIs(t, s.Charge(t.Context(), &storage.Charge{Identifier: "a", Rules: r.Parts[0].Rules, Amounts: []storage.Amount{{N: -1, In: 1}}}), storage.ErrClosed)
	require.ErrorIs(t, s.Reset(t.Context(), "", "a"), storage.ErrClosed)
}

// failing is a storage whose Charges fail if fails is set, and whose calls all block until their context ends if hangs is set.
type failing struct {
	storage.Storage
	fails atomic.Bool
	hangs atomic.Bool
}

func (f *failing) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	if f.hangs.Load() {
		<-ctx.Done()
		return ctx.Err()
	}
	return f.Storage.Decide(ctx, r, a)
}

func (f *failing) Charge(ctx context.Context, c *storage.Charge) error {
	if f.hangs.Load() {
		<-ctx.Done()
		return ctx.Err()
	}
	if f.fails.Load() {
		return fmt.Errorf("%w: away", storage.ErrUnavailable)
	}
	return f.Storage.Charge(ctx, c)
}

// timeless fails if a request has a time that is not by an injected clock: a storage outside of the process has another one.
type timeless struct {
	storage.Storage
	t *testing.T
}

func (s timeless) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	if !r.Clocked {
		assert.Zero(s.t, r.Now)
	}
	return s.Storage.Decide(ctx, r, a)
}

func TestTheSharedStorageGetsNoTimeOfThisProcess(t *testing.T) {
	t.Parallel()
	shared := timeless{runtime.New(nil), t}
	for _, s := range []storage.Storage{shared, over(t, shared, nil)} {
		l, err := throttler.New(throttler.Config{
			Storage: s, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 100)},
			Observe: func(context.Context, *throttler.Event) {}, // for which the Throttler reads the time
		})
		require.NoError(t, err)
		for range 20 {
			_, err = l.Consume("a")
			require.NoError(t, err)
		}
		_, err = l.ConsumeAll(t.Context(), throttler.For("b"), throttler.For("c"))
		require.NoError(t, err)
	}
}

func TestCloseSaysThatSomethingCouldNotBeGivenBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		shared := &failing{Storage: runtime.New(nil)}
		shared.fails.Store(true)
		s, err := lease.New(shared, nil)
		require.NoError(t, err)
		require.Equal(t, 100, storecheck.Take(t, s, storecheck.Hourly(t, "a", 1000), 100))
		require.Positive(t, s.State().Tokens)
		err = s.Close(t.Context())
		require.ErrorIs(t, err, storage.ErrUnavailable)
		require.Equal(t, err, s.Close(t.Context()))
	})
}

func TestCloseEndsWithItsContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		shared := &failing{Storage: runtime.New(nil)}
		s, err := lease.New(shared, nil)
		require.NoError(t, err)
		require.Equal(t, 100, storecheck.Take(t, s, storecheck.Hourly(t, "a", 1000), 100))
		for s.State().Tokens > 0 {
			require.Equal(t, 1, storecheck.Take(t, s, storecheck.Hourly(t, "a", 1000), 1))
		}
		require.Equal(t, 100, storecheck.Take(t, s, storecheck.Hourly(t, "b", 1000), 100))
		shared.hangs.Store(true)
		go func() {
			_, err := storecheck.Decide(context.Background(), s, storecheck.Hourly(t, "a", 1000))
			assert.ErrorIs(t, err, storage.ErrClosed)
		}()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		require.ErrorIs(t, s.Close(ctx), context.DeadlineExceeded)
		assert.Equal(t, time.Second, time.Since(began))
		synctest.Wait() // a goroutine left behind would fail the synctest bubble
	})
}

func TestIdentifiersThatAreNotAskedForAreForgotten(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 1000, func(t *testing.T, w *world) {
		w.options.MaxIdentifiers = 10
		p := w.steady()
		for i := range 20 {
			for range 40 {
				w.load.Go(func() { w.take(p, fmt.Sprint("id", i), 1) })
			}
		}
		w.load.Wait()
		assert.Equal(t, 10, p.State().Identifiers)
		<-time.After(30 * lease.DefaultLifetime)
		assert.Zero(t, p.State().Identifiers)
		w.leases(p)
	})
}

func TestAnErrorOfTheSharedStorageIsTold(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 1000, func(t *testing.T, w *world) {
		p := w.steady()
		w.leases(p)
		w.asks(p, int(p.State().Tokens))
		w.crash(p)
		part := storecheck.NewPart("id", w.rules, 1)
		for range 5 { // the first asks for a lease as well
			w.load.Go(func() {
				_, err := storecheck.Decide(t.Context(), p, storecheck.Request{Name: "sim", Parts: []storecheck.Part{part}})
				assert.ErrorIs(t, err, storage.ErrUnavailable)
			})
		}
		w.load.Wait()
		assert.ErrorIs(t, p.Reset(t.Context(), "sim", "id"), storage.ErrUnavailable)
	})
}

func TestStatsHaveTheNamesOfMetrics(t *testing.T) {
	t.Parallel()
	s := over(t, runtime.New(nil), nil)
	require.Equal(t, 5, storecheck.Take(t, s, storecheck.FivePerHour(t, "a"), 10))
	got := map[string]float64{}
	for name, value := range s.Stats() {
		got[name] = value
	}
	assert.Equal(t, map[string]float64{"lease_identifiers": 1, "lease_tokens": 0, "lease_calls_total": 6, "lease_local_total": 0,
		"lease_remembered_total": 4, "lease_returned_total": 0}, got)
	for range s.Stats() {
		break
	}
}

func TestAVerdictOfALeaseIsRefunded(t *testing.T) {
	t.Parallel()
	s := over(t, runtime.New(nil), nil)
	l, err := throttler.New(throttler.Config{Storage: s, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1000), throttler.NewBucket(time.Hour, 900).Continuous()}})
	require.NoError(t, err)
	var errs []error
	for range 500 {
		v, err := l.Consume("a")
		errs = append(errs, err, l.Refund(t.Context(), v))
	}
	require.NoError(t, errors.Join(errs...))
	assert.Positive(t, s.State().Local)
	require.NoError(t, s.Close(t.Context()))
	l, err = throttler.New(throttler.Config{Storage: s, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1000)}})
	require.NoError(t, err)
	_, err = l.Peek(t.Context(), "a")
	require.ErrorIs(t, err, storage.ErrClosed)
}
