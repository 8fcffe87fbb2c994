package servers

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
)

// dieWithParent has the child killed when the thread that starts it ends.
func dieWithParent(cmd *exec.Cmd) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
}

func (c *child) pause() error { return c.signal(syscall.SIGSTOP) }

func (c *child) thaw() error { return c.signal(syscall.SIGCONT) }

// paused returns nil when the process stands still. Its state follows the name in parentheses, which
// may hold anything.
func (c *child) paused() error {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.process.Pid))
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" T")) {
		return errors.New("it still moves")
	}
	return nil
}
