package throttler_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
	memstore "github.com/go-throttler/throttler/storage/runtime"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// throttled returns a Throttler with a mock clock and these buckets for everybody.
func throttled(t *testing.T, b ...throttler.Bucket) (*throttler.Throttler, *clock.Mock) {
	t.Helper()
	mock := clock.NewMock()
	th, err := throttler.New(throttler.Config{Clock: mock, Buckets: b})
	require.NoError(t, err)
	return th, mock
}

// setClock is a clock that can be set back, and that costs nothing to read.
type setClock struct {
	clock.Clock
	now time.Time
}

func (c *setClock) Now() time.Time { return c.now }

func allowed(t *testing.T, th *throttler.Throttler, id string, o ...throttler.Option) bool {
	t.Helper()
	v, err := th.Consume(id, o...)
	require.NoError(t, err)
	return v.Allowed
}

func left(t *testing.T, th *throttler.Throttler, id string) (out []int64) {
	t.Helper()
	v, err := th.Peek(t.Context(), id, throttler.Cost(0))
	require.NoError(t, err)
	for _, l := range v.Levels() {
		out = append(out, l.Remaining)
	}
	return out
}

func TestFiveCallsPassTheSixthWithinTenSecondsIsRefusedAndAllFiveComeBack(t *testing.T) {
	t.Parallel()
	th, mock := throttled(t, throttler.NewBucket(10*time.Second, 5))
	for range 2 {
		for range 5 {
			require.True(t, allowed(t, th, "user:42"))
			mock.Add(time.Second)
		}
		v, err := th.Consume("user:42")
		require.NoError(t, err)
		require.False(t, v.Allowed)
		require.Equal(t, 5*time.Second, v.RetryAfter)
		mock.Add(5*time.Second - time.Microsecond)
		require.False(t, allowed(t, th, "user:42"))
		mock.Add(time.Microsecond)
	}
}

func TestABurstOfAHundredOnFivePerTenSecondsAndAHundredPerHourAdmitsFiveAndLeavesNinetyFive(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t)
	require.NoError(t, th.AddBucket("user:42", throttler.NewBucket(10*time.Second, 5)))
	require.NoError(t, th.AddBucket("user:42", throttler.NewBucket(time.Hour, 100)))
	admitted := 0
	for range 100 {
		if allowed(t, th, "user:42") {
			admitted++
		}
	}
	assert.Equal(t, 5, admitted)
	assert.Equal(t, []int64{0, 95}, left(t, th, "user:42"))
}

func TestARefusedCostTakesNothing(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(10*time.Second, 5))
	assert.True(t, allowed(t, th, "a"))
	assert.False(t, allowed(t, th, "a", throttler.Cost(5)))
	assert.True(t, allowed(t, th, "a"))
}

func TestAnAlternatingClockAdmitsWhatTheLaterTimeAloneAdmits(t *testing.T) {
	t.Parallel()
	start := time.Unix(1_700_000_000, 0)
	for _, b := range []throttler.Bucket{
		throttler.NewBucket(time.Second, 10), throttler.NewBucket(time.Second, 10).Continuous(), throttler.NewBucket(time.Second, 10).FixedWindow(),
		throttler.NewBucket(time.Second, 10).SlidingWindow(), throttler.NewBucket(time.Second, 10).SlidingLog(),
	} {
		admitted := func(back time.Duration) (n int) {
			set := &setClock{Clock: clock.NewMock()}
			th, err := throttler.New(throttler.Config{Clock: set, Buckets: []throttler.Bucket{b}})
			require.NoError(t, err)
			for i := range 2000 {
				at := start.Add(time.Duration(i) * 10 * time.Millisecond)
				set.now = at
				if allowed(t, th, "a") {
					n++
				}
				set.now = at.Add(-back)
				if allowed(t, th, "a") {
					n++
				}
			}
			return n
		}
		assert.Equal(t, admitted(0), admitted(200*time.Millisecond), b.Name())
	}
}

func TestBucketsOfAnIdentifierReplaceTheDefaultsUntilTheLastIsRemoved(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(time.Minute, 9))
	assert.Equal(t, []int64{9}, left(t, th, "a"))
	require.NoError(t, th.AddBucket("a", throttler.NewBucket(time.Minute, 1), throttler.NewBucket(time.Hour, 2)))
	assert.Equal(t, []int64{1, 2}, left(t, th, "a"))
	assert.Equal(t, []int64{9}, left(t, th, "b"))
	assert.Len(t, th.Buckets("a"), 2)
	assert.Equal(t, "1/1m", th.Buckets("a")[0].Name())
	assert.True(t, th.RemoveBucket("a", "1/1m"))
	assert.False(t, th.RemoveBucket("a", "1/1m"))
	assert.Equal(t, []int64{2}, left(t, th, "a"))
	assert.True(t, th.RemoveBucket("a", "2/1h"))
	assert.False(t, th.RemoveBucket("a", "2/1h"))
	assert.Equal(t, []int64{9}, left(t, th, "a"))
	require.NoError(t, th.AddBucket("a", throttler.NewBucket(time.Minute, 1)))
	th.RemoveBuckets("a")
	assert.Equal(t, []int64{9}, left(t, th, "a"))
}

func TestIdentifiersWithTheSameBucketsChangeByThemselves(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t)
	for i := range 40 {
		id := fmt.Sprint("user-", i)
		require.NoError(t, th.AddBucket(id, throttler.NewBucket(time.Minute, 5)))
		require.NoError(t, th.AddBucket(id, throttler.NewBucket(time.Hour, int64(10+i%12))))
	}
	require.True(t, th.RemoveBucket("user-1", "5/1m"))
	require.NoError(t, th.AddBucket("user-2", throttler.NewBucket(time.Minute, 3).Named("5/1m")))
	for i := range 40 {
		hour := int64(10 + i%12)
		want := map[int][]int64{1: {hour}, 2: {3, hour}}[i]
		if want == nil {
			want = []int64{5, hour}
		}
		assert.Equal(t, want, left(t, th, fmt.Sprint("user-", i)), i)
	}
}

func TestABucketAddedAgainKeepsWhatWasSpent(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t)
	require.NoError(t, th.AddBucket("a", throttler.NewBucket(time.Minute, 5).Named("calls")))
	require.True(t, allowed(t, th, "a", throttler.Cost(4)))
	require.NoError(t, th.AddBucket("a", throttler.NewBucket(time.Minute, 5).Named("calls")))
	assert.Equal(t, []int64{1}, left(t, th, "a"))
	require.NoError(t, th.AddBucket("a", throttler.NewBucket(time.Minute, 50).Named("calls")))
	assert.Equal(t, []int64{46}, left(t, th, "a"))
	th.RemoveBuckets("a")
	require.NoError(t, th.AddBucket("a", throttler.NewBucket(time.Minute, 5).Named("calls")))
	assert.Equal(t, []int64{1}, left(t, th, "a"))
}

func TestAFaultyBucketReportsAllFaultsAndAddsNothing(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t)
	err := th.AddBucket("a", throttler.NewBucket(time.Minute, 5), throttler.NewBucket(0, -1), throttler.NewBucket(time.Second, 1).Burst(3), throttler.Bucket{})
	var fault *throttler.BucketError
	require.ErrorAs(t, err, &fault)
	for _, want := range []string{"Period is 0s, must be from 1µs to 366 days", "Capacity is -1, must be from 0 to", "Burst of 3 is for a Continuous bucket only"} {
		assert.ErrorContains(t, err, want)
	}
	assert.Empty(t, th.Buckets("a"))
}

func TestEveryFaultOfABucketNamesItsField(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		bucket throttler.Bucket
		field  string
	}{
		{throttler.NewBucket(0, 5), "Period"},
		{throttler.NewBucket(-time.Second, 5), "Period"},
		{throttler.NewBucket(999*time.Nanosecond, 5), "Period"},
		{throttler.NewBucket(367*24*time.Hour, 5), "Period"},
		{throttler.NewBucket(time.Second, -1), "Capacity"},
		{throttler.NewBucket(time.Second, math.MinInt64), "Capacity"},
		{throttler.NewBucket(time.Second, math.MaxInt64), "Capacity"},
		{throttler.NewBucket(time.Hour, 1<<50).SlidingWindow(), "Capacity"},
		{throttler.NewBucket(time.Hour, 1<<50).Continuous(), "Capacity"},
		{throttler.NewBucket(time.Second, 5).Continuous().Burst(0), "Burst"},
		{throttler.NewBucket(time.Second, 0).Continuous().Burst(5), "Capacity"},
		{throttler.NewBucket(time.Hour, 1).Continuous().Burst(100_000), "Burst"},
		{throttler.NewBucket(time.Hour-time.Microsecond, 1<<50).Continuous().Burst(1 << 49), "Capacity"},
		{throttler.NewBucket(time.Second, 5).SlidingLog().Burst(5), "Burst"},
		{throttler.NewBucket(time.Second, 5).Named(""), "Name"},
		{throttler.NewBucket(time.Second, 5).Named("a\nb"), "Name"},
		{throttler.NewBucket(time.Second, 5).Named(strings.Repeat("x", 65)), "Name"},
	} {
		_, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{test.bucket}})
		var fault *throttler.BucketError
		if assert.ErrorAs(t, err, &fault, "%+v", test.bucket) {
			assert.Equal(t, test.field, fault.Field, err)
			assert.Equal(t, test.bucket.Name(), fault.Bucket)
		}
		th, _ := throttled(t)
		_, err = th.Consume("a", throttler.Using(test.bucket))
		assert.ErrorAs(t, err, &fault)
	}
}

func TestANameTwiceInOneSetIsAFault(t *testing.T) {
	t.Parallel()
	b := throttler.NewBucket(time.Second, 5)
	var fault *throttler.BucketError
	_, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{b, b}})
	assert.ErrorAs(t, err, &fault)
	th, _ := throttled(t)
	assert.ErrorAs(t, th.AddBucket("a", b, b), &fault)
	require.NoError(t, th.AddBucket("a", b))
	assert.ErrorAs(t, th.AddBucket("a", b, b), &fault, "also when the identifier has it")
	_, err = th.Consume("a", throttler.Using(b, b))
	assert.ErrorAs(t, err, &fault)
}

func TestAnIdentifierHasAtMostSixteenBuckets(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t)
	var many []throttler.Bucket
	for i := range 17 {
		many = append(many, throttler.NewBucket(time.Minute, int64(i+1)))
	}
	require.NoError(t, th.AddBucket("a", many[:16]...))
	assert.True(t, allowed(t, th, "a"))
	assert.Len(t, left(t, th, "a"), 16)
	var fault *throttler.BucketError
	assert.ErrorAs(t, th.AddBucket("a", many[16]), &fault)
	assert.Len(t, th.Buckets("a"), 16)
}

func TestBucketsHaveNamesThatSayWhatTheyAre(t *testing.T) {
	t.Parallel()
	for want, b := range map[string]throttler.Bucket{
		"5/10s":             throttler.NewBucket(10*time.Second, 5),
		"100/1h":            throttler.NewBucket(time.Hour, 100),
		"5/1m30s":           throttler.NewBucket(90*time.Second, 5),
		"1/1h0m1s":          throttler.NewBucket(time.Hour+time.Second, 1),
		"7/250ms/fixed":     throttler.NewBucket(250*time.Millisecond, 7).FixedWindow(),
		"7/5us/sliding":     throttler.NewBucket(5*time.Microsecond, 7).SlidingWindow(),
		"7/24h/log":         throttler.NewBucket(24*time.Hour, 7).SlidingLog(),
		"10/1s/continuous":  throttler.NewBucket(time.Second, 10).Burst(20).Continuous(),
		"1/10m":             throttler.NewBucket(10*time.Minute, 1),
		"anything at all":   throttler.NewBucket(time.Second, 1).Named("anything at all"),
		"named before kind": throttler.NewBucket(time.Second, 1).Named("named before kind").SlidingLog(),
	} {
		assert.Equal(t, want, b.Name())
	}
	b := throttler.NewBucket(time.Second, 10).Continuous().Burst(20)
	assert.Equal(t, int64(20), b.Capacity())
	assert.Equal(t, time.Second, b.Period())
	assert.Equal(t, int64(10), throttler.NewBucket(time.Second, 10).Capacity())
	assert.Equal(t, 2*time.Microsecond, throttler.NewBucket(1001*time.Nanosecond, 1).Period(), "rounded up")
}

func TestBadCallsAreTypedErrorsAndChangeNothing(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(10*time.Second, 5))
	ctx := t.Context()
	long := strings.Repeat("x", 1025)
	var crowd []throttler.Part
	for i := range 257 {
		crowd = append(crowd, throttler.For(fmt.Sprint(i)))
	}
	for _, test := range []struct {
		call func() error
		want error
	}{
		{func() error { _, err := th.Consume(""); return err }, throttler.ErrInvalidIdentifier},
		{func() error { _, err := th.Consume(long); return err }, throttler.ErrInvalidIdentifier},
		{func() error { _, err := th.Peek(ctx, ""); return err }, throttler.ErrInvalidIdentifier},
		{func() error { _, err := th.Wait(ctx, ""); return err }, throttler.ErrInvalidIdentifier},
		{func() error { return th.Charge(ctx, "") }, throttler.ErrInvalidIdentifier},
		{func() error { return th.Reset(ctx, "") }, throttler.ErrInvalidIdentifier},
		{func() error { return th.AddBucket("", throttler.NewBucket(time.Second, 1)) }, throttler.ErrInvalidIdentifier},
		{func() error { return th.AddBucket(long, throttler.NewBucket(time.Second, 1)) }, throttler.ErrInvalidIdentifier},
		{func() error { _, err := th.ConsumeAll(ctx, throttler.For("a"), throttler.For("a")); return err }, throttler.ErrInvalidIdentifier},
		{func() error {
			_, err := th.ConsumeAll(ctx, throttler.For("a"), throttler.For("b"), throttler.For("a"))
			return err
		}, throttler.ErrInvalidIdentifier},
		{func() error { _, err := th.ConsumeAll(ctx, throttler.For("a"), throttler.For("")); return err }, throttler.ErrInvalidIdentifier},
		{func() error { _, err := th.ConsumeAll(ctx, crowd...); return err }, throttler.ErrInvalidIdentifier},
		{func() error {
			_, err := th.ConsumeAll(ctx, throttler.For("a"), throttler.For("b", throttler.Cost(6)))
			return err
		}, throttler.ErrCostExceedsCapacity},
		{func() error { _, err := th.Consume("a", throttler.Cost(-1)); return err }, throttler.ErrInvalidCost},
		{func() error { _, err := th.Consume("a", throttler.Cost(math.MinInt64)); return err }, throttler.ErrInvalidCost},
		{func() error { return th.Charge(ctx, "a", throttler.Cost(-1)) }, throttler.ErrInvalidCost},
		{func() error { _, err := th.Consume("a", throttler.Cost(6)); return err }, throttler.ErrCostExceedsCapacity},
		{func() error { _, err := th.Consume("a", throttler.Cost(math.MaxInt64)); return err }, throttler.ErrCostExceedsCapacity},
		{func() error { _, err := th.Wait(ctx, "a", throttler.Cost(6)); return err }, throttler.ErrCostExceedsCapacity},
		{func() error { _, err := th.Consume("a", throttler.CostOf("5/10s", 6)); return err }, throttler.ErrCostExceedsCapacity},
	} {
		require.ErrorIs(t, test.call(), test.want)
	}
	var fault *throttler.BucketError
	_, err := th.Consume("a", throttler.CostOf("nobody", 1))
	require.ErrorAs(t, err, &fault)
	assert.Equal(t, []int64{5}, left(t, th, "a"))
}

func TestAnUnknownIdentifierIsAnErrorOrAllowedByPolicy(t *testing.T) {
	t.Parallel()
	th, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	_, err = th.Consume("nobody")
	require.ErrorIs(t, err, throttler.ErrUnknownIdentifier)
	_, err = th.Consume("", throttler.Cost(1))
	require.ErrorIs(t, err, throttler.ErrInvalidIdentifier)
	_, err = th.Consume("nobody", throttler.Using())
	require.ErrorIs(t, err, throttler.ErrUnknownIdentifier)
	for _, all := range []func(context.Context, ...throttler.Part) (throttler.Verdict, error){th.ConsumeAll, th.PeekAll, th.WaitAll} {
		v, err := all(t.Context())
		require.ErrorIs(t, err, throttler.ErrUnknownIdentifier, "a list that is empty by mistake")
		require.False(t, v.Allowed)
	}
	require.NoError(t, th.ChargeAll(t.Context()))

	th, err = throttler.New(throttler.Config{OnUnknownIdentifier: throttler.Allow})
	require.NoError(t, err)
	v, err := th.Consume("nobody")
	require.NoError(t, err)
	assert.True(t, v.Allowed)
	assert.Empty(t, v.Levels())
	assert.NoError(t, th.Refund(t.Context(), v))
	_, err = th.Consume("")
	require.ErrorIs(t, err, throttler.ErrInvalidIdentifier)
	require.NoError(t, th.AddBucket("somebody", throttler.NewBucket(time.Hour, 1)))
	for _, want := range []bool{true, false} {
		v, err = th.ConsumeAll(t.Context(), throttler.For("nobody"), throttler.For("somebody"))
		require.NoError(t, err)
		assert.Equal(t, want, v.Allowed)
		assert.Len(t, v.Levels(), 1)
	}
	v, err = th.ConsumeAll(t.Context())
	require.NoError(t, err)
	assert.True(t, v.Allowed)
}

func TestConfigReportsAllItsFaults(t *testing.T) {
	t.Parallel()
	_, err := throttler.New(throttler.Config{Name: "a:b", Cost: -1, OnStorageError: 7, OnUnknownIdentifier: 8, Buckets: []throttler.Bucket{throttler.NewBucket(0, 1)}})
	require.ErrorIs(t, err, throttler.ErrInvalidCost)
	for _, want := range []string{`Config.Name is "a:b"`, "Config.OnStorageError is 7", "Config.OnUnknownIdentifier is 8", "Period is 0s"} {
		assert.ErrorContains(t, err, want)
	}
	_, err = throttler.New(throttler.Config{Name: strings.Repeat("x", 65)})
	require.Error(t, err)
	_, err = throttler.New(throttler.Config{Storage: (*memstore.Storage)(nil)})
	require.ErrorContains(t, err, "Config.Storage is a nil *runtime.Storage")
	_, err = throttler.New(throttler.Config{Name: "A-z_0.9"})
	require.NoError(t, err)
}

func TestThrottlersOfOneNameShareConsumptionOnOneStorage(t *testing.T) {
	t.Parallel()
	mem := memstore.New(nil)
	made := func(name string) *throttler.Throttler {
		th, err := throttler.New(throttler.Config{Name: name, Storage: mem, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 5)}})
		require.NoError(t, err)
		return th
	}
	one, same, other := made("api"), made("api"), made("web")
	require.True(t, allowed(t, one, "a", throttler.Cost(3)))
	assert.Equal(t, []int64{2}, left(t, same, "a"))
	assert.Equal(t, []int64{5}, left(t, other, "a"))
}

func TestCostOfBeatsCostAndConfigCost(t *testing.T) {
	t.Parallel()
	th, err := throttler.New(throttler.Config{Cost: 2, Clock: clock.NewMock(), Buckets: []throttler.Bucket{
		throttler.NewBucket(time.Minute, 100).Named("a"), throttler.NewBucket(time.Minute, 100).Named("b"),
	}})
	require.NoError(t, err)
	require.True(t, allowed(t, th, "x"))
	assert.Equal(t, []int64{98, 98}, left(t, th, "x"))
	require.True(t, allowed(t, th, "x", throttler.CostOf("b", 7), throttler.Cost(3)))
	assert.Equal(t, []int64{95, 91}, left(t, th, "x"))
	require.True(t, allowed(t, th, "x", throttler.CostOf("a", 0)))
	assert.Equal(t, []int64{95, 89}, left(t, th, "x"))
}

func TestPeekAnswersWhatConsumeWouldAndTakesNothing(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(10*time.Second, 5), throttler.NewBucket(time.Minute, 7).SlidingLog())
	for range 8 {
		peeked, err := th.Peek(t.Context(), "a", throttler.Cost(2))
		require.NoError(t, err)
		again, err := th.Peek(t.Context(), "a", throttler.Cost(2))
		require.NoError(t, err)
		v, err := th.Consume("a", throttler.Cost(2))
		require.NoError(t, err)
		assert.Equal(t, peeked, again)
		assert.Equal(t, peeked.Allowed, v.Allowed)
		assert.Equal(t, peeked.RetryAfter, v.RetryAfter)
		assert.Equal(t, peeked.Levels(), v.Levels())
		require.NoError(t, th.Refund(t.Context(), peeked), "a peek took nothing")
	}
}

func TestChargeLeavesDebtThatIsPaidBackByTime(t *testing.T) {
	t.Parallel()
	th, mock := throttled(t, throttler.NewBucket(time.Minute, 60).Continuous())
	require.NoError(t, th.Charge(t.Context(), "a", throttler.Cost(100)))
	v, err := th.Consume("a")
	require.NoError(t, err)
	assert.False(t, v.Allowed)
	assert.Equal(t, 41*time.Second, v.RetryAfter)
	mock.Add(v.RetryAfter)
	assert.True(t, allowed(t, th, "a"))
	require.ErrorIs(t, th.Charge(t.Context(), ""), throttler.ErrInvalidIdentifier)
}

func TestRefundGivesBackWhatWasTakenButNothingThatCameBackByItself(t *testing.T) {
	t.Parallel()
	for _, kind := range []func(throttler.Bucket) throttler.Bucket{
		func(b throttler.Bucket) throttler.Bucket { return b },
		throttler.Bucket.Continuous, throttler.Bucket.FixedWindow, throttler.Bucket.SlidingWindow, throttler.Bucket.SlidingLog,
	} {
		b := kind(throttler.NewBucket(10*time.Second, 10))
		th, mock := throttled(t, b)
		take := func(n int64) throttler.Verdict {
			v, err := th.Consume("a", throttler.Cost(n))
			require.NoError(t, err)
			require.True(t, v.Allowed)
			return v
		}
		v := take(6)
		require.NoError(t, th.Refund(t.Context(), v, throttler.Cost(2)))
		assert.Equal(t, []int64{6}, left(t, th, "a"), b.Name())
		require.ErrorIs(t, th.Refund(t.Context(), v, throttler.Cost(7)), throttler.ErrInvalidCost)
		require.ErrorIs(t, th.Refund(t.Context(), v, throttler.Cost(-1)), throttler.ErrInvalidCost)
		mock.Add(20 * time.Second)
		v2 := take(3)
		require.NoError(t, th.Refund(t.Context(), v))
		assert.Equal(t, []int64{7}, left(t, th, "a"), "%s: those of v are back, those of v2 are not", b.Name())
		require.NoError(t, th.Refund(t.Context(), v2))
		assert.Equal(t, []int64{10}, left(t, th, "a"), b.Name())
	}
}

func TestRefundOfADenialGivesBackNothing(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(time.Minute, 2))
	require.True(t, allowed(t, th, "a", throttler.Cost(2)))
	v, err := th.Consume("a", throttler.Cost(2))
	require.NoError(t, err)
	require.NoError(t, th.Refund(t.Context(), v))
	assert.Equal(t, []int64{0}, left(t, th, "a"))
}

func TestAWrongRefundChangesNothing(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(time.Minute, 10).Named("calls"), throttler.NewBucket(time.Minute, 10).Named("tokens"))
	v, err := th.ConsumeAll(t.Context(), throttler.For("a", throttler.Cost(5)), throttler.For("b"))
	require.NoError(t, err)
	require.ErrorIs(t, th.Refund(t.Context(), v, throttler.Cost(3)), throttler.ErrInvalidCost)
	assert.Equal(t, []int64{5, 5}, left(t, th, "a"))
	v, err = th.Consume("c", throttler.Cost(4))
	require.NoError(t, err)
	var fault *throttler.BucketError
	require.ErrorAs(t, th.Refund(t.Context(), v, throttler.CostOf("token", 1)), &fault)
	assert.Equal(t, []int64{6, 6}, left(t, th, "c"))
}

func TestTheZeroOptionDoesNothing(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(time.Minute, 10))
	require.True(t, allowed(t, th, "a", throttler.Option{}))
	assert.Equal(t, []int64{9}, left(t, th, "a"))
}

func TestRefundOfSeveralPartsGivesBackToEach(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t)
	var buckets []throttler.Bucket
	for i := range 3 {
		buckets = append(buckets, throttler.NewBucket(time.Minute, int64(10+i)))
	}
	require.NoError(t, th.AddBucket("a", buckets...))
	require.NoError(t, th.AddBucket("b", buckets...))
	v, err := th.ConsumeAll(t.Context(), throttler.For("a", throttler.Cost(2)), throttler.For("b", throttler.CostOf("12/1m", 5)))
	require.NoError(t, err)
	require.Len(t, v.Levels(), 6)
	assert.Equal(t, []int64{9, 10, 7}, left(t, th, "b"))
	require.NoError(t, th.Refund(t.Context(), v, throttler.Cost(1)))
	assert.Equal(t, []int64{9, 10, 11}, left(t, th, "a"))
	assert.Equal(t, []int64{10, 11, 8}, left(t, th, "b"))
}

func TestResetForgetsWhatWasSpent(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(time.Minute, 2))
	require.True(t, allowed(t, th, "a", throttler.Cost(2)))
	require.NoError(t, th.Reset(t.Context(), "a"))
	assert.Equal(t, []int64{2}, left(t, th, "a"))
}

func TestACancelledCallIsNeverAllowed(t *testing.T) {
	t.Parallel()
	th, err := throttler.New(throttler.Config{OnStorageError: throttler.Allow, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 2)}})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = th.ConsumeContext(ctx, "a")
	require.ErrorIs(t, err, context.Canceled)
	_, err = th.Wait(ctx, "a")
	require.ErrorIs(t, err, context.Canceled)
	assert.Equal(t, []int64{2}, left(t, th, "a"))
}

// failing is a storage that cannot decide.
type failing struct {
	storage.Storage
	err error
}

func (f failing) Decide(context.Context, *storage.Request, *storage.Answer) error { return f.err }

func TestOnStorageErrorAllowsOnlyWhatIsUnavailable(t *testing.T) {
	t.Parallel()
	var seen []throttler.Event
	made := func(err error) *throttler.Throttler {
		th, made := throttler.New(throttler.Config{
			Storage: failing{err: err}, OnStorageError: throttler.Allow, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 2)},
			Observe: func(_ context.Context, e *throttler.Event) { seen = append(seen, *e) },
		})
		require.NoError(t, made)
		return th
	}
	down := fmt.Errorf("%w: no route to host", throttler.ErrUnavailable)
	v, err := made(down).Consume("a")
	require.NoError(t, err)
	assert.True(t, v.Allowed)
	assert.True(t, v.Degraded())
	assert.Empty(t, v.Levels())
	require.Len(t, seen, 1)
	require.ErrorIs(t, seen[0].Err, throttler.ErrUnavailable)
	require.ErrorIs(t, made(down).Charge(t.Context(), "a"), throttler.ErrUnavailable, "a charge that was lost is not called done")
	for _, err := range []error{throttler.ErrCorruptState, throttler.ErrClosed, context.Canceled, errors.New("other")} {
		v, got := made(err).Consume("a")
		require.ErrorIs(t, got, err)
		assert.False(t, v.Allowed)
	}
}

func TestALimitedErrorSaysWhoWasLimitedByWhatAndForHowLong(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(10*time.Second, 1), throttler.NewBucket(time.Hour, 1))
	require.True(t, allowed(t, th, "user:42"))
	v, err := th.Consume("user:42")
	require.NoError(t, err)
	err = fmt.Errorf("wrapped: %w", &throttler.LimitedError{Verdict: v})
	require.ErrorIs(t, err, throttler.ErrLimited)
	var limited *throttler.LimitedError
	require.ErrorAs(t, err, &limited)
	assert.Equal(t, v, limited.Verdict)
	assert.EqualError(t, limited, `throttler: limited: "user:42" by bucket "1/1h", retry after 1h0m0s`)
}

func TestAnInjectedClockOutsideTheArithmeticIsATypedError(t *testing.T) {
	t.Parallel()
	for _, at := range []time.Time{{}, time.Unix(-1, 0), time.Date(2190, 1, 1, 0, 0, 0, 0, time.UTC), time.Unix(1<<62, 0)} {
		th, mock := throttled(t, throttler.NewBucket(time.Minute, 3))
		mock.Set(at)
		_, err := th.Consume("a")
		require.ErrorIs(t, err, throttler.ErrInvalidClock)
	}
}

func TestTheDefaultClockFollowsTheTimeOfASynctestBubble(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(10*time.Second, 1)}})
		require.NoError(t, err)
		assert.True(t, allowed(t, th, "a"))
		v, err := th.Consume("a")
		require.NoError(t, err)
		assert.Equal(t, 10*time.Second, v.RetryAfter)
		start := time.Now()
		_, err = th.Wait(t.Context(), "a")
		require.NoError(t, err)
		assert.Equal(t, 10*time.Second, time.Since(start))
	})
}

func TestManyGoroutinesTakeExactlyTheLimitWhileBucketsComeAndGo(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(time.Minute, 100))
	var admitted atomic.Int64
	var done sync.WaitGroup
	for i := range 200 {
		done.Go(func() {
			other := fmt.Sprint("other-", i%7)
			assert.NoError(t, th.AddBucket(other, throttler.NewBucket(time.Minute, int64(1+i%5))))
			_, err := th.Consume(other)
			assert.NoError(t, err)
			th.RemoveBuckets(other)
			if v, err := th.Consume("hot"); assert.NoError(t, err) && v.Allowed {
				admitted.Add(1)
			}
		})
	}
	done.Wait()
	assert.Equal(t, int64(100), admitted.Load())
}

func TestADecisionAllocatesNothing(t *testing.T) {
	four := []throttler.Bucket{
		throttler.NewBucket(time.Hour, 1<<40), throttler.NewBucket(time.Hour, 1<<18).Continuous(),
		throttler.NewBucket(time.Hour, 1<<40).FixedWindow(), throttler.NewBucket(time.Hour, 1<<18).SlidingWindow(),
	}
	plan, holds, level := throttler.Using(four[1], four[0]), throttler.Using(four[0], four[2]), throttler.Using(four[1])
	th, err := throttler.New(throttler.Config{Buckets: four})
	require.NoError(t, err)
	require.NoError(t, th.AddBucket("own", four[:2]...))
	require.True(t, allowed(t, th, "user:42"), "a peek at one that is not there copies its name")
	denied, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1), four[0]}})
	require.NoError(t, err)
	var sum int64
	for name, call := range map[string]func() (throttler.Verdict, error){
		"four buckets":   func() (throttler.Verdict, error) { return th.Consume("user:42") },
		"own buckets":    func() (throttler.Verdict, error) { return th.Consume("own", throttler.Cost(2)) },
		"a cost of one":  func() (throttler.Verdict, error) { return th.Consume("user:42", throttler.CostOf(four[0].Name(), 3)) },
		"a plan":         func() (throttler.Verdict, error) { return th.Consume("planned", plan) },
		"holds":          func() (throttler.Verdict, error) { return th.Consume("held", holds) },
		"a level":        func() (throttler.Verdict, error) { return th.Consume("level", level) },
		"with a context": func() (throttler.Verdict, error) { return th.ConsumeContext(t.Context(), "user:42") },
		"a peek":         func() (throttler.Verdict, error) { return th.Peek(t.Context(), "user:42") },
		"a denial":       func() (throttler.Verdict, error) { return denied.Consume("user:42") },
	} {
		assert.Zero(t, testing.AllocsPerRun(1000, func() {
			v, err := call()
			if err != nil {
				panic(err)
			}
			for _, l := range v.Levels() {
				sum += l.Remaining
			}
		}), name)
	}
	require.Positive(t, sum)
}

func TestADecisionOnTwoIdentifiersAllocatesNothing(t *testing.T) {
	th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1<<40), throttler.NewBucket(time.Minute, 1<<40)}})
	require.NoError(t, err)
	assert.Zero(t, testing.AllocsPerRun(1000, func() {
		_, _ = th.ConsumeAll(t.Context(), throttler.For("user:42"), throttler.For("org:7"))
	}))
}

func TestADecisionOnMoreThanFourBucketsAllocatesOnce(t *testing.T) {
	for _, n := range []int{5, 16} {
		var all []throttler.Bucket
		for i := range n {
			all = append(all, throttler.NewBucket(time.Duration(i+1)*time.Hour, 1<<40))
		}
		th, err := throttler.New(throttler.Config{Buckets: all})
		require.NoError(t, err)
		assert.InDelta(t, 1, testing.AllocsPerRun(1000, func() { _, _ = th.Consume("user:42") }), 0, n)
	}
}

func TestTheCodeInTheReadmeIsThatOfTheExamples(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	examples, err := os.ReadFile("example_test.go")
	require.NoError(t, err)
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(string(readme), -1)
	require.NotEmpty(t, blocks)
	for _, block := range blocks {
		indented := regexp.MustCompile(`(?m)^(.)`).ReplaceAllString(block[1], "\t$1")
		assert.Contains(t, string(examples), indented)
	}
}

func TestArrowsPointDownOnly(t *testing.T) {
	t.Parallel()
	const module = "github.com/go-throttler/throttler"
	allowed := map[string][]string{
		"":                     {"/storage", "/storage/runtime", "/storage/lease", "/internal/law", "/internal/period", "/internal/nearest"},
		"/internal/law":        {},
		"/storage":             {"/internal/law"},
		"/storage/runtime":     {"/storage", "/internal/law"},
		"/storage/redis":       {"/storage", "/internal/replica", "/internal/law", "/internal/batch", "github.com/redis/go-redis/v9", "github.com/cespare/xxhash", "go.uber.org/atomic", "golang.org/x/sys"},
		"/storage/postgres":    {"/storage", "/internal/replica", "/internal/law", "/internal/batch", "github.com/jackc/", "golang.org/x/text", "golang.org/x/sync"},
		"/storage/failover":    {"/internal/seldom", "/storage", "/internal/replica", "/internal/law", "/storage/redis", "/storage/postgres", "/storage/runtime", "/internal/batch", "github.com/redis/go-redis/v9", "github.com/cespare/xxhash", "go.uber.org/atomic", "golang.org/x/", "github.com/jackc/"},
		"/throttlerslog":       {"", "/storage", "/storage/runtime", "/storage/lease", "/internal/law", "/internal/nearest", "/internal/period", "/internal/seldom"},
		"/throttlerhttp":       {"", "/storage", "/storage/runtime", "/storage/lease", "/internal/law", "/internal/period", "github.com/dunglas/httpsfv", "/internal/nearest"},
		"/internal/storecheck": {"/storage", "/internal/law", "github.com/stretchr/testify", "go.yaml.in/yaml/v3"},
		"/rules":               {"", "/storage", "/storage/runtime", "/storage/lease", "/internal/law", "/internal/period", "/internal/nearest", "/throttlerhttp", "github.com/dunglas/httpsfv", "go.yaml.in/yaml/v4"},
		"/rules/postgres":      {"", "/rules", "/storage", "/storage/runtime", "/storage/lease", "/internal/law", "/internal/period", "/internal/nearest", "/throttlerhttp", "github.com/dunglas/httpsfv", "go.yaml.in/yaml/v4", "github.com/jackc/", "golang.org/x/text", "golang.org/x/sync"},
		"/storage/storagetest": {"/storage", "/internal/replica", "/internal/law", "/internal/period", "/internal/storecheck", "github.com/anishathalye/porcupine", "github.com/stretchr/testify", "go.yaml.in/yaml/v3"},
	}
	for pkg, may := range allowed {
		out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", module+pkg).Output()
		require.NoError(t, err)
	deps:
		for dep := range strings.FieldsSeq(string(out)) {
			short := strings.TrimPrefix(dep, module)
			for _, a := range append(may, pkg) {
				if short == a || strings.HasPrefix(a, "g") && strings.HasPrefix(short, a) {
					continue deps
				}
			}
			assert.Fail(t, pkg+" must not import "+dep)
		}
	}
}
