package servers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// child is a process that was started, which may have started others. A nil child does not run.
type child struct {
	process *os.Process
	ended   chan struct{} // closed when the process is gone
	forget  func()        // calls off what happens to a frozen child at the end of this process; may be nil
}

// startChild starts and awaits the process in one thread, which lives as long as the process: on Linux
// a child is told of the end of the thread that started it, not of that of the parent.
func startChild(cmd *exec.Cmd) (*child, error) {
	dieWithParent(cmd)
	c := &child{ended: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in its log
			close(c.ended)
		}
	}()
	err := <-started
	c.process = cmd.Process
	return c, err
}

func (c *child) running() bool {
	if c == nil || c.process == nil {
		return false
	}
	select {
	case <-c.ended:
		return false
	default:
		return true
	}
}

// freeze waits until all processes stand still, as the signals do not. When this process ends the child
// is killed on Linux, but nothing would end those that the child started, which cannot notice.
func (c *child) freeze() error {
	started, err := c.halt()
	if err == nil && len(started) > 0 {
		c.unfrozen()
		c.forget, err = atEnd(`kill -KILL "$@"`, pids(started)...)
	}
	return err
}

func (c *child) thaw() error {
	c.unfrozen()
	started, err := c.started()
	for _, p := range append(started, c.process) {
		err = errors.Join(err, resume(p))
	}
	return err
}

func (c *child) unfrozen() {
	if c.forget != nil {
		c.forget()
		c.forget = nil
	}
}

// kill halts the child before, so that it can start no process that is not killed.
func (c *child) kill() error {
	started, err := c.halt()
	for _, p := range append(started, c.process) {
		err = errors.Join(err, signal(p, syscall.SIGKILL))
	}
	<-c.ended
	c.unfrozen()
	return errors.Join(err, each(started, "Z"))
}

// halt stops the child, and then the processes that it started, which it returns.
func (c *child) halt() ([]*os.Process, error) {
	if err := c.stop(c.process); err != nil {
		return nil, err
	}
	started, err := c.started()
	if err != nil {
		return nil, err
	}
	return started, c.stop(started...)
}

func (c *child) stop(all ...*os.Process) error {
	for _, p := range all {
		if err := pause(p); err != nil {
			return err
		}
	}
	return each(all, "TZ")
}

// started returns the processes that the child started. Those started by them are not seen.
func (c *child) started() ([]*os.Process, error) {
	all, err := processes()
	var started []*os.Process
	for _, p := range all {
		if p.parent == c.process.Pid {
			found, err := os.FindProcess(p.pid)
			if err != nil {
				return nil, err
			}
			started = append(started, found)
		}
	}
	return started, err
}

// process is what the system says of a process.
type process struct {
	pid, parent int
	state       rune // T when it stands still, Z when it is dead and its parent has not asked for it
}

// each waits until every process is in one of the states, or gone.
func each(all []*os.Process, states string) error {
	if len(all) == 0 {
		return nil
	}
	wanted := pids(all)
	return until(nil, func(context.Context) error {
		found, err := processes(wanted...)
		for _, p := range found {
			if slices.Contains(wanted, strconv.Itoa(p.pid)) && !strings.ContainsRune(states, p.state) {
				return fmt.Errorf("process %d is in state %c and not in %s", p.pid, p.state, states)
			}
		}
		return err
	})
}

func pids(all []*os.Process) []string {
	texts := make([]string, len(all))
	for i, p := range all {
		texts[i] = strconv.Itoa(p.Pid)
	}
	return texts
}

// signal is no error for a process that has just ended.
func signal(p *os.Process, s os.Signal) error {
	if err := p.Signal(s); !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// atEnd has a shell run the script when this process ends, however it ends, and when the function that
// it returns is neither called nor referred to any more. To call that is to call it off.
func atEnd(script string, args ...string) (callOff func(), err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer func() { _ = r.Close() }() // the shell has its own
	// Nobody writes: what the shell reads is the end of the pipe. A Ctrl-C is for us, and not for it.
	cmd := exec.Command("sh", append([]string{"-c", "trap '' HUP INT TERM; read -r _; " + script, "sh"}, args...)...)
	cmd.Stdin = r
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = w.Close()
	}, nil
}
