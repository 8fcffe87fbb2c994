package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/go-chi/httprate"
	"github.com/sethvargo/go-limiter/httplimit"
	"github.com/sethvargo/go-limiter/memorystore"
	"github.com/throttled/throttled/v2"
	"github.com/throttled/throttled/v2/store/memstore"
	"github.com/ulule/limiter/v3"
	"github.com/ulule/limiter/v3/drivers/middleware/stdlib"
	ululemem "github.com/ulule/limiter/v3/drivers/store/memory"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// middleware has two limits for each address, in this process.
type middleware struct {
	name string
	wrap func(http.Handler) (http.Handler, error)
}

var middlewares = []middleware{
	{"throttlerhttp", throttlerMiddleware(0)},
	{"throttlerhttp, NoFields", throttlerMiddleware(throttlerhttp.NoFields)},
	{"without a limiter", func(h http.Handler) (http.Handler, error) { return h, nil }},
	{"without a limiter, with the fields", fieldsOnly},
	{"go-limiter, httplimit", nested(goLimiterMiddleware)},
	{"throttled", nested(throttledMiddleware)},
	{"ulule/limiter, stdlib", nested(ululeMiddleware)},
	{"httprate", nested(httprateMiddleware)},
}

func throttlerMiddleware(fields throttlerhttp.Fields) func(http.Handler) (http.Handler, error) {
	return func(h http.Handler) (http.Handler, error) {
		t, err := throttler.New(throttler.Config{})
		if err != nil {
			return nil, err
		}
		o := &throttlerhttp.Options{Fields: fields}
		for _, l := range plenty(2, 1e8) {
			o.Buckets = append(o.Buckets, throttler.NewBucket(l.period, l.n))
		}
		limited, err := throttlerhttp.New(t, o)
		if err != nil {
			return nil, err
		}
		return limited(h), nil
	}
}

// fieldsOnly is the floor for middleware that tells clients their limits. It sets two fields to constant values.
func fieldsOnly(h http.Handler) (http.Handler, error) {
	policy, level := []string{`"100000000/10s";q=100000000;w=10, "100000000/1h";q=100000000;w=3600`}, []string{`"100000000/10s";r=99999999;t=10, "100000000/1h";r=99999999;t=3600`}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fields := w.Header()
		fields["Ratelimit-Policy"], fields["Ratelimit"] = policy, level
		h.ServeHTTP(w, r)
	}), nil
}

// nested puts a middleware for each limit around another.
func nested(one func(limit, http.Handler) (http.Handler, error)) func(http.Handler) (http.Handler, error) {
	return func(h http.Handler) (_ http.Handler, err error) {
		for _, l := range plenty(2, 1e8) {
			if h, err = one(l, h); err != nil {
				return nil, err
			}
		}
		return h, nil
	}
}

func goLimiterMiddleware(l limit, h http.Handler) (http.Handler, error) {
	store, err := memorystore.New(&memorystore.Config{Tokens: uint64(l.n), Interval: l.period})
	if err != nil {
		return nil, err
	}
	m, err := httplimit.NewMiddleware(store, httplimit.IPKeyFunc())
	if err != nil {
		return nil, err
	}
	return m.Handle(h), nil
}

func throttledMiddleware(l limit, h http.Handler) (http.Handler, error) {
	store, err := memstore.NewCtx(65536)
	if err != nil {
		return nil, err
	}
	limiter, err := throttled.NewGCRARateLimiterCtx(store, quota(l))
	if err != nil {
		return nil, err
	}
	m := throttled.HTTPRateLimiterCtx{RateLimiter: limiter, VaryBy: &throttled.VaryBy{RemoteAddr: true}}
	return m.RateLimit(h), nil
}

func ululeMiddleware(l limit, h http.Handler) (http.Handler, error) {
	instance := limiter.New(ululemem.NewStore(), limiter.Rate{Period: l.period, Limit: l.n})
	return stdlib.NewMiddleware(instance).Handler(h), nil
}

func httprateMiddleware(l limit, h http.Handler) (http.Handler, error) {
	return httprate.LimitBy(int(l.n), l.period, func(r *http.Request) (string, error) {
		ip, _, err := net.SplitHostPort(r.RemoteAddr)
		return httprate.CanonicalizeIP(ip), err
	})(h), nil
}

func (b *bench) http(ctx context.Context) error {
	const name = "http/connections=64"
	if !b.wants(name) {
		return nil
	}
	wrk, _ := exec.LookPath("wrk")
	if wrk == "" {
		fmt.Fprintln(os.Stderr, "http is left out: there is no wrk here; on Debian, apt-get install wrk")
		b.report.noHTTP()
		return nil
	}
	var all []contender
	for _, m := range middlewares {
		all = append(all, contender{name: m.name})
	}
	turns, err := rounds(ctx, b, name, len(all), func(i int) (turn, error) {
		url, done, err := serve(middlewares[i]) // a new limiter for each turn, as for the cases in process
		if err != nil {
			return turn{}, fmt.Errorf("%s: %w", all[i].name, err)
		}
		defer done()
		return request(ctx, wrk, url)
	})
	if err != nil {
		return err
	}
	b.report.http(rowsOf(all, turns))
	return nil
}

// serve starts a server that answers each request with two bytes.
func serve(m middleware) (url string, done func(), err error) {
	h, err := m.wrap(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }))
	if err != nil {
		return "", nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	s := &http.Server{Handler: h}
	go func() { _ = s.Serve(l) }()
	return "http://" + l.Addr().String() + "/", func() { _ = s.Close() }, nil
}

// request lets wrk send requests for a second, which is the shortest time it accepts.
func request(ctx context.Context, wrk, url string) (t turn, err error) {
	before := ownTime()
	out, err := exec.CommandContext(ctx, wrk, "-t1", "-c64", "-d1s", "--latency", url).CombinedOutput()
	if err != nil {
		return t, fmt.Errorf("wrk: %w: %s", err, out)
	}
	t.server, t.elapsed = ownTime()-before, time.Second
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "50%"):
			t.p50, err = latency(line, err)
		case strings.HasPrefix(line, "99%"):
			t.p99, err = latency(line, err)
		case strings.Contains(line, " requests in "):
			var took string
			if _, err := fmt.Sscanf(line, "%d requests in %s", &t.decisions, &took); err != nil {
				return t, err
			}
			t.elapsed, err = time.ParseDuration(strings.TrimSuffix(took, ","))
		case strings.HasPrefix(line, "Non-2xx"):
			if _, err := fmt.Sscanf(line, "Non-2xx or 3xx responses: %d", &t.failed); err != nil {
				return t, err
			}
		case strings.HasPrefix(line, "Socket errors"):
			err = errors.Join(err, errors.New(line))
		}
	}
	if t.decisions == 0 && err == nil {
		err = fmt.Errorf("wrk said no number of requests: %s", out)
	}
	t.decisions -= t.failed
	return t, err
}

func latency(line string, before error) (time.Duration, error) {
	d, err := time.ParseDuration(strings.Fields(line)[1])
	return d, errors.Join(before, err)
}
