package throttlerhttp_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
	memstore "github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// manyRoutes returns n routes of one bucket each, and the requests for them.
func manyRoutes(n int, adds bool) (routes []throttlerhttp.Route, requests []string) {
	for i := range n {
		path := fmt.Sprint("/route/", i)
		routes = append(routes, throttlerhttp.Route{Pattern: "GET " + path, Adds: adds, Buckets: buckets(perHour(1))})
		requests = append(requests, "GET "+path)
	}
	return routes, requests
}

func TestAClientMayUseAnyNumberOfLimitedRoutes(t *testing.T) {
	t.Parallel()
	for _, n := range []int{20, 300} {
		for name, o := range map[string]throttlerhttp.Options{
			"of the routes":        {},
			"in place of others":   {Buckets: buckets(perHour(1))},
			"besides others":       {Buckets: buckets(perHour(1000), throttler.NewBucket(time.Minute, 1000))},
			"by address, and NATs": {Key: throttlerhttp.Address(nil)},
		} {
			var requests []string
			o.Routes, requests = manyRoutes(n, name == "besides others")
			h := serve(t, throttler.Config{}, o, ok)
			for i, request := range requests {
				require.Equal(t, http.StatusOK, ask(h, request).StatusCode, "%s, route %d", name, i)
			}
			for _, request := range requests {
				require.Equal(t, http.StatusTooManyRequests, ask(h, request).StatusCode, "%s, each has its limit", name)
			}
		}
	}
}

func TestARouteThatAddsTakesFromBothOrNeither(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	all := buckets(perHour(4).Named("all"))
	limit, err := throttlerhttp.New(limiter, &throttlerhttp.Options{
		Key: whoever, Buckets: all, RefundIf: func(status int) bool { return status == http.StatusTeapot },
		Routes: []throttlerhttp.Route{{
			Pattern: "GET /search", Adds: true, Buckets: buckets(perHour(2).Named("own")),
			Cost: func(r *http.Request) int64 { return int64(len(r.URL.Query()["n"])) },
		}},
	})
	require.NoError(t, err)
	status := http.StatusOK
	h := limit(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }))
	left := func() (got [2]int64) {
		for i, id := range []string{"user:42", throttlerhttp.RouteIdentifier("user:42", "GET /search")} {
			set := [2]throttler.Bucket{all[0], perHour(2).Named("GET /search own")}[i]
			v, err := limiter.Peek(t.Context(), id, throttler.Using(set), throttler.Cost(0))
			require.NoError(t, err)
			got[i] = v.Levels()[0].Remaining
		}
		return got
	}
	require.Equal(t, http.StatusOK, ask(h, "GET /search?n&n").StatusCode)
	assert.Equal(t, [2]int64{2, 0}, left())
	r := ask(h, "GET /search?n")
	require.Equal(t, http.StatusTooManyRequests, r.StatusCode)
	assert.Equal(t, [2]int64{2, 0}, left())
	assert.Equal(t, map[string]map[string]int64{"all": {"q": 4, "w": 3600}, "GET /search own": {"q": 2, "w": 3600}}, parsed(t, r, "RateLimit-Policy"))
	assert.Len(t, parsed(t, r, "RateLimit"), 2)

	require.NoError(t, limiter.Reset(t.Context(), throttlerhttp.RouteIdentifier("user:42", "GET /search")))
	assert.Equal(t, [2]int64{2, 2}, left())
	status = http.StatusTeapot
	for range 3 {
		require.Equal(t, http.StatusTeapot, ask(h, "GET /search?n&n").StatusCode, "what is refunded is there again, of both")
	}
	assert.Equal(t, [2]int64{2, 2}, left())
}

func TestNoKeyAndRouteHaveTheIdentifierOfAnother(t *testing.T) {
	t.Parallel()
	long := func(n int) string { return strings.Repeat("k", n) }
	keys := []string{
		"", "a", "a\x00", "a\x00b", "\x00", "\x00\x00", "\x00b", "b", "a\x00\x00b", "a\x00\x01b", "a\x01", "a{b}", "a\x00{b}",
		long(899), long(900), long(901), long(960), long(1022), long(1023), long(1024), long(5000), long(900) + "\x00",
	}
	routes := []string{"", "b", "\x00", "\x00b", "b\x00", "\x01b", "\x01", "\x00\x00b", "GET /users/{id}", "a", long(62), long(122), long(123), long(1024), long(3000)}
	for _, key := range keys[:8] { // names that an attacker might choose
		for _, route := range routes {
			keys = append(keys, throttlerhttp.RouteIdentifier(key, route))
		}
	}
	made, used := map[string]string{}, map[string]bool{}
	for _, key := range keys {
		if used[key] {
			continue
		}
		used[key] = true
		slot, _, _ := strings.Cut(throttlerhttp.RouteIdentifier(key, ""), "\x00")
		for _, route := range routes {
			id := throttlerhttp.RouteIdentifier(key, route)
			require.LessOrEqual(t, len(id), law.MaxIdentifier)
			require.NotContains(t, made, id, "%.40q, %.40q", key, route)
			made[id] = fmt.Sprintf("%.40q, %.40q", key, route)
			before, _, _ := strings.Cut(id, "\x00")
			require.Equal(t, slot, before, "all of a key are equal up to the first NUL")
		}
	}
	assert.Equal(t, "user:42\x00POST /login", throttlerhttp.RouteIdentifier("user:42", "POST /login"))
	assert.Equal(t, "user:42", throttlerhttp.RouteIdentifier("user:42", ""))
}

func TestAKeyOfAnyBytesAndLengthIsAClient(t *testing.T) {
	t.Parallel()
	for _, key := range []string{strings.Repeat("k", 1024), strings.Repeat("k", 100_000), "a\x00GET /own", "\x00"} {
		h := serve(t, throttler.Config{}, throttlerhttp.Options{
			Key:     func(r *http.Request) string { return key + r.Header.Get("Who") },
			Buckets: buckets(perHour(3)), Routes: []throttlerhttp.Route{
				{Pattern: "GET /own", Buckets: buckets(perHour(1))}, {Pattern: "GET /adds", Adds: true, Buckets: buckets(perHour(2))},
			},
		}, ok)
		for _, who := range []string{"", "x"} {
			assert.Equal(t, 2, admitted(h, 3, "GET /adds", "Who", who))
			assert.Equal(t, 1, admitted(h, 3, "GET /own", "Who", who))
			assert.Equal(t, 1, admitted(h, 3, "GET /", "Who", who))
		}
	}
}

func TestNobodyIsChargedOnTheRouteOfAnother(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{
		Key: func(r *http.Request) string { return "user:" + r.URL.Query().Get("id") },
		// if the identifiers were equal, the bucket of the route would be found
		Buckets: buckets(perHour(1).Named("POST /login x")),
		Routes:  []throttlerhttp.Route{{Pattern: "POST /login", Buckets: buckets(perHour(1).Named("x"))}},
	}, ok)
	require.Equal(t, http.StatusOK, ask(h, "GET /?id=42%00POST%20/login").StatusCode)
	assert.Equal(t, http.StatusOK, ask(h, "POST /login?id=42").StatusCode)
}

func TestAConfigurationThatCannotWorkIsAFault(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	named := func(prefix string, n int) (b []throttler.Bucket) {
		for i := range n {
			b = append(b, perHour(1).Named(fmt.Sprint(prefix, i)))
		}
		return b
	}
	tier := func(*http.Request) string { return "" }
	for name, c := range map[string]struct {
		o    throttlerhttp.Options
		said string
	}{
		"tiers of other names":   {throttlerhttp.Options{Buckets: named("a", 9), Tier: tier, Tiers: map[string][]throttler.Bucket{"b": named("b", 8)}}, "17 different buckets"},
		"tiers of other kinds":   {throttlerhttp.Options{Buckets: named("a", 16), Tier: tier, Tiers: map[string][]throttler.Bucket{"b": {perHour(1).SlidingLog().Named("a0")}}}, "17 different buckets"},
		"tiers of other periods": {throttlerhttp.Options{Buckets: named("a", 16), Tier: tier, Tiers: map[string][]throttler.Bucket{"b": {throttler.NewBucket(time.Second, 1).Named("a0")}}}, "17 different buckets"},
		"tiers of other limits":  {throttlerhttp.Options{Buckets: named("a", 16), Tier: tier, Tiers: map[string][]throttler.Bucket{"b": {perHour(2).Named("a0")}}}, ""},
		"routes of one name": {throttlerhttp.Options{Routes: []throttlerhttp.Route{
			{Pattern: "/a", Name: "r", Buckets: named("a", 10)}, {Pattern: "/b", Name: "r", Buckets: named("b", 7)}}}, `the Name "r" have 17 different buckets`},
		"routes of other names": {throttlerhttp.Options{Buckets: named("a", 16), Routes: []throttlerhttp.Route{
			{Pattern: "/a", Adds: true, Buckets: named("a", 16)}, {Pattern: "/b", Adds: true, Buckets: named("b", 16)}}}, ""},
		"a name twice in an answer": {throttlerhttp.Options{Buckets: buckets(perHour(1).Named("r x")), Routes: []throttlerhttp.Route{
			{Pattern: "/a", Name: "r", Adds: true, Buckets: buckets(perHour(1).Named("x"))}}}, `Adds a bucket "r x" to one of this name`},
	} {
		_, err := throttlerhttp.New(limiter, &c.o)
		if c.said == "" {
			assert.NoError(t, err, name)
		} else {
			assert.ErrorContains(t, err, c.said, name)
		}
	}
}

func TestPatternsOfOtherRoutersAreFaultsThatSayHowTheyAreWritten(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	for pattern, right := range map[string]string{
		"/api/*": "/api/", "/api/**": "/api/", "/api*": "/api/", "*": "/", "/*": "/", "GET /files/*path": "GET /files/{path...}",
		"/a/*/b": "/a/{any}/b", "/a/(.*)": "/a/", "/a/.*": "/a/", "/a/:rest*": "/a/{rest...}", "/img/*.png": "/img/{png}", "/*/": "/{any}/",
		"/users/:id": "/users/{id}", "GET /users/:id/posts/:post": "GET /users/{id}/posts/{post}", "/users/:id?": "/users/{id}", `/users/:id(\d+)`: "/users/{id}",
		"/users/<id>": "/users/{id}", "/users/<int:id>": "/users/{id}", "/files/<path:rest>": "/files/{rest...}",
		"/a/{id:[0-9]+}": "/a/{id}", "/a/{id:[0-9]{2,3}}/b": "/a/{id}/b", "/a/{id:a/b}": "/a/{id}", "/a/{id:int}": "/a/{id}", "/a/{id?}": "/a/{id}", "/a/{*rest}": "/a/{rest...}", "/a/{user-id}": "/a/{user_id}",
		"/users/[id]": "/users/{id}", "/a/[...slug]": "/a/{slug...}", "^/api/$": "/api/", `/a/\d+`: "/a/{any}",
		"POST /v1/books:archive": "POST /v1/books%3Aarchive",
		"post /login":            "POST /login", "get /a": "GET /a", "Get /a": "GET /a", "gEt\t/a": "GET\t/a", "ANY /a": "/a", "all /a": "/a", "* /a": "/a", "GET|POST /a": "GET /a",
		"POST:/login": "POST /login", "POST/login": "POST /login", "POST: /login": "POST /login", "OPTIONS": "OPTIONS /", "/login POST": "POST /login",
		"GET  /x": "GET /x", " /x": "/x", "/x ": "/x", "GET /x ": "GET /x", "GET /x\t": "GET /x", "\tGET /x": "GET /x",
		"http://example.com/x": "example.com/x", "https://Example.com:8443/x": "example.com/x", "https://example.com": "example.com/", "POST https://example.com/x": "POST example.com/x",
		"example.com:8080/x": "example.com/x", "Example.COM/x": "example.com/x", "example.com./x": "example.com/x", "localhost:8080/x": "localhost/x", ":8080/x": "/x", "*.example.com/x": "/x",
		"login": "/login", "api/users": "/api/users", "POST login": "POST /login", "GET api/{id}": "GET /api/{id}", "./x": "/x", "../x": "/x",
		"/a//b": "/a/b", "//a": "/a", "/a/../b": "/b", "/./login": "/login", "/a/b/..": "/a", "GET /a//b/": "GET /a/b/", "/a/.": "/a",
		"/%6Cogin": "/login", "/a%2Fb": "/a/b", "GET /login%2f": "GET /login/", "/a/%2e%2e/b": "/b",
		"/login$": "/login", "/users/$id": "/users/{id}", "/(login|logout)": "/{any}", "~ /login": "/login", "~* /login$": "/login", "= /login": "/login",
		"GET /x HTTP/1.1": "GET /x", "/a b": "/a%20b", "GET, POST /x": "GET /x", "/log.*": "/log/", "/users/[[...id]]": "/users/{id...}",
		`/users/(?P<id>\d+)`: "/users/{id}", "/users/#{id}": "/users/{id}", "/a|b": "/{any}",
		"/search?q=1": "/search", "/search?": "/search", "/a#b": "/a", "GET /search?q={q}": "GET /search",
	} {
		route := throttlerhttp.Route{Pattern: pattern, Name: "r", Buckets: buckets(perHour(1))}
		_, err := throttlerhttp.New(limiter, &throttlerhttp.Options{Routes: []throttlerhttp.Route{route}})
		assert.ErrorContains(t, err, fmt.Sprintf("Options.Routes[0] %q: it would not match what it seems to: a pattern of http.ServeMux is written %q", pattern, right))
		route.Pattern = right
		_, err = throttlerhttp.New(limiter, &throttlerhttp.Options{Routes: []throttlerhttp.Route{route}})
		assert.NoError(t, err, "what is said of %q can be used", pattern)
	}
	_, err = throttlerhttp.New(limiter, &throttlerhttp.Options{Routes: []throttlerhttp.Route{{Pattern: "/users/:id", Buckets: buckets(perHour(1))}}})
	assert.ErrorContains(t, err, "a literal : is written %3A")
}

func TestALiteralStarOrColonIsWrittenAsAnEscape(t *testing.T) {
	t.Parallel()
	for pattern, paths := range map[string][]string{
		"POST /v1/books%3Aarchive": {"/v1/books:archive", "/v1/books%3Aarchive", "/v1/books%3aarchive"},
		"POST /glob/%2A":           {"/glob/*", "/glob/%2A"},
		"POST /a%20b/%7Bc%7D":      {"/a%20b/%7Bc%7D", "/a%20b/{c}"},
		"POST /odata/%24metadata":  {"/odata/$metadata", "/odata/%24metadata"},
		"POST /a$b":                {"/a$b"},
		"POST\t/tab":               {"/tab"},
		"POST /wiki/Go_(language)": {"/wiki/Go_(language)", "/wiki/Go_%28language%29"},
		"POST /caf\u00e9":          {"/caf%C3%A9"},
		"POST /caf%C3%A9":          {"/caf%C3%A9"},
		"PROPFIND-X /dav/":         nil,
		"CONNECT example.com:443/": nil,
		"POST 192.0.2.1/":          nil,
		"POST localhost/x":         nil,
		"POST [::1]/x":             nil,
	} {
		h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(1000)),
			Routes: []throttlerhttp.Route{{Pattern: pattern, Name: "r", Buckets: buckets(perHour(int64(len(paths) + 1)))}}}, ok)
		for _, path := range paths {
			assert.Contains(t, ask(h, "POST "+path).Header.Get("RateLimit"), `"r `, "%s: %s", pattern, path)
		}
	}
}

// FuzzPattern checks that New never panics, and that it accepts the form of a pattern that its error proposes.
func FuzzPattern(f *testing.F) {
	for _, seed := range []string{"/api/*", "GET /users/:id", "{", "/{a:[{]}", "<>", "/<:>/[]", "%", "/%2", "GET\t/x", "/$a|(?P<x>", "a b c", "://", "*.*/*.*", "^$", "//", "..", ":", "\\", "/:", "?/", "http://", "a:b:c/d"} {
		f.Add(seed)
	}
	limiter, err := throttler.New(throttler.Config{})
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, pattern string) {
		_, err := throttlerhttp.New(limiter, &throttlerhttp.Options{Routes: []throttlerhttp.Route{{Pattern: pattern, Name: "r", Buckets: buckets(perHour(1))}}})
		if err == nil {
			return
		}
		_, said, found := strings.Cut(err.Error(), "is written ")
		if !found {
			return
		}
		var right string
		_, scanErr := fmt.Sscanf(said, "%q", &right)
		require.NoError(t, scanErr)
		_, err = throttlerhttp.New(limiter, &throttlerhttp.Options{Routes: []throttlerhttp.Route{{Pattern: right, Name: "r", Buckets: buckets(perHour(1))}}})
		if err != nil {
			require.NotContains(t, err.Error(), "is written", "%q, of %q", right, pattern)
		}
	})
}

func TestThePathIsComparedInTheFormTheRouterDecidesBy(t *testing.T) {
	t.Parallel()
	plain := []string{"/login", "//login", "/./login", "/x/../login", "/login/.", "/%6Cogin", "/login?q=1"}
	cased := []string{"/LOGIN", "/Login", "/%4Cogin", "//LOGIN", "/./LOGIN"}
	slashed := []string{"/login/", "/login//", "/login%2F", "/login%2f", "//login/", "/./login/"}
	both := []string{"/LOGIN/", "/LOGIN%2F", "/%4COGIN/"}
	for _, c := range []struct {
		o    throttlerhttp.Options
		are  [][]string
		not  [][]string
		want string
	}{
		{throttlerhttp.Options{}, [][]string{plain}, [][]string{cased, slashed, both}, "POST /login"},
		{throttlerhttp.Options{IgnoreCase: true}, [][]string{plain, cased}, [][]string{slashed, both}, "POST /LogIn"},
		{throttlerhttp.Options{IgnoreSlash: true}, [][]string{plain, slashed}, [][]string{cased, both}, "POST /login"},
		{throttlerhttp.Options{IgnoreCase: true, IgnoreSlash: true}, [][]string{plain, cased, slashed, both}, nil, "POST /login"},
	} {
		for _, all := range []bool{false, true} { // without and with a route for everything else
			c.o.Buckets = buckets(perHour(1 << 40))
			c.o.Routes = []throttlerhttp.Route{{Pattern: c.want, Name: "login", Buckets: buckets(perHour(1 << 40))}}
			if all {
				c.o.Routes = append(c.o.Routes, throttlerhttp.Route{Pattern: "/{rest...}", Name: "rest", Buckets: buckets(perHour(1 << 40))})
			}
			h := serve(t, throttler.Config{}, c.o, ok)
			for i, paths := range append(append([][]string{}, c.are...), c.not...) {
				for _, path := range paths {
					r := ask(h, "POST "+path)
					if r.StatusCode == http.StatusBadRequest && all {
						continue // the path belongs to two routes
					}
					assert.Equal(t, i < len(c.are), strings.Contains(r.Header.Get("RateLimit"), `"login `), "%s, %+v", path, c.o.Routes)
				}
			}
		}
	}
}

func TestIgnoringCaseAndSlashLeavesOtherRoutesAsTheyAre(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{
		IgnoreCase: true, IgnoreSlash: true, Buckets: buckets(perHour(1 << 40)),
		Routes: []throttlerhttp.Route{
			{Pattern: "/API/", Name: "api", Buckets: buckets(perHour(1 << 40))},
			{Pattern: "GET /api/Users/{ID}", Name: "user", Buckets: buckets(perHour(1 << 40))},
			{Pattern: "/static/", Free: true},
			{Pattern: "/{$}", Name: "root", Buckets: buckets(perHour(1 << 40))},
		},
	}, ok)
	for path, route := range map[string]string{
		"/api": "api", "/api/": "api", "/Api/x/Y": "api", "/api/users/X": "user", "/API/USERS/x/": "user", "/": "root", "//": "root",
		"/STATIC/x": "", "/static/": "", "/static/%2e%2e/API/": "api", "/\u212A": "1099511627776/1h",
	} {
		fields := ask(h, "GET "+path).Header.Get("RateLimit")
		if route == "" {
			assert.Empty(t, fields, path)
		} else {
			assert.True(t, strings.HasPrefix(fields, `"`+route), "%s: %s", path, fields)
		}
	}
}

func TestAMethodMayBeFreeBesideAnyPattern(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{
		Buckets: buckets(perHour(1)),
		Routes: []throttlerhttp.Route{
			{Pattern: "OPTIONS /", Free: true}, {Pattern: "HEAD /", Free: true},
			{Pattern: "/api/", Buckets: buckets(perHour(1))},
			{Pattern: "GET /api/data", Buckets: buckets(perHour(1))},
			{Pattern: "/users/{id}", Buckets: buckets(perHour(1))},
			{Pattern: "OPTIONS /costly/", Buckets: buckets(perHour(1))},
			{Pattern: "HEAD /costly/x", Buckets: buckets(perHour(1))},
		},
	}, ok)
	for _, path := range []string{"/", "/api/x", "/api/data", "/users/7", "/api%2Fdata", "//api/x", "/other/../api/x"} {
		assert.Equal(t, 5, admitted(h, 5, "OPTIONS "+path), path)
		assert.Equal(t, 5, admitted(h, 5, "HEAD "+path), path)
	}
	for _, limited := range []string{"GET /", "GET /api/x", "GET /api/data", "POST /users/7", "OPTIONS /costly/x", "HEAD /costly/x"} {
		assert.Equal(t, 1, admitted(h, 3, limited), limited)
	}
	assert.Zero(t, admitted(h, 1, "options /"), "a method has a case")

	limiter, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	_, err = throttlerhttp.New(limiter, &throttlerhttp.Options{Routes: []throttlerhttp.Route{{Pattern: "OPTIONS /", Free: true}, {Pattern: "OPTIONS\t/", Free: true}}})
	assert.ErrorContains(t, err, "there is another Route for it")
	_, err = throttlerhttp.New(limiter, &throttlerhttp.Options{Routes: []throttlerhttp.Route{{Pattern: "GET /", Free: true}, {Pattern: "/api/", Free: true}}})
	assert.ErrorContains(t, err, "conflicts with", "GET is more than an exception")
}

func TestEachAnswerThatIsNotOfTheHandlerOrA429IsToldToOnError(t *testing.T) {
	t.Parallel()
	var told []error
	var observed []throttler.Event
	o := throttlerhttp.Options{
		Key: func(r *http.Request) string { return r.Header.Get("Who") }, Buckets: buckets(perHour(1)),
		Tier: func(r *http.Request) string { return r.Header.Get("Plan") }, Tiers: map[string][]throttler.Bucket{"free": buckets(perHour(9))},
		Cost:    func(r *http.Request) int64 { return int64(len(r.Header.Get("Cost"))) - 1 },
		Routes:  []throttlerhttp.Route{{Pattern: "/a/{b}", Buckets: buckets(perHour(9))}, {Pattern: "/a/b/c", Buckets: buckets(perHour(9))}},
		OnError: func(r *http.Request, err error) { assert.NotNil(t, r); told = append(told, err) },
	}
	c := throttler.Config{Observe: func(_ context.Context, e *throttler.Event) { observed = append(observed, *e) }}
	h := serve(t, c, o, ok)
	broken := c
	broken.Storage = failing{memstore.New(nil), throttler.ErrUnavailable}
	down := serve(t, broken, o, ok)
	allowed := broken
	allowed.OnStorageError = throttler.Allow
	open := serve(t, allowed, o, ok)
	o.OnError = nil
	silent := serve(t, c, o, ok)
	for _, c := range []struct {
		h        http.Handler
		what     string
		fields   []string
		status   int
		said     string
		observed int
	}{
		{h, "GET /", []string{"Who", "a", "Cost", "11"}, 200, "", 1},
		{h, "GET /", []string{"Who", "a", "Cost", "11"}, 429, "", 1},
		{h, "GET /", []string{"Cost", "11"}, 500, "knows nobody", 1},
		{h, "GET /", []string{"Who", "a", "Cost", "11", "Plan", "gold"}, 500, `returned "gold"`, 1},
		{h, "GET /a/b%2Fc", []string{"Who", "a", "Cost", "11"}, 400, "the path is of one Route", 1},
		{h, "GET /", []string{"Who", "a"}, 400, "cost", 1},
		{h, "GET /", []string{"Who", "a", "Cost", "111"}, 413, "waiting never helps", 1},
		{down, "GET /", []string{"Who", "a", "Cost", "11"}, 503, throttler.ErrUnavailable.Error(), 1},
		{open, "GET /", []string{"Who", "a", "Cost", "11"}, 200, "", 1},
		{silent, "GET /", []string{"Cost", "11"}, 500, "", 1},
		{silent, "GET /a/b%2Fc", []string{"Who", "a", "Cost", "11"}, 400, "", 1},
	} {
		told, observed = nil, nil
		assert.Equal(t, c.status, ask(c.h, c.what, c.fields...).StatusCode, "%+v", c)
		assert.Len(t, observed, c.observed, "%+v", c)
		if c.said == "" {
			assert.Empty(t, told, "%+v", c)
		} else if assert.Len(t, told, 1, "%+v", c) {
			assert.ErrorContains(t, told[0], c.said)
		}
	}
}

// slow is a storage that answers only when the context ends.
type slow struct {
	storage.Storage

	asked chan struct{}
	err   error // joined with that of the context
}

func (s slow) Decide(ctx context.Context, _ *storage.Request, _ *storage.Answer) error {
	s.asked <- struct{}{}
	<-ctx.Done()
	return errors.Join(ctx.Err(), s.err)
}

func TestAClientThatLeavesWhileTheStorageIsSlowIsNoError(t *testing.T) {
	t.Parallel()
	for _, err := range []error{nil, throttler.ErrUnavailable} {
		var told, refused atomic.Int64
		asked, done := make(chan struct{}), make(chan int, 1)
		h := serve(t, throttler.Config{Storage: slow{memstore.New(nil), asked, err}}, throttlerhttp.Options{
			Buckets: buckets(perHour(1)), RefundIf: never,
			OnError: func(*http.Request, error) { told.Add(1) },
			Refuse:  func(http.ResponseWriter, *http.Request, throttlerhttp.Refusal) { refused.Add(1) },
		}, ok)
		server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			log := httptest.NewRecorder()
			h.ServeHTTP(log, r)
			assert.Zero(t, log.Body.Len())
			assert.Empty(t, log.Header())
			done <- log.Code
		}))
		ctx, leave := context.WithCancel(t.Context())
		r, reqErr := http.NewRequestWithContext(ctx, http.MethodGet, server.URL, nil)
		require.NoError(t, reqErr)
		go func() {
			<-asked
			leave()
		}()
		res, doErr := server.Client().Do(r)
		if doErr == nil {
			_ = res.Body.Close()
		}
		assert.ErrorIs(t, doErr, context.Canceled)
		assert.Equal(t, 499, <-done)
		server.Close()
		assert.Zero(t, told.Load()+refused.Load())
	}
}

func TestADeadlineOfTheServerIsAnError(t *testing.T) {
	t.Parallel()
	var told atomic.Int64
	asked := make(chan struct{}, 2)
	answered := make(chan struct{})
	limited := serve(t, throttler.Config{Storage: slow{memstore.New(nil), asked, nil}}, throttlerhttp.Options{
		Buckets: buckets(perHour(1)), OnError: func(_ *http.Request, err error) {
			assert.ErrorIs(t, err, context.DeadlineExceeded)
			told.Add(1)
		},
	}, ok)
	inner := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer close(answered)
		limited.ServeHTTP(w, r)
	})
	assert.Equal(t, http.StatusServiceUnavailable, ask(http.TimeoutHandler(inner, 10*time.Millisecond, "late"), "GET /").StatusCode)
	<-answered
	assert.Equal(t, int64(1), told.Load())

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	w := httptest.NewRecorder()
	limited.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil).WithContext(ctx))
	assert.Equal(t, http.StatusServiceUnavailable, w.Code)
	assert.Equal(t, int64(2), told.Load())
}

func TestARouteInPlaceOfTiersNeedsNoTier(t *testing.T) {
	t.Parallel()
	asked := 0
	h := serve(t, throttler.Config{}, throttlerhttp.Options{
		Tier:  func(*http.Request) string { asked++; return "unknown" },
		Tiers: map[string][]throttler.Bucket{"free": buckets(perHour(9))},
		Routes: []throttlerhttp.Route{
			{Pattern: "/login", Buckets: buckets(perHour(1))},
			{Pattern: "/search", Key: whoever},
		},
	}, ok)
	assert.Equal(t, 1, admitted(h, 3, "GET /login"))
	assert.Zero(t, asked)
	assert.Equal(t, http.StatusInternalServerError, ask(h, "GET /search").StatusCode)
}
