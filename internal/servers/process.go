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

// child is a process that this one has started. It may have started others. A nil child is not running.
type child struct {
	process *os.Process
	ended   chan struct{} // closed when the process has ended
	forget  func()        // cancels the kill of a frozen child's processes at the end of this process; may be nil
}

// startChild starts a process, and waits for its end in the same thread. The thread is locked for as long as the
// process lives: on Linux Pdeathsig fires when the thread that started a child ends, and not when its process does.
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
			_ = cmd.Wait() // its log says how it ended
			close(c.ended)
		}
	}()
	err := <-started
	c.process = cmd.Process
	return c, err
}

// running reports whether the process has been started and has not ended.
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

// freeze suspends the child and its processes. It waits until all of them stand still, because a signal returns
// earlier.
//
// On Linux the child is killed when this process ends. The processes that the child has started would notice that,
// but not while they are frozen. So freeze arranges that they are killed too.
func (c *child) freeze() error {
	started, err := c.halt()
	if err == nil && len(started) > 0 {
		c.unfrozen()
		c.forget, err = atEnd(`kill -KILL "$@"`, pids(started)...)
	}
	return err
}

// thaw lets the child and its processes go on.
func (c *child) thaw() error {
	c.unfrozen()
	started, err := c.started()
	for _, p := range append(started, c.process) {
		err = errors.Join(err, resume(p))
	}
	return err
}

// unfrozen cancels what freeze has arranged.
func (c *child) unfrozen() {
	if c.forget != nil {
		c.forget()
		c.forget = nil
	}
}

// kill kills the child and its processes, and waits until all have ended. It halts the child first: otherwise the child
// could start a process that is not killed.
func (c *child) kill() error {
	started, err := c.halt()
	for _, p := range append(started, c.process) {
		err = errors.Join(err, signal(p, syscall.SIGKILL))
	}
	<-c.ended
	c.unfrozen()
	return errors.Join(err, each(started, "Z"))
}

// halt suspends the child, then the processes that it has started, and returns those. Once the child stands still it
// cannot start others, so none is missed.
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

// stop suspends processes, and waits until each stands still or is dead.
func (c *child) stop(all ...*os.Process) error {
	for _, p := range all {
		if err := pause(p); err != nil {
			return err
		}
	}
	return each(all, "TZ")
}

// started returns the processes that the child has started, but not those that they have started in turn.
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

// process is what the system says about a process.
type process struct {
	pid, parent int
	state       rune // T if it is suspended, Z if it is dead and its parent has not waited for it
}

// each waits until every process is in one of the states or does not exist.
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

// pids returns the numbers of processes, as texts.
func pids(all []*os.Process) []string {
	texts := make([]string, len(all))
	for i, p := range all {
		texts[i] = strconv.Itoa(p.Pid)
	}
	return texts
}

// signal sends a signal. A process that has just ended is no error.
func signal(p *os.Process, s os.Signal) error {
	if err := p.Signal(s); !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// atEnd makes a shell run a script when this process ends, however it ends. CallOff cancels that, and must stay
// referenced until then: the garbage collector closes the pipe with it, and the shell takes that for the end of this
// process.
func atEnd(script string, args ...string) (callOff func(), err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer func() { _ = r.Close() }() // the shell has a file descriptor of its own
	// Nobody writes to the pipe, so read returns when the system closes its other end. The shell ignores a Ctrl-C,
	// which ends this process and thereby starts the script.
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
