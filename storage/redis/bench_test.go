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

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// requests returns n requests that differ only in their identifiers. Each has the given number of parts, with one
// bucket of each kind.
func requests(t testing.TB, n, parts int, capacity int64, kinds ...law.Kind) (all []storecheck.Request) {
	t.Helper()
	var rules []law.Rule
	for i, k := range kinds {
		rules = append(rules, storecheck.Rule(t, fmt.Sprintf("bucket %d", i), k, time.Hour/time.Duration(i+1), capacity))
	}
	name := fmt.Sprint(parts, capacity, kinds)
	for i := range n {
		r := storecheck.Request{Name: "bench", Parts: []storecheck.Part{storecheck.NewPart(fmt.Sprint(name, i), rules, 1)}}
		for j := 1; j < parts; j++ {
			r.Parts = append(r.Parts, storecheck.NewPart(fmt.Sprint(name, i, "/", j), rules, 1))
		}
		all = append(all, r)
	}
	return all
}

// BenchmarkScript measures the server's time for one decision of a batch, by the server's own figures. Other programs
// may use the machine too, so the best of many short rounds counts.
func BenchmarkScript(b *testing.B) {
	const plenty, batch = 1 << 30, 64
	for name, all := range map[string][]storecheck.Request{
		"replenish":   requests(b, batch, 1, plenty, law.Replenish),
		"two":         requests(b, batch, 1, plenty, law.Replenish, law.Replenish),
		"alone":       requests(b, 1, 1, plenty, law.Replenish, law.Replenish),
		"four":        requests(b, batch, 1, plenty, law.Replenish, law.Replenish, law.FixedWindow, law.FixedWindow),
		"continuous":  requests(b, batch, 1, plenty, law.Continuous),
		"mixed":       requests(b, batch, 1, plenty, law.Replenish, law.Continuous),
		"sliding":     requests(b, batch, 1, plenty, law.SlidingWindow),
		"denied":      requests(b, batch, 1, 1, law.Replenish, law.Replenish),
		"two parts":   requests(b, batch, 2, plenty, law.Replenish),
		"three parts": requests(b, batch, 3, plenty, law.Replenish),
	} {
		b.Run(name, func(b *testing.B) { script(b, all) })
	}
}

func script(b *testing.B, all []storecheck.Request) {
	s := open(b, servers.RedisURL(b), redisstore.Options{})
	storecheck.Take(b, s, all[0], 1) // so that the server knows the script
	var asked []*storage.Request
	for i := range all {
		asked = append(asked, all[i].Of())
	}
	args, least := s.Batch(asked), math.Inf(1)
	for b.Loop() {
		before := spentOnScripts(b, s.Client())
		for range 20 {
			require.NoError(b, s.Client().Do(b.Context(), args...).Err())
		}
		least = min(least, spentOnScripts(b, s.Client())-before)
	}
	b.ReportMetric(least/float64(20*len(all)), "server-µs/decision")
}

// spentOnScripts returns how many microseconds the server has spent on scripts that were called by their hash.
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
