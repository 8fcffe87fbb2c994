package redis_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// ring is a cluster of three masters. It knows which of them has which slot.
type ring struct {
	*servers.Cluster

	nodes []*goredis.Client // one client for each of Nodes
	ids   []string          // the names by which the nodes know each other
	moved map[int64]int
}

func newRing(t *testing.T) *ring {
	t.Helper()
	r := &ring{Cluster: servers.RedisCluster(t, 3), moved: map[int64]int{}}
	for _, s := range r.Nodes {
		c := client(t, s.URL())
		id, err := c.Do(t.Context(), "cluster", "myid").Text()
		require.NoError(t, err)
		r.nodes, r.ids = append(r.nodes, c), append(r.ids, id)
	}
	return r
}

// tenant is a HashTag: the part of an identifier before the slash.
func tenant(id string) string {
	tag, _, _ := strings.Cut(id, "/")
	return tag
}

// open returns two storages: a plain one, and one whose identifiers are in the slots of their tenants.
func (r *ring) open(t *testing.T, timeout time.Duration) (plain, tagged *redisstore.Storage) {
	t.Helper()
	url := clusterURL(r.Cluster)
	return open(t, url, redisstore.Options{Timeout: timeout}), open(t, url, redisstore.Options{Timeout: timeout, Prefix: "tagged:", HashTag: tenant})
}

func (r *ring) slot(t *testing.T, key string) int64 {
	t.Helper()
	slot, err := r.nodes[0].ClusterKeySlot(t.Context(), key).Result()
	require.NoError(t, err)
	return slot
}

// owner returns the index of the node that has a slot.
func (r *ring) owner(slot int64) int {
	if i, ok := r.moved[slot]; ok {
		return i
	}
	return slices.IndexFunc([]int64{1, 2, 3}, func(i int64) bool { return slot < i*16384/3 })
}

// depart begins to move a slot.
func (r *ring) depart(t *testing.T, slot int64, to int) {
	t.Helper()
	from := r.owner(slot)
	require.NotEqual(t, from, to)
	require.NoError(t, r.nodes[to].Do(t.Context(), "cluster", "setslot", slot, "importing", r.ids[from]).Err())
	require.NoError(t, r.nodes[from].Do(t.Context(), "cluster", "setslot", slot, "migrating", r.ids[to]).Err())
}

// migrate moves one key of a slot that is on its way.
func (r *ring) migrate(t *testing.T, slot int64, to int, key string) {
	t.Helper()
	_, port, err := net.SplitHostPort(r.Nodes[to].Addr())
	require.NoError(t, err)
	require.NoError(t, r.nodes[r.owner(slot)].Migrate(t.Context(), "127.0.0.1", port, key, 0, storecheck.Patient).Err())
}

// settled reports whether all nodes have different configuration epochs and agree on them. A node that gets a slot
// raises its epoch above all that it knows. If another node had a higher one it would lose the slot again.
func (r *ring) settled(t *testing.T) bool {
	t.Helper()
	var views []map[string]string
	for _, c := range r.nodes {
		nodes, err := c.ClusterNodes(t.Context()).Result()
		require.NoError(t, err)
		views = append(views, map[string]string{})
		for line := range strings.Lines(nodes) {
			f := strings.Fields(line)
			views[len(views)-1][f[6]] = f[0]
		}
	}
	return len(views[0]) == 3 && maps.Equal(views[0], views[1]) && maps.Equal(views[0], views[2])
}

// arrive ends the move of a slot whose keys have all been moved.
func (r *ring) arrive(t *testing.T, slot int64, to int) {
	t.Helper()
	from := r.owner(slot)
	storecheck.Until(t, "the nodes agree", func() bool { return r.settled(t) })
	for _, i := range []int{to, from, 3 - to - from} {
		require.NoError(t, r.nodes[i].Do(t.Context(), "cluster", "setslot", slot, "node", r.ids[to]).Err())
	}
	r.moved[slot] = to
}

// move moves a slot and its keys, one by one, to a node that does not have the scripts. It returns the number of keys.
func (r *ring) move(t *testing.T, slot int64, to int) (n int) {
	t.Helper()
	require.NoError(t, r.nodes[to].ScriptFlush(t.Context()).Err())
	r.depart(t, slot, to)
	for {
		keys, err := r.nodes[r.owner(slot)].ClusterGetKeysInSlot(t.Context(), int(slot), 10).Result()
		require.NoError(t, err)
		if len(keys) == 0 {
			break
		}
		for _, key := range keys {
			r.migrate(t, slot, to, key)
			<-time.After(time.Millisecond)
		}
		n += len(keys)
	}
	r.arrive(t, slot, to)
	return n
}

// told returns how many errors with a prefix all nodes have answered together.
func (r *ring) told(t *testing.T, prefix string) (n int) {
	t.Helper()
	of := regexp.MustCompile(`errorstat_` + prefix + `:count=(\d+)`)
	for _, c := range r.nodes {
		info, err := c.Info(t.Context(), "errorstats").Result()
		require.NoError(t, err)
		if m := of.FindStringSubmatch(info); m != nil {
			i, err := strconv.Atoi(m[1])
			require.NoError(t, err)
			n += i
		}
	}
	return n
}

// idOn returns a new identifier whose key, in a storage without options, is on the given node.
func (r *ring) idOn(t *testing.T, node int) string {
	t.Helper()
	for {
		id := fmt.Sprint("id-", fresh.Add(1))
		if r.owner(r.slot(t, "throttler::"+id)) == node {
			return id
		}
	}
}

// ledger counts what was taken from each identifier.
type ledger struct {
	mu    sync.Mutex
	taken map[string]int64
}

func (l *ledger) add(v storecheck.Verdict) {
	if !v.Allowed {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range v.Parts() {
		p := v.Part(i)
		l.taken[p.Identifier] += p.Costs[0]
	}
}

// load is 50 goroutines that ask for random identifiers until end is set.
type load struct {
	plain, tagged *redisstore.Storage
	rules         []law.Rule
	ledger        ledger
	calls         atomic.Int64
	end           atomic.Bool
}

const tenants, perTenant = 6, 30

// ask asks for one identifier, or for two or three of one tenant in one call.
func (l *load) ask(ctx context.Context) error {
	s, r := l.plain, storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart(fmt.Sprint("plain-", rand.IntN(200)), l.rules, 1)}}
	if rand.IntN(2) == 0 {
		s = l.tagged
		tenant, first := rand.IntN(tenants), rand.IntN(perTenant)
		for i := range []int{1, 1, 2, 3}[rand.IntN(4)] {
			p := storecheck.NewPart(fmt.Sprintf("t%d/%d", tenant, (first+i)%perTenant), l.rules, 1)
			if i == 0 {
				r.Parts = nil
			}
			r.Parts = append(r.Parts, p)
		}
	}
	v, err := storecheck.Decide(ctx, s, r)
	l.ledger.add(v)
	l.calls.Add(1)
	return err
}

// run keeps up the load until during has returned.
func (l *load) run(t *testing.T, during func()) {
	t.Helper()
	var all sync.WaitGroup
	defer all.Wait()
	defer l.end.Store(true)
	for range 50 {
		all.Go(func() {
			for !l.end.Load() && assert.NoError(t, l.ask(t.Context())) {
			}
		})
	}
	during()
}

// of returns the storage in which an identifier is kept.
func (l *load) of(id string) *redisstore.Storage {
	if strings.HasPrefix(id, "t") {
		return l.tagged
	}
	return l.plain
}

// exactly takes what is left of each identifier, and asserts that each has given exactly its limit.
func (l *load) exactly(t *testing.T, limit int64) {
	t.Helper()
	ids := slices.Collect(maps.Keys(l.ledger.taken))
	require.Len(t, ids, 200+tenants*perTenant)
	storecheck.Crowd(len(ids), func(i int) {
		for allowed := true; allowed; {
			v, err := storecheck.Decide(t.Context(), l.of(ids[i]), storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart(ids[i], l.rules, 1)}})
			assert.NoError(t, err)
			l.ledger.add(v)
			allowed = v.Allowed
		}
	})
	for _, id := range ids {
		assert.Equal(t, limit, l.ledger.taken[id], id)
	}
}

func TestSlotsMoveUnderLoadWithoutAnErrorAndEachLimitIsExact(t *testing.T) {
	t.Parallel()
	const limit = 100
	r := newRing(t)
	l := &load{rules: []law.Rule{storecheck.Rule(t, "100/1h", law.Replenish, time.Hour, limit)}, ledger: ledger{taken: map[string]int64{}}}
	l.plain, l.tagged = r.open(t, 0)
	keys := 0
	l.run(t, func() {
		storecheck.Until(t, "calls", func() bool { return l.calls.Load() > 5000 })
		for round := range 3 {
			var slots []int64
			for i := range tenants {
				slots = append(slots, r.slot(t, fmt.Sprintf("tagged:{t%d}", i)), r.slot(t, fmt.Sprint("throttler::plain-", i)))
			}
			for _, slot := range slots {
				keys += r.move(t, slot, (r.owner(slot)+1+round%2)%3)
			}
		}
	})
	t.Log(keys, "keys moved,", l.calls.Load(), "calls, MOVED", r.told(t, "MOVED"), "ASK", r.told(t, "ASK"), "TRYAGAIN", r.told(t, "TRYAGAIN"))
	assert.Equal(t, 3*tenants*(perTenant+1), keys)
	assert.NotZero(t, r.told(t, "MOVED"))
	assert.NotZero(t, r.told(t, "ASK"))
	assert.NotZero(t, r.told(t, "TRYAGAIN"))
	l.exactly(t, limit)
}

// halfWay puts the two keys of one call on two nodes. Finish moves the second key after the first.
func (r *ring) halfWay(t *testing.T, tagged *redisstore.Storage) (both storecheck.Request, finish func()) {
	t.Helper()
	both = storecheck.FivePerHour(t, "t/1")
	both.Parts = append(both.Parts, storecheck.NewPart("t/2", both.Parts[0].Rules.Rules, 1))
	require.Equal(t, 1, storecheck.Take(t, tagged, both, 1))
	slot := r.slot(t, "tagged:{t}")
	to := (r.owner(slot) + 1) % 3
	r.depart(t, slot, to)
	r.migrate(t, slot, to, "tagged:{t}:t/1")
	return both, func() {
		r.migrate(t, slot, to, "tagged:{t}:t/2")
		r.arrive(t, slot, to)
	}
}

func TestACallWhoseKeysAreOnTwoNodesWaitsUntilTheyMeet(t *testing.T) {
	t.Parallel()
	r := newRing(t)
	_, tagged := r.open(t, 0)
	both, finish := r.halfWay(t, tagged)
	ended, before := make(chan error, 1), r.told(t, "TRYAGAIN")
	go func() {
		v, err := storecheck.Decide(t.Context(), tagged, both)
		assert.True(t, v.Allowed)
		ended <- err
	}()
	storecheck.Until(t, "TRYAGAIN", func() bool { return r.told(t, "TRYAGAIN") >= before+3 })
	for _, p := range both.Parts {
		assert.Equal(t, 1, storecheck.Take(t, tagged, storecheck.Request{Parts: []storecheck.Part{p}}, 1), "one key is always on one node")
	}
	assert.Empty(t, ended)
	finish()
	assert.NoError(t, <-ended)
	assert.Equal(t, []int64{2}, left(t, tagged, "", "t/1", both.Parts[0].Rules.Rules...))
	assert.Equal(t, []int64{2}, left(t, tagged, "", "t/2", both.Parts[0].Rules.Rules...))
}

func TestACallWhoseKeysStayOnTwoNodesEndsAndTakesNothing(t *testing.T) {
	t.Parallel()
	r := newRing(t)
	_, tagged := r.open(t, time.Second)
	both, _ := r.halfWay(t, tagged)
	began := time.Now()
	_, err := storecheck.Decide(t.Context(), tagged, both)
	assert.InDelta(t, time.Second, time.Since(began), float64(time.Second/2))
	require.ErrorIs(t, err, storage.ErrUnavailable)
	assert.True(t, goredis.IsTryAgainError(err), err)
	assert.Equal(t, []int64{4}, left(t, tagged, "", "t/1", both.Parts[0].Rules.Rules...))
	assert.Equal(t, []int64{4}, left(t, tagged, "", "t/2", both.Parts[0].Rules.Rules...))

	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	began = time.Now()
	_, err = storecheck.Decide(ctx, tagged, both)
	assert.ErrorIs(t, err, context.DeadlineExceeded)
	assert.Less(t, time.Since(began), time.Second)
}

// The call waits for a node that hangs while its keys are apart, but only within the same Timeout.
func TestACallThatTriesAgainTakesNoLongerThanTheTimeout(t *testing.T) {
	t.Parallel()
	const timeout = time.Second
	r := newRing(t)
	_, tagged := r.open(t, timeout)
	both, _ := r.halfWay(t, tagged)
	from := r.owner(r.slot(t, "tagged:{t}"))
	began, ended := time.Now(), make(chan error, 1)
	go func() {
		_, err := storecheck.Decide(t.Context(), tagged, both)
		ended <- err
	}()
	<-time.After(timeout * 3 / 4)
	require.NoError(t, r.Nodes[from].Freeze())
	assert.ErrorIs(t, <-ended, storage.ErrUnavailable)
	assert.Less(t, time.Since(began), timeout*3/2)
	require.NoError(t, r.Nodes[from].Thaw())
}

// The time in which the client learns the nodes is part of the Timeout.
func TestTheFirstCallOnAClusterTakesNoLongerThanTheTimeout(t *testing.T) {
	t.Parallel()
	const timeout = time.Second
	r := newRing(t)
	ask := storecheck.FivePerHour(t, r.idOn(t, 1))
	s := open(t, r.Nodes[0].URL()+"?addr="+r.Nodes[0].Addr(), redisstore.Options{Timeout: timeout})
	require.NoError(t, r.Nodes[0].Freeze())
	require.NoError(t, r.Nodes[1].Freeze())
	began, ended := time.Now(), make(chan error, 1)
	go func() {
		_, err := storecheck.Decide(t.Context(), s, ask)
		ended <- err
	}()
	<-time.After(timeout * 3 / 4)
	require.NoError(t, r.Nodes[0].Thaw())
	assert.ErrorIs(t, <-ended, storage.ErrUnavailable)
	assert.Less(t, time.Since(began), timeout*3/2)
	require.NoError(t, r.Nodes[1].Thaw())
}

// median returns the median duration of calls, none of which may fail.
func median(t *testing.T, s *redisstore.Storage, ids []string, calls int) time.Duration {
	t.Helper()
	var all []time.Duration
	for i := range calls {
		r := storecheck.FivePerHour(t, ids[i%len(ids)])
		began := time.Now()
		_, err := storecheck.Decide(t.Context(), s, r)
		require.NoError(t, err)
		all = append(all, time.Since(began))
	}
	slices.Sort(all)
	return all[len(all)/2]
}

func TestAFrozenMasterDisturbsOnlyItsOwnIdentifiers(t *testing.T) {
	t.Parallel()
	const timeout = time.Second
	r := newRing(t)
	plain, _ := r.open(t, timeout)
	frozen, others := []string{}, []string{}
	for range 10 {
		frozen, others = append(frozen, r.idOn(t, 1)), append(others, r.idOn(t, 0), r.idOn(t, 2))
	}
	median(t, plain, append(frozen, others...), 30)
	require.NoError(t, r.Nodes[1].Freeze())
	var stuck sync.WaitGroup
	var failed atomic.Int64
	for i := range 60 {
		ask := storecheck.FivePerHour(t, frozen[i%10])
		stuck.Go(func() {
			began := time.Now()
			_, err := storecheck.Decide(t.Context(), plain, ask)
			assert.ErrorIs(t, err, storage.ErrUnavailable)
			assert.InDelta(t, timeout, time.Since(began), float64(timeout/2))
			failed.Add(1)
		})
	}
	during := median(t, plain, others, 400)
	t.Log(during, "is the median while", 60-failed.Load(), "calls wait")
	assert.Less(t, during, timeout/10)
	stuck.Wait()

	require.NoError(t, r.Nodes[1].Thaw())
	storecheck.Until(t, "it answers again", func() bool {
		_, err := storecheck.Decide(t.Context(), plain, storecheck.FivePerHour(t, frozen[0]))
		return err == nil
	})
	assert.Equal(t, 5, storecheck.Take(t, plain, storecheck.FivePerHour(t, r.idOn(t, 1)), 7))
	assert.Less(t, median(t, plain, frozen, 50), timeout/10)
}

func TestAMasterThatWasKilledAndStartedAgainIsUsedAgain(t *testing.T) {
	t.Parallel()
	r := newRing(t)
	plain, _ := r.open(t, time.Second)
	lost, kept := r.idOn(t, 1), r.idOn(t, 2)
	require.Equal(t, 5, storecheck.Take(t, plain, storecheck.FivePerHour(t, lost), 6))
	require.Equal(t, 2, storecheck.Take(t, plain, storecheck.FivePerHour(t, kept), 2))
	require.NoError(t, r.Nodes[1].Kill())
	for range 5 {
		_, err := storecheck.Decide(t.Context(), plain, storecheck.FivePerHour(t, lost))
		assert.ErrorIs(t, err, storage.ErrUnavailable)
		assert.Equal(t, 1, storecheck.Take(t, plain, storecheck.FivePerHour(t, r.idOn(t, 0)), 1), "the other masters go on")
	}
	require.NoError(t, r.Nodes[1].Start())
	rules := storecheck.FivePerHour(t, lost).Parts[0].Rules.Rules
	storecheck.Until(t, "it serves its slots again", func() bool {
		_, err := storecheck.Decide(t.Context(), plain, storecheck.Request{Mode: storage.Peek, Parts: []storecheck.Part{storecheck.NewPart(lost, rules, 0)}})
		if err != nil {
			assert.ErrorIs(t, err, storage.ErrUnavailable)
		}
		return err == nil
	})
	assert.Equal(t, 5, storecheck.Take(t, plain, storecheck.FivePerHour(t, lost), 6), "it is empty")
	assert.Equal(t, 3, storecheck.Take(t, plain, storecheck.FivePerHour(t, kept), 4))
}

// Each batch in a cluster is a pipeline of script calls. Some of them find the script on their node, and others do not.
func TestANodeThatForgetsTheScriptsIsSentThemAgain(t *testing.T) {
	t.Parallel()
	r := newRing(t)
	plain, _ := r.open(t, 0)
	var admitted [40]atomic.Int64
	var end atomic.Bool
	var all sync.WaitGroup
	for i := range 40 {
		ask := storecheck.FivePerHour(t, fmt.Sprint("user-", i))
		all.Go(func() {
			for n := 0; n < 50 || !end.Load(); n++ {
				v, err := storecheck.Decide(t.Context(), plain, ask)
				if !assert.NoError(t, err) {
					return
				}
				if v.Allowed {
					admitted[i].Add(1)
				}
				if n%10 == 9 {
					assert.NoError(t, plain.Reset(t.Context(), "", "nobody-"+ask.Parts[0].Identifier))
				}
			}
		})
	}
	for i := range 30 {
		assert.NoError(t, r.nodes[i%3].ScriptFlush(t.Context()).Err())
		<-time.After(10 * time.Millisecond)
	}
	end.Store(true)
	all.Wait()
	for i := range admitted {
		assert.Equal(t, int64(5), admitted[i].Load())
	}
	assert.NotZero(t, r.told(t, "NOSCRIPT"))
}
