package failover_test

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/failover"
)

// Each rule of the protocol by itself, in virtual time. Buckets of every kind hold 100 tokens an hour, so that none
// comes back during a test.

var bg = context.Background()

// each runs a test for every kind, on a world without processes. Time is virtual: a test sleeps to let the others act.
func each(t *testing.T, test func(*testing.T, *world)) {
	t.Parallel()
	for _, kind := range storecheck.Kinds {
		t.Run(kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rule, faults := law.NewRule("hourly", kind, time.Hour, 100, 1)
				require.Empty(t, faults)
				w := &world{t: t, began: time.Now(), redis: newStore("redis"), pg: newStore("postgres"), rules: []law.Rule{rule}}
				w.pg.ahead = (10 * time.Minute).Microseconds() // the clocks of the servers differ
				test(t, w)
				for _, p := range w.processes {
					_ = p.storage.Close(bg)
				}
				<-time.After(2 * time.Second)
			})
		})
	}
}

// process starts a process without load.
func (w *world) process(o *failover.Options) *process {
	p := &process{number: len(w.processes), redis: &link{to: w.redis, trip: trip}, pg: &link{to: w.pg, trip: 2 * trip, timeout: 250 * time.Millisecond}}
	var err error
	p.storage, err = failover.Open(p.redis, p.pg, o, 1)
	require.NoError(w.t, err)
	w.processes = append(w.processes, p)
	w.redis.scripts[p.redis] = true
	return p
}

func (w *world) request(n int64) storecheck.Request { return w.req("a", n) }

func (w *world) req(id string, n int64) storecheck.Request {
	return storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart(id, w.rules, n)}}
}

// do asks for n tokens of an identifier and reports whether they were admitted.
func (w *world) do(p *process, id string, n int64) bool {
	w.t.Helper()
	v, err := storecheck.Decide(bg, p.storage, w.req(id, n))
	require.NoError(w.t, err)
	return v.Allowed
}

// owes returns what an identifier has spent, by what a store has.
func (w *world) owes(s *store, identifier string) (n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.debt(replica.Debt{Identifier: identifier, Rules: law.NewRuleSet(w.rules...)}).Amounts[0] {
		n += a.N
	}
	return n
}

// takes asks n times for a token, and returns how often it was admitted.
func (w *world) takes(p *process, n int) (taken int) {
	w.t.Helper()
	for range n {
		v, err := storecheck.Decide(bg, p.storage, w.request(1))
		require.NoError(w.t, err)
		if v.Allowed {
			taken++
		}
	}
	return taken
}

// owed is owes for the one identifier of most tests.
func (w *world) owed(s *store) int64 { return w.owes(s, "a") }

// settle waits until everything admitted is recorded.
func settle() { <-time.After(2*interval + 20*time.Millisecond) }

func empty() map[id]map[law.BucketID]law.State {
	return map[id]map[law.BucketID]law.State{}
}

// back waits until Redis decides in every process.
func (w *world) back() {
	w.t.Helper()
	<-time.After(6 * time.Second)
	for _, p := range w.processes {
		require.False(w.t, p.storage.State().Degraded)
	}
}

func TestRule2TheLedgerIsChargedWithinTwoIntervals(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.Equal(t, 60, w.takes(p, 60))
		settle()
		assert.EqualValues(t, 60, w.owed(w.pg))
		assert.Zero(t, p.storage.State().Pending)
		w.redis.setDown(true)
		assert.Equal(t, 40, w.takes(p, 50))
	})
}

func TestRule2ChargedOnceWhenTheAnswerIsLost(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		p.pg.set(loses)
		require.Equal(t, 30, w.takes(p, 30))
		<-time.After(600 * time.Millisecond)
		p.pg.set(fine)
		<-time.After(time.Second)
		assert.EqualValues(t, 30, w.owed(w.pg))
		require.Equal(t, 5, w.takes(p, 5))
		settle()
		assert.EqualValues(t, 35, w.owed(w.pg))
	})
}

func TestRule2WhatIsPendingForLongCountsOnce(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p, other := w.process(nil), w.process(nil)
		p.pg.set(swallows)
		other.pg.set(swallows)
		require.Equal(t, 20, w.takes(p, 20))
		require.Equal(t, 30, w.takes(other, 30))
		<-time.After(10 * time.Second)
		p.pg.set(fine)
		other.pg.set(fine)
		<-time.After(time.Second)
		assert.EqualValues(t, 50, w.owed(w.pg), "the sum of both, as Redis has it")
		assert.EqualValues(t, 50, w.owed(w.redis))
		assert.Equal(t, 50, w.takes(p, 60))
	})
}

func TestRule3RedisIsRaisedToTheLedger(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		cut, other := w.process(nil), w.process(nil)
		cut.redis.set(refuses)
		require.Equal(t, 60, w.takes(cut, 60))
		require.Equal(t, 1, w.takes(other, 1), "it cannot know yet")
		settle()
		assert.Equal(t, 39, w.takes(other, 100))
		assert.Positive(t, other.storage.State().Relayed)
	})
}

func TestRule4PendingIsChargedBeforePostgresDecides(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.Equal(t, 60, w.takes(p, 60))
		w.redis.setDown(true)
		v, err := storecheck.Decide(bg, p.storage, w.request(41))
		require.NoError(t, err)
		assert.False(t, v.Allowed)
		assert.Equal(t, 40, w.takes(p, 50))
	})
}

func TestRule4ALostCallIsDecidedByPostgres(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.Equal(t, 10, w.takes(p, 10))
		p.redis.set(loses)
		v, err := storecheck.Decide(bg, p.storage, w.request(1))
		require.NoError(t, err)
		assert.True(t, v.Allowed)
		assert.Equal(t, "postgres", v.Source())
		assert.True(t, v.Degraded())
		p.redis.set(fine)
		require.False(t, p.storage.State().Degraded, "one failure opens nothing")
		settle()
		assert.EqualValues(t, 11, w.owed(w.redis), "its answer was lost, and Postgres's token is the same one")
		assert.EqualValues(t, 11, w.owed(w.pg))
	})
}

func TestRule7RedisIsReadThroughAfterAnOutage(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p, other := w.process(nil), w.process(nil)
		require.Equal(t, 10, w.takes(p, 10))
		require.Equal(t, 10, w.takes(other, 10))
		settle()
		w.redis.setDown(true)
		require.Equal(t, 50, w.takes(p, 50))
		require.Equal(t, 1, w.takes(other, 1))
		w.redis.setDown(false)
		w.back()
		assert.Equal(t, 29, w.takes(other, 100), "Redis has seen 20 of 71")
	})
}

func TestRule7RedisIsReadThroughAfterARestart(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.Equal(t, 60, w.takes(p, 60))
		settle()
		w.redis.restore(empty())
		assert.Equal(t, 40, w.takes(p, 100))
		require.False(t, p.storage.State().Degraded)
	})
}

func TestRule7WhoOnlyLooksIsToldTheTruthAfterARestart(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.Equal(t, 100, w.takes(p, 100))
		settle()
		w.redis.setDown(true)
		require.True(t, w.do(p, "b", 1))
		w.redis.restore(empty())
		w.back()
		v, err := storecheck.Decide(t.Context(), p.storage, w.request(0))
		require.NoError(t, err)
		assert.Zero(t, v.Count(0).Remaining)
	})
}

func TestRule7WhatIsPendingIsNotLostWithRedis(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.Equal(t, 60, w.takes(p, 60))
		w.redis.restore(empty())
		assert.Equal(t, 40, w.takes(p, 100))
	})
}

func TestRule7ALaggingReplicaIsReadThrough(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.Equal(t, 30, w.takes(p, 30))
		before := w.redis.snapshot()
		require.Equal(t, 30, w.takes(p, 30))
		settle()
		w.redis.setDown(true)
		require.Equal(t, 10, w.takes(p, 10))
		w.redis.restore(before)
		w.back()
		assert.Equal(t, 30, w.takes(p, 100))
	})
}

func TestRule7ASlowReadIsWaitedFor(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.Equal(t, 60, w.takes(p, 60))
		settle()
		p.pg.slow(30 * time.Millisecond) // 15 to 45 ms each way
		w.redis.restore(empty())
		assert.Equal(t, 40, w.takes(p, 100))
	})
}

func TestRule7PostgresDecidesIfRaisingFails(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.Equal(t, 60, w.takes(p, 60))
		settle()
		p.pg.slow(15 * time.Millisecond)
		w.redis.restore(empty())
		go func() { <-time.After(5 * time.Millisecond); p.redis.set(swallows) }()
		began := time.Now()
		require.Equal(t, 1, w.takes(p, 1))
		assert.LessOrEqual(t, time.Since(began), 260*time.Millisecond)
	})
}

func TestRule7AReadThatTakesLongIsMadeUpFor(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.Equal(t, 60, w.takes(p, 60))
		settle()
		p.pg.set(swallows)
		w.redis.restore(empty())
		began := time.Now()
		require.Equal(t, 1, w.takes(p, 1))
		assert.LessOrEqual(t, time.Since(began), 110*time.Millisecond)
		p.pg.set(fine)
		<-time.After(time.Second)
		assert.Equal(t, 39, w.takes(p, 100))
	})
}

func TestRule5ADenialByRedisIsFinal(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.Equal(t, 100, w.takes(p, 100))
		v, err := storecheck.Decide(bg, p.storage, w.request(1))
		require.NoError(t, err)
		assert.False(t, v.Allowed)
		assert.Equal(t, "redis", v.Source())
	})
}

func TestRule8RefundsReachTheLedger(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		refund := func(n int64) {
			v, err := storecheck.Decide(bg, p.storage, w.request(n))
			require.NoError(t, err)
			settle()
			c := storage.Charge{Identifier: "a", Rules: law.NewRuleSet(w.rules...), Amounts: []storage.Amount{{N: -n, In: v.Count(0).ResetAfter - (law.Monotonic() - v.At())}}}
			require.NoError(t, p.storage.Charge(bg, &c))
		}
		require.Equal(t, 10, w.takes(p, 10))
		refund(20)
		settle()
		assert.InDelta(t, 10, w.owed(w.pg), 1)
		w.redis.setDown(true)
		refund(20)
		assert.InDelta(t, 10, w.owed(w.pg), 1)
	})
}

func TestRule8AResetClearsBothStores(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		reset := func() { require.NoError(t, p.storage.Reset(bg, "", "a")) }
		require.Equal(t, 60, w.takes(p, 60))
		reset()
		assert.Zero(t, w.owed(w.redis))
		assert.Zero(t, w.owed(w.pg), "not even what was pending")

		require.Equal(t, 60, w.takes(p, 60))
		settle()
		p.pg.set(refuses)
		reset()
		assert.Zero(t, w.owed(w.redis))
		require.Equal(t, 5, w.takes(p, 5))
		assert.EqualValues(t, 60, w.owed(w.pg))
		p.pg.set(fine)
		<-time.After(500 * time.Millisecond)
		assert.EqualValues(t, 5, w.owed(w.pg))

		w.redis.setDown(true)
		require.Equal(t, 60, w.takes(p, 60))
		reset()
		assert.Zero(t, w.owed(w.pg))
		w.redis.setDown(false)
		w.back()
		assert.Equal(t, 100, w.takes(p, 110))
	})
}

// A call reads the ledger's debt for Rule 7, and what that debt counts as spent becomes free before the call raises Redis
// to it. The slow ledger makes the call read at any time before, during and after that.
func TestRule8ADebtFromBeforeTokensWereFreeIsNotRaisedAfterwards(t *testing.T) {
	for what, free := range map[string]func(*world, *process, *storecheck.Verdict) error{
		"a Reset":  func(_ *world, p *process, _ *storecheck.Verdict) error { return p.storage.Reset(bg, "", "a") },
		"a Refund": func(w *world, p *process, v *storecheck.Verdict) error { return w.giveBack(p, v) },
	} {
		for after := 5 * time.Millisecond; after < 120*time.Millisecond; after += 5 * time.Millisecond {
			t.Run(fmt.Sprintf("%s after %v", what, after), func(t *testing.T) {
				each(t, func(t *testing.T, w *world) {
					p := w.process(&failover.Options{FlushInterval: 5 * time.Millisecond, LedgerTimeout: time.Second})
					v, err := storecheck.Decide(bg, p.storage, w.request(100))
					require.NoError(t, err)
					require.True(t, v.Allowed)
					settle()
					w.redis.setDown(true)
					w.takes(p, 3)
					w.redis.restore(empty()) // Redis comes back without what it had
					w.back()
					settle()
					p.pg.slow(30 * time.Millisecond)
					var first sync.WaitGroup
					first.Go(func() { w.do(p, "a", 1) })
					<-time.After(after)
					require.NoError(t, free(w, p, &v))
					first.Wait()
					<-time.After(2 * time.Second)
					assert.LessOrEqual(t, w.owed(w.pg), int64(1), "the ledger")
					assert.GreaterOrEqual(t, w.takes(p, 100), 99)
				})
			})
		}
	}
}

func TestRule9TheErrorHasBothCauses(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.Equal(t, 1, w.takes(p, 1))
		w.redis.setDown(true)
		for _, f := range []fault{refuses, swallows} {
			p.pg.set(f)
			for range 3 {
				began := time.Now()
				_, err := storecheck.Decide(bg, p.storage, w.request(1))
				require.ErrorIs(t, err, storage.ErrUnavailable)
				assert.ErrorContains(t, err, "neither Redis")
				assert.LessOrEqual(t, time.Since(began), 260*time.Millisecond)
			}
		}
		assert.ErrorIs(t, p.storage.Reset(bg, "", "a"), storage.ErrUnavailable)
		assert.ErrorIs(t, p.storage.Charge(bg, &storage.Charge{Identifier: "a", Rules: law.NewRuleSet(w.rules...), Amounts: make([]storage.Amount, 1)}), storage.ErrUnavailable)
	})
}

func TestRule9AProcessHandsOutItsShare(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(&failover.Options{Local: &failover.LocalOptions{Share: 0.25}})
		require.Equal(t, 1, w.takes(p, 1))
		w.redis.setDown(true)
		p.pg.set(refuses)
		assert.Equal(t, 25, w.takes(p, 50))
		v, err := storecheck.Decide(bg, p.storage, w.request(1))
		require.NoError(t, err)
		assert.Equal(t, "runtime", v.Source())
		assert.True(t, v.Degraded())
		_, err = storecheck.Decide(bg, p.storage, w.request(26))
		assert.ErrorIs(t, err, storage.ErrUnavailable, "more than the share ever holds")
	})
}

func TestRule9TheShareOfNothingIsNothing(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		none, faults := law.NewRule("none", w.rules[0].Kind, time.Hour, 0, 0)
		require.Empty(t, faults)
		p := w.process(&failover.Options{Local: &failover.LocalOptions{Share: 0.25}})
		w.redis.setDown(true)
		p.pg.set(refuses)
		part := storecheck.NewPart("a", []law.Rule{none}, 5)
		part.AtMost = true
		v, err := storecheck.Decide(bg, p.storage, storecheck.Request{Parts: []storecheck.Part{part}})
		require.NoError(t, err)
		assert.Equal(t, "runtime", v.Source())
		assert.False(t, v.Allowed)
	})
}

func TestRule9WhenOnlyRedisIsLeftItDecides(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		w.redis.setDown(true)
		require.Equal(t, 1, w.takes(p, 1))
		require.True(t, p.storage.State().Degraded)
		w.redis.setDown(false)
		p.pg.set(refuses)
		assert.Equal(t, 1, w.takes(p, 1), "before the breaker closes")
		assert.True(t, p.storage.State().Degraded)
	})
}

func TestRule9IsolationEndsAfterItsTime(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(&failover.Options{MaxIsolation: time.Second})
		p.pg.set(refuses)
		require.Equal(t, 5, w.takes(p, 5))
		<-time.After(500 * time.Millisecond)
		require.Equal(t, 5, w.takes(p, 5))
		<-time.After(time.Second)
		_, err := storecheck.Decide(bg, p.storage, w.request(1))
		require.ErrorIs(t, err, storage.ErrUnavailable)
		p.pg.set(fine)
		<-time.After(500 * time.Millisecond)
		assert.Equal(t, 5, w.takes(p, 5))
	})
}

func TestRule6ACallerThatLeavesChangesNothing(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		p.redis.set(swallows)
		for range 3 {
			ctx, cancel := context.WithTimeout(bg, 10*time.Millisecond)
			_, err := storecheck.Decide(ctx, p.storage, w.request(1))
			cancel()
			assert.ErrorIs(t, err, context.DeadlineExceeded)
		}
		<-time.After(50 * time.Millisecond)
		assert.True(t, p.storage.State().Degraded)

		ctx, cancel := context.WithCancel(bg)
		cancel()
		_, err := storecheck.Decide(ctx, p.storage, w.request(1))
		assert.ErrorIs(t, err, context.Canceled)
		assert.Zero(t, w.owed(w.pg))
	})
}

func TestRule6AFlappingLinkIsLeftAlone(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		var mu sync.Mutex
		var lost, back []time.Time
		p := w.process(&failover.Options{Observe: func(e failover.Event) {
			mu.Lock()
			defer mu.Unlock()
			switch e.Kind {
			case failover.PrimaryLost:
				lost = append(lost, time.Now())
			case failover.PrimaryBack:
				back = append(back, time.Now())
			}
		}})
		for range 200 {
			p.redis.set(swallows)
			assert.LessOrEqual(t, w.takes(p, 1), 1)
			<-time.After(50 * time.Millisecond)
			p.redis.set(fine)
			assert.LessOrEqual(t, w.takes(p, 1), 1)
			<-time.After(50 * time.Millisecond)
		}
		w.back()
		mu.Lock()
		defer mu.Unlock()
		require.NotEmpty(t, lost)
		require.Len(t, back, len(lost))
		least := 300 * time.Millisecond
		for i := range back { // how many there are depends on when Redis happens to be tried
			assert.GreaterOrEqual(t, back[i].Sub(lost[i]), least, "outage %d", i)
			least = min(2*least, 5*time.Second)
		}
	})
}

func TestRule10CloseWritesWhatIsPending(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.Equal(t, 60, w.takes(p, 60))
		require.NoError(t, p.storage.Close(bg))
		assert.EqualValues(t, 60, w.owed(w.pg))
		_, err := storecheck.Decide(bg, p.storage, w.request(1))
		assert.ErrorIs(t, err, storage.ErrClosed)
		assert.ErrorIs(t, p.storage.Reset(bg, "", "a"), storage.ErrClosed)
		assert.NoError(t, p.storage.Close(bg), "twice")

		p = w.process(nil)
		p.pg.set(swallows)
		require.Equal(t, 1, w.takes(p, 1))
		began := time.Now()
		assert.Error(t, p.storage.Close(bg), "it could not be written")
		assert.LessOrEqual(t, time.Since(began), 1100*time.Millisecond)
	})
}

func TestRule1NoMoreIsPendingThanMaxPending(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(&failover.Options{MaxPending: 10})
		p.pg.set(refuses)
		for i := range 30 {
			v, err := storecheck.Decide(bg, p.storage, storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart(string(rune('A'+i)), w.rules, 1)}})
			require.NoError(t, err)
			require.True(t, v.Allowed)
		}
		st := p.storage.State()
		assert.LessOrEqual(t, st.Pending, 10)
		assert.Positive(t, st.Forgotten)
	})
}

func TestWhatHappensIsObserved(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		var mu sync.Mutex
		events := map[failover.Kind]failover.Event{}
		last := func(k failover.Kind) failover.Event {
			mu.Lock()
			defer mu.Unlock()
			require.Contains(t, events, k)
			return events[k]
		}
		p := w.process(&failover.Options{Observe: func(e failover.Event) {
			mu.Lock()
			defer mu.Unlock()
			events[e.Kind] = e
		}})
		require.Equal(t, 1, w.takes(p, 1))
		settle()
		assert.InDelta(t, interval, last(failover.Flushed).Lag, float64(20*time.Millisecond))
		w.redis.setDown(true)
		require.Equal(t, 1, w.takes(p, 1))
		assert.ErrorIs(t, last(failover.PrimaryLost).Err, storage.ErrUnavailable)
		st := p.storage.State()
		assert.True(t, st.Degraded)
		assert.Error(t, st.Cause)
		assert.EqualValues(t, 1, st.Transitions)
		stats := maps.Collect(p.storage.Stats())
		assert.InDelta(t, 1, stats["failover_degraded"], 0)
		assert.InDelta(t, 1, stats["failover_transitions_total"], 0)
		w.redis.setDown(false)
		w.back()
		assert.NoError(t, last(failover.PrimaryBack).Err)
		p.pg.set(refuses)
		require.Equal(t, 1, w.takes(p, 1))
		settle()
		assert.ErrorIs(t, last(failover.FlushFailed).Err, storage.ErrUnavailable)
		assert.Error(t, p.storage.State().FlushError)
		p.pg.set(fine)
	})
}

func TestRule1SeveralPartsAreAllOrNothing(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		small, _ := law.NewRule("small", w.rules[0].Kind, time.Hour, 5, 1)
		r := storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart("a", w.rules, 1), storecheck.NewPart("b", []law.Rule{w.rules[0], small}, 1)}}
		take := func(n int) (taken int) {
			for range n {
				v, err := storecheck.Decide(bg, p.storage, r)
				require.NoError(t, err)
				if v.Allowed {
					taken++
				}
			}
			return taken
		}
		require.Equal(t, 2, take(2))
		w.redis.setDown(true)
		require.Equal(t, 2, take(2))
		w.redis.setDown(false)
		w.back()
		assert.Equal(t, 1, take(10))
		settle()
		assert.EqualValues(t, 5, w.owed(w.redis))
		assert.EqualValues(t, 5, w.owed(w.pg))
	})
}

func TestWrongOptionsAreNamed(t *testing.T) {
	t.Parallel()
	_, err := failover.New(nil, nil, nil)
	var fault *failover.OptionError
	require.ErrorAs(t, err, &fault)
	for field, o := range map[string]failover.Options{
		"PrimaryTimeout": {PrimaryTimeout: -1},
		"LedgerTimeout":  {LedgerTimeout: time.Microsecond},
		"FlushInterval":  {FlushInterval: -1},
		"MaxPending":     {MaxPending: -1},
		"MaxIsolation":   {MaxIsolation: -1},
		"Local.Share":    {Local: &failover.LocalOptions{Share: 1.5}},
	} {
		_, err := failover.Open(&link{}, &link{}, &o, 1)
		require.ErrorAs(t, err, &fault, field)
		assert.Equal(t, field, fault.Field)
	}
}

func TestRule3AsMuchIsAdmittedAsByRedisAlone(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		rule, _ := law.NewRule("second", w.rules[0].Kind, time.Second, 50, 50)
		r := storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart("busy", []law.Rule{rule}, 1)}}
		alone := newStore("alone")
		admitted, without := 0, 0
		for range 4 {
			w.process(nil)
		}
		for range 5000 { // rounds of 4 ms
			for _, p := range w.processes {
				v, err := storecheck.Decide(bg, p.storage, r)
				require.NoError(t, err)
				require.Equal(t, "redis", v.Source())
				if v.Allowed {
					admitted++
				}
				if v, _ := alone.decide(nil, r.Of(), false, 0); v.Allowed {
					without++
				}
			}
		}
		assert.GreaterOrEqual(t, 100*admitted, 99*without, "%d instead of %d", admitted, without)
		t.Logf("%d instead of %d", admitted, without)
	})
}

func TestRule3ABurstIsBackAsInRedisAlone(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		rule, _ := law.NewRule("limit", w.rules[0].Kind, time.Second, 100, 100)
		w.rules = []law.Rule{rule}
		alone, r := newStore("alone"), w.request(1)
		p := []*process{w.process(nil), w.process(nil)}
		for i := range 80 {
			require.Equal(t, 1, w.takes(p[i%2], 1))
			v, _ := alone.decide(nil, r.Of(), false, 0)
			require.True(t, v.Allowed)
		}
		settle()
		assert.InDelta(t, w.owed(alone), w.owed(w.redis), 1)
		assert.LessOrEqual(t, w.owed(w.pg), w.owed(alone)+1)
	})
}

func TestRule2WhatIsInFlightIsPending(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		p.pg.set(swallows)
		require.Equal(t, 1, w.takes(p, 1))
		<-time.After(interval + 50*time.Millisecond)
		st := p.storage.State()
		require.NoError(t, st.FlushError, "it is still on its way")
		assert.Equal(t, 1, st.Pending)
		assert.InDelta(t, interval+50*time.Millisecond, st.Lag, float64(10*time.Millisecond))
	})
}
