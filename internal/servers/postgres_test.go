package servers_test

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/servers"
)

func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, conn.Close(context.Background())) })
	return conn
}

// value returns the only value of a query.
func value[T any](t *testing.T, conn *pgx.Conn, sql string) (v T) {
	t.Helper()
	require.NoError(t, conn.QueryRow(t.Context(), sql).Scan(&v))
	return v
}

func execute(t *testing.T, conn *pgx.Conn, sql string) {
	t.Helper()
	_, err := conn.Exec(t.Context(), sql)
	require.NoError(t, err)
}

// assertSoon waits until a query, in a connection of its own, returns the value.
func assertSoon(t *testing.T, url, sql string, want int) {
	t.Helper()
	assert.Eventually(t, func() bool {
		conn, err := pgx.Connect(t.Context(), url)
		if err != nil {
			return false
		}
		defer func() { assert.NoError(t, conn.Close(context.Background())) }()
		var got int
		return conn.QueryRow(t.Context(), sql).Scan(&got) == nil && got == want
	}, time.Minute, 10*time.Millisecond)
}

func TestAPostgresAnswersWithItsConfigurationAndIsDurable(t *testing.T) {
	t.Parallel()
	conn := connect(t, servers.Postgres(t, "-c", "work_mem=5MB", "-c", "max_connections=30").URL())
	for setting, want := range map[string]string{
		"work_mem": "5MB", "max_connections": "30", "fsync": "on", "synchronous_commit": "on", "full_page_writes": "on", "server_encoding": "UTF8",
	} {
		assert.Equal(t, want, value[string](t, conn, "SHOW "+setting), setting)
	}
}

func TestAPostgresThatWasStoppedOrKilledHasWhatItCommittedOnTheSameAddress(t *testing.T) {
	t.Parallel()
	s := servers.Postgres(t)
	addr := s.Addr()
	execute(t, connect(t, s.URL()), "CREATE TABLE kept (n int)")
	for i, end := range []func() error{s.Kill, s.Stop, s.Kill} {
		conn := connect(t, s.URL())
		execute(t, conn, "INSERT INTO kept VALUES (1)")
		execute(t, conn, "BEGIN; INSERT INTO kept VALUES (100)")
		require.NoError(t, end())
		assertNobodyListens(t, addr)
		require.NoError(t, s.Start())
		assert.Equal(t, addr, s.Addr())
		assert.Equal(t, i+1, value[int](t, connect(t, s.URL()), "SELECT sum(n) FROM kept"))
	}
}

func TestAPostgresThatWasKilledLeavesNoProcessAndNoSharedMemory(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		return // the test reads /proc
	}
	s := servers.Postgres(t)
	conn := connect(t, s.URL())
	memory := value[string](t, conn, `SELECT split_part(pg_read_file('postmaster.pid'), E'\n', 7)`)
	folder := value[string](t, conn, "SHOW data_directory")
	assert.Contains(t, sharedMemory(t), strings.Fields(memory)[1])
	assert.NotEmpty(t, processesIn(t, folder))

	require.NoError(t, s.Kill())
	assert.NotContains(t, sharedMemory(t), strings.Fields(memory)[1])
	assert.Empty(t, processesIn(t, folder))
}

// sharedMemory returns the numbers of all segments of System V shared memory.
func sharedMemory(t *testing.T) (numbers []string) {
	t.Helper()
	table, err := os.ReadFile("/proc/sysvipc/shm")
	require.NoError(t, err)
	for line := range strings.Lines(string(table)) {
		numbers = append(numbers, strings.Fields(line)[1])
	}
	return numbers
}

// processesIn returns the processes that run in a folder or below it, as links in /proc.
func processesIn(t *testing.T, folder string) []string {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/cwd")
	require.NoError(t, err)
	return slices.DeleteFunc(links, func(link string) bool {
		in, err := os.Readlink(link)
		return err != nil || !strings.HasPrefix(in, folder)
	})
}

func TestTheConnectionsOfAFrozenPostgresWaitUntilItIsThawed(t *testing.T) {
	t.Parallel()
	s := servers.Postgres(t)
	conn := connect(t, s.URL())
	require.NoError(t, s.Freeze())
	answered := make(chan error)
	go func() { answered <- conn.Ping(t.Context()) }()
	select {
	case err := <-answered:
		t.Errorf("it answered: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	require.NoError(t, s.Thaw())
	assert.NoError(t, <-answered)

	require.NoError(t, s.Freeze())
	require.NoError(t, s.Freeze(), "again")
	require.NoError(t, s.Stop())
	require.NoError(t, s.Start())
	require.NoError(t, s.Freeze())
	require.NoError(t, s.Kill())
	require.NoError(t, s.Start())
	assert.NoError(t, connect(t, s.URL()).Ping(t.Context()))
}

func TestAPostgresServesAgainAfterABackendWasKilled(t *testing.T) {
	t.Parallel()
	s := servers.Postgres(t)
	killed, other := connect(t, s.URL()), connect(t, s.URL())
	execute(t, other, "CREATE TABLE kept AS SELECT 5 AS n")
	assert.ErrorContains(t, s.KillBackend(os.Getpid()), "it has no process")

	require.NoError(t, s.KillBackend(value[int](t, killed, "SELECT pg_backend_pid()")))
	assert.Error(t, killed.Ping(t.Context()))
	assert.Eventually(t, func() bool { return other.Ping(t.Context()) != nil }, 30*time.Second, 10*time.Millisecond, "the server ends all connections")
	assertSoon(t, s.URL(), "SELECT n FROM kept", 5)
	require.NoError(t, s.Stop())
	assert.ErrorContains(t, s.KillBackend(os.Getpid()), "is down")
}

func TestAStandbyFollowsItsPrimaryAndOnlyReads(t *testing.T) {
	t.Parallel()
	primary := servers.Postgres(t, "-c", "work_mem=5MB")
	execute(t, connect(t, primary.URL()), "CREATE TABLE followed AS SELECT 1 AS n")
	standby := servers.PostgresStandby(t, primary)
	conn := connect(t, standby.URL())
	assert.True(t, value[bool](t, conn, "SELECT pg_is_in_recovery()"))
	assert.Equal(t, 1, value[int](t, conn, "SELECT n FROM followed"))
	assert.Equal(t, "5MB", value[string](t, conn, "SHOW work_mem"))
	_, err := conn.Exec(t.Context(), "UPDATE followed SET n = 100")
	var refused *pgconn.PgError
	require.ErrorAs(t, err, &refused)
	assert.Equal(t, "25006", refused.Code, "read_only_sql_transaction")

	execute(t, connect(t, primary.URL()), "UPDATE followed SET n = 2")
	assertSoon(t, standby.URL(), "SELECT n FROM followed", 2)
	require.NoError(t, primary.Kill())
	require.NoError(t, primary.Start())
	require.NoError(t, standby.Kill())
	require.NoError(t, standby.Start())
	execute(t, connect(t, primary.URL()), "UPDATE followed SET n = 3")
	assertSoon(t, standby.URL(), "SELECT n FROM followed", 3)
}

func TestAPromotedStandbyWritesAndCanBeStartedAgain(t *testing.T) {
	t.Parallel()
	primary := servers.Postgres(t)
	standby := servers.PostgresStandby(t, primary)
	require.NoError(t, primary.Kill())
	assert.True(t, value[bool](t, connect(t, standby.URL()), "SELECT pg_promote()"))
	execute(t, connect(t, standby.URL()), "CREATE TABLE written AS SELECT 1 AS n")
	require.NoError(t, standby.Stop())
	require.NoError(t, standby.Start())
	assert.Equal(t, 1, value[int](t, connect(t, standby.URL()), "SELECT n FROM written"))
}

func TestAStandbyNeedsAPrimaryThatRuns(t *testing.T) {
	t.Parallel()
	primary := servers.Postgres(t)
	require.NoError(t, primary.Stop())
	_, err := servers.StartStandby(primary)
	assert.ErrorContains(t, err, "is down")
}

func TestAPgBouncerPoolsTransactions(t *testing.T) {
	t.Parallel()
	primary := servers.Postgres(t)
	pool := servers.PgBouncer(t, primary, "default_pool_size = 1")
	assert.NotEqual(t, primary.Addr(), pool.Addr())
	url := pool.URL() + "&default_query_exec_mode=exec" // without prepared statements
	one, other := connect(t, url), connect(t, url)
	backend := value[int](t, one, "SELECT pg_backend_pid()")
	assert.Equal(t, backend, value[int](t, other, "SELECT pg_backend_pid()"), "the connection is free between transactions")

	require.NoError(t, primary.Kill())
	require.NoError(t, primary.Start())
	assertSoon(t, url, "SELECT 1", 1)
	for _, end := range []func() error{pool.Stop, pool.Kill} {
		require.NoError(t, end())
		assertNobodyListens(t, pool.Addr())
		require.NoError(t, pool.Start())
		assert.Equal(t, 1, value[int](t, connect(t, url), "SELECT 1"))
	}
}

// A parent that is killed leaves only the folder of its server behind.
func TestAFrozenPostgresDoesNotOutliveAParentThatIsKilled(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		return // on other systems it outlives its parent
	}
	folder := t.TempDir()
	require.NoError(t, os.Chmod(filepath.Dir(folder), 0o755), "for the user that Postgres runs as")
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), parentVariable+"=frozen postgres", "TMPDIR="+folder)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	_, err = bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	assert.Len(t, list(t, folder), 2, "the folder of the server, and what it was copied from")
	assert.Greater(t, len(processesIn(t, folder)), 3)

	require.NoError(t, cmd.Process.Kill())
	assert.Error(t, cmd.Wait())
	assert.Eventually(t, func() bool { return len(processesIn(t, folder)) == 0 && len(list(t, folder)) == 1 }, time.Minute, 10*time.Millisecond)
	removeSharedMemory(t, folder)
}

// removeSharedMemory removes the shared memory that the killed server in a folder has left behind.
func removeSharedMemory(t *testing.T, folder string) {
	t.Helper()
	file, err := os.ReadFile(filepath.Join(list(t, folder)[0], "data", "postmaster.pid"))
	require.NoError(t, err)
	number := strings.Fields(strings.Split(string(file), "\n")[6])[1]
	assert.NoError(t, exec.Command("ipcrm", "-m", number).Run())
}

func TestAPostgresThatDoesNotStartSaysWhy(t *testing.T) {
	t.Parallel()
	_, err := servers.StartPostgres("-c", "work_mem=much")
	assert.ErrorContains(t, err, "invalid value for parameter", "of the log")
	_, err = servers.StartPgBouncer(servers.Postgres(t), "pool_mode = none")
	assert.ErrorContains(t, err, "pool_mode", "of the log")
}

func TestThePostgresOfTheEnvironmentIsUsed(t *testing.T) {
	t.Setenv("THROTTLER_POSTGRES_URL", "postgres://user@192.0.2.1/database")
	assert.Equal(t, "postgres://user@192.0.2.1/database", servers.PostgresURL(t))
	t.Setenv("THROTTLER_POSTGRES_URL", "")
	assert.NoError(t, connect(t, servers.PostgresURL(t)).Ping(t.Context()))
}

func TestAMissingPostgresOrPgBouncerIsAnErrorThatSaysWhatToDo(t *testing.T) {
	primary := servers.Postgres(t)
	missing := filepath.Join(t.TempDir(), "bin")
	t.Setenv("POSTGRES_BIN", missing)
	_, err := servers.StartPostgres()
	assert.ErrorContains(t, err, missing)
	assert.ErrorContains(t, err, "apt-get install postgresql")
	for _, missing := range []string{"no-such-pgbouncer", filepath.Join(missing, "pgbouncer")} {
		t.Setenv("PGBOUNCER", missing)
		_, err = servers.StartPgBouncer(primary)
		assert.ErrorContains(t, err, missing)
		assert.ErrorContains(t, err, "apt-get install pgbouncer")
	}
}
