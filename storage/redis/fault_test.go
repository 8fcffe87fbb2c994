package redis_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	redisstore "github.com/go-throttler/throttler/storage/redis"
	"github.com/go-throttler/throttler/storage/storagetest"
)

// prompt is for tests of calls that are not answered: the default timeout instead of storecheck.Patient.
var prompt = redisstore.Options{Timeout: redisstore.DefaultTimeout}

// chargeOf returns a charge of n tokens from each bucket of r.
func chargeOf(r storecheck.Request, n int64) *storage.Charge {
	c := &storage.Charge{Name: r.Name, Clocked: r.Clocked, Now: r.Now, Identifier: r.Parts[0].Identifier, Rules: r.Parts[0].Rules}
	for range c.Rules.Rules {
		c.Amounts = append(c.Amounts, storage.Amount{N: n, In: time.Hour.Microseconds()})
	}
	return c
}

// debtOf is chargeOf for a debt.
func debtOf(r storecheck.Request, n int64) replica.Debt {
	d := replica.Debt{Name: r.Name, Clocked: r.Clocked, Now: r.Now, Identifier: r.Parts[0].Identifier, Rules: r.Parts[0].Rules}
	for _, a := range chargeOf(r, n).Amounts {
		d.Amounts = append(d.Amounts, []storage.Amount{a})
	}
	return d
}

// do sends a command that must succeed.
func do(t testing.TB, c *goredis.Client, command ...any) any {
	t.Helper()
	answer, err := c.Do(t.Context(), command...).Result()
	require.NoError(t, err, "%.200s", fmt.Sprint(command...))
	return answer
}

// repeatedly calls f with a pause in between until stop is closed, and returns how often.
func repeatedly(pause time.Duration, stop <-chan struct{}, f func()) (n int) {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return n
		case <-tick.C:
			f()
			n++
		}
	}
}

func TestCallsOnAFrozenServerReturnInTimeAndWorkAfterIt(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s, r := open(t, server.URL(), prompt), storecheck.Hourly(t, "frozen", 20)
	var before, after storecheck.Told
	storecheck.Recovery(t, storecheck.Patient, func() error { return before.Ask(s, r) })
	require.NoError(t, server.Freeze())
	storecheck.AssertBackAfter(t, 100*time.Millisecond, storecheck.Timed(9, func() {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		began := time.Now()
		_, err := storecheck.Decide(ctx, s, r)
		if time.Since(began) < prompt.Timeout { // else the machine is so busy that both have passed
			assert.ErrorIs(t, err, context.DeadlineExceeded, "the caller's context ended")
		}
	}))
	storecheck.AssertBackAfter(t, prompt.Timeout, storecheck.Timed(5, func() {
		_, err := storecheck.Decide(t.Context(), s, r)
		assert.ErrorIs(t, err, storage.ErrUnavailable)
		assert.NotErrorIs(t, err, context.DeadlineExceeded, "the context that ended is not the caller's")
	}))

	require.NoError(t, server.Thaw())
	t.Log("works after", storecheck.Recovery(t, 5*time.Second, func() error { return after.Ask(s, r) }))
	for range 20 {
		require.NoError(t, after.Ask(s, r))
	}
	assert.LessOrEqual(t, after.Admitted.Load(), int64(19), "more than the limit was admitted")
	assert.GreaterOrEqual(t, after.Admitted.Load(), 19-14-before.Failed.Load()-after.Failed.Load(), "more was charged than was asked")
}

func TestCallsThatFindTheServerFrozenAtFirstReturnInTime(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	require.NoError(t, server.Freeze())
	s, r := open(t, server.URL(), prompt), storecheck.FivePerHour(t, "frozen")
	storecheck.AssertBackAfter(t, prompt.Timeout, storecheck.Timed(5, func() {
		_, err := storecheck.Decide(t.Context(), s, r)
		assert.ErrorIs(t, err, storage.ErrUnavailable)
	}))
	require.NoError(t, server.Thaw())
	storecheck.Recovery(t, 5*time.Second, func() error { return s.Reset(t.Context(), "", "frozen") })
	assert.Equal(t, 5, storecheck.Take(t, s, r, 7))
}

// A call whose context cannot end waits for the socket itself if nothing else is in flight.
func TestACallWithoutAContextReturnsInTime(t *testing.T) {
	t.Parallel()
	server, r := servers.Redis(t), storecheck.FivePerHour(t, "a")
	l := newLink(t, server.Addr())
	url := "redis://" + l.Addr().String() + "?pool_size=1&read_timeout=5s&write_timeout=5s&dial_timeout=5s&pool_timeout=5s"
	known, unknown, watched := open(t, url, prompt), open(t, url, prompt), open(t, url, redisstore.Options{})
	seen := watchOf(t, watched, prompt.Timeout)
	for _, s := range []*redisstore.Storage{known, watched} {
		_, err := storecheck.Decide(context.Background(), s, r)
		require.NoError(t, err)
	}
	require.NoError(t, seen.next(t))
	require.NoError(t, server.Freeze())
	for name, s := range map[string]*redisstore.Storage{"with a connection": known, "without one": unknown, "watched": watched} {
		storecheck.Crowd(3, func(int) { // two batches in flight, which share one connection, and one call that waits
			storecheck.AssertBackAfter(t, prompt.Timeout, storecheck.Timed(3, func() {
				_, err := storecheck.Decide(context.Background(), s, r)
				assert.ErrorIs(t, err, storage.ErrUnavailable, name)
				assert.NotErrorIs(t, err, context.DeadlineExceeded, name)
			}))
		})
	}
	for _, err := range seen.take() {
		assert.ErrorIs(t, err, storage.ErrUnavailable)
	}
	require.NoError(t, server.Thaw())
	for _, s := range []*redisstore.Storage{known, unknown, watched} {
		storecheck.Recovery(t, 5*time.Second, func() error { return s.Reset(context.Background(), "", "a") })
	}
	assert.Equal(t, 5, storecheck.Take(t, known, r, 7))
}

func TestCallsWithAndWithoutAContextTakeExactlyTheLimit(t *testing.T) {
	t.Parallel()
	s, r := open(t, servers.RedisURL(t), redisstore.Options{}), storecheck.Hourly(t, "exact", 300)
	var admitted atomic.Int64
	storecheck.Crowd(50, func(i int) {
		ctx := context.Background()
		if i%2 == 0 {
			ctx = t.Context()
		}
		for range 8 {
			v, err := storecheck.Decide(ctx, s, r)
			if assert.NoError(t, err) && v.Allowed {
				admitted.Add(1)
			}
		}
	})
	assert.EqualValues(t, 300, admitted.Load())
}

// TestMain finds goroutines that Close leaves behind.
func TestCloseOnAFrozenServerReturnsInTime(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s := open(t, server.URL(), prompt)
	require.Equal(t, 1, storecheck.Take(t, s, storecheck.FivePerHour(t, "a"), 1))
	require.NoError(t, server.Freeze())
	storecheck.Crowd(20, func(i int) {
		_, err := storecheck.Decide(endsOnceBegun(t), s, storecheck.FivePerHour(t, "a")) // the batches stay in flight
		assert.ErrorIs(t, err, context.Canceled)
	})
	took := storecheck.Timed(1, func() { assert.NoError(t, s.Close(context.Background())) })
	assert.Less(t, took[0], prompt.Timeout+time.Second, "Close hung")
	assert.Greater(t, took[0], time.Millisecond, "Close did not wait for what was sent")
	_, err := storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, "a"))
	assert.ErrorIs(t, err, storage.ErrClosed)
}

func TestCloseWaitsNoLongerThanItsContext(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s := open(t, server.URL(), redisstore.Options{Timeout: time.Hour})
	require.Equal(t, 1, storecheck.Take(t, s, storecheck.FivePerHour(t, "a"), 1))
	require.NoError(t, server.Freeze())
	ctx := endsOnceBegun(t)
	_, err := storecheck.Decide(ctx, s, storecheck.FivePerHour(t, "a"))
	require.ErrorIs(t, err, context.Canceled)
	assert.ErrorIs(t, s.Close(ctx), context.Canceled, "a call is in flight")
	require.NoError(t, server.Thaw())
}

// eachNode returns one request for each node, by the place of its key. Each request has been made once.
func eachNode(t testing.TB, s *redisstore.Storage, cluster *servers.Cluster) (of []storecheck.Request) {
	t.Helper()
	c := client(t, cluster.Nodes[0].URL())
	for i := 0; len(of) < len(cluster.Nodes); i++ {
		id := fmt.Sprint("id-", i)
		slot := do(t, c, "cluster", "keyslot", redisstore.DefaultPrefix+":"+id).(int64)
		if int(slot)*len(cluster.Nodes)/16384 == len(of) { // all nodes have the same number of slots
			of = append(of, storecheck.Hourly(t, id, 1000))
			storecheck.Recovery(t, 5*time.Second, func() error { return new(storecheck.Told).Ask(s, of[len(of)-1]) })
		}
	}
	return of
}

func TestAFrozenClusterNodeDelaysOnlyItsOwnKeys(t *testing.T) {
	t.Parallel()
	cluster := servers.RedisCluster(t, 3)
	s := open(t, clusterURL(cluster), prompt)
	of := eachNode(t, s, cluster)
	require.NoError(t, cluster.Nodes[1].Freeze())
	storecheck.AssertBackAfter(t, prompt.Timeout, storecheck.Timed(5, func() {
		_, err := storecheck.Decide(t.Context(), s, of[1])
		assert.ErrorIs(t, err, storage.ErrUnavailable)
		assert.NotErrorIs(t, err, context.DeadlineExceeded)
	}))
	for _, n := range []int{0, 2} {
		took := storecheck.Timed(21, func() { assert.NoError(t, new(storecheck.Told).Ask(s, of[n])) })
		slices.Sort(took)
		assert.Less(t, took[10], prompt.Timeout/2, "the other nodes must answer as ever")
	}
	require.NoError(t, cluster.Nodes[1].Thaw())
	t.Log("works after", storecheck.Recovery(t, 10*time.Second, func() error { return new(storecheck.Told).Ask(s, of[1]) }))
}

func TestCallsThatFindTheClusterFrozenAtFirstReturnInTime(t *testing.T) {
	t.Parallel()
	cluster := servers.RedisCluster(t, 1)
	require.NoError(t, cluster.Nodes[0].Freeze())
	addr := cluster.Addrs()[0]
	s := open(t, "redis://"+addr+"?addr="+addr+"&read_timeout=5s&dial_timeout=5s", prompt)
	r := storecheck.FivePerHour(t, "a")
	storecheck.AssertBackAfter(t, prompt.Timeout, storecheck.Timed(5, func() {
		_, err := storecheck.Decide(t.Context(), s, r)
		assert.ErrorIs(t, err, storage.ErrUnavailable)
		assert.NotErrorIs(t, err, context.DeadlineExceeded)
	}))
	storecheck.AssertBackAfter(t, 100*time.Millisecond, storecheck.Timed(5, func() {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := storecheck.Decide(ctx, s, r)
		assert.ErrorIs(t, err, context.DeadlineExceeded)
	}))
	require.NoError(t, cluster.Nodes[0].Thaw())
	t.Log("works after", storecheck.Recovery(t, 10*time.Second, func() error { return s.Reset(t.Context(), "", "a") }))
	assert.Equal(t, 3, storecheck.Take(t, s, r, 3))

	require.NoError(t, cluster.Nodes[0].Freeze())
	storecheck.AssertBackAfter(t, prompt.Timeout, storecheck.Timed(5, func() {
		_, err := storecheck.Decide(t.Context(), s, r)
		assert.ErrorIs(t, err, storage.ErrUnavailable)
	}))
	require.NoError(t, cluster.Nodes[0].Thaw())
}

// fault is a state in which a server refuses calls.
type fault struct {
	name    string
	config  []string
	cause   func(testing.TB, *goredis.Client) (cure func())
	is      func(error) bool
	says    string
	answers bool // calls that change nothing still work
}

var faults = []fault{
	{"its memory is full", nil, fillMemory, goredis.IsOOMError, "OOM", true},
	{"it is a replica", nil, sends("replicaof 127.0.0.1 1", "replicaof no one"), goredis.IsReadOnlyError, "READONLY", true},
	{"it is a replica that has lost its primary", []string{"--replica-serve-stale-data", "no"},
		sends("replicaof 127.0.0.1 1", "replicaof no one"), goredis.IsMasterDownError, "MASTERDOWN", false},
	{"it has too few replicas", nil, sends("config set min-replicas-to-write 1", "config set min-replicas-to-write 0"), goredis.IsNoReplicasError, "NOREPLICAS", true},
	{"it cannot save its data", []string{"--save", "3600 1000000", "--dbfilename", "folder"}, failToSave, isMisconfigured, "MISCONF", true},
	{"it wants a password", nil, wantPassword, goredis.IsAuthError, "NOAUTH", false},
	{"it allows no scripts", nil, sends("acl setuser default -evalsha", "acl setuser default +evalsha"), goredis.IsPermissionError, "NOPERM", false},
	{"it allows no writing", nil, sends("acl setuser default -set -del", "acl setuser default +set +del"), isForbiddenInside, "script", true},
	{"it allows no key of ours", nil, sends("acl setuser default resetkeys ~others:*", "acl setuser default ~*"), goredis.IsPermissionError, "NOPERM", false},
	{"it runs another script", []string{"--lua-time-limit", "10"}, runForever, isBusy, "BUSY", false},
	{"it loads its data", []string{"--enable-debug-command", "yes"}, loadSlowly, goredis.IsLoadingError, "LOADING", false},
}

func isMisconfigured(err error) bool { return goredis.HasErrorPrefix(err, "MISCONF") }
func isBusy(err error) bool          { return goredis.HasErrorPrefix(err, "BUSY") }

// isForbiddenInside recognises the error of a script that used a forbidden command. Redis has no code for it: version
// 7.0 has the first text, and later versions have the second.
func isForbiddenInside(err error) bool {
	return goredis.HasErrorPrefix(err, "The user executing the script can't run this command") || goredis.HasErrorPrefix(err, "ACL failure in script")
}

// sendWords sends a command whose words contain no spaces. It must succeed.
func sendWords(t testing.TB, c *goredis.Client, command string) {
	t.Helper()
	var words []any
	for word := range strings.FieldsSeq(command) {
		words = append(words, word)
	}
	do(t, c, words...)
}

// sends returns a fault that one command causes and another one cures.
func sends(cause, cure string) func(testing.TB, *goredis.Client) func() {
	return func(t testing.TB, c *goredis.Client) func() {
		sendWords(t, c, cause)
		return func() { sendWords(t, c, cure) }
	}
}

// fillMemory writes other keys, and then lowers maxmemory below what they need.
func fillMemory(t testing.TB, c *goredis.Client) (cure func()) {
	const n = 1000
	for i := range n {
		do(t, c, "set", fmt.Sprint("other-", i), strings.Repeat("x", 4000))
	}
	sendWords(t, c, "config set maxmemory 3mb")
	require.True(t, goredis.IsOOMError(c.Set(t.Context(), "other", "x", 0).Err()), "the memory is not full")
	return func() {
		for i := range n {
			do(t, c, "del", fmt.Sprint("other-", i))
		}
	}
}

// failToSave puts a folder in place of the file in which the server saves its data. Then the server refuses changes.
func failToSave(t testing.TB, c *goredis.Client) (cure func()) {
	folder := filepath.Join(c.ConfigGet(t.Context(), "dir").Val()["dir"], "folder")
	require.NoError(t, os.MkdirAll(filepath.Join(folder, "is not empty"), 0o700))
	sendWords(t, c, "bgsave")
	saved := func(status string) {
		storecheck.Recovery(t, 10*time.Second, func() error {
			if info := c.Info(t.Context(), "persistence").Val(); !strings.Contains(info, "rdb_last_bgsave_status:"+status) {
				return errors.New(info)
			}
			return nil
		})
	}
	saved("err")
	return func() {
		require.NoError(t, os.RemoveAll(folder))
		sendWords(t, c, "bgsave")
		saved("ok")
	}
}

// wantPassword sets a password, and closes the connections that were made without one.
func wantPassword(t testing.TB, c *goredis.Client) (cure func()) {
	sendWords(t, c, "config set requirepass secret")
	sendWords(t, c, "client kill type normal skipme yes")
	return func() { do(t, c, "config", "set", "requirepass", "") }
}

// runForever makes the server run a script that only SCRIPT KILL ends.
func runForever(t testing.TB, c *goredis.Client) (cure func()) {
	return inBackground(t, c, []any{"eval", "while true do end", 0}, isBusy, "script kill")
}

// loadSlowly makes the server load keys for a minute, or until cure is called.
func loadSlowly(t testing.TB, c *goredis.Client) (cure func()) {
	sendWords(t, c, "debug populate 60000 other 10")
	sendWords(t, c, "config set loading-process-events-interval-bytes 1024")
	sendWords(t, c, "config set key-load-delay 1000")
	return inBackground(t, c, []any{"debug", "reload"}, goredis.IsLoadingError, "config set key-load-delay 0")
}

// inBackground sends a command during which the server refuses others. Cure sends end, which ends the command.
func inBackground(t testing.TB, c *goredis.Client, command []any, refuses func(error) bool, end string) (cure func()) {
	busy := c.WithTimeout(time.Minute)
	var ended sync.WaitGroup
	ended.Go(func() { _ = busy.Do(context.Background(), command...).Err() }) // the error of a script that was killed
	storecheck.Recovery(t, 10*time.Second, func() error {
		if err := c.Get(t.Context(), "other").Err(); !refuses(err) {
			return fmt.Errorf("it answers %w", err)
		}
		return nil
	})
	return func() {
		sendWords(t, c, end)
		ended.Wait()
	}
}

func TestAServerThatRefusesSaysWhyAndChargesNothing(t *testing.T) {
	t.Parallel()
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			server := servers.Redis(t, f.config...)
			s, admin := open(t, server.URL(), redisstore.Options{}), client(t, server.URL())
			some, none := storecheck.FivePerHour(t, "some"), storecheck.FivePerHour(t, "none")
			require.Equal(t, 2, storecheck.Take(t, s, some, 2))
			require.Equal(t, 5, storecheck.Take(t, s, none, 6))
			cure := f.cause(t, admin)
			f.assertRefused(t, s, some)
			if f.answers {
				assert.Equal(t, int64(2), storecheck.Spent(t, s, some), "a Peek")
				d, err := s.Debt(t.Context(), debtOf(some, 0))
				assert.NoError(t, err)
				assert.Equal(t, int64(2), d.Amounts[0][0].N)
				assert.Equal(t, 0, storecheck.Take(t, s, none, 3), "a call that is denied")
			}
			cure()
			assert.Equal(t, int64(2), storecheck.Spent(t, s, some), "what was refused was charged")
			assert.Equal(t, 3, storecheck.Take(t, s, some, 5), "what was refused was charged")
			assert.Equal(t, 0, storecheck.Take(t, s, none, 3))
		})
	}
}

// assertRefused asserts that all calls that would change something fail with the error of the fault.
func (f *fault) assertRefused(t *testing.T, s *redisstore.Storage, r storecheck.Request) {
	t.Helper()
	for call, ask := range allCalls {
		if call == "Peek" || call == "Reset" || call == "Debt" {
			continue
		}
		_, err := ask(t.Context(), s, r)
		assert.ErrorIs(t, err, storage.ErrUnavailable, call)
		assert.True(t, f.is(err), "%s: the cause must be told from others, in %v", call, err)
		assert.ErrorContains(t, err, f.says, call)
		for _, other := range []error{storage.ErrCorruptState, storage.ErrClosed, context.DeadlineExceeded, context.Canceled} {
			assert.NotErrorIs(t, err, other, call)
		}
	}
}

func TestAWrongPasswordIsAnAuthenticationError(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t, "--requirepass", "secret")
	for _, login := range []string{"", ":wrong@", "nobody:secret@"} {
		_, err := storecheck.Decide(t.Context(), open(t, "redis://"+login+server.Addr(), redisstore.Options{}), storecheck.FivePerHour(t, "a"))
		assert.ErrorIs(t, err, storage.ErrUnavailable)
		assert.True(t, goredis.IsAuthError(err), "%q: %v", login, err)
		assert.NotContains(t, fmt.Sprint(err), "secret")
	}
	assert.Equal(t, 5, storecheck.Take(t, open(t, "redis://:secret@"+server.Addr(), redisstore.Options{}), storecheck.FivePerHour(t, "a"), 7))
}

// mustStay returns a function which asserts that the key has not changed since mustStay was called.
func mustStay(t testing.TB, c *goredis.Client, key string) func(after string) {
	t.Helper()
	value := func() string { return fmt.Sprintf("%q", do(t, c, "dump", key)) }
	before, lives := value(), c.PTTL(t.Context(), key).Val()
	return func(after string) {
		t.Helper()
		assert.Equal(t, before, value(), "%s changed the value", after)
		left := c.PTTL(t.Context(), key).Val()
		assert.LessOrEqual(t, left, lives, "%s changed the time to live", after)
		assert.Greater(t, left, lives-time.Minute, "%s changed the time to live", after)
	}
}

// anyCall is any call that can be made for a request. A call that is no decision returns an empty verdict.
type anyCall func(context.Context, *redisstore.Storage, storecheck.Request) (storecheck.Verdict, error)

var allCalls = map[string]anyCall{
	"Take":  inMode(storage.Take),
	"Peek":  inMode(storage.Peek),
	"Force": inMode(storage.Force),
	"Charge": wordless(func(ctx context.Context, s *redisstore.Storage, r storecheck.Request) error {
		return s.Charge(ctx, chargeOf(r, 1))
	}),
	"Refund": wordless(func(ctx context.Context, s *redisstore.Storage, r storecheck.Request) error {
		return s.Charge(ctx, chargeOf(r, -1))
	}),
	"Raise": wordless(func(ctx context.Context, s *redisstore.Storage, r storecheck.Request) error {
		return s.Raise(ctx, debtOf(r, 4))
	}),
	"Debt": wordless(func(ctx context.Context, s *redisstore.Storage, r storecheck.Request) error {
		_, err := s.Debt(ctx, debtOf(r, 4))
		return err
	}),
	"Fresh": func(ctx context.Context, s *redisstore.Storage, r storecheck.Request) (storecheck.Verdict, error) {
		v, err := storecheck.DecideFresh(ctx, s, r, ago(-1))
		if errors.Is(err, redisstore.ErrStale) { // the server does not have the script yet
			return storecheck.Decide(ctx, s, r)
		}
		return v, err
	},
	"Reset": wordless(func(ctx context.Context, s *redisstore.Storage, r storecheck.Request) error {
		return s.Reset(ctx, r.Name, r.Parts[0].Identifier)
	}),
}

func inMode(mode storage.Mode) anyCall {
	return func(ctx context.Context, s *redisstore.Storage, r storecheck.Request) (storecheck.Verdict, error) {
		r.Mode = mode
		return storecheck.Decide(ctx, s, r)
	}
}

func wordless(call func(context.Context, *redisstore.Storage, storecheck.Request) error) anyCall {
	return func(ctx context.Context, s *redisstore.Storage, r storecheck.Request) (storecheck.Verdict, error) {
		return storecheck.Verdict{}, call(ctx, s, r)
	}
}

func TestWhatOthersKeepAtAKeyIsAnErrorAndStays(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s, c := open(t, server.URL(), redisstore.Options{}), client(t, server.URL())
	for i, other := range []struct {
		write     []any
		wrongType bool
	}{
		{[]any{"hset", "KEY", "field", "value"}, true},
		{[]any{"rpush", "KEY", "element"}, true},
		{[]any{"sadd", "KEY", "member"}, true},
		{[]any{"zadd", "KEY", "1", "member"}, true},
		{[]any{"xadd", "KEY", "*", "field", "value"}, true},
		{[]any{"set", "KEY", "a value of somebody else"}, false},
		{[]any{"set", "KEY", ""}, false},
		{[]any{"set", "KEY", "t"}, false},
		{[]any{"set", "KEY", "T2"}, false},
		{[]any{"set", "KEY", "t1 of an earlier version"}, false},
		{[]any{"set", "KEY", "t3 of a later version"}, false},
		{[]any{"set", "KEY", "12"}, false},
		{[]any{"setbit", "KEY", "8000000", "1"}, false},
		{[]any{"pfadd", "KEY", "element"}, false},
	} {
		r := storecheck.FivePerHour(t, fmt.Sprint(i))
		key := redisstore.DefaultPrefix + ":" + r.Parts[0].Identifier
		other.write[1] = key
		do(t, c, other.write...)
		for _, seconds := range []int{0, 1000} {
			if seconds > 0 {
				do(t, c, "expire", key, seconds)
			}
			check := mustStay(t, c, key)
			for call, ask := range allCalls {
				_, err := ask(t.Context(), s, r)
				check(call)
				assert.ErrorIs(t, err, storage.ErrCorruptState, "%s on %v", call, other.write)
				assert.NotErrorIs(t, err, storage.ErrUnavailable, "%s on %v", call, other.write)
				assert.Equal(t, other.wrongType, errors.Is(err, redisstore.ErrWrongType), "%s on %v: %v", call, other.write, err)
				assert.ErrorContains(t, err, key, "it says where")
			}
		}
	}
}

func TestAKeyOfOthersDoesNotDisturbTheFlightThatItIsIn(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s, c := open(t, server.URL(), redisstore.Options{}), client(t, server.URL())
	do(t, c, "hset", redisstore.DefaultPrefix+":hash", "field", "value")
	do(t, c, "set", redisstore.DefaultPrefix+":string", "value")
	ours, others := storecheck.Told{}, storecheck.Told{}
	storecheck.Crowd(64, func(i int) {
		id, count := []string{"hash", "string", "a", "b"}[i%4], &ours
		if i%4 < 2 {
			count = &others
		}
		r := storecheck.Hourly(t, id, 300)
		if i%8 == 0 { // an identifier of ours in one call with a key of theirs
			r.Parts = append(r.Parts, storecheck.NewPart("a", r.Parts[0].Rules.Rules, 1))
		}
		for range 25 {
			if err := count.Ask(s, r); i%4 < 2 {
				assert.ErrorIs(t, err, storage.ErrCorruptState)
				assert.NotErrorIs(t, err, storage.ErrUnavailable)
				assert.Equal(t, id == "hash", errors.Is(err, redisstore.ErrWrongType), "%s: %v", id, err)
			} else {
				assert.NoError(t, err, "%s was disturbed", id)
			}
		}
	})
	assert.Equal(t, int64(600), ours.Admitted.Load(), "two limits of 300, of which the calls with a key of others take none")
	assert.Equal(t, int64(200), ours.Denied.Load())
	assert.Equal(t, int64(800), others.Failed.Load())
}

// epoch is the time of the values that are corrupted.
const epoch = 1_700_000_000_000_000

// realValues returns requests that store values of all forms. The last request of a list is made again on each
// corruption of the value.
func realValues(t testing.TB) map[string][]storecheck.Request {
	at := func(now time.Duration, cost int64, rules ...law.Rule) storecheck.Request {
		return storecheck.Request{Clocked: true, Now: epoch + now.Microseconds(), Parts: []storecheck.Part{storecheck.NewPart("corrupt", rules, cost)}}
	}
	all := map[string][]storecheck.Request{}
	for _, kind := range storecheck.Kinds {
		all[kind.String()] = []storecheck.Request{at(0, 2, storecheck.Rule(t, "a", kind, time.Hour, 5))}
	}
	year, huge := 366*24*time.Hour, int64(1)<<40
	all["wide"] = []storecheck.Request{at(0, huge/2, storecheck.Rule(t, "a", law.Replenish, time.Hour, huge))}
	all["in seconds"] = []storecheck.Request{at(0, 3, storecheck.Rule(t, "a", law.Continuous, year, 10_000_000), storecheck.Rule(t, "b", law.SlidingWindow, year, 10_000_000))}
	log := storecheck.Rule(t, "a", law.SlidingLog, time.Minute, 300)
	all["several holds"] = []storecheck.Request{at(0, 1, log), at(time.Second, 1, log), at(2*time.Second, 1, log)}
	all["of others"] = []storecheck.Request{all["in seconds"][0], at(0, 1, storecheck.Rule(t, "c", law.Replenish, time.Hour, 7))}
	b, c := storecheck.Rule(t, "b", law.Continuous, time.Hour, 7), storecheck.Rule(t, "c", law.SlidingWindow, time.Hour, 7)
	all["changed apart"] = []storecheck.Request{at(0, 1, log, b, c), at(time.Second, 1, c), at(2*time.Second, 1, b)}
	return all
}

// corruptions returns all prefixes of a value, and copies of it with one byte changed.
func corruptions(value string) (all []string) {
	for i := range len(value) {
		all = append(all, value[:i])
		for _, b := range []byte{0, 0x1f, 0xff, value[i] ^ 1, value[i] + 1} {
			if b != value[i] {
				all = append(all, value[:i]+string([]byte{b})+value[i+1:])
			}
		}
	}
	return all
}

func TestACorruptValueIsAnErrorOrAVerdictAndNothingElse(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	for name, requests := range realValues(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, c := open(t, server.URL(), redisstore.Options{}), client(t, server.URL())
			var r storecheck.Request
			for _, r = range requests {
				r.Name = name
				_, err := storecheck.Decide(t.Context(), s, r)
				require.NoError(t, err)
			}
			key := redisstore.DefaultPrefix + name + ":corrupt"
			for _, value := range corruptions(do(t, c, "get", key).(string)) {
				if assertCorruptOrValid(t, s, c, key, value, r); t.Failed() {
					return // the other failures would mostly be the same
				}
			}
		})
	}
}

// assertCorruptOrValid makes each call on the value. It must either fail with ErrCorruptState and leave the value
// alone, or return a valid verdict and leave a value that can be read.
func assertCorruptOrValid(t *testing.T, s *redisstore.Storage, c *goredis.Client, key, value string, r storecheck.Request) {
	t.Helper()
	for call, ask := range allCalls {
		do(t, c, "set", key, value)
		v, err := ask(t.Context(), s, r)
		if err != nil {
			assert.ErrorIs(t, err, storage.ErrCorruptState, "%s on %q", call, value)
			assert.Equal(t, value, do(t, c, "get", key), "%s failed and changed the value", call)
			continue
		}
		assertValid(t, call, value, v)
		v, err = allCalls["Peek"](t.Context(), s, r)
		assert.NoError(t, err, "%s on %q left what cannot be read", call, value)
		assertValid(t, "Peek after "+call, value, v)
	}
}

// assertValid asserts what is true of every verdict.
func assertValid(t *testing.T, call, value string, v storecheck.Verdict) {
	t.Helper()
	assert.GreaterOrEqual(t, v.RetryAfter, time.Duration(0), "%s on %q", call, value)
	assert.Equal(t, v.Parts() > 0 && !v.Allowed, v.RetryAfter > 0, "%s on %q: RetryAfter is %v", call, value, v.RetryAfter)
	for _, l := range v.Levels() {
		assert.True(t, l.Remaining >= 0 && l.Remaining <= l.Limit && l.ResetAfter >= 0 && l.RetryAfter >= 0, "%s on %q: %+v", call, value, l)
	}
}

func TestAStoredEndBeyondAllTimesMakesNoNegativeVerdict(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s, c := open(t, server.URL(), redisstore.Options{}), client(t, server.URL())
	r, key := storecheck.FivePerHour(t, "a"), redisstore.DefaultPrefix+":a"
	require.Equal(t, 5, storecheck.Take(t, s, r, 5))
	value := do(t, c, "get", key).(string)
	end := len(value) - len("NNNN") - 1 // the highest byte of the hold's end
	assertCorruptOrValid(t, s, c, key, value[:end]+"\xff"+value[end+1:], r)
}

func TestStoredTokensWhoseSumFitsNoAnswerAreCorrupt(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s, c := open(t, server.URL(), redisstore.Options{}), client(t, server.URL())
	const key, huge = redisstore.DefaultPrefix + ":a", "\x00\x00\x00\x00\x00\x00\x20" // 2^53 tokens
	for _, kind := range []law.Kind{law.Replenish, law.FixedWindow, law.SlidingWindow, law.SlidingLog} {
		r := storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart("a", []law.Rule{storecheck.Rule(t, "a", kind, time.Hour, 1<<40)}, 1)}}
		require.NoError(t, s.Reset(t.Context(), "", "a"))
		require.Equal(t, 1, storecheck.Take(t, s, r, 1))
		value := do(t, c, "get", key).(string)
		head, hold := value[:len(value)-21], value[len(value)-14:] // before both is the time of change, and before that the number of holds
		value = head[:len(head)-1] + "\x10" + value[len(head):len(head)+7] + strings.Repeat(hold[:7]+huge, 16)
		for call, ask := range allCalls {
			if call == "Reset" {
				continue // it removes what is damaged
			}
			do(t, c, "set", key, value)
			_, err := ask(t.Context(), s, r)
			assert.ErrorIs(t, err, storage.ErrCorruptState, "%v: %s", kind, call)
			assert.Equal(t, value, do(t, c, "get", key), "%v: %s", kind, call)
		}
	}
}

// slowest is a valid value of a bucket that no rule can have: 2^52 units are spent, and one comes back each second.
const slowest = "t2\x21" + "\x04slow" + "\x40\x42\x0f\x00\x00\x20" + "\x01\x00\x00\x00\x00\x00\x00" + "\x40\x42\x0f\x00\x00\x00" + "\x01" +
	"\x00\x00\x00\x00\x00\x00\x00" + "\x00\x00\x00\x00\x00\x00\x00" + "\x00\x00\x00\x00\x00\x00\x10"

func TestAValueThatTakesForeverToExpireFailsNoScript(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s, c := open(t, server.URL(), redisstore.Options{}), client(t, server.URL())
	key := redisstore.DefaultPrefix + ":slow"
	assertCorruptOrValid(t, s, c, key, slowest, storecheck.FivePerHour(t, "slow"))
	do(t, c, "set", key, slowest)
	count := storecheck.Told{}
	storecheck.Crowd(64, func(i int) {
		if i%2 == 0 {
			_ = new(storecheck.Told).Ask(s, storecheck.FivePerHour(t, "slow"))
			return
		}
		assert.NoError(t, count.Ask(s, storecheck.Hourly(t, "neighbour", 16)), "a neighbour in the flight was disturbed")
	})
	count.AssertAccount(t, s, storecheck.Hourly(t, "neighbour", 16))
}

func TestAServerThatIsDownIsAnErrorAtOnceUntilItIsBack(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s, r := open(t, server.URL(), redisstore.Options{}), storecheck.FivePerHour(t, "a")
	require.Equal(t, 2, storecheck.Take(t, s, r, 2))
	require.NoError(t, server.Kill())
	refused := func() {
		_, err := storecheck.Decide(t.Context(), s, r)
		assert.ErrorIs(t, err, storage.ErrUnavailable)
		assert.ErrorIs(t, err, syscall.ECONNREFUSED, "the cause")
	}
	took := storecheck.Timed(11, refused)
	slices.Sort(took)
	assert.Less(t, took[5], 50*time.Millisecond, "that nobody listens is known at once")
	assert.Less(t, took[10], 2*time.Second, "a call waited for a server that is down")
	storecheck.Timed(20*runtime.GOMAXPROCS(0), refused) // until the client's pool does not dial for each call any more
	require.NoError(t, server.Start())
	t.Log("works after", storecheck.Recovery(t, 10*time.Second, func() error { return s.Reset(t.Context(), "", "a") }))
	assert.Equal(t, 5, storecheck.Take(t, s, r, 7))
}

func TestAClusterNodeThatIsDownFailsOnlyItsOwnKeys(t *testing.T) {
	t.Parallel()
	cluster := servers.RedisCluster(t, 3)
	s := open(t, clusterURL(cluster), redisstore.Options{Timeout: time.Second})
	of := eachNode(t, s, cluster)
	require.NoError(t, cluster.Nodes[1].Kill())
	took := storecheck.Timed(21, func() {
		assert.ErrorIs(t, new(storecheck.Told).Ask(s, of[1]), storage.ErrUnavailable)
		assert.NoError(t, new(storecheck.Told).Ask(s, of[0]))
		assert.NoError(t, new(storecheck.Told).Ask(s, of[2]))
	})
	slices.Sort(took)
	assert.Less(t, took[10], 200*time.Millisecond, "that nobody listens is known at once")
	require.NoError(t, cluster.Nodes[1].Start())
	t.Log("works after", storecheck.Recovery(t, 20*time.Second, func() error { return s.Reset(t.Context(), "", of[1].Parts[0].Identifier) }))
	assert.Equal(t, 7, storecheck.Take(t, s, of[1], 7))
}

// storm has the answers to 50 goroutines, which ask for an identifier that they share and each for one of its own.
type storm struct {
	shared storecheck.Told
	own    [50]storecheck.Told
}

func (w *storm) hot(t testing.TB) storecheck.Request { return storecheck.Hourly(t, "shared", 1000) }

func (w *storm) mine(t testing.TB, i int) storecheck.Request {
	return storecheck.Hourly(t, fmt.Sprint("own-", i), 1<<40)
}

// throughStorm lets the goroutines ask for two seconds, while f is called again and again.
func throughStorm(t *testing.T, s *redisstore.Storage, pause time.Duration, f func()) *storm {
	t.Helper()
	w, stop, n := &storm{}, make(chan struct{}), 0
	var weather sync.WaitGroup
	weather.Go(func() { n = repeatedly(pause, stop, f) })
	end := time.Now().Add(2 * time.Second)
	storecheck.Crowd(len(w.own), func(i int) {
		for hot, mine := w.hot(t), w.mine(t, i); time.Now().Before(end); {
			_, _ = w.shared.Ask(s, hot), w.own[i].Ask(s, mine)
		}
	})
	close(stop)
	weather.Wait()
	assert.Greater(t, n, 50, "there was no storm")
	return w
}

// assertAccounts compares what was taken with the answers. It returns how many tokens were taken by calls that
// failed, and how many calls failed.
func (w *storm) assertAccounts(t *testing.T, s *redisstore.Storage) (lost, failed int64) {
	t.Helper()
	lost, failed = w.shared.AssertAccount(t, s, w.hot(t)), w.shared.Failed.Load()
	for i := range w.own {
		lost += w.own[i].AssertAccount(t, s, w.mine(t, i))
		failed += w.own[i].Failed.Load()
	}
	return lost, failed
}

func TestScriptsThatAreForgottenAllTheTimeDoNotMatter(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s, c := open(t, server.URL(), redisstore.Options{}), client(t, server.URL())
	w := throughStorm(t, s, time.Millisecond, func() { assert.NoError(t, c.ScriptFlush(context.Background()).Err()) })
	assert.Equal(t, int64(1000), w.shared.Admitted.Load())
	assert.Zero(t, w.shared.Failed.Load())
	for i := range w.own {
		assert.Zero(t, w.own[i].Failed.Load())
	}
	w.assertAccounts(t, s)
}

func TestConnectionsThatAreClosedAllTheTimeChargeNothingTwice(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s, c := open(t, server.URL(), redisstore.Options{}), client(t, server.URL())
	killed := int64(0)
	w := throughStorm(t, s, 10*time.Millisecond, func() {
		n, err := c.ClientKillByFilter(context.Background(), "TYPE", "normal", "SKIPME", "yes").Result()
		assert.NoError(t, err)
		killed += n
	})
	lost, failed := w.assertAccounts(t, s)
	t.Logf("%d connections closed; %d calls failed, of which %d had taken", killed, failed, lost)
	assert.Greater(t, killed, int64(20), "hardly any connection was closed")
	assert.Positive(t, failed, "no call noticed")
	assert.Equal(t, 5, storecheck.Take(t, s, storecheck.FivePerHour(t, "after"), 7), "it works at once when the storm is over")
}

// leastRights are the rights that a user needs. Every user may send HELLO and AUTH. CLIENT SETINFO is refused without
// harm.
var leastRights = []string{"+evalsha", "+eval", "+get", "+set", "+del", "+time"}

// leastClusterRights are the rights that a user of a cluster needs in addition. Without +command decisions work too,
// but the client keeps asking for it in vain.
var leastClusterRights = []string{"+cluster|slots", "+command"}

// login makes a user with the given rights only, and returns the URL with its credentials.
func login(t testing.TB, c *goredis.Client, url, user string, rights ...string) string {
	t.Helper()
	sendWords(t, c, "acl setuser "+user+" reset on >secret ~throttler:* -@all "+strings.Join(rights, " "))
	return strings.Replace(url, "redis://", "redis://"+user+":secret@", 1)
}

func TestAUserWithTheLeastRightsPassesTheSuite(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	url := login(t, client(t, server.URL()), server.URL(), "app", leastRights...)
	for _, protocol := range []int{2, 3} {
		t.Run(fmt.Sprintf("RESP%d", protocol), func(t *testing.T) {
			t.Parallel()
			s := open(t, fmt.Sprintf("%s?protocol=%d&client_name=", url, protocol), redisstore.Options{})
			storagetest.Run(t, func(testing.TB) storage.Storage { return s })
		})
	}
}

// useAll makes each call, in an order in which both scripts are sent by text and by hash.
func useAll(t testing.TB, s *redisstore.Storage, r storecheck.Request) (failed []error) {
	for _, call := range []string{"Take", "Peek", "Refund", "Force", "Charge", "Raise", "Debt", "Fresh", "Reset"} {
		if _, err := allCalls[call](t.Context(), s, r); err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", call, err))
		}
	}
	return failed
}

func TestEachOfTheLeastRightsIsNeeded(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	c := client(t, server.URL())
	all := open(t, login(t, c, server.URL(), "app", leastRights...), redisstore.Options{})
	assert.Empty(t, useAll(t, all, storecheck.FivePerHour(t, "a")))
	for i, right := range leastRights {
		sendWords(t, c, "script flush")
		s := open(t, login(t, c, server.URL(), fmt.Sprint("app", i), slices.Delete(slices.Clone(leastRights), i, i+1)...), redisstore.Options{})
		failed := useAll(t, s, storecheck.FivePerHour(t, "a"))
		assert.NotEmpty(t, failed, "%s is not needed", right)
		for _, err := range failed {
			assert.ErrorIs(t, err, storage.ErrUnavailable)
			assert.True(t, goredis.IsPermissionError(err) || isForbiddenInside(err), "%v", err)
		}
	}
}

func TestAUserWithTheLeastRightsDecidesOnACluster(t *testing.T) {
	t.Parallel()
	cluster := servers.RedisCluster(t, 2)
	url, lacking := clusterURL(cluster), ""
	for _, node := range cluster.Nodes {
		c := client(t, node.URL())
		lacking = login(t, c, clusterURL(cluster), "lacking", leastRights...)
		url = login(t, c, clusterURL(cluster), "app", append(leastClusterRights, leastRights...)...)
	}
	s := open(t, url, redisstore.Options{})
	for i := range 20 {
		assert.Empty(t, useAll(t, s, storecheck.FivePerHour(t, fmt.Sprint(i))))
	}
	for _, err := range useAll(t, open(t, lacking, redisstore.Options{}), storecheck.FivePerHour(t, "a")) {
		assert.True(t, goredis.IsPermissionError(err), "%v", err)
		assert.ErrorContains(t, err, "cluster|slots")
	}
}

func TestNewReportsWhatCannotWork(t *testing.T) {
	t.Parallel()
	ring := goredis.NewRing(&goredis.RingOptions{})
	defer func() { assert.NoError(t, ring.Close()) }()
	for name, c := range map[string]goredis.UniversalClient{
		"ring": ring, "nil": nil, "nil client": (*goredis.Client)(nil), "nil cluster client": (*goredis.ClusterClient)(nil),
	} {
		_, err := redisstore.New(c, nil)
		assertFaults(t, err, name, "Client")
		_, err = redisstore.New(c, &redisstore.Options{Timeout: -1})
		assertFaults(t, err, name, "Client", "Timeout")
	}
	_, err := redisstore.New(client(t, "redis://127.0.0.1:1"), &redisstore.Options{Timeout: -1})
	assertFaults(t, err, "client", "Timeout")
}

// assertFaults checks that an error joins an *OptionError for each field.
func assertFaults(t testing.TB, err error, name string, fields ...string) {
	t.Helper()
	joined, ok := err.(interface{ Unwrap() []error })
	require.True(t, ok, "%s: %v", name, err)
	var found []string
	for _, err := range joined.Unwrap() {
		var fault *redisstore.OptionError
		require.ErrorAs(t, err, &fault, name)
		found = append(found, fault.Field)
	}
	assert.Equal(t, fields, found, name)
}

// wrongURLs are URLs with a fault that Open must find.
var wrongURLs = []string{
	"", "x", "://", "http://localhost", "redis://localhost:port", "redis://local host", "redis://localhost/a", "redis://localhost/0/1",
	"redis://localhost?unknown=1", "redis://localhost?read_timeout=soon", "redis://localhost?db=x", "redis://localhost?addr=", "redis://localhost?addr=localhost", "unix:///socket?db=x",
	"redis://localhost?master_name=main&unknown=1", "redis://localhost/a?master_name=main",
}

func TestOpenFindsTheFaultOfAURL(t *testing.T) {
	t.Parallel()
	for _, url := range wrongURLs {
		_, err := redisstore.Open(url, nil)
		var fault *redisstore.OptionError
		if assert.ErrorAs(t, err, &fault, "%q", url) {
			assert.Equal(t, "URL", fault.Field, "%q", url)
		}
	}
	_, err := redisstore.Open("redis://localhost", &redisstore.Options{Timeout: -1})
	var fault *redisstore.OptionError
	require.ErrorAs(t, err, &fault)
	assert.Equal(t, "Timeout", fault.Field)
}

func TestOpenDoesNotPanic(t *testing.T) {
	t.Parallel()
	for _, parameters := range []string{
		"pool_size=-1", "pool_size=99999999999", "pipeline_pool_size=99999999999",
		"master_name=main&route_randomly=true", "master_name=main&route_by_latency=true",
		"addr=localhost:1&pool_size=99999999999", // the panic would come with the first call, in a goroutine of the client
	} {
		assert.NotPanics(t, func() {
			s, err := redisstore.Open("redis://localhost?"+parameters, nil)
			var fault *redisstore.OptionError
			if !assert.ErrorAs(t, err, &fault, parameters) {
				assert.NoError(t, s.Close(context.Background()))
			}
		}, parameters)
	}
}

func TestTheErrorOfAWrongURLDoesNotTellThePassword(t *testing.T) {
	t.Parallel()
	for _, url := range []string{"redis://user:secret@localhost:port", "redis://user:secret@local host", "redis://user:secret%@localhost", "redis://:secret@localhost/a", "http://:secret@localhost"} {
		_, err := redisstore.Open(url, nil)
		assert.Error(t, err)
		assert.NotContains(t, fmt.Sprint(err), "secret", "errors are logged")
	}
}

// hasty returns options of a client that retries soon and often.
func hasty(addr string) *goredis.Options {
	return &goredis.Options{Addr: addr, MaxRetries: 5, MinRetryBackoff: time.Millisecond, MaxRetryBackoff: time.Millisecond, ReadTimeout: 50 * time.Millisecond, WriteTimeout: 50 * time.Millisecond}
}

// connect makes the client open enough connections to send a command to a frozen server six times.
func connect(t testing.TB, c *goredis.Client) {
	t.Helper()
	for range 10 {
		held := c.Conn()
		defer func() { assert.NoError(t, held.Close()) }()
		assert.NoError(t, held.Ping(t.Context()).Err())
	}
}

func TestAClientThatTriesAgainChargesOnceForAnAnswerThatIsLate(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	c := goredis.NewClient(hasty(server.Addr()))
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	s := on(t, c, prompt)
	t.Cleanup(func() { assert.NoError(t, s.Close(context.Background())) })
	assertChargedOnce(t, server, c, s, prompt.Timeout)
}

func TestAClusterClientThatTriesAgainChargesOnceForAnAnswerThatIsLate(t *testing.T) {
	t.Parallel()
	cluster, o := servers.RedisCluster(t, 1), hasty("")
	c := goredis.NewClusterClient(&goredis.ClusterOptions{Addrs: cluster.Addrs(), MaxRetries: o.MaxRetries, MaxRedirects: o.MaxRetries, MinRetryBackoff: o.MinRetryBackoff,
		MaxRetryBackoff: o.MaxRetryBackoff, ReadTimeout: o.ReadTimeout, WriteTimeout: o.WriteTimeout})
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	s := on(t, c, redisstore.Options{Timeout: 500 * time.Millisecond})
	t.Cleanup(func() { assert.NoError(t, s.Close(context.Background())) })
	node, err := c.MasterForKey(t.Context(), "a")
	require.NoError(t, err)
	assertChargedOnce(t, cluster.Nodes[0], node, s, 500*time.Millisecond)
}

// assertChargedOnce freezes the server while calls are made, and asserts that each took at most one token in the end.
// It does so for a single call, and for eight at once, which share a pipeline to a cluster.
func assertChargedOnce(t *testing.T, server *servers.Server, c *goredis.Client, s *redisstore.Storage, within time.Duration) {
	t.Helper()
	for _, together := range []int{1, 1, 8} {
		storecheck.Recovery(t, 10*time.Second, func() error { return new(storecheck.Told).Ask(s, storecheck.Hourly(t, "first", 1000)) })
		connect(t, c)
		require.NoError(t, server.Freeze())
		storecheck.Crowd(together, func(i int) {
			took := storecheck.Timed(1, func() {
				assert.ErrorIs(t, new(storecheck.Told).Ask(s, storecheck.Hourly(t, fmt.Sprint(i), 1000)), storage.ErrUnavailable)
			})
			assert.Less(t, took[0], within+time.Second, "a call outlasted its time")
		})
		require.NoError(t, server.Thaw())
		connect(t, c) // until it answers, so it has read everything that was sent before
		late := int64(0)
		for i := range together {
			once := storecheck.Spent(t, s, storecheck.Hourly(t, fmt.Sprint(i), 1000))
			assert.LessOrEqual(t, once, int64(1), "a call was charged more than once")
			late += once
			require.NoError(t, s.Reset(t.Context(), "", fmt.Sprint(i)))
		}
		assert.Positive(t, late, "no call arrived, so that nothing was tested")
	}
}

// closeDuringLoad closes the storage while 50 goroutines ask, and returns how many tokens they got.
func closeDuringLoad(t *testing.T, s *redisstore.Storage, r storecheck.Request) (admitted int64) {
	t.Helper()
	var count storecheck.Told
	var calls sync.WaitGroup
	for range 50 {
		calls.Go(func() {
			err := error(nil)
			for err == nil {
				err = count.Ask(s, r)
			}
			assert.ErrorIs(t, err, storage.ErrClosed)
		})
	}
	storecheck.Recovery(t, 10*time.Second, func() error {
		if count.Admitted.Load() < 500 {
			return errors.New("there is no load")
		}
		return nil
	})
	storecheck.Crowd(3, func(int) { assert.NoError(t, s.Close(context.Background())) })
	calls.Wait()
	assert.NoError(t, s.Close(context.Background()), "again")
	for call, ask := range allCalls {
		_, err := ask(t.Context(), s, r)
		assert.ErrorIs(t, err, storage.ErrClosed, "%s after Close", call)
	}
	return count.Admitted.Load()
}

func TestCloseDuringLoadLeavesNoCallWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	c := client(t, server.URL())
	again := on(t, c, redisstore.Options{})
	for name, s := range map[string]*redisstore.Storage{
		"of New":  on(t, c, redisstore.Options{Timeout: storecheck.Patient}),
		"of Open": open(t, server.URL()+"?client_name=owned", redisstore.Options{}),
	} {
		r := storecheck.Hourly(t, name, 1<<40)
		assert.Equal(t, closeDuringLoad(t, s, r), storecheck.Spent(t, again, r), "each call that was sent was answered")
	}
	assert.NoError(t, again.Close(context.Background()))
	assert.NoError(t, c.Ping(t.Context()).Err(), "the client of New is the caller's")
	storecheck.Recovery(t, 10*time.Second, func() error { // as the server notices a moment later
		if list := c.ClientList(t.Context()).Val(); strings.Contains(list, "name=owned") {
			return fmt.Errorf("connections of Open are left: %s", list)
		}
		return nil
	})
}

func TestCloseDuringLoadOnAClusterLeavesNoCallWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	cluster := servers.RedisCluster(t, 2)
	r := storecheck.Hourly(t, "a", 1<<40)
	admitted := closeDuringLoad(t, open(t, clusterURL(cluster), redisstore.Options{}), r)
	assert.Equal(t, admitted, storecheck.Spent(t, open(t, clusterURL(cluster), redisstore.Options{}), r), "each call that was sent was answered")
}

func TestAStorageOnAClusterIsClosedAlsoIfItWasNeverUsed(t *testing.T) {
	t.Parallel()
	s, err := redisstore.Open("redis://127.0.0.1:1?addr=127.0.0.1:2", nil)
	require.NoError(t, err)
	require.NoError(t, s.Close(context.Background()))
	for call, ask := range allCalls {
		_, err := ask(t.Context(), s, storecheck.FivePerHour(t, "a"))
		assert.ErrorIs(t, err, storage.ErrClosed, call)
	}
}

// pacedLoad lets 10 goroutines ask every two milliseconds until one of them is denied. It returns the time of the
// longest call.
func pacedLoad(c *storecheck.Told, s *redisstore.Storage, r storecheck.Request) (longest time.Duration) {
	took := make([]time.Duration, 10)
	storecheck.Crowd(len(took), func(i int) {
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for end := time.Now().Add(30 * time.Second); c.Denied.Load() == 0 && time.Now().Before(end); <-tick.C {
			took[i] = max(took[i], storecheck.Timed(1, func() { _ = c.Ask(s, r) })[0])
		}
	})
	return slices.Max(took)
}

func TestAfterAFailoverCallsWorkAndHardlyAnythingWasForgotten(t *testing.T) {
	t.Parallel()
	const limit = 5000
	sentinel := servers.RedisSentinel(t)
	s := open(t, "redis://"+sentinel.Addr()+"?master_name="+sentinel.MasterName, prompt)
	count, r := storecheck.Told{}, storecheck.Hourly(t, "a", limit)
	longest := make(chan time.Duration, 1)
	go func() { longest <- pacedLoad(&count, s, r) }()
	storecheck.Until(t, "nothing is admitted", func() bool { return count.Admitted.Load() > limit/5 })
	require.NoError(t, sentinel.Primary.Kill())
	storecheck.Until(t, "no call fails", func() bool { return count.Failed.Load() > 0 })
	before := count.Admitted.Load()
	recovered := storecheck.Until(t, "nothing is admitted after the failover", func() bool { return count.Admitted.Load() > before+10 })
	hung := <-longest
	t.Logf("works %v after the failure; the longest call took %v; %d failed; forgotten were %d of %d", recovered, hung, count.Failed.Load(), max(0, count.Admitted.Load()-limit), before)
	assert.Less(t, recovered, 10*time.Second, "the storage does not find the new primary")
	assert.Less(t, hung, prompt.Timeout+time.Second, "a call hung")
	assert.Positive(t, count.Denied.Load(), "the limit is none any more")
	assert.LessOrEqual(t, count.Admitted.Load(), int64(2*limit), "more was forgotten than ever was spent")
	assert.GreaterOrEqual(t, count.Admitted.Load(), limit-count.Failed.Load(), "more was charged than was asked")
	assert.Equal(t, 0, storecheck.Take(t, s, r, 3))
}
