package load_test

import (
	"math"
	"runtime"
	"sync"
	"testing"
)

// busy lets many more goroutines than there are processors compute for a while.
func busy(t *testing.T, goroutines int) {
	t.Helper()
	var running sync.WaitGroup
	for range goroutines {
		running.Go(func() {
			for range 5 {
				burn(200_000)
				runtime.Gosched()
			}
		})
	}
	running.Wait()
}

// burn keeps a processor busy.
func burn(rounds int) {
	x := 1.0
	for range rounds {
		x = math.Sqrt(x + 1)
	}
	if x < 0 {
		panic("never")
	}
}
