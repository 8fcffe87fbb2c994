package throttlerprom_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage/lease"
	memstore "github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/throttlerprom"
)

// measured returns a registry with the metrics of a Throttler.
func measured(t *testing.T, c throttler.Config, o *throttlerprom.Options) (*prometheus.Registry, *throttlerprom.Metrics, *throttler.Throttler) {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	m, err := throttlerprom.New(r, o)
	require.NoError(t, err)
	c.Observe = m.Observe
	th, err := throttler.New(c)
	require.NoError(t, err)
	return r, m, th
}

// figures returns all values that are not 0, except the sums and buckets of histograms.
func figures(t *testing.T, r prometheus.Gatherer) (out []string) {
	t.Helper()
	families, err := r.Gather()
	require.NoError(t, err)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetValue())
			}
			n := m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			if n != 0 {
				out = append(out, fmt.Sprintf("%s{%s} %v", strings.TrimPrefix(f.GetName(), "throttler_"), strings.Join(labels, " "), n))
			}
		}
	}
	return out
}

// failover reports the figures of the failover storage without any servers.
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

func TestTheNamesOfMetricsAndLabelsAreThese(t *testing.T) {
	t.Parallel()
	r, m, th := measured(t, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1)}}, nil)
	m.Storage("main", failover{})
	m.Storage("memory", memstore.New(nil))
	leases, err := lease.New(memstore.New(nil), nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, leases.Close(context.Background())) }()
	m.Storage("leases", leases)
	_, _ = th.Wait(t.Context(), "a")
	_, _ = th.Consume("")
	families, err := r.Gather()
	require.NoError(t, err)
	var got []string
	for _, f := range families {
		var labels []string
		for _, l := range f.GetMetric()[0].GetLabel() {
			labels = append(labels, l.GetName())
		}
		got = append(got, fmt.Sprint(f.GetName(), " ", strings.ToLower(f.GetType().String()), " ", strings.Join(labels, ",")))
	}
	assert.Equal(t, []string{
		"throttler_decision_duration_seconds histogram source",
		"throttler_decisions_total counter name,op,result,source",
		"throttler_denials_total counter bucket,name",
		"throttler_errors_total counter name,type",
		"throttler_failover_degraded gauge storage",
		"throttler_failover_flush_failing gauge storage",
		"throttler_failover_forgotten_total counter storage",
		"throttler_failover_lag_seconds gauge storage",
		"throttler_failover_pending gauge storage",
		"throttler_failover_relayed_total counter storage",
		"throttler_failover_transitions_total counter storage",
		"throttler_identifiers gauge storage",
		"throttler_lease_calls_total counter storage",
		"throttler_lease_identifiers gauge storage",
		"throttler_lease_local_total counter storage",
		"throttler_lease_remembered_total counter storage",
		"throttler_lease_returned_total counter storage",
		"throttler_lease_tokens gauge storage",
		"throttler_limit_full_tokens gauge bucket,name",
		"throttler_limit_period_seconds gauge bucket,name",
		"throttler_limit_tokens gauge bucket,name",
		"throttler_near_limit_total counter bucket,name",
		"throttler_refunded_tokens_total counter bucket,name",
		"throttler_tokens_total counter bucket,name",
		"throttler_wait_duration_seconds histogram name,result",
		"throttler_waiting gauge name",
	}, got)
	problems, err := testutil.GatherAndLint(r)
	require.NoError(t, err)
	assert.Empty(t, problems)
}

func TestCallsAreCountedByResultAndBucket(t *testing.T) {
	t.Parallel()
	store := memstore.New(nil)
	r, m, th := measured(t, throttler.Config{Name: "api", Storage: store, Buckets: []throttler.Bucket{
		throttler.NewBucket(time.Minute, 10).Named("m"), throttler.NewBucket(time.Hour, 12).Named("h"),
	}}, nil)
	m.Storage("memory", store)
	v, err := th.Consume("a", throttler.Cost(9)) // leaves 1 of m and 3 of h
	require.NoError(t, err)
	_, _ = th.Consume("a", throttler.Cost(2))
	_, _ = th.Consume("a", throttler.Cost(4))
	_, _ = th.Peek(t.Context(), "a", throttler.Cost(4))
	require.NoError(t, th.Refund(t.Context(), v, throttler.CostOf("m", 5)))
	require.NoError(t, th.Charge(t.Context(), "a", throttler.CostOf("h", 2)))
	require.NoError(t, th.Reset(t.Context(), "a"))
	_, _ = th.Consume("a", throttler.Cost(-1))
	assert.Equal(t, []string{
		"decision_duration_seconds{} 1", // of the Reset, which names no source
		"decision_duration_seconds{runtime} 6",
		"decisions_total{api charge allowed runtime} 1",
		"decisions_total{api consume allowed runtime} 1",
		"decisions_total{api consume denied runtime} 2",
		"decisions_total{api consume error } 1",
		"decisions_total{api peek denied runtime} 1",
		"decisions_total{api refund allowed runtime} 1",
		"decisions_total{api reset allowed } 1",
		"denials_total{h api} 1",
		"denials_total{m api} 2",
		"errors_total{api invalid} 1",
		"limit_full_tokens{h api} 12",
		"limit_full_tokens{m api} 10",
		"limit_period_seconds{h api} 3600",
		"limit_period_seconds{m api} 60",
		"limit_tokens{h api} 12",
		"limit_tokens{m api} 10",
		"near_limit_total{h api} 1", // the Charge, which leaves 1
		"near_limit_total{m api} 1",
		"refunded_tokens_total{m api} 5",
		"tokens_total{h api} 11",
		"tokens_total{m api} 10",
	}, figures(t, r))
}

func TestTheShareOfAnElasticBucketIsTold(t *testing.T) {
	t.Parallel()
	r, _, th := measured(t, throttler.Config{
		Name: "api", Load: func() float64 { return 0.5 }, Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 100).Named("b").Elastic(10)},
	}, nil)
	_, err := th.Consume("a")
	require.NoError(t, err)
	assert.Subset(t, figures(t, r), []string{"limit_tokens{b api} 50", "limit_full_tokens{b api} 100"})
}

func TestTheLimitWithoutLoadIsThatOfTheLastCall(t *testing.T) {
	t.Parallel()
	r, _, th := measured(t, throttler.Config{Name: "api", Load: func() float64 { return 0.5 }}, nil)
	for _, b := range []throttler.Bucket{throttler.NewBucket(time.Minute, 100).Named("b").Elastic(10), throttler.NewBucket(time.Minute, 50).Named("b")} {
		_, err := th.Consume("a", throttler.Using(b))
		require.NoError(t, err)
	}
	assert.Subset(t, figures(t, r), []string{"limit_tokens{b api} 50", "limit_full_tokens{b api} 50"})
}

func TestAWaitIsOneCall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, _, th := measured(t, throttler.Config{Name: "api", Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 1).Named("b")}}, nil)
		_, err := th.Wait(t.Context(), "a")
		require.NoError(t, err)
		for range 2 {
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
		_, _ = th.Wait(t.Context(), "")
		assert.Equal(t, []string{
			"decisions_total{api wait allowed runtime} 3",
			"decisions_total{api wait denied runtime} 2",
			"decisions_total{api wait error } 1",
			"denials_total{b api} 2",
			"errors_total{api invalid} 1",
			"limit_full_tokens{b api} 1",
			"limit_period_seconds{b api} 1",
			"limit_tokens{b api} 1",
			"near_limit_total{b api} 3",
			"tokens_total{b api} 3",
			"wait_duration_seconds{api admitted} 3",
			"wait_duration_seconds{api deadline} 1",
			"wait_duration_seconds{api error} 1",
			"wait_duration_seconds{api gave_up} 1",
		}, figures(t, r))
	})
}

func TestAWaitThatFindsTheLineFullIsAnErrorAndDoesNotWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, _, th := measured(t, throttler.Config{Name: "api", MaxWaiters: 1, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1).Named("b")}}, nil)
		ctx, cancel := context.WithCancel(t.Context())
		_, err := th.Wait(ctx, "a")
		require.NoError(t, err)
		go func() { _, _ = th.Wait(ctx, "a") }()
		synctest.Wait()
		for range 3 {
			_, err = th.Wait(ctx, "a")
			require.ErrorIs(t, err, throttler.ErrTooManyWaiters)
		}
		assert.Subset(t, figures(t, r), []string{"decisions_total{api wait error } 3", "errors_total{api other} 3", "waiting{api} 1"})
		cancel()
		synctest.Wait()
		assert.NotContains(t, strings.Join(figures(t, r), " "), "waiting")
	})
}

// A counter that begins with 1 has not risen for Prometheus, so an alert about one error would not see the first.
func TestCountersOfErrorsAreThereBeforeTheFirstError(t *testing.T) {
	t.Parallel()
	r, _, th := measured(t, throttler.Config{Name: "api", Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1)}}, nil)
	_, err := th.Consume("a")
	require.NoError(t, err)
	families, err := r.Gather()
	require.NoError(t, err)
	var types []string
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "throttler_errors_total" {
				types = append(types, m.GetLabel()[1].GetValue())
			}
		}
	}
	assert.Equal(t, []string{"cancelled", "closed", "corrupt", "cost_exceeds_capacity", "debt_limit", "invalid", "other", "unavailable", "unknown_identifier"}, types)

	var told []string
	for _, err := range []error{
		throttler.ErrUnavailable, throttler.ErrCorruptState, throttler.ErrClosed, context.Canceled, throttler.ErrUnknownIdentifier,
		throttler.ErrDebtLimit, throttler.ErrCostExceedsCapacity, throttler.ErrInvalidCost, errors.New("anything else"),
	} {
		told = append(told, (&throttler.Event{Err: err}).ErrorType())
	}
	assert.ElementsMatch(t, types, told, "what an Event may say")
}

func TestWhatAPolicyLetsPassIsCountedAsBypassed(t *testing.T) {
	t.Parallel()
	store := memstore.New(&memstore.Options{MaxIdentifiers: 1}) // fails for a second identifier
	r, m, th := measured(t, throttler.Config{Storage: store, OnStorageError: throttler.Allow, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1)}}, nil)
	m.Storage("memory", store)
	_, _ = th.Consume("a")
	_, _ = th.Consume("b")
	got := figures(t, r)
	assert.Contains(t, got, "decisions_total{ consume bypassed } 1")
	assert.Contains(t, got, "errors_total{ unavailable} 1")
	assert.Contains(t, got, "identifiers{memory} 1")
	m.Storage("memory", nil)
	assert.NotContains(t, figures(t, r), "identifiers{memory} 1")
}

func TestAChargeInPartCountsWhatWasRecorded(t *testing.T) {
	t.Parallel()
	r, _, th := measured(t, throttler.Config{Name: "api", Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 10).Named("m"), throttler.NewBucket(time.Hour, 1000).Named("h")}}, nil)
	require.NoError(t, th.Charge(t.Context(), "a", throttler.Cost(13)))
	require.ErrorIs(t, th.Charge(t.Context(), "a", throttler.Cost(100)), throttler.ErrDebtLimit)
	assert.Subset(t, figures(t, r), []string{"tokens_total{h api} 113", "tokens_total{m api} 40"})
}

func TestMoreBucketsThanMaxBucketsAreOneOther(t *testing.T) {
	t.Parallel()
	r, _, th := measured(t, throttler.Config{Name: "api"}, &throttlerprom.Options{MaxBuckets: 2})
	for i := range 5 {
		for range 2 {
			_, err := th.Consume("a", throttler.Using(throttler.NewBucket(time.Hour, 9).Named(fmt.Sprint("user ", i))))
			require.NoError(t, err)
		}
	}
	var tokens, limits []string
	for _, f := range figures(t, r) {
		if strings.HasPrefix(f, "tokens_total") {
			tokens = append(tokens, f)
		}
		if strings.HasPrefix(f, "limit_tokens") {
			limits = append(limits, f)
		}
	}
	assert.Equal(t, []string{"tokens_total{other api} 6", "tokens_total{user 0 api} 2", "tokens_total{user 1 api} 2"}, tokens)
	assert.Equal(t, []string{"limit_tokens{user 0 api} 9", "limit_tokens{user 1 api} 9"}, limits)
}

func TestNewJoinsTheMetricsThatAreThere(t *testing.T) {
	t.Parallel()
	r := prometheus.NewRegistry()
	m, err := throttlerprom.New(r, nil)
	require.NoError(t, err)
	again, err := throttlerprom.New(r, nil)
	require.NoError(t, err)
	assert.Same(t, m, again)

	_, err = throttlerprom.New(r, &throttlerprom.Options{MaxBuckets: -1})
	assert.EqualError(t, err, "throttlerprom: Options.MaxBuckets is -1, must be 0 or more")
	taken := prometheus.NewRegistry()
	taken.MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Name: "throttler_waiting", Help: "of another"}))
	_, err = throttlerprom.New(taken, nil)
	assert.ErrorContains(t, err, "throttlerprom: ")
}

func TestObservingAllocatesNothing(t *testing.T) {
	_, _, th := measured(t, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 500), throttler.NewBucket(time.Minute, 1<<40)}}, nil)
	call := func() { _, _ = th.Consume("user:42") }
	call()
	assert.Zero(t, testing.AllocsPerRun(1000, call), "admitted and denied")
}

func TestMemoryDoesNotGrowWithIdentifiers(t *testing.T) {
	r, m, _ := measured(t, throttler.Config{}, nil)
	m.Observe(t.Context(), &throttler.Event{Op: throttler.OpConsume})
	before := heap()
	series, err := testutil.GatherAndCount(r)
	require.NoError(t, err)
	for i := range 200_000 {
		m.Observe(t.Context(), &throttler.Event{Op: throttler.OpConsume, Identifier: fmt.Sprint("user:", i), Duration: time.Microsecond})
	}
	after, err := testutil.GatherAndCount(r)
	require.NoError(t, err)
	assert.Equal(t, series, after)
	assert.Less(t, heap()-before, int64(1<<20))
}

func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestNativeHistogramsAreAnOption(t *testing.T) {
	t.Parallel()
	for _, native := range []bool{false, true} {
		r, _, th := measured(t, throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1)}}, &throttlerprom.Options{NativeHistograms: native})
		_, err := th.Consume("a")
		require.NoError(t, err)
		families, err := r.Gather()
		require.NoError(t, err)
		for _, f := range families {
			if f.GetName() == "throttler_decision_duration_seconds" {
				h := f.GetMetric()[0].GetHistogram()
				require.Equal(t, native, len(h.GetPositiveSpan()) > 0)
				require.Len(t, h.GetBucket(), 11, "the classic ones are there")
			}
		}
	}
}
