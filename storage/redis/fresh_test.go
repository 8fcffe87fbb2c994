package redis_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
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
	"github.com/go-throttler/throttler/storage/storagetest"
)

// doubter asks for identifiers that nobody has used before.
type doubter struct {
	s     *redisstore.Storage
	c     *goredis.Client
	name  string
	rules []law.Rule
}

// newDoubter returns a doubter whose server has the script, so that nothing is ErrRestarted.
func newDoubter(t *testing.T, kind law.Kind) *doubter {
	t.Helper()
	url := servers.RedisURL(t)
	d := &doubter{open(t, url, redisstore.Options{}), client(t, url), freshName(), nil}
	d.rules = []law.Rule{storecheck.Rule(t, "a", kind, storecheck.Period(), 5), storecheck.Rule(t, "b", kind, 24*storecheck.Period(), 50)}
	storecheck.Take(t, d.s, storecheck.FivePerHour(t, d.name), 1)
	return d
}

// request returns a request for n tokens of each bucket.
func (d *doubter) request(n int64, ids ...string) storecheck.Request {
	r := storecheck.Request{Name: d.name, Parts: []storecheck.Part{storecheck.NewPart(ids[0], d.rules, n)}}
	for _, id := range ids[1:] {
		r.Parts = append(r.Parts, storecheck.NewPart(id, d.rules, n))
	}
	return r
}

// old returns a request by a caller's clock, at an earlier time.
func old(r storecheck.Request, ago time.Duration) storecheck.Request {
	r.Clocked, r.Now = true, time.Now().Add(-ago).UnixMicro()
	return r
}

// stale reports whether a DecideFresh is stale, and asserts that nothing was changed then.
func (d *doubter) stale(t *testing.T, r storecheck.Request, age time.Duration) bool {
	t.Helper()
	keys := func() (values []string) {
		for i := range r.Parts {
			values = append(values, raw(t, d.c, "throttler:"+r.Name+":"+r.Parts[i].Identifier))
		}
		return values
	}
	before := keys()
	v, err := storecheck.DecideFresh(t.Context(), d.s, r, ago(age))
	if !errors.Is(err, redisstore.ErrStale) {
		require.NoError(t, err)
		return false
	}
	assert.Equal(t, before, keys())
	assert.Equal(t, storecheck.Verdict{}, v)
	assert.NotErrorIs(t, err, storage.ErrUnavailable)
	return true
}

var ages = []time.Duration{0, 1, time.Microsecond, time.Second, time.Hour, math.MaxInt64}

func TestAStateThatIsNotThereIsStaleAndOneThatWasJustChangedIsFresh(t *testing.T) {
	t.Parallel()
	for kind := range allKinds {
		d := newDoubter(t, kind)
		r := d.request(1, "a")
		peek := r
		peek.Mode = storage.Peek
		for _, age := range ages {
			assert.True(t, d.stale(t, r, age), "%v of %v", kind, age)
			assert.True(t, d.stale(t, peek, age), "%v of %v", kind, age)
		}
		assert.False(t, d.stale(t, peek, -1))
		assert.False(t, d.stale(t, peek, math.MinInt64))
		require.Equal(t, 1, storecheck.Take(t, d.s, r, 1))
		assert.False(t, d.stale(t, r, time.Hour))
		assert.False(t, d.stale(t, peek, time.Hour))
		assert.True(t, d.stale(t, r, 0), "time has passed")
		assert.Equal(t, []int64{3, 48}, left(t, d.s, d.name, "a", d.rules...), kind)
	}
}

func TestAStateThatWasChangedLongAgoIsStale(t *testing.T) {
	t.Parallel()
	for kind := range allKinds {
		d := newDoubter(t, kind)
		r := d.request(1, "a")
		require.Equal(t, 1, storecheck.Take(t, d.s, old(r, 10*time.Minute), 1))
		assert.True(t, d.stale(t, r, 0), kind)
		assert.True(t, d.stale(t, r, 9*time.Minute), kind)
		assert.False(t, d.stale(t, r, 11*time.Minute), kind)
		assert.False(t, d.stale(t, r, 9*time.Minute), "%v: it was changed just now", kind)
	}
}

func TestOneStateThatIsStaleIsEnoughAmongSeveralBucketsAndParts(t *testing.T) {
	t.Parallel()
	d := newDoubter(t, law.Replenish)
	all := d.request(1, "a", "b", "c")
	for _, id := range []string{"a", "b", "c"} {
		assert.True(t, d.stale(t, all, time.Hour))
		one := d.request(1, id)
		one.Parts[0].Costs[0] = 0
		require.Equal(t, 1, storecheck.Take(t, d.s, one, 1))
		assert.True(t, d.stale(t, all, time.Hour), "the other bucket of %s is not there", id)
		one = d.request(1, id)
		one.Parts[0].Costs[1] = 0
		require.Equal(t, 1, storecheck.Take(t, d.s, one, 1))
	}
	assert.False(t, d.stale(t, all, time.Hour))
	require.NoError(t, d.s.Reset(t.Context(), d.name, "c"))
	require.Equal(t, 1, storecheck.Take(t, d.s, old(d.request(1, "c"), 10*time.Minute), 1))
	assert.True(t, d.stale(t, all, 5*time.Minute))
	assert.False(t, d.stale(t, all, time.Hour))
	for _, id := range []string{"a", "b"} {
		assert.Equal(t, []int64{2, 47}, left(t, d.s, d.name, id, d.rules...))
	}
}

func TestABucketThatIsAskedForNothingIsNotDoubtedBesideOthers(t *testing.T) {
	t.Parallel()
	d := newDoubter(t, law.SlidingLog)
	r := d.request(0, "a", "b")
	assert.True(t, d.stale(t, r, 0), "who only looks wants to know")
	r.Parts[0].Costs[1] = 1
	assert.True(t, d.stale(t, r, time.Hour))
	require.Equal(t, 1, storecheck.Take(t, d.s, r, 1))
	assert.False(t, d.stale(t, r, time.Hour), "b has no state, and a none for its first bucket")
}

func TestARefusalIsNeverStaleAndAForceIs(t *testing.T) {
	t.Parallel()
	for kind := range allKinds {
		d := newDoubter(t, kind)
		full := d.request(5, "a")
		require.Equal(t, 1, storecheck.Take(t, d.s, old(full, time.Minute), 1))
		for _, r := range []storecheck.Request{full, d.request(5, "a", "of nobody"), d.request(5, "of nobody", "a")} {
			for _, age := range ages {
				for _, mode := range []storage.Mode{storage.Take, storage.Peek} {
					r.Mode = mode
					v, err := storecheck.DecideFresh(t.Context(), d.s, r, ago(age))
					require.NoError(t, err, "%v of %v", kind, age)
					assert.False(t, v.Allowed)
					assert.Positive(t, v.RetryAfter)
				}
			}
		}
		for i, age := range ages {
			r := d.request(1, fmt.Sprint("forced-", i), "a")
			r.Mode = storage.Force
			assert.True(t, d.stale(t, r, age))
		}
	}
}

// Such a state counts as empty, by the first step of the arithmetic.
func TestAStateThatIsTooFarAheadOfTheClockIsStale(t *testing.T) {
	t.Parallel()
	d := newDoubter(t, law.Replenish)
	r := d.request(1, "a")
	require.Equal(t, 1, storecheck.Take(t, d.s, old(r, -30*time.Minute), 1))
	assert.False(t, d.stale(t, r, 0), "it is younger than any age")
	require.NoError(t, d.s.Reset(t.Context(), d.name, "a"))
	require.Equal(t, 1, storecheck.Take(t, d.s, old(r, -3*24*time.Hour), 1))
	assert.True(t, d.stale(t, r, time.Hour))
}

// Requests of many shapes and ages share batches. Each answer must be that of the model, or stale.
func TestByAnInjectedClockEveryStateIsDoubted(t *testing.T) {
	t.Parallel()
	s := open(t, servers.RedisURL(t), redisstore.Options{})
	model, name, sets := storagetest.NewModel(), freshName(), ruleSets(t)
	storecheck.Take(t, s, storecheck.FivePerHour(t, name), 1) // so that the server has the script
	storecheck.Crowd(100, func(i int) {
		g := &shapely{rnd: rand.New(rand.NewPCG(8, uint64(i))), name: name, ids: [2]string{fmt.Sprint("one-", i), fmt.Sprint("two-", i)}, sets: sets}
		for step := range 30 {
			r := g.request(1_700_000_000_000_000 + int64(step/5)*3_000_000)
			age := []time.Duration{-1, 0, time.Minute, math.MaxInt64}[g.rnd.IntN(4)]
			peek := r
			allowed := r.Mode == storage.Force
			if !allowed {
				peek.Mode = storage.Peek
				v, err := storecheck.Decide(t.Context(), model, peek)
				assert.NoError(t, err)
				allowed = v.Allowed
			}
			if allowed && age >= 0 {
				_, err := storecheck.DecideFresh(t.Context(), s, r, ago(age))
				assert.ErrorIs(t, err, redisstore.ErrStale, "%d, step %d: %+v", i, step, r)
				age = -1
			}
			want, err := storecheck.Decide(t.Context(), model, r)
			assert.NoError(t, err)
			got, err := storecheck.DecideFresh(t.Context(), s, r, ago(age))
			if !assert.NoError(t, err) || !assert.Equal(t, said(&want), said(&got), "%d, step %d: %+v", i, step, r) {
				return
			}
		}
	})
}

// ago returns the time that was age ago, or 0 for a negative age.
func ago(age time.Duration) int64 {
	if age < 0 {
		return 0
	}
	return law.Monotonic() - age.Microseconds()
}

// assertDoubted asserts that each DecideFresh is ErrRestarted until the first Decide.
func assertDoubted(t *testing.T, s *redisstore.Storage, r storecheck.Request) {
	t.Helper()
	for _, age := range append(ages, -1) {
		for _, mode := range []storage.Mode{storage.Take, storage.Peek, storage.Force} {
			r.Mode = mode
			v, err := storecheck.DecideFresh(t.Context(), s, r, ago(age))
			assert.ErrorIs(t, err, redisstore.ErrRestarted)
			assert.ErrorIs(t, err, redisstore.ErrStale)
			assert.Equal(t, storecheck.Verdict{}, v)
		}
	}
	r.Mode = storage.Take
	assert.Equal(t, 1, storecheck.Take(t, s, r, 1))
	for _, age := range []time.Duration{-1, time.Hour} {
		v, err := storecheck.DecideFresh(t.Context(), s, r, ago(age))
		assert.NoError(t, err)
		assert.True(t, v.Allowed)
	}
}

func TestAServerThatLostItsScriptsIsDoubtedUntilTheNextDecide(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s, c := open(t, server.URL(), redisstore.Options{}), client(t, server.URL())
	assertDoubted(t, s, storecheck.Hourly(t, "a", 100)) // it has never had any
	require.NoError(t, c.ScriptFlush(t.Context()).Err())
	require.NoError(t, s.Raise(t.Context(), debtOf(storecheck.Hourly(t, "a", 100), 1)))
	assertDoubted(t, s, storecheck.Hourly(t, "a", 100))
	assert.Equal(t, int64(6), storecheck.Spent(t, s, storecheck.Hourly(t, "a", 100)))
}

func TestAServerThatWasKilledAndStartedAgainIsDoubted(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s, r := open(t, server.URL(), redisstore.Options{}), storecheck.Hourly(t, "a", 100)
	require.Equal(t, 1, storecheck.Take(t, s, r, 1))
	require.NoError(t, server.Kill())
	_, err := storecheck.DecideFresh(t.Context(), s, r, ago(-1))
	require.ErrorIs(t, err, storage.ErrUnavailable)
	require.NoError(t, server.Start())
	storecheck.Recovery(t, storecheck.Patient, func() error {
		_, err = storecheck.DecideFresh(t.Context(), s, r, ago(-1))
		if errors.Is(err, redisstore.ErrStale) {
			return nil
		}
		assert.Error(t, err, "it was believed")
		return err
	})
	assertDoubted(t, s, r)
}

func TestANodeOfAClusterThatLostItsScriptsIsDoubted(t *testing.T) {
	t.Parallel()
	r := newRing(t)
	plain, _ := r.open(t, 0)
	for node := range r.nodes {
		ask := storecheck.Hourly(t, r.idOn(t, node), 100)
		assertDoubted(t, plain, ask)
		require.NoError(t, r.nodes[node].ScriptFlush(t.Context()).Err())
		assertDoubted(t, plain, ask)
		assert.Equal(t, int64(6), storecheck.Spent(t, plain, ask))
	}
}

// flushed lets half of 64 goroutines use DecideFresh, while the server forgets its scripts again and again.
func flushed(t *testing.T, s *redisstore.Storage, flush func()) {
	t.Helper()
	var doubting, others storecheck.Told
	stop, ended := make(chan struct{}), make(chan int)
	go func() { ended <- repeatedly(time.Millisecond, stop, flush) }()
	storecheck.Crowd(64, func(i int) {
		r := storecheck.Hourly(t, fmt.Sprint("id-", i/2), 1<<40)
		for range 200 {
			if i%2 == 0 {
				assert.NoError(t, others.Ask(s, r), "a call was disturbed that does not doubt")
				continue
			}
			v, err := storecheck.DecideFresh(context.Background(), s, r, ago(-1))
			if errors.Is(err, redisstore.ErrStale) {
				doubting.Failed.Add(1)
			} else if assert.NoError(t, err) && v.Allowed {
				doubting.Admitted.Add(1)
			}
		}
	})
	close(stop)
	t.Log("forgotten", <-ended, "times,", doubting.Failed.Load(), "stale,", doubting.Admitted.Load(), "fresh")
	taken := int64(0)
	for i := range 32 {
		taken += storecheck.Spent(t, s, storecheck.Hourly(t, fmt.Sprint("id-", i), 1<<40))
	}
	assert.Equal(t, int64(32*200), others.Admitted.Load())
	assert.Equal(t, doubting.Admitted.Load()+others.Admitted.Load(), taken, "what was stale took nothing")
	assert.Positive(t, doubting.Failed.Load())
}

func TestCallsThatDoubtAndOthersShareFlightsToAServerThatForgetsItsScripts(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	c := client(t, server.URL())
	flushed(t, open(t, server.URL(), redisstore.Options{}), func() { assert.NoError(t, c.ScriptFlush(context.Background()).Err()) })
}

func TestCallsThatDoubtAndOthersSharePipelinesToNodesThatForgetTheirScripts(t *testing.T) {
	t.Parallel()
	r := newRing(t)
	plain, _ := r.open(t, 0)
	flushed(t, plain, func() { assert.NoError(t, r.nodes[rand.IntN(3)].ScriptFlush(context.Background()).Err()) })
}
