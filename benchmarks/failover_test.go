package benchmarks_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage/failover"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// BenchmarkFailover makes decisions on two limits from 64 goroutines, by Redis alone and by failover over the same
// server while nothing fails, in turns of about a second. The ratio is the median of those of the turns.
func BenchmarkFailover(b *testing.B) {
	for _, identifiers := range []int{1000, 1} {
		b.Run(fmt.Sprintf("identifiers=%d", identifiers), func(b *testing.B) {
			o, err := goredis.ParseURL(url(b, redis))
			if err != nil {
				b.Fatal(err)
			}
			o.PoolSize = 256
			client := goredis.NewClient(o)
			defer func() { _ = client.Close() }()
			alone, both := ours(b, client), withFailover(b, client)
			ids := make([]string, identifiers)
			for i := range ids {
				ids[i] = fmt.Sprintf("user:%d", i)
			}
			var rates [2][]float64
			turn := func(i int, decide func(string) error) {
				const n = 100_000
				began := time.Now()
				each(b, 64, n, func(i int) error { return decide(ids[i%identifiers]) })
				rates[i] = append(rates[i], n/time.Since(began).Seconds())
			}
			turn(0, alone)
			turn(1, both)
			rates = [2][]float64{}
			for b.Loop() {
				turn(0, alone)
				turn(1, both)
			}
			ratios := make([]float64, len(rates[0]))
			for i := range ratios {
				ratios[i] = rates[1][i] / rates[0][i]
			}
			b.ReportMetric(median(rates[0]), "redis/s")
			b.ReportMetric(median(rates[1]), "failover/s")
			b.ReportMetric(median(ratios), "ratio")
		})
	}
}

func withFailover(b *testing.B, client *goredis.Client) func(string) error {
	pool, err := pgxpool.New(b.Context(), url(b, postgres))
	if err != nil {
		b.Fatal(err)
	}
	ledger, err := pgstore.New(b.Context(), pool, &pgstore.Options{Name: "ledger"})
	if err != nil {
		b.Fatal(err)
	}
	primary := redisstore.New(client, &redisstore.Options{Prefix: "failover:"})
	store, err := failover.New(primary, ledger, nil)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if st := store.State(); st.Transitions > 0 || st.FlushError != nil {
			b.Errorf("something failed: %+v", st)
		}
		_ = store.Close(context.WithoutCancel(b.Context()))
		_ = primary.Close()
		_ = ledger.Close()
		pool.Close()
	})
	return limited(b, throttler.Config{Storage: store})
}

func median(all []float64) float64 {
	all = slices.Sorted(slices.Values(all))
	return all[len(all)/2]
}
