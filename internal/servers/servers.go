// Package servers runs real servers for tests, demonstrations and benchmarks. Each has a free port of 127.0.0.1 and an
// empty temporary folder of its own. Servers can be stopped, killed, frozen and started again.
//
// The caller that starts a server closes it. On Linux a server that was not closed ends with this process, however the
// process ends; only its temporary folder is left behind then.
package servers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// patience bounds each wait for a server. Only an overloaded machine comes near it.
const patience = 30 * time.Second

// TB is the part of testing.TB that the functions for tests need. They end the test with Fatalf if a server cannot be
// started, and close the server after the test.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Cleanup(func())
}

// Server is one server. Its methods are safe for concurrent use. They exclude each other, except Addr and URL, which
// never wait.
type Server struct {
	// Set by prepare, and unchanged afterwards.
	url         string                               // with %s for the address
	command     []string                             // the program and its arguments; it runs in dir
	refusesRoot bool                                 // if this process is root, the server runs as another user
	ending      syscall.Signal                       // asks the server to end
	answers     func(context.Context, *Server) error // returns nil if this server, and no other, answers at its port
	sweep       func(*Server) error                  // removes what a killed server leaves behind; may be nil

	dir  string
	port int

	mu     sync.Mutex // guards the fields below; held during a start or a stop
	child  *child     // nil before the first start
	closed bool
}

// errTaken is part of the error of a server whose port another program has taken.
var errTaken = errors.New("the port is taken")

// launch makes a server with a folder and a port, lets prepare set the rest, and starts it. If another program takes
// the port before the server does, launch makes another server, up to three in all.
func launch(prepare func(*Server) error) (s *Server, err error) {
	for range 3 {
		if s, err = launchOnce(prepare); !errors.Is(err, errTaken) {
			break
		}
	}
	return s, err
}

// launchOnce is one attempt of launch. It leaves nothing behind if it fails.
func launchOnce(prepare func(*Server) error) (*Server, error) {
	dir, err := os.MkdirTemp("", "throttler-server-")
	if err != nil {
		return nil, fmt.Errorf("servers: %w", err)
	}
	s := &Server{dir: dir}
	if s.port, err = freePort(); err == nil {
		err = prepare(s)
	}
	if err == nil {
		err = s.Start()
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Ports are given out in turn, so that the port of a server that is down is not given to another one.
const firstPort, portCount = 10_000, 20_000

// lastPort is the last port that was given out, less firstPort. It begins at random, as tests of several packages run
// at the same time.
var lastPort atomic.Int64

func init() { lastPort.Store(rand.Int64N(portCount)) }

// freePort returns a port on which nobody listens. It is below those that the system gives to outgoing connections:
// 32768 and above on Linux, and higher elsewhere. Otherwise such a connection could take the port of a server that is
// down, or even connect to itself.
func freePort() (int, error) {
	var err error
	for range 1000 {
		port := firstPort + int(lastPort.Add(1)%portCount)
		var l net.Listener
		if l, err = net.Listen("tcp", local(port)); err == nil {
			return port, l.Close()
		}
	}
	return 0, fmt.Errorf("servers: found no free port from %d on: %w", firstPort, err)
}

// local returns the address of a port.
func local(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// Addr returns host:port, which never changes.
func (s *Server) Addr() string { return local(s.port) }

// URL returns the address in the form that clients of this kind of server take, such as redis://127.0.0.1:10042 or
// postgres://postgres@127.0.0.1:10042/postgres?sslmode=disable.
func (s *Server) URL() string { return fmt.Sprintf(s.url, s.Addr()) }

// Start starts a server that is down, on the same port, and returns when it answers. The server has the data that its
// configuration keeps in files, and no other. The error has the end of the server's log. Start fails if the server is
// running or closed.
func (s *Server) Start() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return fmt.Errorf("servers: %s is closed", s.URL())
	case s.child.running():
		return fmt.Errorf("servers: %s runs already", s.URL())
	}
	if err := s.run(); err != nil {
		return fmt.Errorf("servers: %s did not start: %w", s.URL(), s.explain(err))
	}
	return nil
}

// run starts the process and waits until it answers. If it does not, the process is killed. The caller holds mu.
func (s *Server) run() error {
	log, err := os.Create(s.log())
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }() // the child has a file descriptor of its own
	cmd := exec.Command(s.command[0], s.command[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, log, log
	if s.refusesRoot {
		if err := demote(cmd); err != nil {
			return err
		}
	}
	if s.child, err = startChild(cmd); err != nil {
		return err
	}
	if err := until(s.child.ended, s.ready); err != nil {
		return errors.Join(err, s.kill())
	}
	return nil
}

// ready returns nil if the server answers. It connects first without a client, because clients write to the log of the
// test when a connection is refused.
func (s *Server) ready(ctx context.Context) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", s.Addr())
	if err != nil {
		return err
	}
	return errors.Join(conn.Close(), s.answers(ctx, s))
}

// find returns the absolute path of a program, because the program will run in another folder.
func find(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", err
	}
	return filepath.Abs(path)
}

// log returns the path of the file with the server's output since its last start.
func (s *Server) log() string { return filepath.Join(s.dir, "log") }

// explain adds the end of the server's log to an error. If the log says that the port is taken, it adds errTaken.
func (s *Server) explain(err error) error {
	log, readErr := os.ReadFile(s.log())
	if readErr != nil {
		return errors.Join(err, readErr)
	}
	if bytes.Contains(log, []byte("Address already in use")) {
		err = errors.Join(errTaken, err)
	}
	const end = 2000 // bytes
	return fmt.Errorf("%w\nthe end of its log:\n%s", err, log[max(0, len(log)-end):])
}

// Stop asks the server to end, and returns when it has ended. It thaws a frozen server, so that it can end. It does
// nothing if the server is down. A server that does not end within 30 s is killed, which is an error.
func (s *Server) Stop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.child.running() {
		return nil
	}
	if err := errors.Join(signal(s.child.process, s.ending), s.child.thaw()); err != nil {
		return fmt.Errorf("servers: %s: %w", s.URL(), err)
	}
	select {
	case <-s.child.ended:
		return nil
	case <-time.After(patience):
		return errors.Join(fmt.Errorf("servers: %s did not end within %v, and was killed", s.URL(), patience), s.kill())
	}
}

// Kill ends the server at once, as a crash would, and returns when it and its child processes have ended. It does
// nothing if the server is down.
func (s *Server) Kill() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kill()
}

// kill is Kill. The caller holds mu.
func (s *Server) kill() error {
	if !s.child.running() {
		return nil
	}
	err := s.child.kill()
	if err == nil && s.sweep != nil {
		err = s.sweep(s)
	}
	if err != nil {
		return fmt.Errorf("servers: %s: %w", s.URL(), err)
	}
	return nil
}

// Freeze suspends the server and its child processes, and returns when all of them stand still. Connections stay
// open, and the system still accepts new ones, but nothing answers. Freeze fails if the server is down.
func (s *Server) Freeze() error { return s.whileItRuns((*child).freeze) }

// Thaw lets a frozen server go on. It fails if the server is down.
func (s *Server) Thaw() error { return s.whileItRuns((*child).thaw) }

// whileItRuns calls do with the running child, and fails if the server is down.
func (s *Server) whileItRuns(do func(*child) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.child.running() {
		return fmt.Errorf("servers: %s is down", s.URL())
	}
	if err := do(s.child); err != nil {
		return fmt.Errorf("servers: %s: %w", s.URL(), err)
	}
	return nil
}

// Close kills the server, in whatever state it is, and removes its folder. Closing twice is harmless.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return errors.Join(s.kill(), os.RemoveAll(s.dir))
}

// until calls try every 10 ms until it returns nil. It gives up after patience, or when ended is closed. Ended may be
// nil.
func until(ended <-chan struct{}, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ended:
			return errors.New("the process ended")
		case <-ctx.Done():
			return fmt.Errorf("not within %v: %w", patience, err)
		case <-tick.C:
		}
	}
}

// hand returns s to a test, and closes it after the test. If err is not nil it ends the test.
func hand[S interface{ Close() error }](t TB, s S, err error) S {
	t.Helper()
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Fatalf("%v", err)
		}
	})
	return s
}

// closeAll closes all servers and joins their errors. A server that was not started is nil.
func closeAll(all ...*Server) error {
	var failed []error
	for _, s := range all {
		if s != nil {
			failed = append(failed, s.Close())
		}
	}
	return errors.Join(failed...)
}
