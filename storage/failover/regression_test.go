package failover_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/failover"
)

// Each of these tests has failed once, for a fault in the code.

// giveBack refunds what a verdict took.
func (w *world) giveBack(p *process, v *storecheck.Verdict) error {
	a := storage.Amount{N: -v.Part(0).Costs[0], In: v.Count(0).ResetAfter - (law.Monotonic() - v.At())}
	return p.storage.Charge(bg, &storage.Charge{Identifier: "a", Rules: law.NewRuleSet(w.rules...), Amounts: []storage.Amount{a}})
}

// strict is a ledger that rejects what a *postgres.Storage rejects.
type strict struct{ *link }

func (l strict) Record(ctx context.Context, origin string, seq int64, batch []storage.Charge) ([]replica.Debt, error) {
	for i := range batch {
		if n := len(batch[i].Rules.Rules); n > law.MaxBuckets {
			return nil, storage.TooManyBuckets(batch[i].Rules, n)
		}
	}
	readable := slices.DeleteFunc(slices.Clone(batch), func(c storage.Charge) bool { return c.Identifier == "unreadable" })
	answers, err := l.link.Record(ctx, origin, seq, readable)
	if err != nil || len(readable) == len(batch) {
		return answers, err
	}
	debts := make([]replica.Debt, len(batch))
	for i := range batch {
		if batch[i].Identifier != "unreadable" {
			debts[i], answers = answers[0], answers[1:]
		}
	}
	return debts, nil
}

func (l strict) Raise(ctx context.Context, d replica.Debt) error {
	if d.Identifier == "corrupt" {
		return storage.ErrCorruptState
	}
	return l.link.Raise(ctx, d)
}

// strictProcess starts a process with a strict ledger.
func (w *world) strictProcess(o *failover.Options) *process {
	p := &process{number: len(w.processes), redis: &link{to: w.redis, trip: trip}, pg: &link{to: w.pg, trip: 2 * trip, timeout: 250 * time.Millisecond}}
	var err error
	p.storage, err = failover.Open(p.redis, strict{p.pg}, o, 1)
	require.NoError(w.t, err)
	w.processes = append(w.processes, p)
	w.redis.scripts[p.redis] = true
	return p
}

func TestRegressionASecondProcessSeesTheRestartToo(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p, other := w.process(nil), w.process(nil)
		require.True(t, w.do(p, "a", 60))
		<-time.After(time.Second)
		w.redis.restore(empty())
		require.True(t, w.do(other, "b", 1))
		<-time.After(time.Second)
		assert.False(t, w.do(p, "a", 60), "one process uses a, which was quiet for 2 s")
	})
}

func TestRegressionASecondRestartBeginsTheDoubtAnew(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		w.redis.restore(empty())
		require.True(t, w.do(p, "a", 1))
		require.True(t, w.do(p, "b", 1))
		<-time.After(time.Second)
		before := w.redis.snapshot()
		require.True(t, w.do(p, "a", 60))
		require.True(t, w.do(p, "b", 60))
		<-time.After(time.Second)
		w.redis.restore(before)
		assert.False(t, w.do(p, "a", 60), "a")
		assert.False(t, w.do(p, "b", 60), "b")
	})
}

func TestRegressionAForceDoesNotEndTheDoubt(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.True(t, w.do(p, "a", 60))
		<-time.After(time.Second)
		w.redis.setDown(true)
		require.True(t, w.do(p, "a", 20))
		w.redis.restore(empty())
		w.back()
		r := w.req("a", 1)
		r.Mode = storage.Force
		_, err := storecheck.Decide(bg, p.storage, r)
		require.NoError(t, err)
		assert.False(t, w.do(p, "a", 60))
	})
}

func TestRegressionAChargeDoesNotEndTheDoubt(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.True(t, w.do(p, "a", 60))
		<-time.After(time.Second)
		w.redis.setDown(true)
		require.True(t, w.do(p, "a", 20))
		w.redis.restore(empty())
		w.back()
		require.NoError(t, p.storage.Charge(bg, &storage.Charge{Identifier: "a", Rules: law.NewRuleSet(w.rules...), Amounts: []storage.Amount{{N: 1, In: time.Hour.Microseconds()}}}))
		assert.False(t, w.do(p, "a", 60))
	})
}

func TestRegressionRefundsDoNotKeepRedisFromBeingRaised(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		cut, other := w.process(nil), w.process(nil)
		cut.redis.set(refuses)
		stop := time.Now().Add(5 * time.Second)
		done := make(chan struct{})
		for i := range 20 {
			go func() {
				<-time.After(time.Duration(i) * 300 * time.Microsecond)
				for time.Now().Before(stop) {
					v, err := storecheck.Decide(bg, other.storage, w.req("a", 1))
					if err == nil && v.Allowed {
						<-time.After(5 * time.Millisecond)
						_ = w.giveBack(other, &v)
					}
					<-time.After(3 * time.Millisecond)
				}
				done <- struct{}{}
			}()
		}
		<-time.After(time.Second)
		require.True(t, w.do(cut, "a", 60))
		<-time.After(3500 * time.Millisecond)
		assert.GreaterOrEqual(t, w.owes(w.redis, "a"), int64(50))
		for range 20 {
			<-done
		}
	})
}

func TestRegressionDebtIsRecordedAfterPostgresWasAway(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		p.pg.set(refuses)
		r := w.req("a", 100)
		r.Mode = storage.Force
		for range 3 {
			_, err := storecheck.Decide(bg, p.storage, r)
			require.NoError(t, err)
		}
		<-time.After(3 * time.Second)
		p.pg.set(fine)
		<-time.After(time.Second)
		assert.EqualValues(t, 300, w.owes(w.redis, "a"))
		assert.EqualValues(t, 300, w.owes(w.pg, "a"))
	})
}

func TestRegressionAChargeIsRecordedAfterPostgresWasAway(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.True(t, w.do(p, "a", 50))
		<-time.After(time.Second)
		p.pg.set(refuses)
		require.NoError(t, p.storage.Charge(bg, &storage.Charge{Identifier: "a", Rules: law.NewRuleSet(w.rules...), Amounts: []storage.Amount{{N: 10, In: 100 * time.Hour.Microseconds()}}}))
		<-time.After(3 * time.Second)
		p.pg.set(fine)
		<-time.After(time.Second)
		assert.EqualValues(t, 60, w.owes(w.pg, "a"))
	})
}

func TestRegressionAResetIsRecordedBeyondMaxPending(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(&failover.Options{MaxPending: 5})
		require.True(t, w.do(p, "a", 50))
		<-time.After(time.Second)
		p.pg.set(refuses)
		for i := range 1000 { // more than the 512 that may be in flight
			w.do(p, fmt.Sprint("x", i), 1)
		}
		require.NoError(t, p.storage.Reset(bg, "", "a"))
		p.pg.set(fine)
		<-time.After(3 * time.Second)
		assert.Zero(t, w.owes(w.pg, "a"))
	})
}

func TestRegressionALateResetTakesNothingBack(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.True(t, w.do(p, "a", 30))
		<-time.After(time.Second)
		p.redis.set(swallows)
		go func() { <-time.After(102 * time.Millisecond); p.redis.set(fine) }()
		require.NoError(t, p.storage.Reset(bg, "", "a"))
		p.redis.set(fine)
		require.False(t, p.storage.State().Degraded)
		require.True(t, w.do(p, "a", 60))
		<-time.After(time.Second)
		assert.False(t, w.do(p, "a", 60))
	})
}

func TestRegressionALateResetNeedsNoTraffic(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.True(t, w.do(p, "a", 30))
		<-time.After(time.Second)
		p.redis.set(swallows)
		go func() { <-time.After(102 * time.Millisecond); p.redis.set(fine) }()
		require.NoError(t, p.storage.Reset(bg, "", "a"))
		p.redis.set(fine)
		<-time.After(20 * time.Second)
		assert.Zero(t, w.owes(w.redis, "a"))
	})
}

func TestRegressionACallInDoubtTakesNoLonger(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.True(t, w.do(p, "a", 30))
		<-time.After(time.Second)
		w.redis.restore(empty())
		p.pg.set(swallows)
		go func() { <-time.After(20 * time.Millisecond); p.redis.set(swallows) }()
		p.redis.slow(30 * time.Millisecond) // 15 to 45 ms each way
		began := time.Now()
		_, _ = storecheck.Decide(bg, p.storage, w.req("a", 1))
		assert.LessOrEqual(t, time.Since(began), 260*time.Millisecond)
	})
}

func TestRegressionALongIntervalChargesLevelsToo(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(&failover.Options{FlushInterval: 5 * time.Second})
		require.True(t, w.do(p, "a", 40))
		<-time.After(2 * time.Second)
		p.redis.set(refuses)
		require.True(t, w.do(p, "a", 10))
		p.redis.set(fine)
		for p.storage.State().Degraded {
			<-time.After(10 * time.Millisecond)
		}
		<-time.After(20 * time.Second)
		require.True(t, w.do(p, "a", 30))
		<-time.After(20 * time.Second)
		assert.EqualValues(t, 80, w.owes(w.pg, "a"))
	})
}

func TestRegressionManyRefundsPushOutNothing(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		p.pg.set(refuses)
		require.True(t, w.do(p, "a", 60))
		for range 300 {
			v, err := storecheck.Decide(bg, p.storage, w.req("a", 1))
			require.NoError(t, err)
			require.NoError(t, w.giveBack(p, &v))
		}
		p.pg.set(fine)
		<-time.After(2 * time.Second)
		assert.InDelta(t, 60, w.owes(w.pg, "a"), 2)
	})
}

func TestRegressionManyBucketsLoseNothingOfOthers(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.strictProcess(nil)
		require.True(t, w.do(p, "a", 60))
		for i := range 17 {
			rule, _ := law.NewRule(fmt.Sprint("r", i), w.rules[0].Kind, time.Millisecond, 100, 100)
			v, err := storecheck.Decide(bg, p.storage, storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart("many", []law.Rule{rule}, 1)}})
			require.NoError(t, err)
			require.True(t, v.Allowed)
		}
		<-time.After(time.Second)
		assert.EqualValues(t, 60, w.owes(w.pg, "a"))
	})
}

func TestRegressionACorruptRowLosesNothingOfOthers(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.strictProcess(nil)
		p.pg.set(refuses)
		require.True(t, w.do(p, "corrupt", 1))
		require.True(t, w.do(p, "a", 30))
		<-time.After(2 * time.Second)
		p.pg.set(fine)
		<-time.After(2 * time.Second)
		assert.EqualValues(t, 30, w.owes(w.pg, "a"))
	})
}

func TestRegressionWhatTheLedgerLeavesOutIsForgotten(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		var fault error
		p := w.strictProcess(&failover.Options{Observe: func(e failover.Event) {
			if e.Kind == failover.Flushed && e.Err != nil {
				fault = e.Err
			}
		}})
		require.True(t, w.do(p, "unreadable", 1))
		require.True(t, w.do(p, "a", 30))
		<-time.After(2 * time.Second)
		assert.EqualValues(t, 30, w.owes(w.pg, "a"))
		assert.EqualValues(t, 1, p.storage.State().Forgotten)
		assert.ErrorIs(t, fault, storage.ErrCorruptState)
	})
}

func TestRegressionWhatFollowsARejectedBatchIsRecorded(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.strictProcess(nil)
		p.pg.set(loses)
		require.True(t, w.do(p, "corrupt", 1))
		require.True(t, w.do(p, "a", 30))
		<-time.After(150 * time.Millisecond) // the batch is recorded, and its answer lost
		p.pg.set(refuses)
		<-time.After(2 * time.Second)
		p.pg.set(fine)
		<-time.After(400 * time.Millisecond) // the batch is tried again, which the ledger has already
		require.True(t, w.do(p, "b", 60))
		<-time.After(2 * time.Second)
		assert.EqualValues(t, 60, w.owes(w.pg, "b"))
	})
}

func TestRegressionManyIdentifiersAreReadThroughAtOnce(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		p.pg.slow(5 * time.Millisecond) // each way
		p.pg.timeout = 500 * time.Millisecond
		const n = 200
		for i := range n {
			go w.do(p, fmt.Sprint("i", i), 60)
		}
		<-time.After(3 * time.Second)
		w.redis.setDown(true)
		for i := range n {
			go w.do(p, fmt.Sprint("i", i), 30)
		}
		<-time.After(2 * time.Second)
		w.redis.restore(empty())
		w.back()
		over := 0
		done := make(chan bool)
		for i := range n {
			go func() {
				<-time.After(time.Duration(i) * time.Millisecond)
				v, err := storecheck.Decide(bg, p.storage, w.req(fmt.Sprint("i", i), 30))
				done <- err == nil && v.Allowed
			}()
		}
		for range n {
			if <-done {
				over++
			}
		}
		assert.Zero(t, over)
	})
}

func TestRegressionAChargeSucceedsWhenOnlyRedisIsLeft(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		w.redis.setDown(true)
		w.do(p, "a", 1)
		require.True(t, p.storage.State().Degraded)
		w.redis.setDown(false)
		p.pg.set(refuses)
		assert.NoError(t, p.storage.Charge(bg, &storage.Charge{Identifier: "a", Rules: law.NewRuleSet(w.rules...), Amounts: []storage.Amount{{N: 1, In: 1000000}}}))
	})
}

// A raise lowers nothing, so it cannot bring a refund to the ledger, which would also raise Redis again.
func TestRegressionARefundIsRecordedAfterPostgresWasAway(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		v, err := storecheck.Decide(bg, p.storage, w.request(60))
		require.NoError(t, err)
		settle()
		require.EqualValues(t, 60, w.owed(w.pg))
		p.pg.set(swallows)
		require.Equal(t, 20, w.takes(p, 20))
		require.NoError(t, w.giveBack(p, &v))
		require.EqualValues(t, 20, w.owed(w.redis))
		<-time.After(10 * time.Second)
		p.pg.set(fine)
		<-time.After(time.Second)
		assert.EqualValues(t, 20, w.owed(w.pg))
		require.Equal(t, 1, w.takes(p, 1))
		settle()
		assert.EqualValues(t, 21, w.owed(w.redis))
	})
}

func TestRegressionACancellationIsRecordedAfterPostgresWasAway(t *testing.T) {
	line(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		p.pg.set(swallows)
		w.reserves(p, "redis")
		w.reserves(p, "redis")
		last, _ := w.reserves(p, "redis")
		w.cancel(p, last)
		require.EqualValues(t, 2, w.owed(w.redis))
		<-time.After(10 * time.Second)
		p.pg.set(fine)
		<-time.After(time.Second)
		assert.EqualValues(t, 2, w.owed(w.pg))
		_, at := w.reserves(p, "redis")
		assert.InDelta(t, 2*36*time.Second, at, float64(time.Second))
	})
}
