package faulttest_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage/failover"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// A node stands for one process of a service: it decides by a failover storage and records the answers. It runs in
// this process or in one of its own. The latter is the program of this test again, which finds the addresses of its
// stores in its environment. It reads orders from its input and writes events to its output, each as a line of JSON.

// environment is the variable with the stores of a node.
const environment = "THROTTLER_FAULTTEST_NODE"

// stores says where a node finds its stores.
type stores struct {
	Number   int    // of the node
	Redis    string // a URL
	Postgres string // a URL

	// Longer timeouts are for tests of decisions, whose result must not depend on the speed of the machine. Zero
	// means the default.
	RedisTimeout, PostgresTimeout time.Duration
}

// target is an identifier, of which each call asks for one token of each bucket.
type target struct {
	ID    string
	Rules []law.Rule
}

// request returns a request for the target.
func (g *target) request(cost int64) storecheck.Request {
	return storecheck.Request{Name: "fault", Parts: []storecheck.Part{storecheck.NewPart(g.ID, g.Rules, cost)}}
}

// order tells a node what to do.
type order struct {
	Do      string // take, crowd, begin, end, state or close
	Targets []target
	Calls   int           // for each target; crowd: by each worker
	Workers int           // at the same time
	Pause   time.Duration // between the calls of a worker
	Alone   bool          // after each call, make the same call on Redis alone
}

// event is something that a node has recorded.
type event struct {
	What    string // call, observed (by failover.Options.Observe) or done (with an order)
	Process int    // the number of the node
	At      int64  // when it ended, in µs since the epoch
	Took    int64  // µs
	By      string // the Source of a call, or the kind of what was observed
	ID      string
	Cost    int64
	Allowed bool
	Err     string
	Lag     int64 // if observed, in µs
	State   *failover.State

	err error // only in the process of the test
}

// alone precedes the identifier in the events of calls on Redis alone.
const alone = "alone "

// node is a failover storage with its stores. Its methods are those of the orders.
type node struct {
	number int
	*failover.Storage
	redis *redisstore.Storage
	pg    *pgstore.Storage
	pool  *pgxpool.Pool
	alone *redisstore.Storage // decides without a failover, with keys of its own
	emit  func(event)

	stop chan struct{} // closed by end
	load sync.WaitGroup
}

// openNode opens a node. If it fails nothing is closed: the process or the test ends.
func openNode(where stores, emit func(event)) (*node, error) {
	ctx, cancel := context.WithTimeout(context.Background(), storecheck.Patient)
	defer cancel()
	n := &node{number: where.Number, emit: emit}
	var err error
	if n.redis, err = redisstore.Open(where.Redis, &redisstore.Options{Timeout: where.RedisTimeout}); err != nil {
		return nil, err
	}
	if n.alone, err = redisstore.Open(where.Redis, &redisstore.Options{Prefix: "alone:", Timeout: where.RedisTimeout}); err != nil {
		return nil, err
	}
	if n.pool, err = pgxpool.New(ctx, where.Postgres+"&pool_max_conns=8"); err != nil {
		return nil, err
	}
	o := failover.Options{Observe: func(e failover.Event) {
		n.write(event{What: "observed", By: e.Kind.String(), Lag: e.Lag.Microseconds(), err: e.Err})
	}}
	o.PrimaryTimeout, o.LedgerTimeout = where.RedisTimeout, where.PostgresTimeout
	if n.pg, err = pgstore.New(ctx, n.pool, &pgstore.Options{Timeout: where.PostgresTimeout}); err != nil {
		return nil, err
	}
	n.Storage, err = failover.New(n.redis, n.pg, &o)
	return n, err
}

// write records an event.
func (n *node) write(e event) {
	e.Process = n.number
	if e.At == 0 {
		e.At = time.Now().UnixMicro()
	}
	if e.err != nil {
		e.Err = e.err.Error()
	}
	n.emit(e)
}

// close closes all storages and returns the error of the failover storage.
func (n *node) close(ctx context.Context) error {
	err := n.Storage.Close(ctx)
	_, _ = n.redis.Close(ctx), n.alone.Close(ctx)
	_ = n.pg.Close(ctx)
	n.pool.Close()
	return err
}

// take asks for one token of each bucket, and records the call.
func (n *node) take(g *target) event { return n.ask(context.Background(), g, 1) }

// ask asks for a cost, and records the call.
func (n *node) ask(ctx context.Context, g *target, cost int64) event {
	began := time.Now()
	v, err := storecheck.Decide(ctx, n, g.request(cost))
	return n.called(g.ID, cost, began, v, err)
}

// called records a call.
func (n *node) called(id string, cost int64, began time.Time, v storecheck.Verdict, err error) event {
	ended := time.Now()
	e := event{What: "call", At: ended.UnixMicro(), Took: ended.Sub(began).Microseconds(), By: v.Source(), ID: id, Cost: cost, Allowed: v.Allowed, err: err}
	n.write(e)
	return e
}

// takeAlone is take on Redis alone.
func (n *node) takeAlone(g *target) {
	began := time.Now()
	v, err := storecheck.Decide(context.Background(), n.alone, g.request(1))
	n.called(alone+g.ID, 1, began, v, err)
}

// obey executes an order, and returns an event with its result.
func (n *node) obey(o order) (e event) {
	switch o.Do {
	case "take":
		for range o.Calls {
			for i := range o.Targets {
				n.take(&o.Targets[i])
			}
		}
	case "crowd":
		storecheck.Crowd(o.Workers, func(int) {
			for range o.Calls {
				for i := range o.Targets {
					n.take(&o.Targets[i])
				}
			}
		})
	case "begin":
		n.begin(o)
	case "end":
		n.end()
	case "state":
		st := n.State()
		e.Err = fmt.Sprint(st.Cause)
		st.Cause, st.FlushError = nil, nil
		e.State = &st
	case "close":
		e.err = n.close(context.Background())
	}
	return e
}

// begin starts workers, which ask until end.
func (n *node) begin(o order) {
	n.stop = make(chan struct{})
	for w := range o.Workers {
		n.load.Go(func() {
			timer := time.NewTimer(0)
			defer timer.Stop()
			for i := w; ; i++ {
				select {
				case <-n.stop:
					return
				case <-timer.C:
				}
				g := &o.Targets[i%len(o.Targets)]
				n.take(g)
				if o.Alone {
					n.takeAlone(g)
				}
				timer.Reset(o.Pause)
			}
		})
	}
}

// end stops the workers and waits for them.
func (n *node) end() {
	close(n.stop)
	n.load.Wait()
}

// runNode is the main function of a node in a process of its own. It returns after the order to close, or when its
// input ends.
func runNode(environment string) (code int) {
	var where stores
	var mu sync.Mutex
	out := json.NewEncoder(os.Stdout)
	emit := func(e event) {
		mu.Lock()
		defer mu.Unlock()
		_ = out.Encode(e) // fails if the test has ended and nobody reads any more
	}
	fail := func(err error) int {
		emit(event{What: "done", Err: err.Error()})
		return 1
	}
	if err := json.Unmarshal([]byte(environment), &where); err != nil {
		return fail(err)
	}
	n, err := openNode(where, emit)
	if err != nil {
		return fail(err)
	}
	n.write(event{What: "done"})
	for in := json.NewDecoder(os.Stdin); ; {
		var o order
		if err := in.Decode(&o); err != nil {
			return fail(err)
		}
		e := n.obey(o)
		e.What = "done"
		if o.Do == "close" {
			if err := goleak.Find(); err != nil {
				e.err = errors.Join(e.err, err)
			}
		}
		n.write(e)
		if o.Do == "close" {
			return 0
		}
	}
}

// record has the events of all nodes of a test.
type record struct {
	mu     sync.Mutex // guards events, which only grow
	events []event
}

// add adds an event.
func (r *record) add(e event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

// all returns the events so far. The caller must not change them.
func (r *record) all() []event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.events[:len(r.events):len(r.events)]
}

// count returns how many events match.
func (r *record) count(match func(*event) bool) (n int) {
	all := r.all()
	for i := range all {
		if match(&all[i]) {
			n++
		}
	}
	return n
}

// admitted returns how many tokens of an identifier all nodes have admitted.
func (r *record) admitted(id string) (n int64) {
	for _, e := range r.all() {
		if e.What == "call" && e.ID == id && e.Allowed && e.Err == "" {
			n += e.Cost
		}
	}
	return n
}

// assertNoErrors asserts that no call has failed.
func (r *record) assertNoErrors(t testing.TB) {
	t.Helper()
	failed := map[string]int{}
	for _, e := range r.all() {
		if e.What == "call" && e.Err != "" {
			failed[e.Err]++
		}
	}
	assert.Empty(t, failed, "errors that callers saw")
}

// local opens a node in this process. It is closed after the test.
func local(t testing.TB, r *record, where stores) *node {
	t.Helper()
	n, err := openNode(where, r.add)
	require.NoError(t, err)
	t.Cleanup(func() { _ = n.close(context.Background()) })
	return n
}

// process is a node in a process of its own, with a proxy in front of each store.
type process struct {
	t         testing.TB
	number    int
	redis, pg *proxy
	cmd       *exec.Cmd
	in        io.WriteCloser
	done      chan event    // the results of orders
	ended     chan struct{} // closed when the process has ended
}

// start starts a process, which is killed after the test.
func start(t testing.TB, r *record, where stores, redis, pg *servers.Server) *process {
	t.Helper()
	p := &process{t: t, number: where.Number, redis: before(t, redis), pg: before(t, pg), done: make(chan event, 1), ended: make(chan struct{})}
	where.Redis, where.Postgres = p.redis.URL(), p.pg.URL()
	text, err := json.Marshal(where)
	require.NoError(t, err)
	program, err := os.Executable()
	require.NoError(t, err)
	p.cmd = exec.Command(program)
	p.cmd.Env = append(os.Environ(), environment+"="+string(text))
	p.cmd.Stderr = os.Stderr
	p.in, err = p.cmd.StdinPipe()
	require.NoError(t, err)
	out, err := p.cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, p.cmd.Start())
	go p.read(out, r)
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.ended
	})
	return p
}

// read reads the events of the process until it ends.
func (p *process) read(out io.Reader, r *record) {
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			continue // part of a line, of a process that was killed
		}
		if e.What == "done" {
			p.done <- e
		} else {
			r.add(e)
		}
	}
	_ = p.cmd.Wait()
	close(p.ended)
}

// fleet starts n processes, and returns when all are ready.
func fleet(t testing.TB, r *record, n int, where stores, redis, pg *servers.Server) (all []*process) {
	t.Helper()
	for i := range n {
		where.Number = i
		all = append(all, start(t, r, where, redis, pg))
	}
	for _, p := range all {
		p.wait()
	}
	return all
}

// order sends an order to the process.
func (p *process) order(o order) {
	p.t.Helper()
	require.NoError(p.t, json.NewEncoder(p.in).Encode(o))
}

// wait waits for the result of the last order.
func (p *process) wait() event {
	p.t.Helper()
	select {
	case e := <-p.done:
		return e
	case <-p.ended:
		select {
		case e := <-p.done:
			return e
		default:
		}
		require.FailNow(p.t, "the process has ended")
	case <-time.After(time.Minute):
		require.FailNow(p.t, "the process does not answer")
	}
	return event{}
}

// do sends an order to all processes, and waits until all have executed it.
func do(all []*process, o order) {
	for _, p := range all {
		p.t.Helper()
		p.order(o)
	}
	for _, p := range all {
		e := p.wait()
		require.Empty(p.t, e.Err, o.Do)
	}
}

// state returns the state of the process's failover storage.
func (p *process) state() *failover.State {
	p.t.Helper()
	p.order(order{Do: "state"})
	return p.wait().State
}

// kill ends the process at once, like a crash.
func (p *process) kill() {
	p.t.Helper()
	require.NoError(p.t, p.cmd.Process.Signal(syscall.SIGKILL))
	<-p.ended
}

// shared starts a Postgres for all tests that do it no harm.
var shared = sync.OnceValues(func() (*servers.Server, error) {
	s, err := servers.StartPostgres()
	opened.Store(s)
	return s, err
})

// opened is the shared Postgres, or nil if no test has used it.
var opened atomic.Pointer[servers.Server]

// postgres returns the shared Postgres.
func postgres(t testing.TB) *servers.Server {
	t.Helper()
	s, err := shared()
	require.NoError(t, err)
	return s
}

// program runs the tests, and then closes the shared Postgres.
type program struct{ *testing.M }

func (p program) Run() int {
	code := p.M.Run()
	if s := opened.Load(); s != nil {
		if err := s.Close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return max(code, 1)
		}
	}
	return code
}

// slow returns the rule of a bucket with n tokens, to which none comes back during a test.
func slow(t testing.TB, name string, kind law.Kind, n int64) law.Rule {
	t.Helper()
	return rule(t, name, kind, storecheck.Period(), n, 1)
}

// rule returns a valid rule.
func rule(t testing.TB, name string, kind law.Kind, period time.Duration, n, refill int64) law.Rule {
	t.Helper()
	r, faults := law.NewRule(name, kind, period, n, refill)
	require.Empty(t, faults)
	return r
}

var lastTarget atomic.Int64

// id returns an identifier that no other test has.
func id(t testing.TB) string {
	return fmt.Sprintf("%s %d %d", strings.ReplaceAll(t.Name(), "/", " "), os.Getpid(), lastTarget.Add(1))
}

// ofEachKind returns a target of each kind, with n tokens, to which none comes back during a test.
func ofEachKind(t testing.TB, n int64) (all []target) {
	t.Helper()
	for _, kind := range storecheck.Kinds {
		all = append(all, target{id(t) + " " + kind.String(), []law.Rule{slow(t, "slow", kind, n)}})
	}
	return all
}

// times calls all targets in turn, each calls times, and returns how often each was admitted.
func (n *node) times(calls int, targets []target) []int {
	taken := make([]int, len(targets))
	for range calls {
		for i := range targets {
			if e := n.take(&targets[i]); e.err == nil && e.Allowed {
				taken[i]++
			}
		}
	}
	return taken
}

// five returns a list with n for each of the five kinds.
func five(n int) []int { return []int{n, n, n, n, n} }

// settled waits until nothing is pending, and then until the last debts that Postgres returned have reached Redis.
func (n *node) settled(t testing.TB) {
	t.Helper()
	storecheck.Until(t, "something is pending", func() bool { st := n.State(); return st.Pending == 0 && st.Lag == 0 })
	pass(t, 50*time.Millisecond)
}

// settled waits until Postgres has recorded everything that the process has admitted.
func (p *process) settled(t testing.TB) {
	t.Helper()
	storecheck.Until(t, "something is pending", func() bool { st := p.state(); return st.Pending == 0 && st.Lag == 0 })
}

// quiet waits for two flush intervals. Then Postgres should have recorded everything that the nodes or processes have
// admitted; as a busy machine may take longer, quiet also waits for that.
func quiet[T interface{ settled(testing.TB) }](t testing.TB, all ...T) {
	t.Helper()
	pass(t, 2*failover.DefaultFlushInterval)
	for _, n := range all {
		n.settled(t)
	}
}

// pass lets a fault or a load go on for a time, where its length is what a test is about. Whatever can be observed is
// waited for by storecheck.Until instead.
func pass(t testing.TB, d time.Duration) {
	select {
	case <-time.After(d):
	case <-t.Context().Done():
	}
}

// back waits until Redis decides again, and returns how long that took.
func (n *node) back(t testing.TB) time.Duration {
	t.Helper()
	return storecheck.Until(t, "Postgres decides", func() bool { return !n.State().Degraded })
}

// owed returns what each bucket of a target has spent according to a store.
func owed(t testing.TB, s replica.Storage, g *target) (n []int64) {
	t.Helper()
	d, err := s.Debt(t.Context(), replica.Debt{Name: "fault", Identifier: g.ID, Rules: law.NewRuleSet(g.Rules...)})
	require.NoError(t, err)
	for _, bucket := range d.Amounts {
		sum := int64(0)
		for _, a := range bucket {
			sum += a.N
		}
		n = append(n, sum)
	}
	return n
}

// ledger returns a storage on a Postgres, without a proxy, by which a test looks at the content.
func ledger(t testing.TB, server *servers.Server) *pgstore.Storage {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), server.URL())
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	s, err := pgstore.New(t.Context(), pool, nil)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close(context.Background())) })
	return s
}

// only returns a list of one target.
func only(g target) []target { return []target{g} }
