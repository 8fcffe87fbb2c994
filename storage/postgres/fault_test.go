package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
)

// prompt is for tests of calls that are not answered: the default timeout instead of storecheck.Patient.
var prompt = pgstore.Options{Timeout: pgstore.DefaultTimeout}

// assertBackAfter is storecheck.AssertBackAfter, but the first call may return up to 15 ms early.
func assertBackAfter(t testing.TB, limit time.Duration, took []time.Duration) {
	t.Helper()
	slices.Sort(took)
	t.Logf("after %v: median %v, longest %v", limit, took[len(took)/2], took[len(took)-1])
	assert.GreaterOrEqual(t, took[0], limit-15*time.Millisecond, "a call gave up early")
	storecheck.AssertHalfWithin(t, limit, took)
	assert.Less(t, took[len(took)-1], limit+time.Second, "a call hung")
}

// harmed returns a server that a test may harm, and a pool of its connections. The server is closed before the pool,
// which would wait for the connections of a frozen server.
func harmed(t testing.TB, config ...string) (*servers.Server, *pgxpool.Pool) {
	t.Helper()
	server := servers.Postgres(t, config...)
	pool := connect(t, server.URL()+"&pool_max_conns=10")
	t.Cleanup(func() { assert.NoError(t, server.Close()) })
	return server, pool
}

// connected fills the pool with connections, and returns how many it has opened in its life.
func connected(t testing.TB, pool *pgxpool.Pool) int64 {
	t.Helper()
	for range pool.Config().MaxConns {
		conn, err := pool.Acquire(t.Context())
		require.NoError(t, err)
		defer conn.Release()
	}
	return pool.Stat().NewConnsCount()
}

// executeSQL executes SQL in a connection of its own.
func executeSQL(t testing.TB, url, sql string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	defer func() { assert.NoError(t, conn.Close(t.Context())) }()
	_, err = conn.Exec(t.Context(), sql)
	require.NoError(t, err)
}

// holdRow locks the row of an identifier, like another process, until release is called.
func holdRow(t testing.TB, url, id string) (release func()) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	release = sync.OnceFunc(func() { assert.NoError(t, conn.Close(context.Background())) })
	t.Cleanup(release)
	_, err = conn.Exec(t.Context(), "BEGIN")
	require.NoError(t, err)
	locked, err := conn.Exec(t.Context(), "SELECT FROM throttler_state WHERE id = $1 FOR UPDATE", []byte(":"+id))
	require.NoError(t, err)
	require.Equal(t, int64(1), locked.RowsAffected(), "there is no such row")
	return release
}

// assertUnavailable asserts that an error wraps ErrUnavailable, and does not look like any error that is the caller's.
func assertUnavailable(t testing.TB, err error) {
	t.Helper()
	assert.ErrorIs(t, err, storage.ErrUnavailable)
	for _, other := range []error{storage.ErrCorruptState, storage.ErrClosed, context.DeadlineExceeded, context.Canceled} {
		assert.NotErrorIs(t, err, other)
	}
}

// code returns the SQLSTATE of an error of the server, or "" for other errors.
func code(err error) string {
	var said *pgconn.PgError
	if errors.As(err, &said) {
		return said.Code
	}
	return ""
}

// SQLSTATEs.
const (
	readOnly     = "25006"
	tooMany      = "53300"
	lockTimeout  = "55P03"
	queryTimeout = "57014"
)

// load has the answers to 50 goroutines, which ask for an identifier that they share and each for one of its own.
type load struct {
	shared storecheck.Told
	own    [50]storecheck.Told
	took   [50]time.Duration // the longest call of each goroutine
}

// hot is a request for the shared identifier, and mine one for that of goroutine i.
func (w *load) hot(t testing.TB) storecheck.Request { return storecheck.Hourly(t, "shared", 1<<40) }

func (w *load) mine(t testing.TB, i int) storecheck.Request {
	return storecheck.Hourly(t, fmt.Sprint("own-", i), 1<<40)
}

// ask makes call n of goroutine i: for one of its identifiers or for both, in either order.
func (w *load) ask(t testing.TB, s *pgstore.Storage, i, n int) {
	hot, mine := w.hot(t), w.mine(t, i)
	both, twoOf := hot, mine
	both.Parts, twoOf.Parts = append(slices.Clone(hot.Parts), mine.Parts...), append(slices.Clone(mine.Parts), hot.Parts...)
	r := []storecheck.Request{hot, mine, both, twoOf}[n%4]
	began := time.Now()
	v, err := storecheck.Decide(context.Background(), s, r)
	w.took[i] = max(w.took[i], time.Since(began))
	if n%4 != 1 {
		w.shared.Count(v, err)
	}
	if n%4 != 0 {
		w.own[i].Count(v, err)
	}
	if err != nil {
		assertUnavailable(t, err)
	}
}

// during lets all goroutines ask until f returns.
func (w *load) during(t testing.TB, s *pgstore.Storage, f func()) {
	t.Helper()
	stop := make(chan struct{})
	var all sync.WaitGroup
	defer all.Wait()
	defer close(stop)
	for i := range w.own {
		all.Go(func() {
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			for n := i; ; n++ {
				w.ask(t, s, i, n)
				select {
				case <-stop:
					return
				case <-tick.C:
				}
			}
		})
	}
	f()
}

// goesOn waits until calls are admitted.
func (w *load) goesOn(t testing.TB) {
	t.Helper()
	before := w.shared.Admitted.Load()
	storecheck.Until(t, "nothing is admitted", func() bool { return w.shared.Admitted.Load() > before+200 })
}

// fails waits until a call fails.
func (w *load) fails(t testing.TB) {
	t.Helper()
	storecheck.Until(t, "no call fails", func() bool { return w.shared.Failed.Load() > 0 })
}

// crash calls harm in the middle of a load, and compares what was taken with the answers. Forgets says that the
// server may lose what it has answered.
func crash(t *testing.T, o pgstore.Options, forgets bool, harm func(*servers.Server, *pgxpool.Pool, *load)) {
	t.Helper()
	server, pool := harmed(t)
	s, w := open(t, pool, o), &load{}
	w.during(t, s, func() {
		w.goesOn(t)
		harm(server, pool, w)
		w.goesOn(t)
	})
	account := (*storecheck.Told).AssertAccount
	if forgets {
		account = (*storecheck.Told).AssertNotTwice
	}
	lost := account(&w.shared, t, s, w.hot(t))
	for i := range w.own {
		lost += account(&w.own[i], t, s, w.mine(t, i))
	}
	t.Logf("%d admitted, %d failed, the longest after %v; taken besides, or less: %d", w.shared.Admitted.Load(), w.shared.Failed.Load(), slices.Max(w.took[:]), lost)
	assert.Less(t, slices.Max(w.took[:]), o.Timeout+time.Second, "a call hung")
	assert.Equal(t, 5, storecheck.Take(t, s, storecheck.FivePerHour(t, "after"), 7))
}

// kill kills the server, and starts it again after a call has failed.
func kill(t *testing.T) func(*servers.Server, *pgxpool.Pool, *load) {
	return func(server *servers.Server, _ *pgxpool.Pool, w *load) {
		require.NoError(t, server.Kill())
		w.fails(t)
		require.NoError(t, server.Start())
	}
}

// killBackend kills the server process of one of the pool's connections.
func killBackend(t *testing.T, server *servers.Server, pool *pgxpool.Pool) {
	t.Helper()
	conn, err := pool.Acquire(t.Context())
	require.NoError(t, err)
	pid := conn.Conn().PgConn().PID()
	conn.Release()
	require.NoError(t, server.KillBackend(int(pid)))
}

func TestAServerThatIsKilledForgetsNothingAndNothingIsChargedTwice(t *testing.T) {
	t.Parallel()
	crash(t, prompt, false, kill(t))
}

func TestABackendThatIsKilledForgetsNothingAndNothingIsChargedTwice(t *testing.T) {
	t.Parallel()
	crash(t, prompt, false, func(server *servers.Server, pool *pgxpool.Pool, w *load) {
		killBackend(t, server, pool)
		w.fails(t)
	})
}

func TestWithoutSynchronousCommitAServerThatIsKilledChargesNothingTwice(t *testing.T) {
	t.Parallel()
	o := prompt
	o.SynchronousCommit = "off"
	crash(t, o, true, kill(t))
}

func TestACrashEmptiesAnUnloggedTable(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	s, r := open(t, pool, pgstore.Options{Timeout: pgstore.DefaultTimeout, Unlogged: true}), storecheck.FivePerHour(t, "a")
	require.Equal(t, 5, storecheck.Take(t, s, r, 7))
	require.NoError(t, server.Stop())
	require.NoError(t, server.Start())
	works := func() error { return s.Reset(t.Context(), "", "b") }
	storecheck.Recovery(t, 10*time.Second, works)
	require.Equal(t, 0, storecheck.Take(t, s, r, 3), "nothing is forgotten by a server that is stopped")
	killBackend(t, server, pool)
	peek := r
	peek.Mode = storage.Peek
	storecheck.Until(t, "the crash empties the table", func() bool {
		v, err := storecheck.Decide(t.Context(), s, peek)
		return err == nil && v.Allowed
	})
	pool.Reset() // the connections are from before the crash
	assert.Equal(t, 5, storecheck.Take(t, s, r, 7))
}

func TestCallsOnAFrozenServerReturnInTimeAndWorkAfterIt(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	s, r := open(t, pool, prompt), storecheck.Hourly(t, "frozen", 20)
	var before, after storecheck.Told
	storecheck.Recovery(t, storecheck.Patient, func() error { return before.Ask(s, r) })
	require.NoError(t, server.Freeze())
	assertBackAfter(t, 100*time.Millisecond, storecheck.Timed(9, func() {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		began := time.Now()
		_, err := storecheck.Decide(ctx, s, r)
		if time.Since(began) < prompt.Timeout { // on a busy machine both may have passed
			assert.ErrorIs(t, err, context.DeadlineExceeded, "the caller's context ended")
			assert.NotErrorIs(t, err, storage.ErrUnavailable)
		}
	}))
	assertBackAfter(t, prompt.Timeout, storecheck.Timed(3, func() {
		_, err := storecheck.Decide(t.Context(), s, r)
		assertUnavailable(t, err)
	}))
	require.NoError(t, server.Thaw())
	t.Log("works after", storecheck.Recovery(t, 10*time.Second, func() error { return after.Ask(s, r) }))
	for range 20 {
		require.NoError(t, after.Ask(s, r))
	}
	assert.LessOrEqual(t, after.Admitted.Load(), int64(19), "more than the limit was admitted")
	assert.GreaterOrEqual(t, after.Admitted.Load(), 19-12-before.Failed.Load()-after.Failed.Load(), "more was charged than was asked")
}

func TestCallsThatFindTheServerFrozenAtFirstReturnInTime(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	executeSQL(t, server.URL(), pgstore.Schema(nil))
	s, r, count := open(t, pool, pgstore.Options{Timeout: pgstore.DefaultTimeout, NoSchema: true}), storecheck.Hourly(t, "a", 20), storecheck.Told{}
	require.NoError(t, server.Freeze())
	assertBackAfter(t, prompt.Timeout, storecheck.Timed(3, func() { assertUnavailable(t, count.Ask(s, r)) }))
	assertBackAfter(t, 100*time.Millisecond, storecheck.Timed(3, func() {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		v, err := storecheck.Decide(ctx, s, r)
		count.Count(v, err)
		assert.ErrorIs(t, err, context.DeadlineExceeded)
	}))
	assertBackAfter(t, 100*time.Millisecond, storecheck.Timed(3, func() {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := pgstore.New(ctx, pool, nil)
		assert.ErrorIs(t, err, context.DeadlineExceeded)
	}))
	require.NoError(t, server.Thaw())
	t.Log("works after", storecheck.Recovery(t, 10*time.Second, func() error { return count.Ask(s, r) }))
	count.AssertAccount(t, s, r)
	assert.Equal(t, 5, storecheck.Take(t, s, storecheck.FivePerHour(t, "b"), 7))
}

func TestAServerThatIsDownIsAnErrorAtOnceUntilItIsThere(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	executeSQL(t, server.URL(), pgstore.Schema(nil))
	require.NoError(t, server.Stop())
	refused := func(err error) {
		assertUnavailable(t, err)
		assert.ErrorIs(t, err, syscall.ECONNREFUSED, "the cause")
	}
	s, r := open(t, pool, pgstore.Options{NoSchema: true}), storecheck.FivePerHour(t, "a")
	took := storecheck.Timed(5, func() {
		_, err := pgstore.New(t.Context(), pool, nil)
		refused(err)
		_, err = storecheck.Decide(t.Context(), s, r)
		refused(err)
	})
	slices.Sort(took)
	assert.Less(t, took[2], 100*time.Millisecond, "that nobody listens is known at once")
	require.NoError(t, server.Start())
	assert.Equal(t, 5, storecheck.Take(t, s, r, 7))
}

// hung is a reason why the server does not answer.
type hung struct {
	name  string
	cause func(t testing.TB, url string) (cure func())
	code  string
	after time.Duration // when the server gives up, with a Timeout of three seconds
}

var hangs = []hung{
	{"a row is locked", func(t testing.TB, url string) func() { return holdRow(t, url, "a") }, lockTimeout, 2400 * time.Millisecond},
	{"a trigger is slow", func(t testing.TB, url string) func() {
		executeSQL(t, url, `CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(60); RETURN NEW; END';
			CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON throttler_state FOR EACH ROW EXECUTE FUNCTION slow()`)
		return func() { executeSQL(t, url, "DROP FUNCTION slow CASCADE") }
	}, queryTimeout, 2700 * time.Millisecond},
}

func TestTheServerItselfGivesUpInTimeAndTheConnectionsStay(t *testing.T) {
	t.Parallel()
	for _, h := range hangs {
		t.Run(h.name, func(t *testing.T) {
			t.Parallel()
			server, pool := harmed(t)
			s := open(t, pool, pgstore.Options{Timeout: 3 * time.Second}) // the client gives up a tenth later than the server; a busy machine needs that time
			r := storecheck.FivePerHour(t, "a")
			require.Equal(t, 1, storecheck.Take(t, s, r, 1))
			cure, before := h.cause(t, server.URL()), connected(t, pool)
			assertBackAfter(t, h.after, storecheck.Timed(3, func() {
				_, err := storecheck.Decide(t.Context(), s, r)
				assertUnavailable(t, err)
				assert.Equal(t, h.code, code(err), "%v", err)
			}))
			assert.Equal(t, before, pool.Stat().NewConnsCount(), "connections were lost")
			cure()
			assert.Equal(t, 4, storecheck.Take(t, s, r, 7), "what failed was charged")
		})
	}
}

func TestACallThatWaitsForARowReturnsWithItsContext(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	s, r := open(t, pool, prompt), storecheck.Hourly(t, "a", 50)
	require.Equal(t, 1, storecheck.Take(t, s, r, 1))
	release, before := holdRow(t, server.URL(), "a"), connected(t, pool)
	const limit, calls = 20 * time.Millisecond, 15
	took := storecheck.Timed(calls, func() {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		_, err := storecheck.Decide(ctx, s, r)
		assert.ErrorIs(t, err, context.DeadlineExceeded)
	})
	assertBackAfter(t, limit, took)
	assert.Less(t, took[calls/2], limit+5*time.Millisecond)
	release()
	storecheck.Until(t, "a call is still waiting", func() bool { return pool.Stat().AcquiredConns() == 0 })
	assert.Equal(t, before, pool.Stat().NewConnsCount(), "connections were lost")
	spent := storecheck.Spent(t, s, r)
	assert.LessOrEqual(t, spent, int64(1+calls), "something was charged twice")
	assert.Equal(t, 50-int(spent), storecheck.Take(t, s, r, 60))
}

func TestALockedRowDelaysOnlyItsOwnIdentifier(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	s := open(t, pool, pgstore.Options{Timeout: 3 * time.Second}) // enough for calls that do not wait for the lock, on a busy machine too
	locked := storecheck.Hourly(t, "locked", 10)
	require.Equal(t, 1, storecheck.Take(t, s, locked, 1))
	holdRow(t, server.URL(), "locked")
	stop := make(chan struct{})
	var blocked sync.WaitGroup
	for range 10 {
		blocked.Go(func() {
			for {
				assertUnavailable(t, new(storecheck.Told).Ask(s, locked))
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	took := storecheck.Timed(1, func() {
		storecheck.Crowd(20, func(i int) {
			for range 100 {
				assert.NoError(t, new(storecheck.Told).Ask(s, storecheck.Hourly(t, fmt.Sprint("own-", i), 1<<40)))
			}
		})
	})
	t.Log("2000 calls took", took[0])
	close(stop)
	blocked.Wait()
}

// Two storages, which Postgres cannot tell from two processes, ask for overlapping sets of identifiers: new and old
// ones, in any order, alone and together.
func TestNoCallsDeadlock(t *testing.T) {
	t.Parallel()
	server := servers.Postgres(t)
	var all [2]*pgstore.Storage
	for i := range all {
		all[i] = open(t, connect(t, server.URL()), pgstore.Options{})
	}
	for epoch := range 3 {
		storecheck.Crowd(60, func(worker int) {
			random := rand.New(rand.NewPCG(uint64(epoch), uint64(worker)))
			for range 10 {
				r := storecheck.Request{}
				for _, i := range random.Perm(40)[:1+worker%4*7] {
					r.Parts = append(r.Parts, storecheck.Hourly(t, fmt.Sprint(epoch, "-", i), 1<<40).Parts...)
				}
				_, err := storecheck.Decide(context.Background(), all[worker%2], r)
				assert.NoError(t, err)
				if worker%8 == 0 {
					assert.NoError(t, all[worker%2].Reset(context.Background(), "", r.Parts[0].Identifier))
				}
			}
		})
	}
	var deadlocks int
	pool := connect(t, server.URL())
	require.NoError(t, pool.QueryRow(t.Context(), "SELECT sum(deadlocks) FROM pg_stat_database").Scan(&deadlocks))
	assert.Zero(t, deadlocks)
}

func TestARefusalWaitsForNoLock(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	s, full, some := open(t, pool, prompt), storecheck.FivePerHour(t, "full"), storecheck.FivePerHour(t, "some")
	require.Equal(t, 5, storecheck.Take(t, s, full, 5))
	require.Equal(t, 2, storecheck.Take(t, s, some, 2))
	holdRow(t, server.URL(), "full")
	holdRow(t, server.URL(), "some")
	both := some
	both.Parts = append(both.Parts, full.Parts...)
	assert.Equal(t, 0, storecheck.Take(t, s, full, 3))
	assert.Equal(t, 0, storecheck.Take(t, s, both, 3))
	assert.Equal(t, int64(5), storecheck.Spent(t, s, full))
	assert.Equal(t, int64(2), storecheck.Spent(t, s, some))
}

func TestAPoolThatOthersUseUpIsAnErrorInTime(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t).URL()+"&pool_max_conns=2")
	s, r := open(t, pool, prompt), storecheck.FivePerHour(t, "a")
	var held []*pgxpool.Conn
	for range 2 {
		conn, err := pool.Acquire(t.Context())
		require.NoError(t, err)
		t.Cleanup(conn.Release)
		held = append(held, conn)
	}
	took := make([]time.Duration, 20)
	storecheck.Crowd(len(took), func(i int) {
		took[i] = storecheck.Timed(1, func() {
			err := new(storecheck.Told).Ask(s, storecheck.FivePerHour(t, fmt.Sprint(i)))
			assertUnavailable(t, err)
			assert.ErrorContains(t, err, "all connections of the pool, 2, are in use")
		})[0]
	})
	assertBackAfter(t, prompt.Timeout, took)
	held[0].Release()
	storecheck.Recovery(t, 10*time.Second, func() error { return s.Reset(t.Context(), "", "a") })
	assert.Equal(t, 5, storecheck.Take(t, s, r, 7), "one connection is enough")
}

func TestOneConnectionIsEnoughForEverything(t *testing.T) {
	t.Parallel()
	s, hot := open(t, connect(t, servers.Postgres(t).URL()+"&pool_max_conns=1"), pgstore.Options{}), storecheck.Told{}
	storecheck.Crowd(50, func(i int) {
		own := storecheck.Hourly(t, fmt.Sprint("own-", i), 1000)
		for n := range 5 {
			assert.NoError(t, hot.Ask(s, storecheck.Hourly(t, "hot", 200)))
			pair, other := own, storecheck.Hourly(t, fmt.Sprint("other-", i, "-", n), 1000)
			pair.Parts = append(pair.Parts, other.Parts...)
			assert.NoError(t, new(storecheck.Told).Ask(s, pair))
			assert.NoError(t, s.Charge(t.Context(), &storage.Charge{Identifier: own.Parts[0].Identifier, Rules: own.Parts[0].Rules, Amounts: []storage.Amount{{N: 1, In: time.Hour.Microseconds()}}}))
			if i%10 == 0 {
				_, err := s.Sweep(t.Context())
				assert.NoError(t, err)
			}
		}
	})
	assert.Equal(t, int64(200), hot.Admitted.Load())
	for i := range 50 {
		assert.Equal(t, int64(10), storecheck.Spent(t, s, storecheck.Hourly(t, fmt.Sprint("own-", i), 1000)))
	}
}

func TestAStandbyAnswersAndSaysThatItChangesNothing(t *testing.T) {
	t.Parallel()
	primary, pool := harmed(t)
	some, none := storecheck.FivePerHour(t, "some"), storecheck.FivePerHour(t, "none")
	s := open(t, pool, pgstore.Options{})
	require.Equal(t, 2, storecheck.Take(t, s, some, 2))
	require.Equal(t, 5, storecheck.Take(t, s, none, 7))
	standby := connect(t, servers.PostgresStandby(t, primary).URL())
	storecheck.Recovery(t, 10*time.Second, func() error { // it follows after a moment
		_, err := pgstore.New(t.Context(), standby, nil)
		return err
	})
	s = open(t, standby, pgstore.Options{})
	storecheck.Until(t, "a Peek tells something else", func() bool { return storecheck.Spent(t, s, some) == 2 && storecheck.Spent(t, s, none) == 5 })
	assert.Equal(t, 0, storecheck.Take(t, s, none, 3), "a call that is denied")
	both := some
	both.Parts = append(both.Parts, storecheck.FivePerHour(t, "new").Parts...)
	for _, r := range []storecheck.Request{some, storecheck.FivePerHour(t, "new"), both} {
		_, err := storecheck.Decide(t.Context(), s, r)
		assertUnavailable(t, err)
		assert.Equal(t, readOnly, code(err), "%v", err)
	}
	assert.Equal(t, readOnly, code(s.Reset(t.Context(), "", "some")))
	_, err := pgstore.New(t.Context(), standby, &pgstore.Options{TablePrefix: "other"})
	assertUnavailable(t, err)
	assert.Equal(t, readOnly, code(err), "there is no table: %v", err)
	_, err = standby.Exec(t.Context(), "SELECT pg_promote()")
	require.NoError(t, err)
	assert.Equal(t, 3, storecheck.Take(t, s, some, 5), "it is a primary now")
}

func TestADatabaseThatOnlyReadsByDefaultRefusesChanges(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	open(t, pool, pgstore.Options{})
	reads := connect(t, server.URL()+"&default_transaction_read_only=on")
	s := open(t, reads, pgstore.Options{})
	_, err := storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, "a"))
	assertUnavailable(t, err)
	assert.Equal(t, readOnly, code(err), "%v", err)
	assert.Equal(t, int64(0), storecheck.Spent(t, s, storecheck.FivePerHour(t, "a")))
}

func TestDecisionsAreExactWhateverIsolationIsTheDefault(t *testing.T) {
	t.Parallel()
	for _, isolation := range []string{"serializable", "repeatable read"} {
		t.Run(isolation, func(t *testing.T) {
			t.Parallel()
			_, pool := harmed(t, "-c", "default_transaction_isolation="+isolation)
			stores := make([]*pgstore.Storage, 4)
			storecheck.Crowd(len(stores), func(i int) {
				var err error
				stores[i], err = pgstore.New(t.Context(), pool, &pgstore.Options{Timeout: storecheck.Patient})
				assert.NoError(t, err, "several at once")
			})
			require.False(t, t.Failed())
			a, b := storecheck.Hourly(t, "a", 150), storecheck.Hourly(t, "b", 150)
			ab, ba := a, b
			ab.Parts, ba.Parts = append(slices.Clone(a.Parts), b.Parts...), append(slices.Clone(b.Parts), a.Parts...)
			var singleA, singleB, joint storecheck.Told
			storecheck.Crowd(50, func(i int) {
				for n := range 4 {
					s := stores[(i+n)%len(stores)]
					assert.NoError(t, singleA.Ask(s, a))
					assert.NoError(t, joint.Ask(s, ab))
					assert.NoError(t, singleB.Ask(s, b))
					assert.NoError(t, joint.Ask(s, ba))
				}
			})
			assert.Equal(t, int64(150), singleA.Admitted.Load()+joint.Admitted.Load())
			assert.Equal(t, int64(150), singleB.Admitted.Load()+joint.Admitted.Load())
			assert.Equal(t, int64(150), storecheck.Spent(t, stores[0], a))
			assert.Equal(t, int64(150), storecheck.Spent(t, stores[0], b))
		})
	}
}

func TestAServerWithoutAFreeConnectionIsAnErrorWithItsCause(t *testing.T) {
	t.Parallel()
	const connections = 8
	server, pool := harmed(t, "-c", fmt.Sprint("max_connections=", connections))
	s, r := open(t, pool, prompt), storecheck.FivePerHour(t, "a")
	var held []*pgx.Conn
	release := sync.OnceFunc(func() {
		for _, conn := range held {
			assert.NoError(t, conn.Close(context.Background()))
		}
	})
	t.Cleanup(release)
	storecheck.Until(t, "others have connections", func() bool {
		pool.Reset()
		if conn, err := pgx.Connect(t.Context(), server.URL()); err == nil {
			held = append(held, conn)
		}
		return len(held) == connections
	})
	took := storecheck.Timed(3, func() {
		_, err := storecheck.Decide(t.Context(), s, r)
		assertUnavailable(t, err)
		assert.Equal(t, tooMany, code(err), "%v", err)
	})
	assert.Less(t, slices.Min(took), 200*time.Millisecond, "it is known at once")
	release()
	storecheck.Recovery(t, 10*time.Second, func() error { return s.Reset(t.Context(), "", "a") })
	assert.Equal(t, 5, storecheck.Take(t, s, r, 7))
}

func TestCloseDuringLoadLeavesNoCallWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t).URL())
	again, s, r, count := open(t, pool, pgstore.Options{}), open(t, pool, pgstore.Options{}), storecheck.Hourly(t, "a", 1<<40), storecheck.Told{}
	var calls sync.WaitGroup
	for range 50 {
		calls.Go(func() {
			err := error(nil)
			for err == nil {
				err = count.Ask(s, r)
			}
			assert.ErrorIs(t, err, storage.ErrClosed)
		})
	}
	storecheck.Until(t, "there is no load", func() bool { return count.Admitted.Load() > 500 })
	storecheck.Crowd(3, func(int) { assert.NoError(t, s.Close(bg)) })
	calls.Wait()
	assert.Equal(t, count.Admitted.Load(), storecheck.Spent(t, again, r), "each call that was sent was answered")
	assert.ErrorIs(t, s.Reset(t.Context(), "", "a"), storage.ErrClosed)
	assert.NoError(t, pool.Ping(t.Context()), "the pool is the caller's")
}

func TestNewGivesUpAServerThatSaysNothing(t *testing.T) {
	t.Parallel()
	for name, silence := range map[string]func(*testing.T, *servers.Server, *pgxpool.Pool){
		"frozen": func(t *testing.T, server *servers.Server, _ *pgxpool.Pool) { require.NoError(t, server.Freeze()) },
		"without a connection that is free": func(t *testing.T, _ *servers.Server, pool *pgxpool.Pool) {
			for range pool.Config().MaxConns {
				conn, err := pool.Acquire(t.Context())
				require.NoError(t, err)
				t.Cleanup(conn.Release)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server, pool := harmed(t)
			silence(t, server, pool)
			began := time.Now()
			_, err := pgstore.New(bg, pool, nil)
			require.ErrorIs(t, err, storage.ErrUnavailable)
			require.ErrorContains(t, err, "no answer from Postgres within 10s")
			assert.GreaterOrEqual(t, time.Since(began), 10*time.Second)
			ended, cancel := context.WithCancel(bg)
			cancel()
			_, err = pgstore.New(ended, pool, nil)
			require.ErrorIs(t, err, context.Canceled)
		})
	}
}

// TestMain finds goroutines that Close leaves behind.
func TestCloseReturnsInTime(t *testing.T) {
	t.Parallel()
	for name, cause := range map[string]func(*testing.T, *servers.Server){
		"on a frozen server":    func(t *testing.T, server *servers.Server) { require.NoError(t, server.Freeze()) },
		"while a row is locked": func(t *testing.T, server *servers.Server) { holdRow(t, server.URL(), "a") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server, pool := harmed(t)
			s, r := open(t, pool, prompt), storecheck.FivePerHour(t, "a")
			require.Equal(t, 1, storecheck.Take(t, s, r, 1))
			cause(t, server)
			var calls sync.WaitGroup
			defer calls.Wait()
			for range 20 {
				calls.Go(func() {
					if err := new(storecheck.Told).Ask(s, r); !errors.Is(err, storage.ErrClosed) {
						assertUnavailable(t, err)
					}
				})
			}
			storecheck.Until(t, "nothing was sent", func() bool { return pool.Stat().AcquiredConns() > 0 })
			took := storecheck.Timed(1, func() { assert.NoError(t, s.Close(bg)) })
			assert.Less(t, took[0], prompt.Timeout+time.Second, "Close hung")
			assert.Greater(t, took[0], prompt.Timeout/20, "Close did not wait for what was sent")
			assert.ErrorIs(t, new(storecheck.Told).Ask(s, r), storage.ErrClosed)
		})
	}
}

func TestCloseEndsWithItsContextAndRefusesCallsAtOnce(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	s, r := open(t, pool, prompt), storecheck.FivePerHour(t, "a")
	require.NoError(t, server.Freeze())
	var calls sync.WaitGroup
	calls.Go(func() { assertUnavailable(t, new(storecheck.Told).Ask(s, r)) })
	storecheck.Until(t, "nothing was sent", func() bool { return pool.Stat().AcquiredConns() > 0 })
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	assert.ErrorIs(t, s.Close(ended), context.Canceled)
	assert.ErrorIs(t, new(storecheck.Told).Ask(s, r), storage.ErrClosed)
	_, err := s.Record(t.Context(), "o", 1, []storage.Charge{chargeOne(r)})
	assert.ErrorIs(t, err, storage.ErrClosed)
	calls.Wait()
	assert.NoError(t, s.Close(t.Context()), "again")
}
