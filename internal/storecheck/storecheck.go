// Package storecheck has what tests of storages have in common: they ask, in crowds, count what they are told, and hold
// it to what was taken.
package storecheck

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// Patient is for tests of what is decided, which must not depend on how fast the machine is.
const Patient = 20 * time.Second

// Kinds are all kinds of buckets.
var Kinds = []law.Kind{law.Replenish, law.Continuous, law.FixedWindow, law.SlidingWindow, law.SlidingLog}

// Rule is that of a bucket whose tokens all come back in a period.
func Rule(t testing.TB, name string, kind law.Kind, period time.Duration, capacity int64) law.Rule {
	t.Helper()
	r, faults := law.NewRule(name, kind, period, capacity, capacity)
	require.Empty(t, faults)
	return r
}

// Period is an hour but for a few milliseconds, of which now is the middle. So no window of it ends during a test, nor
// since what a test took a while ago, and nothing comes back.
func Period() time.Duration {
	now := time.Now().UnixMicro()
	windows := now / time.Hour.Microseconds()
	return time.Duration(2*now/(2*windows+1)) * time.Microsecond
}

// Hourly asks for one token of n an hour.
func Hourly(t testing.TB, id string, n int64) Request {
	t.Helper()
	return Request{Parts: []Part{NewPart(id, []law.Rule{Rule(t, "hourly", law.Replenish, time.Hour, n)}, 1)}}
}

// FivePerHour asks for one token of five an hour.
func FivePerHour(t testing.TB, id string) Request {
	t.Helper()
	return Hourly(t, id, 5)
}

// Take asks n times, and returns how often it was admitted.
func Take(t testing.TB, s storage.Storage, r Request, n int) (admitted int) {
	t.Helper()
	for range n {
		v, err := Decide(t.Context(), s, r)
		require.NoError(t, err)
		if v.Allowed {
			admitted++
		}
	}
	return admitted
}

// Spent is how many tokens of the first bucket are out.
func Spent(t testing.TB, s storage.Storage, r Request) int64 {
	t.Helper()
	r.Mode, r.Parts = storage.Peek, []Part{NewPart(r.Parts[0].Identifier, r.Parts[0].Rules.Rules, 0)}
	v, err := Decide(t.Context(), s, r)
	require.NoError(t, err)
	return r.Parts[0].Rules.Rules[0].Capacity - v.Count(0).Remaining
}

// Crowd runs f in n goroutines, and waits for them.
func Crowd(n int, f func(i int)) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { f(i) })
	}
	all.Wait()
}

// Recovery calls try until it succeeds, and returns how long that took.
func Recovery(t testing.TB, within time.Duration, try func() error) time.Duration {
	t.Helper()
	began := time.Now()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		took := time.Since(began)
		if err == nil {
			return took
		}
		require.Less(t, took, within, "it still fails: %v", err)
		<-tick.C
	}
}

// Until waits until something is so, and returns how long that took.
func Until(t testing.TB, what string, is func() bool) time.Duration {
	t.Helper()
	return Recovery(t, Patient, func() error {
		if !is() {
			return errors.New(what)
		}
		return nil
	})
}

// Timed calls f n times, and returns how long each call took.
func Timed(n int, f func()) (took []time.Duration) {
	for range n {
		began := time.Now()
		f()
		took = append(took, time.Since(began))
	}
	return took
}

// AssertBackAfter holds calls to the time after which they had to return: half of them to 50 ms more, ten times the
// promise, and all of them to a second, on a machine that does other things as well. Where it is so busy that mere
// timers are late, the calls may be as late.
func AssertBackAfter(t testing.TB, limit time.Duration, took []time.Duration) {
	t.Helper()
	slices.Sort(took)
	t.Logf("after %v: median %v, longest %v", limit, took[len(took)/2], took[len(took)-1])
	assert.GreaterOrEqual(t, took[0], limit-5*time.Millisecond, "a call gave up early")
	AssertHalfWithin(t, limit, took)
	assert.Less(t, took[len(took)-1], limit+time.Second, "a call hung")
}

// AssertHalfWithin holds half of the times, which are sorted, to 50 ms more than a limit, or than timers take.
func AssertHalfWithin(t testing.TB, limit time.Duration, took []time.Duration) {
	t.Helper()
	half, timers := took[len(took)/2], limit
	if half >= limit+50*time.Millisecond {
		timers = slices.Max(Timed(len(took), func() { <-time.After(limit) }))
		t.Logf("timers of %v took up to %v", limit, timers)
	}
	assert.Less(t, half, timers+50*time.Millisecond, "calls outlast their time")
}

// Told counts what callers were told.
type Told struct{ Admitted, Denied, Failed atomic.Int64 }

// Ask asks once, and counts the answer.
func (c *Told) Ask(s storage.Storage, r Request) error {
	v, err := Decide(context.Background(), s, r)
	c.Count(v, err)
	return err
}

// Count counts an answer.
func (c *Told) Count(v Verdict, err error) {
	switch {
	case err != nil:
		c.Failed.Add(1)
	case v.Allowed:
		c.Admitted.Add(1)
	default:
		c.Denied.Add(1)
	}
}

// AssertAccount holds what was taken to what callers were told, and returns how much of it nobody was admitted for.
func (c *Told) AssertAccount(t testing.TB, s storage.Storage, r Request) (lost int64) {
	t.Helper()
	lost = c.AssertNotTwice(t, s, r)
	id := r.Parts[0].Identifier
	assert.GreaterOrEqual(t, lost, int64(0), "%s: something was admitted and not taken", id)
	assert.LessOrEqual(t, c.Admitted.Load(), r.Parts[0].Rules.Rules[0].Capacity, "%s: more than the limit was admitted", id)
	return lost
}

// AssertNotTwice is AssertAccount for a server that may forget: what failed was taken once, or not.
func (c *Told) AssertNotTwice(t testing.TB, s storage.Storage, r Request) (lost int64) {
	t.Helper()
	lost = Spent(t, s, r) - c.Admitted.Load()
	assert.LessOrEqual(t, lost, c.Failed.Load(), "%s: something was taken twice", r.Parts[0].Identifier)
	return lost
}
