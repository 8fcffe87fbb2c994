package throttlerotel_test

import (
	"context"
	"fmt"
	"iter"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/lease"
	memstore "github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/throttlerotel"
)

// measured returns a Throttler with metrics, and a reader of them.
func measured(t *testing.T, c throttler.Config, most int) (*metric.ManualReader, *throttlerotel.Metrics, *throttler.Throttler) {
	t.Helper()
	r := metric.NewManualReader()
	m, err := throttlerotel.New(&throttlerotel.Options{MeterProvider: metric.NewMeterProvider(metric.WithReader(r)), MaxBuckets: most})
	require.NoError(t, err)
	c.Observe = m.Observe
	th, err := throttler.New(c)
	require.NoError(t, err)
	return r, m, th
}

func read(t *testing.T, r metric.Reader) []metricdata.Metrics {
	t.Helper()
	var all metricdata.ResourceMetrics
	require.NoError(t, r.Collect(t.Context(), &all))
	require.Len(t, all.ScopeMetrics, 1)
	assert.Equal(t, "github.com/go-throttler/throttler/throttlerotel", all.ScopeMetrics[0].Scope.Name)
	return all.ScopeMetrics[0].Metrics
}

// figures returns all values that are not 0, and for histograms the counts.
func figures(t *testing.T, r metric.Reader) (out []string) {
	t.Helper()
	add := func(name string, attributes attribute.Set, n any) {
		var values []string
		for _, a := range attributes.ToSlice() {
			values = append(values, a.Value.String())
		}
		if s := fmt.Sprint(n); s != "0" {
			out = append(out, fmt.Sprintf("%s{%s} %s", strings.TrimPrefix(name, "throttler."), strings.Join(values, " "), s))
		}
	}
	for _, m := range read(t, r) {
		switch d := m.Data.(type) {
		case metricdata.Sum[int64]:
			for _, p := range d.DataPoints {
				add(m.Name, p.Attributes, p.Value)
			}
		case metricdata.Sum[float64]:
			for _, p := range d.DataPoints {
				add(m.Name, p.Attributes, p.Value)
			}
		case metricdata.Gauge[float64]:
			for _, p := range d.DataPoints {
				add(m.Name, p.Attributes, p.Value)
			}
		case metricdata.Histogram[float64]:
			for _, p := range d.DataPoints {
				add(m.Name, p.Attributes, p.Count)
			}
		default:
			t.Errorf("%s is a %T", m.Name, d)
		}
	}
	slices.Sort(out)
	return out
}

// failover reports figures as the failover storage does, without servers.
type failover struct{}

func (failover) Stats() iter.Seq2[string, float64] {
	return func(yield func(string, float64) bool) {
		for i, name := range []string{"degraded", "flush_failing", "lag_seconds", "pending", "transitions_total", "relayed_total", "forgotten_total", "unheard_of"} {
			if !yield("failover_"+name, float64(i+1)) {
				return
			}
		}
	}
}

func TestTheNamesAndUnitsOfInstrumentsAreThese(t *testing.T) {
	t.Parallel()
	r, m, th := measured(t, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 3)}}, 0)
	m.Storage("main", failover{})
	m.Storage("memory", memstore.New(nil))
	leases, err := lease.New(memstore.New(nil), nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, leases.Close(context.Background())) }()
	m.Storage("leases", leases)
	v, err := th.Wait(t.Context(), "a", throttler.Cost(3))
	require.NoError(t, err)
	_, _ = th.Consume("a")
	require.NoError(t, th.Refund(t.Context(), v))
	_, _ = th.Consume("")
	var got []string
	for _, m := range read(t, r) {
		assert.NotEmpty(t, m.Description, m.Name)
		got = append(got, m.Name+" "+m.Unit)
	}
	slices.Sort(got)
	assert.Equal(t, []string{
		"throttler.decision.duration s",
		"throttler.decisions {decision}",
		"throttler.denials {denial}",
		"throttler.errors {error}",
		"throttler.failover.degraded 1",
		"throttler.failover.flush_failing 1",
		"throttler.failover.forgotten {admission}",
		"throttler.failover.lag s",
		"throttler.failover.pending {identifier}",
		"throttler.failover.relayed {identifier}",
		"throttler.failover.transitions {transition}",
		"throttler.identifiers {identifier}",
		"throttler.lease.calls {call}",
		"throttler.lease.identifiers {identifier}",
		"throttler.lease.local {call}",
		"throttler.lease.remembered {call}",
		"throttler.lease.returned {lease}",
		"throttler.lease.tokens {token}",
		"throttler.near_limit {decision}",
		"throttler.refunded_tokens {token}",
		"throttler.tokens {token}",
		"throttler.wait.duration s",
		"throttler.waiting {call}",
	}, got)
}

func TestCallsAreCountedByResultAndBucket(t *testing.T) {
	t.Parallel()
	store := memstore.New(nil)
	r, m, th := measured(t, throttler.Config{Name: "api", Storage: store, Buckets: []throttler.Bucket{
		throttler.NewBucket(time.Minute, 10).Named("m"), throttler.NewBucket(time.Hour, 12).Named("h"),
	}}, 0)
	m.Storage("memory", store)
	v, err := th.Consume("a", throttler.Cost(9)) // leaves 1 of m and 3 of h
	require.NoError(t, err)
	_, _ = th.Consume("a", throttler.Cost(4))
	_, _ = th.Peek(t.Context(), "a", throttler.Cost(4))
	assert.Contains(t, figures(t, r), "identifiers{memory} 1")
	require.NoError(t, th.Refund(t.Context(), v, throttler.CostOf("m", 5)))
	require.NoError(t, th.Charge(t.Context(), "a", throttler.CostOf("h", 2)))
	require.NoError(t, th.Reset(t.Context(), "a"))
	_, _ = th.Consume("a", throttler.Cost(-1))
	m.Storage("memory", nil)
	assert.Equal(t, []string{
		"decision.duration{runtime} 5",
		"decision.duration{} 1",
		"decisions{api charge allowed runtime} 1",
		"decisions{api consume allowed runtime} 1",
		"decisions{api consume denied runtime} 1",
		"decisions{api consume error } 1",
		"decisions{api peek denied runtime} 1",
		"decisions{api refund allowed runtime} 1",
		"decisions{api reset allowed } 1",
		"denials{h api} 1",
		"denials{m api} 1",
		"errors{invalid api} 1",
		"near_limit{h api} 1",
		"near_limit{m api} 1",
		"refunded_tokens{m api} 5",
		"tokens{h api} 11",
		"tokens{m api} 10",
	}, figures(t, r))
}

func TestAWaitIsOneCall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, _, th := measured(t, throttler.Config{Name: "api", Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 1).Named("b")}}, 0)
		for range 3 {
			go func() { _, _ = th.Wait(t.Context(), "a") }()
			synctest.Wait()
		}
		assert.Contains(t, figures(t, r), "waiting{api} 2")
		<-time.After(2 * time.Second)
		synctest.Wait()
		late, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, _ = th.Wait(late, "a")
		gone, leave := context.WithCancel(t.Context())
		go func() { _, _ = th.Wait(gone, "a") }()
		synctest.Wait()
		leave()
		synctest.Wait()
		got := figures(t, r)
		assert.Subset(t, got, []string{
			"decisions{api wait allowed runtime} 3", "decisions{api wait denied runtime} 2", "denials{b api} 2", "tokens{b api} 3",
			"wait.duration{api admitted} 3", "wait.duration{api deadline} 1", "wait.duration{api gave_up} 1",
		})
		for _, f := range got {
			assert.NotContains(t, f, "waiting")
			assert.NotContains(t, f, "consume")
		}
	})
}

func TestADenialIsAnEventOnTheSpanOfTheCaller(t *testing.T) {
	t.Parallel()
	_, _, th := measured(t, throttler.Config{Name: "api", Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1).FixedWindow().Named("b")}}, 0)
	spans := tracetest.NewSpanRecorder()
	ctx, span := trace.NewTracerProvider(trace.WithSpanProcessor(spans)).Tracer("test").Start(t.Context(), "request")
	for range 2 {
		_, err := th.ConsumeContext(ctx, "user:42")
		require.NoError(t, err)
	}
	_, err := th.Peek(ctx, "user:42")
	require.NoError(t, err)
	span.End()
	require.Len(t, spans.Ended(), 1, "it makes none of its own")
	got := spans.Ended()[0]
	assert.Equal(t, codes.Unset, got.Status().Code)
	require.Len(t, got.Events(), 1)
	assert.Equal(t, "throttler.denied", got.Events()[0].Name)
	attributes := attribute.NewSet(got.Events()[0].Attributes...)
	for key, want := range map[attribute.Key]string{"throttler.name": "api", "throttler.bucket": "b"} {
		value, _ := attributes.Value(key)
		assert.Equal(t, want, value.AsString())
	}
	retry, _ := attributes.Value("throttler.retry_after")
	assert.Positive(t, retry.AsFloat64())
	assert.NotContains(t, fmt.Sprint(got.Events()), "user:42")
}

func TestAChargeInPartCountsWhatWasRecorded(t *testing.T) {
	t.Parallel()
	r, _, th := measured(t, throttler.Config{Name: "api", Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 10).Named("m"), throttler.NewBucket(time.Hour, 1000).Named("h")}}, 0)
	require.NoError(t, th.Charge(t.Context(), "a", throttler.Cost(13)))
	require.ErrorIs(t, th.Charge(t.Context(), "a", throttler.Cost(100)), throttler.ErrDebtLimit)
	assert.Subset(t, figures(t, r), []string{"tokens{h api} 113", "tokens{m api} 40"})
}

func TestMoreBucketsThanMaxBucketsAreOneOther(t *testing.T) {
	t.Parallel()
	r, _, th := measured(t, throttler.Config{Name: "api"}, 2)
	for i := range 5 {
		_, err := th.Consume("a", throttler.Using(throttler.NewBucket(time.Hour, 9).Named(fmt.Sprint("user ", i))))
		require.NoError(t, err)
	}
	got := figures(t, r)
	assert.Subset(t, got, []string{"tokens{other api} 3", "tokens{user 0 api} 1", "tokens{user 1 api} 1"})
	_, err := throttlerotel.New(&throttlerotel.Options{MaxBuckets: -1})
	assert.EqualError(t, err, "throttlerotel: Options.MaxBuckets is -1, must be 0 or more")
}

func TestConcurrentCallsGetNoMoreThanMaxBuckets(t *testing.T) {
	t.Parallel()
	for range 200 {
		r, m, _ := measured(t, throttler.Config{}, 1)
		var all sync.WaitGroup
		begin := make(chan struct{})
		for i := range 4 {
			th, err := throttler.New(throttler.Config{Observe: m.Observe, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 9).Named(fmt.Sprint("user ", i))}})
			require.NoError(t, err)
			all.Go(func() {
				<-begin
				_, err := th.Consume("a")
				assert.NoError(t, err)
			})
		}
		close(begin)
		all.Wait()
		own := 0
		for _, f := range figures(t, r) {
			if strings.HasPrefix(f, "tokens{user") {
				own++
			}
		}
		require.Equal(t, 1, own)
	}
}

func TestObservingAllocatesNothing(t *testing.T) {
	_, _, th := measured(t, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 500), throttler.NewBucket(time.Minute, 1<<40)}}, 0)
	call := func() { _, _ = th.Consume("user:42") }
	for range 600 {
		call()
	}
	assert.Zero(t, testing.AllocsPerRun(1000, call), "denied")
	require.NoError(t, th.Reset(t.Context(), "user:42"))
	assert.Zero(t, testing.AllocsPerRun(400, call), "admitted")
}

func TestMemoryDoesNotGrowWithIdentifiers(t *testing.T) {
	r, m, _ := measured(t, throttler.Config{}, 0)
	e := throttler.Event{Op: throttler.OpConsume, Duration: time.Microsecond}
	m.Observe(t.Context(), &e)
	before := heap()
	for i := range 200_000 {
		e := e
		e.Identifier = fmt.Sprint("user:", i)
		m.Observe(t.Context(), &e)
	}
	assert.Equal(t, []string{"decision.duration{} 200001", "decisions{ consume denied } 200001"}, figures(t, r))
	assert.Less(t, heap()-before, int64(1<<20))
}

func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// OTLP sends nothing at all of what a program counts if one text of it is not UTF-8.
func TestNamesThatAreNotUTF8AreMended(t *testing.T) {
	t.Parallel()
	r, m, _ := measured(t, throttler.Config{}, 0)
	store := memstore.New(nil)
	m.Storage("a\xff", store)
	th, err := throttler.New(throttler.Config{Observe: m.Observe, Storage: oddlyNamed{store}, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 9)}})
	require.NoError(t, err)
	_, err = th.Consume("a")
	require.NoError(t, err)
	got := figures(t, r)
	assert.Subset(t, got, []string{"decisions{ consume allowed b?} 1", "decision.duration{b?} 1", "identifiers{a?} 1"})
	for _, f := range got {
		assert.True(t, utf8.ValidString(f), "%q", f)
	}
}

// oddlyNamed is a storage whose name is not UTF-8.
type oddlyNamed struct{ storage.Storage }

func (s oddlyNamed) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	err := s.Storage.Decide(ctx, r, a)
	a.Source = "b\xff"
	return err
}
