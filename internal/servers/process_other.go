//go:build !linux

package servers

import (
	"errors"
	"os/exec"
	"strconv"
	"strings"
)

// dieWithParent does nothing: a child outlives a parent that is killed.
func dieWithParent(*exec.Cmd) {}

// The signals are sent by the command, because not every system that Go knows has them.
func (c *child) pause() error { return c.command("-STOP") }

func (c *child) thaw() error { return c.command("-CONT") }

func (c *child) command(signal string) error {
	return exec.Command("kill", signal, strconv.Itoa(c.process.Pid)).Run()
}

// paused returns nil when the process stands still.
func (c *child) paused() error {
	state, err := exec.Command("ps", "-o", "state=", "-p", strconv.Itoa(c.process.Pid)).Output()
	if err == nil && !strings.HasPrefix(strings.TrimSpace(string(state)), "T") {
		err = errors.New("it still moves")
	}
	return err
}
