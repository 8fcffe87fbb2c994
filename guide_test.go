package throttler_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	memstore "github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// The code of docs/guide.md in its order, followed by tests of what its sentences say.

// guided runs the code of an example on a throttler whose clock stands still, and prints the error if there is one.
func guided(c throttler.Config, code func(context.Context, *throttler.Throttler, *clock.Mock) error) {
	mock := clock.NewMock()
	c.Clock = mock
	t, err := throttler.New(c)
	if err == nil {
		err = code(context.Background(), t, mock)
	}
	if err != nil {
		fmt.Println(err)
	}
}

// ask sends a request such as "GET /path".
func ask(h http.Handler, what string) *httptest.ResponseRecorder {
	method, path, _ := strings.Cut(what, " ")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
	return w
}

// statuses prints the statuses of the answers to n requests.
func statuses(h http.Handler, n int, what string) {
	all := make([]int, n)
	for i := range all {
		all[i] = ask(h, what).Code
	}
	fmt.Println(all)
}

func Example_guideBucket() {
	guided(throttler.Config{}, func(context.Context, *throttler.Throttler, *clock.Mock) error {
		t, err := throttler.New(throttler.Config{
			Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 3)}, // 3 a minute
		})
		if err != nil {
			return err // all faults of the configuration
		}
		for range 4 {
			v, err := t.Consume("user:42")
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
	})
	// Output:
	// admitted
	// admitted
	// admitted
	// come back in 1m0s
}

func Example_guideSeveralBuckets() {
	guided(throttler.Config{}, func(_ context.Context, t *throttler.Throttler, mock *clock.Mock) error {
		fivePer10s, eightPerHour := throttler.NewBucket(10*time.Second, 5), throttler.NewBucket(time.Hour, 8)
		if err := t.AddBucket("user:42", fivePer10s, eightPerHour); err != nil {
			return err
		}
		for i := range 8 {
			if i == 5 {
				mock.Add(10 * time.Second)
			}
			if v, err := t.Consume("user:42"); err != nil || !v.Allowed {
				return errors.Join(err, errors.New("refused"))
			}
		}
		v, err := t.Consume("user:42") // the ninth within the hour, the fourth within 10 s
		if err != nil {
			return err
		}
		fmt.Println(v.Allowed)
		for _, l := range v.Levels() {
			fmt.Printf("%s: %d of %d left, retry after %v\n", l.Bucket, l.Remaining, l.Limit, l.RetryAfter)
		}
		return nil
	})
	// Output:
	// false
	// 5/10s: 2 of 5 left, retry after 0s
	// 8/1h: 0 of 8 left, retry after 59m50s
}

func Example_guideSeveralIdentifiers() {
	guided(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 5)}}, func(ctx context.Context, t *throttler.Throttler, _ *clock.Mock) error {
		v, err := t.ConsumeAll(ctx, throttler.For("user:42"), throttler.For("org:7", throttler.Cost(3)))
		if err != nil {
			return err
		}
		for _, l := range v.Levels() {
			fmt.Println(l.Identifier, l.Remaining)
		}
		return nil
	})
	// Output:
	// user:42 4
	// org:7 2
}

func Example_guideAlgorithms() {
	buckets := []throttler.Bucket{
		throttler.NewBucket(time.Hour, 100),                          // 100 an hour, from the first call on
		throttler.NewBucket(time.Minute, 600).Continuous().Burst(50), // 10 a second, 50 at once
		throttler.NewBucket(24*time.Hour, 1000).FixedWindow(),        // 1000 a day, from midnight UTC
		throttler.NewBucket(time.Minute, 60).SlidingWindow(),         // about 60 a minute, without an edge
		throttler.NewBucket(time.Hour, 3).SlidingLog(),               // never more than 3 within an hour
	}
	for _, b := range buckets {
		fmt.Println(b.Name())
	}
	// Output:
	// 100/1h
	// 600/1m/continuous
	// 1000/24h/fixed
	// 60/1m/sliding
	// 3/1h/log
}

func Example_guideCost() {
	guided(throttler.Config{Buckets: []throttler.Bucket{
		throttler.NewBucket(time.Minute, 60).Named("requests"),
		throttler.NewBucket(time.Minute, 10_000).Continuous().Named("tokens"),
	}}, func(_ context.Context, t *throttler.Throttler, _ *clock.Mock) error {
		v, err := t.Consume("user:42", throttler.CostOf("tokens", 1000)) // and 1 of the others
		if err != nil {
			return err
		}
		for _, l := range v.Levels() {
			fmt.Println(l.Bucket, l.Remaining)
		}
		return nil
	})
	// Output:
	// requests 59
	// tokens 9000
}

func Example_guideCostOfRequests() {
	guided(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 10)}}, func(_ context.Context, t *throttler.Throttler, _ *clock.Mock) error {
		options := throttlerhttp.Options{
			Cost: func(r *http.Request) int64 {
				if r.Method == http.MethodPost || r.URL.Path == "/search" {
					return 5
				}
				return 1
			},
		}
		limit, err := throttlerhttp.New(t, &options)
		if err != nil {
			return err
		}
		h := limit(http.NotFoundHandler())
		statuses(h, 1, "GET /")
		statuses(h, 1, "GET /search")
		statuses(h, 1, "POST /")
		return nil
	})
	// Output:
	// [404]
	// [404]
	// [429]
}

func Example_guideReserve() {
	guided(throttler.Config{Buckets: []throttler.Bucket{
		throttler.NewBucket(time.Minute, 60).Named("requests"),
		throttler.NewBucket(time.Minute, 10_000).Continuous().Named("tokens"),
	}}, func(ctx context.Context, t *throttler.Throttler, _ *clock.Mock) error {
		answer := func() int64 { return 600 }
		v, err := t.ConsumeContext(ctx, "user:42", throttler.CostOf("tokens", 1000)) // the most that it may be
		if err != nil || !v.Allowed {
			return err
		}
		used := answer()
		err = t.Refund(ctx, v, throttler.CostOf("tokens", 1000-used)) // of "tokens" only
		if err != nil {
			return err
		}
		v, err = t.Peek(ctx, "user:42", throttler.Cost(0)) // takes nothing
		if err != nil {
			return err
		}
		fmt.Println(v.Levels()[0].Remaining, v.Levels()[1].Remaining)
		return nil
	})
	// Output:
	// 59 9400
}

func Example_guideAtMost() {
	guided(throttler.Config{Buckets: []throttler.Bucket{
		throttler.NewBucket(time.Minute, 300),
		throttler.NewBucket(time.Hour, 200),
	}}, func(_ context.Context, t *throttler.Throttler, _ *clock.Mock) error {
		v, err := t.Consume("user:42", throttler.AtMost(500)) // as many of 500 as may be sent now
		if err != nil || !v.Allowed {
			return err // not one
		}
		n := v.Tokens()
		fmt.Println(n)
		return nil
	})
	// Output: 200
}

func Example_guideCharge() {
	guided(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 10_000).Continuous()}}, func(ctx context.Context, t *throttler.Throttler, _ *clock.Mock) error {
		err := t.Charge(ctx, "user:42", throttler.Cost(25_000)) // of 10,000 a minute
		if err != nil {
			return err
		}
		v, err := t.Consume("user:42")
		if err != nil {
			return err
		}
		fmt.Println(v.Allowed, v.RetryAfter)
		return nil
	})
	// Output:
	// false 1m30.006s
}

type userKey struct{}

func Example_guideKeys() {
	userID := func(ctx context.Context) string { id, _ := ctx.Value(userKey{}).(string); return id }
	key := throttlerhttp.First(
		throttlerhttp.User(userID), // a func(context.Context) string of yours
		throttlerhttp.Address(&throttlerhttp.AddressOptions{
			Trusted: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}, // your proxies
		}),
	)
	r := httptest.NewRequest("GET", "/", nil)
	r.RemoteAddr = "203.0.113.9:4711"
	fmt.Println(key(r))

	r.Header.Set("X-Forwarded-For", "192.0.2.1") // anybody can write this
	fmt.Println(key(r))

	r.RemoteAddr = "10.0.0.2:4711" // a proxy of yours, which appended its peer
	r.Header.Set("X-Forwarded-For", "192.0.2.1, 203.0.113.9")
	fmt.Println(key(r))

	r.Header.Set("X-Forwarded-For", "2001:db8:1:2:3:4:5:6")
	fmt.Println(key(r))

	fmt.Println(key(r.WithContext(context.WithValue(r.Context(), userKey{}, "42"))))
	// Output:
	// ip:203.0.113.9
	// ip:203.0.113.9
	// ip:203.0.113.9
	// ip:2001:db8:1:2::/64
	// user:42
}

func Example_guideTiers() {
	free := throttler.Using(throttler.NewBucket(time.Minute, 3).Named("requests"))
	premium := throttler.Using(throttler.NewBucket(time.Minute, 10).Named("requests"))
	guided(throttler.Config{}, func(_ context.Context, t *throttler.Throttler, _ *clock.Mock) error {
		for _, plan := range []throttler.Option{free, free, free, free, premium} {
			v, err := t.Consume("user:42", plan)
			if err != nil {
				return err
			}
			fmt.Println(v.Allowed, v.Levels()[0].Remaining)
		}
		return nil
	})
	// Output:
	// true 2
	// true 1
	// true 0
	// false 0
	// true 6
}

func Example_guideTiersOfRequests() {
	guided(throttler.Config{}, func(_ context.Context, t *throttler.Throttler, _ *clock.Mock) error {
		planOf := func(r *http.Request) string { return r.URL.Query().Get("plan") }
		options := throttlerhttp.Options{
			Tier: planOf, // a func(*http.Request) string of yours, here "free" or "premium"
			Tiers: map[string][]throttler.Bucket{
				"free":    {throttler.NewBucket(time.Minute, 3).Named("requests")},
				"premium": {throttler.NewBucket(time.Minute, 10).Named("requests")},
			},
		}
		limit, err := throttlerhttp.New(t, &options)
		if err != nil {
			return err
		}
		statuses(limit(http.NotFoundHandler()), 4, "GET /?plan=free")
		statuses(limit(http.NotFoundHandler()), 8, "GET /?plan=premium")
		return nil
	})
	// Output:
	// [404 404 404 429]
	// [404 404 404 404 404 404 404 429]
}

func Example_guideMiddleware() {
	guided(throttler.Config{}, func(_ context.Context, t *throttler.Throttler, _ *clock.Mock) error {
		mux := http.NewServeMux()
		mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") })
		mux.HandleFunc("POST /login", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Query().Get("password") != "right" {
				w.WriteHeader(http.StatusUnauthorized)
			}
		})
		limit, err := throttlerhttp.New(t, &throttlerhttp.Options{
			Key:     throttlerhttp.Address(nil),
			Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 60)},
			Routes: []throttlerhttp.Route{
				{Pattern: "/api/", Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 5)}},
				{Pattern: "GET /api/search", Adds: true, Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 4)}},
				{
					Pattern:  "POST /login",
					Buckets:  []throttler.Bucket{throttler.NewBucket(time.Hour, 3).SlidingLog()},
					RefundIf: func(status int) bool { return status < 400 },
				},
				{Pattern: "GET /health", Free: true},
			},
		})
		if err != nil {
			return err // all faults of the options
		}
		handler := limit(mux)
		statuses(handler, 5, "GET /api/search")
		statuses(handler, 6, "GET /api/users")
		statuses(handler, 9, "POST /login?password=right")
		statuses(handler, 4, "POST /login?password=wrong")
		return nil
	})
	// Output:
	// [200 200 200 200 429]
	// [200 200 200 200 200 429]
	// [200 200 200 200 200 200 200 200 200]
	// [401 401 401 429]
}

func Example_guideFields() {
	guided(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(10*time.Second, 5), throttler.NewBucket(time.Hour, 100)}}, func(_ context.Context, t *throttler.Throttler, mock *clock.Mock) error {
		limit, err := throttlerhttp.New(t, nil)
		if err != nil {
			return err
		}
		h := limit(http.NotFoundHandler())
		statuses(h, 5, "GET /")
		mock.Add(2500 * time.Millisecond)
		res := ask(h, "GET /")
		for _, field := range []string{"Content-Type", "RateLimit-Policy", "RateLimit", "Retry-After"} {
			fmt.Printf("%s: %s\n", field, res.Header().Get(field))
		}
		fmt.Println(res.Body)
		return nil
	})
	// Output:
	// [404 404 404 404 404]
	// Content-Type: application/problem+json
	// RateLimit-Policy: "5/10s";q=5;w=10, "100/1h";q=100;w=3600
	// RateLimit: "5/10s";r=0;t=8, "100/1h";r=95;t=3598
	// Retry-After: 8
	// {"type":"https://iana.org/assignments/http-problem-types#quota-exceeded","title":"The request exceeds the quota that you have been assigned.","status":429,"violated-policies":["5/10s"],"retry-after":8}
}

func Example_guideRefuse() {
	guided(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 9)}}, func(_ context.Context, t *throttler.Throttler, _ *clock.Mock) error {
		pages := int64(5)
		h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			v, err := t.ConsumeContext(r.Context(), "upload:42", throttler.Cost(pages))
			if err != nil {
				http.Error(w, "try again later", http.StatusServiceUnavailable)
				return
			}
			if !v.Allowed {
				throttlerhttp.Refuse(w, r, v) // 429, Retry-After, the fields, a body
				return
			}
		})
		statuses(h, 2, "POST /upload")
		fmt.Println(ask(h, "POST /upload").Header()["Retry-After"])
		return nil
	})
	// Output:
	// [200 429]
	// [3600]
}

// inProcess is a transport that calls a handler.
type inProcess struct{ http.Handler }

func (h inProcess) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.RemoteAddr = "192.0.2.1:1234"
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result(), nil
}

func TestTheClientOfTheGuideWaitsInPlaceOfBeingRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		limiter, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(10*time.Second, 5)}})
		require.NoError(t, err)
		limit, err := throttlerhttp.New(limiter, nil)
		require.NoError(t, err)
		var base http.RoundTripper = inProcess{limit(http.NotFoundHandler())}
		client := &http.Client{
			Transport: throttlerhttp.NewTransport(base, nil), // nil in place of base is http.DefaultTransport
		}
		start := time.Now()
		for range 6 {
			res, err := client.Get("http://example.com/")
			require.NoError(t, err)
			assert.NoError(t, res.Body.Close())
			assert.Equal(t, http.StatusNotFound, res.StatusCode)
		}
		assert.WithinRange(t, time.Now(), start.Add(10*time.Second), start.Add(22*time.Second))
	})
}

type message struct{ to, text string }

func Example_guideWrap() {
	deliver := func(_ context.Context, m message) (int, error) { return len(m.text), nil }
	guided(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 1)}}, func(ctx context.Context, t *throttler.Throttler, mock *clock.Mock) error {
		if _, err := t.Consume("to:42"); err != nil {
			return err
		}
		send := throttler.Wrap(t, func(m message) string { return "to:" + m.to }, deliver)
		n, err := send(ctx, message{to: "42", text: "hello"})
		var limited *throttler.LimitedError
		if errors.As(err, &limited) {
			fmt.Println("not sent, try again in", limited.Verdict.RetryAfter)
		}
		mock.Add(time.Minute)
		fmt.Println(n)
		n, err = send(ctx, message{to: "42", text: "hello"})
		fmt.Println(n)
		return err
	})
	// Output:
	// not sent, try again in 1m0s
	// 0
	// 5
}

func TestTheClientOfTheGuideKeepsALimitOfItsOwn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store, start := memstore.New(nil), time.Now()
		var sent []time.Duration
		base := roundTripper(func(*http.Request) (*http.Response, error) {
			sent = append(sent, time.Since(start))
			return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
		})
		require.NoError(t, func() error {
			limit, err := throttler.New(throttler.Config{
				Storage: store, // redisstore.Open(url, nil), in each of the processes
				Buckets: []throttler.Bucket{
					throttler.NewBucket(time.Second, 2).Continuous().Burst(1),
					throttler.NewBucket(time.Minute, 100).Continuous().Burst(1),
				},
			})
			if err != nil {
				return err
			}
			client := &http.Client{Transport: throttlerhttp.NewTransport(base, &throttlerhttp.TransportOptions{Limit: limit})}
			for range 3 {
				response, err := client.Get("http://api.example/")
				if err != nil {
					return err
				}
				_ = response.Body.Close()
			}
			return nil
		}())
		assert.Equal(t, []time.Duration{0, 600 * time.Millisecond, 1200 * time.Millisecond}, sent)
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestTheLeakyBucketOfTheGuideLetsCallsLeaveEvenly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(test *testing.T) {
		t, err := throttler.New(throttler.Config{
			Buckets:    []throttler.Bucket{throttler.NewBucket(time.Second, 10).Continuous().Burst(1)}, // one each 100 ms
			MaxWaiters: 1000,                                                                           // more get ErrTooManyWaiters
		})
		require.NoError(test, err)
		w := &waits{start: time.Now()}
		for i := range 3 {
			w.begin(test.Context(), t, "printer", i)
		}
		<-time.After(time.Second)
		assert.Equal(test, []string{"0 ok at 0s", "1 ok at 100ms", "2 ok at 200ms"}, w.said())
	})
}

func Example_guideReservation() {
	guided(throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 2).Continuous().Burst(1)}}, func(ctx context.Context, t *throttler.Throttler, _ *clock.Mock) error {
		stillWanted := func(d time.Duration) bool { fmt.Println("in", d); return d < 700*time.Millisecond }
		reserve := func() error {
			v, err := t.Reserve(ctx, "printer", time.Second) // within a second
			if err != nil {
				return err
			}
			if !v.Allowed {
				return fmt.Errorf("busy, come again in %v", v.RetryAfter)
			}
			if !stillWanted(v.Delay) {
				return t.Refund(ctx, v)
			}
			return nil
		}
		for range 4 {
			if err := reserve(); err != nil {
				return err
			}
		}
		if _, err := t.Reserve(ctx, "printer", time.Second); err != nil { // keeps the place
			return err
		}
		return reserve()
	})
	// Output:
	// in 0s
	// in 500ms
	// in 1s
	// in 1s
	// busy, come again in 500ms
}

func Example_guideStorageError() {
	store := memstore.New(&memstore.Options{MaxIdentifiers: 1}) // fails for a second one
	tenPerMinute := throttler.NewBucket(time.Minute, 10)
	err := func() error {
		t, err := throttler.New(throttler.Config{
			Storage:        store,
			Buckets:        []throttler.Bucket{tenPerMinute},
			OnStorageError: throttler.Allow,
			Observe: func(_ context.Context, e *throttler.Event) {
				if errors.Is(e.Err, throttler.ErrUnavailable) {
					fmt.Println("not limited:", e.Identifier) // count it, and wake somebody
				}
			},
		})
		if err != nil {
			return err
		}
		for _, id := range []string{"user:1", "user:2"} {
			v, err := t.Consume(id)
			if err != nil {
				return err
			}
			fmt.Println(id, v.Allowed, v.Degraded(), len(v.Levels()))
		}
		return nil
	}()
	if err != nil {
		fmt.Println(err)
	}
	// Output:
	// user:1 true false 1
	// not limited: user:2
	// user:2 true true 0
}

func Example_guideFakeClock() {
	err := func() error {
		mock := clock.NewMock() // github.com/benbjohnson/clock
		t, err := throttler.New(throttler.Config{
			Clock:   mock,
			Buckets: []throttler.Bucket{throttler.NewBucket(10*time.Second, 1)},
		})
		if err != nil {
			return err
		}
		for range 3 {
			v, err := t.Consume("anybody")
			if err != nil {
				return err
			}
			fmt.Println(v.Allowed, v.RetryAfter)
			mock.Add(5 * time.Second)
		}
		return nil
	}()
	if err != nil {
		fmt.Println(err)
	}
	// Output:
	// true 0s
	// false 5s
	// true 0s
}

func TestTheFourthCallWaitsForAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limiter, err := throttler.New(throttler.Config{
			Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 3)},
		})
		require.NoError(t, err)
		start := time.Now()
		for range 4 {
			_, err := limiter.Wait(t.Context(), "user:42")
			require.NoError(t, err)
		}
		assert.Equal(t, time.Minute, time.Since(start)) // and the test took none
	})
}

// guide returns docs/guide.md without the section that internal/adapters checks.
func guide(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("docs/guide.md")
	require.NoError(t, err)
	before, section, found := strings.Cut(string(text), "\n## With other routers\n")
	require.True(t, found)
	_, after, _ := strings.Cut(section, "\n## ")
	return before + "\n## " + after
}

func TestTheCodeInTheGuideIsThatOfThisFile(t *testing.T) {
	t.Parallel()
	this, err := os.ReadFile("guide_test.go")
	require.NoError(t, err)
	blocks := regexp.MustCompile("(?s)```(go|text)\n(.*?)```").FindAllStringSubmatch(guide(t), -1)
	require.NotEmpty(t, blocks)
	for _, block := range blocks {
		found := false
		for indentation := "\n"; len(indentation) < 6; indentation += "\t" {
			if block[1] == "text" {
				indentation = "\n\t// "
			}
			indented := regexp.MustCompile(`(?m)^(.)`).ReplaceAllString(block[2], indentation[1:]+"$1")
			found = found || strings.Contains(string(this), "\n"+indented)
			if block[1] == "text" {
				break
			}
		}
		assert.True(t, found, "guide_test.go does not have\n%s", block[2])
	}
}

func TestTheFiguresOfTheGuideAreThoseOfTheReadme(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	row := regexp.MustCompile("(?m)^(\\| `[^|]*(?:NewBucket|Continuous|FixedWindow|SlidingWindow|SlidingLog)\\(.*)$")
	rows := row.FindAllString(string(readme), 5)
	require.Len(t, rows, 5)
	for _, r := range rows {
		cells := strings.Split(r, "|")
		assert.Contains(t, guide(t), strings.Join(cells[:5], "|")+"|")
	}
}

func TestLinksOfTheGuideLeadSomewhere(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("docs/guide.md")
	require.NoError(t, err)
	for _, link := range regexp.MustCompile(`\]\(([^):#]+)\)`).FindAllStringSubmatch(string(text), -1) {
		assert.FileExists(t, "docs/"+link[1])
	}
}

func TestTheSentencesOfTheGuideAreTrue(t *testing.T) {
	t.Parallel()
	day, mock := throttled(t, throttler.NewBucket(24*time.Hour, 1).FixedWindow())
	mock.Set(time.Date(2026, 3, 4, 23, 59, 59, 0, time.UTC))
	assert.True(t, allowed(t, day, "a"))
	assert.False(t, allowed(t, day, "a"))
	assert.True(t, allowed(t, day, "a", throttler.Cost(0)), "a cost of 0 is always admitted")
	require.NoError(t, day.Charge(t.Context(), "a", throttler.Cost(3)))
	assert.True(t, allowed(t, day, "a", throttler.Cost(0)))
	mock.Add(time.Second)
	assert.True(t, allowed(t, day, "a"), "a day begins at midnight UTC")

	week, mock := throttled(t, throttler.NewBucket(7*24*time.Hour, 1).FixedWindow())
	thursday := time.Date(2026, 3, 5, 0, 0, 0, 0, time.UTC)
	mock.Set(thursday.Add(-time.Second))
	assert.True(t, allowed(t, week, "a"))
	assert.False(t, allowed(t, week, "a"))
	mock.Set(thursday)
	assert.Equal(t, time.Thursday, thursday.Weekday())
	assert.True(t, allowed(t, week, "a"), "the README says on which day a week begins")

	spaced, mock := throttled(t, throttler.NewBucket(time.Minute, 60).Continuous().Burst(1))
	admitted := 0
	for range 600 {
		if allowed(t, spaced, "a") {
			admitted++
		}
		mock.Add(100 * time.Millisecond)
	}
	assert.Equal(t, 60, admitted, "Burst(1) admits what the capacity says, evenly")

	many := make([]throttler.Bucket, 17)
	for i := range many {
		many[i] = throttler.NewBucket(time.Minute, int64(i+1))
	}
	_, err := throttler.New(throttler.Config{Buckets: many[:16]})
	assert.NoError(t, err)
	_, err = throttler.New(throttler.Config{Buckets: many})
	assert.Error(t, err)
}

func TestTheSentencesOfTheGuideAboutRoutesAreTrue(t *testing.T) {
	t.Parallel()
	routed := func(o throttlerhttp.Options, served http.HandlerFunc) http.Handler {
		th, err := throttler.New(throttler.Config{Clock: clock.NewMock()})
		require.NoError(t, err)
		limit, err := throttlerhttp.New(th, &o)
		require.NoError(t, err)
		return limit(served)
	}
	perMinute := func(n int64) []throttler.Bucket { return []throttler.Bucket{throttler.NewBucket(time.Minute, n)} }
	nothing := func(http.ResponseWriter, *http.Request) {}

	h := routed(throttlerhttp.Options{Buckets: perMinute(1), Routes: []throttlerhttp.Route{
		{Pattern: "GET /api/search", Buckets: perMinute(4)},
		{Pattern: "GET /health", Free: true},
	}}, nothing)
	res := ask(h, "GET /api/search")
	assert.Equal(t, `"GET /api/search 4/1m";q=4;w=60`, res.Header().Get("RateLimit-Policy"))
	for range 3 {
		assert.Equal(t, http.StatusOK, ask(h, "GET /health").Code, "a free route")
	}

	var inner http.Handler
	inner = routed(throttlerhttp.Options{Buckets: perMinute(1), RefundIf: func(int) bool { return true }}, func(w http.ResponseWriter, r *http.Request) {
		assert.Equal(t, http.StatusTooManyRequests, ask(inner, "GET /").Code, "the token is out while the handler runs")
	})
	for range 3 {
		assert.Equal(t, http.StatusOK, ask(inner, "GET /").Code)
	}

	th, _ := throttled(t)
	long := throttlerhttp.Route{Pattern: "/" + strings.Repeat("a", 64), Buckets: perMinute(1)}
	_, err := throttlerhttp.New(th, &throttlerhttp.Options{Buckets: perMinute(1), Routes: []throttlerhttp.Route{long}})
	assert.Error(t, err)
	long.Name = "long"
	_, err = throttlerhttp.New(th, &throttlerhttp.Options{Buckets: perMinute(1), Routes: []throttlerhttp.Route{long}})
	assert.NoError(t, err)
}

func TestTheMistakesOfTheGuideDoWhatItSays(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	mistakes := regexp.MustCompile(`(?s)\n## Common mistakes\n(.*?)\n## `).FindStringSubmatch(guide(t) + "\n## ")
	require.NotNil(t, mistakes)
	tried := map[string]bool{}
	mistake := func(row string, try func(t *testing.T)) {
		tried[row] = true
		t.Run(row, func(t *testing.T) {
			t.Parallel()
			try(t)
		})
	}
	defer func() {
		for _, row := range regexp.MustCompile(`(?m)^\| (.*?) \|`).FindAllStringSubmatch(mistakes[1], -1)[1:] {
			assert.True(t, tried[row[1]], "no test of %q", row[1])
			delete(tried, row[1])
		}
		assert.Empty(t, tried, "tests of mistakes that the guide does not have")
	}()
	one := throttler.NewBucket(time.Minute, 1)

	mistake("to look at `err` only", func(t *testing.T) {
		th, _ := throttled(t, one)
		require.True(t, allowed(t, th, "a"))
		v, err := th.Consume("a")
		assert.NoError(t, err)
		assert.False(t, v.Allowed)
	})
	mistake("a `Consume` for each limit, or a middleware around another", func(t *testing.T) {
		th, _ := throttled(t, one)
		outer, _ := throttled(t, throttler.NewBucket(time.Minute, 10))
		outside, err := throttlerhttp.New(outer, &throttlerhttp.Options{Key: everybody})
		require.NoError(t, err)
		inside, err := throttlerhttp.New(th, &throttlerhttp.Options{Key: everybody})
		require.NoError(t, err)
		h := outside(inside(http.NotFoundHandler()))
		assert.Equal(t, 404, code(h, ""))
		assert.Equal(t, 429, code(h, ""))
		assert.Equal(t, []int64{8}, left(t, outer, "everybody"))
	})
	mistake("two middlewares on one Throttler, with buckets of one name", func(t *testing.T) {
		th, _ := throttled(t)
		around := func(b throttler.Bucket) http.Handler {
			limit, err := throttlerhttp.New(th, &throttlerhttp.Options{Key: everybody, Buckets: []throttler.Bucket{b}})
			require.NoError(t, err)
			return limit(http.NotFoundHandler())
		}
		assert.Equal(t, 404, code(around(one), ""))
		assert.Equal(t, 429, code(around(one), ""))
		assert.Equal(t, 404, code(around(one.Named("search")), ""))
	})
	mistake("`Peek`, and `Consume` or not afterwards", func(t *testing.T) {
		th, _ := throttled(t, one)
		for range 2 {
			v, err := th.Peek(ctx, "a")
			require.NoError(t, err)
			assert.True(t, v.Allowed)
		}
	})
	mistake("`throttler.New` for each request", func(t *testing.T) {
		for range 3 {
			th, err := throttler.New(throttler.Config{Buckets: []throttler.Bucket{one}})
			require.NoError(t, err)
			assert.True(t, allowed(t, th, "a"))
		}
	})
	mistake("plans without `Named`", func(t *testing.T) {
		th, mock := throttled(t)
		small, large := throttler.Using(one), throttler.Using(throttler.NewBucket(time.Minute, 2))
		assert.True(t, allowed(t, th, "a", small))
		assert.True(t, allowed(t, th, "a", large, throttler.Cost(2)))
		mock.Add(time.Minute)
		assert.True(t, allowed(t, th, "a", small))
		assert.True(t, allowed(t, th, "a", large, throttler.Cost(2)))
	})
	mistake("plans of different periods", func(t *testing.T) {
		th, _ := throttled(t)
		minute, hour := throttler.Using(one.Named("requests")), throttler.Using(throttler.NewBucket(time.Hour, 2).Named("requests"))
		assert.True(t, allowed(t, th, "a", minute))
		assert.True(t, allowed(t, th, "a", hour, throttler.Cost(2)))
		assert.False(t, allowed(t, th, "a", minute), "each is as it was")
		assert.False(t, allowed(t, th, "a", hour))
	})
	mistake("`AddBucket` in one process of several", func(t *testing.T) {
		store := memstore.New(nil)
		here, err := throttler.New(throttler.Config{Storage: store})
		require.NoError(t, err)
		there, err := throttler.New(throttler.Config{Storage: store})
		require.NoError(t, err)
		elsewhere, err := throttler.New(throttler.Config{Storage: store, Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 7)}})
		require.NoError(t, err)
		require.NoError(t, here.AddBucket("a", one))
		require.True(t, allowed(t, here, "a"))
		_, err = there.Consume("a")
		assert.ErrorIs(t, err, throttler.ErrUnknownIdentifier)
		assert.Equal(t, []int64{7}, left(t, elsewhere, "a"))
	})
	mistake("`42` for a user and for an order", func(t *testing.T) {
		th, _ := throttled(t, one)
		user, order := "42", "42"
		assert.True(t, allowed(t, th, user))
		assert.False(t, allowed(t, th, order))
	})
	mistake("`Trusted` with `0.0.0.0/0`", func(t *testing.T) {
		key := throttlerhttp.Address(&throttlerhttp.AddressOptions{Trusted: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}})
		assert.Equal(t, "ip:198.51.100.7", key(from("192.0.2.1:1", "198.51.100.7")))
	})
	mistake("a proxy that is not in `Trusted`", func(t *testing.T) {
		key := throttlerhttp.Address(nil)
		assert.Equal(t, key(from("10.0.0.2:1", "198.51.100.7")), key(from("10.0.0.2:2", "203.0.113.9")))
	})
	mistake("`APIKey` where keys are not checked before", func(t *testing.T) {
		th, _ := throttled(t, one)
		limit, err := throttlerhttp.New(th, &throttlerhttp.Options{Key: throttlerhttp.APIKey("X-API-Key")})
		require.NoError(t, err)
		for i := range 3 {
			assert.Equal(t, 404, code(limit(http.NotFoundHandler()), fmt.Sprint("invented-", i)))
		}
		assert.Equal(t, 429, code(limit(http.NotFoundHandler()), "invented-0"))
	})
	mistake("the middleware outside of the authentication", func(t *testing.T) {
		th, _ := throttled(t, one)
		nobody := throttlerhttp.User(func(context.Context) string { return "" })
		limit, err := throttlerhttp.New(th, &throttlerhttp.Options{Key: nobody})
		require.NoError(t, err)
		assert.Equal(t, 500, code(limit(http.NotFoundHandler()), ""))
		assert.Equal(t, "ip:192.0.2.1", throttlerhttp.First(nobody, throttlerhttp.Address(nil))(from("192.0.2.1:1", "")))
	})
	mistake("a cost above a capacity", func(t *testing.T) {
		th, mock := throttled(t, one)
		limit, err := throttlerhttp.New(th, &throttlerhttp.Options{Cost: func(*http.Request) int64 { return 2 }})
		require.NoError(t, err)
		for range 2 {
			_, err := th.Consume("a", throttler.Cost(2))
			assert.ErrorIs(t, err, throttler.ErrCostExceedsCapacity)
			assert.Equal(t, 413, code(limit(http.NotFoundHandler()), ""))
			mock.Add(time.Hour)
		}
	})
	mistake("a Retry-After that is rounded down", func(t *testing.T) {
		th, mock := throttled(t, throttler.NewBucket(1500*time.Millisecond, 1))
		require.True(t, allowed(t, th, "a"))
		v, err := th.Consume("a")
		require.NoError(t, err)
		mock.Add(v.RetryAfter.Truncate(time.Second))
		assert.False(t, allowed(t, th, "a"))
	})
	mistake("to refund a verdict twice", func(t *testing.T) {
		th, _ := throttled(t, throttler.NewBucket(time.Minute, 5))
		v, err := th.Consume("a")
		require.NoError(t, err)
		require.True(t, allowed(t, th, "a", throttler.Cost(4)))
		refused, err := th.Consume("a")
		require.NoError(t, err)
		require.NoError(t, th.Refund(ctx, refused))
		assert.Equal(t, []int64{0}, left(t, th, "a"))
		require.NoError(t, th.Refund(ctx, v))
		require.NoError(t, th.Refund(ctx, v))
		assert.Equal(t, []int64{2}, left(t, th, "a"))
	})
	mistake("a debt in a bucket that is not `Continuous`", func(t *testing.T) {
		for _, b := range []throttler.Bucket{one, one.FixedWindow(), one.SlidingLog(), one.SlidingWindow()} {
			th, mock := throttled(t, b)
			require.NoError(t, th.Charge(ctx, "a", throttler.Cost(4)))
			mock.Add(time.Minute)
			if b.Name() == one.SlidingWindow().Name() {
				mock.Add(time.Minute)
			}
			assert.Equal(t, []int64{1}, left(t, th, "a"), b.Name())
		}
	})
	mistake("to wait `RetryAfter` in several goroutines", func(t *testing.T) {
		th, mock := throttled(t, one)
		require.True(t, allowed(t, th, "a"))
		first, err := th.Consume("a")
		require.NoError(t, err)
		second, err := th.Consume("a")
		require.NoError(t, err)
		assert.Equal(t, first.RetryAfter, second.RetryAfter)
		mock.Add(first.RetryAfter)
		assert.True(t, allowed(t, th, "a"))
		assert.False(t, allowed(t, th, "a"))
	})
}

func everybody(*http.Request) string { return "everybody" }

// from returns a request from an address, whose header may name another one.
func from(remote, forwarded string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.RemoteAddr = remote
	r.Header.Set("X-Forwarded-For", forwarded)
	return r
}

// code returns the status of the answer to a request with an API key.
func code(h http.Handler, key string) int {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.Header.Set("X-API-Key", key)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Code
}
