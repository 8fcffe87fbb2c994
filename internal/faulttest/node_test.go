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

// A node is a process of a service, which decides by a failover storage and writes down what it was told. It is in
// this process, or in one of its own that is this test's program again, with where its stores are in its
// environment: that one reads orders, and writes its events, a line of JSON each.

const environment = "THROTTLER_FAULTTEST_NODE"

// stores are where a node finds them.
type stores struct {
	Number   int
	Redis    string
	Postgres string

	// Patience for tests of what is decided, which must not depend on how fast the machine is: 0 is the default.
	RedisTimeout, PostgresTimeout time.Duration
}

// target is an identifier that is asked for one token of each of its buckets.
type target struct {
	ID    string
	Rules []law.Rule
}

func (g *target) request(cost int64) storecheck.Request {
	return storecheck.Request{Name: "fault", Parts: []storecheck.Part{storecheck.NewPart(g.ID, g.Rules, cost)}}
}

// order is what a node is to do.
type order struct {
	Do      string // take, crowd, begin, end, state or close
	Targets []target
	Calls   int           // of each target; crowd: of each worker
	Workers int           // at a time
	Pause   time.Duration // between the calls of a worker
	Alone   bool          // after each call the same one is made of Redis alone
}

// event is one that a node has written down.
type event struct {
	What    string // call, observed or done
	Process int
	At      int64 // when it ended, in µs since the epoch
	Took    int64 // µs
	By      string
	ID      string
	Cost    int64
	Allowed bool
	Err     string
	Lag     int64 // observed: µs
	State   *failover.State

	err error // in this process
}

// alone is what is put before the identifier of a call of Redis alone.
const alone = "alone "

type node struct {
	number int
	*failover.Storage
	redis *redisstore.Storage
	pg    *pgstore.Storage
	pool  *pgxpool.Pool
	alone *redisstore.Storage
	emit  func(event)

	stop chan struct{}
	load sync.WaitGroup
}

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

// close returns the error of the failover storage.
func (n *node) close(ctx context.Context) error {
	err := n.Storage.Close(ctx)
	_, _ = n.redis.Close(ctx), n.alone.Close(ctx)
	_ = n.pg.Close(ctx)
	n.pool.Close()
	return err
}

// take asks once, and writes it down.
func (n *node) take(g *target) event { return n.ask(context.Background(), g, 1) }

func (n *node) ask(ctx context.Context, g *target, cost int64) event {
	began := time.Now()
	v, err := storecheck.Decide(ctx, n, g.request(cost))
	return n.called(g.ID, cost, began, v, err)
}

func (n *node) called(id string, cost int64, began time.Time, v storecheck.Verdict, err error) event {
	ended := time.Now()
	e := event{What: "call", At: ended.UnixMicro(), Took: ended.Sub(began).Microseconds(), By: v.Source(), ID: id, Cost: cost, Allowed: v.Allowed, err: err}
	n.write(e)
	return e
}

func (n *node) takeAlone(g *target) {
	began := time.Now()
	v, err := storecheck.Decide(context.Background(), n.alone, g.request(1))
	n.called(alone+g.ID, 1, began, v, err)
}

// obey does what it is told, and returns what there is to say about it.
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

// begin asks all the time until end.
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

func (n *node) end() {
	close(n.stop)
	n.load.Wait()
}

// runNode is a process that is a node, until it is told to close or nobody orders any more.
func runNode(environment string) (code int) {
	var where stores
	var mu sync.Mutex
	out := json.NewEncoder(os.Stdout)
	emit := func(e event) {
		mu.Lock()
		defer mu.Unlock()
		_ = out.Encode(e) // nobody reads it any more
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

// record is what the nodes of a test have written down.
type record struct {
	mu     sync.Mutex
	events []event
}

func (r *record) add(e event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

func (r *record) all() []event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.events[:len(r.events):len(r.events)]
}

// count is how many events there are that match.
func (r *record) count(match func(*event) bool) (n int) {
	all := r.all()
	for i := range all {
		if match(&all[i]) {
			n++
		}
	}
	return n
}

// admitted is how many tokens of an identifier were, by anybody.
func (r *record) admitted(id string) (n int64) {
	for _, e := range r.all() {
		if e.What == "call" && e.ID == id && e.Allowed && e.Err == "" {
			n += e.Cost
		}
	}
	return n
}

// assertNoErrors holds all calls to have been answered.
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

// local opens a node in this process, which is closed after the test.
func local(t testing.TB, r *record, where stores) *node {
	t.Helper()
	n, err := openNode(where, r.add)
	require.NoError(t, err)
	t.Cleanup(func() { _ = n.close(context.Background()) })
	return n
}

// process is a node in a process of its own, behind a proxy before each store.
type process struct {
	t         testing.TB
	number    int
	redis, pg *proxy
	cmd       *exec.Cmd
	in        io.WriteCloser
	done      chan event
	ended     chan struct{}
}

// start starts one.
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

func (p *process) read(out io.Reader, r *record) {
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			continue // half a line of one that was killed
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

// fleet starts some, and returns when all are ready.
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

func (p *process) order(o order) {
	p.t.Helper()
	require.NoError(p.t, json.NewEncoder(p.in).Encode(o))
}

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

// do has all processes do something at once, and waits for them.
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

func (p *process) state() *failover.State {
	p.t.Helper()
	p.order(order{Do: "state"})
	return p.wait().State
}

// kill ends the process as a crash would.
func (p *process) kill() {
	p.t.Helper()
	require.NoError(p.t, p.cmd.Process.Signal(syscall.SIGKILL))
	<-p.ended
}

// shared is a Postgres for the tests that do it no harm.
var shared = sync.OnceValues(func() (*servers.Server, error) {
	s, err := servers.StartPostgres()
	opened.Store(s)
	return s, err
})

var opened atomic.Pointer[servers.Server]

func postgres(t testing.TB) *servers.Server {
	t.Helper()
	s, err := shared()
	require.NoError(t, err)
	return s
}

// program runs the tests, and ends what they share.
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

// slow is n tokens of which none comes back during a test.
func slow(t testing.TB, name string, kind law.Kind, n int64) law.Rule {
	t.Helper()
	return rule(t, name, kind, storecheck.Period(), n, 1)
}

func rule(t testing.TB, name string, kind law.Kind, period time.Duration, n, refill int64) law.Rule {
	t.Helper()
	r, faults := law.NewRule(name, kind, period, n, refill)
	require.Empty(t, faults)
	return r
}

var lastTarget atomic.Int64

// id is one that no other test has.
func id(t testing.TB) string {
	return fmt.Sprintf("%s %d %d", strings.ReplaceAll(t.Name(), "/", " "), os.Getpid(), lastTarget.Add(1))
}

// ofEachKind are targets of n tokens, one of each kind, of which none comes back.
func ofEachKind(t testing.TB, n int64) (all []target) {
	t.Helper()
	for _, kind := range storecheck.Kinds {
		all = append(all, target{id(t) + " " + kind.String(), []law.Rule{slow(t, "slow", kind, n)}})
	}
	return all
}

// times takes of all targets so many times, and returns what each was admitted.
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

// five is n for each of the five kinds.
func five(n int) []int { return []int{n, n, n, n, n} }

// settled waits until nothing is pending, and what has just been told is relayed.
func (n *node) settled(t testing.TB) {
	t.Helper()
	storecheck.Until(t, "something is pending", func() bool { st := n.State(); return st.Pending == 0 && st.Lag == 0 })
	pass(t, 50*time.Millisecond)
}

// settled waits until Postgres knows everything that the process has admitted.
func (p *process) settled(t testing.TB) {
	t.Helper()
	storecheck.Until(t, "something is pending", func() bool { st := p.state(); return st.Pending == 0 && st.Lag == 0 })
}

// quiet is two flush intervals, after which Postgres must know everything that nodes or processes have admitted. A busy
// machine may take longer.
func quiet[T interface{ settled(testing.TB) }](t testing.TB, all ...T) {
	t.Helper()
	pass(t, 2*failover.DefaultFlushInterval)
	for _, n := range all {
		n.settled(t)
	}
}

// pass lets a fault or a load go on, as how long it lasts is what the bound is about. For all that can be seen there is
// storecheck.Until.
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

// owed is what each bucket of a target has spent in a store.
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

// ledger is the shared Postgres itself, or another one, for looking at.
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

// only is one target as a list.
func only(g target) []target { return []target{g} }
