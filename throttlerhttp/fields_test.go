package throttlerhttp_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// counted is a storage that answers every call with the same counts.
type counted struct {
	storage.Storage

	allowed bool
	counts  []storage.Count
}

func (c counted) Decide(_ context.Context, _ *storage.Request, a *storage.Answer) error {
	a.Allowed = c.allowed
	copy(a.Counts, c.counts)
	return nil
}

func TestTIsTheTimeUntilOneMoreToken(t *testing.T) {
	t.Parallel()
	const second = 1_000_000
	for _, c := range []struct {
		count storage.Count
		want  string
	}{
		{storage.Count{Remaining: 3, NextAfter: 1 * second, ResetAfter: 7 * second}, `r=3;t=1`},
		{storage.Count{Remaining: 3, NextAfter: 1, ResetAfter: 7 * second}, `r=3;t=1`},
		{storage.Count{Remaining: 3, NextAfter: 8 * second, ResetAfter: 9 * second}, `r=3;t=8`},
		{storage.Count{Remaining: 3, NextAfter: 8*second + 1, ResetAfter: 9 * second}, `r=3;t=9`},
		{storage.Count{Remaining: 10}, `r=10`},
		{storage.Count{Remaining: 0, NextAfter: 1 * second, ResetAfter: 10 * second, RetryAfter: 3 * second}, `r=0;t=1`},
	} {
		h := serve(t, throttler.Config{Storage: counted{allowed: c.count.RetryAfter == 0, counts: []storage.Count{c.count}}},
			throttlerhttp.Options{Buckets: buckets(throttler.NewBucket(10*time.Second, 10).Named("b"))}, ok)
		assert.Equal(t, `"b";`+c.want, ask(h, "GET /").Header.Get("RateLimit"), "%+v", c.count)
	}
}

func TestTOfARefusalIsNeverLaterThanRetryAfter(t *testing.T) {
	t.Parallel()
	for _, b := range []throttler.Bucket{
		throttler.NewBucket(10*time.Second, 10), throttler.NewBucket(10*time.Second, 10).Continuous(), throttler.NewBucket(10*time.Second, 10).FixedWindow(),
		throttler.NewBucket(10*time.Second, 10).SlidingWindow(), throttler.NewBucket(10*time.Second, 10).SlidingLog(),
	} {
		mock := clock.NewMock()
		h := serve(t, throttler.Config{Clock: mock}, throttlerhttp.Options{Buckets: buckets(b.Named("b"))}, ok)
		for range 10 {
			ask(h, "GET /")
			mock.Add(123456 * time.Microsecond)
		}
		r := ask(h, "GET /")
		for ; r.StatusCode == http.StatusOK; r = ask(h, "GET /") {
		}
		after := r.Header.Get("Retry-After")
		assert.Equal(t, `"b";r=0;t=`+after, r.Header.Get("RateLimit"), "one token is what is waited for")
	}
}

func TestTOfAnAdmittedCallIsItsNextToken(t *testing.T) {
	t.Parallel()
	mock := clock.NewMock()
	h := serve(t, throttler.Config{Clock: mock}, throttlerhttp.Options{Buckets: buckets(
		throttler.NewBucket(10*time.Second, 10).Continuous().Named("level"), throttler.NewBucket(time.Minute, 3).SlidingLog().Named("log"),
	)}, ok)
	ask(h, "GET /")
	mock.Add(10 * time.Second)
	assert.Equal(t, map[string]map[string]int64{"level": {"r": 9, "t": 1}, "log": {"r": 1, "t": 50}}, parsed(t, ask(h, "GET /"), "RateLimit"))
}

// inside returns nested limits, the first one outermost.
func inside(t *testing.T, h http.Handler, all ...throttlerhttp.Options) http.Handler {
	for i := len(all) - 1; i >= 0; i-- {
		h = serve(t, throttler.Config{Clock: clock.NewMock()}, all[i], h)
	}
	return h
}

func TestNestedLimitersAreOneList(t *testing.T) {
	t.Parallel()
	h := inside(t, ok,
		throttlerhttp.Options{Buckets: buckets(perHour(100).Named("all"))},
		throttlerhttp.Options{Buckets: buckets(perHour(50).Named("some, or \"none\""))},
		throttlerhttp.Options{Buckets: buckets(perHour(1).Named("one"))})
	for _, status := range []int{200, 429} {
		r := ask(h, "GET /")
		require.Equal(t, status, r.StatusCode)
		assert.Len(t, r.Header.Values("RateLimit"), 1)
		assert.Len(t, r.Header.Values("RateLimit-Policy"), 1)
		assert.Len(t, parsed(t, r, "RateLimit"), 3)
		assert.Equal(t, 3, strings.Count(r.Header.Get("RateLimit"), ";r="), "none twice")
		assert.Equal(t, map[string]map[string]int64{
			"all": {"q": 100, "w": 3600}, `some, or "none"`: {"q": 50, "w": 3600}, "one": {"q": 1, "w": 3600},
		}, parsed(t, r, "RateLimit-Policy"))
	}
}

func TestOfTwoLimitsOfOneNameTheSmallerIsTold(t *testing.T) {
	t.Parallel()
	few, many := throttlerhttp.Options{Buckets: buckets(perHour(3).Named("b"))}, throttlerhttp.Options{Buckets: buckets(perHour(9).Named("b"))}
	for _, h := range []http.Handler{inside(t, ok, few, many), inside(t, ok, many, few)} {
		r := ask(h, "GET /")
		assert.Equal(t, []string{`"b";r=2;t=3600`}, r.Header.Values("RateLimit"))
		assert.Equal(t, []string{`"b";q=3;w=3600`}, r.Header.Values("RateLimit-Policy"))
	}
}

func TestOfTwoLimitsOfOneNameTheSmallerIsToldWhoeverTellsFirst(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{Clock: clock.NewMock(), Buckets: buckets(perHour(9))})
	require.NoError(t, err)
	limit, err := throttlerhttp.New(limiter, &throttlerhttp.Options{Key: whoever})
	require.NoError(t, err)
	few, err := limiter.Consume("org:7", throttler.Cost(8))
	require.NoError(t, err)
	many, err := limiter.Consume("org:8")
	require.NoError(t, err)
	tells := func(v throttler.Verdict, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			throttlerhttp.SetFields(w.Header(), v)
			next.ServeHTTP(w, r)
		})
	}
	nothing := serve(t, throttler.Config{}, throttlerhttp.Options{Fields: throttlerhttp.NoFields, Buckets: buckets(perHour(9))}, tells(few, limit(ok)))
	for i, h := range []http.Handler{
		tells(few, tells(many, ok)), tells(many, tells(few, ok)), tells(few, limit(ok)), limit(tells(few, ok)), nothing,
	} {
		assert.Equal(t, []string{`"9/1h";r=1;t=3600`}, ask(h, "GET /").Header.Values("RateLimit"), i)
	}
}

// proxied returns a limit around a ReverseProxy to a server.
func proxied(t *testing.T, o throttlerhttp.Options, upstream http.Handler) http.Handler {
	server := httptest.NewServer(upstream)
	t.Cleanup(server.Close)
	to, err := url.Parse(server.URL)
	require.NoError(t, err)
	proxy := httputil.NewSingleHostReverseProxy(to)
	proxy.Transport = server.Client().Transport
	return serve(t, throttler.Config{Clock: clock.NewMock()}, o, proxy)
}

// sent sends a request to a handler through a real server.
func sent(t *testing.T, h http.Handler) reply {
	server := httptest.NewServer(h)
	defer server.Close()
	r, err := server.Client().Get(server.URL)
	require.NoError(t, err)
	require.NoError(t, r.Body.Close())
	return reply{r.StatusCode, r.Header, nil}
}

func TestFieldsOfAServerBehindAProxyAreInTheList(t *testing.T) {
	t.Parallel()
	own := throttlerhttp.Options{Buckets: buckets(perHour(9).Named("b"))}
	for upstream, want := range map[string]string{
		`"b";r=3;t=5`:                    `"b";r=3;t=5`,
		`"b";r=50;t=5`:                   `"b";r=8;t=3600`,
		`"other";r=3;t=5;x="y"`:          `"b";r=8;t=3600, "other";r=3;t=5;x="y"`,
		`"b";r=3;pk=:YQ==:`:              `"b";r=8;t=3600, "b";r=3;pk=:YQ==:`,
		`limit=10, remaining=5, reset=9`: `"b";r=8;t=3600`,
	} {
		for _, hints := range []bool{false, true} {
			r := sent(t, proxied(t, own, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("RateLimit", upstream)
				w.Header().Set("RateLimit-Policy", `"b";q=77`)
				if hints {
					w.WriteHeader(http.StatusEarlyHints)
				}
				_, _ = io.WriteString(w, "ok")
			})))
			require.Equal(t, http.StatusOK, r.StatusCode)
			require.Len(t, r.Header.Values("RateLimit"), 1, upstream)
			got := strings.Split(r.Header.Get("RateLimit"), ", ")
			assert.ElementsMatch(t, strings.Split(want, ", "), got, upstream)
			assert.Len(t, r.Header.Values("RateLimit-Policy"), 1)
			assert.Equal(t, strings.HasPrefix(want, `"b";r=3`), parsed(t, r, "RateLimit-Policy")["b"]["q"] == 77, "the policy is of the limit that is told")
		}
	}
}

func TestXFieldsAreOfOneLimiter(t *testing.T) {
	t.Parallel()
	own := throttlerhttp.Options{Buckets: buckets(perHour(9)), Fields: throttlerhttp.XSeconds}
	names := []string{"X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"}
	for _, c := range []struct {
		status         int
		upstream, want string
	}{
		{200, "5000 4999 60", "9 8 3600"}, {200, "5000 2 60", "5000 2 60"}, {200, "5000 8 60", "9 8 3600"},
		{200, "5000 none 60", "9 8 3600"}, {429, "5000 20 60", "5000 20 60"}, {429, "5000 none 60", "9 8 3600"}, {200, "- 2 -", "- 2 -"}, {200, "- - -", "9 8 3600"},
	} {
		r := ask(proxied(t, own, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			for i, value := range strings.Fields(c.upstream) {
				if value != "-" {
					w.Header().Set(names[i], value)
				}
			}
			w.WriteHeader(c.status)
		})), "GET /")
		got := []string{}
		for _, name := range names {
			require.LessOrEqual(t, len(r.Header.Values(name)), 1)
			if got = append(got, r.Header.Get(name)); r.Header.Get(name) == "" {
				got[len(got)-1] = "-"
			}
		}
		assert.Equal(t, c.want, strings.Join(got, " "), "%d %s", c.status, c.upstream)
	}
}

func TestXFieldsOfNestedLimitersAreOfTheNearest(t *testing.T) {
	t.Parallel()
	of := func(n int64) throttlerhttp.Options {
		return throttlerhttp.Options{Buckets: buckets(perHour(n)), Fields: throttlerhttp.XSeconds}
	}
	for _, h := range []http.Handler{inside(t, ok, of(2), of(9)), inside(t, ok, of(9), of(2))} {
		for remaining := 1; remaining >= 0; remaining-- {
			r := ask(h, "GET /")
			assert.Equal(t, []string{"2"}, r.Header.Values("X-RateLimit-Limit"))
			assert.Equal(t, []string{fmt.Sprint(remaining)}, r.Header.Values("X-RateLimit-Remaining"))
		}
		assert.Equal(t, "2", ask(h, "GET /").Header.Get("X-RateLimit-Limit"))
	}
}

func TestARedirectOfTheMuxHasTheFieldsOnce(t *testing.T) {
	t.Parallel()
	mux := http.NewServeMux()
	mux.Handle("/dir/", ok)
	r := ask(serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9).Named("b"))}, mux), "GET /dir")
	assert.Equal(t, "/dir/", r.Header.Get("Location"))
	assert.Equal(t, []string{`"b";r=8;t=3600`}, r.Header.Values("RateLimit"))
}

func TestFieldsOfStrangeNamesAreStructured(t *testing.T) {
	t.Parallel()
	for _, name := range []string{`"`, `\`, `\\"`, `a, b`, `;r=1;t=2`, `"a";r=0, "b`, ` `, `%00`, `:YQ==:`, `?1`, strings.Repeat(`"`, 64)} {
		h := inside(t, ok, throttlerhttp.Options{Buckets: buckets(perHour(9).Named(name))}, throttlerhttp.Options{Buckets: buckets(perHour(5).Named("inner"))},
			throttlerhttp.Options{Buckets: buckets(perHour(2).Named(name))})
		for _, r := range []reply{ask(h, "GET /"), ask(h, "GET /"), ask(h, "GET /")} {
			assert.Len(t, parsed(t, r, "RateLimit"), 2, name)
			assert.Equal(t, int64(2), parsed(t, r, "RateLimit-Policy")[name]["q"], name)
		}
	}
}

func TestWhatAHandlerRemovesStaysRemoved(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9)), Fields: throttlerhttp.Draft10 | throttlerhttp.XUnix, RefundIf: never},
		http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { clear(w.Header()) }))
	assert.Empty(t, ask(h, "GET /").Header)
}

func TestThePolicyIsTheFullLimitWhileTheLoadShrinksIt(t *testing.T) {
	t.Parallel()
	share := 1.0
	h := serve(t, throttler.Config{Load: func() float64 { return share }, Clock: clock.NewMock()},
		throttlerhttp.Options{
			Key:     func(r *http.Request) string { return r.URL.Path },
			Buckets: buckets(perHour(1000).Named("rigid"), perHour(64).Named("elastic").Continuous().Elastic(1)),
		}, ok)
	for n := 64; n > 1; n-- {
		share = float64(n) / 64
		header := ask(h, fmt.Sprint("GET /", n)).Header
		assert.Equal(t, `"rigid";q=1000;w=3600, "elastic";q=64;w=3600`, header.Get("RateLimit-Policy"))
		assert.Contains(t, header.Get("RateLimit"), fmt.Sprintf(`"elastic";r=%d`, n-1))
	}
}
