package redis_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	redisstore "github.com/go-throttler/throttler/storage/redis"
	"github.com/go-throttler/throttler/storage/storagetest"
)

// noon is a full hour, at which the clocks of these tests begin.
const noon = int64(1_700_006_400_000_000)

const allKinds = law.SlidingLog + 1

// ofKind returns the rules of buckets after they were changed to a kind, with the names that the throttler gives them.
func ofKind(t testing.TB, kind law.Kind, buckets ...throttler.Bucket) (rules []law.Rule) {
	t.Helper()
	modify := [...]func(throttler.Bucket) throttler.Bucket{
		func(b throttler.Bucket) throttler.Bucket { return b },
		throttler.Bucket.Continuous, throttler.Bucket.FixedWindow, throttler.Bucket.SlidingWindow, throttler.Bucket.SlidingLog,
	}
	for _, b := range buckets {
		b = modify[kind](b)
		rules = append(rules, storecheck.Rule(t, b.Name(), kind, b.Period(), b.Capacity()))
	}
	return rules
}

// raw returns the value of a key, or "" if there is none.
func raw(t testing.TB, c *goredis.Client, key string) string {
	t.Helper()
	v, err := c.Get(t.Context(), key).Result()
	if !errors.Is(err, goredis.Nil) {
		require.NoError(t, err)
	}
	return v
}

// size is how many bytes a key needs in Redis: for its value, and for everything except the time to live.
type size struct{ value, memory int64 }

func sizeOf(t *testing.T, c *goredis.Client, key string) size {
	t.Helper()
	memory, err := c.MemoryUsage(t.Context(), key).Result()
	require.NoError(t, err)
	return size{int64(len(raw(t, c, key))), memory}
}

// fill makes calls across a full hour, and returns the size of the key after the first call and its largest size.
func fill(t *testing.T, s *redisstore.Storage, c *goredis.Client, calls int, pause time.Duration, rules []law.Rule) (first, fullest size) {
	t.Helper()
	const id = "user-0000000012"
	key := redisstore.DefaultPrefix + ":" + id
	require.Len(t, key, 26)
	require.NoError(t, s.Reset(t.Context(), "", id))
	now := noon - time.Minute.Microseconds()
	for i := range calls {
		storecheck.Take(t, s, storecheck.Request{Clocked: true, Now: now + int64(i)*pause.Microseconds(), Parts: []storecheck.Part{storecheck.NewPart(id, rules, 1)}}, 1)
		is := sizeOf(t, c, key)
		if i == 0 {
			first = is
		}
		fullest = size{max(fullest.value, is.value), max(fullest.memory, is.memory)}
	}
	return first, fullest
}

// formSize returns the length of a value with one hold a bucket, as the head of state.lua defines it.
func formSize(rules []law.Rule) (n int64) {
	n = 3 + 7
	wideN := int64(0)
	for _, r := range rules {
		n += 1 + int64(len(r.Name)) + 6 + 1
		if r.Kind == law.Continuous {
			n += 7 + 6 // refill and tick
			if r.Ceiling()*r.One >= 1<<32 {
				wideN = 3
			}
		}
		n += 7 + 4
	}
	return n + wideN*int64(len(rules))
}

func TestWhatAnIdentifierNeedsInRedis(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s, c := open(t, server.URL(), redisstore.Options{}), client(t, server.URL())
	five, hundred, thousand := throttler.NewBucket(10*time.Second, 5), throttler.NewBucket(time.Hour, 100), throttler.NewBucket(time.Hour, 1000)
	table := strings.Builder{}
	row := func(calls int, pause time.Duration, rules []law.Rule) (first size) {
		first, fullest := fill(t, s, c, calls, pause, rules)
		var names []string
		for _, r := range rules {
			names = append(names, r.Name)
		}
		fmt.Fprintf(&table, "%-42s %6d %6d %8d %6d\n", strings.Join(names, ", "), first.value, first.memory, fullest.value, fullest.memory)
		return first
	}
	for kind := range allKinds {
		row(105, 2*time.Second, ofKind(t, kind, hundred))
		both := ofKind(t, kind, five, hundred)
		first := row(105, 2*time.Second, both)
		assert.Equal(t, formSize(both), first.value, kind)
		if kind == law.Replenish {
			assert.LessOrEqual(t, first.memory, int64(140))
		}
	}
	row(1005, 3600*time.Millisecond, ofKind(t, law.SlidingLog, thousand))
	t.Logf("bytes with a key of 26\n%-42s %13s %15s\n%-42s %6s %6s %8s %6s\n%s", "", "after a call", "fullest", "buckets", "STRLEN", "MEMORY", "STRLEN", "MEMORY", table.String())
}

// traffic counts the bytes of calls and of their answers.
type traffic struct{ sent, read int }

func about(user int, rules []law.Rule) storecheck.Request {
	return storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart(fmt.Sprintf("user-%010d", user), rules, 1)}}
}

// alone returns the traffic of one decision that is alone in its batch.
func alone(t *testing.T, s *redisstore.Storage, ws *wires, rules []law.Rule) traffic {
	t.Helper()
	ws.take()
	require.Equal(t, 1, storecheck.Take(t, s, about(1, rules), 1))
	sent, read := ws.take()
	require.Equal(t, []flown{{1, 1}}, flights(sent))
	return traffic{len(sent), len(read)}
}

// inBatch returns the traffic of 64 decisions, and whether all of them were in one batch. It freezes the server: two
// calls are then in flight without an answer, and the 64 calls that follow wait in the queue.
func inBatch(t *testing.T, server *servers.Server, s *redisstore.Storage, ws *wires, rules []law.Rule) (sum traffic, ok bool) {
	t.Helper()
	single := alone(t, s, ws, rules)
	require.NoError(t, server.Freeze())
	var all sync.WaitGroup
	var admitted, begun atomic.Int64
	ask := func(user int) {
		begun.Add(1)
		v, err := storecheck.Decide(t.Context(), s, about(user, rules))
		if assert.NoError(t, err) && v.Allowed {
			admitted.Add(1)
		}
	}
	told := ""
	for i := range 2 {
		all.Go(func() { ask(100 + i) })
		storecheck.Until(t, "it flies", func() bool {
			sent, _ := ws.take()
			told += sent
			return len(flights(told)) == i+1
		})
	}
	for i := range 64 {
		all.Go(func() { ask(200 + i) })
	}
	storecheck.Until(t, "all begin", func() bool { return begun.Load() == 66 })
	<-time.After(20 * time.Millisecond) // until they have entered the queue
	require.NoError(t, server.Thaw())
	all.Wait()
	require.Equal(t, int64(66), admitted.Load())
	sent, read := ws.take()
	told += sent
	ok = slices.Contains(flights(told), flown{64, 1}) && len(flights(told)) == 3
	return traffic{len(told) - 2*single.sent, len(read) - 2*single.read}, ok
}

func TestWhatADecisionSendsAndReads(t *testing.T) {
	t.Parallel()
	five, hundred := throttler.NewBucket(10*time.Second, 5), throttler.NewBucket(time.Hour, 100)
	server := servers.Redis(t)
	s, ws := openWired(t, server.URL())
	first := ofKind(t, law.Replenish, hundred)
	storecheck.Crowd(50, func(i int) { // to make connections and send the script
		_, err := storecheck.Decide(t.Context(), s, about(i, first))
		assert.NoError(t, err)
	})
	table := strings.Builder{}
	for kind := range allKinds {
		for _, rules := range [][]law.Rule{ofKind(t, kind, hundred), ofKind(t, kind, five, hundred)} {
			var single, batch traffic
			storecheck.Until(t, "64 in a flight", func() (ok bool) {
				require.NoError(t, client(t, server.URL()).FlushDB(t.Context()).Err())
				batch, ok = inBatch(t, server, s, ws, rules)
				return ok
			})
			require.NoError(t, s.Reset(t.Context(), "", about(1, rules).Parts[0].Identifier))
			single = alone(t, s, ws, rules)
			fmt.Fprintf(&table, "%-10v %d %8d %8d %10.1f %8.1f\n", kind, len(rules), single.sent, single.read, float64(batch.sent)/64, float64(batch.read)/64)
			assert.LessOrEqual(t, single.sent, 430, kind)
			assert.LessOrEqual(t, single.read, 64, kind)
			assert.LessOrEqual(t, batch.sent, 64*39, "%v: a key, and the number of its shape", kind)
			assert.LessOrEqual(t, batch.read, 64*57+16, kind)
		}
	}
	t.Logf("bytes a decision\n%-12s %17s %19s\n%-12s %8s %8s %10s %8s\n%s", "", "alone", "of 64", "buckets", "sent", "read", "sent", "read", table.String())
}

// twoLimits returns a short limit and a long one.
func twoLimits(t testing.TB, kind law.Kind) []law.Rule {
	t.Helper()
	return []law.Rule{storecheck.Rule(t, "5/2s", kind, 2*time.Second, 5), storecheck.Rule(t, "50/1h", kind, time.Hour, 50)}
}

// watch observes what a call does to the value of a key and to its time to live.
type watch struct {
	s   *redisstore.Storage
	c   *goredis.Client
	key string
}

type seen struct {
	value   string
	expires time.Duration // since the epoch by the server's clock, in whole milliseconds; below 0 without a key
}

func (w *watch) look(t *testing.T) seen {
	t.Helper()
	expires, err := w.c.PExpireTime(t.Context(), w.key).Result()
	require.NoError(t, err)
	return seen{raw(t, w.c, w.key), expires}
}

// clock returns the server's time since the epoch.
func (w *watch) clock(t *testing.T) time.Duration {
	t.Helper()
	now, err := w.c.Time(t.Context()).Result()
	require.NoError(t, err)
	return time.Duration(now.UnixNano())
}

// ask makes a call and asserts what it does to the key. If it takes tokens the key must live until all buckets are
// full, and for the given time longer. Otherwise nothing may change. It returns whether tokens were taken.
func (w *watch) ask(t *testing.T, r storecheck.Request, longer time.Duration) (taken bool) {
	t.Helper()
	before, began := w.look(t), w.clock(t)
	v, err := storecheck.Decide(t.Context(), w.s, r)
	require.NoError(t, err)
	ended, after, looked := w.clock(t), w.look(t), w.clock(t) // the key may go between any two of these
	if !v.Taken() || r.Parts[0].Costs[0]+r.Parts[0].Costs[1] == 0 {
		if before.expires > looked {
			assert.Equal(t, before, after, "%+v", r)
		}
		return false
	}
	var gone int64
	fading := false // a SlidingWindow of cost 0: in tokens it is full before its last unit is gone
	for i := range r.Parts[0].Rules.Rules {
		c := v.Count(i)
		gone = max(gone, c.ResetAfter, c.HeldFor)
		fading = fading || r.Parts[0].Rules.Rules[i].Kind == law.SlidingWindow && c.HeldFor == 0 && c.ResetAfter > 0
	}
	reset := time.Duration(gone) * time.Microsecond
	const rounding = 2 * time.Millisecond
	if least := began + reset + longer - rounding; least > looked {
		assert.GreaterOrEqual(t, after.expires, least, "%+v", r)
	}
	if !fading {
		assert.LessOrEqual(t, after.expires, ended+reset+longer+rounding, "%+v", r)
	}
	return true
}

// someRequest returns a random request for the identifier of the key.
func someRequest(rnd *rand.Rand, name string, rules []law.Rule) storecheck.Request {
	r := storecheck.Request{Name: name, Parts: []storecheck.Part{storecheck.NewPart("a", rules, 0)}}
	r.Mode = []storage.Mode{storage.Take, storage.Take, storage.Take, storage.Peek, storage.Force}[rnd.IntN(5)]
	for i := range rules {
		r.Parts[0].Costs[i] = rnd.Int64N(3)
	}
	return r
}

// watched is an identifier with buckets of one kind. It counts how often a call took tokens, and how often not.
type watched struct {
	watch
	name  string
	rnd   *rand.Rand
	rules []law.Rule
	count map[bool]int
}

func watchAll(t *testing.T) (all []*watched) {
	t.Helper()
	url := servers.RedisURL(t)
	s, c := open(t, url, redisstore.Options{}), client(t, url)
	for kind := range allKinds {
		name := freshName()
		all = append(all, &watched{watch{s, c, "throttler:" + name + ":a"}, name, rand.New(rand.NewPCG(3, uint64(kind))), twoLimits(t, kind), map[bool]int{}})
	}
	return all
}

func TestAKeyLivesASecondLongerThanItsBucketsAreNotFull(t *testing.T) {
	t.Parallel()
	all, began := watchAll(t), time.Now()
	enough := func(w *watched) bool { return w.count[true] > 10 && w.count[false] > 10 }
	storecheck.Until(t, "calls of both sorts, for two short periods", func() bool {
		for _, w := range all {
			w.count[w.ask(t, someRequest(w.rnd, w.name, w.rules), time.Second)]++
		}
		<-time.After(rand.N(100 * time.Millisecond))
		return time.Since(began) > 4*time.Second && enough(all[0]) && enough(all[1]) && enough(all[2]) && enough(all[3]) && enough(all[4])
	})
}

// The clock stands still for a while and then jumps. Each call that takes tokens sets the time to live again.
func TestAKeyUnderAnInjectedClockLivesAnHourLonger(t *testing.T) {
	t.Parallel()
	all := watchAll(t)
	for i := range 40 {
		for _, w := range all {
			r := someRequest(w.rnd, w.name, w.rules)
			r.Clocked, r.Now = true, noon+int64(i/10)*900_000
			w.count[w.ask(t, r, time.Hour+time.Second)]++
		}
		<-time.After(20 * time.Millisecond)
	}
	for _, w := range all {
		assert.Greater(t, w.count[true], 10, "%v", w.rules)
	}
}

func TestACallThatTakesNothingMakesNoKey(t *testing.T) {
	t.Parallel()
	url := servers.RedisURL(t)
	s, c, name := open(t, url, redisstore.Options{}), client(t, url), freshName()
	for kind := range allKinds {
		rules := twoLimits(t, kind)
		for _, r := range []storecheck.Request{
			{Name: name, Mode: storage.Peek, Parts: []storecheck.Part{storecheck.NewPart("a", rules, 1)}},
			{Name: name, Parts: []storecheck.Part{storecheck.NewPart("a", rules, 0)}},
			{Name: name, Mode: storage.Force, Parts: []storecheck.Part{storecheck.NewPart("a", rules, 0)}},
		} {
			assert.Equal(t, 1, storecheck.Take(t, s, r, 1))
			assert.Empty(t, raw(t, c, "throttler:"+name+":a"))
		}
	}
}

// giveBack refunds what a verdict took, like a throttler.
func giveBack(t *testing.T, s *redisstore.Storage, r storecheck.Request, v storecheck.Verdict) {
	t.Helper()
	elapsed := law.Monotonic() - v.At()
	if r.Clocked {
		elapsed = 0
	}
	c := storage.Charge{Name: r.Name, Clocked: r.Clocked, Now: r.Now, Identifier: r.Parts[0].Identifier, Rules: r.Parts[0].Rules}
	for i := range c.Rules.Rules {
		c.Amounts = append(c.Amounts, storage.Amount{N: -r.Parts[0].Costs[i], In: v.Count(i).HeldFor - elapsed})
	}
	require.NoError(t, s.Charge(t.Context(), &c))
}

func TestARefundOfAllAndAResetLeaveNothing(t *testing.T) {
	t.Parallel()
	url := servers.RedisURL(t)
	s, c, name := open(t, url, redisstore.Options{}), client(t, url), freshName()
	key := "throttler:" + name + ":a"
	for kind := range allKinds {
		for _, clocked := range []bool{true, false} {
			r := storecheck.Request{Name: name, Clocked: clocked, Parts: []storecheck.Part{storecheck.NewPart("a", twoLimits(t, kind), 3)}}
			if clocked {
				r.Now = noon
			}
			storecheck.Until(t, "a refund that is quick: in a log of 2 s one finds its hold to 8 ms", func() bool {
				v, err := storecheck.Decide(t.Context(), s, r)
				require.NoError(t, err)
				require.True(t, v.Allowed)
				require.NotEmpty(t, raw(t, c, key))
				giveBack(t, s, r, v)
				if clocked || law.Monotonic()-v.At() < 5000 {
					return true
				}
				require.NoError(t, s.Reset(t.Context(), name, "a"))
				return false
			})
			if clocked || kind != law.Continuous {
				assert.Empty(t, raw(t, c, key), kind)
			} else {
				assert.Less(t, c.PTTL(t.Context(), key).Val(), 3*time.Second, "what has drained since the decision may be left")
			}

			require.NoError(t, s.Reset(t.Context(), name, "a"))
			require.Equal(t, 1, storecheck.Take(t, s, r, 1))
			require.NotEmpty(t, raw(t, c, key))
			require.NoError(t, s.Reset(t.Context(), name, "a"))
			assert.Zero(t, c.Exists(t.Context(), key).Val(), kind)
		}
	}
}

// There are a million identifiers in make test-long.
func TestIdentifiersExpireToZeroKeys(t *testing.T) {
	t.Parallel()
	n := int64(100_000)
	if os.Getenv("THROTTLER_LONG") != "" {
		n = 1_000_000
	}
	server := servers.Redis(t)
	s, c := open(t, server.URL(), redisstore.Options{}), client(t, server.URL())
	rules := []law.Rule{storecheck.Rule(t, "3/500ms", law.Replenish, 500*time.Millisecond, 3)}
	var next, admitted, largest atomic.Int64
	began := time.Now()
	storecheck.Crowd(256, func(int) {
		for i := next.Add(1); i <= n; i = next.Add(1) {
			v, err := storecheck.Decide(t.Context(), s, storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart(fmt.Sprint("user-", i), rules, 1)}})
			if assert.NoError(t, err) && v.Allowed {
				admitted.Add(1)
			}
			if i%(n/50) == 0 {
				largest.Store(max(largest.Load(), c.DBSize(t.Context()).Val()))
			}
		}
	})
	t.Logf("%d identifiers in %v, at most %d at a time", n, time.Since(began), largest.Load())
	assert.Equal(t, n, admitted.Load())
	assert.Greater(t, largest.Load(), n/100)
	began = time.Now()
	storecheck.Until(t, "no keys", func() bool { return c.DBSize(t.Context()).Val() == 0 })
	t.Logf("gone after %v", time.Since(began))
	assert.Zero(t, c.DBSize(t.Context()).Val())
}

// twin is an identifier in a storage and in a Model, which get the same calls.
type twin struct {
	s     *redisstore.Storage
	c     *goredis.Client
	model *storagetest.Model
	name  string
	flags map[byte]int // how often each was found, without the number of buckets
}

func newTwin(t *testing.T, url string) *twin {
	t.Helper()
	return &twin{open(t, url, redisstore.Options{}), client(t, url), storagetest.NewModel(), freshName(), map[byte]int{}}
}

// ask makes a call on both, compares the verdicts, and returns whether they admit.
func (w *twin) ask(t *testing.T, at time.Duration, mode storage.Mode, rules []law.Rule, costs ...int64) (allowed bool) {
	t.Helper()
	r := storecheck.Request{Name: w.name, Mode: mode, Clocked: true, Now: noon + at.Microseconds(), Parts: []storecheck.Part{storecheck.NewPart("a", rules, 0)}}
	copy(r.Parts[0].Costs, costs)
	want, err := storecheck.Decide(t.Context(), w.model, r)
	require.NoError(t, err)
	got, err := storecheck.Decide(t.Context(), w.s, r)
	require.NoError(t, err)
	require.Equal(t, said(&want), said(&got), "at %v: %+v", at, r)
	if v := w.raw(t); v != "" {
		w.flags[v[2]/32*32]++
	}
	return got.Allowed
}

func (w *twin) raw(t *testing.T) string {
	t.Helper()
	return raw(t, w.c, "throttler:"+w.name+":a")
}

// The flags of a value: see state.lua.
const (
	wide  = 32
	apart = 64 // the buckets were not changed at the same time
)

// took asserts that the costs are taken, and that the third byte of the value is flags afterwards.
func (w *twin) took(t *testing.T, at time.Duration, flags byte, rules []law.Rule, costs ...int64) {
	t.Helper()
	require.True(t, w.ask(t, at, storage.Take, rules, costs...))
	v := w.raw(t)
	require.Greater(t, len(v), 3)
	require.Equal(t, fmt.Sprintf("%d+%d", flags/32*32, flags%32), fmt.Sprintf("%d+%d", v[2]/32*32, v[2]%32), "flags and buckets, at %v", at)
}

// peeks makes Peeks at several times, for nothing, for one token and for all, and asserts that they change nothing.
func (w *twin) peeks(t *testing.T, at time.Duration, rules []law.Rule) {
	t.Helper()
	before := w.raw(t)
	for _, later := range []time.Duration{0, time.Second, time.Minute, 10 * time.Minute, time.Hour, 2 * time.Hour} {
		for _, n := range []int64{0, 1, rules[0].Capacity} {
			w.ask(t, at+later, storage.Peek, rules, n)
		}
	}
	assert.Equal(t, before, w.raw(t))
}

// lawOf reports whether the first bucket of a value has the name and the law of a rule.
func lawOf(v string, r *law.Rule) bool {
	head := string(rune(len(r.Name))) + r.Name
	n, bits := len(head), uint64(r.Kind)<<45+uint64(r.Period)
	for range 6 {
		head += string([]byte{byte(bits)})
		bits >>= 8
	}
	return len(v) > n+9 && v[3:n+9] == head
}

func TestAnotherKindOrPeriodIsAnotherBucketOfTheSameKey(t *testing.T) {
	t.Parallel()
	url := servers.RedisURL(t)
	for from := range allKinds {
		for to := range allKinds {
			t.Run(fmt.Sprintf("%v to %v", from, to), func(t *testing.T) {
				t.Parallel()
				w := newTwin(t, url)
				old, changed := []law.Rule{storecheck.Rule(t, "b", from, time.Hour, 10)}, []law.Rule{storecheck.Rule(t, "b", to, 7*time.Minute, 12)}
				w.ask(t, 0, storage.Take, old, 3)
				w.ask(t, time.Minute, storage.Take, old, 6)
				w.peeks(t, time.Minute, changed)
				require.True(t, w.ask(t, 2*time.Minute, storage.Take, changed, 12))
				assert.True(t, lawOf(w.raw(t), &changed[0]), "the bucket of the last call stands first")
				require.False(t, w.ask(t, 2*time.Minute, storage.Take, changed, 12))
				w.peeks(t, 2*time.Minute, changed)
				w.peeks(t, 2*time.Minute, old)
				for i := range 20 {
					w.ask(t, 2*time.Minute+time.Duration(i)*5*time.Minute, storage.Take, changed, 4)
				}
				w.ask(t, 3*time.Hour, storage.Take, old, 4)
			})
		}
	}
}

func TestALevelIsConvertedByTheNextAdmittedCall(t *testing.T) {
	t.Parallel()
	w := newTwin(t, servers.RedisURL(t))
	of := func(refill int64) []law.Rule {
		r, faults := law.NewRule("b", law.Continuous, time.Hour, 10, refill)
		require.Empty(t, faults)
		return []law.Rule{r}
	}
	w.ask(t, 0, storage.Take, of(3), 10)
	old := w.raw(t)
	for _, refill := range []int64{7, 10, 1_000_003} {
		w.peeks(t, 0, of(refill))
		require.False(t, w.ask(t, 0, storage.Take, of(refill), 1))
		assert.Equal(t, old, w.raw(t), "a call that is denied converts nothing")
	}
	require.True(t, w.ask(t, time.Hour, storage.Take, of(7), 2))
	w.peeks(t, time.Hour, of(7))
	w.peeks(t, time.Hour, of(11))
	require.True(t, w.ask(t, 2*time.Hour, storage.Take, of(11), 9))
}

func TestAValueBecomesWideAndNarrowAgain(t *testing.T) {
	t.Parallel()
	w := newTwin(t, servers.RedisURL(t))
	of := func(capacity int64) []law.Rule {
		return []law.Rule{storecheck.Rule(t, "b", law.Replenish, time.Hour, capacity)}
	}
	w.took(t, 0, 1, of(1<<30-1), 5)
	w.took(t, 0, 1|wide, of(1<<30), 5)
	w.took(t, 0, 1|wide, of(1<<30), 5)
	w.took(t, 0, 1, of(20), 2)
	w.took(t, 0, 1, of(20), 2)
	w.peeks(t, 0, of(1<<40))
	w.took(t, 0, 1|wide, of(1<<40), 1<<32)
	w.peeks(t, 0, of(20))
	require.False(t, w.ask(t, 0, storage.Take, of(20), 1))
	require.True(t, w.ask(t, 0, storage.Force, of(20), 1), "nothing is taken above four capacities")
	assert.Equal(t, byte(1|wide), w.raw(t)[2], "2^32 tokens remain, whatever the rule is")
	w.peeks(t, 0, of(1<<33))
	w.took(t, time.Hour, 1, of(20), 1)
	w.took(t, time.Hour, 1|wide, of(1<<50), 1<<50-1)
	w.peeks(t, time.Hour, of(1<<50))
}

// A Continuous bucket counts in units, and a token has more of them the more ticks its period has.
func TestAContinuousBucketIsWideByItsPeriod(t *testing.T) {
	t.Parallel()
	w := newTwin(t, servers.RedisURL(t))
	of := func(period time.Duration, capacity int64) []law.Rule {
		return []law.Rule{storecheck.Rule(t, "b", law.Continuous, period, capacity)}
	}
	w.took(t, 0, 1, of(time.Second, 1073), 7)
	w.took(t, 0, 1|wide, of(time.Second, 1077), 7)
	w.took(t, 0, 1, of(time.Second, 1073), 7)
	w.took(t, time.Second, 1|wide, of(time.Hour, 50), 7)
	w.peeks(t, time.Second, of(time.Hour, 50))
	w.took(t, time.Second, 2|wide, of(366*24*time.Hour, 50), 20)
	w.peeks(t, time.Second, of(366*24*time.Hour, 50))
	w.took(t, 2*time.Hour, 2|wide|apart, of(time.Second, 1000), 7)
	w.peeks(t, 2*time.Hour, of(time.Hour, 50))
}

func TestBucketsThatAreChangedAtDifferentTimesOrNotNamedAreKept(t *testing.T) {
	t.Parallel()
	w := newTwin(t, servers.RedisURL(t))
	a, b, c := storecheck.Rule(t, "a", law.Replenish, time.Hour, 10), storecheck.Rule(t, "bb", law.SlidingLog, 2*time.Hour, 10), storecheck.Rule(t, "ccc", law.Continuous, time.Second, 1000)
	w.took(t, 0, 2, []law.Rule{a, b}, 1, 1)
	w.took(t, time.Second, 2|apart, []law.Rule{a, b}, 1, 0)
	w.took(t, 2*time.Second, 2|apart, []law.Rule{a, b}, 0, 2)
	w.peeks(t, 2*time.Second, []law.Rule{b, a})
	w.took(t, 3*time.Second, 2, []law.Rule{a, b}, 1, 1)
	w.took(t, 3*time.Second, 2, []law.Rule{b, a}, 1, 1)
	assert.True(t, lawOf(w.raw(t), &b), "in the order of the last admitted call")
	w.peeks(t, 3*time.Second, []law.Rule{a, b})
	w.took(t, 3*time.Second, 2, []law.Rule{a}, 1)
	assert.True(t, lawOf(w.raw(t), &a))
	w.peeks(t, 3*time.Second, []law.Rule{b})
	w.took(t, 4*time.Second, 3|apart, []law.Rule{c}, 900)
	w.peeks(t, 4*time.Second, []law.Rule{a, b, c})
	w.took(t, 4*time.Second, 3|apart, []law.Rule{b, c}, 1, 100)
	w.took(t, 4*time.Second, 3, []law.Rule{c, b, a}, 0, 1, 1)
	w.took(t, 4*time.Second+500*time.Millisecond, 3|apart|wide, []law.Rule{a, storecheck.Rule(t, "bb", law.SlidingLog, 2*time.Hour, 1<<33)}, 1, 1<<33-10)
	w.peeks(t, 5*time.Second, []law.Rule{c, b, a})
	w.took(t, 3*time.Hour, 1, []law.Rule{a}, 1)
	w.peeks(t, 3*time.Hour, []law.Rule{c, b, a})
}

// From 255 holds on, their number takes two more bytes.
func TestALogOf256Holds(t *testing.T) {
	t.Parallel()
	w := newTwin(t, servers.RedisURL(t))
	rules := []law.Rule{storecheck.Rule(t, "log", law.SlidingLog, time.Hour, 256)}
	for i := range 256 {
		w.took(t, time.Duration(i)*time.Second, 1, rules, 1)
		n := 3 + (1 + 3 + 6) + 1 + 7 + 11*(i+1)
		if i+1 >= 255 {
			n += 2
		}
		require.Len(t, w.raw(t), n)
	}
	require.False(t, w.ask(t, 256*time.Second, storage.Take, rules, 1))
	w.peeks(t, 256*time.Second, rules)
	w.took(t, time.Hour+100*time.Second, 1, rules, 1)
	w.peeks(t, time.Hour+100*time.Second, rules)
}

// formRules returns three random rules. Their laws and capacities are such that all forms of a value occur.
func formRules(t *testing.T, rnd *rand.Rand) (rules []law.Rule) {
	t.Helper()
	for i := range 3 {
		kind, period := law.Kind(rnd.IntN(int(allKinds))), []time.Duration{time.Second, time.Minute, time.Hour}[rnd.IntN(3)]
		n := rnd.IntN(5)
		if kind == law.Continuous { // another refill gets another period: under the same one Redis could forget a level that is full by its old refill
			period += time.Duration(n) * time.Second
		}
		rules = append(rules, storecheck.Rule(t, fmt.Sprint("bucket-", i), kind, period, []int64{5, 400, 1<<30 - 1, 1 << 30, 1 << 33}[n]))
	}
	return rules
}

func TestAllFormsOfAValueAreReadAsTheyWereWritten(t *testing.T) {
	t.Parallel()
	url := servers.RedisURL(t)
	flags := map[byte]int{}
	for seed := range uint64(10) {
		w, rnd, at := newTwin(t, url), rand.New(rand.NewPCG(11, seed)), time.Duration(0)
		rules := formRules(t, rnd)
		for range 150 {
			if rnd.IntN(25) == 0 {
				rules[rnd.IntN(3)] = formRules(t, rnd)[0]
				for i := range rules {
					rules[i].Name = fmt.Sprint("bucket-", i)
				}
			}
			at += time.Duration(rnd.Int64N(2)*rnd.Int64N(int64(10*time.Second))) / 1000 * 1000
			w.randomly(t, rnd, at, rules)
		}
		for f, n := range w.flags {
			flags[f] += n
		}
	}
	t.Log(flags)
	for _, f := range []byte{0, wide, apart, wide | apart} {
		assert.Greater(t, flags[f], 50, "flags %d", f)
	}
}

// randomly makes a call for some of the rules, in any order, with random costs.
func (w *twin) randomly(t *testing.T, rnd *rand.Rand, at time.Duration, rules []law.Rule) {
	t.Helper()
	some := slices.Clone(rules)
	rnd.Shuffle(len(some), func(i, j int) { some[i], some[j] = some[j], some[i] })
	some = some[:1+rnd.IntN(3)]
	var costs []int64
	for _, r := range some {
		costs = append(costs, []int64{0, 1, 2, rnd.Int64N(r.Capacity)}[rnd.IntN(4)])
	}
	w.ask(t, at, []storage.Mode{storage.Take, storage.Take, storage.Take, storage.Force, storage.Peek}[rnd.IntN(5)], some, costs...)
}

// zoo are identifiers that could make the keys of two names equal, if anything could.
var zoo = []string{":", "::", "a", "a:a", "a:", ":a", "a.a", "{", "}", "{}", "{}{", "{a}", "{}:a", "}{", "a{a}a", ":{}", ":{}{", "\x00", "a\x00", "\x00a", "\n", "日本"}

// tagBeforeNUL matches the hash tag in the key of an identifier with a NUL.
var tagBeforeNUL = regexp.MustCompile(`:\{[0-9a-z]+\}(a?\x00)`)

func keysOf(t *testing.T, c *goredis.Client) []string {
	t.Helper()
	keys, err := c.Keys(t.Context(), "*").Result()
	require.NoError(t, err)
	slices.Sort(keys)
	return keys
}

func TestKeysAreAsDocumentedAndNoTwoIdentifiersShareOne(t *testing.T) {
	t.Parallel()
	for _, prefix := range []string{"", "p", "p{x}:", "日本\x00"} {
		server := servers.Redis(t)
		s, c := open(t, server.URL(), redisstore.Options{Prefix: prefix}), client(t, server.URL())
		var want []string
		for _, name := range []string{"", "a", "a.a", "-"} {
			for _, id := range zoo {
				r := storecheck.FivePerHour(t, id)
				r.Name = name
				require.Equal(t, 1, storecheck.Take(t, s, r, 1))
				mark := ":"
				if strings.Contains(id, "{") {
					mark = ":{}"
				}
				first := prefix
				if prefix == "" {
					first = "throttler:"
				}
				want = append(want, first+name+mark+id)
			}
		}
		slices.Sort(want)
		got := keysOf(t, c)
		for i := range got {
			got[i] = tagBeforeNUL.ReplaceAllString(got[i], ":$1")
		}
		slices.Sort(got)
		assert.Equal(t, want, got)
		assert.Len(t, slices.Compact(want), 4*len(zoo))
	}
}

func TestTheHashTagStandsInBracesAfterThePrefix(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	tags := map[string]string{"a/1": "a", "{a}/1": "{a}", "none": "", "}": "}x}"}
	s, c := open(t, server.URL(), redisstore.Options{Prefix: "p:", HashTag: func(id string) string { return tags[id] }}), client(t, server.URL())
	for id := range tags {
		r := storecheck.FivePerHour(t, id)
		r.Name = "n"
		require.Equal(t, 1, storecheck.Take(t, s, r, 1))
	}
	assert.Equal(t, []string{"p:{)x)}n:}", "p:{a}n:a/1", "p:{{a)}n:{}{a}/1", "p:{}n:none"}, keysOf(t, c))
}
