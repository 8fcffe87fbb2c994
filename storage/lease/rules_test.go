package lease_test

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/lease"
)

// The tests of the single rules, over a server with a round trip of 1 ms.

// fixed runs a test in a world with one bucket and without randomness. It begins at the start of a period.
func fixed(t *testing.T, kind law.Kind, period time.Duration, capacity int64, test func(*testing.T, *world)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 0)
		w.options, w.shortest = lease.Options{}, time.Millisecond
		w.server.ahead, w.server.drift = 0, 0
		w.rules = []law.Rule{w.rule("limit", kind, period, capacity, capacity)}
		<-time.After(period - time.Duration(law.Monotonic()%period.Microseconds())*time.Microsecond)
		test(t, w)
		w.end()
	})
}

// steady starts a process whose round trips all take the same time.
func (w *world) steady() *process {
	p := w.start()
	p.link.rnd = nil
	return p
}

// asks calls n times, one after the other, and returns how many were admitted.
func (w *world) asks(p *process, n int) (admitted int) {
	for range n {
		if v := w.take(p, "id", 1); v.Allowed {
			admitted++
		}
	}
	return admitted
}

// source asks once, and returns the Source of the verdict.
func (w *world) source(p *process) string {
	v := w.take(p, "id", 1)
	return v.Source()
}

// leases asks until the process has a lease of at least 15 tokens, and returns how many calls were admitted.
func (w *world) leases(p *process) (admitted int64) {
	for p.State().Tokens < 15 {
		require.Equal(w.t, 1, w.asks(p, 1))
		require.Less(w.t, admitted, int64(100), "no lease")
		admitted++
	}
	return admitted
}

// remaining returns how many tokens remain on the server.
func (w *world) remaining() int64 {
	w.server.mu.Lock()
	defer w.server.mu.Unlock()
	part := storecheck.NewPart("id", w.rules, 0)
	r := &storage.Request{Mode: storage.Peek, Parts: []storage.Part{{Identifier: "id", Rules: part.Rules}}, Costs: part.Costs}
	a := &storage.Answer{Counts: make([]storage.Count, len(part.Costs))}
	require.NoError(w.t, storage.Decide(r, a, w.server.clock(law.Monotonic()), w.server.of("id")))
	return a.Counts[0].Remaining
}

func TestRule1ADenialIsBelievedUntilItMayBeOver(t *testing.T) {
	fixed(t, law.Replenish, time.Second, 3, func(t *testing.T, w *world) {
		p := w.steady()
		require.Equal(t, 3, w.asks(p, 3))
		v := w.take(p, "id", 1)
		require.False(t, v.Allowed)
		require.Equal(t, "server", v.Source())
		retry, before := v.RetryAfter, w.server.calls.Load()
		for retry > 100*time.Millisecond {
			<-time.After(50 * time.Millisecond)
			again := w.take(p, "id", 1)
			require.Equal(t, lease.Source, again.Source())
			require.LessOrEqual(t, again.RetryAfter, retry-50*time.Millisecond)
			retry = again.RetryAfter
		}
		assert.Equal(t, before, w.server.calls.Load(), "the server was asked")
		<-time.After(retry)
		assert.Equal(t, 3, w.asks(p, 3))
	})
}

func TestRule1ADenialIsBelievedForMaxDenialAtMost(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 1, func(t *testing.T, w *world) {
		p, other := w.steady(), w.steady()
		require.Equal(t, 1, w.asks(p, 4))
		require.NoError(t, other.Reset(t.Context(), "sim", "id"))
		require.Zero(t, w.asks(p, 1))
		<-time.After(lease.DefaultMaxDenial)
		assert.Equal(t, 1, w.asks(p, 1))
	})
}

// frees are what makes tokens free in the shared storage: what ends a remembered denial, and what keeps one from being
// remembered. The process has spent at least 5 tokens.
var frees = map[string]func(*process, *storage.RuleSet) error{
	"a Refund": func(p *process, rules *storage.RuleSet) error {
		return p.Charge(context.Background(), &storage.Charge{Name: "sim", Identifier: "id", Rules: rules, Amounts: []storage.Amount{{N: -5, In: time.Hour.Microseconds()}}})
	},
	"a Reset": func(p *process, _ *storage.RuleSet) error { return p.Reset(context.Background(), "sim", "id") },
}

// The denial is decided before the tokens are free, and arrives afterwards. The first identifier has no pool until then, and
// the second has a flight.
func TestRule1ADenialFromBeforeTokensWereFreeIsNotRemembered(t *testing.T) {
	for what, free := range frees {
		for _, hot := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, hot %v", what, hot), func(t *testing.T) {
				fixed(t, law.Replenish, time.Hour, 1000, func(t *testing.T, w *world) {
					p, other := w.steady(), w.steady()
					if hot {
						w.leases(p)
						w.asks(p, int(p.State().Tokens))
					} else {
						require.True(t, w.take(p, "id", 5).Allowed)
					}
					require.True(t, w.take(other, "id", w.remaining()).Allowed)
					p.link.takes(20 * time.Millisecond)
					w.load.Go(func() { assert.Zero(t, w.asks(p, 1)) })
					<-time.After(11 * time.Millisecond)
					p.link.takes(time.Millisecond)
					require.NoError(t, free(p, storecheck.NewPart("id", w.rules, 0).Rules))
					w.load.Wait()
					assert.Equal(t, 5, w.asks(p, 5))
				})
			})
		}
	}
}

// The call is denied because of the lease, which is given back while the answer is on its way.
func TestRule5ACallIsNotDeniedBecauseOfALeaseOnItsWayBack(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 1000, func(t *testing.T, w *world) {
		p := w.steady()
		began := time.Now()
		at := func(d time.Duration) { <-time.After(time.Until(began.Add(d))) }
		at(50 * time.Millisecond)
		used := w.leases(p) // until 250 ms and a little, which is noticed at 300 ms
		at(190 * time.Millisecond)
		require.Equal(t, lease.Source, w.source(p))
		at(270 * time.Millisecond)
		require.Positive(t, p.State().Tokens)
		p.link.takes(50 * time.Millisecond)
		w.load.Go(func() { assert.True(t, w.take(p, "id", 1000-used-1).Allowed) })
		at(299 * time.Millisecond)
		p.link.takes(time.Millisecond)
		w.load.Wait()
	})
}

func TestRule5ACallGetsTheTokensOfALeaseOnItsWayHere(t *testing.T) {
	for name, atMost := range map[string]bool{"a call that is denied without them": false, "one that takes less": true} {
		t.Run(name, func(t *testing.T) {
			fixed(t, law.Replenish, time.Hour, 1000, func(t *testing.T, w *world) {
				p := w.steady()
				w.leases(p)
				w.asks(p, int(p.State().Tokens))
				p.link.takes(20 * time.Millisecond)
				w.load.Go(func() { assert.Equal(t, 1, w.asks(p, 1)) })
				<-time.After(11 * time.Millisecond) // the server has granted a lease, and the answer is on its way
				p.link.takes(time.Millisecond)
				cost := w.remaining() + 1
				part := storecheck.NewPart("id", w.rules, cost)
				part.AtMost = atMost
				v, err := storecheck.Decide(t.Context(), p, storecheck.Request{Name: "sim", Parts: []storecheck.Part{part}})
				require.NoError(t, err)
				assert.Equal(t, cost, v.Tokens())
			})
		})
	}
}

func TestRule1AnotherCostIsAnotherQuestion(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 10, func(t *testing.T, w *world) {
		p := w.steady()
		require.Equal(t, 8, w.asks(p, 8))
		assert.False(t, w.take(p, "id", 3).Allowed)
		assert.True(t, w.take(p, "id", 2).Allowed)
	})
}

// What the process takes itself makes the same call wait longer.
func TestRule1ADenialFromBeforeTokensWereTakenIsForgotten(t *testing.T) {
	for what, mode := range map[string]storage.Mode{"a Take": storage.Take, "a Charge": storage.Force} {
		t.Run(what, func(t *testing.T) {
			fixed(t, law.Continuous, time.Hour, 10, func(t *testing.T, w *world) {
				p := w.steady()
				require.True(t, w.take(p, "id", 8).Allowed)
				before := w.take(p, "id", 3)
				require.False(t, before.Allowed)
				v, err := storecheck.Decide(t.Context(), p, storecheck.Request{Name: "sim", Mode: mode, Parts: []storecheck.Part{storecheck.NewPart("id", w.rules, 2)}})
				require.NoError(t, err)
				require.True(t, v.Allowed)
				after := w.take(p, "id", 3)
				require.False(t, after.Allowed)
				assert.Zero(t, after.Count(0).Remaining)
				assert.InDelta(t, before.RetryAfter+12*time.Minute, after.RetryAfter, float64(time.Second))
			})
		})
	}
}

func TestRule1RetryAfterIsTrueForAProcessAlone(t *testing.T) {
	t.Parallel()
	for seed := range uint64(15) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, seed)
			w.shortest, w.server.drift = 0, 0
			w.options = lease.Options{DenialsOnly: seed%4 == 0}
			w.rules = []law.Rule{w.rule("a", law.Kind(seed%5), time.Second, 30, 300), w.rule("b", law.Continuous, 10*time.Second, 100, 100)}
			p, checked := w.steady(), 0
			ask := func(mode storage.Mode, cost int64) storecheck.Verdict {
				part := storecheck.NewPart("id", w.rules, cost)
				v, err := storecheck.Decide(t.Context(), p, storecheck.Request{Name: "sim", Mode: mode, Parts: []storecheck.Part{part}})
				require.NoError(t, err)
				return v
			}
			for range 300 {
				<-time.After(time.Duration(w.rnd.IntN(2000)) * time.Microsecond)
				cost := 1 + w.rnd.Int64N(3)
				if v := ask(storage.Take, cost); v.Allowed {
					continue
				}
				<-time.After(time.Duration(w.rnd.IntN(100)) * time.Microsecond)
				v := ask(storage.Take, cost) // mostly answered by the remembered denial
				if v.Allowed || v.RetryAfter < time.Microsecond {
					continue
				}
				<-time.After(v.RetryAfter - time.Microsecond)
				require.False(t, ask(storage.Peek, cost).Allowed, "seed %d: a microsecond too early", seed)
				<-time.After(time.Microsecond)
				require.True(t, ask(storage.Take, cost).Allowed, "seed %d: after %v by %s", seed, v.RetryAfter, v.Source())
				checked++
			}
			require.Greater(t, checked, 20)
			w.end()
		})
	}
}

func TestRule2ALeaseIsUsedForItsLifetimeAtMost(t *testing.T) {
	fixed(t, law.Continuous, time.Hour, 10000, func(t *testing.T, w *world) {
		p := w.steady()
		w.leases(p)
		began, tokens := time.Now(), p.State().Tokens
		for time.Since(began) < 195*time.Millisecond {
			require.Equal(t, lease.Source, w.source(p), "after %v", time.Since(began))
			<-time.After(19 * time.Millisecond)
		}
		require.Greater(t, tokens, int64(11))
		<-time.After(time.Until(began.Add(lease.DefaultLifetime)))
		assert.NotEqual(t, lease.Source, w.source(p))
	})
}

func TestRule2ALeaseDecidesWithoutTheServer(t *testing.T) {
	fixed(t, law.FixedWindow, time.Hour, 1_000_000, func(t *testing.T, w *world) {
		p := w.steady()
		w.leases(p)
		for range 20 { // the leases grow with the demand, up to an eighth of the rest
			w.asks(p, 1000)
		}
		before, calls := p.State(), w.server.calls.Load()
		require.Equal(t, 10_000, w.asks(p, 10_000))
		after := p.State()
		assert.Equal(t, after.Calls-before.Calls, w.server.calls.Load()-calls, "State counts the calls")
		assert.Less(t, w.server.calls.Load()-calls, int64(20))
		assert.Greater(t, after.Local-before.Local, int64(9980))
	})
}

func TestRule2RemainingCountsTheOwnLeaseIn(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 1000, func(t *testing.T, w *world) {
		p := w.steady()
		for n := range int64(300) {
			v := w.take(p, "id", 1)
			require.Equal(t, 1000-1-n, v.Count(0).Remaining, "by %s", v.Source())
			require.InDelta(t, time.Hour-time.Duration(n)*time.Millisecond, time.Duration(v.Count(0).ResetAfter)*time.Microsecond, float64(time.Second))
			require.Equal(t, v.Count(0).ResetAfter, v.Count(0).HeldFor)
		}
	})
}

// An answer that arrives while tokens are being given back may or may not include them.
func TestRule2APeekDoesNotCountTwiceWhatIsGivenBackMeanwhile(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 1000, func(t *testing.T, w *world) {
		p := w.steady()
		left := 1000 - w.leases(p)
		p.link.takes(20 * time.Millisecond)
		part := storecheck.NewPart("id", w.rules, 0)
		go func() {
			assert.NoError(t, p.Charge(t.Context(), &storage.Charge{Name: "sim", Identifier: "id", Rules: part.Rules, Amounts: []storage.Amount{{N: -5, In: time.Hour.Microseconds()}}}))
		}()
		<-time.After(12 * time.Millisecond) // the server has processed the Charge
		p.link.takes(time.Millisecond)
		v := w.take(p, "id", 200)
		require.True(t, v.Allowed)
		<-time.After(20 * time.Millisecond) // the answer to the Charge has arrived
		v, err := storecheck.Decide(t.Context(), p, storecheck.Request{Name: "sim", Mode: storage.Peek, Parts: []storecheck.Part{part}})
		require.NoError(t, err)
		assert.Equal(t, left+5-200, v.Count(0).Remaining, "by %s", v.Source())
	})
}

func TestRule3ALeaseIsAnEighthOfWhatRemainsAtMost(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 100_000, func(t *testing.T, w *world) {
		var processes []*process
		for range 4 { // the demand of each is more than an eighth of what will remain
			p := w.steady()
			processes = append(processes, p)
			for range 20 {
				w.load.Go(func() { w.take(p, "id", 500) })
			}
		}
		w.load.Wait()
		rest := w.remaining()
		for _, p := range processes { // each sees what the one before has left
			part := storecheck.NewPart("id", w.rules, 1)
			part.AtMost = true
			_, err := storecheck.Decide(t.Context(), p, storecheck.Request{Name: "sim", Parts: []storecheck.Part{part}})
			require.NoError(t, err)
			require.Equal(t, 1, w.asks(p, 1))
			require.Positive(t, p.State().Tokens)
		}
		rest -= 8
		assert.InDelta(t, (1-math.Pow(7.0/8, 4))*float64(rest), float64(rest-w.remaining()), 10)
		<-time.After(3*lease.DefaultLifetime/2 + time.Millisecond)
		assert.Equal(t, rest, w.remaining(), "all is back after one and a half lifetimes and a round trip")
	})
}

func TestRule3ACallThatTakesNothingStartsNoPeriod(t *testing.T) {
	fixed(t, law.Replenish, time.Second, 1000, func(t *testing.T, w *world) {
		p, began := w.steady(), time.Now()
		require.Equal(t, 1, w.asks(p, 1))
		<-time.After(900 * time.Millisecond)
		w.leases(p)
		<-time.After(time.Until(began.Add(1010 * time.Millisecond))) // the next period has no call
		v := w.take(p, "id", 0)
		require.True(t, v.Allowed)
		assert.Equal(t, int64(1000), w.remaining())
	})
}

func TestRule3ALeaseFromBeforeAResetIsNotUsed(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 1000, func(t *testing.T, w *world) {
		p := w.steady()
		w.leases(p)
		w.asks(p, int(p.State().Tokens))
		require.Zero(t, p.State().Tokens)
		p.link.takes(20 * time.Millisecond)
		w.load.Go(func() { w.asks(p, 1) })  // it asks for a lease as well
		<-time.After(11 * time.Millisecond) // the server has granted the lease, and the answer is on its way
		p.link.takes(time.Millisecond)
		require.NoError(t, p.Reset(t.Context(), "sim", "id"))
		w.load.Wait()
		assert.Zero(t, p.State().Tokens)
		assert.Equal(t, int64(1000), w.remaining())
	})
}

// The call is dearer than the lease and is denied, and another process uses what the Reset has freed.
func TestRule5ALeaseFromBeforeAResetIsNotGivenBack(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 1000, func(t *testing.T, w *world) {
		p, other := w.steady(), w.steady()
		w.leases(p)
		require.True(t, w.take(other, "id", w.remaining()).Allowed)
		p.link.takes(20 * time.Millisecond)
		w.load.Go(func() { w.take(p, "id", 100) })
		<-time.After(11 * time.Millisecond) // the server has denied it, and the answer is on its way
		p.link.takes(time.Millisecond)
		require.NoError(t, p.Reset(t.Context(), "sim", "id"))
		require.True(t, w.take(other, "id", 1000).Allowed)
		w.load.Wait()
		assert.Zero(t, w.remaining())
	})
}

func TestRule3NearTheLimitOneQuestionBringsWhatThereIs(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 1000, func(t *testing.T, w *world) {
		p, other := w.steady(), w.steady()
		w.leases(p)
		w.asks(p, int(p.State().Tokens)) // its demand is now higher than what will remain
		left := w.remaining()
		require.True(t, w.take(other, "id", left-3).Allowed)
		calls := w.server.calls.Load()
		assert.Equal(t, 3, w.asks(p, 3))
		assert.Equal(t, calls+1, w.server.calls.Load())
		assert.Zero(t, w.asks(p, 1))
	})
}

func TestRule3WhatCouldBeGivenBackToAnotherPeriodIsNotLeased(t *testing.T) {
	fixed(t, law.FixedWindow, 399*time.Millisecond, 100_000, func(t *testing.T, w *world) {
		p := w.steady()
		w.asks(p, 500)
		assert.Zero(t, p.State().Local)
	})
}

func TestRule4WhoIsProvidedForWaitsAndOthersDoNot(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 100_000, func(t *testing.T, w *world) {
		p := w.steady()
		w.leases(p)
		w.asks(p, int(p.State().Tokens))
		calls := w.server.calls.Load()
		for range 10 { // the first call takes tokens ahead for the others
			w.load.Go(func() { w.asks(p, 1) })
			<-time.After(10 * time.Microsecond)
		}
		w.load.Go(func() { w.take(p, "id", 1000) })
		w.load.Wait()
		assert.Equal(t, calls+2, w.server.calls.Load())
	})
}

func TestRule5WhatIsNotUsedIsGivenBack(t *testing.T) {
	for _, kind := range []law.Kind{law.Replenish, law.FixedWindow, law.SlidingWindow, law.Continuous} {
		t.Run(kind.String(), func(t *testing.T) {
			fixed(t, kind, 366*24*time.Hour, 1000, func(t *testing.T, w *world) {
				p := w.steady()
				used := w.leases(p)
				require.Equal(t, 1000-used-p.State().Tokens, w.remaining())
				<-time.After(lease.DefaultLifetime + time.Millisecond)
				assert.Equal(t, 1000-used, w.remaining())
				assert.Zero(t, p.State().Tokens)
				assert.Equal(t, int64(1), p.State().Returned)
			})
		})
	}
}

func TestRule5WhatHasDrainedIsNotGivenBack(t *testing.T) {
	fixed(t, law.Continuous, 10*time.Second, 10_000, func(t *testing.T, w *world) {
		p, other := w.steady(), w.steady()
		p.link.takes(20 * time.Millisecond)
		other.link.takes(0)
		<-time.After(40 * time.Millisecond)
		for range 100 { // these tokens drain in 100 ms, the leased ones after that
			w.load.Go(func() { w.asks(p, 1) })
		}
		w.load.Wait()
		w.asks(p, 1)
		require.Greater(t, p.State().Tokens, int64(50))
		for p.State().Tokens > 0 {
			<-time.After(100 * time.Microsecond)
		}
		require.True(t, w.take(other, "id", 5000).Allowed, "while what is left is on its way back")
		took := time.Now()
		<-time.After(15 * time.Millisecond)
		require.Equal(t, int64(1), p.State().Returned)
		assert.LessOrEqual(t, w.remaining(), 5000+time.Since(took).Milliseconds())
	})
}

func TestRule5ACallerThatLeavesLosesNoTokens(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 1000, func(t *testing.T, w *world) {
		p := w.steady()
		used := w.leases(p)
		used += int64(w.asks(p, int(p.State().Tokens)))
		ctx, cancel := context.WithTimeout(t.Context(), 600*time.Microsecond)
		defer cancel()
		part := storecheck.NewPart("id", w.rules, 1)
		_, err := storecheck.Decide(ctx, p, storecheck.Request{Name: "sim", Parts: []storecheck.Part{part}})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		<-time.After(time.Millisecond)
		assert.Positive(t, p.State().Tokens)
		<-time.After(lease.DefaultLifetime)
		assert.Equal(t, 1000-used-1, w.remaining(), "what it asked for itself is charged")
	})
}

func TestRule5WhatWasLeasedByOtherRulesIsGivenBack(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 1000, func(t *testing.T, w *world) {
		p := w.steady()
		used := w.leases(p)
		w.rules[0].Capacity = used + 1 // a smaller plan
		assert.Equal(t, 1, w.asks(p, 3))
		assert.Zero(t, p.State().Tokens)
	})
}

func TestACrashLosesWhatWasLeasedUntilItsHoldEnds(t *testing.T) {
	fixed(t, law.Replenish, time.Minute, 1000, func(t *testing.T, w *world) {
		p := w.steady()
		w.leases(p)
		w.crash(p)
		other := w.steady()
		assert.Equal(t, 1000-len(w.admitted["id"])-int(p.State().Tokens), w.asks(other, 1000))
		<-time.After(time.Minute)
		assert.Equal(t, 1000, w.asks(other, 1001))
	})
}

func TestMixedCostsAreAllAdmittedByAProcessAlone(t *testing.T) {
	fixed(t, law.Replenish, time.Hour, 5000, func(t *testing.T, w *world) {
		p, rnd, spent := w.steady(), rand.New(rand.NewPCG(1, 2)), int64(0)
		for spent < 5000 {
			cost := min(1+rnd.Int64N(40), 5000-spent)
			require.True(t, w.take(p, "id", cost).Allowed, "%d of %d", cost, 5000-spent)
			spent += cost
		}
		assert.Zero(t, w.asks(p, 1))
	})
}
