package lease_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/lease"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// A node is one process of a service that decides by leases. It is another copy of this test binary, started with the URL of
// its server in the environment. It reads orders and writes answers, one line of JSON each.

const environment = "THROTTLER_LEASE_NODE"

func TestMain(m *testing.M) {
	if url := os.Getenv(environment); url != "" {
		if err := runNode(url); err != nil {
			_ = json.NewEncoder(os.Stdout).Encode(answer{Err: err.Error()})
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

type order struct {
	Do      string // crowd, lease or close
	ID      string
	Kind    law.Kind
	Period  time.Duration
	Limit   int64
	Workers int
	Calls   int // per worker
}

type answer struct {
	Admitted int64
	State    lease.State
	Err      string
}

func (o *order) request() (storecheck.Request, error) {
	r, faults := law.NewRule("limit", o.Kind, o.Period, o.Limit, o.Limit)
	if len(faults) > 0 {
		return storecheck.Request{}, errors.New(faults[0].Reason)
	}
	return storecheck.Request{Name: "node", Parts: []storecheck.Part{storecheck.NewPart(o.ID, []law.Rule{r}, 1)}}, nil
}

// obey carries out an order.
func (o *order) obey(s *lease.Storage) (a answer) {
	r, err := o.request()
	if err != nil {
		return answer{Err: err.Error()}
	}
	var admitted atomic.Int64
	var failed atomic.Pointer[error]
	take := func() {
		v, err := storecheck.Decide(context.Background(), s, r)
		switch {
		case err != nil:
			failed.Store(&err)
		case v.Allowed:
			admitted.Add(1)
		}
	}
	switch o.Do {
	case "crowd":
		storecheck.Crowd(o.Workers, func(int) {
			for range o.Calls {
				take()
			}
		})
	case "lease": // asks until the process has a lease
		for range 1000 {
			if take(); s.State().Tokens > 0 {
				break
			}
		}
	}
	a = answer{Admitted: admitted.Load(), State: s.State()}
	if err := failed.Load(); err != nil {
		a.Err = (*err).Error()
	}
	return a
}

// runNode opens a storage and carries out orders until one is to close, or until its input ends.
func runNode(url string) error {
	ctx := context.Background()
	shared, done, err := openShared(ctx, url)
	if err != nil {
		return err
	}
	s, err := lease.New(shared, nil)
	if err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	for in := json.NewDecoder(os.Stdin); ; {
		var o order
		if err := in.Decode(&o); err != nil {
			return err
		}
		if o.Do != "close" {
			if err := out.Encode(o.obey(s)); err != nil {
				return err
			}
			continue
		}
		err := errors.Join(s.Close(ctx), done(ctx), goleak.Find())
		a := answer{State: s.State()}
		if err != nil {
			a.Err = err.Error()
		}
		return out.Encode(a)
	}
}

func openShared(ctx context.Context, url string) (storage.Storage, func(context.Context) error, error) {
	if !strings.HasPrefix(url, "postgres") {
		s, err := redisstore.Open(url, &redisstore.Options{Timeout: storecheck.Patient})
		if err != nil {
			return nil, nil, err
		}
		return s, s.Close, nil
	}
	pool, err := pgxpool.New(ctx, url)
	if err != nil {
		return nil, nil, err
	}
	s, err := pgstore.New(ctx, pool, &pgstore.Options{Timeout: storecheck.Patient})
	return s, func(ctx context.Context) error { defer pool.Close(); return s.Close(ctx) }, err
}

// node is a running node, as the test sees it.
type node struct {
	t   testing.TB
	cmd *exec.Cmd
	in  *json.Encoder
	out *json.Decoder
}

// startNode starts a node. The process is killed after the test.
func startNode(t testing.TB, url string) *node {
	t.Helper()
	program, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(program)
	cmd.Env, cmd.Stderr = append(os.Environ(), environment+"="+url), os.Stderr
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	n := &node{t, cmd, json.NewEncoder(in), json.NewDecoder(out)}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return n
}

func (n *node) signal(s syscall.Signal) { require.NoError(n.t, n.cmd.Process.Signal(s)) }

// begin sends an order. end reads its answer.
func (n *node) begin(o order) { require.NoError(n.t, n.in.Encode(o)) }

func (n *node) end() (a answer) {
	require.NoError(n.t, n.out.Decode(&a))
	require.Empty(n.t, a.Err)
	return a
}

func (n *node) do(o order) answer {
	n.begin(o)
	return n.end()
}
