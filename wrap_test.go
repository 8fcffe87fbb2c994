package throttler_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
)

func ExampleWrap() {
	t, _ := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1)}})
	greet := throttler.Wrap(t, func(name string) string { return "user:" + name }, func(_ context.Context, name string) (string, error) {
		return "Hello " + name, nil
	})
	fmt.Println(greet(context.Background(), "Ann"))
	fmt.Println(greet(context.Background(), "Bob"))
	_, err := greet(context.Background(), "Ann")
	var limited *throttler.LimitedError
	if errors.As(err, &limited) {
		fmt.Println(limited.Verdict.Levels()[0].Identifier, "has to wait", limited.Verdict.RetryAfter.Round(time.Minute))
	}
	// Output:
	// Hello Ann <nil>
	// Hello Bob <nil>
	// user:Ann has to wait 1h0m0s
}

func TestAWrappedFunctionIsNotCalledWhenTheCallIsRefusedOrFails(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 3)}})
	require.NoError(t, err)
	calls, fault := 0, errors.New("of the function")
	wrapped := throttler.Wrap(limiter, func(id string) string { return id }, func(context.Context, string) (int, error) {
		calls++
		return calls, fault
	}, throttler.Cost(2))
	n, err := wrapped(t.Context(), "a")
	assert.Equal(t, 1, n)
	assert.ErrorIs(t, err, fault)
	n, err = wrapped(t.Context(), "a")
	assert.Zero(t, n)
	assert.ErrorIs(t, err, throttler.ErrLimited)
	_, err = wrapped(t.Context(), "")
	assert.ErrorIs(t, err, throttler.ErrInvalidIdentifier)
	done, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = wrapped(done, "b")
	assert.ErrorIs(t, err, context.Canceled)
	assert.Equal(t, 1, calls)
}
