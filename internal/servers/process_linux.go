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

// dieWithParent has the child killed when the thread that starts it ends.
func dieWithParent(cmd *exec.Cmd) { attributes(cmd).Pdeathsig = syscall.SIGKILL }

func attributes(cmd *exec.Cmd) *syscall.SysProcAttr {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	return cmd.SysProcAttr
}

// demote has the command run as another user when we are root, and gives its folder to that user:
// the one that Debian's Postgres makes, or else nobody.
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

func pause(p *os.Process) error { return signal(p, syscall.SIGSTOP) }

func resume(p *os.Process) error { return signal(p, syscall.SIGCONT) }

// processes returns those of these numbers that there are, or else all.
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

// parse reads what follows the name in parentheses, which may hold anything.
func parse(pid string, stat []byte) (p process, err error) {
	if p.pid, err = strconv.Atoi(pid); err == nil {
		_, err = fmt.Sscanf(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " %c %d", &p.state, &p.parent)
	}
	return p, err
}
