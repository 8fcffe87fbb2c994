// Package storecheck has what the tests of storages have in common. They ask a storage, alone or in crowds, count its
// answers, and compare them with what was taken. simulation.go has the seeds and the mutants of simulations.
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

// Patient is the timeout for tests of decisions, whose result must not depend on the speed of the machine.
const Patient = 20 * time.Second

// Kinds are all kinds of buckets.
var Kinds = []law.Kind{law.Replenish, law.Continuous, law.FixedWindow, law.SlidingWindow, law.SlidingLog}

// Rule returns the rule of a bucket that refills its capacity in a period.
func Rule(t testing.TB, name string, kind law.Kind, period time.Duration, capacity int64) law.Rule {
	t.Helper()
	r, faults := law.NewRule(name, kind, period, capacity, capacity)
	require.Empty(t, faults)
	return r
}

// Period returns a period within a few milliseconds of an hour, such that now is the middle of a window of that period
// since the epoch. So no window ends during a test or in the minutes before it, and no token comes back.
func Period() time.Duration {
	now := time.Now().UnixMicro()
	windows := now / time.Hour.Microseconds()
	return time.Duration(2*now/(2*windows+1)) * time.Microsecond
}

// Hourly returns a request for one token of a bucket with n an hour.
func Hourly(t testing.TB, id string, n int64) Request {
	t.Helper()
	return Request{Parts: []Part{NewPart(id, []law.Rule{Rule(t, "hourly", law.Replenish, time.Hour, n)}, 1)}}
}

// FivePerHour is Hourly with five tokens.
func FivePerHour(t testing.TB, id string) Request {
	t.Helper()
	return Hourly(t, id, 5)
}

// Take asks n times, one after another, and returns how often the request was admitted. An error ends the test.
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

// Spent returns how many tokens of the request's first bucket are spent.
func Spent(t testing.TB, s storage.Storage, r Request) int64 {
	t.Helper()
	r.Mode, r.Parts = storage.Peek, []Part{NewPart(r.Parts[0].Identifier, r.Parts[0].Rules.Rules, 0)}
	v, err := Decide(t.Context(), s, r)
	require.NoError(t, err)
	return r.Parts[0].Rules.Rules[0].Capacity - v.Count(0).Remaining
}

// Crowd calls f in n goroutines with 0 to n-1, and waits for all of them.
func Crowd(n int, f func(i int)) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { f(i) })
	}
	all.Wait()
}

// Recovery calls try every 5 ms until it succeeds, and returns how long that took. If it takes longer than within,
// the test ends.
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

// Until calls is every 5 ms until it returns true, and returns how long that took. What describes the wait in the
// failure after Patient.
func Until(t testing.TB, what string, is func() bool) time.Duration {
	t.Helper()
	return Recovery(t, Patient, func() error {
		if !is() {
			return errors.New(what)
		}
		return nil
	})
}

// Timed calls f n times, one after another, and returns how long each call took.
func Timed(n int, f func()) (took []time.Duration) {
	for range n {
		began := time.Now()
		f()
		took = append(took, time.Since(began))
	}
	return took
}

// AssertBackAfter asserts that calls returned when their limit had passed. The first must not return more than 5 ms
// early. Half of them must return within 50 ms after the limit, which is ten times the promise, and all of them
// within a second, because the machine may do other work. If it is so busy that mere timers are late, the calls may
// be as late as those. It sorts took.
func AssertBackAfter(t testing.TB, limit time.Duration, took []time.Duration) {
	t.Helper()
	slices.Sort(took)
	t.Logf("after %v: median %v, longest %v", limit, took[len(took)/2], took[len(took)-1])
	assert.GreaterOrEqual(t, took[0], limit-5*time.Millisecond, "a call gave up early")
	AssertHalfWithin(t, limit, took)
	assert.Less(t, took[len(took)-1], limit+time.Second, "a call hung")
}

// AssertHalfWithin asserts that half of the times, which must be sorted, are less than 50 ms above a limit. If they
// are not, it measures timers of that limit on this machine, and compares with the slowest of those.
func AssertHalfWithin(t testing.TB, limit time.Duration, took []time.Duration) {
	t.Helper()
	half, timers := took[len(took)/2], limit
	if half >= limit+50*time.Millisecond {
		timers = slices.Max(Timed(len(took), func() { <-time.After(limit) }))
		t.Logf("timers of %v took up to %v", limit, timers)
	}
	assert.Less(t, half, timers+50*time.Millisecond, "calls outlast their time")
}

// Told counts the answers that callers got. It is safe for concurrent use.
type Told struct{ Admitted, Denied, Failed atomic.Int64 }

// Ask asks once, counts the answer, and returns its error.
func (c *Told) Ask(s storage.Storage, r Request) error {
	v, err := Decide(context.Background(), s, r)
	c.Count(v, err)
	return err
}

// Count counts one answer.
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

// AssertAccount compares the tokens taken from the request's first bucket with the answers to requests for one token
// each. Every admission must have taken its token, the capacity must not be exceeded, and a failed call may have
// taken at most one token. It returns how many tokens were taken by calls that failed.
func (c *Told) AssertAccount(t testing.TB, s storage.Storage, r Request) (lost int64) {
	t.Helper()
	lost = c.AssertNotTwice(t, s, r)
	id := r.Parts[0].Identifier
	assert.GreaterOrEqual(t, lost, int64(0), "%s: something was admitted and not taken", id)
	assert.LessOrEqual(t, c.Admitted.Load(), r.Parts[0].Rules.Rules[0].Capacity, "%s: more than the limit was admitted", id)
	return lost
}

// AssertNotTwice is AssertAccount for a server that may forget: it only asserts that a failed call has taken at most
// one token. The result is negative if the server has forgotten tokens.
func (c *Told) AssertNotTwice(t testing.TB, s storage.Storage, r Request) (lost int64) {
	t.Helper()
	lost = Spent(t, s, r) - c.Admitted.Load()
	assert.LessOrEqual(t, lost, c.Failed.Load(), "%s: something was taken twice", r.Parts[0].Identifier)
	return lost
}
