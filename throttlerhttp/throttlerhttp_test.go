package throttlerhttp_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/dunglas/httpsfv"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
	memstore "github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/throttlerhttp"
)

var ok = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") })

// whoever is a Key that counts all requests for one identifier.
func whoever(*http.Request) string { return "user:42" }

// serve returns a handler with a limit.
func serve(t testing.TB, c throttler.Config, o throttlerhttp.Options, h http.Handler) http.Handler {
	t.Helper()
	limiter, err := throttler.New(c)
	require.NoError(t, err)
	if o.Key == nil {
		o.Key = whoever
	}
	limit, err := throttlerhttp.New(limiter, &o)
	require.NoError(t, err)
	return limit(h)
}

// reply is what a client gets.
type reply struct {
	StatusCode int
	Header     http.Header
	Body       *bytes.Buffer
}

// ask sends a request such as "GET /path".
func ask(h http.Handler, what string, fields ...string) reply {
	method, path, _ := strings.Cut(what, " ")
	r := httptest.NewRequest(method, path, nil)
	for i := 0; i < len(fields); i += 2 {
		r.Header.Add(fields[i], fields[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return reply{w.Code, w.Header(), w.Body}
}

// admitted returns how many of n requests are admitted.
func admitted(h http.Handler, n int, what string, fields ...string) (count int) {
	for range n {
		if ask(h, what, fields...).StatusCode == http.StatusOK {
			count++
		}
	}
	return count
}

func buckets(b ...throttler.Bucket) []throttler.Bucket { return b }

func perHour(n int64) throttler.Bucket { return throttler.NewBucket(time.Hour, n) }

func TestARequestThatIsRefusedNeverReachesTheHandler(t *testing.T) {
	t.Parallel()
	served := 0
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(3))}, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served++ }))
	assert.Equal(t, 3, admitted(h, 5, "GET /"))
	assert.Equal(t, 3, served)
}

func TestWithoutOptionsEachAddressHasTheBucketsOfTheThrottler(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{Buckets: buckets(perHour(2))})
	require.NoError(t, err)
	limit, err := throttlerhttp.New(limiter, nil)
	require.NoError(t, err)
	h := limit(ok)
	assert.Equal(t, 2, admitted(h, 3, "GET /", "X-Forwarded-For", "198.51.100.7"))
	other := httptest.NewRequest(http.MethodGet, "/", nil)
	other.RemoteAddr = "203.0.113.9:1234"
	w := httptest.NewRecorder()
	h.ServeHTTP(w, other)
	assert.Equal(t, http.StatusOK, w.Code)
}

// parsed parses a field as a list by RFC 9651.
func parsed(t testing.TB, r reply, field string) map[string]map[string]int64 {
	t.Helper()
	list, err := httpsfv.UnmarshalList(r.Header.Values(field))
	require.NoError(t, err, "%s: %q", field, r.Header.Values(field))
	items := map[string]map[string]int64{}
	for _, member := range list {
		item := member.(httpsfv.Item)
		of := map[string]int64{}
		for _, name := range item.Params.Names() {
			value, _ := item.Params.Get(name)
			of[name] = value.(int64)
		}
		items[item.Value.(string)] = of
	}
	return items
}

func TestFieldsTellWhatRemainsOfEachBucket(t *testing.T) {
	t.Parallel()
	mock := clock.NewMock()
	odd := throttler.NewBucket(1500*time.Millisecond, 1<<50).Named(`a "quoted" \ name`)
	h := serve(t, throttler.Config{Clock: mock}, throttlerhttp.Options{Buckets: buckets(throttler.NewBucket(10*time.Second, 5), perHour(100), odd)}, ok)
	for range 5 {
		ask(h, "GET /")
	}
	mock.Add(2500 * time.Millisecond)
	r := ask(h, "GET /")
	require.Equal(t, http.StatusTooManyRequests, r.StatusCode)
	assert.Equal(t, "8", r.Header.Get("Retry-After"), "7.5 s, rounded up")
	assert.Equal(t, map[string]map[string]int64{
		"5/10s": {"q": 5, "w": 10}, "100/1h": {"q": 100, "w": 3600}, `a "quoted" \ name`: {"q": 999_999_999_999_999, "w": 2},
	}, parsed(t, r, "RateLimit-Policy"))
	assert.Equal(t, map[string]map[string]int64{
		"5/10s": {"r": 0, "t": 8}, "100/1h": {"r": 95, "t": 3598}, `a "quoted" \ name`: {"r": 999_999_999_999_999},
	}, parsed(t, r, "RateLimit"))
	assert.Equal(t, []string{`"5/10s";q=5;w=10, "100/1h";q=100;w=3600, "a \"quoted\" \\ name";q=999999999999999;w=2`}, r.Header.Values("RateLimit-Policy"))
}

func TestRetryAfterIsTrueToTheSecondAndNeverEarly(t *testing.T) {
	t.Parallel()
	for _, period := range []time.Duration{time.Microsecond, time.Millisecond, time.Second, time.Second + time.Microsecond, 10 * time.Second, 90 * time.Minute} {
		mock := clock.NewMock()
		h := serve(t, throttler.Config{Clock: mock}, throttlerhttp.Options{Buckets: buckets(throttler.NewBucket(period, 1))}, ok)
		require.Equal(t, http.StatusOK, ask(h, "GET /").StatusCode)
		r := ask(h, "GET /")
		after, err := strconv.Atoi(r.Header.Get("Retry-After"))
		require.NoError(t, err)
		assert.Equal(t, int((period+time.Second-1)/time.Second), after)
		mock.Add(time.Duration(after) * time.Second)
		assert.Equal(t, http.StatusOK, ask(h, "GET /").StatusCode, "after %d s of %v", after, period)
	}
}

func TestXFieldsAreOfTheBucketThatIsNearestToRefusing(t *testing.T) {
	t.Parallel()
	mock := clock.NewMock()
	two := buckets(throttler.NewBucket(10*time.Second, 3), perHour(100))
	for fields, reset := range map[throttlerhttp.Fields]func(string) bool{
		throttlerhttp.XSeconds: func(s string) bool { return s == "10" },
		throttlerhttp.XUnix | throttlerhttp.Draft10: func(s string) bool {
			n, err := strconv.ParseInt(s, 10, 64)
			in := n - time.Now().Unix()
			return err == nil && 9 <= in && in <= 11
		},
	} {
		h := serve(t, throttler.Config{Clock: mock}, throttlerhttp.Options{Buckets: two, Fields: fields}, ok)
		r := ask(h, "GET /")
		assert.Equal(t, []string{"3", "2"}, []string{r.Header.Get("X-RateLimit-Limit"), r.Header.Get("X-RateLimit-Remaining")})
		assert.True(t, reset(r.Header.Get("X-RateLimit-Reset")), r.Header.Get("X-RateLimit-Reset"))
		assert.Equal(t, fields&throttlerhttp.Draft10 != 0, r.Header.Get("RateLimit") != "")
	}
	r := ask(serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: two, Fields: throttlerhttp.NoFields}, ok), "GET /")
	assert.Equal(t, http.Header{"Content-Type": {"text/plain; charset=utf-8"}}, r.Header)
}

func TestRoutes(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{
		Buckets: buckets(perHour(10)),
		Routes: []throttlerhttp.Route{
			{Pattern: "/api/", Buckets: buckets(perHour(4))},
			{Pattern: "GET /api/search", Adds: true, Buckets: buckets(perHour(3))},
			{Pattern: "POST /api/search", Name: "writes", Buckets: buckets(perHour(2))},
			{Pattern: "POST /api/other", Name: "writes", Buckets: buckets(perHour(2))},
			{Pattern: "/health", Free: true},
		},
	}, ok)
	assert.Equal(t, 3, admitted(h, 5, "GET /api/search"), "its own limit, besides that of all")
	assert.Equal(t, 4, admitted(h, 6, "GET /api/data"), "a limit of its own, in place of that of all")
	assert.Equal(t, 7, admitted(h, 9, "GET /"), "what the searches that were refused did not take is left")
	assert.Zero(t, admitted(h, 1, "GET /api/search"), "the limit of all is used up")
	assert.Equal(t, 2, admitted(h, 1, "POST /api/search")+admitted(h, 5, "POST /api/other"), "routes of one name share")
	assert.Equal(t, 20, admitted(h, 20, "GET /health"))
	assert.Equal(t, map[string]map[string]int64{"10/1h": {"r": 0, "t": 3600}, "GET /api/search 3/1h": {"r": 0, "t": 3600}}, parsed(t, ask(h, "GET /api/search"), "RateLimit"))
}

func TestThePolicyOfABurstIsTheTimeInWhichItComesBack(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(
		throttler.NewBucket(time.Second, 1).Continuous().Burst(10), throttler.NewBucket(time.Minute, 600).Continuous().Burst(1).Named("even"),
	)}, ok)
	assert.Equal(t, map[string]map[string]int64{"1/1s/continuous": {"q": 10, "w": 10}, "even": {"q": 1, "w": 1}}, parsed(t, ask(h, "GET /"), "RateLimit-Policy"))
}

func TestARouteMayRefuseInItsOwnWay(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(1)), Routes: []throttlerhttp.Route{
		{Pattern: "/own", Refuse: func(w http.ResponseWriter, _ *http.Request, why throttlerhttp.Refusal) {
			w.WriteHeader(why.Status + 70)
		}},
	}}, ok)
	assert.Equal(t, http.StatusOK, ask(h, "GET /").StatusCode)
	assert.Equal(t, http.StatusTooManyRequests, ask(h, "GET /").StatusCode)
	assert.Equal(t, 499, ask(h, "GET /own").StatusCode)
}

func TestAnUnusualPathDoesNotEvadeItsRoute(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{
		Buckets: buckets(perHour(1000)),
		Routes:  []throttlerhttp.Route{{Pattern: "/api/", Buckets: buckets(perHour(1))}},
	}, ok)
	count := 0
	for _, path := range []string{"/api/x", "/api//x", "//api/x", "/other/../api/x", "/api", "/%61pi/x", "/api/x?q=1"} {
		count += admitted(h, 1, "GET "+path)
	}
	assert.Equal(t, 1, count)
}

func TestTiersKeepWhatWasSpent(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{
		Buckets: buckets(perHour(2).Named("hourly")),
		Tier:    func(r *http.Request) string { return r.Header.Get("Plan") },
		Tiers:   map[string][]throttler.Bucket{"free": buckets(perHour(5).Named("hourly")), "premium": buckets(perHour(9).Named("hourly"))},
		Routes:  []throttlerhttp.Route{{Pattern: "/more", Adds: true, Buckets: buckets(perHour(100))}},
	}, ok)
	assert.Equal(t, 2, admitted(h, 3, "GET /"))
	assert.Equal(t, 3, admitted(h, 5, "GET /", "Plan", "free"))
	assert.Equal(t, 4, admitted(h, 9, "GET /more", "Plan", "premium"))
	assert.Equal(t, http.StatusInternalServerError, ask(h, "GET /", "Plan", "unknown").StatusCode)
}

func TestCostsAreThoseOfTheRequestOrTheRoute(t *testing.T) {
	t.Parallel()
	weight := func(r *http.Request) int64 {
		n, _ := strconv.ParseInt(r.URL.Query().Get("weight"), 10, 64)
		return n
	}
	h := serve(t, throttler.Config{}, throttlerhttp.Options{
		Buckets: buckets(perHour(10)), Cost: weight,
		Routes: []throttlerhttp.Route{{Pattern: "/fixed", Cost: func(*http.Request) int64 { return 3 }}},
	}, ok)
	assert.Equal(t, http.StatusOK, ask(h, "GET /?weight=6").StatusCode)
	assert.Equal(t, http.StatusOK, ask(h, "GET /fixed").StatusCode)
	assert.Equal(t, http.StatusTooManyRequests, ask(h, "GET /?weight=2").StatusCode)
	assert.Equal(t, http.StatusOK, ask(h, "GET /?weight=1").StatusCode)
	tooMuch := ask(h, "GET /?weight=11")
	assert.Equal(t, http.StatusRequestEntityTooLarge, tooMuch.StatusCode)
	assert.Empty(t, tooMuch.Header.Get("Retry-After"), "waiting never helps")
	assert.Equal(t, http.StatusBadRequest, ask(h, "GET /?weight=-1").StatusCode)
}

func TestOnlyFailedLoginsCount(t *testing.T) {
	t.Parallel()
	logins := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Query().Get("password") {
		case "right":
			_, _ = io.WriteString(w, "welcome")
		case "flushed":
			w.(http.Flusher).Flush()
		case "nothing":
		case "panic":
			panic(http.ErrAbortHandler)
		default:
			w.WriteHeader(http.StatusUnauthorized)
		}
	})
	h := serve(t, throttler.Config{}, throttlerhttp.Options{
		Buckets: buckets(perHour(3)),
		RefundIf: func(status int) bool {
			return status != http.StatusUnauthorized && status != http.StatusInternalServerError
		},
	}, logins)
	for range 4 {
		assert.Equal(t, 3, admitted(h, 1, "POST /?password=right")+admitted(h, 1, "POST /?password=flushed")+admitted(h, 1, "POST /?password=nothing"))
	}
	assert.Equal(t, http.StatusUnauthorized, ask(h, "POST /").StatusCode)
	assert.Panics(t, func() { ask(h, "POST /?password=panic") })
	assert.Equal(t, http.StatusUnauthorized, ask(h, "POST /").StatusCode)
	assert.Equal(t, http.StatusTooManyRequests, ask(h, "POST /?password=right").StatusCode)
}

// failing is a storage that cannot decide.
type failing struct {
	storage.Storage

	err error
}

func (f failing) Decide(context.Context, *storage.Request, *storage.Answer) error { return f.err }

func TestAStorageThatFailsIsNeverASilentSuccess(t *testing.T) {
	t.Parallel()
	for err, status := range map[error]int{
		throttler.ErrUnavailable:  http.StatusServiceUnavailable,
		throttler.ErrCorruptState: http.StatusServiceUnavailable,
		throttler.ErrClosed:       http.StatusServiceUnavailable,
		context.Canceled:          http.StatusServiceUnavailable,
		errors.New("unforeseen"):  http.StatusInternalServerError,
	} {
		h := serve(t, throttler.Config{Storage: failing{memstore.New(nil), err}}, throttlerhttp.Options{Buckets: buckets(perHour(1))}, ok)
		r := ask(h, "GET /")
		assert.Equal(t, status, r.StatusCode, err)
		assert.Empty(t, r.Header.Get("Retry-After"))
	}
	h := serve(t, throttler.Config{Storage: failing{memstore.New(nil), throttler.ErrUnavailable}, OnStorageError: throttler.Allow}, throttlerhttp.Options{Buckets: buckets(perHour(1))}, ok)
	r := ask(h, "GET /")
	assert.Equal(t, http.StatusOK, r.StatusCode, "the policy lets it through")
	assert.Empty(t, r.Header.Get("RateLimit"), "nothing is known of the limits")
}

func TestAKeyThatKnowsNobodyIsAnErrorAndNotOneBucketForAll(t *testing.T) {
	t.Parallel()
	var got error
	h := serve(t, throttler.Config{}, throttlerhttp.Options{
		Key: func(*http.Request) string { return "" }, Buckets: buckets(perHour(1)),
		Refuse: func(w http.ResponseWriter, r *http.Request, why throttlerhttp.Refusal) {
			got = why.Err
			throttlerhttp.Problem(w, r, why)
		},
	}, ok)
	assert.Equal(t, http.StatusInternalServerError, ask(h, "GET /").StatusCode)
	assert.ErrorIs(t, got, throttlerhttp.ErrNoKey)
}

func TestAnUnknownIdentifierIsForbidden(t *testing.T) {
	t.Parallel()
	assert.Equal(t, http.StatusForbidden, ask(serve(t, throttler.Config{}, throttlerhttp.Options{}, ok), "GET /").StatusCode)
}

func TestBodies(t *testing.T) {
	t.Parallel()
	mock := clock.NewMock()
	body := func(o throttlerhttp.Options) (got map[string]any, kind string) {
		o.Buckets = buckets(throttler.NewBucket(10*time.Second, 1), perHour(100))
		h := serve(t, throttler.Config{Clock: mock}, o, ok)
		ask(h, "GET /")
		r := ask(h, "GET /")
		require.NoError(t, json.NewDecoder(r.Body).Decode(&got))
		return got, r.Header.Get("Content-Type")
	}
	got, kind := body(throttlerhttp.Options{})
	assert.Equal(t, "application/problem+json", kind)
	assert.Equal(t, map[string]any{
		"type": "https://iana.org/assignments/http-problem-types#quota-exceeded", "title": "The request exceeds the quota that you have been assigned.",
		"status": 429.0, "violated-policies": []any{"1/10s"}, "retry-after": 10.0,
	}, got)
	got, kind = body(throttlerhttp.Options{Refuse: throttlerhttp.JSON})
	assert.Equal(t, "application/json", kind)
	assert.Equal(t, map[string]any{"error": "Too Many Requests", "limits": []any{"1/10s"}, "retry_after": 10.0}, got)
	got, _ = body(throttlerhttp.Options{Refuse: func(w http.ResponseWriter, _ *http.Request, why throttlerhttp.Refusal) {
		var limited *throttler.LimitedError
		require.ErrorAs(t, why.Err, &limited)
		w.WriteHeader(why.Status)
		_ = json.NewEncoder(w).Encode(map[string]any{"who": limited.Verdict.Levels()[0].Identifier, "in": why.RetryAfter})
	}})
	assert.Equal(t, map[string]any{"who": "user:42", "in": 10.0}, got)
}

func TestEarlyHintsAreNotTheStatusThatDecidesARefund(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{
		Buckets: buckets(perHour(1)), RefundIf: func(status int) bool { return status == http.StatusNotFound },
	}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusEarlyHints)
		http.NotFound(w, nil)
	}))
	server := httptest.NewServer(h)
	defer server.Close()
	for range 3 {
		r, err := server.Client().Get(server.URL)
		require.NoError(t, err)
		require.NoError(t, r.Body.Close())
		assert.Equal(t, http.StatusNotFound, r.StatusCode, "given back after the final status, not after the early hints")
	}
}

func TestFaultsOfOptionsAreNamed(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	_, err = throttlerhttp.New(limiter, &throttlerhttp.Options{
		Buckets: buckets(throttler.NewBucket(0, 1)),
		Tiers:   map[string][]throttler.Bucket{"free": nil},
		Routes: []throttlerhttp.Route{
			{Pattern: "no pattern at all", Buckets: buckets(perHour(1))},
			{Pattern: "/twice", Buckets: buckets(perHour(1))}, {Pattern: "/twice", Buckets: buckets(perHour(1))},
			{Pattern: "/many", Buckets: buckets(perHour(1), perHour(1))},
			{Pattern: "/free", Free: true, Buckets: buckets(perHour(1))}, {Pattern: "/adds", Adds: true},
			{Pattern: "/" + strings.Repeat("long", 15), Buckets: buckets(perHour(1))},
		},
	})
	for _, said := range []string{"Options", "Period", "Tiers needs a Tier", `Options.Routes[0] "no pattern at all"`, `Options.Routes[2] "/twice"`, `Options.Routes[3] "/many"`,
		"it is Free and has Buckets", "no Buckets that Adds could add", "give the Route a shorter Name"} {
		assert.ErrorContains(t, err, said)
	}
	_, err = throttlerhttp.New(nil, &throttlerhttp.Options{Routes: []throttlerhttp.Route{{Pattern: "/", Adds: true, Buckets: buckets(perHour(1))}}})
	assert.ErrorContains(t, err, "Throttler is nil")
	assert.ErrorContains(t, err, "Adds needs Options.Buckets")
	for _, fields := range []throttlerhttp.Fields{64, throttlerhttp.NoFields | throttlerhttp.Draft10} {
		_, err = throttlerhttp.New(nil, &throttlerhttp.Options{
			Tier: func(*http.Request) string { return "" }, Fields: fields,
			Routes: []throttlerhttp.Route{{Pattern: "/", Free: true, RefundIf: func(int) bool { return true }}},
		})
		assert.ErrorContains(t, err, "Options.Tier needs Tiers")
		assert.ErrorContains(t, err, fmt.Sprintf("Options.Fields is %d, must be any of Draft10", fields))
		assert.ErrorContains(t, err, "it is Free, so its Key, Cost or RefundIf")
	}
}

func TestTheRouteIsTheOneThatAServeMuxWouldChoose(t *testing.T) {
	t.Parallel()
	patterns := []string{"/", "/api/", "GET /api/data", "/api/data", "POST /api/data", "HEAD /api/head", "GET /api/head", "GET /api/spaces",
		"/api/users/{id}", "GET /api/users/me", "GET /api/users/{id}", "GET /api/dir/", "GET /api/a%20b", "CONNECT /api/tunnel", "/end/{$}"}
	for _, more := range [][]string{nil, {"example.com/api/data", "GET example.com/api/users/me"}, {"GET /a /b", "GET\texample.com/a /b"}} {
		mux, routes := http.NewServeMux(), []throttlerhttp.Route(nil)
		for i, pattern := range append(patterns, more...) {
			mux.Handle(pattern, http.NotFoundHandler())
			routes = append(routes, throttlerhttp.Route{Pattern: pattern, Name: fmt.Sprint("route", i), Buckets: buckets(throttler.NewBucket(time.Hour, 1<<40))})
		}
		h := serve(t, throttler.Config{}, throttlerhttp.Options{Routes: routes}, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "OPTIONS"} {
			for _, path := range []string{"/", "/api/", "/api/data", "/api/data/", "/api/head", "/api/spaces", "/api/users/me", "/api/users/7", "/api/dir/", "/api/dir/x", "/api/a%20b", "/api/tunnel", "/end/", "/end/x", "/a%20/b"} {
				r := httptest.NewRequest(method, path, nil)
				_, pattern := mux.Handler(r)
				route := slices.IndexFunc(routes, func(r throttlerhttp.Route) bool { return r.Pattern == pattern })
				w := httptest.NewRecorder()
				h.ServeHTTP(w, r)
				assert.Contains(t, w.Header().Get("RateLimit-Policy"), fmt.Sprintf(`"route%d `, route), "%s %s: %s", method, path, pattern)
			}
		}
	}
}
