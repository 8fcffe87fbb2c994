package faulttest_test

import (
	"cmp"
	"fmt"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage/failover"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// The checker decides whether too much was admitted. It knows when how much was admitted, and the rule, but nothing
// about how the storage works.

// admission is n tokens that were admitted at an unknown time from began to ended, in µs.
type admission struct{ began, ended, n int64 }

// admissions returns those of an identifier, sorted by their ends.
func admissions(events []event, id string) (all []admission) {
	for _, e := range events {
		if e.What == "call" && e.ID == id && e.Allowed && e.Err == "" {
			all = append(all, admission{e.At - e.Took, e.At, e.Cost})
		}
	}
	slices.SortFunc(all, func(a, b admission) int { return cmp.Compare(a.ended, b.ended) })
	return all
}

// burst returns the most tokens that were admitted in any interval of length d (µs), if each admission happened at
// its end.
func burst(all []admission, d int64) (most int64) {
	sum, first := int64(0), 0
	for _, a := range all {
		for sum += a.n; all[first].ended < a.ended-d; first++ {
			sum -= all[first].n
		}
		most = max(most, sum)
	}
	return most
}

// leak returns the excess of a Continuous bucket, if each admission happened at its end: by how much the tokens of
// the worst window of length w exceed N + r*w. It is computed as a leaky bucket: the highest level above N.
func leak(all []admission, r *law.Rule) float64 {
	level, most, last := 0.0, 0.0, int64(0)
	for _, a := range all {
		level = max(0, level-float64(a.ended-last)*float64(r.Refill)/float64(r.Period)) + float64(a.n)
		last = a.ended
		most = max(most, level-float64(r.Capacity))
	}
	return most
}

// excess returns the least excess that is possible, whenever during their calls the admissions happened. A window
// lasts from the beginning of one call to the end of another one, and only calls that lie inside count.
func excess(all []admission, r *law.Rule) (most float64) {
	for i := range all {
		from, sum := all[i].began, int64(0)
		for _, a := range all {
			if a.began < from {
				continue
			}
			sum += a.n
			most = max(most, float64(sum-r.Capacity)-float64(a.ended-from)*float64(r.Refill)/float64(r.Period))
		}
	}
	return most
}

// total returns the excess of a bucket to which nothing comes back during the test.
func total(all []admission, r *law.Rule) float64 {
	sum := -r.Capacity
	for _, a := range all {
		sum += a.n
	}
	return float64(max(0, sum))
}

// timing returns what the bound depends on: the longest time until Postgres had an admission (lag), and the 99th
// percentile of the round trips to Redis (trip), both in µs.
func timing(events []event) (lag, trip int64) {
	lag = failover.DefaultFlushInterval.Microseconds()
	var trips []int64
	for _, e := range events {
		switch {
		case e.What == "observed" && (e.By == failover.Flushed.String() || e.By == failover.FlushFailed.String()):
			lag = max(lag, e.Lag)
		case e.What == "call" && e.Err == "" && e.By == redisstore.Source:
			trips = append(trips, e.Took)
		}
	}
	return lag, quantile(trips, 0.99)
}

func quantile(all []int64, q float64) int64 {
	if len(all) == 0 {
		return 0
	}
	all = slices.Sorted(slices.Values(all))
	return all[min(len(all)-1, int(q*float64(len(all))))]
}

// assertBound asserts e <= A(2(X+RTT)) for a target with one bucket: the excess is at most what is admitted in twice
// the lag and the round trip. That is the bound of docs/failover.md, unless a process dies with admissions that it
// has not flushed.
func (r *record) assertBound(t testing.TB, g *target) {
	t.Helper()
	events := r.all()
	all := admissions(events, g.ID)
	require.NotEmpty(t, all)
	rule := &g.Rules[0]
	lag, trip := timing(events)
	bound := burst(all, 2*(lag+trip))
	e := total(all, rule)
	if rule.Kind == law.Continuous {
		e = excess(all, rule)
		t.Logf("%v: %d admissions, excess %.1f (%.1f if each was at its end), bound %d with X = %v, RTT = %v",
			rule.Kind, len(all), e, leak(all, rule), bound, micros(lag), micros(trip))
	} else {
		t.Logf("%v: %d admissions, excess %.0f, bound %d with X = %v, RTT = %v", rule.Kind, len(all), e, bound, micros(lag), micros(trip))
	}
	assert.LessOrEqual(t, e, float64(bound), "%v: more than the bound was admitted", rule.Kind)
}

func micros(n int64) time.Duration { return time.Duration(n) * time.Microsecond }

// busy returns how many programs want each processor now, but at least 1: about how much longer everything takes than on an
// idle machine.
func busy() float64 {
	var load float64
	if data, err := os.ReadFile("/proc/loadavg"); err == nil {
		_, _ = fmt.Sscan(string(data), &load)
	}
	return max(1, load/float64(runtime.NumCPU()))
}

// assertPrompt asserts how long calls took: 99 % of them at most limit, and all at most a second more. On a busy machine all
// may take longer.
func (r *record) assertPrompt(t testing.TB, limit time.Duration) {
	t.Helper()
	var took []int64
	for _, e := range r.all() {
		if e.What == "call" {
			took = append(took, e.Took)
		}
	}
	t.Logf("%d calls: median %v, 99th percentile %v, longest %v", len(took), micros(quantile(took, 0.5)), micros(quantile(took, 0.99)), micros(quantile(took, 1)))
	times := busy()
	assert.LessOrEqual(t, float64(quantile(took, 0.99)), times*float64(limit.Microseconds()), "calls outlast their time, the machine being %.1f times busy", times)
	assert.LessOrEqual(t, float64(quantile(took, 1)), times*float64((limit+time.Second).Microseconds()), "a call hung, the machine being %.1f times busy", times)
}

func TestTheCheckerFindsWhatIsTooMuch(t *testing.T) {
	t.Parallel()
	r := rule(t, "c", law.Continuous, time.Second, 10, 10)
	at := func(ms ...int64) (all []admission) {
		for _, m := range ms {
			all = append(all, admission{m * 1000, m * 1000, 5})
		}
		return all
	}
	for _, c := range []struct {
		all  []admission
		want float64
	}{
		{at(0, 0), 0},
		{at(0, 0, 0), 5},
		{at(0, 0, 500), 0},
		{at(0, 0, 400), 1},
		{at(0, 0, 500, 1000, 1500, 1500), 5},
		{at(0, 5000, 5000, 5100, 5200), 8},
	} {
		assert.InDelta(t, c.want, leak(c.all, &r), 1e-9)
		assert.InDelta(t, c.want, excess(c.all, &r), 1e-9)
	}
	assert.EqualValues(t, 15, burst(at(0, 100, 200, 301), 200_000))
	late := []admission{{0, 0, 10}, {0, 500_000, 5}}
	assert.InDelta(t, 0, leak(late, &r), 1e-9)
	assert.InDelta(t, 0, excess(late, &r), 1e-9)
	early := []admission{{0, 0, 10}, {400_000, 410_000, 1}, {400_000, 500_000, 5}}
	assert.InDelta(t, 1, excess(early, &r), 1e-9)
	assert.InDelta(t, 2, total([]admission{{0, 0, 12}}, &r), 0)
}
