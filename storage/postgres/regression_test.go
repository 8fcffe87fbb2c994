// This file has the smallest test for each fault that the package once had.
package postgres_test

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
)

// A read that fails does not return the server's time.
func TestAReadThatFailedLeavesNoClock(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t).URL())
	s, r := open(t, pool, pgstore.Options{}), storecheck.FivePerHour(t, "a")
	require.Equal(t, 5, storecheck.Take(t, s, r, 5)) // remembered
	sqlDo(t, pool, "ALTER TABLE throttler_state RENAME TO away")
	for i := range 20 { // enough for both partitions
		_, err := storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, fmt.Sprint("other-", i)))
		assertUnavailable(t, err)
	}
	sqlDo(t, pool, "ALTER TABLE away RENAME TO throttler_state")
	assert.Zero(t, storecheck.Take(t, s, r, 7), "more than the limit was admitted")
}

// Batches have new rows, and a row that another transaction has locked.
func TestWhatAFailedBatchHasInsertedIsNotAdmitted(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t).URL())
	s := open(t, pool, pgstore.Options{Timeout: 5 * time.Second})
	var old, fresh []storecheck.Request
	for i := range 16 {
		old = append(old, storecheck.Hourly(t, fmt.Sprint("old-", i), 100))
		require.Equal(t, 1, storecheck.Take(t, s, old[i], 1))
	}
	for i := range 40 {
		fresh = append(fresh, storecheck.Hourly(t, fmt.Sprint("fresh-", i), 100))
	}
	tx, err := pool.Begin(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { _ = tx.Rollback(context.Background()) })
	_, err = tx.Exec(t.Context(), "SELECT FROM throttler_state FOR UPDATE")
	require.NoError(t, err)
	admitted := make([]bool, len(fresh))
	var all sync.WaitGroup
	for _, r := range old {
		all.Go(func() { _, _ = storecheck.Decide(context.Background(), s, r) })
	}
	holder{pool, tx}.awaited(t, 2) // a batch of each partition
	for i, r := range fresh {
		all.Go(func() {
			v, err := storecheck.Decide(context.Background(), s, r)
			admitted[i] = err == nil && v.Allowed
		})
	}
	all.Wait()
	require.NoError(t, tx.Commit(t.Context()))
	lost := 0
	for i, r := range fresh {
		if admitted[i] && storecheck.Spent(t, s, r) == 0 {
			lost++
		}
	}
	assert.Zero(t, lost, "identifiers were admitted and nothing was taken from them")
}

// A call whose commit fails has taken nothing.
func TestAWriteThatIsNotCommittedIsNotAdmitted(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t).URL())
	s, r := open(t, pool, pgstore.Options{}), storecheck.FivePerHour(t, "a")
	sqlDo(t, pool, `CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END'`)
	sqlDo(t, pool, `CREATE CONSTRAINT TRIGGER refuse AFTER INSERT OR UPDATE ON throttler_state DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()`)
	_, err := storecheck.Decide(t.Context(), s, r)
	assertUnavailable(t, err)
}

// slow is a connection that delays the answers of a server.
type slow struct {
	net.Conn
	delay *atomic.Int64
}

func (c slow) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if d := time.Duration(c.delay.Load()); d > 0 && n > 0 {
		<-time.After(d)
	}
	return n, err
}

// An answer that took 200 ms has the time of 200 ms ago at the earliest, and not the present one.
func TestAnAnswerThatWasLateDoesNotSetTheClockBack(t *testing.T) {
	t.Parallel()
	config, err := pgxpool.ParseConfig(servers.Postgres(t).URL() + "&pool_max_conns=1&default_query_exec_mode=exec")
	require.NoError(t, err)
	var delay atomic.Int64
	dialer := net.Dialer{}
	config.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := dialer.DialContext(ctx, network, addr)
		return slow{c, &delay}, err
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	s := open(t, pool, pgstore.Options{})
	const n = 10
	r := storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart("a", []law.Rule{storecheck.Rule(t, "10/150ms", law.SlidingLog, 150*time.Millisecond, n)}, 1)}}
	peek := r
	peek.Mode = storage.Peek
	_, err = storecheck.Decide(t.Context(), s, peek)
	require.NoError(t, err)
	delay.Store(int64(200 * time.Millisecond)) // of a read and of a write
	require.Equal(t, 1, storecheck.Take(t, s, r, 1))
	delay.Store(0)
	began := time.Now()
	admitted := storecheck.Take(t, s, r, 3*n)
	took := time.Since(began)
	t.Log(admitted, "in", took)
	if took < 100*time.Millisecond {
		assert.LessOrEqual(t, admitted, n, "in less than the period")
	}
}

// A row that another transaction has locked delays only the calls that name it.
func TestALockedRowDelaysNoOtherCallsOfSeveralIdentifiers(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	s := open(t, pool, pgstore.Options{Timeout: time.Second})
	pair := func(a, b string) storecheck.Request {
		r := storecheck.Hourly(t, a, 1<<40)
		r.Parts = append(r.Parts, storecheck.Hourly(t, b, 1<<40).Parts...)
		return r
	}
	require.Equal(t, 1, storecheck.Take(t, s, pair("locked", "x"), 1))
	holdRow(t, server.URL(), "locked")
	stop := make(chan struct{})
	var blocked sync.WaitGroup
	for i := range 10 {
		blocked.Go(func() {
			for {
				_ = new(storecheck.Told).Ask(s, pair("locked", fmt.Sprint(i)))
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	storecheck.Until(t, "nobody waits", func() bool { return pool.Stat().AcquiredConns() >= 4 })
	for range 10 {
		began := time.Now()
		err := new(storecheck.Told).Ask(s, pair("free", "also free"))
		t.Log(time.Since(began), err)
		assert.NoError(t, err)
	}
	close(stop)
	blocked.Wait()
}

// A crash without synchronous_commit, or a failover, can undo the last change of a row. If the next change, by another
// process, got the same version again, a memory of the lost one would overwrite it.
func TestMemoryOfAVersionThatACrashTookBackOverwritesNothing(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.PostgresURL(t))
	s, other := open(t, pool, pgstore.Options{TablePrefix: "crashed"}), open(t, pool, pgstore.Options{TablePrefix: "crashed"})
	r := storecheck.Hourly(t, freshID(t), 100)
	id := []byte(":" + r.Parts[0].Identifier)
	require.Equal(t, 1, storecheck.Take(t, s, r, 1))
	sqlDo(t, pool, "CREATE TABLE IF NOT EXISTS disk AS SELECT * FROM crashed_state WHERE id = $1", id)
	require.Equal(t, 1, storecheck.Take(t, s, r, 1), "this one is lost")
	sqlDo(t, pool, "UPDATE crashed_state AS c SET version = d.version, state = d.state FROM disk AS d WHERE c.id = d.id")
	c := chargeOne(r)
	c.Amounts[0].N = 50
	require.NoError(t, other.Charge(t.Context(), &c))
	require.Equal(t, 1, storecheck.Take(t, s, r, 1))
	assert.Equal(t, int64(1+50+1), storecheck.Spent(t, s, r), "a charge that was made after the crash")
}

// The end of connect_timeout must not look like the end of the caller's context.
func TestNewSaysThatTheServerDoesNotAnswer(t *testing.T) {
	t.Parallel()
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { assert.NoError(t, mute.Close()) }()
	pool := connect(t, "postgres://x@"+mute.Addr().String()+"/x?sslmode=disable&connect_timeout=1")
	_, err = pgstore.New(t.Context(), pool, nil)
	t.Log(err)
	assertUnavailable(t, err)
}

// forgettable is a connection that a NAT may forget: then nothing passes any more, and neither end is told.
type forgettable struct {
	net.Conn
	forgotten atomic.Bool
	closed    chan struct{}
	once      sync.Once
}

func (c *forgettable) Write(b []byte) (int, error) {
	if c.forgotten.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

func (c *forgettable) Read(b []byte) (int, error) {
	if c.forgotten.Load() {
		<-c.closed
		return 0, net.ErrClosed
	}
	return c.Conn.Read(b)
}

func (c *forgettable) SetDeadline(t time.Time) error {
	if c.forgotten.Load() && !t.IsZero() {
		return c.Close() // a deadline can only end the wait
	}
	return c.Conn.SetDeadline(t)
}

func (c *forgettable) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// The settings are those of docs/postgres.md, except that the pool pings every connection, and not only those that
// were idle for a second.
func TestConnectionsThatANATForgotFailNoCall(t *testing.T) {
	t.Parallel()
	config, err := pgxpool.ParseConfig(servers.Postgres(t).URL() + "&pool_max_conns=4&pool_max_conn_idle_time=3m&pool_ping_timeout=100ms")
	require.NoError(t, err)
	config.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return true }
	var mu sync.Mutex
	var all []*forgettable
	dialer := net.Dialer{}
	config.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := dialer.DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		mu.Lock()
		defer mu.Unlock()
		all = append(all, &forgettable{Conn: c, closed: make(chan struct{})})
		return all[len(all)-1], nil
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	s := open(t, pool, pgstore.Options{})
	var idle []*pgxpool.Conn
	for range 4 {
		conn, err := pool.Acquire(t.Context())
		require.NoError(t, err)
		idle = append(idle, conn)
	}
	for _, conn := range idle {
		conn.Release()
	}
	for _, c := range all {
		c.forgotten.Store(true)
	}
	assert.Equal(t, 5, storecheck.Take(t, s, storecheck.FivePerHour(t, "a"), 7))
}

func TestAServerThatDoesNotGreetIsNamedAsTheCause(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = silent.Close() })
	pool := connect(t, "postgres://u:p%2Fqq%23zz@"+silent.Addr().String()+"/d?sslmode=disable")
	s := open(t, pool, pgstore.Options{NoSchema: true, Timeout: 50 * time.Millisecond})
	_, err = storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, "a"))
	assertUnavailable(t, err)
	assert.ErrorContains(t, err, "a connection is still being opened")
	require.NoError(t, silent.Close())
	for _, o := range []pgstore.Options{{}, {NoSchema: true}} {
		s, err := pgstore.New(t.Context(), connect(t, "postgres://u:p%2Fqq%23zz@"+silent.Addr().String()+"/d?sslmode=disable"), &o)
		if err == nil {
			_, err = storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, "a"))
			require.NoError(t, s.Close(bg))
		}
		assert.ErrorIs(t, err, syscall.ECONNREFUSED)
		assert.NotRegexp(t, "qq|zz", err.Error(), "no part of the password")
	}
}
