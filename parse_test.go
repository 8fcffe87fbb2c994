package throttler_test

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
)

func ExampleParseBucket() {
	b, err := throttler.ParseBucket("100/1h sliding named api")
	fmt.Println(b.Name(), b.Capacity(), b.Period(), err)
	_, err = throttler.ParseBucket("100/1h slidng")
	fmt.Println(err)
	// Output:
	// api 100 1h0m0s <nil>
	// throttler: bucket "100/1h slidng": Kind is "slidng", must be replenish, continuous, fixed, sliding or log, or else burst or named has to come here: did you mean "sliding"?
}

func TestABucketIsReadFromItsWords(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	for words, want := range map[string]throttler.Bucket{
		"5/10s":                                throttler.NewBucket(10*time.Second, 5),
		" 5/10s  Replenish ":                   throttler.NewBucket(10*time.Second, 5),
		"100/1h sliding":                       throttler.NewBucket(time.Hour, 100).SlidingWindow(),
		"3/1h log":                             throttler.NewBucket(time.Hour, 3).SlidingLog(),
		"1000/30d fixed":                       throttler.NewBucket(30*day, 1000).FixedWindow(),
		"1/1w2d3h":                             throttler.NewBucket(9*day+3*time.Hour, 1),
		"100/10s burst 200 continuous":         throttler.NewBucket(10*time.Second, 100).Continuous().Burst(200),
		"100/10s CONTINUOUS BURST 200 named X": throttler.NewBucket(10*time.Second, 100).Continuous().Burst(200).Named("X"),
		`1/1s named "a \"b\" c" log`:           throttler.NewBucket(time.Second, 1).SlidingLog().Named(`a "b" c`),
		"9/second":                             throttler.NewBucket(time.Second, 9),
		"9/h":                                  throttler.NewBucket(time.Hour, 9),
		"0/1s":                                 throttler.NewBucket(time.Second, 0),
		"unlimited":                            throttler.Unlimited(),
		"unlimited named tokens":               throttler.Unlimited().Named("tokens"),
	} {
		b, err := throttler.ParseBucket(words)
		require.NoError(t, err, words)
		assert.Equal(t, want, b, words)
		again, err := throttler.ParseBucket(b.String())
		require.NoError(t, err, b.String())
		assert.Equal(t, b, again, "String of %q is %q", words, b)
	}
}

func TestFaultyWordsAreNamedWithTheNearestRightOne(t *testing.T) {
	t.Parallel()
	for words, want := range map[string][]string{
		"":                       {"Capacity", "such as 5/10s"},
		"unlimted":               {"Capacity", `did you mean "unlimited"?`},
		"5/10":                   {"Period", `is "10"`},
		"5/minut":                {"Period", `did you mean "minute"?`},
		"five/1s":                {"Capacity", `is "five"`},
		"-1/1s":                  {"Capacity", "is -1, must be from 0"},
		"5/367d":                 {"Period", "must be from 1µs to 366 days"},
		"5/1000000w":             {"Period", "must be a duration"},
		"5/2000w2562000h":        {"Period", "must be a duration"},
		"5/1s contiuous":         {"Kind", `did you mean "continuous"?`},
		"5/1s log fixed":         {"Kind", `is "fixed" after "log"`},
		"5/1s burst":             {"Burst", `is ""`},
		"5/1s burst 5":           {"Burst", "for a Continuous bucket only"},
		"5/1s named":             {`"5/1s named": Name is missing`, "1 to 64"},
		"unlimited log":          {"Kind", "not for unlimited"},
		"five/1x wrong burst no": {"Capacity", "Period", "Kind", "Burst"},
	} {
		_, err := throttler.ParseBucket(words)
		var fault *throttler.BucketError
		require.ErrorAs(t, err, &fault, words)
		for _, part := range want {
			assert.ErrorContains(t, err, part, words)
		}
	}
}

func TestALimitInOtherWordsIsOneFault(t *testing.T) {
	t.Parallel()
	for _, words := range []string{"5 per 10s", "5 / 10s", "10s 5"} {
		_, err := throttler.ParseBucket(words)
		require.ErrorContains(t, err, "such as 5/10s")
		assert.NotContains(t, err.Error(), "\n", "faults joined")
	}
}

func TestTheErrorOfALongTextIsShort(t *testing.T) {
	t.Parallel()
	for _, words := range []string{strings.Repeat("a ", 2000), "1/1s " + strings.Repeat("log ", 2000), strings.Repeat("1", 4000) + "/1s"} {
		_, err := throttler.ParseBucket(words)
		require.Error(t, err)
		assert.Less(t, len(err.Error()), 8000)
	}
}

func FuzzParseBucket(f *testing.F) {
	f.Add("100/10s continuous burst 200 named x")
	f.Add(`1/1w1d1h named "a b"`)
	f.Add("unlimited named x")
	f.Fuzz(func(t *testing.T, words string) {
		b, err := throttler.ParseBucket(words)
		if err != nil {
			return
		}
		again, err := throttler.ParseBucket(b.String())
		require.NoError(t, err, "%q is %q", words, b)
		require.Equal(t, b.Name(), again.Name())
		require.Equal(t, b.Capacity(), again.Capacity())
		require.Equal(t, b.Period(), again.Period())
	})
}

func TestABucketOfCapacityZeroAdmitsNothing(t *testing.T) {
	t.Parallel()
	for _, b := range []throttler.Bucket{
		throttler.NewBucket(time.Second, 0), throttler.NewBucket(time.Second, 0).Continuous(),
		throttler.NewBucket(time.Second, 0).FixedWindow(), throttler.NewBucket(7*time.Microsecond, 0).SlidingWindow(), throttler.NewBucket(time.Second, 0).SlidingLog(),
	} {
		l, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{b}})
		require.NoError(t, err, b)
		v, err := l.Consume("a")
		require.ErrorIs(t, err, throttler.ErrCostExceedsCapacity, b)
		require.Len(t, v.Levels(), 1)
		assert.False(t, v.Allowed)
		assert.Zero(t, v.Levels()[0].Limit)
		_, err = l.Wait(t.Context(), "a")
		require.ErrorIs(t, err, throttler.ErrCostExceedsCapacity, "at once")
		v, err = l.Consume("a", throttler.AtMost(5))
		require.ErrorIs(t, err, throttler.ErrCostExceedsCapacity, "waiting never helps")
		assert.False(t, v.Allowed)
		_, err = l.Wait(t.Context(), "a", throttler.AtMost(5))
		require.ErrorIs(t, err, throttler.ErrCostExceedsCapacity, "at once")
		v, err = l.Consume("a", throttler.AtMost(0))
		require.NoError(t, err)
		assert.True(t, v.Allowed)
		v, err = l.Consume("a", throttler.Cost(0))
		require.NoError(t, err)
		assert.True(t, v.Allowed)
	}
}

func TestALimitThatWasZeroKeepsWhatWasSpentBefore(t *testing.T) {
	t.Parallel()
	l, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	five, zero := throttler.NewBucket(time.Hour, 5).Named("x"), throttler.NewBucket(time.Hour, 0).Named("x")
	_, err = l.Consume("a", throttler.Using(five), throttler.Cost(3))
	require.NoError(t, err)
	_, err = l.Consume("a", throttler.Using(zero))
	require.ErrorIs(t, err, throttler.ErrCostExceedsCapacity)
	v, err := l.Consume("a", throttler.Using(five))
	require.NoError(t, err)
	assert.Equal(t, int64(1), v.Levels()[0].Remaining)
}

func TestModifiersOfAnUnlimitedBucketAreNotInItsWords(t *testing.T) {
	t.Parallel()
	assert.Equal(t, "unlimited named x", throttler.Unlimited().Burst(5).Continuous().Elastic(2).Named("x").String())
}

func TestUnlimitedAdmitsEverythingAndAsksNobody(t *testing.T) {
	t.Parallel()
	l, err := throttler.New(throttler.Config{Storage: failing{}})
	require.NoError(t, err)
	require.NoError(t, l.AddBucket("admin", throttler.Unlimited().Named("tokens")))
	assert.True(t, l.Buckets("admin")[0].Unlimited())
	assert.Equal(t, int64(math.MaxInt64), throttler.Unlimited().Capacity())
	v, err := l.Consume("admin", throttler.Cost(math.MaxInt64), throttler.CostOf("tokens", 3))
	require.NoError(t, err)
	assert.True(t, v.Allowed)
	assert.Empty(t, v.Levels())
	require.NoError(t, l.Refund(t.Context(), v))
	_, err = l.Wait(t.Context(), "admin")
	require.NoError(t, err)

	_, err = l.Consume("admin", throttler.Cost(-1))
	require.ErrorIs(t, err, throttler.ErrInvalidCost)
	_, err = l.Consume("admin", throttler.CostOf("tokens", -1))
	require.ErrorIs(t, err, throttler.ErrInvalidCost)
	_, err = l.Consume("admin", throttler.CostOf("other", 1))
	require.ErrorContains(t, err, `names none of the buckets of "admin", which are ["tokens"]`)
	_, err = l.Consume("", throttler.Using(throttler.Unlimited()))
	require.ErrorIs(t, err, throttler.ErrInvalidIdentifier)
}

func TestUnlimitedStandsBesideOtherBuckets(t *testing.T) {
	t.Parallel()
	l, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	one := throttler.NewBucket(time.Hour, 1).Named("calls")
	require.NoError(t, l.AddBucket("a", throttler.Unlimited().Named("tokens"), one))
	v, err := l.Consume("a", throttler.CostOf("tokens", 1_000_000))
	require.NoError(t, err)
	assert.True(t, v.Allowed)
	require.Len(t, v.Levels(), 1)
	v, err = l.Consume("a")
	require.NoError(t, err)
	assert.False(t, v.Allowed)

	require.NoError(t, l.AddBucket("a", throttler.Unlimited().Named("calls")), "replaces the limit")
	v, err = l.Consume("a")
	require.NoError(t, err)
	assert.True(t, v.Allowed)
	assert.True(t, l.RemoveBucket("a", "calls"))
	require.NoError(t, l.AddBucket("b", one))
	assert.Len(t, l.Buckets("a"), 1)
	assert.Len(t, l.Buckets("b"), 1)
}
