package lease_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/runtime"
)

var plenty = []throttler.Bucket{throttler.NewBucket(10*time.Second, 1<<40), throttler.NewBucket(time.Hour, 1<<40)}

// inProcess returns the storage in the process, and leases from such a storage, for comparison.
func inProcess(tb testing.TB) map[string]storage.Storage {
	return map[string]storage.Storage{"runtime": runtime.New(nil), "lease": over(tb, runtime.New(nil), nil)}
}

// BenchmarkHotKey measures a decision through a Throttler, as a caller sees it.
func BenchmarkHotKey(b *testing.B) {
	for name, s := range inProcess(b) {
		b.Run(name, func(b *testing.B) {
			t, err := throttler.New(throttler.Config{Storage: s, Buckets: plenty})
			require.NoError(b, err)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := t.Consume("user:42"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkDecide measures a decision of the storage alone.
func BenchmarkDecide(b *testing.B) {
	for name, s := range inProcess(b) {
		b.Run(name, func(b *testing.B) {
			r := storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart("user:42", hourly(b), 1)}}
			asked, a := r.Of(), &storage.Answer{Counts: make([]storage.Count, 2)}
			b.ReportAllocs()
			for b.Loop() {
				if err := s.Decide(context.Background(), asked, a); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func hourly(tb testing.TB) []law.Rule {
	return []law.Rule{storecheck.Rule(tb, "a", law.Replenish, 10*time.Second, 1<<40), storecheck.Rule(tb, "b", law.Replenish, time.Hour, 1<<40)}
}
