package watch_test

import (
	"context"
	"testing"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/observers"
	"github.com/go-throttler/throttler/watch"
)

func BenchmarkObserve(b *testing.B) {
	observers.Compare(b, map[string]func(context.Context, *throttler.Event){"watch": watch.New(nil).Observe})
}
