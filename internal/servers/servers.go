// Package servers runs real servers for tests, demonstrations and benchmarks: each on a free port of
// 127.0.0.1, with a temporary folder of its own and nothing in it. They can be stopped, killed, frozen
// and started again.
//
// Whoever starts a server closes it. One that is not closed ends with this process nevertheless on
// Linux, however this process ends; its temporary folder is left then.
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

// patience bounds each wait for a server. Only a machine that is overloaded comes near it.
const patience = 30 * time.Second

// TB is the part of testing.TB that the short forms for tests need. They end the test with Fatalf when
// something cannot be started, and leave nothing behind after it.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Cleanup(func())
}

// Server is one server. Its methods are safe for concurrent use; they wait for each other, apart from
// Addr and URL.
type Server struct {
	// What prepare sets. It is not changed afterwards.
	url         string         // with %s in place of the address
	command     []string       // the program and its arguments; it runs in dir
	refusesRoot bool           // it runs as another user then
	ending      syscall.Signal // asks it to end
	answers     func(context.Context, *Server) error
	sweep       func(*Server) error // removes what it leaves outside its folder when it is killed; may be nil

	dir  string
	port int

	mu     sync.Mutex // guards what follows
	child  *child     // nil before the first start
	closed bool
}

// errTaken is in the error of a server whose port somebody else has.
var errTaken = errors.New("the port is taken")

// launch starts what prepare makes of a server that has a folder and a port. When somebody takes the
// port before the server does, it prepares another one.
func launch(prepare func(*Server) error) (s *Server, err error) {
	for range 3 {
		if s, err = launchOnce(prepare); !errors.Is(err, errTaken) {
			break
		}
	}
	return s, err
}

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

// Ports are given out in turn, so that none is given twice while its server is down.
const firstPort, portCount = 10_000, 20_000

var lastPort atomic.Int64

func init() { lastPort.Store(rand.Int64N(portCount)) }

// freePort returns a port that nobody listens on. It is none of those that the system gives to
// outgoing connections, 32768 and above on Linux and higher elsewhere: one of them could otherwise be
// the port of a server that is down, and even be connected to itself.
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

func local(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// Addr returns host:port. It is the same for the life of the Server.
func (s *Server) Addr() string { return local(s.port) }

// URL returns the address as clients of its kind take it, such as redis://127.0.0.1:10042 or
// postgres://postgres@127.0.0.1:10042/postgres?sslmode=disable.
func (s *Server) URL() string { return fmt.Sprintf(s.url, s.Addr()) }

// Start starts a server that is down, on the same port, and returns when it answers. It keeps what its
// configuration keeps in files, and nothing else. An error holds the end of the server's log. It is an
// error that the server runs, or is closed.
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

func (s *Server) run() error {
	log, err := os.Create(s.log())
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }() // the child has its own
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

// ready asks nothing before somebody listens: clients write about it when they are refused.
func (s *Server) ready(ctx context.Context) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", s.Addr())
	if err != nil {
		return err
	}
	return errors.Join(conn.Close(), s.answers(ctx, s))
}

// find returns the path of a program, absolute because the program runs in another folder.
func find(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", err
	}
	return filepath.Abs(path)
}

func (s *Server) log() string { return filepath.Join(s.dir, "log") }

// explain adds the end of the log, which says why.
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

// Stop asks the server to end, and returns when it has. One that is frozen goes on for that. It does
// nothing to a server that is down.
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

// Kill ends the server at once, as a crash would, and returns when it and its child processes have
// ended. It does nothing to a server that is down.
func (s *Server) Kill() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kill()
}

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

// Freeze stops the server and its child processes where they are, and returns when they stand still. Its
// connections stay, and the system still accepts new ones, but nobody answers. It is an error that the
// server is down.
func (s *Server) Freeze() error { return s.whileItRuns((*child).freeze) }

// Thaw lets a frozen server go on. It is an error that the server is down.
func (s *Server) Thaw() error { return s.whileItRuns((*child).thaw) }

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

// Close kills the server, in whatever state it is, and removes its folder. It can be called again.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return errors.Join(s.kill(), os.RemoveAll(s.dir))
}

// until calls try every 10 ms until it returns nil. It gives up after patience, and when ended is
// closed, if that is not nil.
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

// hand gives what was started to a test, and closes it after the test.
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

// closeAll closes each one, and joins what went wrong. Those that are nil were not started.
func closeAll(all ...*Server) error {
	var failed []error
	for _, s := range all {
		if s != nil {
			failed = append(failed, s.Close())
		}
	}
	return errors.Join(failed...)
}
