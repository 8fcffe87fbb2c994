package faulttest_test

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/failover"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// The tests T1 to T12 of the failover protocol, on a real Redis and a real Postgres. THROTTLER_RUNS=20 repeats the
// tests that must be exact. With THROTTLER_LONG=1 faults last as long as the protocol says.

// runs returns how often an exact test is repeated.
func runs(t testing.TB) int {
	n, err := strconv.Atoi(os.Getenv("THROTTLER_RUNS"))
	if err != nil {
		return 1
	}
	t.Logf("%d runs", n)
	return n
}

// lasting returns how long a fault or a load lasts.
func lasting(short, long time.Duration) time.Duration {
	if os.Getenv("THROTTLER_LONG") != "" {
		return long
	}
	return short
}

// callLimit is the longest time that a call may take: the timeouts of Redis and Postgres, and 10 ms.
const callLimit = failover.DefaultPrimaryTimeout + failover.DefaultLedgerTimeout + 10*time.Millisecond

// assertTotals asserts that exactly n tokens of each target were admitted.
func (r *record) assertTotals(t testing.TB, n int, targets []target) {
	t.Helper()
	totals := make([]int, len(targets))
	want := slices.Repeat([]int{n}, len(targets))
	for i := range targets {
		totals[i] = int(r.admitted(targets[i].ID))
	}
	t.Log("admitted in total:", totals)
	assert.Equal(t, want, totals, "admitted in total")
}

// assertTotalsAfterReturn asserts that exactly the capacity of each target was admitted, after Redis has come back. A
// call does not wait for more than 20 ms for what Postgres says that Redis has missed. So if a call on a target took
// that long, only the bound is asserted.
func (r *record) assertTotalsAfterReturn(t testing.TB, targets []target) {
	t.Helper()
	for i := range targets {
		g := &targets[i]
		n := g.Rules[0].Capacity
		late := r.count(func(e *event) bool {
			return e.What == "call" && e.ID == g.ID && e.By == redisstore.Source && e.Took >= 20_000
		})
		total := r.admitted(g.ID)
		if t.Logf("%v: admitted in total %d", g.Rules[0].Kind, total); late > 0 {
			t.Logf("%v: Postgres was late", g.Rules[0].Kind)
			assert.GreaterOrEqual(t, total, n)
			r.assertBound(t, g)
		} else {
			assert.Equal(t, n, total)
		}
	}
}

func TestT1AQuietKillHandsOutExactlyWhatIsLeft(t *testing.T) {
	t.Parallel()
	for range runs(t) {
		var r record
		redis, targets := servers.Redis(t), ofEachKind(t, 100)
		n := local(t, &r, stores{Redis: redis.URL(), Postgres: postgres(t).URL(), RedisTimeout: storecheck.Patient, PostgresTimeout: storecheck.Patient})
		require.Equal(t, five(60), n.times(60, targets))
		quiet(t, n)
		require.NoError(t, redis.Kill())
		assert.Equal(t, five(40), n.times(60, targets))
		r.assertTotals(t, 100, targets)
		r.assertNoErrors(t)
		r.assertPrompt(t, callLimit)
	}
}

func TestT1AQuietKillHandsOutExactlyWhatIsLeftToFourProcesses(t *testing.T) {
	for range runs(t) {
		var r record
		redis, targets := servers.Redis(t), ofEachKind(t, 100)
		all := fleet(t, &r, 4, stores{RedisTimeout: storecheck.Patient, PostgresTimeout: storecheck.Patient}, redis, postgres(t))
		do(all, order{Do: "take", Targets: targets, Calls: 15})
		r.assertTotals(t, 60, targets)
		quiet(t, all...)
		require.NoError(t, redis.Kill())
		do(all, order{Do: "take", Targets: targets, Calls: 30})
		r.assertTotals(t, 100, targets)
		r.assertNoErrors(t)
		r.assertPrompt(t, callLimit)
		do(all, order{Do: "close"})
	}
}

// steady returns a Continuous target to which tokens come back all the time.
func steady(t testing.TB) target {
	t.Helper()
	return target{id(t) + " steady", []law.Rule{rule(t, "steady", law.Continuous, time.Second, 100, 50)}}
}

func TestT2AHotKillHandsOutNothingTwiceInOneProcess(t *testing.T) {
	for range runs(t) {
		var r record
		redis := servers.Redis(t)
		slowly, flowing := ofEachKind(t, 300), steady(t)
		n := local(t, &r, stores{Redis: redis.URL(), Postgres: postgres(t).URL(), RedisTimeout: storecheck.Patient, PostgresTimeout: storecheck.Patient})
		n.begin(order{Targets: append(slices.Clone(slowly), flowing), Workers: 12, Pause: 5 * time.Millisecond})
		storecheck.Until(t, "there is no load", func() bool { return r.admitted(slowly[0].ID) >= 150 })
		require.NoError(t, redis.Kill())
		storecheck.Until(t, "something was left", func() bool {
			return !slices.ContainsFunc(slowly, func(g target) bool { return r.admitted(g.ID) < 300 })
		})
		quiet(t, n)
		n.end()
		r.assertTotals(t, 300, slowly)
		all := admissions(r.all(), flowing.ID)
		t.Logf("steady: %d admissions, excess %.2f", len(all), excess(all, &flowing.Rules[0]))
		assert.LessOrEqual(t, excess(all, &flowing.Rules[0]), 0.01)
		r.assertNoErrors(t)
		r.assertPrompt(t, callLimit)
	}
}

// hot calls harm while four processes are under load, and asserts the bound for what they have admitted.
func hot(t *testing.T, harm func(redis *servers.Server, all []*process), after time.Duration) {
	t.Helper()
	var r record
	redis := servers.Redis(t)
	targets := append(ofEachKind(t, 300), steady(t))
	all := fleet(t, &r, 4, stores{PostgresTimeout: storecheck.Patient}, redis, postgres(t))
	do(all, order{Do: "begin", Targets: targets, Workers: 3, Pause: 10 * time.Millisecond})
	storecheck.Until(t, "there is no load", func() bool { return r.admitted(targets[0].ID) >= 150 })
	harm(redis, all)
	pass(t, after)
	do(all, order{Do: "end"})
	for i := range targets {
		r.assertBound(t, &targets[i])
	}
	r.assertNoErrors(t)
	r.assertPrompt(t, callLimit)
	do(all, order{Do: "close"})
}

func TestT2AHotKillOfFourProcessesKeepsTheBound(t *testing.T) {
	hot(t, func(redis *servers.Server, _ []*process) { require.NoError(t, redis.Kill()) }, time.Second)
}

func TestT3ARestartThatNobodySawHandsOutExactlyWhatIsLeft(t *testing.T) {
	t.Parallel()
	for range runs(t) {
		var r record
		redis, targets := servers.Redis(t), ofEachKind(t, 100)
		n := local(t, &r, stores{Redis: redis.URL(), Postgres: postgres(t).URL(), RedisTimeout: storecheck.Patient, PostgresTimeout: storecheck.Patient})
		require.Equal(t, five(60), n.times(60, targets))
		quiet(t, n)
		require.NoError(t, redis.Kill())
		require.NoError(t, redis.Start())
		n.times(60, targets)
		r.assertTotalsAfterReturn(t, targets)
		n.back(t)
		assert.Equal(t, five(0), n.times(5, targets))
		r.assertNoErrors(t)
	}
}

func TestT3ARestartAfterAnOutageHandsOutExactlyWhatIsLeft(t *testing.T) {
	t.Parallel()
	for range runs(t) {
		var r record
		redis, targets := servers.Redis(t), ofEachKind(t, 100)
		n := local(t, &r, stores{Redis: redis.URL(), Postgres: postgres(t).URL(), RedisTimeout: storecheck.Patient, PostgresTimeout: storecheck.Patient})
		require.Equal(t, five(60), n.times(60, targets))
		quiet(t, n)
		require.NoError(t, redis.Kill())
		require.Equal(t, five(10), n.times(10, targets))
		require.NoError(t, redis.Start())
		t.Log("back after", n.back(t))
		n.times(60, targets)
		assert.Equal(t, redisstore.Source, n.take(&targets[0]).By)
		r.assertTotalsAfterReturn(t, targets)
		r.assertNoErrors(t)
	}
}

func TestT3AHotRestartOfFourProcessesKeepsTheBound(t *testing.T) {
	hot(t, func(redis *servers.Server, _ []*process) {
		require.NoError(t, redis.Kill())
		require.NoError(t, redis.Start())
	}, 2*time.Second)
}

func TestT4AFrozenRedisHandsOutExactlyWhatIsLeft(t *testing.T) {
	t.Parallel()
	for range runs(t) {
		var r record
		redis, targets := servers.Redis(t), ofEachKind(t, 100)
		n := local(t, &r, stores{Redis: redis.URL(), Postgres: postgres(t).URL(), PostgresTimeout: storecheck.Patient})
		require.Equal(t, five(60), n.times(60, targets))
		quiet(t, n)
		require.NoError(t, redis.Freeze())
		assert.Equal(t, five(20), n.times(20, targets))
		require.NoError(t, redis.Thaw())
		t.Log("back after", n.back(t))
		n.times(60, targets)
		assert.Equal(t, redisstore.Source, n.take(&targets[0]).By)
		r.assertTotalsAfterReturn(t, targets)
		r.assertNoErrors(t)
		r.assertPrompt(t, callLimit)
	}
}

func TestT4AFrozenRedisUnderFourProcessesKeepsTheBound(t *testing.T) {
	hot(t, func(redis *servers.Server, _ []*process) {
		require.NoError(t, redis.Freeze())
		pass(t, time.Second)
		require.NoError(t, redis.Thaw())
	}, 2*time.Second)
}

func TestT5AReplicaThatTakesOverHandsOutExactlyWhatIsLeft(t *testing.T) {
	t.Parallel()
	var r record
	sentinel, targets := servers.RedisSentinel(t), ofEachKind(t, 100)
	url := fmt.Sprintf("redis://%s?master_name=%s", sentinel.Addr(), sentinel.MasterName)
	n := local(t, &r, stores{Redis: url, Postgres: postgres(t).URL(), PostgresTimeout: storecheck.Patient})
	require.Equal(t, five(60), n.times(60, targets))
	quiet(t, n)
	require.NoError(t, sentinel.Primary.Kill())
	require.Equal(t, five(10), n.times(10, targets))
	t.Log("back after", n.back(t))
	n.times(60, targets)
	assert.Equal(t, redisstore.Source, n.take(&targets[0]).By)
	r.assertTotalsAfterReturn(t, targets)
	r.assertNoErrors(t)
	r.assertPrompt(t, callLimit)
}

func TestT6AProcessThatIsCutFromRedisKeepsTheBound(t *testing.T) {
	hot(t, func(_ *servers.Server, all []*process) {
		heal := all[3].redis.hole(t)
		pass(t, lasting(3*time.Second, 10*time.Second))
		assert.True(t, all[3].state().Degraded)
		for _, p := range all[:3] {
			assert.False(t, p.state().Degraded)
		}
		heal()
	}, time.Second)
}

// A cut that begins when nothing is pending costs nothing: what is admitted on one side arrives on the other.
func TestT6WhatAProcessAdmitsThatIsCutFromRedisArrivesThere(t *testing.T) {
	var r record
	redis, targets := servers.Redis(t), ofEachKind(t, 100)
	all := fleet(t, &r, 2, stores{PostgresTimeout: storecheck.Patient}, redis, postgres(t))
	whole, cut := all[:1], all[1:]
	do(all, order{Do: "take", Targets: targets, Calls: 10})
	quiet(t, all...)
	heal := cut[0].redis.hole(t)
	do(cut, order{Do: "take", Targets: targets, Calls: 60})
	do(whole, order{Do: "take", Targets: targets, Calls: 1}) // its flush brings the other's admissions from Postgres
	quiet(t, all...)
	do(whole, order{Do: "take", Targets: targets, Calls: 60})
	quiet(t, whole...)
	do(cut, order{Do: "take", Targets: targets, Calls: 10})
	heal()
	r.assertTotals(t, 100, targets)
	r.assertNoErrors(t)
	do(all, order{Do: "close"})
}

func TestT7ALinkThatFlapsIsLeftAlone(t *testing.T) {
	var r record
	p := before(t, servers.Redis(t))
	n := local(t, &r, stores{Redis: p.URL(), Postgres: postgres(t).URL(), PostgresTimeout: storecheck.Patient})
	targets := append(ofEachKind(t, 1000), steady(t))
	n.begin(order{Targets: targets, Workers: 6, Pause: 5 * time.Millisecond})
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(lasting(5*time.Second, 20*time.Second)); time.Now().Before(end); {
		heal := p.hole(t)
		<-tick.C // a call that begins between these two may end in time, when the hole is healed
		<-tick.C
		heal()
		<-tick.C
	}
	n.end()
	st := n.State()
	t.Logf("%d transitions", st.Transitions)
	assert.Positive(t, st.Transitions)
	assert.LessOrEqual(t, st.Transitions, int64(15), "Redis is left alone for 0.3 s, then 0.6 s and so on up to 5 s")
	for i := range targets {
		r.assertBound(t, &targets[i])
	}
	r.assertNoErrors(t)
	r.assertPrompt(t, callLimit)
	t.Log("back after", n.back(t))
}

func TestT8AProcessThatIsKilledCostsAtMostWhatItHadNotTold(t *testing.T) {
	t.Parallel()
	var r record
	redis, pg, targets := servers.Redis(t), postgres(t), ofEachKind(t, 100)
	told := ledger(t, pg)
	killed := fleet(t, &r, 1, stores{PostgresTimeout: storecheck.Patient}, redis, pg)
	n := local(t, &r, stores{Number: 1, Redis: redis.URL(), Postgres: pg.URL(), PostgresTimeout: storecheck.Patient})
	do(killed, order{Do: "take", Targets: targets, Calls: 12})
	killed[0].kill()
	require.NoError(t, redis.Kill())
	quiet[*node](t) // what the killed process has sent arrives
	for i := range targets {
		g := &targets[i]
		known := owed(t, told, g)[0]
		before := r.admitted(g.ID)
		require.EqualValues(t, 12, before)
		n.times(120, only(*g))
		t.Logf("%s: %d admitted, of which %d were not told: %d in total", g.Rules[0].Kind, before, before-known, r.admitted(g.ID))
		assert.Equal(t, 100+before-known, r.admitted(g.ID))
	}
	r.assertNoErrors(t)
}

func TestT8AProcessThatIsKilledCostsNothingAsLongAsRedisIsThere(t *testing.T) {
	t.Parallel()
	var r record
	redis, pg, targets := servers.Redis(t), postgres(t), ofEachKind(t, 100)
	killed := fleet(t, &r, 1, stores{PostgresTimeout: storecheck.Patient}, redis, pg)
	n := local(t, &r, stores{Number: 1, Redis: redis.URL(), Postgres: pg.URL(), PostgresTimeout: storecheck.Patient})
	do(killed, order{Do: "take", Targets: targets, Calls: 60})
	killed[0].kill()
	assert.Equal(t, five(40), n.times(60, targets))
	r.assertTotals(t, 100, targets)
	n.settled(t)
	require.NoError(t, redis.Kill())
	for i := range targets { // the killed process has not told Postgres all of the 60
		lost := 100 - owed(t, n.pg, &targets[i])[0]
		n.times(100, targets[i:i+1])
		t.Logf("%v: %d were not told, %d in total", targets[i].Rules[0].Kind, lost, r.admitted(targets[i].ID))
		assert.LessOrEqual(t, lost, int64(60))
		assert.Equal(t, 100+lost, r.admitted(targets[i].ID))
	}
	r.assertNoErrors(t)
}

// quick returns a target of each kind, with n tokens a period.
func quick(t testing.TB, n int64, period time.Duration) (all []target) {
	t.Helper()
	for _, kind := range storecheck.Kinds {
		all = append(all, target{id(t) + " " + kind.String(), []law.Rule{rule(t, "quick", kind, period, n, n)}})
	}
	return all
}

// assertLikeAlone compares what was admitted of each target with what Redis alone admitted of the same calls. The
// same number of admissions must take the same time, to 1 %, and 150 ms because a busy machine may delay one of the
// two. The totals may differ by one capacity. The first two capacities do not count, as connections and rows are made
// then.
func (r *record) assertLikeAlone(t testing.TB, targets []target) {
	t.Helper()
	events := r.all()
	for i := range targets {
		rule := &targets[i].Rules[0]
		ours, theirs := admissions(events, targets[i].ID), admissions(events, alone+targets[i].ID)
		n := min(len(ours), len(theirs)) / int(rule.Capacity) * int(rule.Capacity)
		skip := 2 * int(rule.Capacity)
		require.Greater(t, n, skip, "no bucket was empty for long")
		a, b := meanTime(ours[skip-1:n]), meanTime(theirs[skip-1:n])
		calls := r.count(func(e *event) bool { return e.ID == targets[i].ID })
		t.Logf("%v: %d of %d admitted, by Redis alone %d; the first %d at %.2f %% of its speed", rule.Kind, len(ours), calls, len(theirs), n, 100*b/a)
		assert.LessOrEqual(t, a, b/0.99+150_000, rule.Kind)
		assert.InDelta(t, len(theirs), len(ours), float64(rule.Capacity), rule.Kind)
	}
}

// meanTime returns the mean time from the first admission to each of them, in µs.
func meanTime(all []admission) float64 {
	sum := int64(0)
	for _, a := range all {
		sum += a.ended - all[0].ended
	}
	return float64(sum) / float64(len(all))
}

func TestT9PostgresMayBeDownAsLongAsRedisIsThere(t *testing.T) {
	var r record
	redis, pg := servers.Redis(t), servers.Postgres(t)
	n := local(t, &r, stores{Redis: redis.URL(), Postgres: pg.URL(), RedisTimeout: storecheck.Patient, PostgresTimeout: storecheck.Patient})
	fast, slowly := quick(t, 50, 500*time.Millisecond), ofEachKind(t, 100)
	require.Equal(t, five(60), n.times(60, slowly))
	n.begin(order{Targets: fast, Workers: 5, Pause: 2 * time.Millisecond, Alone: true})
	pass(t, 500*time.Millisecond)
	require.NoError(t, pg.Kill())
	pass(t, 750*time.Millisecond)
	require.Equal(t, five(10), n.times(10, slowly))
	pass(t, 750*time.Millisecond)
	require.Error(t, n.State().FlushError)
	require.NoError(t, pg.Start())
	storecheck.Until(t, "Postgres is not told", func() bool { return n.State().FlushError == nil })
	pass(t, time.Second)
	n.end()
	r.assertLikeAlone(t, fast)
	r.assertNoErrors(t)
	r.assertPrompt(t, failover.DefaultPrimaryTimeout)
	assert.Zero(t, r.count(func(e *event) bool { return e.What == "call" && e.By != redisstore.Source }), "calls that Redis did not answer")
	assert.Zero(t, n.State().Transitions)

	require.Equal(t, five(5), n.times(5, slowly))
	n.settled(t)
	quiet(t, n)
	require.NoError(t, redis.Kill())
	assert.Equal(t, five(25), n.times(40, slowly))
	r.assertTotals(t, 100, slowly)
}

func TestT10WhenBothAreDownCallsFailInTime(t *testing.T) {
	for name, harm := range map[string]func(*servers.Server) error{"killed": (*servers.Server).Kill, "frozen": (*servers.Server).Freeze} {
		t.Run(name, func(t *testing.T) {
			var r record
			redis, pg, targets := servers.Redis(t), servers.Postgres(t), ofEachKind(t, 100)
			n := local(t, &r, stores{Redis: redis.URL(), Postgres: pg.URL()})
			t.Cleanup(func() { assert.NoError(t, pg.Close()) }) // before the pool is closed, which would wait for it
			require.Equal(t, five(10), n.times(10, targets))
			quiet(t, n)
			require.NoError(t, harm(redis))
			require.NoError(t, harm(pg))
			var took []int64
			for i := range 15 {
				e := n.take(&targets[i%5])
				require.ErrorIs(t, e.err, storage.ErrUnavailable)
				assert.ErrorContains(t, e.err, "neither Redis")
				took = append(took, e.Took)
			}
			t.Logf("median %v, longest %v", micros(quantile(took, 0.5)), micros(quantile(took, 1)))
			assert.LessOrEqual(t, micros(quantile(took, 0.5)), 300*time.Millisecond)
			assert.LessOrEqual(t, micros(quantile(took, 1)), time.Second)
		})
	}
}

func TestT11AllIsWellSixSecondsAfterTheLastFault(t *testing.T) {
	var r record
	redis, pg := servers.Redis(t), servers.Postgres(t)
	targets := append(ofEachKind(t, 300), steady(t))
	all := fleet(t, &r, 4, stores{PostgresTimeout: storecheck.Patient}, redis, pg)
	do(all, order{Do: "begin", Targets: targets, Workers: 3, Pause: 10 * time.Millisecond})
	storecheck.Until(t, "there is no load", func() bool { return r.admitted(targets[0].ID) >= 100 })
	require.NoError(t, redis.Kill())
	heals := []func(){all[0].pg.hole(t), all[1].pg.poison(t, "limit_data", replies, attributes{"bytes": 0})}
	pass(t, 500*time.Millisecond)
	require.NoError(t, pg.Kill())
	require.NoError(t, redis.Start())
	heals = append(heals, all[2].redis.hole(t))
	pass(t, 500*time.Millisecond)
	require.NoError(t, pg.Start())
	for _, heal := range heals {
		heal()
	}
	took := storecheck.Until(t, "Postgres decides, or is not told", func() bool {
		return !slices.ContainsFunc(all, func(p *process) bool {
			st := p.state()
			return st.Degraded || st.FlushError != nil || st.Lag > time.Second
		})
	})
	t.Log("all is well after", took)
	assert.LessOrEqual(t, took.Seconds(), 6*busy())
	do(all, order{Do: "end"})
	storecheck.Until(t, "Redis does not decide all calls", func() bool { // on a busy machine one may time out
		fresh := ofEachKind(t, 100)
		do(all, order{Do: "crowd", Targets: fresh, Workers: 4, Calls: 10})
		if r.count(func(e *event) bool {
			of := func(g target) bool { return g.ID == e.ID }
			return slices.ContainsFunc(fresh, of) && (e.By != redisstore.Source || e.Err != "")
		}) > 0 {
			return false
		}
		r.assertTotals(t, 100, fresh)
		return true
	})
	do(all, order{Do: "close"})
}

func TestT12HealthyProcessesAdmitWhatRedisAloneDoes(t *testing.T) {
	var r record
	redis := servers.Redis(t)
	targets := quick(t, 20, time.Second)
	all := fleet(t, &r, 4, stores{RedisTimeout: storecheck.Patient, PostgresTimeout: storecheck.Patient}, redis, postgres(t))
	do(all, order{Do: "begin", Targets: targets, Workers: 5, Pause: 10 * time.Millisecond, Alone: true})
	pass(t, lasting(5*time.Second, 30*time.Second))
	do(all, order{Do: "end"})
	r.assertLikeAlone(t, targets)
	r.assertNoErrors(t)
	do(all, order{Do: "close"})
}

// Two processes take turns until a bucket is empty. Postgres records their tokens a moment later, which must not make
// them come back later.
func TestT12WhatTwoProcessesTakeInTurnsIsBackAsSoonAsInRedisAlone(t *testing.T) {
	var r record
	redis := servers.Redis(t)
	a := local(t, &r, stores{Redis: redis.URL(), Postgres: postgres(t).URL(), RedisTimeout: storecheck.Patient, PostgresTimeout: storecheck.Patient})
	b := local(t, &r, stores{Number: 1, Redis: redis.URL(), Postgres: postgres(t).URL(), RedisTimeout: storecheck.Patient, PostgresTimeout: storecheck.Patient})
	g := target{id(t), []law.Rule{rule(t, "fast", law.Continuous, time.Second, 100, 100)}}
	for round := range 4 {
		storecheck.Until(t, "the bucket is not full", func() bool { return owed(t, a.redis, &g)[0] == 0 && owed(t, a.alone, &g)[0] == 0 })
		apart := int64(0) // tokens that are refilled between the first call of ours and that of Redis alone
		for i := range 100 {
			n, began := []*node{a, b}[i%2], time.Now()
			n.take(&g)
			n.takeAlone(&g)
			if i == 0 {
				apart = time.Since(began).Milliseconds() / 10
			}
		}
		a.settled(t)
		b.settled(t)
		earlier := owed(t, a.alone, &g)[0]
		ours := owed(t, a.redis, &g)[0]
		later := owed(t, a.alone, &g)[0]
		t.Logf("after a flush %d tokens are out, in Redis alone %d before and %d after that", ours, earlier, later)
		if round > 0 { // in the first round connections and rows are made
			assert.LessOrEqual(t, ours, earlier+3)
			assert.GreaterOrEqual(t, ours, later-3-apart)
		}
	}
}
