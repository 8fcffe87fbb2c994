package storagetest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
)

// memory is the memory of a server that uses it for one request after the other, as servers on fasthttp do. It contains
// an identifier only while a call lasts. Between calls it contains the identifier of a victim, for which nobody ever
// asks: if anything is spent for the victim, the storage has read the memory too late.
type memory []byte

const victim = "victim"

func newMemory() memory { return append(memory(nil), victim...) }

// use lends the memory to a call, with an identifier in it that must be as long as the victim's.
func (m memory) use(identifier string, call func(id string)) {
	copy(m, identifier)
	call(unsafe.String(&m[0], len(m)))
	copy(m, victim)
}

// user returns an identifier that is as long as the victim's.
func user(i int) string { return fmt.Sprintf("user%02d", i) }

// reusedMemory makes all kinds of calls for some users: takes, charges, refunds and resets, alone and in pairs. The
// identifiers of all calls are in the same memory.
func reusedMemory(t *testing.T, s storage.Storage) {
	for _, clocked := range []bool{false, true} {
		name, rules := newName(), []law.Rule{rule(t, "hour", law.Replenish, time.Hour, 100, 0)}
		a, b := newMemory(), newMemory()
		ask := func(id string, mode storage.Mode, cost int64) storecheck.Request {
			return storecheck.Request{Name: name, Clocked: clocked, Mode: mode, Parts: []storecheck.Part{storecheck.NewPart(id, rules, cost)}}
		}
		spent := func(identifier string) int64 {
			v, err := storecheck.Decide(t.Context(), s, ask(identifier, storage.Peek, 0))
			require.NoError(t, err)
			return 100 - v.Count(0).Remaining
		}
		charge := func(identifier string, n int64) {
			a.use(identifier, func(id string) {
				c := storage.Charge{Name: name, Clocked: clocked, Identifier: id, Rules: law.NewRuleSet(rules...), Amounts: []storage.Amount{{N: n, In: time.Hour.Microseconds()}}}
				require.NoError(t, s.Charge(t.Context(), &c))
			})
		}
		reset := func(identifier string) {
			a.use(identifier, func(id string) { require.NoError(t, s.Reset(t.Context(), name, id)) })
		}
		const users = 20
		for i := range users {
			a.use(user(i), func(id string) {
				_, err := storecheck.Decide(t.Context(), s, ask(id, storage.Take, int64(i)))
				require.NoError(t, err)
			})
		}
		for i := range users {
			a.use(user(i), func(id string) {
				b.use(user((i+1)%users), func(other string) {
					r := ask(id, storage.Force, 1)
					r.Parts = append(r.Parts, storecheck.NewPart(other, rules, 1))
					_, err := storecheck.Decide(t.Context(), s, r)
					require.NoError(t, err)
				})
			})
			charge(user(i), 5)
			charge(user(i), -2)
		}
		for i := range users {
			if i%4 == 3 {
				reset(user(i))
			}
		}
		reset("settle") // a storage that keeps data in two places answers this only when both have all that came before
		for i := range users {
			want := int64(i + 5)
			if i%4 == 3 {
				want = 0
			}
			assert.Equal(t, want, spent(user(i)), "clocked %v: %s", clocked, user(i))
		}
		assert.Zero(t, spent(victim), "clocked %v: nobody asked for it", clocked)
	}
}

// reusedMemoryEarly has callers leave when their context ends, and reuse their memory while the storage may still be at
// work on their calls. What a call that left has taken is not known, but it may only be its own user's.
func reusedMemoryEarly(t *testing.T, s storage.Storage) {
	const callers, calls = 8, 60
	name, rules := newName(), []law.Rule{rule(t, "hour", law.Replenish, time.Hour, 1<<20, 0)}
	ask := func(id string, mode storage.Mode, cost int64) storecheck.Request {
		return storecheck.Request{Name: name, Mode: mode, Parts: []storecheck.Part{storecheck.NewPart(id, rules, cost)}}
	}
	tokens := func(n int64) []storage.Amount { return []storage.Amount{{N: n, In: time.Hour.Microseconds()}} }
	spent := func(identifier string) int64 {
		v, err := storecheck.Decide(t.Context(), s, ask(identifier, storage.Peek, 0))
		require.NoError(t, err)
		return 1<<20 - v.Count(0).Remaining
	}
	var took, left [callers]int64
	together(callers, func(i int) {
		m, other := newMemory(), newMemory()
		leave := func(n int, call func(context.Context) error) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(n%12)*50*time.Microsecond)
			defer cancel()
			switch err := call(ctx); {
			case err == nil:
				took[i]++
			case errors.Is(err, context.DeadlineExceeded):
				left[i]++
			default:
				assert.NoError(t, err)
			}
		}
		for n := range calls {
			m.use(user(i), func(id string) {
				leave(n, func(ctx context.Context) error {
					_, err := storecheck.Decide(ctx, s, ask(id, storage.Take, 1))
					return err
				})
			})
			m.use(user(i), func(id string) {
				other.use("others", func(others string) {
					leave(n, func(ctx context.Context) error {
						r := ask(id, storage.Take, 1)
						r.Parts = append(r.Parts, storecheck.NewPart(others, rules, 1))
						_, err := storecheck.Decide(ctx, s, r)
						return err
					})
				})
			})
			m.use(user(i), func(id string) {
				leave(n, func(ctx context.Context) error {
					return s.Charge(ctx, &storage.Charge{Name: name, Identifier: id, Rules: law.NewRuleSet(rules...), Amounts: tokens(1)})
				})
			})
			m.use("shared", func(id string) { // by two at a time
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(n%12)*50*time.Microsecond)
				defer cancel()
				_ = s.Charge(ctx, &storage.Charge{Name: name, Identifier: id, Rules: law.NewRuleSet(rules...), Amounts: tokens(-1)})
			})
			m.use("resets", func(id string) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(n%12)*50*time.Microsecond)
				defer cancel()
				_ = s.Reset(ctx, name, id)
			})
		}
	})
	require.NoError(t, s.Reset(t.Context(), name, "settle"))
	for i := range callers {
		n := spent(user(i))
		assert.GreaterOrEqual(t, n, took[i], "%s: something was taken from somebody else", user(i))
		assert.LessOrEqual(t, n, took[i]+left[i], "%s: something was taken for somebody else", user(i))
	}
	assert.Zero(t, spent(victim), "nobody asked for it")
}
