package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/rules"
	pgrules "github.com/go-throttler/throttler/rules/postgres"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var tables atomic.Int64

// open returns a table of its own on the shared server, and the pool that it uses.
func open(t *testing.T, url string, o pgrules.Options) (*pgrules.Table, *pgxpool.Pool) {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), url)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	if o.Table == "" {
		o.Table = fmt.Sprintf("throttler_rules_%d_%d_state", time.Now().UnixNano(), tables.Add(1))
	}
	o.Timeout = storecheck.Patient
	table, err := pgrules.New(t.Context(), pool, &o)
	require.NoError(t, err)
	return table, pool
}

func engine(t *testing.T, s rules.Source, interval time.Duration) *rules.Engine {
	t.Helper()
	l, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	e, err := rules.NewEngine(l, s, &rules.Options{Interval: interval})
	require.NoError(t, err)
	t.Cleanup(e.Close)
	return e
}

func file(capacity int) rules.File {
	return rules.File{Name: "a", Data: fmt.Appendf(nil, "domain: a\nrules: [{name: a, limits: [%d/1h]}]", capacity)}
}

// agreed waits until the engine has a rule of this capacity.
func agreed(t *testing.T, e *rules.Engine, capacity int64) {
	t.Helper()
	storecheck.Until(t, "the engine has not the newest rules", func() bool {
		found := e.Rules().Match("a", nil)
		return len(found) == 1 && found[0].Limits[0].Capacity() == capacity
	})
}

func TestAChangeIsToldToEveryEngine(t *testing.T) {
	t.Parallel()
	o := pgrules.Options{Table: fmt.Sprintf("throttler_rules_%d_state", time.Now().UnixNano())}
	url := servers.PostgresURL(t)
	one, _ := open(t, url, o)
	other, _ := open(t, url, o)
	engines := []*rules.Engine{engine(t, one, time.Hour), engine(t, other, time.Hour)} // so long that only notifications can make them look
	for i := range int64(3) {
		require.NoError(t, one.Put(t.Context(), file(int(i)), ""))
		for _, e := range engines {
			agreed(t, e, i)
		}
	}
	require.NoError(t, other.Delete(t.Context(), "a", ""))
	for _, e := range engines {
		storecheck.Until(t, "it is still there", func() bool { return len(e.Rules().Rules()) == 0 })
	}
}

// A hook of the pool may set what a connection needs, such as a password that is valid for some minutes.
func TestTheHookOfThePoolIsAskedBeforeListening(t *testing.T) {
	t.Parallel()
	config, err := pgxpool.ParseConfig(servers.PostgresURL(t))
	require.NoError(t, err)
	port := config.ConnConfig.Port
	config.ConnConfig.Port = 1
	config.BeforeConnect = func(_ context.Context, c *pgx.ConnConfig) error {
		c.Port = port
		return nil
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	name := fmt.Sprintf("throttler_rules_%d_%d_state", time.Now().UnixNano(), tables.Add(1))
	table, err := pgrules.New(t.Context(), pool, &pgrules.Options{Table: name, Timeout: storecheck.Patient})
	require.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	listens, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		table.Watch(ctx, sync.OnceFunc(func() { close(listens) }))
	}()
	select {
	case <-listens:
	case <-time.After(storecheck.Patient):
		t.Error("nobody listens")
	}
	stop()
	<-done
}

// A standby refuses LISTEN for ever, and writes each refusal into its log. All else that reads works there.
func TestListeningThatFailsBecomesRare(t *testing.T) {
	t.Parallel()
	config, err := pgxpool.ParseConfig("postgres://nobody.invalid/")
	require.NoError(t, err)
	tries := make(chan time.Time)
	config.BeforeConnect = func(ctx context.Context, _ *pgx.ConnConfig) error {
		select {
		case tries <- time.Now():
		case <-ctx.Done():
		}
		return errors.New("refused")
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	table, err := pgrules.New(t.Context(), pool, &pgrules.Options{NoSchema: true, Timeout: storecheck.Patient})
	require.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); table.Watch(ctx, func() {}) }()
	last, pause := <-tries, 250*time.Millisecond
	for range 3 {
		next := <-tries
		assert.GreaterOrEqual(t, next.Sub(last), pause)
		last, pause = next, 2*pause
	}
	stop()
	<-done
}

func TestAChangeMadeByHandIsFound(t *testing.T) {
	t.Parallel()
	o := pgrules.Options{Table: fmt.Sprintf("throttler_rules_%d_state", time.Now().UnixNano())}
	table, pool := open(t, servers.PostgresURL(t), o)
	require.NoError(t, table.Put(t.Context(), file(1), ""))
	e := engine(t, table, 10*time.Millisecond)
	agreed(t, e, 1)
	_, err := pool.Exec(t.Context(), "UPDATE "+o.Table+" SET data = replace(data, '1/1h', '2/1h')")
	require.NoError(t, err)
	agreed(t, e, 2)

	_, err = pool.Exec(t.Context(), "UPDATE "+o.Table+" SET data = 'rules: [{nam: x}]'")
	require.NoError(t, err)
	storecheck.Until(t, "the fault is not told", func() bool { return e.Err() != nil })
	agreed(t, e, 2)
	assert.ErrorContains(t, e.Err(), `a:1:10: "nam" is no word of a rule`)
}

func TestEnginesAgreeAfterPostgresWasRestarted(t *testing.T) {
	t.Parallel()
	server := servers.Postgres(t)
	o := pgrules.Options{Table: "rules_of_all"}
	one, _ := open(t, server.URL(), o)
	other, _ := open(t, server.URL(), o)
	require.NoError(t, one.Put(t.Context(), file(1), ""))
	engines := []*rules.Engine{engine(t, one, 100*time.Millisecond), engine(t, other, time.Hour)}
	for _, e := range engines {
		agreed(t, e, 1)
	}
	require.NoError(t, server.Kill())
	storecheck.Until(t, "nobody notices", func() bool { return engines[0].Err() != nil })
	agreed(t, engines[0], 1) // also while the server is down
	require.NoError(t, server.Start())
	storecheck.Recovery(t, storecheck.Patient, func() error { return one.Put(t.Context(), file(2), "") })
	for _, e := range engines {
		agreed(t, e, 2)
		storecheck.Until(t, "the error stays", func() bool { return e.Err() == nil })
	}
}

func TestOfTwoWritersWhoKnowOneVersionOneWins(t *testing.T) {
	t.Parallel()
	table, _ := open(t, servers.PostgresURL(t), pgrules.Options{})
	ctx := t.Context()
	require.NoError(t, table.Put(ctx, file(1), rules.Absent))
	require.ErrorIs(t, table.Put(ctx, file(2), rules.Absent), rules.ErrConflict)
	have := file(1)
	var won atomic.Int64
	var writers sync.WaitGroup
	for i := range 8 {
		writers.Go(func() {
			if err := table.Put(ctx, file(2+i), have.ETag()); err == nil {
				won.Add(1)
			} else {
				assert.ErrorIs(t, err, rules.ErrConflict)
			}
		})
	}
	writers.Wait()
	assert.Equal(t, int64(1), won.Load())
	require.ErrorIs(t, table.Delete(ctx, "a", have.ETag()), rules.ErrConflict)
	require.ErrorIs(t, table.Delete(ctx, "b", ""), rules.ErrNotFound)
	require.NoError(t, table.Delete(ctx, "a", ""))
	files, err := table.Files(ctx)
	require.NoError(t, err)
	assert.Empty(t, files)
}

// TestWhatTwoChangesFindRightStaysRight lets each change add a file only while there is none.
func TestWhatTwoChangesFindRightStaysRight(t *testing.T) {
	t.Parallel()
	o := pgrules.Options{Table: fmt.Sprintf("throttler_rules_%d_change", time.Now().UnixNano())}
	url := servers.PostgresURL(t)
	one, _ := open(t, url, o)
	other, _ := open(t, url, o)
	for name, stores := range map[string][]rules.Store{"tables": {one, other}, "memory": {rules.NewMemory()}} {
		var changes sync.WaitGroup
		for i := range 8 {
			changes.Go(func() {
				assert.NoError(t, stores[i%len(stores)].Change(t.Context(), func(files []rules.File) ([]rules.File, error) {
					if len(files) > 0 {
						return files, nil
					}
					return append(files, rules.File{Name: fmt.Sprint(i), Data: []byte("rules: []")}), nil
				}))
			})
		}
		changes.Wait()
		files, err := stores[0].Files(t.Context())
		require.NoError(t, err)
		assert.Len(t, files, 1, name)
	}
}

func TestAChangeOfSeveralFilesIsAllOrNothing(t *testing.T) {
	t.Parallel()
	table, _ := open(t, servers.PostgresURL(t), pgrules.Options{})
	for name, s := range map[string]rules.Store{"table": table, "memory": rules.NewMemory()} {
		named := func(name, text string) rules.File { return rules.File{Name: name, Data: []byte(text)} }
		becomes := func(after ...rules.File) error {
			return s.Change(t.Context(), func([]rules.File) ([]rules.File, error) { return after, nil })
		}
		require.NoError(t, becomes(named("c", "1"), named("a", "1"), named("b", "1")), name)
		require.NoError(t, becomes(named("d", "1"), named("b", "2"), named("a", "1")), name)
		want := []rules.File{named("a", "1"), named("b", "2"), named("d", "1")}
		wrong := errors.New("wrong")
		require.ErrorIs(t, s.Change(t.Context(), func(files []rules.File) ([]rules.File, error) {
			files[0].Name = "e"
			return nil, wrong
		}), wrong, name)
		if s == table {
			require.Error(t, becomes(named("a", "3"), named("b", "\xff")), "Postgres cannot store it")
		}
		files, err := s.Files(t.Context())
		require.NoError(t, err)
		assert.Equal(t, want, files, name)
	}
}

func TestAChangeReturnsWhenPostgresHangs(t *testing.T) {
	t.Parallel()
	server := servers.Postgres(t)
	_, pool := open(t, server.URL(), pgrules.Options{Table: "changed"})
	table, err := pgrules.New(t.Context(), pool, &pgrules.Options{Table: "changed", NoSchema: true, Timeout: 200 * time.Millisecond})
	require.NoError(t, err)
	unchanged := func(files []rules.File) ([]rules.File, error) { return files, nil }
	for when, change := range map[string]func(context.Context) error{
		"before it begins": func(ctx context.Context) error {
			require.NoError(t, server.Freeze())
			return table.Change(ctx, unchanged)
		},
		"during edit": func(ctx context.Context) error {
			return table.Change(ctx, func(files []rules.File) ([]rules.File, error) { return files, server.Freeze() })
		},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), storecheck.Patient)
		require.ErrorIs(t, change(ctx), context.DeadlineExceeded, when)
		assert.NoError(t, ctx.Err(), when)
		cancel()
		require.NoError(t, server.Thaw())
		storecheck.Until(t, when, func() bool { return table.Change(t.Context(), unchanged) == nil })
	}
}

func TestEveryExecModeReadsAndWrites(t *testing.T) {
	t.Parallel()
	for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol} {
		config, err := pgxpool.ParseConfig(servers.PostgresURL(t))
		require.NoError(t, err)
		config.ConnConfig.DefaultQueryExecMode = mode
		pool, err := pgxpool.NewWithConfig(t.Context(), config)
		require.NoError(t, err)
		t.Cleanup(pool.Close)
		table, err := pgrules.New(t.Context(), pool, &pgrules.Options{Schema: "public", Table: fmt.Sprintf(`odd "name" %d_state`, time.Now().UnixNano()), Timeout: storecheck.Patient})
		require.NoError(t, err, mode)
		require.NoError(t, table.Put(t.Context(), rules.File{Name: "é", Data: []byte("rules: [] # 'ü'\n")}, ""), mode)
		require.NoError(t, table.Put(t.Context(), file(1), ""), mode)
		for range 2 {
			files, err := table.Files(t.Context())
			require.NoError(t, err, mode)
			assert.Equal(t, []rules.File{file(1), {Name: "é", Data: []byte("rules: [] # 'ü'\n")}}, files)
		}
	}
}

func TestStatementsWorkThroughAPoolerOfTransactions(t *testing.T) {
	t.Parallel()
	url := servers.PgBouncer(t, servers.Postgres(t, "-c", "fsync=off"), "default_pool_size = 3").URL()
	table, _ := open(t, url, pgrules.Options{})
	storecheck.Crowd(8, func(i int) {
		f := rules.File{Name: fmt.Sprint(i), Data: []byte("rules: []")}
		for range 10 {
			assert.NoError(t, table.Put(t.Context(), f, ""))
			files, err := table.Files(t.Context())
			assert.NoError(t, err)
			assert.Contains(t, files, f)
			assert.NoError(t, table.Change(t.Context(), func(files []rules.File) ([]rules.File, error) { return files, nil }))
			assert.NoError(t, table.Delete(t.Context(), f.Name, ""))
		}
	})
}

// Postgres shortens longer names of tables, but refuses them as channels: each change would fail.
// A server in FIPS mode has no md5. Here nobody may execute it.
func TestAServerWithoutMD5IsEnough(t *testing.T) {
	config, err := pgxpool.ParseConfig(servers.Postgres(t).URL())
	require.NoError(t, err)
	connect := func() *pgxpool.Pool {
		pool, err := pgxpool.NewWithConfig(t.Context(), config.Copy())
		require.NoError(t, err)
		t.Cleanup(pool.Close)
		return pool
	}
	_, err = connect().Exec(t.Context(), "REVOKE EXECUTE ON FUNCTION md5(text), md5(bytea) FROM PUBLIC; CREATE ROLE limited; GRANT CREATE ON SCHEMA public TO limited")
	require.NoError(t, err)
	config.ConnConfig.RuntimeParams["role"] = "limited"
	pool := connect()
	_, err = pool.Exec(t.Context(), "SELECT md5('')")
	require.ErrorContains(t, err, "permission denied")

	table, err := pgrules.New(t.Context(), pool, nil)
	require.NoError(t, err)
	require.NoError(t, table.Put(t.Context(), file(1), ""))
	files, err := table.Files(t.Context())
	require.NoError(t, err)
	require.Equal(t, []rules.File{file(1)}, files)
}

func TestATableWhoseNameIsTooLongIsRefused(t *testing.T) {
	t.Parallel()
	pool, err := pgxpool.New(t.Context(), servers.Postgres(t).URL())
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	table, err := pgrules.New(t.Context(), pool, &pgrules.Options{Table: strings.Repeat("a", 63)})
	require.NoError(t, err)
	require.NoError(t, table.Put(t.Context(), file(1), ""))
	for _, noSchema := range []bool{false, true} {
		_, err = pgrules.New(t.Context(), pool, &pgrules.Options{Table: strings.Repeat("é", 32), NoSchema: noSchema})
		require.ErrorContains(t, err, "Options.Table has 64 bytes")
	}
}

func TestACallEndsWithItsContext(t *testing.T) {
	t.Parallel()
	table, _ := open(t, servers.PostgresURL(t), pgrules.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := table.Files(ctx)
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorIs(t, table.Put(ctx, file(1), ""), context.Canceled)
	done := make(chan struct{})
	go func() { table.Watch(ctx, func() {}); close(done) }()
	<-done

	_, err = pgrules.New(t.Context(), nil, nil)
	require.ErrorContains(t, err, "must not be nil")
}
