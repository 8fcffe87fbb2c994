//go:build unix

package main

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestMain runs the program itself if the environment says so.
func TestMain(m *testing.M) {
	if os.Getenv("FAILOVER_DEMO") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// program is the demonstration as a process in a group of its own, with a folder of its own for temporary files.
type program struct {
	*exec.Cmd
	dir    string
	stdout *bufio.Scanner
	stderr strings.Builder
}

func start(t *testing.T, args ...string) *program {
	dir := t.TempDir()
	require.NoError(t, os.Chmod(filepath.Dir(dir), 0o755)) // Postgres may run as another user
	p := &program{Cmd: exec.CommandContext(t.Context(), os.Args[0], args...), dir: dir}
	p.Env = append(os.Environ(), "FAILOVER_DEMO=1", "TMPDIR="+dir)
	p.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.Stderr = &p.stderr
	stdout, err := p.StdoutPipe()
	require.NoError(t, err)
	p.stdout = bufio.NewScanner(stdout)
	require.NoError(t, p.Start())
	return p
}

// until reads the output up to a line with the text, or to its end.
func (p *program) until(text string) (lines []string) {
	for p.stdout.Scan() {
		lines = append(lines, p.stdout.Text())
		if text != "" && strings.Contains(p.stdout.Text(), text) {
			break
		}
	}
	return lines
}

// assertNothingIsLeft allows a moment for the shell that removes the last folder.
func (p *program) assertNothingIsLeft(t *testing.T) {
	assert.Eventually(t, func() bool {
		files, err := filepath.Glob(filepath.Join(p.dir, "*"))
		return err == nil && len(files) == 0 && errors.Is(syscall.Kill(-p.Process.Pid, 0), syscall.ESRCH)
	}, 10*time.Second, 10*time.Millisecond)
}

func TestTheLimitHoldsAndNoCallerNotices(t *testing.T) {
	t.Parallel()
	p := start(t, "-kill", "1s", "-restart", "2500ms", "-for", "8s", "-patience", "10s")
	lines := p.until("")
	text := strings.Join(lines, "\n")
	require.NoError(t, p.Wait(), "%s\n%s", &p.stderr, text)
	assert.Empty(t, p.stderr.String())
	for _, event := range []string{"Redis is killed", "Postgres decides", "Redis starts, empty", "Redis decides again"} {
		assert.Contains(t, text, event) // more than once on an overloaded machine
	}
	for _, line := range lines {
		assert.LessOrEqual(t, len(line), 100)
	}
	require.Len(t, lines, 3+1+8+1+3)
	end := strings.Join(lines[len(lines)-3:], "\n")
	assert.Regexp(t, `^Admitted: \d+ in \d+\.\d\d s, \d+ by Redis and \d+ by Postgres\. The hourly limit has counted \d+\.
Allowed in this time: \d+, which is 100 at once and 100 a second\.
The limit (held, in all and in each interval|was exceeded by \d+; the bound is \d+)\. Callers saw 0 errors\.$`, end)
	p.assertNothingIsLeft(t)
}

// For Ctrl-C a terminal signals all processes, so that Redis and Postgres end by themselves. Other senders signal only the
// program.
func TestCtrlCLeavesNothing(t *testing.T) {
	t.Parallel()
	for _, when := range []string{"Starting", "Postgres decides"} {
		for _, all := range []bool{true, false} {
			t.Run(when, func(t *testing.T) {
				t.Parallel()
				p := start(t, "-kill", "500ms", "-restart", "30s", "-for", "1m")
				require.NotEmpty(t, p.until(when))
				signal, whom := syscall.SIGTERM, p.Process.Pid
				if all {
					signal, whom = syscall.SIGINT, -whom
				}
				require.NoError(t, syscall.Kill(whom, signal))
				p.until("")
				require.Error(t, p.Wait())
				assert.Equal(t, 1, p.ProcessState.ExitCode())
				assert.Equal(t, "failover: interrupted\n", p.stderr.String())
				p.assertNothingIsLeft(t)
			})
		}
	}
}

func TestTimesThatDoNotFollowOneAnotherAreRefused(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"-kill", "0"}, {"-kill", "9s"}, {"-for", "8s"}} {
		assert.ErrorContains(t, run(t.Context(), args, io.Discard), "must follow one another")
	}
}

func TestTheExcessIsThatOfTheWorstInterval(t *testing.T) {
	t.Parallel()
	at := func(d time.Duration, n int) (calls []call) {
		for range n {
			calls = append(calls, call{d, d})
		}
		return calls
	}
	assert.Zero(t, excess(nil))
	assert.Zero(t, excess(at(time.Second, 100)))
	assert.Equal(t, 1, excess(at(time.Second, 101)))
	calls := append(at(9*time.Second, 60), at(0, 100)...)
	assert.Zero(t, excess(calls), "in all, 1000 are allowed")
	calls = append(calls, at(9100*time.Millisecond, 60)...)
	assert.Equal(t, 10, excess(calls))
	assert.Equal(t, 120, most(calls, 100*time.Millisecond))
	assert.Equal(t, 100, most(calls, 99*time.Millisecond))
	assert.Equal(t, 9100*time.Millisecond, span(calls))
	assert.Zero(t, span(nil))
	assert.Zero(t, excess([]call{{0, time.Second}, {0, time.Second}}))
}
