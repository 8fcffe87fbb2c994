package servers_test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/go-throttler/throttler/internal/servers"
)

// parentVariable is an environment variable. If it is set, the test program is a parent: it starts the server that the
// variable names, and waits until it is killed.
const parentVariable = "THROTTLER_TEST_PARENT"

func TestMain(m *testing.M) {
	switch os.Getenv(parentVariable) {
	case "redis":
		parent(servers.StartRedis())
	case "frozen postgres":
		s, err := servers.StartPostgres()
		if err == nil {
			err = s.Freeze()
		}
		parent(s, err)
	}
	goleak.VerifyTestMain(m)
}

// parent prints the address of the server, and waits until it is killed.
func parent(s *servers.Server, err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(s.Addr())
	select {}
}

// dial connects to a server. A read without an answer fails after patience.
func dial(t *testing.T, addr string, patience time.Duration) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, conn.Close()) })
	require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
	return conn
}

func assertNobodyListens(t *testing.T, addr string) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if !assert.ErrorContains(t, err, "refused") {
		assert.NoError(t, conn.Close())
	}
}

func TestAChildDoesNotOutliveAParentThatIsKilled(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		return // on other systems it outlives its parent
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), parentVariable+"=redis", "TMPDIR="+t.TempDir())
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	addr, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	conn := dial(t, strings.TrimSpace(addr), time.Minute)

	require.NoError(t, cmd.Process.Kill())
	assert.Error(t, cmd.Wait())
	_, err = conn.Read(make([]byte, 1))
	assert.NotErrorIs(t, err, os.ErrDeadlineExceeded, "the connection ends with the server")
	assert.Error(t, err)
}

func TestAServerThatIsDownCanOnlyBeStarted(t *testing.T) {
	t.Parallel()
	s := servers.Redis(t)
	assert.ErrorContains(t, s.Start(), "runs already")
	require.NoError(t, s.Stop())
	assertNobodyListens(t, s.Addr())
	assert.NoError(t, s.Stop())
	assert.NoError(t, s.Kill())
	assert.ErrorContains(t, s.Freeze(), "is down")
	assert.ErrorContains(t, s.Thaw(), "is down")
	assert.NoError(t, s.Start())
}

func TestAFrozenServerCanBeStoppedAndKilled(t *testing.T) {
	t.Parallel()
	s := servers.Redis(t)
	for _, end := range []func() error{s.Stop, s.Kill} {
		require.NoError(t, s.Freeze())
		require.NoError(t, end())
		assertNobodyListens(t, s.Addr())
		require.NoError(t, s.Start())
	}
}

// This test changes the environment, so it is not parallel: it runs before those that are.
func TestCloseLeavesNothingEvenOfAFrozenServer(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	s, err := servers.StartRedis()
	require.NoError(t, err)
	assert.Len(t, list(t, dir), 1)

	require.NoError(t, s.Freeze())
	require.NoError(t, s.Close())
	assertNobodyListens(t, s.Addr())
	assert.Empty(t, list(t, dir))
	assert.NoError(t, s.Close())
	assert.ErrorContains(t, s.Start(), "is closed")
}

func TestAServerThatDoesNotStartSaysWhyAndLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	_, err := servers.StartRedis("--maxmemory", "much")
	assert.ErrorContains(t, err, "argument must be a memory value", "of the log")
	assert.Empty(t, list(t, dir))
}

func list(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	require.NoError(t, err)
	return names
}
