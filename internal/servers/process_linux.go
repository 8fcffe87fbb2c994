package servers

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// dieWithParent makes the system kill the child when the thread that starts it ends.
func dieWithParent(cmd *exec.Cmd) { attributes(cmd).Pdeathsig = syscall.SIGKILL }

// attributes returns the attributes of a command, and makes them if they are missing.
func attributes(cmd *exec.Cmd) *syscall.SysProcAttr {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	return cmd.SysProcAttr
}

// demote makes the command run as another user if this process is root, and gives the command's folder to that user.
// The user is postgres, which Debian's package creates, or else nobody.
func demote(cmd *exec.Cmd) error {
	if os.Geteuid() != 0 {
		return nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		u, err = user.Lookup("nobody")
	}
	if err != nil {
		return err
	}
	var c syscall.Credential
	if _, err := fmt.Sscan(u.Uid+" "+u.Gid, &c.Uid, &c.Gid); err != nil {
		return err
	}
	attributes(cmd).Credential = &c
	return os.Chown(cmd.Dir, int(c.Uid), int(c.Gid))
}

// pause asks the system to suspend a process.
func pause(p *os.Process) error { return signal(p, syscall.SIGSTOP) }

// resume lets a suspended process go on.
func resume(p *os.Process) error { return signal(p, syscall.SIGCONT) }

// processes returns the existing processes with these numbers, or all processes if no number is given.
func processes(pids ...string) ([]process, error) {
	dirs := make([]string, len(pids))
	for i, pid := range pids {
		dirs[i] = "/proc/" + pid
	}
	if len(dirs) == 0 {
		dirs, _ = filepath.Glob("/proc/[0-9]*") // only a wrong pattern is an error
	}
	var found []process
	for _, dir := range dirs {
		stat, err := os.ReadFile(dir + "/stat")
		if err != nil {
			continue // it has ended
		}
		p, err := parse(filepath.Base(dir), stat)
		if err != nil {
			return nil, fmt.Errorf("%s/stat: %w", dir, err)
		}
		found = append(found, p)
	}
	return found, nil
}

// parse reads the state and the parent from /proc/PID/stat (man 5 proc). They follow the last closing parenthesis:
// before it is the name of the program, which may contain any characters.
func parse(pid string, stat []byte) (p process, err error) {
	if p.pid, err = strconv.Atoi(pid); err == nil {
		_, err = fmt.Sscanf(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " %c %d", &p.state, &p.parent)
	}
	return p, err
}
