package throttler_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
)

func TestCallsThatAskNothingForgetNothing(t *testing.T) {
	t.Parallel()
	for name, call := range map[string]func(*throttler.Throttler) error{
		"Reset of another": func(l *throttler.Throttler) error { return l.Reset(t.Context(), "other") },
		"a bucket it has not": func(l *throttler.Throttler) error {
			_, err := l.Consume("other", throttler.CostOf("none", 1))
			return err
		},
		"nobody": func(l *throttler.Throttler) error { _, err := l.ConsumeAll(t.Context()); return err },
	} {
		l, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 4)}})
		require.NoError(t, err)
		_, err = l.Consume("user:42", throttler.Cost(2))
		require.NoError(t, err)
		for range 200 { // about every eighth sweeps
			_ = call(l)
		}
		v, err := l.Peek(t.Context(), "user:42", throttler.Cost(0))
		require.NoError(t, err)
		assert.Equal(t, int64(2), v.Levels()[0].Remaining, name)
	}
}
