package redis_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	redisstore "github.com/go-throttler/throttler/storage/redis"
	"github.com/go-throttler/throttler/storage/storagetest"
)

var (
	fresh     atomic.Int64
	freshFrom = time.Now().UnixNano()
)

// freshName returns a Config.Name that nobody has used, even on a shared server.
func freshName() string { return fmt.Sprintf("t%x-%d", freshFrom, fresh.Add(1)) }

// wire is a connection that keeps a copy of what was sent and read.
type wire struct {
	net.Conn

	mu         sync.Mutex
	sent, read []byte
}

func (w *wire) Write(b []byte) (int, error) {
	n, err := w.Conn.Write(b)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent = append(w.sent, b[:n]...)
	return n, err
}

func (w *wire) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.read = append(w.read, b[:n]...)
	return n, err
}

// wires has all connections of one client.
type wires struct {
	mu  sync.Mutex
	all []*wire
}

func (ws *wires) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	w := &wire{Conn: conn}
	ws.all = append(ws.all, w)
	return w, nil
}

// take returns what was sent and read since the last take, connection after connection.
func (ws *wires) take() (sent, read string) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for _, w := range ws.all {
		w.mu.Lock()
		sent, read = sent+string(w.sent), read+string(w.read)
		w.sent, w.read = nil, nil
		w.mu.Unlock()
	}
	return sent, read
}

// scriptCall matches a script call by hash, with its number of arguments and its number of keys.
var scriptCall = regexp.MustCompile(`\*(\d+)\r\n\$7\r\nevalsha\r\n\$40\r\n[0-9a-f]{40}\r\n\$\d+\r\n(\d+)\r\n`)

// flown has the numbers of keys and shapes of a script call (decide.lua).
type flown struct{ keys, shapes int }

func flights(sent string) (out []flown) {
	for _, m := range scriptCall.FindAllStringSubmatch(sent, -1) {
		args, _ := strconv.Atoi(m[1])
		keys, _ := strconv.Atoi(m[2])
		out = append(out, flown{keys, args - keys - 4})
	}
	return out
}

// openWired returns a storage whose connections keep what was sent and read.
func openWired(t testing.TB, url string) (*redisstore.Storage, *wires) {
	t.Helper()
	o, err := goredis.ParseURL(url)
	require.NoError(t, err)
	ws := new(wires)
	o.Dialer = ws.dial
	c := goredis.NewClient(o)
	s := on(t, c, redisstore.Options{Timeout: storecheck.Patient})
	t.Cleanup(func() {
		assert.NoError(t, s.Close(context.Background()))
		assert.NoError(t, c.Close())
	})
	return s, ws
}

// left returns the remaining tokens of each bucket.
func left(t testing.TB, s storage.Storage, name, id string, rules ...law.Rule) (out []int64) {
	t.Helper()
	v, err := storecheck.Decide(t.Context(), s, storecheck.Request{Name: name, Mode: storage.Peek, Parts: []storecheck.Part{storecheck.NewPart(id, rules, 0)}})
	require.NoError(t, err)
	for _, l := range v.Levels() {
		out = append(out, l.Remaining)
	}
	return out
}

// limits returns two limits for each of the two ways of the script; the log, with its many holds, needs the full way.
// The first of the two limits is the smaller one.
func limits(t testing.TB) [][]law.Rule {
	t.Helper()
	hour := storecheck.Rule(t, "600/1h", law.Replenish, time.Hour, 600)
	return [][]law.Rule{
		{hour, storecheck.Rule(t, "630/1d", law.Replenish, 24*time.Hour, 630)},
		{hour, storecheck.Rule(t, "630/1d/log", law.SlidingLog, 24*time.Hour, 630)},
	}
}

// burst lets 50 goroutines ask five times each, for each of limits, and returns how many calls were admitted.
func burst(t testing.TB, s storage.Storage, name string) (admitted []int64) {
	t.Helper()
	for i, rules := range limits(t) {
		r := storecheck.Request{Name: name, Parts: []storecheck.Part{storecheck.NewPart(fmt.Sprint("hot-", i), rules, 1)}}
		var n atomic.Int64
		storecheck.Crowd(50, func(int) {
			for range 5 {
				v, err := storecheck.Decide(t.Context(), s, r)
				if assert.NoError(t, err) && v.Allowed {
					n.Add(1)
				}
			}
		})
		admitted = append(admitted, n.Load())
	}
	return admitted
}

// bursts makes four bursts, and calls pass in the middle. In a process whose clock can be moved, pass lets two days
// go by.
func bursts(t testing.TB, s storage.Storage, name string, pass func()) (admitted []int64) {
	t.Helper()
	admitted = make([]int64, len(limits(t)))
	for i := range 4 {
		if i == 2 {
			pass()
		}
		for j, n := range burst(t, s, name) {
			admitted[j] += n
		}
	}
	return admitted
}

// The environment variables of a worker.
const (
	workerURL   = "THROTTLER_TEST_WORKER_URL"
	workerName  = "THROTTLER_TEST_WORKER_NAME"
	workerClock = "THROTTLER_TEST_WORKER_CLOCK"
)

// TestWorker is executed by other tests in processes of their own. Without their environment variables it asks alone.
func TestWorker(t *testing.T) {
	t.Parallel()
	url, name := os.Getenv(workerURL), os.Getenv(workerName)
	if url == "" {
		s := open(t, servers.RedisURL(t), redisstore.Options{})
		assert.Equal(t, []int64{600, 600}, bursts(t, s, freshName(), func() {}))
		return
	}
	fmt.Println("ready")
	_, err := bufio.NewReader(os.Stdin).ReadString('\n')
	require.NoError(t, err)
	if os.Getenv(workerClock) == "" {
		fmt.Println("admitted", bursts(t, open(t, url, redisstore.Options{}), name, func() {}))
		return
	}
	synctest.Test(t, func(t *testing.T) {
		assert.Equal(t, 2000, time.Now().Year(), "the time in a bubble")
		s := open(t, url, redisstore.Options{})
		fmt.Println("admitted", bursts(t, s, name, func() { <-time.After(48 * time.Hour) }))
	})
}

// worker is a process that runs TestWorker.
type worker struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// startWorker starts a worker, and returns when it is ready.
func startWorker(t *testing.T, env ...string) *worker {
	t.Helper()
	program, err := os.Executable()
	require.NoError(t, err)
	w := &worker{cmd: exec.CommandContext(t.Context(), program, "-test.run=^TestWorker$")}
	w.cmd.Env, w.cmd.Stderr = append(os.Environ(), env...), os.Stderr
	w.in, err = w.cmd.StdinPipe()
	require.NoError(t, err)
	out, err := w.cmd.StdoutPipe()
	require.NoError(t, err)
	w.out = bufio.NewReader(out)
	require.NoError(t, w.cmd.Start())
	line, err := w.out.ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "ready\n", line)
	return w
}

// finish waits for the end of the process, and returns how many of its calls were admitted.
func (w *worker) finish(t *testing.T) (admitted []int64) {
	t.Helper()
	out, err := io.ReadAll(w.out)
	require.NoError(t, err)
	require.NoError(t, w.cmd.Wait(), string(out))
	numbers := regexp.MustCompile(`(?m)^admitted \[(\d+) (\d+)\]$`).FindStringSubmatch(string(out))
	require.Len(t, numbers, 3, string(out))
	for _, n := range numbers[1:] {
		i, err := strconv.ParseInt(n, 10, 64)
		require.NoError(t, err)
		admitted = append(admitted, i)
	}
	return admitted
}

// share lets processes with the given clocks make bursts at the same time. It asserts that together they got exactly
// the smaller limit, and that the other bucket was charged as often.
func share(t *testing.T, clocks ...string) {
	t.Helper()
	url, name := servers.RedisURL(t), freshName()
	var workers []*worker
	for _, clock := range clocks {
		workers = append(workers, startWorker(t, workerURL+"="+url, workerName+"="+name, workerClock+"="+clock))
	}
	for _, w := range workers {
		_, err := io.WriteString(w.in, "go\n")
		require.NoError(t, err)
	}
	sum := make([]int64, len(limits(t)))
	for _, w := range workers {
		admitted := w.finish(t)
		t.Log(admitted)
		for i, n := range admitted {
			sum[i] += n
		}
	}
	s := open(t, url, redisstore.Options{})
	for i, rules := range limits(t) {
		assert.Equal(t, int64(600), sum[i])
		assert.Equal(t, []int64{0, 30}, left(t, s, name, fmt.Sprint("hot-", i), rules...))
	}
}

func TestFourProcessesShareOneLimitExactly(t *testing.T) {
	t.Parallel()
	share(t, "", "", "", "")
}

// Two of these processes are in the year 2000 by their own clocks, and see two days pass between two calls: their
// wall clock and their monotonic clock are those of a testing/synctest bubble, while their connections are real. If
// any part of a decision used these clocks, a bucket of an hour would be empty or full for one group of processes.
// The test cannot show a server whose own clock steps.
func TestProcessesWithOtherClocksShareOneLimitExactly(t *testing.T) {
	t.Parallel()
	share(t, "2000", "", "2000", "")
}

// timeless makes all calls of a storage, on all kinds of buckets, without a caller's time.
func timeless(t *testing.T, s *redisstore.Storage, name string) {
	t.Helper()
	var rules []law.Rule
	for kind := range law.SlidingLog + 1 {
		rules = append(rules, storecheck.Rule(t, kind.String(), kind, time.Hour, 1000))
	}
	ctx, amounts := t.Context(), []storage.Amount{{N: 1, In: 5}, {N: -1, In: 5}, {N: 1, In: 5}, {}, {}}
	for _, mode := range []storage.Mode{storage.Take, storage.Peek, storage.Force} {
		r := storecheck.Request{Name: name, Mode: mode, Parts: []storecheck.Part{storecheck.NewPart("a", rules, 1)}}
		_, err := storecheck.Decide(ctx, s, r)
		require.NoError(t, err)
		r.Parts = append(r.Parts, storecheck.NewPart("b", rules, 2), storecheck.NewPart("c", rules[:1], 3))
		_, err = storecheck.Decide(ctx, s, r)
		require.NoError(t, err)
	}
	require.NoError(t, s.Charge(ctx, &storage.Charge{Name: name, Identifier: "a", Rules: law.NewRuleSet(rules...), Amounts: amounts}))
	require.NoError(t, s.Raise(ctx, replica.Debt{Name: name, Identifier: "a", Rules: law.NewRuleSet(rules...), Amounts: make([][]storage.Amount, len(rules))}))
	_, err := s.Debt(ctx, replica.Debt{Name: name, Identifier: "a", Rules: law.NewRuleSet(rules...)})
	require.NoError(t, err)
	require.NoError(t, s.Reset(ctx, name, "a"))
}

// The same calls at two times send the same bytes. So nothing that is sent depends on the time.
func TestNoTimeIsSentUnlessAClockIsInjected(t *testing.T) {
	t.Parallel()
	s, ws := openWired(t, servers.Redis(t).URL())
	name := freshName()
	timeless(t, s, name) // so that the server has the scripts
	ws.take()
	timeless(t, s, name)
	first, _ := ws.take()
	<-time.After(1100 * time.Millisecond)
	timeless(t, s, name)
	second, _ := ws.take()
	assert.Equal(t, strconv.Quote(first), strconv.Quote(second))
	assert.Len(t, flights(first), 10)

	now := time.Now().UnixMicro()
	ask := func(now int64) string {
		r := storecheck.FivePerHour(t, "clocked")
		r.Name, r.Clocked, r.Now = name, true, now
		storecheck.Take(t, s, r, 1)
		sent, _ := ws.take()
		return sent
	}
	assert.NotEqual(t, ask(now), ask(now+1), "the test would see a time")
}

// skewed lets two storages ask in random turn for five periods. Their callers' clocks are ten seconds apart. It
// returns the times of the admitted calls: by the clock that is ahead, and by the bucket's, which is the latest time
// it has seen.
func skewed(t *testing.T, url string, r law.Rule) (ahead, seen []int64) {
	t.Helper()
	name, rnd := freshName(), rand.New(rand.NewPCG(1, 2))
	stores, model := []*redisstore.Storage{open(t, url, redisstore.Options{}), open(t, url, redisstore.Options{})}, storagetest.NewModel()
	const skew, began = 10_000_000, 1_700_000_000_000_000
	for now, bucket := int64(began), int64(0); now < began+5*r.Period; now += rnd.Int64N(r.Period / 25) {
		who := rnd.IntN(2)
		ask := storecheck.Request{Name: name, Clocked: true, Now: now - skew*int64(who), Parts: []storecheck.Part{storecheck.NewPart("a", []law.Rule{r}, 1)}}
		want, err := storecheck.Decide(t.Context(), model, ask)
		require.NoError(t, err)
		got, err := storecheck.Decide(t.Context(), stores[who], ask)
		require.NoError(t, err)
		require.Equal(t, said(&want), said(&got), "%v at %d", r, ask.Now)
		if got.Allowed {
			bucket = max(bucket, ask.Now)
			ahead, seen = append(ahead, now), append(seen, bucket)
		}
	}
	return ahead, seen
}

// said returns everything that a verdict says, as text.
func said(v *storecheck.Verdict) string { return fmt.Sprint(v.Allowed, v.RetryAfter, v.Levels()) }

// most returns the largest number of times within less than a period.
func most(times []int64, period int64) (n int) {
	first := 0
	for i := range times {
		for first < i && times[i]-times[first] >= period {
			first++
		}
		n = max(n, i+1-first)
	}
	return n
}

// A difference between clocks refills nothing. That is true even if the period is shorter than the difference, so
// that one process sees the tokens of the other as taken in the far future.
//
// A log admits its capacity in each window of one period by the latest time that it has seen. So by any single clock
// the window is shorter than the period by at most the difference. A whole period by the clock that is ahead may see
// more than the capacity: tokens that the other process takes come back as if they were taken when the later clock
// was last seen.
func TestClocksTenSecondsApartShortenAWindowByTenSecondsAtMost(t *testing.T) {
	t.Parallel()
	url := servers.RedisURL(t)
	for kind := range law.SlidingLog + 1 {
		for _, period := range []time.Duration{2 * time.Second, time.Minute} {
			r := storecheck.Rule(t, "20", kind, period, 20)
			ahead, seen := skewed(t, url, r)
			assert.LessOrEqual(t, len(ahead), 20*(5+2), "%v: the capacity for each period that passed", kind)
			if kind == law.SlidingLog {
				assert.Equal(t, 20, most(seen, r.Period))
				assert.LessOrEqual(t, most(ahead, r.Period-10_000_000), 20)
			}
		}
	}
}

// hotCalls makes 400 calls of 200 goroutines for a hot identifier, half of them together with another identifier, in
// either order. It returns the sums of the admitted costs, and the smallest cost that was denied.
func hotCalls(t *testing.T, s storage.Storage, name string, hot, other []law.Rule) (hotSum, otherSum, refused int64) {
	t.Helper()
	var sum, sumOther, least atomic.Int64
	least.Store(4)
	storecheck.Crowd(200, func(i int) {
		for j := range 2 {
			cost := int64(1 + (i+j)%3)
			a, b := storecheck.NewPart("hot", hot, cost), storecheck.NewPart("other", other, 1)
			r := storecheck.Request{Parts: [][]storecheck.Part{{a}, {a}, {a, b}, {b, a}}[i%4]}
			r.Name = name
			v, err := storecheck.Decide(t.Context(), s, r)
			switch {
			case !assert.NoError(t, err):
			case v.Allowed:
				sum.Add(cost)
				sumOther.Add(int64(len(r.Parts) - 1))
			default:
				for n := least.Load(); cost < n && !least.CompareAndSwap(n, cost); n = least.Load() {
				}
			}
		}
	})
	return sum.Load(), sumOther.Load(), least.Load()
}

func TestAHotKeyGivesOutAllItHasAndNoMore(t *testing.T) {
	t.Parallel()
	for _, kind := range []law.Kind{law.SlidingLog, law.Continuous} {
		t.Run(kind.String(), func(t *testing.T) {
			t.Parallel()
			s, ws := openWired(t, servers.RedisURL(t))
			name, day := freshName(), 24*time.Hour
			hot, other := []law.Rule{storecheck.Rule(t, "hot", kind, day, 100)}, []law.Rule{storecheck.Rule(t, "other", kind, day, 500)}
			sum, sumOther, refused := hotCalls(t, s, name, hot, other)
			assert.LessOrEqual(t, sum, int64(100))
			assert.Greater(t, sum, 100-refused, "a call was refused that fitted")
			assert.Equal(t, int64(1), refused, "so it is exactly 100")
			assert.Equal(t, []int64{100 - sum}, left(t, s, name, "hot", hot...))
			assert.Equal(t, []int64{500 - sumOther}, left(t, s, name, "other", other...))
			sent, _ := ws.take()
			assert.Less(t, len(flights(sent)), 300, "400 calls share round trips")
		})
	}
}

// shapely makes random requests for one or two identifiers that nobody else uses.
type shapely struct {
	rnd  *rand.Rand
	name string
	ids  [2]string
	sets [][]law.Rule
}

func (g *shapely) request(now int64) storecheck.Request {
	r := storecheck.Request{Name: g.name, Clocked: true, Now: now, Mode: []storage.Mode{storage.Take, storage.Take, storage.Peek, storage.Force}[g.rnd.IntN(4)]}
	r.Parts = append(r.Parts, g.part(g.ids[0]))
	if g.rnd.IntN(4) == 0 {
		r.Parts = append(r.Parts, g.part(g.ids[1]))
	}
	return r
}

// part returns a part with a random set of rules, in the shared slice or in a copy.
func (g *shapely) part(id string) storecheck.Part {
	rules := g.sets[g.rnd.IntN(len(g.sets))]
	if g.rnd.IntN(2) == 0 {
		rules = slices.Clone(rules)
	}
	p := storecheck.NewPart(id, rules, 1)
	for i := range rules {
		p.Costs[i] = g.rnd.Int64N(4)
	}
	return p
}

func TestObservedCallsShareAShape(t *testing.T) {
	t.Parallel()
	s, ws := openWired(t, servers.RedisURL(t))
	l, err := throttler.New(throttler.Config{
		Name: freshName(), Storage: s, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1000)},
		Observe: func(context.Context, *throttler.Event) {},
	})
	require.NoError(t, err)
	storecheck.Crowd(50, func(i int) {
		for range 20 {
			_, err := l.ConsumeAll(t.Context(), throttler.For(fmt.Sprint("user:", i)), throttler.For("org"))
			assert.NoError(t, err)
		}
	})
	sent, _ := ws.take()
	most := 0
	for _, f := range flights(sent) {
		most = max(most, f.keys)
		require.Equal(t, 2, f.shapes, "of a flight with %d keys", f.keys)
	}
	assert.Greater(t, most, 2, "keys of the largest flight")
}

// ruleSets returns rule sets with each kind alone and together with another kind, in either order.
func ruleSets(t *testing.T) (sets [][]law.Rule) {
	t.Helper()
	for kind := range law.SlidingLog + 1 {
		a, b := storecheck.Rule(t, "a", kind, 10*time.Second, 5), storecheck.Rule(t, "b", (kind+1)%5, time.Minute, 7)
		sets = append(sets, []law.Rule{a}, []law.Rule{a, b}, []law.Rule{b, a})
	}
	return sets
}

func TestAFlightOfManyShapesDecidesAsTheModel(t *testing.T) {
	t.Parallel()
	s, ws := openWired(t, servers.RedisURL(t))
	model, name, sets := storagetest.NewModel(), freshName(), ruleSets(t)
	storecheck.Crowd(100, func(i int) {
		g := &shapely{rnd: rand.New(rand.NewPCG(7, uint64(i))), name: name, ids: [2]string{fmt.Sprint("one-", i), fmt.Sprint("two-", i)}, sets: sets}
		for step := range 30 {
			r := g.request(1_700_000_000_000_000 + int64(step/5)*3_000_000)
			want, err := storecheck.Decide(t.Context(), model, r)
			assert.NoError(t, err)
			got, err := storecheck.Decide(t.Context(), s, r)
			if !assert.NoError(t, err) || !assert.Equal(t, said(&want), said(&got), "%d, step %d: %+v", i, step, r) {
				return
			}
		}
	})
	sent, _ := ws.take()
	all := flights(sent)
	shared := slices.IndexFunc(all, func(f flown) bool { return f.shapes > 8 && f.shapes < f.keys })
	assert.GreaterOrEqual(t, shared, 0, "one of more than 8 shapes, some of which have several keys: %v", all)
	assert.Less(t, strings.Count(sent, "evalsha"), 100*30)
}
