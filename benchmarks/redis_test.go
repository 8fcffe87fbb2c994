// Package benchmarks_test puts this module beside its peers, in one run on one machine.
package benchmarks_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/go-redis/redis_rate/v10"
	goredis "github.com/redis/go-redis/v9"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/servers"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// redis and postgres are started when a benchmark needs them.
var (
	redis    = sync.OnceValues(func() (*servers.Server, error) { return servers.StartRedis() })
	postgres = sync.OnceValues(func() (*servers.Server, error) { return servers.StartPostgres() })
)

// url starts a server, or uses the one that was started.
func url(b *testing.B, start func() (*servers.Server, error)) string {
	b.Helper()
	s, err := start()
	if err != nil {
		b.Fatal(err)
	}
	return s.URL()
}

// BenchmarkRedis makes decisions on two limits, for 1,000 identifiers in turn, from 1, 64 and 256
// goroutines. A floor is what a script costs that decides nothing.
func BenchmarkRedis(b *testing.B) {
	for _, c := range []struct {
		name string
		open func(*testing.B, *goredis.Client) func(id string) error
	}{
		{"throttler", ours},
		{"redis_rate", redisRate},
		{"floor-EVALSHA", evalsha},
		{"floor-AutoPipeline", autoPipeline},
	} {
		b.Run(c.name, func(b *testing.B) {
			o, err := goredis.ParseURL(url(b, redis))
			if err != nil {
				b.Fatal(err)
			}
			o.PoolSize = 256
			client := goredis.NewClient(o)
			defer func() { _ = client.Close() }()
			measure(b, []int{1, 64, 256}, 1000, c.open(b, client))
		})
	}
}

func ours(b *testing.B, client *goredis.Client) func(string) error {
	store := redisstore.New(client, nil)
	b.Cleanup(func() { _ = store.Close() })
	return limited(b, throttler.Config{Storage: store})
}

// limited consumes from two buckets that admit all that a benchmark asks for.
func limited(b *testing.B, c throttler.Config) func(string) error {
	c.Buckets = []throttler.Bucket{throttler.NewBucket(10*time.Second, 100_000_000), throttler.NewBucket(time.Hour, 100_000_000)}
	t, err := throttler.New(c)
	if err != nil {
		b.Fatal(err)
	}
	return func(id string) error {
		v, err := t.Consume(id)
		if err == nil && !v.Allowed {
			err = fmt.Errorf("%s was refused", id)
		}
		return err
	}
}

func redisRate(_ *testing.B, client *goredis.Client) func(string) error {
	limiter := redis_rate.NewLimiter(client)
	short := redis_rate.Limit{Rate: 1_000_000, Burst: 1_000_000, Period: 10 * time.Second}
	long := redis_rate.Limit{Rate: 100_000_000, Burst: 100_000_000, Period: time.Hour}
	return func(id string) error {
		ctx := context.Background()
		for name, limit := range map[string]redis_rate.Limit{"short:": short, "long:": long} {
			r, err := limiter.Allow(ctx, name+id, limit)
			if err != nil {
				return err
			}
			if r.Allowed == 0 {
				return fmt.Errorf("%s was refused", id)
			}
		}
		return nil
	}
}

const empty = "return 1"

func evalsha(b *testing.B, client *goredis.Client) func(string) error {
	sha, err := client.ScriptLoad(context.Background(), empty).Result()
	if err != nil {
		b.Fatal(err)
	}
	return func(id string) error {
		return client.EvalSha(context.Background(), sha, []string{id}, "1").Err()
	}
}

func autoPipeline(b *testing.B, client *goredis.Client) func(string) error {
	sha, err := client.ScriptLoad(context.Background(), empty).Result()
	if err != nil {
		b.Fatal(err)
	}
	pipe, err := client.AutoPipeline()
	if err != nil {
		b.Fatal(err)
	}
	return func(id string) error {
		return pipe.EvalSha(context.Background(), sha, []string{id}, "1").Err()
	}
}
