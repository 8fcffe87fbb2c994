// Workers shows five processes that call somebody else's API. They share one Redis, and together they keep to 2 calls a
// second and 100 a minute. No call is denied: each waits for its turn, and all workers make about the same number of calls.
//
//	go run ./examples/workers                       # takes 15 seconds; starts a redis-server and the API itself
//	go run ./examples/workers -for 1m -workers 3 -rate 10
//
// It prints how many calls each worker sent while all of them were running, and the most calls that the API got in any
// second and in any minute. The exit status is 1 if that is more than the limits allow.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/servers"
	redisstore "github.com/go-throttler/throttler/storage/redis"
	"github.com/go-throttler/throttler/throttlerhttp"
)

func main() {
	var err error
	if len(os.Args) == 6 && os.Args[1] == "worker" {
		err = work(os.Args[2], os.Args[3], os.Args[4], os.Args[5])
	} else {
		_, err = run(os.Args[1:], os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "workers:", err)
		os.Exit(1)
	}
}

// work is the main function of a worker. It calls the API as often as the limit allows, until the duration is over.
func work(redis, api, duration, perSecond string) error {
	d, err1 := time.ParseDuration(duration)
	rate, err2 := strconv.ParseInt(perSecond, 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	store, err := redisstore.Open(redis, &redisstore.Options{Timeout: 5 * time.Second}) // a worker may wait for Redis, too
	if err != nil {
		return err
	}
	defer func() { _ = store.Close(context.Background()) }()
	limit, err := throttler.New(throttler.Config{Storage: store, Buckets: []throttler.Bucket{
		throttler.NewBucket(time.Second, rate).Continuous().Burst(1),
		throttler.NewBucket(time.Minute, 50*rate).Continuous().Burst(1),
	}})
	if err != nil {
		return err
	}
	client := &http.Client{Transport: throttlerhttp.NewTransport(nil, &throttlerhttp.TransportOptions{Limit: limit})}
	for {
		if err := call(ctx, client, api+"/"+strconv.Itoa(os.Getpid())); ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func call(ctx context.Context, client *http.Client, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	return response.Body.Close()
}

// run starts the servers and the workers, and prints which calls the API got. It returns how many calls each worker sent.
func run(args []string, out io.Writer) (sent []int, err error) {
	flags := flag.NewFlagSet("workers", flag.ExitOnError)
	workers := flags.Int("workers", 5, "start so many processes")
	d := flags.Duration("for", 15*time.Second, "end after this `time`")
	rate := flags.Int("rate", 2, "keep to so many calls a second, and 50 times as many a minute")
	_ = flags.Parse(args)
	if *workers < 1 || *workers > 1000 {
		return nil, fmt.Errorf("-workers is %d, must be from 1 to 1000", *workers)
	}
	redis, err := servers.StartRedis()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, redis.Close()) }()
	var calls log
	api := httptest.NewServer(&calls)
	defer api.Close()
	if err := start(*workers, redis.URL(), api.URL, d.String(), strconv.Itoa(*rate)); err != nil {
		return nil, err
	}
	return calls.tell(out, *rate)
}

// start runs copies of this program as workers, and waits until all have ended.
func start(workers int, args ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	failed := make([]error, workers)
	var wait sync.WaitGroup
	for i := range workers {
		wait.Go(func() {
			c := exec.Command(self, append([]string{"worker"}, args...)...)
			c.Stderr = os.Stderr
			failed[i] = c.Run()
		})
	}
	wait.Wait()
	return errors.Join(failed...)
}

// log is the API. It records when each call arrived and which worker sent it.
type log struct {
	mu sync.Mutex
	at []time.Time
	by []string
}

func (l *log) ServeHTTP(_ http.ResponseWriter, r *http.Request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.at, l.by = append(l.at, time.Now()), append(l.by, r.URL.Path)
}

// tell prints a summary of the calls. It returns an error if they exceed the limits.
func (l *log) tell(out io.Writer, rate int) (sent []int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	sent, second, minute := l.shares(), l.most(time.Second), l.most(time.Minute)
	_, _ = fmt.Fprintf(out, "%d calls, by the workers: %v; at most %d in a second and %d in a minute\n", len(l.at), sent, second, minute)
	if second > 1+rate+rate/10 || minute > 1+50*rate { // burst, refill, and room for calls that arrived late
		return sent, fmt.Errorf("this is more than %d a second and %d a minute", rate, 50*rate)
	}
	return sent, nil
}

// shares returns how many calls each worker sent while all of them were running: from the first call of the last worker to
// begin until the last call of the first to end.
func (l *log) shares() (sent []int) {
	first, last := map[string]int{}, map[string]int{}
	for i, who := range l.by {
		if _, begun := first[who]; !begun {
			first[who] = i
		}
		last[who] = i
	}
	from, to := 0, len(l.by)-1
	for who := range first {
		from, to = max(from, first[who]), min(to, last[who])
	}
	count := map[string]int{}
	for i := from; i <= to; i++ {
		count[l.by[i]]++
	}
	return slices.Sorted(maps.Values(count))
}

// most returns the largest number of calls in any window of this length.
func (l *log) most(window time.Duration) (most int) {
	from := 0
	for i := range l.at {
		for l.at[i].Sub(l.at[from]) >= window {
			from++
		}
		most = max(most, i-from+1)
	}
	return most
}
