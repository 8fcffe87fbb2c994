package watch_test

import (
	"testing"

	"github.com/go-throttler/throttler/internal/observers"
	"github.com/go-throttler/throttler/watch"
)

func BenchmarkObserve(b *testing.B) {
	observers.Compare(b, map[string]func() observers.Observe{"watch": func() observers.Observe { return watch.New(nil).Observe }})
}
