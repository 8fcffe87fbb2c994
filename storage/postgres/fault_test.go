package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/storage"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
)

// prompt is for tests of what becomes of calls that are not answered.
var prompt = pgstore.Options{Timeout: pgstore.DefaultTimeout}

func rule(t testing.TB, name string, kind storage.Kind, period time.Duration, capacity int64) storage.Rule {
	t.Helper()
	r, faults := storage.NewRule(name, kind, period, capacity, capacity)
	require.Empty(t, faults)
	return r
}

// hourly asks for one token of n an hour.
func hourly(t testing.TB, id string, n int64) storage.Request {
	t.Helper()
	return storage.Request{Part: storage.NewPart(id, []storage.Rule{rule(t, "hourly", storage.Replenish, time.Hour, n)}, 1)}
}

// fivePerHour asks for one token of five an hour.
func fivePerHour(t testing.TB, id string) storage.Request {
	t.Helper()
	return hourly(t, id, 5)
}

// take asks n times, and returns how often it was admitted.
func take(t testing.TB, s *pgstore.Storage, r storage.Request, n int) (admitted int) {
	t.Helper()
	for range n {
		v, err := s.Decide(t.Context(), r)
		require.NoError(t, err)
		if v.Allowed {
			admitted++
		}
	}
	return admitted
}

// spentBy is how many tokens of the first bucket are out.
func spentBy(t testing.TB, s *pgstore.Storage, r storage.Request) int64 {
	t.Helper()
	r.Mode, r.Part, r.More = storage.Peek, storage.NewPart(r.Part.Identifier, r.Part.Rules, 0), nil
	v, err := s.Decide(t.Context(), r)
	require.NoError(t, err)
	return r.Part.Rules[0].Capacity - v.Count(0).Remaining
}

// crowd runs f in n goroutines, and waits for them.
func crowd(n int, f func(i int)) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { f(i) })
	}
	all.Wait()
}

// recovery calls try until it succeeds, and returns how long that took.
func recovery(t testing.TB, within time.Duration, try func() error) time.Duration {
	t.Helper()
	began := time.Now()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		took := time.Since(began)
		if err == nil {
			return took
		}
		require.Less(t, took, within, "it still fails: %v", err)
		<-tick.C
	}
}

// told counts what callers were told.
type told struct{ admitted, denied, failed atomic.Int64 }

func (c *told) ask(s *pgstore.Storage, r storage.Request) error {
	v, err := s.Decide(context.Background(), r)
	c.count(v, err)
	return err
}

func (c *told) count(v storage.Verdict, err error) {
	switch {
	case err != nil:
		c.failed.Add(1)
	case v.Allowed:
		c.admitted.Add(1)
	default:
		c.denied.Add(1)
	}
}

// timed calls f n times, and returns how long each call took.
func timed(n int, f func()) (took []time.Duration) {
	for range n {
		began := time.Now()
		f()
		took = append(took, time.Since(began))
	}
	return took
}

// assertBackAfter holds calls to the time after which they had to return: half of them to 50 ms more, ten
// times the promise, and all of them to a second, on a machine that does other things as well.
func assertBackAfter(t testing.TB, limit time.Duration, took []time.Duration) {
	t.Helper()
	slices.Sort(took)
	t.Logf("after %v: median %v, longest %v", limit, took[len(took)/2], took[len(took)-1])
	assert.GreaterOrEqual(t, took[0], limit-15*time.Millisecond, "a call gave up early")
	assert.Less(t, took[len(took)/2], limit+50*time.Millisecond, "calls outlast their time")
	assert.Less(t, took[len(took)-1], limit+time.Second, "a call hung")
}

// harmed returns a server that a test may harm, and a pool of its connections. The server ends before the pool is
// closed, which would wait for one that is frozen.
func harmed(t testing.TB, config ...string) (*servers.Server, *pgxpool.Pool) {
	t.Helper()
	server := servers.Postgres(t, config...)
	pool := connect(t, server.URL()+"&pool_max_conns=10")
	t.Cleanup(func() { assert.NoError(t, server.Close()) })
	return server, pool
}

// connected returns how many connections were made, after making all that the pool may have.
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

// holdRow locks the row of an identifier, as another process would, until release is called.
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

// assertUnavailable holds an error to what those promise that are not the caller's fault.
func assertUnavailable(t testing.TB, err error) {
	t.Helper()
	assert.ErrorIs(t, err, storage.ErrUnavailable)
	for _, other := range []error{storage.ErrCorruptState, storage.ErrClosed, context.DeadlineExceeded, context.Canceled} {
		assert.NotErrorIs(t, err, other)
	}
}

// code is that of the error that the server said, if it said one.
func code(err error) string {
	var said *pgconn.PgError
	if errors.As(err, &said) {
		return said.Code
	}
	return ""
}

// The codes of errors that a server says.
const (
	readOnly     = "25006"
	tooMany      = "53300"
	lockTimeout  = "55P03"
	queryTimeout = "57014"
)

// until waits until something is so.
func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	recovery(t, 20*time.Second, func() error {
		if !is() {
			return errors.New(what)
		}
		return nil
	})
}

// load is what 50 goroutines were told, each of an identifier that all share and of one of its own.
type load struct {
	shared told
	own    [50]told
	took   [50]time.Duration // the longest call
}

func (w *load) hot(t testing.TB) storage.Request { return hourly(t, "shared", 1<<40) }

func (w *load) mine(t testing.TB, i int) storage.Request {
	return hourly(t, fmt.Sprint("own-", i), 1<<40)
}

// ask asks for the one, the other or both, in both orders.
func (w *load) ask(t testing.TB, s *pgstore.Storage, i, n int) {
	hot, mine := w.hot(t), w.mine(t, i)
	both, twoOf := hot, mine
	both.More, twoOf.More = []storage.Part{mine.Part}, []storage.Part{hot.Part}
	r := []storage.Request{hot, mine, both, twoOf}[n%4]
	began := time.Now()
	v, err := s.Decide(context.Background(), r)
	w.took[i] = max(w.took[i], time.Since(began))
	if n%4 != 1 {
		w.shared.count(v, err)
	}
	if n%4 != 0 {
		w.own[i].count(v, err)
	}
	if err != nil {
		assertUnavailable(t, err)
	}
}

// during has them ask all the time until f returns.
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
	before := w.shared.admitted.Load()
	until(t, "nothing is admitted", func() bool { return w.shared.admitted.Load() > before+200 })
}

// fails waits until a call fails.
func (w *load) fails(t testing.TB) {
	t.Helper()
	until(t, "no call fails", func() bool { return w.shared.failed.Load() > 0 })
}

// assertAccount allows what failed to be taken once, or not; what was admitted may be forgotten by those who are told so.
func (c *told) assertAccount(t testing.TB, s *pgstore.Storage, r storage.Request, forgets bool) (lost int64) {
	t.Helper()
	taken := spentBy(t, s, r)
	if !forgets {
		assert.GreaterOrEqual(t, taken, c.admitted.Load(), "%s: something was admitted and not taken", r.Part.Identifier)
	}
	assert.LessOrEqual(t, taken, c.admitted.Load()+c.failed.Load(), "%s: something was taken twice", r.Part.Identifier)
	return taken - c.admitted.Load()
}

// crash harms a server in the middle of a load, and holds what was taken to what callers were told.
func crash(t *testing.T, o pgstore.Options, forgets bool, harm func(*servers.Server, *pgxpool.Pool, *load)) {
	t.Helper()
	server, pool := harmed(t)
	s, w := open(t, pool, o), &load{}
	w.during(t, s, func() {
		w.goesOn(t)
		harm(server, pool, w)
		w.goesOn(t)
	})
	lost := w.shared.assertAccount(t, s, w.hot(t), forgets)
	for i := range w.own {
		lost += w.own[i].assertAccount(t, s, w.mine(t, i), forgets)
	}
	t.Logf("%d admitted, %d failed, the longest after %v; taken besides, or less: %d", w.shared.admitted.Load(), w.shared.failed.Load(), slices.Max(w.took[:]), lost)
	assert.Less(t, slices.Max(w.took[:]), o.Timeout+time.Second, "a call hung")
	assert.Equal(t, 5, take(t, s, fivePerHour(t, "after"), 7))
}

// kill ends the server at once, and starts it again when that was noticed.
func kill(t *testing.T) func(*servers.Server, *pgxpool.Pool, *load) {
	return func(server *servers.Server, _ *pgxpool.Pool, w *load) {
		require.NoError(t, server.Kill())
		w.fails(t)
		require.NoError(t, server.Start())
	}
}

// killBackend ends the process of one of the pool's connections.
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
	s, r := open(t, pool, pgstore.Options{Timeout: pgstore.DefaultTimeout, Unlogged: true}), fivePerHour(t, "a")
	require.Equal(t, 5, take(t, s, r, 7))
	require.NoError(t, server.Stop())
	require.NoError(t, server.Start())
	works := func() error { return s.Reset(t.Context(), "", "b") }
	recovery(t, 10*time.Second, works)
	require.Equal(t, 0, take(t, s, r, 3), "nothing is forgotten by a server that is stopped")
	killBackend(t, server, pool)
	peek := r
	peek.Mode = storage.Peek
	until(t, "the crash empties the table", func() bool {
		v, err := s.Decide(t.Context(), peek)
		return err == nil && v.Allowed
	})
	pool.Reset() // connections from before the crash
	assert.Equal(t, 5, take(t, s, r, 7))
}

func TestCallsOnAFrozenServerReturnInTimeAndWorkAfterIt(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	s, r := open(t, pool, prompt), hourly(t, "frozen", 20)
	require.Equal(t, 1, take(t, s, r, 1))
	require.NoError(t, server.Freeze())
	assertBackAfter(t, 100*time.Millisecond, timed(9, func() {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := s.Decide(ctx, r)
		assert.ErrorIs(t, err, context.DeadlineExceeded, "the caller's context ended")
		assert.NotErrorIs(t, err, storage.ErrUnavailable)
	}))
	assertBackAfter(t, prompt.Timeout, timed(3, func() {
		_, err := s.Decide(t.Context(), r)
		assertUnavailable(t, err)
	}))
	require.NoError(t, server.Thaw())
	after := told{}
	t.Log("works after", recovery(t, 10*time.Second, func() error { return after.ask(s, r) }))
	for range 20 {
		require.NoError(t, after.ask(s, r))
	}
	assert.LessOrEqual(t, after.admitted.Load(), int64(19), "more than the limit was admitted")
	assert.GreaterOrEqual(t, after.admitted.Load(), int64(19-12), "more was charged than was asked")
}

func TestCallsThatFindTheServerFrozenAtFirstReturnInTime(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	executeSQL(t, server.URL(), pgstore.Schema(nil))
	s, r, count := open(t, pool, pgstore.Options{Timeout: pgstore.DefaultTimeout, NoSchema: true}), hourly(t, "a", 20), told{}
	require.NoError(t, server.Freeze())
	assertBackAfter(t, prompt.Timeout, timed(3, func() { assertUnavailable(t, count.ask(s, r)) }))
	assertBackAfter(t, 100*time.Millisecond, timed(3, func() {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		v, err := s.Decide(ctx, r)
		count.count(v, err)
		assert.ErrorIs(t, err, context.DeadlineExceeded)
	}))
	assertBackAfter(t, 100*time.Millisecond, timed(3, func() {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := pgstore.New(ctx, pool, nil)
		assert.ErrorIs(t, err, context.DeadlineExceeded)
	}))
	require.NoError(t, server.Thaw())
	t.Log("works after", recovery(t, 10*time.Second, func() error { return count.ask(s, r) }))
	count.assertAccount(t, s, r, false)
	assert.Equal(t, 5, take(t, s, fivePerHour(t, "b"), 7))
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
	s, r := open(t, pool, pgstore.Options{NoSchema: true}), fivePerHour(t, "a")
	took := timed(5, func() {
		_, err := pgstore.New(t.Context(), pool, nil)
		refused(err)
		_, err = s.Decide(t.Context(), r)
		refused(err)
	})
	slices.Sort(took)
	assert.Less(t, took[2], 100*time.Millisecond, "that nobody listens is known at once")
	require.NoError(t, server.Start())
	assert.Equal(t, 5, take(t, s, r, 7))
}

// hung is a reason for the server to be late.
type hung struct {
	name  string
	cause func(t testing.TB, url string) (cure func())
	code  string
	after time.Duration // of a second
}

var hangs = []hung{
	{"a row is locked", func(t testing.TB, url string) func() { return holdRow(t, url, "a") }, lockTimeout, 800 * time.Millisecond},
	{"a trigger is slow", func(t testing.TB, url string) func() {
		executeSQL(t, url, `CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(60); RETURN NEW; END';
			CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON throttler_state FOR EACH ROW EXECUTE FUNCTION slow()`)
		return func() { executeSQL(t, url, "DROP FUNCTION slow CASCADE") }
	}, queryTimeout, 900 * time.Millisecond},
}

func TestTheServerItselfGivesUpInTimeAndTheConnectionsStay(t *testing.T) {
	t.Parallel()
	for _, h := range hangs {
		t.Run(h.name, func(t *testing.T) {
			t.Parallel()
			server, pool := harmed(t)
			s, r := open(t, pool, pgstore.Options{Timeout: time.Second}), fivePerHour(t, "a")
			require.Equal(t, 1, take(t, s, r, 1))
			cure, before := h.cause(t, server.URL()), connected(t, pool)
			assertBackAfter(t, h.after, timed(3, func() {
				_, err := s.Decide(t.Context(), r)
				assertUnavailable(t, err)
				assert.Equal(t, h.code, code(err), "%v", err)
			}))
			assert.Equal(t, before, pool.Stat().NewConnsCount(), "connections were lost")
			cure()
			assert.Equal(t, 4, take(t, s, r, 7), "what failed was charged")
		})
	}
}

func TestACallThatWaitsForARowReturnsWithItsContext(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	s, r := open(t, pool, prompt), hourly(t, "a", 50)
	require.Equal(t, 1, take(t, s, r, 1))
	release, before := holdRow(t, server.URL(), "a"), connected(t, pool)
	const limit, calls = 20 * time.Millisecond, 15
	took := timed(calls, func() {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		_, err := s.Decide(ctx, r)
		assert.ErrorIs(t, err, context.DeadlineExceeded)
	})
	assertBackAfter(t, limit, took)
	assert.Less(t, took[calls/2], limit+5*time.Millisecond)
	release()
	until(t, "a call is still waiting", func() bool { return pool.Stat().AcquiredConns() == 0 })
	assert.Equal(t, before, pool.Stat().NewConnsCount(), "connections were lost")
	spent := spentBy(t, s, r)
	assert.LessOrEqual(t, spent, int64(1+calls), "something was charged twice")
	assert.Equal(t, 50-int(spent), take(t, s, r, 60))
}

func TestALockedRowDelaysOnlyItsOwnIdentifier(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	s, locked := open(t, pool, prompt), hourly(t, "locked", 10)
	require.Equal(t, 1, take(t, s, locked, 1))
	holdRow(t, server.URL(), "locked")
	stop := make(chan struct{})
	var blocked sync.WaitGroup
	for range 10 {
		blocked.Go(func() {
			for {
				assertUnavailable(t, new(told).ask(s, locked))
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	took := timed(1, func() {
		crowd(20, func(i int) {
			for range 100 {
				assert.NoError(t, new(told).ask(s, hourly(t, fmt.Sprint("own-", i), 1<<40)))
			}
		})
	})
	t.Log("2000 calls took", took[0])
	close(stop)
	blocked.Wait()
}

// Sets of identifiers that overlap, in any order, new ones and old ones, joint and on their own, from two
// processes as far as Postgres can tell.
func TestNoCallsDeadlock(t *testing.T) {
	t.Parallel()
	server := servers.Postgres(t)
	var all [2]*pgstore.Storage
	for i := range all {
		all[i] = open(t, connect(t, server.URL()), pgstore.Options{})
	}
	for epoch := range 3 {
		crowd(60, func(worker int) {
			random := rand.New(rand.NewPCG(uint64(epoch), uint64(worker)))
			for range 10 {
				r := storage.Request{}
				for _, i := range random.Perm(40)[:1+worker%4*7] {
					part := hourly(t, fmt.Sprint(epoch, "-", i), 1<<40).Part
					if r.Part.Rules == nil {
						r.Part = part
					} else {
						r.More = append(r.More, part)
					}
				}
				_, err := all[worker%2].Decide(context.Background(), r)
				assert.NoError(t, err)
				if worker%8 == 0 {
					assert.NoError(t, all[worker%2].Reset(context.Background(), "", r.Part.Identifier))
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
	s, full, some := open(t, pool, prompt), fivePerHour(t, "full"), fivePerHour(t, "some")
	require.Equal(t, 5, take(t, s, full, 5))
	require.Equal(t, 2, take(t, s, some, 2))
	holdRow(t, server.URL(), "full")
	holdRow(t, server.URL(), "some")
	both := some
	both.More = []storage.Part{full.Part}
	assert.Equal(t, 0, take(t, s, full, 3))
	assert.Equal(t, 0, take(t, s, both, 3))
	assert.Equal(t, int64(5), spentBy(t, s, full))
	assert.Equal(t, int64(2), spentBy(t, s, some))
}

func TestAPoolThatOthersUseUpIsAnErrorInTime(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t).URL()+"&pool_max_conns=2")
	s, r := open(t, pool, prompt), fivePerHour(t, "a")
	var held []*pgxpool.Conn
	for range 2 {
		conn, err := pool.Acquire(t.Context())
		require.NoError(t, err)
		t.Cleanup(conn.Release)
		held = append(held, conn)
	}
	took := make([]time.Duration, 20)
	crowd(len(took), func(i int) {
		took[i] = timed(1, func() { assertUnavailable(t, new(told).ask(s, fivePerHour(t, fmt.Sprint(i)))) })[0]
	})
	assertBackAfter(t, prompt.Timeout, took)
	held[0].Release()
	assert.Equal(t, 5, take(t, s, r, 7), "one connection is enough")
}

func TestOneConnectionIsEnoughForEverything(t *testing.T) {
	t.Parallel()
	s, hot := open(t, connect(t, servers.Postgres(t).URL()+"&pool_max_conns=1"), pgstore.Options{}), told{}
	crowd(50, func(i int) {
		own := hourly(t, fmt.Sprint("own-", i), 1000)
		for n := range 5 {
			assert.NoError(t, hot.ask(s, hourly(t, "hot", 200)))
			pair, other := own, hourly(t, fmt.Sprint("other-", i, "-", n), 1000)
			pair.More = []storage.Part{other.Part}
			assert.NoError(t, new(told).ask(s, pair))
			assert.NoError(t, s.Charge(t.Context(), storage.Charge{Identifier: own.Part.Identifier, Rules: own.Part.Rules, Amounts: []storage.Amount{{N: 1, In: time.Hour.Microseconds()}}}))
			if i%10 == 0 {
				_, err := s.Sweep(t.Context())
				assert.NoError(t, err)
			}
		}
	})
	assert.Equal(t, int64(200), hot.admitted.Load())
	for i := range 50 {
		assert.Equal(t, int64(10), spentBy(t, s, hourly(t, fmt.Sprint("own-", i), 1000)))
	}
}

func TestAStandbyAnswersAndSaysThatItChangesNothing(t *testing.T) {
	t.Parallel()
	primary, pool := harmed(t)
	some, none := fivePerHour(t, "some"), fivePerHour(t, "none")
	s := open(t, pool, pgstore.Options{})
	require.Equal(t, 2, take(t, s, some, 2))
	require.Equal(t, 5, take(t, s, none, 7))
	standby := connect(t, servers.PostgresStandby(t, primary).URL())
	recovery(t, 10*time.Second, func() error { // as it follows within a moment
		_, err := pgstore.New(t.Context(), standby, nil)
		return err
	})
	s = open(t, standby, pgstore.Options{})
	until(t, "a Peek tells something else", func() bool { return spentBy(t, s, some) == 2 && spentBy(t, s, none) == 5 })
	assert.Equal(t, 0, take(t, s, none, 3), "a call that is denied")
	both := some
	both.More = []storage.Part{fivePerHour(t, "new").Part}
	for _, r := range []storage.Request{some, fivePerHour(t, "new"), both} {
		_, err := s.Decide(t.Context(), r)
		assertUnavailable(t, err)
		assert.Equal(t, readOnly, code(err), "%v", err)
	}
	assert.Equal(t, readOnly, code(s.Reset(t.Context(), "", "some")))
	_, err := pgstore.New(t.Context(), standby, &pgstore.Options{Name: "other"})
	assertUnavailable(t, err)
	assert.Equal(t, readOnly, code(err), "there is no table: %v", err)
	_, err = standby.Exec(t.Context(), "SELECT pg_promote()")
	require.NoError(t, err)
	assert.Equal(t, 3, take(t, s, some, 5), "it is a primary now")
}

func TestADatabaseThatOnlyReadsByDefaultRefusesChanges(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	open(t, pool, pgstore.Options{})
	reads := connect(t, server.URL()+"&default_transaction_read_only=on")
	s := open(t, reads, pgstore.Options{})
	_, err := s.Decide(t.Context(), fivePerHour(t, "a"))
	assertUnavailable(t, err)
	assert.Equal(t, readOnly, code(err), "%v", err)
	assert.Equal(t, int64(0), spentBy(t, s, fivePerHour(t, "a")))
}

func TestDecisionsAreExactWhateverIsolationIsTheDefault(t *testing.T) {
	t.Parallel()
	for _, isolation := range []string{"serializable", "repeatable read"} {
		t.Run(isolation, func(t *testing.T) {
			t.Parallel()
			_, pool := harmed(t, "-c", "default_transaction_isolation="+isolation)
			stores := make([]*pgstore.Storage, 4)
			crowd(len(stores), func(i int) {
				var err error
				stores[i], err = pgstore.New(t.Context(), pool, &pgstore.Options{Timeout: patient})
				assert.NoError(t, err, "several at once")
			})
			require.False(t, t.Failed())
			a, b := hourly(t, "a", 150), hourly(t, "b", 150)
			ab, ba := a, b
			ab.More, ba.More = []storage.Part{b.Part}, []storage.Part{a.Part}
			var singleA, singleB, joint told
			crowd(50, func(i int) {
				for n := range 4 {
					s := stores[(i+n)%len(stores)]
					assert.NoError(t, singleA.ask(s, a))
					assert.NoError(t, joint.ask(s, ab))
					assert.NoError(t, singleB.ask(s, b))
					assert.NoError(t, joint.ask(s, ba))
				}
			})
			assert.Equal(t, int64(150), singleA.admitted.Load()+joint.admitted.Load())
			assert.Equal(t, int64(150), singleB.admitted.Load()+joint.admitted.Load())
			assert.Equal(t, int64(150), spentBy(t, stores[0], a))
			assert.Equal(t, int64(150), spentBy(t, stores[0], b))
		})
	}
}

func TestAServerWithoutAFreeConnectionIsAnErrorWithItsCause(t *testing.T) {
	t.Parallel()
	const connections = 8
	server, pool := harmed(t, "-c", fmt.Sprint("max_connections=", connections))
	s, r := open(t, pool, prompt), fivePerHour(t, "a")
	var held []*pgx.Conn
	release := sync.OnceFunc(func() {
		for _, conn := range held {
			assert.NoError(t, conn.Close(context.Background()))
		}
	})
	t.Cleanup(release)
	until(t, "others have connections", func() bool {
		pool.Reset()
		if conn, err := pgx.Connect(t.Context(), server.URL()); err == nil {
			held = append(held, conn)
		}
		return len(held) == connections
	})
	took := timed(3, func() {
		_, err := s.Decide(t.Context(), r)
		assertUnavailable(t, err)
		assert.Equal(t, tooMany, code(err), "%v", err)
	})
	assert.Less(t, slices.Min(took), 200*time.Millisecond, "it is known at once")
	release()
	recovery(t, 10*time.Second, func() error { return s.Reset(t.Context(), "", "a") })
	assert.Equal(t, 5, take(t, s, r, 7))
}

func TestCloseDuringLoadLeavesNoCallWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t).URL())
	again, s, r, count := open(t, pool, pgstore.Options{}), open(t, pool, pgstore.Options{}), hourly(t, "a", 1<<40), told{}
	var calls sync.WaitGroup
	for range 50 {
		calls.Go(func() {
			err := error(nil)
			for err == nil {
				err = count.ask(s, r)
			}
			assert.ErrorIs(t, err, storage.ErrClosed)
		})
	}
	until(t, "there is no load", func() bool { return count.admitted.Load() > 500 })
	crowd(3, func(int) { assert.NoError(t, s.Close()) })
	calls.Wait()
	assert.Equal(t, count.admitted.Load(), spentBy(t, again, r), "each call that was sent was answered")
	assert.ErrorIs(t, s.Reset(t.Context(), "", "a"), storage.ErrClosed)
	assert.NoError(t, pool.Ping(t.Context()), "the pool is the caller's")
}

// Nothing that is left behind would escape TestMain.
func TestCloseReturnsInTime(t *testing.T) {
	t.Parallel()
	for name, cause := range map[string]func(*testing.T, *servers.Server){
		"on a frozen server":    func(t *testing.T, server *servers.Server) { require.NoError(t, server.Freeze()) },
		"while a row is locked": func(t *testing.T, server *servers.Server) { holdRow(t, server.URL(), "a") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server, pool := harmed(t)
			s, r := open(t, pool, prompt), fivePerHour(t, "a")
			require.Equal(t, 1, take(t, s, r, 1))
			cause(t, server)
			var calls sync.WaitGroup
			defer calls.Wait()
			for range 20 {
				calls.Go(func() {
					if err := new(told).ask(s, r); !errors.Is(err, storage.ErrClosed) {
						assertUnavailable(t, err)
					}
				})
			}
			until(t, "nothing was sent", func() bool { return pool.Stat().AcquiredConns() > 0 })
			took := timed(1, func() { assert.NoError(t, s.Close()) })
			assert.Less(t, took[0], prompt.Timeout+time.Second, "Close hung")
			assert.Greater(t, took[0], prompt.Timeout/20, "Close did not wait for what was sent")
			assert.ErrorIs(t, new(told).ask(s, r), storage.ErrClosed)
		})
	}
}
