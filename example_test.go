package throttler_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage/failover"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
	redisstore "github.com/go-throttler/throttler/storage/redis"
	"github.com/go-throttler/throttler/throttlerhttp"
)

func Example() {
	if err := sixCalls(); err != nil {
		fmt.Println(err)
	}
	// Output:
	// admitted
	// admitted
	// admitted
	// admitted
	// admitted
	// come back in 10s
}

func sixCalls() error {
	t, err := throttler.New(throttler.Config{}) // in process, one token a call
	if err != nil {
		return err
	}
	fivePer10s, hundredPerHour := throttler.NewBucket(10*time.Second, 5), throttler.NewBucket(time.Hour, 100)
	if err := t.AddBucket("user:42", fivePer10s, hundredPerHour); err != nil {
		return err
	}
	for range 6 {
		v, err := t.Consume("user:42") // takes from both, or from neither
		if err != nil {
			return err // the storage failed, or the call is wrong
		}
		if v.Allowed {
			fmt.Println("admitted")
		} else {
			fmt.Println("come back in", (v.RetryAfter + time.Second - 1).Truncate(time.Second)) // rounded up
		}
	}
	return nil
}

// Processes that open the same Redis spend from the same buckets.
func Example_severalProcesses() {
	if err := shared(); err != nil {
		fmt.Println(err)
	}
	// Output:
	// 100/1h
}

func shared() error {
	store, err := redisstore.Open("redis://localhost:6379", nil) // nothing is sent before the first call
	if err != nil {
		return err // the URL is wrong
	}
	defer func() { _ = store.Close(context.Background()) }()
	hundredPerHour := throttler.NewBucket(time.Hour, 100)
	t, err := throttler.New(throttler.Config{Storage: store, Buckets: []throttler.Bucket{hundredPerHour}})
	if err != nil {
		return err
	}
	for _, b := range t.Buckets("user:42") {
		fmt.Println(b.Name())
	}
	return nil
}

// The same in Postgres, which has to be there when the storage is made.
func Example_postgres() {
	_ = inPostgres
	// Output:
}

func inPostgres(ctx context.Context) error {
	pool, err := pgxpool.New(ctx, "postgres://localhost:5432/postgres") // of github.com/jackc/pgx/v5/pgxpool
	if err != nil {
		return err // the URL is wrong
	}
	defer pool.Close()
	store, err := pgstore.New(ctx, pool, nil) // makes its table, unless it is there
	if err != nil {
		return err // Postgres did not answer, or refused to make the table
	}
	defer func() { _ = store.Close(context.Background()) }()
	t, err := throttler.New(throttler.Config{Storage: store, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 100)}})
	if err != nil {
		return err
	}
	_, err = t.ConsumeContext(ctx, "user:42")
	return err
}

// Redis decides, and Postgres while Redis cannot.
func Example_failover() {
	_ = redisOrPostgres
	// Output:
}

func redisOrPostgres(redis *redisstore.Storage, postgres *pgstore.Storage) (*throttler.Throttler, error) {
	store, err := failover.New(redis, postgres, nil) // a *redisstore.Storage and a *pgstore.Storage, as above
	if err != nil {
		return nil, err
	}
	return throttler.New(throttler.Config{Storage: store})
}

// Around a mux a limit is for all requests, and Routes are the exceptions.
func Example_http() {
	t, _ := throttler.New(throttler.Config{})
	if err := serve(t, http.NewServeMux()); err != nil {
		fmt.Println(err)
	}
	// Output:
	// 404 404 404 404 404 429
}

func serve(t *throttler.Throttler, mux *http.ServeMux) error {
	limit, err := throttlerhttp.New(t, &throttlerhttp.Options{
		Buckets: []throttler.Bucket{throttler.NewBucket(10*time.Second, 5), throttler.NewBucket(time.Hour, 100)},
		Routes:  []throttlerhttp.Route{{Pattern: "GET /health", Free: true}},
	})
	if err != nil {
		return err // all faults of the options
	}
	handler := limit(mux) // each address has these limits
	for i := range 6 {
		if i > 0 {
			fmt.Print(" ")
		}
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
		fmt.Print(w.Code)
	}
	fmt.Println()
	return nil
}

// A test moves the time and does not sleep.
func Example_fakeClock() {
	mock := clock.NewMock()
	t, _ := throttler.New(throttler.Config{
		Clock:   mock,
		Buckets: []throttler.Bucket{throttler.NewBucket(10*time.Second, 1)},
	})
	for range 3 {
		v, _ := t.Consume("anybody")
		fmt.Println(v.Allowed, v.RetryAfter)
		mock.Add(5 * time.Second)
	}
	// Output:
	// true 0s
	// false 5s
	// true 0s
}

func ExampleVerdict_Levels() {
	t, _ := throttler.New(throttler.Config{Clock: clock.NewMock(), Buckets: []throttler.Bucket{
		throttler.NewBucket(10*time.Second, 5),
		throttler.NewBucket(time.Hour, 100).Continuous(),
	}})
	v, _ := t.Consume("user:42", throttler.Cost(5))
	for _, l := range v.Levels() {
		fmt.Printf("%s: %d of %d left, full in %v\n", l.Bucket, l.Remaining, l.Limit, l.ResetAfter)
	}
	// Output:
	// 5/10s: 0 of 5 left, full in 10s
	// 100/1h/continuous: 95 of 100 left, full in 3m0s
}

// Plans are options that are made once. An upgrade counts at once and keeps what was spent, because
// the buckets have the same name.
func ExampleUsing() {
	free := throttler.Using(throttler.NewBucket(time.Minute, 3).Named("requests"))
	premium := throttler.Using(throttler.NewBucket(time.Minute, 10).Named("requests"))
	t, _ := throttler.New(throttler.Config{Clock: clock.NewMock()})
	for _, plan := range []throttler.Option{free, free, free, free, premium} {
		v, _ := t.Consume("user:42", plan)
		fmt.Println(v.Allowed, v.Levels()[0].Remaining)
	}
	// Output:
	// true 2
	// true 1
	// true 0
	// false 0
	// true 6
}

// A call that is paid for when its cost is known: reserve, then give back what was not used.
func ExampleThrottler_Refund() {
	ctx := context.Background()
	t, _ := throttler.New(throttler.Config{Clock: clock.NewMock(), Buckets: []throttler.Bucket{
		throttler.NewBucket(time.Minute, 60).Named("requests"),
		throttler.NewBucket(time.Minute, 10_000).Continuous().Named("tokens"),
	}})
	v, _ := t.Consume("user:42", throttler.CostOf("tokens", 1000))
	_ = t.Refund(ctx, v, throttler.CostOf("tokens", 400))
	v, _ = t.Peek(ctx, "user:42", throttler.Cost(0))
	for _, l := range v.Levels() {
		fmt.Println(l.Bucket, l.Remaining)
	}
	// Output:
	// requests 59
	// tokens 9400
}

func ExampleThrottler_ConsumeAll() {
	ctx := context.Background()
	t, _ := throttler.New(throttler.Config{Clock: clock.NewMock()})
	_ = t.AddBucket("user:42", throttler.NewBucket(time.Minute, 10))
	_ = t.AddBucket("org:7", throttler.NewBucket(time.Minute, 1))
	for range 2 {
		v, _ := t.ConsumeAll(ctx, throttler.For("user:42"), throttler.For("org:7"))
		fmt.Println(v.Allowed)
	}
	v, _ := t.Peek(ctx, "user:42", throttler.Cost(0))
	fmt.Println("user:42 has", v.Levels()[0].Remaining)
	// Output:
	// true
	// false
	// user:42 has 9
}

// Wait paces callers: a leaky bucket.
func ExampleThrottler_Wait() {
	t, _ := throttler.New(throttler.Config{Buckets: []throttler.Bucket{
		throttler.NewBucket(time.Second, 100).Continuous().Burst(1),
	}})
	start := time.Now()
	for range 3 {
		_, _ = t.Wait(context.Background(), "printer")
	}
	fmt.Println("at least 20 ms passed:", time.Since(start) >= 20*time.Millisecond)
	// Output:
	// at least 20 ms passed: true
}
