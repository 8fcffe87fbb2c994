package throttlerhttp_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/dunglas/httpsfv"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/throttlerhttp"
)

func TestThePolicyIsThatOfTheLimitThatIsTold(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{Clock: clock.NewMock()})
	require.NoError(t, err)
	few, many := throttler.Using(perHour(3).Named("b")), throttler.Using(perHour(9).Named("b"))
	for name, parts := range map[string][]throttler.Part{
		"few first":  {throttler.For("1", few), throttler.For("2", many)},
		"many first": {throttler.For("3", many), throttler.For("4", few)},
	} {
		v, err := limiter.ConsumeAll(t.Context(), parts...)
		require.NoError(t, err)
		w := httptest.NewRecorder()
		throttlerhttp.Refuse(w, httptest.NewRequest(http.MethodGet, "/", nil), v)
		assert.Equal(t, []string{`"b";r=2;t=3600`}, w.Header().Values("RateLimit"), name)
		assert.Equal(t, []string{`"b";q=3;w=3600`}, w.Header().Values("RateLimit-Policy"), name)
	}
}

// bomb returns a list of n limits or policies.
func bomb(n int, parameters string) string {
	var list strings.Builder
	for i := range n {
		fmt.Fprintf(&list, `"%d"%s, `, i, parameters)
	}
	return strings.TrimSuffix(list.String(), ", ")
}

func TestAListOfThousandsOfLimitsIsIgnored(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9).Named("b"))}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Add("RateLimit", bomb(50_000, ";r=1;t=1"))
		w.Header().Add("RateLimit-Policy", bomb(50_000, ";q=1"))
		_, _ = io.WriteString(w, "ok")
	}))
	start := time.Now()
	assert.Equal(t, []string{`"b";r=8;t=3600`}, ask(h, "GET /").Header.Values("RateLimit"))
	assert.Less(t, time.Since(start), 5*time.Second, "it took minutes, the square of their number")
}

func TestAListOfManyLimitsIsMergedAtOnce(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9).Named("b"))}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Add("RateLimit", bomb(1000, ";r=1;t=1"))
	}))
	assert.Len(t, parsed(t, ask(h, "GET /"), "RateLimit"), 1001)
}

func TestTransportIgnoresAListThatIsTooLong(t *testing.T) {
	t.Parallel()
	for name, field := range map[string]string{
		"limits":     bomb(100_000, ";r=0;t=60"),
		"parameters": `"a";r=0;t=60` + strings.Repeat(";a=1", 200_000),
		"name":       `"` + strings.Repeat("a", 1_000_000) + `";r=0;t=60`,
	} {
		tr := throttlerhttp.NewTransport(tripper(func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Ratelimit": {field}}, Body: http.NoBody}, nil
		}), nil)
		for range 10 { // if the list counted, the second request would wait for a minute
			r, err := http.NewRequest(http.MethodGet, "http://example.com/", nil)
			require.NoError(t, err)
			resp, err := tr.RoundTrip(r)
			require.NoError(t, err, name)
			require.NoError(t, resp.Body.Close())
		}
	}
}

func TestPoliciesWithoutLimitsStay(t *testing.T) {
	t.Parallel()
	for _, refund := range []bool{false, true} {
		h := serve(t, throttler.Config{Clock: clock.NewMock()}, throttlerhttp.Options{Buckets: buckets(perHour(9).Named("b")), RefundIf: func(int) bool { return refund }},
			http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Header().Add("RateLimit-Policy", `"other";q=1`) }))
		r := ask(h, "GET /")
		assert.Equal(t, map[string]map[string]int64{"b": {"q": 9, "w": 3600}, "other": {"q": 1}}, parsed(t, r, "RateLimit-Policy"))
		assert.Equal(t, map[bool]string{false: `"b";r=8;t=3600`, true: `"b";r=9`}[refund], r.Header.Get("RateLimit"))
	}
}

// FuzzFieldsOfOthers checks that whatever others put into an answer is merged with the limits of the middleware into one
// list, or ignored.
func FuzzFieldsOfOthers(f *testing.F) {
	for _, lines := range [][2]string{
		{`"b";r=3;t=5`, `"b";q=77`}, {`"b";r=1, "b";r=0`, `"b"`}, {`"b";r=3;pk=:YQ==:`, ``}, {`b;r=1, 5, :YQ==:, ("b" "c");r=0`, `?1`}, {`"";r=0`, `"";q=1`}, {`"b`, `"`},
		{`"b";r=-1;t=-1`, `"b";q=-1`}, {`"c";r="x"`, `"c", "c"`},
	} {
		f.Add(lines[0], lines[1], true)
	}
	limiter, err := throttler.New(throttler.Config{Clock: clock.NewMock()})
	require.NoError(f, err)
	limit, err := throttlerhttp.New(limiter, &throttlerhttp.Options{Key: whoever, Buckets: buckets(perHour(1 << 40).Named("b")), Fields: throttlerhttp.Draft10 | throttlerhttp.XSeconds})
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, limits, policies string, add bool) {
		for _, h := range []http.Handler{limit(ok), ok} {
			inner := h
			r := ask(limit(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				put := w.Header().Set
				if add {
					put = w.Header().Add
				}
				put("RateLimit", limits)
				put("RateLimit-Policy", policies)
				put("X-RateLimit-Remaining", limits)
				inner.ServeHTTP(w, r)
			})), "GET /")
			require.Len(t, r.Header.Values("RateLimit"), 1)
			require.Len(t, r.Header.Values("RateLimit-Policy"), 1)
			require.Len(t, r.Header.Values("X-RateLimit-Remaining"), 1)
			_, err := httpsfv.UnmarshalList(r.Header.Values("RateLimit"))
			require.NoError(t, err)
			require.Contains(t, r.Header.Get("RateLimit"), `"b"`)
			require.Contains(t, r.Header.Get("RateLimit-Policy"), `"b"`)
		}
	})
}
