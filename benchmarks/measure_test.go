package benchmarks_test

import (
	"fmt"
	"sync/atomic"
	"testing"
)

// measure makes b.N decisions on so many identifiers in turn, from so many goroutines each time, after one
// on each identifier.
func measure(b *testing.B, goroutines []int, identifiers int, decide func(id string) error) {
	b.Helper()
	ids := make([]string, identifiers)
	for i := range ids {
		ids[i] = fmt.Sprintf("user:%d", i)
	}
	each(b, 256, identifiers, func(i int) error { return decide(ids[i]) })
	for _, n := range goroutines {
		b.Run(fmt.Sprintf("goroutines=%d", n), func(b *testing.B) {
			each(b, n, b.N, func(i int) error { return decide(ids[i%identifiers]) })
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "decisions/s")
		})
	}
}

// each calls do for 0 to n-1 from so many goroutines.
func each(b *testing.B, goroutines, n int, do func(i int) error) {
	b.Helper()
	var next atomic.Int64
	done := make(chan error, goroutines)
	for range goroutines {
		go func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					done <- nil
					return
				}
				if err := do(i); err != nil {
					done <- err
					return
				}
			}
		}()
	}
	for range goroutines {
		if err := <-done; err != nil {
			b.Fatal(err)
		}
	}
}
