package main

import (
	"context"
	"fmt"
	"time"

	"github.com/go-redis/redis_rate/v10"
	goredis "github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"
	goredisstore "github.com/throttled/throttled/v2/store/goredisstore.v9"
	"github.com/ulule/limiter/v3"
	ululeredis "github.com/ulule/limiter/v3/drivers/store/redis"

	"github.com/go-throttler/throttler"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// onRedisAt returns the contenders that decide in a Redis, each with a client of its own. A floor calls a script that does
// nothing.
func onRedisAt(url string) []contender {
	with := func(open func(*goredis.Client, limit) (allow, error)) func(limit) (allow, func(), error) {
		return func(l limit) (allow, func(), error) {
			client, err := redisClient(url)
			if err != nil {
				return nil, nil, err
			}
			a, err := open(client, l)
			return a, func() { _ = client.Close() }, err
		}
	}
	floor := func(name, module string, open func(limit) (allow, func(), error)) contender {
		return contender{name: name, module: module, idle: true, open: func(l []limit) (allow, func(), error) { return open(l[0]) }}
	}
	return []contender{
		us("throttler", throttlerOnRedis(url)),
		each("redis_rate", "github.com/go-redis/redis_rate/v10", with(redisRate)),
		each("throttled, go-redis", "github.com/throttled/throttled/v2", with(throttledRedis)),
		each("ulule/limiter, redis", "github.com/ulule/limiter/v3", with(ululeRedis)),
		floor("floor: EVALSHA", "github.com/redis/go-redis/v9", with(evalsha)),
		floor("floor: AutoPipeline", "", with(autoPipeline)),
		floor("floor: rueidis", "github.com/redis/rueidis", func(limit) (allow, func(), error) { return rueidisAt(url) }),
	}
}

func throttlerOnRedis(url string) func() (throttler.Config, func(), error) {
	return func() (throttler.Config, func(), error) {
		store, err := redisstore.Open(url, nil)
		if err != nil {
			return throttler.Config{}, nil, err
		}
		return throttler.Config{Storage: store}, func() { _ = store.Close(context.Background()) }, nil
	}
}

// prefix keeps the keys of a peer's limits apart.
func prefix(l limit) string { return l.period.String() + ":" }

func redisRate(client *goredis.Client, l limit) (allow, error) {
	limiter, short := redis_rate.NewLimiter(client), prefix(l)
	rate := redis_rate.Limit{Rate: int(l.n), Burst: int(l.n), Period: l.period}
	return func(id string) (bool, error) {
		r, err := limiter.Allow(context.Background(), short+id, rate)
		return err == nil && r.Allowed > 0, err
	}, nil
}

func throttledRedis(client *goredis.Client, l limit) (allow, error) {
	store, err := goredisstore.NewCtx(client, "throttled:"+prefix(l))
	if err != nil {
		return nil, err
	}
	return throttledOn(store, l)
}

func ululeRedis(client *goredis.Client, l limit) (allow, error) {
	store, err := ululeredis.NewStoreWithOptions(client, limiter.StoreOptions{Prefix: "ulule:" + prefix(l)})
	if err != nil {
		return nil, err
	}
	return ululeOn(store, l), nil
}

const empty = "return 1"

func evalsha(client *goredis.Client, _ limit) (allow, error) {
	sha, err := client.ScriptLoad(context.Background(), empty).Result()
	return func(id string) (bool, error) {
		err := client.EvalSha(context.Background(), sha, []string{id}, "1").Err()
		return err == nil, err
	}, err
}

func autoPipeline(client *goredis.Client, _ limit) (allow, error) {
	sha, err := client.ScriptLoad(context.Background(), empty).Result()
	if err != nil {
		return nil, err
	}
	pipe, err := client.AutoPipeline()
	return func(id string) (bool, error) {
		err := pipe.EvalSha(context.Background(), sha, []string{id}, "1").Err()
		return err == nil, err
	}, err
}

// rueidisAt is the floor of rueidis, which pipelines concurrent calls on shared connections by itself.
func rueidisAt(url string) (allow, func(), error) {
	o, err := rueidis.ParseURL(url)
	if err != nil {
		return nil, nil, err
	}
	client, err := rueidis.NewClient(o)
	if err != nil {
		return nil, nil, err
	}
	script := rueidis.NewLuaScript(empty)
	return func(id string) (bool, error) {
		err := script.Exec(context.Background(), client, []string{id}, []string{"1"}).Error()
		return err == nil, err
	}, client.Close, nil
}

// crowd is the conditions of a case with a server.
type crowd struct{ identifiers, goroutines int }

func (c crowd) String() string {
	return fmt.Sprintf("goroutines=%d/identifiers=%d", c.goroutines, c.identifiers)
}

func crowds(many int) (all []crowd) {
	for _, identifiers := range []int{many, 1} {
		for _, goroutines := range []int{1, 16, 64, 256} {
			all = append(all, crowd{identifiers, goroutines})
		}
	}
	return all
}

// wanted returns the cases that the flag -only selects.
func (b *bench) wanted(name string, all []crowd) (out []crowd) {
	for _, c := range all {
		if b.wants(name + "/" + c.String()) {
			out = append(out, c)
		}
	}
	return out
}

func (b *bench) onRedis(ctx context.Context) error {
	cases := b.wanted("redis", crowds(1000))
	if len(cases) == 0 {
		return nil
	}
	s, err := startRedis(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	all := onRedisAt(s.url)
	results, err := b.onServer(ctx, "redis", all, cases, plenty(2, 1e7), b.d, s.used, nothing)
	if err != nil {
		return err
	}
	checks, err := checkAll(ctx, all, 10)
	if err != nil {
		return err
	}
	b.report.server("Redis", s.version, results, checks)
	return nil
}

// result has the rows of a case with a server.
type result struct {
	crowd crowd
	rows  []row
}

// onServer opens all contenders once and plays all cases. Before anything counts each contender makes a decision on every
// identifier. settle is called before each turn.
func (b *bench) onServer(ctx context.Context, name string, all []contender, cases []crowd, limits []limit,
	d time.Duration, used func() time.Duration, settle func()) (out []result, err error) {
	entrants, done, err := open(all, limits)
	if err != nil {
		return nil, err
	}
	defer done.close()
	known := 0
	for _, c := range cases {
		if c.identifiers > known {
			known = c.identifiers
			if err := warm(ctx, entrants, known); err != nil {
				return nil, err
			}
		}
		ids := uniform(c.identifiers)
		turns, err := rounds(ctx, b, name+"/"+c.String(), len(all), func(i int) (turn, error) {
			settle()
			t, err := onServer(c.goroutines, d, ids, entrants[i].allow, used)
			if err != nil {
				err = fmt.Errorf("%s: %w", all[i].name, err)
			}
			return t, err
		})
		if err != nil {
			return nil, err
		}
		out = append(out, result{c, rowsOf(all, turns)})
	}
	return out, nil
}

func warm(ctx context.Context, entrants []entrant, identifiers int) error {
	for _, e := range entrants {
		if e.idle {
			continue
		}
		if err := inParallel(ctx, identifiers, e.allow); err != nil {
			return fmt.Errorf("%s: %w", e.name, err)
		}
	}
	return nil
}
