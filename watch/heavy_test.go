package watch_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/watch"
)

// ask observes a call that asks for tokens of an identifier, whatever the result.
func ask(w *watch.Watch, id string, cost int64) {
	w.Observe(ctx, &throttler.Event{Op: throttler.OpConsume, Identifier: id, Cost: cost, Time: time.Now()})
}

// truth counts exactly what each identifier asks for.
type truth map[string]int64

func (c truth) ask(w *watch.Watch, id string, cost int64) {
	c[id] += cost
	ask(w, id, cost)
}

// top returns the identifiers that asked for most.
func (c truth) top(n int) (ids []string) {
	for id := range c {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b string) int { return int(c[b] - c[a]) })
	return ids[:n]
}

func TestTheHeaviestOfAMillionAreFound(t *testing.T) {
	t.Parallel()
	w, asked := watch.New(nil), make(truth)
	zipf := rand.NewZipf(rand.New(rand.NewPCG(1, 1)), 1.1, 1, 999_999)
	for range 1_000_000 {
		asked.ask(w, fmt.Sprint("user:", zipf.Uint64()), 1)
	}
	found := w.Snapshot().MostAsked
	require.Len(t, found, 20)
	for i, id := range asked.top(20) {
		require.Equal(t, asked[id], asked[found[i].Identifier], "rank %d", i) // equal ones may come in any order
		require.LessOrEqual(t, found[i].AskedLeast, asked[id])
		require.InDelta(t, 1.025, float64(found[i].Asked)/float64(asked[id]), 0.025)
	}
}

func TestNobodyIsNamedWhenNobodyIsHeavy(t *testing.T) {
	t.Parallel()
	w := watch.New(nil)
	random := rand.New(rand.NewPCG(1, 1))
	for range 1_000_000 {
		ask(w, fmt.Sprint("user:", random.IntN(10_000)), 1)
	}
	s := w.Snapshot()
	require.Empty(t, s.MostAsked)
	require.Empty(t, s.MostDenied)
}

func TestAnAttackerIsNamedAmongAMillion(t *testing.T) {
	t.Parallel()
	w := watch.New(nil)
	random := rand.New(rand.NewPCG(1, 1))
	for i := range 500_000 {
		ask(w, fmt.Sprint("user:", random.IntN(1_000_000)), 1)
		if i%50 == 0 {
			ask(w, "attacker", 1)
		}
	}
	found := w.Snapshot().MostAsked
	require.Len(t, found, 1)
	require.Equal(t, "attacker", found[0].Identifier)
	require.LessOrEqual(t, found[0].AskedLeast, int64(10_000))
	require.InDelta(t, 1.025, float64(found[0].Asked)/10_000, 0.025)
}

func TestOneCallOfManyTokensIsHeavy(t *testing.T) {
	t.Parallel()
	w := watch.New(nil)
	for i := range 100_000 {
		ask(w, fmt.Sprint("user:", i), 1)
	}
	ask(w, "glutton", 50_000)
	ask(w, "beyond all sums", 1<<62)
	for range 100 {
		ask(w, "never below zero", 1<<62)
	}
	found := w.Snapshot().MostAsked
	require.Equal(t, "never below zero", found[0].Identifier)
	require.Positive(t, found[0].AskedLeast)
}

func TestTheLastMinuteCountsAndTheOneBeforeDoesNot(t *testing.T) {
	inABubble(t, func(t *testing.T) {
		w := watch.New(nil)
		few := observed(t, w, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(24*time.Hour, 4)}})
		consume(t, few, 6, "a")
		<-time.After(60 * time.Second)
		consume(t, few, 3, "a")
		want := watch.Heavy{Identifier: "a", Asked: 9, AskedLeast: 9, Denied: 5, DeniedLeast: 5}
		require.Equal(t, []watch.Heavy{want}, w.Snapshot().MostAsked)
		<-time.After(59 * time.Second)
		require.Equal(t, []watch.Heavy{want}, w.Snapshot().MostDenied)
		<-time.After(time.Second)
		want = watch.Heavy{Identifier: "a", Asked: 3, AskedLeast: 3, Denied: 3, DeniedLeast: 3}
		require.Equal(t, []watch.Heavy{want}, w.Snapshot().MostAsked)
		require.Equal(t, w.Snapshot().HeavySince, w.Snapshot().Since.Add(time.Minute))
		<-time.After(time.Minute)
		require.Empty(t, w.Snapshot().MostAsked)
		consume(t, few, 1, "a")
		require.Len(t, w.Snapshot().MostAsked, 1)
		<-time.After(5 * time.Minute)
		require.Empty(t, w.Snapshot().MostAsked)
	})
}

func TestEachIdentifierOfACallCounts(t *testing.T) {
	t.Parallel()
	w := watch.New(nil)
	one := observed(t, w, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 10), plenty}})
	for range 4 {
		_, err := one.ConsumeAll(ctx, throttler.For("user:42", throttler.Cost(1)), throttler.For("org:7", throttler.Cost(4)), throttler.For("all"))
		require.NoError(t, err)
	}
	require.Equal(t, []watch.Heavy{
		{Identifier: "org:7", Asked: 16, AskedLeast: 16, Denied: 2, DeniedLeast: 2},
		{Identifier: "all", Asked: 4, AskedLeast: 4},
		{Identifier: "user:42", Asked: 4, AskedLeast: 4},
	}, w.Snapshot().MostAsked)
	require.Len(t, w.Snapshot().MostDenied, 1)
}

func TestChargesCountAndPeeksAndRefundsDoNot(t *testing.T) {
	t.Parallel()
	w := watch.New(nil)
	one := observed(t, w, throttler.Config{Buckets: []throttler.Bucket{plenty}})
	require.NoError(t, one.Charge(ctx, "a", throttler.Cost(70)))
	v, err := one.Consume("a", throttler.Cost(7))
	require.NoError(t, err)
	require.NoError(t, one.Refund(ctx, v, throttler.Cost(7)))
	_, err = one.Peek(ctx, "a", throttler.Cost(500))
	require.NoError(t, err)
	_, err = one.Consume("b", throttler.Cost(0))
	require.NoError(t, err)
	require.Equal(t, []watch.Heavy{{Identifier: "a", Asked: 77, AskedLeast: 77}}, w.Snapshot().MostAsked)
}

func TestAMaskedIdentifierIsNowhere(t *testing.T) {
	t.Parallel()
	w := watch.New(&watch.Options{Mask: func(id string) string { return fmt.Sprint("masked ", len(id)) }})
	few := observed(t, w, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 4)}})
	consume(t, few, 6, "jane@example.com")
	out, err := json.Marshal(w.Snapshot())
	require.NoError(t, err)
	require.Contains(t, string(out), "masked 16")
	require.NotContains(t, string(out), "jane")
	require.NotContains(t, get(t, w, "/").Body.String(), "jane")
}

func TestAMaskThatPanicsHoldsUpNobody(t *testing.T) {
	t.Parallel()
	w := watch.New(&watch.Options{Mask: func(string) string { panic("a fault of the mask") }})
	require.Panics(t, func() { ask(w, "a", 1) })
	require.Empty(t, w.Snapshot().MostAsked)
}

func TestALongIdentifierIsCut(t *testing.T) {
	t.Parallel()
	w := watch.New(nil)
	ask(w, strings.Repeat("x", 1024), 1)
	require.Equal(t, strings.Repeat("x", 128), w.Snapshot().MostAsked[0].Identifier)
}

func TestAKeptIdentifierIsNotTheCallersMemory(t *testing.T) {
	t.Parallel()
	w, memory := watch.New(nil), []byte("user:42")
	ask(w, unsafe.String(&memory[0], len(memory)), 1)
	copy(memory, "user:13")
	require.Equal(t, "user:42", w.Snapshot().MostAsked[0].Identifier)
}

// TestAFloodOfIdentifiersTakesNoMemory measures memory, so it runs alone.
func TestAFloodOfIdentifiersTakesNoMemory(t *testing.T) {
	w := watch.New(nil)
	for minute := range 3 {
		before := heap()
		flood(w, minute, 200_000)
		require.Less(t, heap()-before, int64(4<<20), "bytes")
	}
	runtime.KeepAlive(w)
}

func TestAFloodOfBucketNamesTakesNoMemory(t *testing.T) {
	w := watch.New(nil)
	all := observed(t, w, throttler.Config{})
	flood := func(n int) {
		for i := range n {
			name := fmt.Sprintf("%d of %d", i, n)
			consume(t, all, 1, name, throttler.Using(plenty.Named(name)), throttler.Cost(0))
		}
	}
	flood(1000)
	before := heap()
	flood(50_000)
	require.Less(t, heap()-before, int64(1<<20), "bytes")
	runtime.KeepAlive(w)
}

func TestAFloodOfIdentifiersAllocatesNothing(t *testing.T) {
	w := watch.New(nil)
	flood(w, 0, 50_000)
	const n = 50_000
	ids := make([]string, n+1)
	for i := range ids {
		ids[i] = fmt.Sprint("user:", i)
	}
	i, e := 0, &throttler.Event{Op: throttler.OpConsume, Cost: 1, Time: time.Now()}
	require.Zero(t, testing.AllocsPerRun(n, func() {
		e.Identifier = ids[i]
		w.Observe(ctx, e)
		i++
	}))
}

// flood asks for n different identifiers of 500 bytes.
func flood(w *watch.Watch, minute, n int) {
	for i := range n {
		ask(w, fmt.Sprintf("%d %d %s", minute, i, strings.Repeat("x", 500)), 1)
	}
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
