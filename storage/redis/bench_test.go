package redis_test

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// requests are n requests that differ in their identifiers, each of so many parts with buckets of the kinds.
func requests(t testing.TB, n, parts int, capacity int64, kinds ...storage.Kind) (all []storage.Request) {
	t.Helper()
	var rules []storage.Rule
	for i, k := range kinds {
		rules = append(rules, storecheck.Rule(t, fmt.Sprintf("bucket %d", i), k, time.Hour/time.Duration(i+1), capacity))
	}
	name := fmt.Sprint(parts, capacity, kinds)
	for i := range n {
		r := storage.Request{Name: "bench", Part: storage.NewPart(fmt.Sprint(name, i), rules, 1)}
		for j := 1; j < parts; j++ {
			r.More = append(r.More, storage.NewPart(fmt.Sprint(name, i, "/", j), rules, 1))
		}
		all = append(all, r)
	}
	return all
}

// BenchmarkScript measures what the server computes for a decision of a batch, by its own figures. The machine may do
// other things as well, so the least of many short rounds counts.
func BenchmarkScript(b *testing.B) {
	const plenty, batch = 1 << 30, 64
	for name, all := range map[string][]storage.Request{
		"replenish":   requests(b, batch, 1, plenty, storage.Replenish),
		"two":         requests(b, batch, 1, plenty, storage.Replenish, storage.Replenish),
		"alone":       requests(b, 1, 1, plenty, storage.Replenish, storage.Replenish),
		"four":        requests(b, batch, 1, plenty, storage.Replenish, storage.Replenish, storage.FixedWindow, storage.FixedWindow),
		"continuous":  requests(b, batch, 1, plenty, storage.Continuous),
		"mixed":       requests(b, batch, 1, plenty, storage.Replenish, storage.Continuous),
		"sliding":     requests(b, batch, 1, plenty, storage.SlidingWindow),
		"denied":      requests(b, batch, 1, 1, storage.Replenish, storage.Replenish),
		"two parts":   requests(b, batch, 2, plenty, storage.Replenish),
		"three parts": requests(b, batch, 3, plenty, storage.Replenish),
	} {
		b.Run(name, func(b *testing.B) { script(b, all) })
	}
}

func script(b *testing.B, all []storage.Request) {
	s := open(b, servers.RedisURL(b), redisstore.Options{})
	storecheck.Take(b, s, all[0], 1) // so that the server knows the script
	args, least := s.Batch(all), math.Inf(1)
	for b.Loop() {
		before := spentOnScripts(b, s.Client())
		for range 20 {
			require.NoError(b, s.Client().Do(b.Context(), args...).Err())
		}
		least = min(least, spentOnScripts(b, s.Client())-before)
	}
	b.ReportMetric(least/float64(20*len(all)), "server-µs/decision")
}

// spentOnScripts is how many microseconds the server has spent on them.
func spentOnScripts(b *testing.B, c goredis.UniversalClient) float64 {
	b.Helper()
	_, usec, found := strings.Cut(c.Info(b.Context(), "commandstats").Val(), "cmdstat_evalsha:calls=")
	require.True(b, found)
	_, usec, _ = strings.Cut(usec, "usec=")
	usec, _, _ = strings.Cut(usec, ",")
	n, err := strconv.ParseFloat(usec, 64)
	require.NoError(b, err)
	return n
}
