package runtime_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
	memstore "github.com/go-throttler/throttler/storage/runtime"
)

// Each way of calling sweeps. None of them, by the storage's own clock, may remove an identifier that is not full.
func TestNoCallRemovesAnIdentifierThatIsNotFull(t *testing.T) {
	t.Parallel()
	const live, calls = 500, 2000
	rules := []law.Rule{rule(t, time.Hour)}
	for name, call := range map[string]func(*testing.T, *throttler.Throttler, *memstore.Storage){
		"reset": func(t *testing.T, th *throttler.Throttler, _ *memstore.Storage) {
			require.NoError(t, th.Reset(t.Context(), "nobody"))
		},
		"reset of a wrong one": func(t *testing.T, th *throttler.Throttler, _ *memstore.Storage) {
			require.Error(t, th.Reset(t.Context(), ""))
		},
		"charge": func(t *testing.T, _ *throttler.Throttler, s *memstore.Storage) {
			require.NoError(t, s.Charge(t.Context(), &storage.Charge{Identifier: "other", Rules: law.NewRuleSet(rules...), Amounts: []storage.Amount{{N: -1, In: 1}}}))
		},
		"unknown": func(t *testing.T, th *throttler.Throttler, _ *memstore.Storage) {
			_, err := th.Consume("x", throttler.Using())
			require.Error(t, err)
		},
		"wrong cost": func(t *testing.T, th *throttler.Throttler, _ *memstore.Storage) {
			_, err := th.Consume("x", throttler.Cost(-1))
			require.Error(t, err)
		},
		"wrong part": func(t *testing.T, th *throttler.Throttler, _ *memstore.Storage) {
			_, err := th.ConsumeAll(t.Context(), throttler.For("x"), throttler.For("x"))
			require.Error(t, err)
		},
		"cancelled": func(t *testing.T, th *throttler.Throttler, _ *memstore.Storage) {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			_, err := th.ConsumeContext(ctx, "x")
			require.Error(t, err)
		},
		"peek": func(t *testing.T, th *throttler.Throttler, _ *memstore.Storage) {
			_, err := th.Peek(t.Context(), "x")
			require.NoError(t, err)
		},
		"denied": func(t *testing.T, th *throttler.Throttler, _ *memstore.Storage) {
			_, err := th.Consume("user-0")
			require.NoError(t, err)
		},
		"several": func(t *testing.T, th *throttler.Throttler, _ *memstore.Storage) {
			_, err := th.ConsumeAll(t.Context(), throttler.For("user-0"), throttler.For("user-1"))
			require.NoError(t, err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := memstore.New(nil)
			th, err := throttler.New(throttler.Config{Storage: s, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1)}})
			require.NoError(t, err)
			for i := range live {
				require.True(t, consume(t, th, fmt.Sprint("user-", i)))
			}
			for range calls {
				call(t, th, s)
			}
			assert.Equal(t, live, s.Len())
			for i := range live {
				require.False(t, consume(t, th, fmt.Sprint("user-", i)), "user-%d", i)
			}
		})
	}
}

func TestCloseChangesNothing(t *testing.T) {
	t.Parallel()
	s := memstore.New(nil)
	th, err := throttler.New(throttler.Config{Storage: s, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1)}})
	require.NoError(t, err)
	require.True(t, consume(t, th, "a"))
	require.NoError(t, s.Close(t.Context()))
	assert.False(t, consume(t, th, "a"))
}
