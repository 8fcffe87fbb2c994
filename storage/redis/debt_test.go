package redis_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// debtAs asks the storage and the model for debts, and returns the answer, which must be the same.
func (w *twin) debtAs(t *testing.T, at time.Duration, rules []law.Rule) [][]storage.Amount {
	t.Helper()
	before := w.raw(t)
	d := replica.Debt{Name: w.name, Clocked: true, Now: noon + at.Microseconds(), Identifier: "a", Rules: law.NewRuleSet(rules...)}
	want, err := w.model.Debt(t.Context(), d)
	require.NoError(t, err)
	got, err := w.s.Debt(t.Context(), d)
	require.NoError(t, err)
	require.Equal(t, want, got, "at %v: %+v", at, rules)
	require.Equal(t, before, w.raw(t), "it changes nothing")
	return got.Amounts
}

func TestADebtIsThatOfTheModelAlsoUnderAChangedRule(t *testing.T) {
	t.Parallel()
	url := servers.RedisURL(t)
	for kind := range allKinds {
		t.Run(kind.String(), func(t *testing.T) {
			t.Parallel()
			w := newTwin(t, url)
			rules := []law.Rule{storecheck.Rule(t, "b", kind, time.Hour, 20), storecheck.Rule(t, "of nobody", kind, time.Hour, 20)}
			assert.Equal(t, [][]storage.Amount{nil, nil}, w.debtAs(t, 0, rules), "without any state")
			for i, n := range []int64{3, 1, 5} {
				w.ask(t, time.Duration(i)*10*time.Minute, storage.Take, rules[:1], n)
			}
			for at := -2 * time.Hour; at < 3*time.Hour; at += 7*time.Minute + time.Microsecond {
				assert.Nil(t, w.debtAs(t, at, rules)[1])
				for other := range allKinds {
					for _, period := range []time.Duration{time.Second, 90 * time.Minute, 366 * 24 * time.Hour} {
						w.debtAs(t, at, []law.Rule{storecheck.Rule(t, "b", other, period, 2), rules[1]})
					}
				}
			}
			assert.NotNil(t, w.debtAs(t, 21*time.Minute, rules)[0])
			assert.Nil(t, w.debtAs(t, 3*time.Hour, rules)[0])
		})
	}
}

func TestADebtIsByTheClockOfTheServer(t *testing.T) {
	t.Parallel()
	s := open(t, servers.RedisURL(t), redisstore.Options{})
	r := storecheck.FivePerHour(t, "a")
	r.Name = freshName()
	require.Equal(t, 2, storecheck.Take(t, s, r, 2))
	d, err := s.Debt(t.Context(), debtOf(r, 0))
	require.NoError(t, err)
	require.Len(t, d.Amounts[0], 1)
	assert.Equal(t, int64(2), d.Amounts[0][0].N)
	assert.LessOrEqual(t, d.Amounts[0][0].In, time.Hour.Microseconds())
	assert.Greater(t, d.Amounts[0][0].In, (time.Hour - storecheck.Patient).Microseconds())
}

func TestADebtOfThousandsOfAmountsIsToldInAFlightWithOthers(t *testing.T) {
	t.Parallel()
	s := open(t, servers.RedisURL(t), redisstore.Options{})
	r := storecheck.Rule(t, "w", law.FixedWindow, time.Second, 100_000)
	now, name := int64(1_700_000_000_000_000), freshName()
	want := debt(r, now, "a", 0, 4096)
	want.Name = name
	require.NoError(t, s.Raise(t.Context(), want))
	storecheck.Crowd(64, func(i int) {
		d := want
		d.Amounts = nil
		if i%2 == 0 {
			d.Identifier = fmt.Sprint("other-", i)
			assert.NoError(t, s.Reset(t.Context(), name, d.Identifier))
		}
		got, err := s.Debt(t.Context(), d)
		assert.NoError(t, err)
		if i%2 == 0 {
			assert.Equal(t, [][]storage.Amount{nil}, got.Amounts)
		} else {
			assert.Equal(t, want, got)
		}
	})
}

// A question stores nothing, so it may name any number of buckets.
func TestADebtIsToldWhenAnIdentifierHasAllBucketsItMayHave(t *testing.T) {
	t.Parallel()
	w := newTwin(t, servers.RedisURL(t))
	var rules []law.Rule
	for i := range law.MaxBuckets {
		rules = append(rules, storecheck.Rule(t, fmt.Sprint("b", i), law.Kind(i%5), time.Hour, 10))
	}
	w.ask(t, 0, storage.Take, rules[:4], 1, 2, 3, 4)
	w.ask(t, 0, storage.Take, rules[4:8], 1, 2, 3, 4)
	w.ask(t, 0, storage.Take, rules[8:12], 1, 2, 3, 4)
	w.ask(t, 0, storage.Take, rules[12:], 1, 2, 3, 4)
	w.debtAs(t, time.Minute, rules)
	assert.Nil(t, w.debtAs(t, time.Minute, []law.Rule{storecheck.Rule(t, "one more", law.Replenish, time.Hour, 10)})[0])
}

func TestAnAnswerThatTellsNoDebtIsAFailureOfTheStorage(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "\x00", "\x01", "\x01\x00", "\x01\x01\x00too short", "\x01\x00\x00too long", "\x01\xff\xff", "\x06", "\x07"} {
		c := client(t, servers.RedisURL(t))
		s := on(t, c, redisstore.Options{Timeout: storecheck.Patient})
		c.AddHook(hook(func(_ context.Context, cmd goredis.Cmder, _ goredis.ProcessHook) error {
			cmd.(interface{ SetVal(any) }).SetVal(text)
			return nil
		}))
		_, err := s.Debt(t.Context(), debtOf(storecheck.FivePerHour(t, "odd"), 0))
		require.ErrorIs(t, err, storage.ErrUnavailable, "%q", text)
	}
}
