package failover_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
)

// line runs a test on a world with a leaky bucket of 100 an hour, whose tokens are 36 s apart.
func line(t *testing.T, test func(*testing.T, *world)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		rule, faults := law.NewRule("line", law.Continuous, time.Hour, 1, 100)
		require.Empty(t, faults)
		w := &world{t: t, began: time.Now(), redis: newStore("redis"), pg: newStore("postgres"), rules: []law.Rule{rule}}
		w.pg.ahead = (10 * time.Minute).Microseconds()
		test(t, w)
		for _, p := range w.processes {
			_ = p.storage.Close(bg)
		}
		<-time.After(2 * time.Second)
	})
}

// reserves makes a reservation, which the source must answer. It returns the verdict, and when the token may be used,
// since the world began.
func (w *world) reserves(p *process, source string) (storecheck.Verdict, time.Duration) {
	w.t.Helper()
	r := w.request(1)
	r.Within = law.MaxWithin
	v, err := storecheck.Decide(bg, p.storage, r)
	require.NoError(w.t, err)
	require.True(w.t, v.Allowed)
	require.Equal(w.t, source, v.Source())
	return v, time.Since(w.began) + v.Delay
}

// cancel gives a reservation back.
func (w *world) cancel(p *process, v storecheck.Verdict) {
	w.t.Helper()
	back := storage.Amount{N: -1, In: v.Count(0).HeldFor - (law.Monotonic() - v.At())}
	require.NoError(w.t, p.storage.Charge(bg, &storage.Charge{Identifier: "a", Rules: law.NewRuleSet(w.rules...), Amounts: []storage.Amount{back}}))
}

func TestRule4WhatIsReservedKeepsItsPlaceInPostgres(t *testing.T) {
	line(t, func(t *testing.T, w *world) {
		p, other := w.process(nil), w.process(nil)
		for i := range 10 {
			_, at := w.reserves([]*process{p, other}[i%2], "redis")
			require.InDelta(t, time.Duration(i)*36*time.Second, at, float64(time.Second))
		}
		settle()
		w.redis.setDown(true)
		for i := range 5 {
			_, at := w.reserves([]*process{p, other}[i%2], "postgres")
			require.InDelta(t, time.Duration(10+i)*36*time.Second, at, float64(time.Second))
		}
		w.redis.setDown(false)
		w.back()
		_, at := w.reserves(p, "redis")
		assert.InDelta(t, 15*36*time.Second, at, float64(time.Second), "Redis is raised to it")
	})
}

func TestRule8ACancelledReservationGivesItsPlaceBackInBothStores(t *testing.T) {
	line(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		w.reserves(p, "redis")
		w.reserves(p, "redis")
		last, _ := w.reserves(p, "redis")
		settle()
		w.cancel(p, last)
		settle()
		assert.EqualValues(t, 2, w.owed(w.redis))
		assert.EqualValues(t, 2, w.owed(w.pg))
		w.redis.setDown(true)
		last, at := w.reserves(p, "postgres")
		require.InDelta(t, 2*36*time.Second, at, float64(time.Second))
		w.cancel(p, last)
		_, at = w.reserves(p, "postgres")
		assert.InDelta(t, 2*36*time.Second, at, float64(time.Second))
	})
}

func TestRule2WhatAtMostTookIsPending(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.True(t, w.do(p, "a", 70))
		r := w.request(1000)
		r.Parts[0].AtMost = true
		v, err := storecheck.Decide(bg, p.storage, r)
		require.NoError(t, err)
		require.EqualValues(t, 30, v.Tokens())
		settle()
		assert.EqualValues(t, 100, w.owed(w.pg))
	})
}
