package throttlerslog_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	memstore "github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/throttlerslog"
)

// logged returns a log without times, and a function that returns its lines.
func logged() (*slog.Logger, func() []string) {
	var b bytes.Buffer
	log := slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	return log, func() []string { return strings.Split(strings.TrimSpace(b.String()), "\n") }
}

func TestAStormOfErrorsIsOneLineASecondOfEachType(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log, lines := logged()
		th, err := throttler.New(throttler.Config{
			Name: "api", Storage: memstore.New(&memstore.Options{MaxIdentifiers: 1}), OnStorageError: throttler.Allow,
			Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1)}, Observe: throttlerslog.Observe(log),
		})
		require.NoError(t, err)
		_, _ = th.Consume("first")
		_, _ = th.Consume("first") // denied
		for range 20 {
			_, _ = th.Consume("second")
			_, _ = th.Wait(t.Context(), "")
			<-time.After(100 * time.Millisecond)
		}
		got := lines()
		require.Len(t, got, 4)
		assert.True(t, strings.HasPrefix(got[0], `level=ERROR msg="throttler: a call failed" name=api op=consume type=unavailable bypassed=true error=`), got[0])
		assert.True(t, strings.HasPrefix(got[1], `level=WARN msg="throttler: a call failed" name=api op=consume type=invalid bypassed=false error=`), got[1])
		for _, l := range got[2:] {
			assert.True(t, strings.HasSuffix(l, " left_out=9"), l)
		}
	})
}

func TestAClientThatLeavesIsNotLogged(t *testing.T) {
	t.Parallel()
	log, lines := logged()
	observe := throttlerslog.Observe(log)
	observe(t.Context(), &throttler.Event{Op: throttler.OpConsume, Err: context.Canceled})
	observe(t.Context(), &throttler.Event{Op: throttler.OpWait, Err: errors.New("told by its attempt")})
	assert.Equal(t, []string{""}, lines())
}
