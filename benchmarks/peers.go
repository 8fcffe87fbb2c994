package main

import (
	"context"
	"hash/maphash"
	"net/http"
	"sync"
	"time"

	"github.com/failsafe-go/failsafe-go/ratelimiter"
	"github.com/go-chi/httprate"
	"github.com/sethvargo/go-limiter/memorystore"
	"github.com/throttled/throttled/v2"
	"github.com/throttled/throttled/v2/store/memstore"
	"github.com/ulule/limiter/v3"
	ululemem "github.com/ulule/limiter/v3/drivers/store/memory"
	"golang.org/x/time/rate"

	"github.com/go-throttler/throttler"
)

// inProcess are the contenders that decide in this process, each used as its README shows. A limiter that has no identifiers
// is kept in a map by identifier.
var inProcess = []contender{
	us("throttler", func() (throttler.Config, func(), error) { return throttler.Config{}, nothing, nil }),
	keyed("x/time/rate in a map", "golang.org/x/time", func(l limit) *rate.Limiter {
		return rate.NewLimiter(rate.Limit(float64(l.n)/l.period.Seconds()), int(l.n))
	}, (*rate.Limiter).Allow),
	keyed("failsafe-go in a map", "github.com/failsafe-go/failsafe-go", func(l limit) ratelimiter.RateLimiter[any] {
		return ratelimiter.NewBursty[any](uint(l.n), l.period)
	}, ratelimiter.RateLimiter[any].TryAcquirePermit),
	each("go-limiter, memory", "github.com/sethvargo/go-limiter", goLimiter),
	each("throttled, memory", "github.com/throttled/throttled/v2", throttledMemory),
	each("ulule/limiter, memory", "github.com/ulule/limiter/v3", ululeMemory),
	each("httprate", "github.com/go-chi/httprate", chiRate),
	each("counters by hand", "", counters),
	{name: "floor: time.Since", idle: true, open: clock},
}

// keyed returns a contender that is a map of limiters behind a mutex.
func keyed[T any](name, module string, one func(limit) T, allowed func(T) bool) contender {
	return contender{name: name, module: module, open: func(limits []limit) (allow, func(), error) {
		var mu sync.Mutex
		limiters := map[string][]T{}
		find := func(id string) []T {
			mu.Lock()
			defer mu.Unlock()
			all, ok := limiters[id]
			if !ok {
				all = make([]T, len(limits))
				for i, l := range limits {
					all[i] = one(l)
				}
				limiters[id] = all
			}
			return all
		}
		return func(id string) (bool, error) {
			for _, limiter := range find(id) {
				if !allowed(limiter) {
					return false, nil
				}
			}
			return true, nil
		}, nothing, nil
	}}
}

func goLimiter(l limit) (allow, func(), error) {
	store, err := memorystore.New(&memorystore.Config{Tokens: uint64(l.n), Interval: l.period})
	return func(id string) (bool, error) {
		_, _, _, ok, err := store.Take(context.Background(), id)
		return ok, err
	}, func() { _ = store.Close(context.Background()) }, err
}

// throttledMemory has no bound on its identifiers. With the 65,536 of the README it would forget most of a million.
func throttledMemory(l limit) (allow, func(), error) {
	store, err := memstore.NewCtx(0)
	if err != nil {
		return nil, nil, err
	}
	a, err := throttledOn(store, l)
	return a, nothing, err
}

func throttledOn(store throttled.GCRAStoreCtx, l limit) (allow, error) {
	limiter, err := throttled.NewGCRARateLimiterCtx(store, quota(l))
	return func(id string) (bool, error) {
		limited, _, err := limiter.RateLimitCtx(context.Background(), id, 1)
		return !limited, err
	}, err
}

func quota(l limit) throttled.RateQuota {
	return throttled.RateQuota{MaxRate: throttled.PerDuration(int(l.n), l.period), MaxBurst: int(l.n - 1)}
}

func ululeMemory(l limit) (allow, func(), error) {
	return ululeOn(ululemem.NewStore(), l), nothing, nil
}

func ululeOn(store limiter.Store, l limit) allow {
	instance := limiter.New(store, limiter.Rate{Period: l.period, Limit: l.n})
	return func(id string) (bool, error) {
		c, err := instance.Get(context.Background(), id)
		return !c.Reached, err
	}
}

// chiRate leaves out the header fields of an answer, as its README allows.
func chiRate(l limit) (allow, func(), error) {
	limiter := httprate.NewRateLimiter(int(l.n), l.period, httprate.WithResponseHeaders(httprate.ResponseHeaders{}))
	request, err := http.NewRequest(http.MethodGet, "/", nil)
	return func(id string) (bool, error) { return !limiter.OnLimit(nil, request, id), nil }, nothing, err
}

// counters are fixed windows in a map of 64 shards: what a programmer writes by hand if that is all that is needed.
func counters(l limit) (allow, func(), error) {
	type counter struct {
		window time.Duration
		n      int64
	}
	type shard struct {
		sync.Mutex
		counters map[string]*counter
		_        [48]byte // padding, since shards on one cache line would slow each other down
	}
	var shards [64]shard
	for i := range shards {
		shards[i].counters = map[string]*counter{}
	}
	seed, start := maphash.MakeSeed(), time.Now()
	return func(id string) (bool, error) {
		window := time.Since(start) / l.period
		s := &shards[maphash.String(seed, id)%uint64(len(shards))]
		s.Lock()
		defer s.Unlock()
		c, ok := s.counters[id]
		if !ok {
			c = new(counter)
			s.counters[id] = c
		}
		if c.window != window {
			*c = counter{window: window}
		}
		if c.n >= l.n {
			return false, nil
		}
		c.n++
		return true, nil
	}, nothing, nil
}

func clock([]limit) (allow, func(), error) {
	start := time.Now()
	return func(string) (bool, error) { return time.Since(start) > 0, nil }, nothing, nil
}
