package load_test

import (
	"math"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/go-throttler/throttler/load"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const interval = 200 * time.Millisecond

// settable is a Signal that a test sets.
type settable struct{ bits atomic.Uint64 }

func (s *settable) set(f float64) { s.bits.Store(math.Float64bits(f)) }
func (s *settable) now() float64  { return math.Float64frombits(s.bits.Load()) }

// controlled runs a test in a bubble with a Controller, which calls its Signal in the middle of the test's intervals. Time in
// a bubble is virtual, so no test here waits.
func controlled(t *testing.T, s load.Signal, o *load.Options, test func(c *load.Controller, wait func(intervals int))) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c, err := load.New(s, o)
		require.NoError(t, err)
		defer c.Close()
		<-time.After(interval / 2)
		test(c, func(n int) { <-time.After(time.Duration(n) * interval) })
	})
}

func TestTheShareFallsByAFactorAndRisesByAStep(t *testing.T) {
	t.Parallel()
	var s settable
	controlled(t, s.now, nil, func(c *load.Controller, wait func(int)) {
		assert.InDelta(t, 1, c.Share(), 0)
		s.set(1)
		wait(1)
		assert.InDelta(t, 1, c.Share(), 0, "1 is not too much")
		s.set(1.01)
		wait(1)
		assert.InDelta(t, 0.8, c.Share(), 1e-9)
		wait(2)
		assert.InDelta(t, 0.512, c.Share(), 1e-9)
		s.set(0.99)
		wait(3)
		assert.InDelta(t, 0.572, c.Share(), 1e-9)
		wait(100)
		assert.InDelta(t, 1, c.Share(), 0)
	})
}

func TestTheShareIsBackInTimeAfterAnOverloadForEver(t *testing.T) {
	t.Parallel()
	var s settable
	s.set(math.Inf(1))
	controlled(t, s.now, nil, func(c *load.Controller, wait func(int)) {
		wait(10_000)
		assert.InDelta(t, 0, c.Share(), 1e-9)
		assert.GreaterOrEqual(t, c.Share(), 0.0)
		s.set(0)
		wait(49)
		assert.Less(t, c.Share(), 1.0)
		wait(1)
		assert.InDelta(t, 1, c.Share(), 1e-9)
	})
}

func TestOptionsChooseIntervalFactorStepAndLeast(t *testing.T) {
	t.Parallel()
	var s settable
	s.set(2)
	controlled(t, s.now, &load.Options{Interval: 2 * interval, Down: 0.5, Up: 0.25, Least: 0.2}, func(c *load.Controller, wait func(int)) {
		wait(1)
		assert.InDelta(t, 1, c.Share(), 0)
		wait(1)
		assert.InDelta(t, 0.5, c.Share(), 0)
		wait(4)
		assert.InDelta(t, 0.2, c.Share(), 0)
		s.set(0)
		wait(2)
		assert.InDelta(t, 0.45, c.Share(), 1e-9)
	})
}

func TestASignalThatPanicsOrIsNaNIsNoLoad(t *testing.T) {
	t.Parallel()
	var failing atomic.Bool
	high, nan := func() float64 { return 2 }, func() float64 { return math.NaN() }
	for _, fail := range []load.Signal{func() float64 { panic("no signal") }, nan, load.Most(nan, func() float64 { panic("no signal") }), load.Most()} {
		failing.Store(false)
		signal := func() float64 {
			if failing.Load() {
				return fail()
			}
			return high()
		}
		var told atomic.Uint64
		controlled(t, signal, &load.Options{Observe: func(_, signal float64) { told.Store(math.Float64bits(signal)) }}, func(c *load.Controller, wait func(int)) {
			wait(20)
			assert.Less(t, c.Share(), 0.02)
			failing.Store(true)
			wait(50)
			assert.InDelta(t, 1, c.Share(), 1e-9)
			assert.True(t, math.IsNaN(math.Float64frombits(told.Load())), "Observe knows")
		})
	}
}

func TestASignalThatBlocksLeavesTheShareAndHoldsUpNobody(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		answer := make(chan float64)
		c, err := load.New(func() float64 { return <-answer }, nil)
		require.NoError(t, err)
		answer <- 2
		answer <- 2
		<-time.After(time.Hour)
		assert.InDelta(t, 0.64, c.Share(), 1e-9)
		c.Close()
		c.Close()
		assert.InDelta(t, 0.64, c.Share(), 1e-9)
		close(answer)
		synctest.Wait()
		assert.InDelta(t, 1, c.Share(), 0, "after Close")
	})
}

func TestObserveIsToldEachLook(t *testing.T) {
	t.Parallel()
	type look struct{ share, signal float64 }
	var looks []look
	var s settable
	s.set(3)
	synctest.Test(t, func(t *testing.T) {
		c, err := load.New(s.now, &load.Options{Observe: func(share, signal float64) { looks = append(looks, look{share, signal}) }})
		require.NoError(t, err)
		<-time.After(2*interval + interval/2)
		c.Close()
	})
	require.Len(t, looks, 2)
	assert.Equal(t, look{0.8, 3}, looks[0])
}

func TestMostIsTheLargestThatSaysSomething(t *testing.T) {
	t.Parallel()
	tell := func(f float64) load.Signal { return func() float64 { return f } }
	fails := func() float64 { panic("no signal") }
	assert.InDelta(t, 0.9, load.Most(tell(0.3), tell(math.NaN()), tell(0.9), fails, tell(0.5))(), 0)
	assert.InDelta(t, 0, load.Most(tell(math.NaN()), tell(0))(), 0)
	assert.True(t, math.IsInf(load.Most(tell(0.3), tell(math.Inf(1)))(), 1))
}

func TestLatencyIsThe90thPercentileSinceItWasAsked(t *testing.T) {
	t.Parallel()
	var l load.Latency
	second, other := l.Signal(time.Second), l.Signal(100*time.Millisecond)
	assert.Zero(t, second())
	for i := range 100 {
		l.Took(time.Duration(i+1) * 10 * time.Millisecond)
	}
	got := second()
	assert.LessOrEqual(t, got, 0.9)
	assert.Greater(t, got, 0.9*7/8)
	assert.Zero(t, second(), "each is told once")
	l.Took(200 * time.Millisecond)
	assert.InDelta(t, 0.2, second(), 0.2/8)
	assert.InDelta(t, 9, other(), 9.0/8, "for itself")
}

func TestLatencyTakesAnyDuration(t *testing.T) {
	t.Parallel()
	for _, d := range []time.Duration{math.MinInt64, -1, 0, 1, 15, 16, 17, 31, 32, time.Microsecond, time.Hour, math.MaxInt64} {
		var l load.Latency
		l.Took(d)
		got := l.Signal(1)()
		assert.LessOrEqual(t, got, float64(max(0, d)))
		assert.GreaterOrEqual(t, got, float64(max(0, d))*7/8)
	}
}

func TestLatencyAllocatesNothing(t *testing.T) {
	var l load.Latency
	signal := l.Signal(time.Second)
	signal()
	assert.Zero(t, testing.AllocsPerRun(1000, func() { l.Took(time.Second); signal() }))
}

func TestTheSchedulerSeesGoroutinesThatWait(t *testing.T) {
	signal := load.Scheduler(time.Millisecond)
	signal()
	busy(t, 50)
	assert.Greater(t, signal(), 1.0)
	idle := load.Scheduler(time.Hour)
	assert.Less(t, idle(), 1.0)
}

func TestAllFaultsOfTheOptionsAreTold(t *testing.T) {
	t.Parallel()
	nan := math.NaN()
	_, err := load.New(nil, &load.Options{Interval: time.Microsecond, Down: 1, Up: -1, Least: nan})
	require.Error(t, err)
	assert.Equal(t, `load: the Signal is nil, must be a function
load: Options.Interval is 1µs, must be at least 1ms
load: Options.Down is 1, must be above 0 and below 1
load: Options.Up is -1, must be above 0 and at most 1
load: Options.Least is NaN, must be 0 to 1`, err.Error())
	for _, o := range []load.Options{{Down: nan}, {Down: -0.1}, {Up: nan}, {Up: 1.1}, {Least: -0.1}, {Least: 1.1}, {Interval: -time.Second}} {
		_, err := load.New(func() float64 { return 0 }, &o)
		require.Error(t, err, o)
	}
}
