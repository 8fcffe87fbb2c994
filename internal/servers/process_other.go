//go:build !linux

package servers

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// dieWithParent does nothing: a child outlives a parent that is killed.
func dieWithParent(*exec.Cmd) {}

// demote does nothing: the server itself says that it does not run as root.
func demote(*exec.Cmd) error { return nil }

// The signals are sent by the command, because not every system that Go knows has them.
func pause(p *os.Process) error { return command(p, "-STOP") }

func resume(p *os.Process) error { return command(p, "-CONT") }

// command is no error for a process that has just ended.
func command(p *os.Process, signal string) error {
	out, err := exec.Command("kill", signal, strconv.Itoa(p.Pid)).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "No such process") {
		return fmt.Errorf("kill %s: %w: %s", signal, err, out)
	}
	return nil
}

// processes returns all: asked for some, ps may fail when there is none.
func processes(...string) ([]process, error) {
	out, err := exec.Command("ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "state=").Output()
	if err != nil {
		return nil, fmt.Errorf("ps: %w", err)
	}
	var all []process
	for line := range strings.Lines(string(out)) {
		var p process
		if _, err := fmt.Sscanf(strings.TrimSpace(line), "%d %d %c", &p.pid, &p.parent, &p.state); err != nil {
			return nil, fmt.Errorf("ps says %q: %w", line, err)
		}
		all = append(all, p)
	}
	return all, nil
}
