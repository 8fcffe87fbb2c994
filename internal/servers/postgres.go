package servers

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/jackc/pgx/v5/pgconn"
)

// PostgresURL returns the URL of a Postgres for the test. It is the value of the environment variable
// THROTTLER_POSTGRES_URL if that is set; such a server may be shared with others and contain anything. Otherwise
// PostgresURL starts a server for the test.
func PostgresURL(t TB) string {
	t.Helper()
	if url := os.Getenv("THROTTLER_POSTGRES_URL"); url != "" {
		return url
	}
	return Postgres(t).URL()
}

// Postgres is StartPostgres for tests.
func Postgres(t TB, config ...string) *Server {
	t.Helper()
	s, err := StartPostgres(config...)
	return hand(t, s, err)
}

// PostgresStandby is StartStandby for tests.
func PostgresStandby(t TB, primary *Server) *Server {
	t.Helper()
	s, err := StartStandby(primary)
	return hand(t, s, err)
}

// PgBouncer is StartPgBouncer for tests.
func PgBouncer(t TB, primary *Server, config ...string) *Server {
	t.Helper()
	s, err := StartPgBouncer(primary, config...)
	return hand(t, s, err)
}

// StartPostgres starts a Postgres with one empty database and one user, a superuser without a password. Both are
// called postgres. What it has committed survives Stop, Kill and Start. The configuration is given as arguments of
// the program, such as "-c", "fsync=off". By default it is that of Postgres, which writes every commit to the disk,
// with max_connections=200 and dynamic_shared_memory_type=mmap.
//
// The programs are those in the folder that the environment variable POSTGRES_BIN names, or else the newest ones in
// /usr/lib/postgresql, or else those in PATH. Postgres refuses to run as root. If this process is root, the programs
// run as the user postgres, or as nobody if that does not exist; that user must be able to enter the folder for
// temporary files.
func StartPostgres(config ...string) (*Server, error) {
	return launch(func(s *Server) error {
		bin, err := postgresBin()
		if err != nil {
			return err
		}
		from, err := template(bin)
		if err != nil {
			return err
		}
		s.postgres(append([]string{
			filepath.Join(bin, "postgres"), "-D", "data",
			"-c", "listen_addresses=127.0.0.1",
			"-c", "unix_socket_directories=",
			"-c", "max_connections=200",
			"-c", "dynamic_shared_memory_type=mmap", // in its folder: in /dev/shm one that is killed would leave it
		}, config...))
		return s.copyData(from)
	})
}

const postgresURL = "postgres://postgres@%s/postgres?sslmode=disable"

// postgres prepares a server that runs the command on its port. SIGINT asks Postgres to end without waiting for its
// clients.
func (s *Server) postgres(command []string) {
	s.url, s.refusesRoot, s.ending, s.answers, s.sweep = postgresURL, true, syscall.SIGINT, postgresAnswers, sweep
	s.command = append(command, "-p", strconv.Itoa(s.port))
}

// postgresBin returns the folder of the programs that StartPostgres starts.
func postgresBin() (string, error) {
	name := "postgres"
	if installed, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres"); len(installed) > 0 {
		name = slices.MaxFunc(installed, func(a, b string) int { return cmp.Compare(version(a), version(b)) })
	}
	if dir := os.Getenv("POSTGRES_BIN"); dir != "" {
		name = dir + "/postgres"
	}
	path, err := find(name)
	if err == nil {
		path, err = filepath.EvalSymlinks(path) // the folder of a link may not have the other programs
	}
	if err != nil {
		return "", fmt.Errorf("servers: there is no Postgres here: %w; run \"apt-get install postgresql\", or \"brew install postgresql@16\" on macOS, "+
			"or name the folder of postgres and initdb in POSTGRES_BIN, or the URL of a server that runs in THROTTLER_POSTGRES_URL", err)
	}
	return filepath.Dir(path), nil
}

// version returns the version in the path of a postgres program, or 0 if its folder is not named after one.
func version(postgres string) float64 {
	v, _ := strconv.ParseFloat(filepath.Base(filepath.Dir(filepath.Dir(postgres))), 64)
	return v
}

// templates are folders with the data that initdb makes, by the folder of the programs. A copy takes a tenth of the
// time of initdb.
var templates = struct {
	sync.Mutex
	made map[string]madeTemplate
	in   string // read once, because a test may change TMPDIR for a while
}{made: map[string]madeTemplate{}, in: os.TempDir()}

// madeTemplate is one template.
type madeTemplate struct {
	dir  string
	keep func() // the folder exists as long as this is referenced; see atEnd
}

// template returns the template for the programs, and makes it if it is missing. It is removed when this process ends.
func template(bin string) (string, error) {
	templates.Lock()
	defer templates.Unlock()
	if t, ok := templates.made[bin]; ok {
		return t.dir, nil
	}
	dir, err := os.MkdirTemp(templates.in, "throttler-postgres-")
	if err != nil {
		return "", fmt.Errorf("servers: %w", err)
	}
	keep, err := atEnd(`rm -rf -- "$1"`, dir)
	if err == nil {
		err = runIn(dir, filepath.Join(bin, "initdb"), "-D", "data", "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
	}
	if err != nil {
		return "", errors.Join(err, os.RemoveAll(dir))
	}
	templates.made[bin] = madeTemplate{dir, keep}
	return dir, nil
}

// runIn runs a program in a folder, as the user that runs the servers, and waits for its end.
func runIn(dir string, command ...string) error {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir = dir
	if err := demote(cmd); err != nil {
		return fmt.Errorf("servers: %w", err)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("servers: %s: %w\n%s", strings.Join(command, " "), err, out)
	}
	return nil
}

// copyData copies the data of another folder into that of the server.
func (s *Server) copyData(from string) error {
	return runIn(s.dir, "cp", "-R", filepath.Join(from, "data"), "data")
}

// postgresAnswers returns nil if this server answers, and not another one that has taken its port.
func postgresAnswers(ctx context.Context, s *Server) error {
	pid, err := s.query(ctx, `SELECT split_part(pg_read_file('postmaster.pid'), E'\n', 1)`)
	if want := strconv.Itoa(s.child.process.Pid); err == nil && pid != want {
		err = fmt.Errorf("%s is process %s and not %s", s.Addr(), pid, want)
	}
	return err
}

// query returns the only value of the only row, over a connection of its own.
func (s *Server) query(ctx context.Context, sql string) (string, error) {
	conn, err := pgconn.Connect(ctx, s.URL())
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close(ctx) }()
	results, err := conn.Exec(ctx, sql).ReadAll()
	if err != nil {
		return "", err
	}
	return string(results[0].Rows[0][0]), nil
}

// sweep removes what a killed Postgres leaves behind. One thing is a segment of System V shared memory, of which the
// system has a limited number. The other is the file with its process number: Postgres would not start again if
// another process had that number by then. Removing both is safe because all processes of the server have ended.
func sweep(s *Server) error {
	name := filepath.Join(s.dir, "data", "postmaster.pid")
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	// The seventh line has the key and the number of the shared memory.
	if lines := strings.Split(string(text), "\n"); len(lines) > 6 {
		if memory := strings.Fields(lines[6]); len(memory) == 2 {
			_ = exec.Command("ipcrm", "-m", memory[1]).Run() // it may have been removed already
		}
	}
	return os.Remove(name)
}

// KillBackend kills one of the processes that the server has started, as if it had crashed. The pid is, for example,
// what pg_backend_pid() returns in the connection that is to end. Postgres then ends all its other processes,
// recovers, and accepts connections again some tenths of a second later. KillBackend does not wait for that. It fails
// if the server is down or has no such process.
func (s *Server) KillBackend(pid int) error {
	return s.whileItRuns(func(c *child) error {
		started, err := c.started()
		if err != nil {
			return err
		}
		i := slices.IndexFunc(started, func(p *os.Process) bool { return p.Pid == pid })
		if i < 0 {
			return fmt.Errorf("it has no process %d", pid)
		}
		return signal(started[i], syscall.SIGKILL)
	})
}

// StartStandby starts a standby: a Postgres with the data and the configuration of the primary. It follows the
// primary at once, and is read-only until it executes SELECT pg_promote(). The primary must be running. It is frozen
// for some hundredths of a second, while its data is copied.
func StartStandby(primary *Server) (*Server, error) {
	return launch(func(s *Server) error {
		s.postgres(append(slices.Clone(primary.command),
			"-c", "primary_conninfo=host=127.0.0.1 user=postgres port="+strconv.Itoa(primary.port),
			"-c", "wal_retrieve_retry_interval=100ms")) // how soon it tries again after the primary was down
		return s.copyRunning(primary)
	})
}

// copyRunning copies the data of a running Postgres. It does not use pg_basebackup, which not every package has. The
// files of a frozen Postgres are what a crash would leave, and Postgres can make a standby from those.
func (s *Server) copyRunning(primary *Server) error {
	if err := primary.Freeze(); err != nil {
		return err
	}
	if err := errors.Join(s.copyData(primary.dir), primary.Thaw()); err != nil {
		return err
	}
	return runIn(s.dir, "sh", "-c", "rm data/postmaster.pid && touch data/standby.signal")
}

// StartPgBouncer starts a PgBouncer in front of a running Postgres, and returns when a query passes through. By
// default it pools transactions, so each may use another connection to Postgres. It admits everybody, as the user
// postgres. The configuration is given as lines of its file, such as "default_pool_size = 5".
//
// The program is pgbouncer, unless the environment variable PGBOUNCER has another name or an absolute path, without
// arguments. If this process is root, it runs as the same user as Postgres.
func StartPgBouncer(primary *Server, config ...string) (*Server, error) {
	return launch(func(s *Server) error {
		program, err := pgBouncerProgram()
		if err != nil {
			return err
		}
		// PgBouncer has nothing to save, so it may be killed. With every other signal some version waits for its
		// clients.
		s.url, s.refusesRoot, s.ending, s.answers = postgresURL, true, syscall.SIGKILL, pgBouncerAnswers
		s.command = []string{program, "pgbouncer.ini"}
		lines := append([]string{
			"[databases]",
			fmt.Sprintf("* = host=127.0.0.1 port=%d user=postgres", primary.port),
			"[pgbouncer]",
			"listen_addr = 127.0.0.1",
			fmt.Sprint("listen_port = ", s.port),
			"unix_socket_dir =",
			"auth_type = any",
			"pool_mode = transaction",
			"server_login_retry = 0.1", // seconds until it tries again after the primary was down
		}, config...)
		return os.WriteFile(filepath.Join(s.dir, "pgbouncer.ini"), []byte(strings.Join(lines, "\n")+"\n"), 0o644)
	})
}

// pgBouncerProgram returns the path of the program that StartPgBouncer starts.
func pgBouncerProgram() (string, error) {
	name := os.Getenv("PGBOUNCER")
	if name == "" {
		name = "pgbouncer"
		if _, err := exec.LookPath(name); err != nil {
			name = "/usr/sbin/pgbouncer" // Debian's folder for it, which is not in every PATH
		}
	}
	path, err := find(name)
	if err != nil {
		return "", fmt.Errorf("servers: there is no PgBouncer here: %w; run \"apt-get install pgbouncer\", or \"brew install pgbouncer\" on macOS, "+
			"or name the program to start in PGBOUNCER", err)
	}
	return path, nil
}

// pgBouncerAnswers returns nil if a query passes through PgBouncer.
func pgBouncerAnswers(ctx context.Context, s *Server) error {
	_, err := s.query(ctx, "SELECT 1")
	return err
}
