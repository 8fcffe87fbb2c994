package redis_test

import (
	"context"
	"sync"
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
)

// debt returns a debt of n amounts of one token each, which come back one second after another, beginning after first
// seconds.
func debt(r law.Rule, now int64, id string, first, n int) replica.Debt {
	d := replica.Debt{Name: "debts", Clocked: true, Now: now, Identifier: id, Rules: law.NewRuleSet([]law.Rule{r}...), Amounts: make([][]storage.Amount, 1)}
	for i := range n {
		d.Amounts[0] = append(d.Amounts[0], storage.Amount{N: 1, In: int64(first+i+1) * 1_000_000})
	}
	return d
}

func TestAnIdentifierWithThousandsOfHoldsIsDecidedOn(t *testing.T) {
	t.Parallel()
	s := open(t, servers.RedisURL(t), redisstore.Options{})
	r := storecheck.Rule(t, "w", law.FixedWindow, time.Second, 100_000)
	now := int64(1_700_000_000_000_000)
	require.NoError(t, s.Raise(t.Context(), debt(r, now, "a", 0, 4096)))
	v, err := storecheck.Decide(t.Context(), s, storecheck.Request{Name: "debts", Clocked: true, Now: now + 1_500_000, Parts: []storecheck.Part{storecheck.NewPart("a", []law.Rule{r}, 1)}})
	require.NoError(t, err)
	assert.Equal(t, int64(100_000-4096+1-1), v.Levels()[0].Remaining, "one is back, one was taken")
}

func TestMoreHoldsThanTheFormHasRoomForAreRefused(t *testing.T) {
	t.Parallel()
	s := open(t, servers.RedisURL(t), redisstore.Options{})
	r := storecheck.Rule(t, "w", law.FixedWindow, time.Second, 100_000)
	now := int64(1_700_000_000_000_000)
	var err error
	for k := 0; err == nil && k < 17; k++ { // each one adds earlier ends to those that are stored
		d := debt(r, now, "b", (16-k)*4096, 4096)
		d.Amounts[0][4095].N = int64(k)*4096 + 1
		err = s.Raise(t.Context(), d)
	}
	var e *storage.BucketError
	require.ErrorAs(t, err, &e)
	_, err = storecheck.Decide(t.Context(), s, storecheck.Request{Name: "debts", Clocked: true, Now: now, Mode: storage.Peek, Parts: []storecheck.Part{storecheck.NewPart("b", []law.Rule{r}, 1)}})
	require.NoError(t, err, "what was there before is still there")
}

// hook sees the commands of a client, except those in pipelines.
type hook func(ctx context.Context, cmd goredis.Cmder, next goredis.ProcessHook) error

func (hook) DialHook(next goredis.DialHook) goredis.DialHook { return next }

func (h hook) ProcessHook(next goredis.ProcessHook) goredis.ProcessHook {
	return func(ctx context.Context, cmd goredis.Cmder) error { return h(ctx, cmd, next) }
}

func (hook) ProcessPipelineHook(next goredis.ProcessPipelineHook) goredis.ProcessPipelineHook {
	return next
}

func TestTheHooksOfAClientSeeTheScripts(t *testing.T) {
	t.Parallel()
	c := client(t, servers.RedisURL(t))
	s := on(t, c, redisstore.Options{Timeout: storecheck.Patient})
	seen := 0
	c.AddHook(hook(func(ctx context.Context, cmd goredis.Cmder, next goredis.ProcessHook) error {
		seen++
		return next(ctx, cmd)
	}))
	storecheck.Take(t, s, storecheck.FivePerHour(t, "hooked"), 1)
	assert.NotZero(t, seen, "tracing and metrics of the caller are hooks")
}

func TestAHookThatPanicsIsAFailureOfTheStorage(t *testing.T) {
	t.Parallel()
	c := client(t, servers.RedisURL(t))
	s := on(t, c, redisstore.Options{Timeout: storecheck.Patient})
	c.AddHook(hook(func(context.Context, goredis.Cmder, goredis.ProcessHook) error { panic("in the hook") }))
	_, err := storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, "panic"))
	require.ErrorIs(t, err, storage.ErrUnavailable)
	assert.ErrorContains(t, err, "in the hook")
}

func TestAnAnswerThatIsNoneOfTheScriptIsAFailureOfTheStorage(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "\x00", "\x01too short", "\x04", "\x05", "\x06", "\x07", "\x01 much longer than an answer of one bucket is"} {
		c := client(t, servers.RedisURL(t))
		s := on(t, c, redisstore.Options{Timeout: storecheck.Patient})
		c.AddHook(hook(func(_ context.Context, cmd goredis.Cmder, _ goredis.ProcessHook) error {
			cmd.(interface{ SetVal(any) }).SetVal(text)
			return nil
		}))
		_, err := storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, "odd"))
		require.ErrorIs(t, err, storage.ErrUnavailable, "%q", text)
	}
}

// A plain client of a cluster node, or of a proxy, does not know that there are slots.
func TestIdentifiersOfDifferentSlotsDoNotDisturbEachOtherOnASingleNode(t *testing.T) {
	t.Parallel()
	s := on(t, client(t, servers.RedisCluster(t, 3).Nodes[0].URL()), redisstore.Options{Timeout: storecheck.Patient})
	var ids []string
	for i := 0; len(ids) < 8; i++ {
		id := string(rune('a'+i%26)) + string(rune('a'+i/26))
		if _, err := storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, id)); err == nil { // its slot is on this node
			ids = append(ids, id)
		}
	}
	var wait sync.WaitGroup
	for range 64 {
		for _, id := range ids {
			wait.Go(func() {
				r := storecheck.FivePerHour(t, id)
				r.Mode = storage.Peek
				_, err := storecheck.Decide(context.Background(), s, r)
				assert.NoError(t, err)
			})
		}
	}
	wait.Wait()
}

func TestATimeToLiveOutlastsWhatAClockAheadHasWritten(t *testing.T) {
	t.Parallel()
	url := servers.RedisURL(t)
	s := open(t, url, redisstore.Options{})
	r := storecheck.Request{Name: "ahead", Parts: []storecheck.Part{storecheck.NewPart("a", []law.Rule{storecheck.Rule(t, "w", law.Replenish, 24*time.Hour, 5)}, 1)}}
	ahead := r
	ahead.Clocked, ahead.Now = true, time.Now().Add(2*time.Hour).UnixMicro()
	require.NoError(t, s.Reset(t.Context(), "ahead", "a"))
	storecheck.Take(t, s, ahead, 1)
	v, err := storecheck.Decide(t.Context(), s, r)
	require.NoError(t, err)
	ttl, err := client(t, url).PTTL(t.Context(), "throttler:ahead:a").Result()
	require.NoError(t, err)
	assert.Greater(t, ttl, v.Levels()[0].ResetAfter)
}

func TestARefundIsWholeThoughTheServerIsSlow(t *testing.T) {
	t.Parallel()
	url := servers.Redis(t).URL()
	for kind := range law.SlidingLog + 1 {
		s, r := open(t, url, redisstore.Options{}), storecheck.Rule(t, "b", kind, 10*time.Second, 10)
		name := freshName()
		v, err := storecheck.Decide(t.Context(), s, storecheck.Request{Name: name, Parts: []storecheck.Part{storecheck.NewPart("u", []law.Rule{r}, 4)}})
		require.NoError(t, err)
		require.True(t, v.Allowed)
		require.NoError(t, client(t, url).Do(t.Context(), "client", "pause", 60).Err()) // more than a 256th of the period
		require.NoError(t, s.Charge(t.Context(), &storage.Charge{Name: name, Identifier: "u", Rules: law.NewRuleSet(r), Amounts: []storage.Amount{{N: -4, In: v.Count(0).HeldFor}}}))
		v, err = storecheck.Decide(t.Context(), s, storecheck.Request{Name: name, Mode: storage.Peek, Parts: []storecheck.Part{storecheck.NewPart("u", []law.Rule{r}, 0)}})
		require.NoError(t, err)
		assert.EqualValues(t, 10, v.Levels()[0].Remaining, "%v", kind)
	}
}
