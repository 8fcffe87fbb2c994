//go:build !linux

package servers

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// dieWithParent does nothing here: if this process is killed the child lives on.
func dieWithParent(*exec.Cmd) {}

// demote does nothing here: a server that refuses root says so itself.
func demote(*exec.Cmd) error { return nil }

// pause asks the system to suspend a process. It uses the program kill, because not every system that Go supports has
// the signals.
func pause(p *os.Process) error { return command(p, "-STOP") }

// resume lets a suspended process go on.
func resume(p *os.Process) error { return command(p, "-CONT") }

// command sends a signal. A process that has just ended is no error.
func command(p *os.Process, signal string) error {
	out, err := exec.Command("kill", signal, strconv.Itoa(p.Pid)).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "No such process") {
		return fmt.Errorf("kill %s: %w: %s", signal, err, out)
	}
	return nil
}

// processes returns all processes, whatever numbers are given: if none of them existed, ps could fail.
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
