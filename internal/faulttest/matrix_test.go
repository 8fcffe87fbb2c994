package faulttest_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/failover"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// The rows of the protocol's fault matrix that T1 to T12 do not cover.

// client returns a client by which a test does harm to a server.
func client(t testing.TB, server *servers.Server) *goredis.Client {
	t.Helper()
	c := goredis.NewClient(&goredis.Options{Addr: server.Addr(), DialerRetries: 1})
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	return c
}

// send sends a command whose words contain no spaces. The command must succeed.
func send(t testing.TB, c *goredis.Client, command string) {
	t.Helper()
	var words []any
	for word := range strings.FieldsSeq(command) {
		words = append(words, word)
	}
	require.NoError(t, c.Do(t.Context(), words...).Err(), command)
}

func TestACrowdInTwoProcessesIsAdmittedExactlyTheSmallerLimit(t *testing.T) {
	var r record
	redis, pg := servers.Redis(t), postgres(t)
	var targets []target
	for _, kind := range storecheck.Kinds {
		targets = append(targets, target{id(t) + " " + kind.String(), []law.Rule{slow(t, "large", kind, 1000), slow(t, "small", kind, 50)}})
	}
	all := fleet(t, &r, 2, stores{RedisTimeout: storecheck.Patient, PostgresTimeout: storecheck.Patient}, redis, pg)
	do(all, order{Do: "crowd", Targets: targets, Workers: 200, Calls: 1})
	r.assertTotals(t, 50, targets)
	r.assertNoErrors(t)
	do(all, order{Do: "close"})
	for i := range targets {
		assert.Equal(t, []int64{50, 50}, owed(t, open(t, redis.URL(), storecheck.Patient), &targets[i]), "in Redis")
		assert.Equal(t, []int64{50, 50}, owed(t, ledger(t, pg), &targets[i]), "in Postgres")
	}
}

// Whatever happens to the network between a process and Redis, each store is charged at most once for a call.
func TestABadLinkCostsACallAtMostOnceInEachStore(t *testing.T) {
	for name, harm := range map[string]func(*proxy, testing.TB) (heal func()){
		"black hole": (*proxy).hole,
		"reply lost": func(p *proxy, t testing.TB) func() { return p.poison(t, "limit_data", replies, attributes{"bytes": 0}) },
		"reset": func(p *proxy, t testing.TB) func() {
			return p.poison(t, "reset_peer", replies, attributes{"timeout": 0})
		},
		"never comes": func(p *proxy, t testing.TB) func() {
			return p.poison(t, "reset_peer", requests, attributes{"timeout": 0})
		},
	} {
		t.Run(name, func(t *testing.T) {
			var r record
			server := servers.Redis(t)
			p := before(t, server)
			n := local(t, &r, stores{Redis: p.URL(), Postgres: postgres(t).URL(), PostgresTimeout: storecheck.Patient})
			targets := ofEachKind(t, 1000)
			n.times(10, targets)
			quiet(t, n)
			heal := harm(p, t)
			n.times(20, targets)
			heal()
			n.back(t)
			n.times(10, targets)
			n.settled(t)
			quiet(t, n)
			r.assertNoErrors(t)
			r.assertTotals(t, 40, targets)
			r.assertPrompt(t, callLimit)
			direct := open(t, server.URL(), storecheck.Patient)
			for i := range targets {
				inRedis, inPostgres := owed(t, direct, &targets[i])[0], owed(t, n.pg, &targets[i])[0]
				t.Logf("%v: 40 calls, %d in Redis, %d in Postgres", targets[i].Rules[0].Kind, inRedis, inPostgres)
				assert.GreaterOrEqual(t, inRedis, int64(40))
				assert.LessOrEqual(t, inRedis, int64(43), "three calls may be lost in Redis until Postgres decides")
				assert.EqualValues(t, 40, inPostgres)
			}
		})
	}
}

func TestAContextThatEndsCostsACallAtMostOnce(t *testing.T) {
	var r record
	server := servers.Redis(t)
	p := before(t, server)
	n := local(t, &r, stores{Redis: p.URL(), Postgres: postgres(t).URL(), RedisTimeout: storecheck.Patient})
	targets := ofEachKind(t, 1000)
	n.times(10, targets)
	heal := p.poison(t, "latency", replies, attributes{"latency": 250})
	var late []int64
	for range 10 {
		for i := range targets {
			ctx, cancel := context.WithCancel(t.Context())
			timer := time.AfterFunc(5*time.Millisecond, cancel)
			e := n.ask(ctx, &targets[i], 1)
			require.ErrorIs(t, e.err, context.Canceled)
			late = append(late, e.Took-5000)
			timer.Stop()
			cancel()
		}
	}
	heal()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for i := range targets {
		require.ErrorIs(t, n.ask(ended, &targets[i], 1).err, context.Canceled)
	}
	t.Logf("back late by %v, the latest by %v", micros(quantile(late, 0.5)), micros(quantile(late, 1)))
	assert.LessOrEqual(t, micros(quantile(late, 0.5)), 50*time.Millisecond)
	require.Equal(t, five(5), n.times(5, targets))
	n.settled(t)
	quiet(t, n)
	assert.Zero(t, n.State().Transitions)
	direct := open(t, server.URL(), storecheck.Patient)
	for i := range targets {
		inRedis, inPostgres := owed(t, direct, &targets[i])[0], owed(t, n.pg, &targets[i])[0]
		t.Logf("%v: 15 admitted and 10 left, %d in Redis, %d in Postgres", targets[i].Rules[0].Kind, inRedis, inPostgres)
		assert.LessOrEqual(t, inRedis, int64(25))
		assert.LessOrEqual(t, inPostgres, int64(25))
		assert.GreaterOrEqual(t, inRedis, int64(15))
		assert.GreaterOrEqual(t, inPostgres, int64(15))
	}
}

func TestScriptsThatAreForgottenAllTheTimeChangeNothing(t *testing.T) {
	var r record
	server := servers.Redis(t)
	n := local(t, &r, stores{Redis: server.URL(), Postgres: postgres(t).URL(), RedisTimeout: storecheck.Patient, PostgresTimeout: storecheck.Patient})
	c, stop := client(t, server), make(chan struct{})
	var storm sync.WaitGroup
	flushed := 0
	storm.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				assert.NoError(t, c.ScriptFlush(context.Background()).Err())
				flushed++
			}
		}
	})
	targets := ofEachKind(t, 300)
	n.obey(order{Do: "crowd", Targets: targets, Workers: 50, Calls: 8})
	close(stop)
	storm.Wait()
	t.Logf("the scripts were forgotten %d times", flushed)
	r.assertTotals(t, 300, targets)
	r.assertNoErrors(t)
	for i := range targets {
		assert.EqualValues(t, 300, owed(t, n.redis, &targets[i])[0])
	}
}

// refusals are errors that Redis may answer instead of deciding.
var refusals = []struct {
	name   string
	config []string
	harm   func(testing.TB, *goredis.Client) (cure func())
}{
	{"OOM", []string{"--maxmemory-policy", "noeviction"}, sends("config set maxmemory 1", "config set maxmemory 0")},
	{"READONLY", nil, sends("replicaof 127.0.0.1 1", "replicaof no one")},
	{"NOAUTH", nil, func(t testing.TB, c *goredis.Client) func() {
		send(t, c, "config set requirepass secret")
		send(t, c, "client kill type normal skipme yes")
		return func() { require.NoError(t, c.Do(t.Context(), "config", "set", "requirepass", "").Err()) }
	}},
	{"NOPERM", nil, sends("acl setuser default -evalsha -eval", "acl setuser default +evalsha +eval")},
	{"LOADING", []string{"--enable-debug-command", "yes"}, loadSlowly},
}

// sends returns a harm that one command causes and another one cures.
func sends(harm, cure string) func(testing.TB, *goredis.Client) func() {
	return func(t testing.TB, c *goredis.Client) func() {
		send(t, c, harm)
		return func() { send(t, c, cure) }
	}
}

// loadSlowly makes the server load keys for a minute, or until cure is called.
func loadSlowly(t testing.TB, c *goredis.Client) (cure func()) {
	send(t, c, "debug populate 60000 other 10")
	send(t, c, "config set loading-process-events-interval-bytes 1024")
	send(t, c, "config set key-load-delay 1000")
	busy := c.WithTimeout(time.Minute)
	var loaded sync.WaitGroup
	loaded.Go(func() { assert.NoError(t, busy.Do(context.Background(), "debug", "reload").Err()) })
	storecheck.Recovery(t, storecheck.Patient, func() error {
		if err := c.Get(t.Context(), "other").Err(); !goredis.IsLoadingError(err) {
			return fmt.Errorf("it answers %w", err)
		}
		return nil
	})
	return func() {
		send(t, c, "config set key-load-delay 0")
		loaded.Wait()
	}
}

func TestWhenRedisRefusesPostgresDecides(t *testing.T) {
	t.Parallel()
	for _, f := range refusals {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			var r record
			server := servers.Redis(t, f.config...)
			n := local(t, &r, stores{Redis: server.URL(), Postgres: postgres(t).URL(), PostgresTimeout: storecheck.Patient})
			targets := ofEachKind(t, 100)
			require.Equal(t, five(60), n.times(60, targets))
			quiet(t, n)
			cure := f.harm(t, client(t, server))
			assert.Equal(t, five(20), n.times(20, targets))
			assert.True(t, n.State().Degraded)
			if cause := n.State().Cause; f.name != "LOADING" || !strings.Contains(cause.Error(), "no answer") { // while it loads it may be too slow to say so in time
				assert.ErrorContains(t, cause, f.name)
			}
			cure()
			t.Log("back after", n.back(t))
			n.times(40, targets)
			assert.Equal(t, redisstore.Source, n.take(&targets[0]).By)
			r.assertTotalsAfterReturn(t, targets)
			r.assertNoErrors(t)
			r.assertPrompt(t, callLimit)
		})
	}
}

func TestWhatOthersKeepAtAKeyStaysAndPostgresDecides(t *testing.T) {
	t.Parallel()
	for name, foreign := range map[string]struct{ put, get, want string }{
		"value": {"set %s hello", "get %s", "hello"},
		"type":  {"lpush %s hello", "lindex %s 0", "hello"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var r record
			server := servers.Redis(t)
			n, c := local(t, &r, stores{Redis: server.URL(), Postgres: postgres(t).URL(), RedisTimeout: storecheck.Patient, PostgresTimeout: storecheck.Patient}), client(t, server)
			targets, others := ofEachKind(t, 100), ofEachKind(t, 100)
			key := func(g *target) string { return redisstore.DefaultPrefix + "fault:" + g.ID }
			at := func(command string, g *target) any {
				var words []any
				for word := range strings.FieldsSeq(command) {
					words = append(words, strings.Replace(word, "%s", key(g), 1))
				}
				answer, err := c.Do(t.Context(), words...).Result()
				require.NoError(t, err)
				return answer
			}
			for i := range targets {
				at(foreign.put, &targets[i])
			}
			assert.Equal(t, five(100), n.times(120, targets))
			assert.Equal(t, five(10), n.times(10, others))
			assert.Zero(t, n.State().Transitions)
			r.assertNoErrors(t)
			for i := range targets {
				assert.Equal(t, foreign.want, at(foreign.get, &targets[i]))
				assert.Zero(t, r.count(func(e *event) bool { return e.ID == targets[i].ID && e.By == redisstore.Source }))
				assert.Zero(t, r.count(func(e *event) bool { return e.ID == others[i].ID && e.By != redisstore.Source }))
			}
			// Foreign data replaces a value while something is spent.
			at("del %s", &others[0])
			at(foreign.put, &others[0])
			assert.Equal(t, []int{90}, n.times(100, others[:1]))
			// Foreign data disappears again.
			at("del %s", &targets[0])
			quiet(t, n)
			t.Logf("after the foreign data was gone: %d more", n.times(1, targets[:1])[0])
		})
	}
}

func TestAPostgresThatIsKilledWithSomethingPendingIsToldOnce(t *testing.T) {
	t.Parallel()
	var r record
	redis, pg := servers.Redis(t), servers.Postgres(t)
	n := local(t, &r, stores{Redis: redis.URL(), Postgres: pg.URL(), RedisTimeout: storecheck.Patient})
	targets := ofEachKind(t, 1000)
	for i := range 3 {
		require.Equal(t, five(20), n.times(20, targets))
		pass(t, time.Duration(i)*50*time.Millisecond) // before, during and after the flush
		require.NoError(t, pg.Kill())
		require.Equal(t, five(5), n.times(5, targets))
		require.NoError(t, pg.Start())
		n.settled(t)
	}
	told := ledger(t, pg)
	for i := range targets {
		assert.EqualValues(t, 75, owed(t, told, &targets[i])[0], targets[i].Rules[0].Kind)
		assert.EqualValues(t, 75, owed(t, n.redis, &targets[i])[0], targets[i].Rules[0].Kind)
	}
	r.assertNoErrors(t)
}

func TestCloseDuringLoadTellsEverything(t *testing.T) {
	t.Parallel()
	var r record
	pg := postgres(t)
	n := local(t, &r, stores{Redis: servers.Redis(t).URL(), Postgres: pg.URL(), RedisTimeout: storecheck.Patient, PostgresTimeout: storecheck.Patient})
	targets := ofEachKind(t, 10_000)
	n.begin(order{Targets: targets, Workers: 20, Pause: time.Millisecond})
	storecheck.Until(t, "there is no load", func() bool { return r.admitted(targets[0].ID) >= 100 })
	require.NoError(t, n.Storage.Close(t.Context()))
	_, err := storecheck.Decide(t.Context(), n, targets[0].request(1))
	require.ErrorIs(t, err, storage.ErrClosed)
	n.end()
	closed := 0
	for _, e := range r.all() {
		if e.err != nil {
			assert.ErrorIs(t, e.err, storage.ErrClosed)
			closed++
		}
	}
	t.Logf("%d calls were admitted of the first, %d came too late", r.admitted(targets[0].ID), closed)
	told := ledger(t, pg)
	for i := range targets {
		assert.Equal(t, r.admitted(targets[i].ID), owed(t, told, &targets[i])[0], targets[i].Rules[0].Kind)
	}
}

func TestALimitThatIsLoweredHoldsInBothStores(t *testing.T) {
	t.Parallel()
	for name, harm := range map[string]func(*servers.Server) error{
		"Redis is well":   func(*servers.Server) error { return nil },
		"Redis goes away": (*servers.Server).Kill,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var r record
			redis := servers.Redis(t)
			n := local(t, &r, stores{Redis: redis.URL(), Postgres: postgres(t).URL(), RedisTimeout: storecheck.Patient, PostgresTimeout: storecheck.Patient})
			targets := ofEachKind(t, 100)
			require.Equal(t, five(60), n.times(60, targets))
			limited := func(capacity int64) (all []target) {
				for i := range targets {
					g := target{targets[i].ID, slices.Clone(targets[i].Rules)}
					g.Rules[0].Capacity = capacity
					all = append(all, g)
				}
				return all
			}
			require.NoError(t, harm(redis))
			assert.Equal(t, five(0), n.times(5, limited(50)))
			assert.Equal(t, five(10), n.times(20, limited(70)))
			assert.Equal(t, five(5), n.times(20, limited(75)))
			added := limited(100)
			for i := range added { // a new bucket
				added[i].Rules = append(added[i].Rules, slow(t, "new", storecheck.Kinds[i], 7))
			}
			assert.Equal(t, five(7), n.times(20, added))
			r.assertTotals(t, 82, targets)
			r.assertNoErrors(t)
		})
	}
}

// A cluster node that is started again is empty, and serves its slots after two seconds.
func TestAClusterNodeThatDiesHandsOutNothingTwice(t *testing.T) {
	t.Parallel()
	var r record
	cluster := servers.RedisCluster(t, 2)
	url := "redis://" + strings.Join(cluster.Addrs(), "?addr=")
	n := local(t, &r, stores{Redis: url, Postgres: postgres(t).URL(), PostgresTimeout: storecheck.Patient})
	targets := append(ofEachKind(t, 100), ofEachKind(t, 100)...) // enough to have some on both nodes
	require.Equal(t, append(five(60), five(60)...), n.times(60, targets))
	n.settled(t)
	quiet(t, n)
	require.NoError(t, cluster.Nodes[1].Kill())
	require.Equal(t, append(five(10), five(10)...), n.times(10, targets))
	require.NoError(t, cluster.Nodes[1].Start())
	n.times(60, targets)
	t.Log("back after", n.back(t))
	n.times(60, targets)
	r.assertTotalsAfterReturn(t, targets)
	r.assertNoErrors(t)
	r.assertPrompt(t, callLimit)
}

func TestAPoolWithoutAConnectionIsUnavailableInTime(t *testing.T) {
	var r record
	redis := servers.Redis(t)
	n := local(t, &r, stores{Redis: redis.URL(), Postgres: postgres(t).URL(), RedisTimeout: storecheck.Patient})
	targets := ofEachKind(t, 100)
	require.Equal(t, five(10), n.times(10, targets))
	n.settled(t)
	for range n.pool.Config().MaxConns {
		held, err := n.pool.Acquire(t.Context())
		require.NoError(t, err)
		t.Cleanup(held.Release)
	}
	require.Equal(t, five(10), n.times(10, targets), "as long as Redis is there, nobody notices")
	require.NoError(t, redis.Kill())
	var took []int64
	for i := range targets {
		e := n.take(&targets[i])
		require.ErrorIs(t, e.err, storage.ErrUnavailable)
		took = append(took, e.Took)
	}
	t.Logf("median %v, longest %v", micros(quantile(took, 0.5)), micros(quantile(took, 1)))
	assert.LessOrEqual(t, micros(quantile(took, 0.5)), callLimit)
}

func TestAPostgresThatForgetsItsLastCommitsCostsNoMoreThanThem(t *testing.T) {
	t.Parallel()
	var r record
	redis, pg := servers.Redis(t), servers.Postgres(t, "-c", "synchronous_commit=off", "-c", "wal_writer_delay=10s")
	n := local(t, &r, stores{Redis: redis.URL(), Postgres: pg.URL(), PostgresTimeout: storecheck.Patient})
	targets := ofEachKind(t, 100)
	require.Equal(t, five(40), n.times(40, targets))
	n.settled(t)
	pass(t, 20*time.Millisecond)
	require.NoError(t, pg.Kill())
	require.NoError(t, pg.Start())
	look, lost := ledger(t, pg), make([]int64, len(targets))
	for i := range targets {
		lost[i] = 40 - owed(t, look, &targets[i])[0]
	}
	require.Equal(t, five(20), n.times(20, targets), "Redis has not forgotten")
	n.settled(t)
	quiet(t, n)
	require.NoError(t, redis.Kill())
	for i := range targets {
		n.times(100, targets[i:i+1])
		t.Logf("%v: %d were forgotten, %d in total", targets[i].Rules[0].Kind, lost[i], r.admitted(targets[i].ID))
		assert.LessOrEqual(t, r.admitted(targets[i].ID), 100+lost[i])
	}
	r.assertNoErrors(t)
}

// A key that Redis has evicted begins anew, until the next admission is flushed to Postgres and its debt comes back.
func TestAKeyThatIsEvictedIsRaisedAgain(t *testing.T) {
	var r record
	server := servers.Redis(t)
	n, c := local(t, &r, stores{Redis: server.URL(), Postgres: postgres(t).URL(), RedisTimeout: storecheck.Patient, PostgresTimeout: storecheck.Patient}), client(t, server)
	targets := append(ofEachKind(t, 300), steady(t))
	n.begin(order{Targets: targets, Workers: 6, Pause: 5 * time.Millisecond})
	storecheck.Until(t, "there is no load", func() bool { return r.admitted(targets[0].ID) >= 150 })
	for i := range targets {
		require.NoError(t, c.Del(t.Context(), redisstore.DefaultPrefix+"fault:"+targets[i].ID).Err())
	}
	pass(t, 1500*time.Millisecond)
	n.end()
	for i := range targets {
		r.assertBound(t, &targets[i])
	}
	r.assertNoErrors(t)
}

func TestWhatIsOnItsWayToPostgresIsPending(t *testing.T) {
	t.Parallel()
	var r record
	p := before(t, postgres(t))
	n := local(t, &r, stores{Redis: servers.Redis(t).URL(), Postgres: p.URL()})
	g := &ofEachKind(t, 100)[0]
	n.take(g)
	n.settled(t)
	heal := p.hole(t)
	defer heal()
	n.take(g)
	for range 10 { // a flush begins in this time, and waits for Postgres for half a second
		st := n.State()
		assert.Equal(t, 1, st.Pending, "of which Postgres has not been charged")
		assert.Positive(t, st.Lag)
		pass(t, 25*time.Millisecond)
	}
}

// If the answer to a commit is lost the batch is sent again, and Postgres recognises it by its number.
func TestACommitWhoseAnswerIsLostIsChargedOnce(t *testing.T) {
	t.Parallel()
	var r record
	server := postgres(t)
	p := before(t, server)
	n := local(t, &r, stores{Redis: servers.Redis(t).URL(), Postgres: p.URL(), RedisTimeout: storecheck.Patient})
	told, targets := ledger(t, server), ofEachKind(t, 10_000)
	n.times(1, targets)
	n.settled(t)
	failures := func() int {
		return r.count(func(e *event) bool { return e.What == "observed" && e.By == failover.FlushFailed.String() })
	}
	committed := 0
	for bytes := 560; bytes <= 1500 && committed < 3; bytes += 10 { // at some length the answer to the COMMIT is cut off
		want := r.admitted(targets[0].ID)
		before := failures()
		heal := p.poison(t, "limit_data", replies, attributes{"bytes": bytes})
		n.times(5, targets)
		storecheck.Until(t, "nothing was told", func() bool {
			st := n.State()
			return failures() > before || st.Flushed.After(time.Now().Add(-50*time.Millisecond))
		})
		if failures() > before && owed(t, told, &targets[0])[0] > want {
			committed++
		}
		heal()
		n.settled(t)
	}
	quiet(t, n)
	t.Logf("%d flushes failed, %d commits had no answer", failures(), committed)
	assert.Positive(t, committed)
	for i := range targets {
		assert.Equal(t, r.admitted(targets[i].ID), owed(t, told, &targets[i])[0], targets[i].Rules[0].Kind)
	}
	r.assertNoErrors(t)
}
