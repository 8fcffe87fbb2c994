package failover_test

import (
	"context"
	"fmt"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/failover"
)

// A server that uses the memory of one request for the next one passes on strings whose content changes afterwards.
func TestPostgresIsChargedForEachUserThoughTheirIdentifiersShareMemory(t *testing.T) {
	t.Parallel()
	r, p := stores(t)
	s, err := failover.New(r, p, &failover.Options{PrimaryTimeout: storecheck.Patient, LedgerTimeout: storecheck.Patient})
	require.NoError(t, err)

	const users, victim = 100, "victim"
	request := func(id string) storecheck.Request { return storecheck.Hourly(t, id, 1000) }
	memory := []byte(victim)
	ask := func(i int, call func(id string)) {
		copy(memory, fmt.Sprintf("user%02d", i))
		call(unsafe.String(&memory[0], len(memory)))
		copy(memory, victim)
	}
	for range 3 {
		for i := range users {
			ask(i, func(id string) {
				q := request(id)
				q.Parts = []storecheck.Part{storecheck.NewPart(id, q.Parts[0].Rules.Rules, int64(i+1))}
				v, err := storecheck.Decide(t.Context(), s, q)
				require.NoError(t, err)
				require.True(t, v.Allowed)
			})
		}
	}
	for i := range users {
		ask(i, func(id string) {
			c := storage.Charge{Identifier: id, Rules: request(id).Parts[0].Rules, Amounts: []storage.Amount{{N: int64(-i % 3), In: time.Hour.Microseconds()}}}
			require.NoError(t, s.Charge(t.Context(), &c))
		})
	}
	for i := 0; i < users; i += 10 {
		ask(i, func(id string) { require.NoError(t, s.Reset(t.Context(), "", id)) })
	}
	storecheck.Until(t, "nothing is pending", func() bool { return s.State().Pending == 0 })
	ctx, cancel := context.WithTimeout(t.Context(), storecheck.Patient)
	defer cancel()
	began := time.Now()
	require.NoError(t, s.Close(ctx))
	assert.Less(t, time.Since(began), 2*time.Second)
	for i := range users {
		want := int64(3*(i+1) - i%3)
		if i%10 == 0 {
			want = 0
		}
		id := fmt.Sprintf("user%02d", i)
		assert.Equal(t, want, storecheck.Spent(t, p, request(id)), "%s in Postgres", id)
		assert.Equal(t, want, storecheck.Spent(t, r, request(id)), "%s in Redis", id)
	}
	assert.Zero(t, storecheck.Spent(t, p, request(victim)))
	assert.Zero(t, storecheck.Spent(t, r, request(victim)))
	assert.Zero(t, s.State().Forgotten)
}
