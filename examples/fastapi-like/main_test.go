package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"html/template"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/storage"
)

const (
	hello  = `{"message":"Hello User, you have access!"}`
	limit  = `{"message":"You've reached the limit!"}`
	secret = "s3cret-key"
)

// TestMain runs the program itself if the environment says so.
func TestMain(m *testing.M) {
	if os.Getenv("FASTAPI_LIKE") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// program is the example as a process of its own.
type program struct {
	*exec.Cmd
	address string
	stdout  *bufio.Scanner
	stderr  strings.Builder
}

func command(t *testing.T, args ...string) *program {
	p := &program{Cmd: exec.CommandContext(t.Context(), os.Args[0], args...)}
	p.Env = append(os.Environ(), "FASTAPI_LIKE=1", "GORACE=atexit_sleep_ms=0")
	p.Stderr = &p.stderr
	return p
}

// start returns once the program listens.
func start(t *testing.T, args ...string) *program {
	p := command(t, append(args, "-addr", "127.0.0.1:0")...)
	stdout, err := p.StdoutPipe()
	require.NoError(t, err)
	p.stdout = bufio.NewScanner(stdout)
	require.NoError(t, p.Start())
	line := p.line(t)
	require.Equal(t, "listening", line["msg"])
	p.address, _ = line["address"].(string)
	return p
}

// line reads one line of the log.
func (p *program) line(t *testing.T) map[string]any {
	require.True(t, p.stdout.Scan(), "the program has ended: %s", &p.stderr)
	var line map[string]any
	require.NoError(t, json.Unmarshal(p.stdout.Bytes(), &line), p.stdout.Text())
	return line
}

// rest reads the log to its end.
func (p *program) rest(t *testing.T) (lines []string) {
	for p.stdout.Scan() {
		lines = append(lines, p.stdout.Text())
	}
	require.NoError(t, p.stdout.Err())
	return lines
}

type response struct {
	status int
	header http.Header
	body   string
}

// call sends a request as curl does: on a new connection, from a new port.
func (p *program) call(t *testing.T, method, path string, header ...string) response {
	r, err := http.NewRequestWithContext(t.Context(), method, "http://"+p.address+path, nil)
	require.NoError(t, err)
	setHeader(r, header)
	r.Close = true
	res, err := http.DefaultClient.Do(r)
	require.NoError(t, err)
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return response{res.StatusCode, res.Header, string(body)}
}

func setHeader(r *http.Request, header []string) {
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
}

// checkJSON checks the status and the body of an answer, and its header fields.
func checkJSON(t *testing.T, got response, status int, body string) {
	require.Equal(t, status, got.status, got.body)
	require.Equal(t, body, got.body)
	require.Equal(t, "application/json", got.header.Get("Content-Type"))
	require.Equal(t, status == http.StatusTooManyRequests, got.header.Get("Retry-After") != "")
}

func retryAfter(t *testing.T, got response) int {
	seconds, err := strconv.Atoi(got.header.Get("Retry-After"))
	require.NoError(t, err)
	return seconds
}

func TestTheProgramAdmitsFiveOfTwentyCallsOfEachClientAndStopsWhenTold(t *testing.T) {
	t.Parallel()
	p := start(t)
	calls := 0
	call := func(method, path string, header ...string) response {
		calls++
		return p.call(t, method, path, header...)
	}

	begin, before := time.Now(), 10
	for i := range 20 {
		got := call("GET", "/")
		if i < 5 {
			checkJSON(t, got, http.StatusOK, hello)
			continue
		}
		checkJSON(t, got, http.StatusTooManyRequests, limit)
		seconds := retryAfter(t, got)
		left := 10*time.Second - time.Since(begin)
		require.GreaterOrEqual(t, seconds, max(1, int(math.Ceil(left.Seconds()))), "it is too early to come back")
		require.LessOrEqual(t, seconds, before, "it never grows")
		before = seconds
	}

	// All of these are the same client.
	checkJSON(t, call("GET", "/", "X-Forwarded-For", "203.0.113.7", "X-Real-IP", "203.0.113.7", "Forwarded", "for=203.0.113.7"), http.StatusTooManyRequests, limit)
	checkJSON(t, call("GET", "/", "X-API-Key", ""), http.StatusTooManyRequests, limit)
	checkJSON(t, call("GET", "/?who=me"), http.StatusTooManyRequests, limit)

	// These are other clients.
	for _, key := range []string{secret, secret + "-2", "127.0.0.1", "ip:127.0.0.1"} {
		for range 5 {
			checkJSON(t, call("GET", "/", "X-API-Key", key), http.StatusOK, hello)
		}
		checkJSON(t, call("GET", "/", "X-API-Key", key), http.StatusTooManyRequests, limit)
	}

	// These calls do not count.
	checkJSON(t, call("GET", "/nope"), http.StatusNotFound, `{"message":"Not found."}`)
	checkJSON(t, call("POST", "/nope"), http.StatusNotFound, `{"message":"Not found."}`)
	got := call("POST", "/")
	checkJSON(t, got, http.StatusMethodNotAllowed, `{"message":"Method not allowed."}`)
	require.Equal(t, "GET, HEAD", got.header.Get("Allow"))
	checkJSON(t, call("GET", "/", "X-API-Key", strings.Repeat(secret, 103)), http.StatusOK, hello)

	require.NoError(t, p.Process.Signal(syscall.SIGTERM))
	lines := p.rest(t)
	require.NoError(t, p.Wait())
	require.Zero(t, p.ProcessState.ExitCode())
	require.Empty(t, p.stderr.String())
	require.Len(t, lines, calls+1)
	for i, line := range lines {
		require.NotContains(t, line, secret)
		got := parse(t, line)
		if i == calls {
			require.Equal(t, "stopped", got["msg"])
			require.Equal(t, "terminated signal received", got["reason"])
			continue
		}
		require.Equal(t, "request", got["msg"])
		require.Regexp(t, "^(ip:127.0.0.1|key:[0-9a-f]{32})$", got["client"])
		require.Contains(t, []any{"GET", "POST"}, got["method"])
		require.Contains(t, []any{"/", "/nope"}, got["path"])
		elapsed, err := time.ParseDuration(fmt.Sprint(got["duration"]))
		require.NoError(t, err)
		require.Positive(t, elapsed)
		if i < 20 {
			require.Equal(t, "ip:127.0.0.1", got["client"])
			require.EqualValues(t, map[bool]int{true: 200, false: 429}[i < 5], got["status"])
		}
	}
}

func parse(t *testing.T, line string) map[string]any {
	var got map[string]any
	require.NoError(t, json.Unmarshal([]byte(line), &got), line)
	return got
}

func TestAnOccupiedPortIsAReadableErrorAndExitCode1(t *testing.T) {
	t.Parallel()
	occupied, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { _ = occupied.Close() }()
	p := command(t, "-addr", occupied.Addr().String())
	stdout, err := p.Output()
	require.Error(t, err)
	require.Equal(t, 1, p.ProcessState.ExitCode())
	require.Empty(t, stdout)
	require.Equal(t, "fastapi-like: listen tcp "+occupied.Addr().String()+": bind: address already in use\n", p.stderr.String())
}

func TestASecondSignalKillsAProgramThatWaitsForAClient(t *testing.T) {
	t.Parallel()
	p := start(t)
	// Shutdown waits for a connection that has sent nothing yet.
	silent, err := new(net.Dialer).DialContext(t.Context(), "tcp", p.address)
	require.NoError(t, err)
	defer func() { _ = silent.Close() }()
	p.call(t, "GET", "/nope") // accepted after the silent connection

	again := time.NewTicker(20 * time.Millisecond) // the second signal may come before the first was handled
	go func() {
		for p.Process.Signal(syscall.SIGTERM) == nil {
			<-again.C
		}
	}()
	require.Len(t, p.rest(t), 1, "no line says that it stopped")
	require.EqualError(t, p.Wait(), "signal: terminated")
}

// fakeClock stands still until it is moved.
type fakeClock struct{ now time.Time }

func (c *fakeClock) Now() time.Time                       { return c.now }
func (c *fakeClock) After(time.Duration) <-chan time.Time { panic("the example never waits") }
func (c *fakeClock) forward(d time.Duration)              { c.now = c.now.Add(d) }

// service returns the handler, to be called without a network.
func service(t *testing.T, c throttler.Config, log io.Writer) func(header ...string) response {
	limiter, err := throttler.New(c)
	require.NoError(t, err)
	h, err := newHandler(limiter, slog.New(slog.NewJSONHandler(log, nil)), nil)
	require.NoError(t, err)
	return func(header ...string) response {
		w, r := httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), "GET", "/", nil)
		setHeader(r, header)
		h.ServeHTTP(w, r)
		return response{w.Code, w.Header(), w.Body.String()}
	}
}

func TestAllFiveAreBackTenSecondsAfterTheFirst(t *testing.T) {
	t.Parallel()
	clock := &fakeClock{time.Unix(1_800_000_000, 0)}
	get := service(t, throttler.Config{Clock: clock}, io.Discard)
	for range 3 {
		for range 5 {
			checkJSON(t, get(), http.StatusOK, hello)
			clock.forward(time.Second)
		}
		clock.forward(5*time.Second - time.Microsecond)
		checkJSON(t, get(), http.StatusTooManyRequests, limit)
		clock.forward(time.Microsecond)
	}
}

func TestWaitingExactlyRetryAfterSecondsIsEnoughAndASecondLessIsNot(t *testing.T) {
	t.Parallel()
	for after, want := range map[time.Duration]int{
		0:                                 10,
		time.Microsecond:                  10,
		999_999 * time.Microsecond:        10,
		time.Second:                       9,
		2500 * time.Millisecond:           8,
		9 * time.Second:                   1,
		10*time.Second - time.Nanosecond:  1,
		10*time.Second - time.Microsecond: 1,
	} {
		t.Run(after.String(), func(t *testing.T) {
			t.Parallel()
			clock := &fakeClock{time.Unix(1_800_000_000, 0)}
			get := service(t, throttler.Config{Clock: clock}, io.Discard)
			for range 5 {
				checkJSON(t, get(), http.StatusOK, hello)
			}
			clock.forward(after)
			got := get()
			checkJSON(t, got, http.StatusTooManyRequests, limit)
			require.Equal(t, want, retryAfter(t, got))
			clock.forward(time.Duration(want-1) * time.Second)
			checkJSON(t, get(), http.StatusTooManyRequests, limit)
			clock.forward(time.Second)
			checkJSON(t, get(), http.StatusOK, hello)
		})
	}
}

// broken is a storage that fails, and records whose call it was.
type broken struct{ storage.Storage }

func (broken) Decide(_ context.Context, r *storage.Request, _ *storage.Answer) error {
	return fmt.Errorf("%w: %s: %w", throttler.ErrUnavailable, r.Parts[0].Identifier, errors.New("connection refused"))
}

func TestAFailureOfTheStorageIsA503AndItsCauseIsInTheLogWithoutTheKey(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	get := service(t, throttler.Config{Storage: broken{}}, &log)
	checkJSON(t, get("X-API-Key", secret), http.StatusServiceUnavailable, `{"message":"The service is unavailable, please try again later."}`)
	require.NotContains(t, log.String(), secret)
	line := parse(t, log.String())
	require.Equal(t, "ERROR", line["level"])
	require.EqualValues(t, 503, line["status"])
	require.Regexp(t, "^throttler: storage unavailable: key:[0-9a-f]{32}\x00/: connection refused$", line["error"])
}

func TestTwoProcessesShareOneLimit(t *testing.T) {
	t.Parallel()
	t.Run("in Redis", func(t *testing.T) {
		t.Parallel()
		shareOneLimit(t, "-storage", "redis", "-redis-url", servers.RedisURL(t))
	})
	t.Run("in Redis, by leases", func(t *testing.T) {
		t.Parallel()
		shareOneLimit(t, "-storage", "redis", "-redis-url", servers.RedisURL(t), "-lease")
	})
	t.Run("in Postgres", func(t *testing.T) {
		t.Parallel()
		shareOneLimit(t, "-storage", "postgres", "-postgres-url", servers.PostgresURL(t))
	})
}

func shareOneLimit(t *testing.T, args ...string) {
	two := []*program{start(t, args...), start(t, args...)}
	begin, ok := time.Now(), 0
	for i := range 12 {
		if got := two[i%2].call(t, "GET", "/", "X-API-Key", t.Name()); got.status == http.StatusOK {
			ok++
		} else {
			checkJSON(t, got, http.StatusTooManyRequests, limit)
		}
	}
	if time.Since(begin) < 10*time.Second {
		require.Equal(t, 5, ok)
	}
}

func TestNobodyNoticesThatRedisIsKilledAndComesBackEmpty(t *testing.T) {
	t.Parallel()
	redis := servers.Redis(t)
	p := start(t, "-storage", "failover", "-redis-url", redis.URL(), "-postgres-url", servers.PostgresURL(t))
	begin, calls := time.Now(), 0
	call := func(times int) {
		for range times {
			got := p.call(t, "GET", "/api/data", "X-API-Key", t.Name()) // the key keeps tests apart that share a Postgres
			if calls++; time.Since(begin) < time.Minute {
				require.Equal(t, map[bool]int{true: http.StatusOK, false: http.StatusTooManyRequests}[calls <= 10], got.status, got.body)
			}
		}
	}
	call(6)
	require.NoError(t, redis.Kill())
	call(3)
	require.NoError(t, redis.Start())
	require.Contains(t, p.said(t, "Redis is back and decides"), "Redis is lost, Postgres decides")
	call(3)
	require.NoError(t, redis.Kill())
	call(3)

	require.NoError(t, p.Process.Signal(syscall.SIGTERM))
	p.rest(t)
	require.NoError(t, p.Wait())
}

// said reads the log up to a given message, and returns all messages.
func (p *program) said(t *testing.T, message string) (messages []any) {
	for !slices.Contains(messages, any(message)) {
		messages = append(messages, p.line(t)["msg"])
	}
	return messages
}

func TestRedisMayBeDownAtTheStart(t *testing.T) {
	t.Parallel()
	redis := servers.Redis(t)
	require.NoError(t, redis.Kill())
	p := start(t, "-storage", "failover", "-redis-url", redis.URL(), "-postgres-url", servers.PostgresURL(t))
	checkJSON(t, p.call(t, "GET", "/", "X-API-Key", t.Name()), http.StatusOK, hello)
	require.NoError(t, redis.Start())
	p.said(t, "Redis is back and decides")
	checkJSON(t, p.call(t, "GET", "/", "X-API-Key", t.Name()), http.StatusOK, hello)
}

func TestAServerThatIsDownIsServiceUnavailable(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	p := start(t, "-storage", "redis", "-redis-url", server.URL())
	require.NoError(t, server.Kill())
	got := p.call(t, "GET", "/")
	checkJSON(t, got, http.StatusServiceUnavailable, `{"message":"The service is unavailable, please try again later."}`)
}

func TestAStorageThatIsNotThereIsSaidAtTheStart(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"-storage", "paper"}, {"-storage", "redis", "-redis-url", "http://localhost"},
		{"-storage", "failover", "-redis-url", "http://localhost"}, {"-storage", "failover", "-postgres-url", "postgres://127.0.0.1:1/postgres"}} {
		p := command(t, args...)
		require.Error(t, p.Run())
		require.Contains(t, p.stderr.String(), "fastapi-like: ")
	}
}

// site returns a function that calls the handler for any path, without a network.
func site(t *testing.T, clock throttler.Clock) func(path string, header ...string) response {
	limiter, err := throttler.New(throttler.Config{Clock: clock})
	require.NoError(t, err)
	h, err := newHandler(limiter, slog.New(slog.DiscardHandler), nil)
	require.NoError(t, err)
	return func(path string, header ...string) response {
		w, r := httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), "GET", path, nil)
		setHeader(r, header)
		h.ServeHTTP(w, r)
		return response{w.Code, w.Header(), w.Body.String()}
	}
}

// fields checks the syntax of RateLimit and RateLimit-Policy and returns what is left of each bucket, like "7 of 10".
func fields(t *testing.T, got response) map[string]string {
	read := func(name string, syntax *regexp.Regexp) map[string]string {
		values := map[string]string{}
		for _, item := range strings.Split(got.header.Get(name), ", ") {
			parts := syntax.FindStringSubmatch(item)
			require.NotNil(t, parts, "%s: %s", name, got.header.Get(name))
			values[parts[1]] = parts[2]
		}
		return values
	}
	left := read("RateLimit", regexp.MustCompile(`^"([^"]+)";r=(\d+)(?:;t=\d+)?$`))
	for bucket, capacity := range read("RateLimit-Policy", regexp.MustCompile(`^"([^"]+)";q=(\d+);w=\d+$`)) {
		left[bucket] += " of " + capacity
	}
	return left
}

func TestEachRouteAdmitsWhatItsLimitSaysAndTellsWhatIsLeft(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]struct {
		admits int
		left   map[string]string
	}{
		"/":              {5, map[string]string{"/ 5/10s": "0 of 5"}},
		"/status":        {100, map[string]string{"app": "0 of 100"}},
		"/api/items":     {30, map[string]string{"app": "70 of 100", "api": "0 of 30"}},
		"/api/search":    {20, map[string]string{"app": "80 of 100", "api": "10 of 30", "/api/search 20/1m": "0 of 20"}},
		"/api/data":      {10, map[string]string{"/api/data 10/1m": "0 of 10"}},
		"/api/limited":   {10, map[string]string{"/api/limited 1/1s/continuous": "0 of 10"}},
		"/api/strict":    {3, map[string]string{"/api/strict 1/2s/continuous": "0 of 3"}},
		"/api/expensive": {5, map[string]string{"/api/expensive 1/2s/continuous": "0 of 5"}},
		"/api/window":    {60, map[string]string{"/api/window 60/1m/sliding": "0 of 60"}},
		"/plan":          {5, map[string]string{"plan": "0 of 5"}},
	} {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			get := site(t, &fakeClock{time.Unix(1_800_000_000, 0)})
			for range want.admits {
				require.Equal(t, http.StatusOK, get(path).status)
			}
			for range 20 - want.admits%20 {
				got := get(path, "X-Forwarded-For", "203.0.113.7", "X-Real-IP", "203.0.113.7", "Forwarded", "for=203.0.113.7")
				require.Equal(t, http.StatusTooManyRequests, got.status)
				require.Positive(t, retryAfter(t, got))
				require.Equal(t, want.left, fields(t, got))
			}
			require.Equal(t, http.StatusOK, get(path, "X-API-Key", secret).status)
		})
	}
}

func TestARouteThatIsFreeIsNotLimited(t *testing.T) {
	t.Parallel()
	get := site(t, nil)
	for range 200 {
		got := get("/api/free")
		checkJSON(t, got, http.StatusOK, `{"message":"Free for all."}`)
		require.Empty(t, got.header.Get("RateLimit"))
	}
}

func TestALoopOfCurlGetsTenAnswersAndThenRefusals(t *testing.T) {
	t.Parallel()
	p := start(t)
	begin := time.Now()
	for i := range 20 {
		got := p.call(t, "GET", "/api/data")
		if time.Since(begin) < time.Minute {
			require.Equal(t, map[bool]int{true: 200, false: 429}[i < 10], got.status)
		}
	}
}

func TestContinuousBucketsComeBackOneByOne(t *testing.T) {
	t.Parallel()
	for path, every := range map[string]time.Duration{"/api/limited": time.Second, "/api/strict": 2 * time.Second, "/api/expensive": 2 * time.Second} {
		clock := &fakeClock{time.Unix(1_800_000_000, 0)}
		get := site(t, clock)
		for get(path).status == http.StatusOK {
		}
		for range 5 {
			clock.forward(every)
			require.Equal(t, http.StatusOK, get(path).status)
			require.Equal(t, http.StatusTooManyRequests, get(path).status)
		}
	}
}

func TestACallCostsItsWeight(t *testing.T) {
	t.Parallel()
	get := site(t, &fakeClock{time.Unix(1_800_000_000, 0)})
	for _, bad := range []string{"0", "-1", "1.5", "heavy", "99999999999999999999"} {
		checkJSON(t, get("/api/expensive?weight="+bad), http.StatusBadRequest, `{"message":"The weight must be a whole number from 1 to 5."}`)
	}
	checkJSON(t, get("/api/expensive?weight=6"), http.StatusRequestEntityTooLarge, `{"message":"This costs more than the limit ever admits."}`)
	require.Equal(t, map[string]string{"/api/expensive 1/2s/continuous": "1 of 5"}, fields(t, get("/api/expensive?weight=4")))
	got := get("/api/expensive?weight=3")
	checkJSON(t, got, http.StatusTooManyRequests, limit)
	require.Equal(t, 4, retryAfter(t, got))
	checkJSON(t, get("/api/expensive"), http.StatusOK, `{"message":"Computed."}`)
}

func TestTheWindowHasARefusalOfItsOwn(t *testing.T) {
	t.Parallel()
	get := site(t, &fakeClock{time.Unix(1_800_000_000, 0)}) // a window begins
	for range 60 {
		checkJSON(t, get("/api/window"), http.StatusOK, `{"message":"Within the window."}`)
	}
	checkJSON(t, get("/api/window"), http.StatusTooManyRequests, `{"error":"Try again in 60 s.","window":60,"limit":60}`)
}

func TestWhoUpgradesKeepsWhatWasSpent(t *testing.T) {
	t.Parallel()
	get := site(t, &fakeClock{time.Unix(1_800_000_000, 0)})
	for range 5 {
		require.Equal(t, http.StatusOK, get("/plan", "X-Plan", "free").status)
	}
	require.Equal(t, http.StatusTooManyRequests, get("/plan", "X-Plan", "gold").status)
	require.Equal(t, map[string]string{"plan": "14 of 20"}, fields(t, get("/plan", "X-Plan", "premium")))
	require.Equal(t, map[string]string{"plan": "0 of 5"}, fields(t, get("/plan")))
}

func TestThePageListsAllRoutesWithTheNamesOfTheirLimits(t *testing.T) {
	t.Parallel()
	get := site(t, nil)
	page := get("/docs")
	require.Equal(t, http.StatusOK, page.status)
	policy := page.header.Get("Content-Security-Policy")
	require.Contains(t, policy, "default-src 'none'; style-src 'sha256-")
	require.NotContains(t, policy, "unsafe")
	cards := strings.Split(page.body, "<article ")[1:]
	for _, group := range routers() {
		require.Contains(t, page.body, template.HTMLEscapeString(group.About))
		for _, r := range group.Routes {
			card := cards[0]
			cards = cards[1:]
			require.Contains(t, card, fmt.Sprintf("data-path=%q", r.Path))
			require.Contains(t, card, template.HTMLEscapeString(r.About))
			var buckets []string
			if !r.Free {
				buckets = slices.Sorted(maps.Keys(fields(t, get(r.Path))))
			}
			var shown []string
			for _, found := range regexp.MustCompile(`data-bucket="([^"]+)"`).FindAllStringSubmatch(card, -1) {
				shown = append(shown, html.UnescapeString(found[1]))
			}
			require.ElementsMatch(t, buckets, shown)
		}
	}
	require.Empty(t, cards)
}

func TestToLookAtLevelsTakesNothing(t *testing.T) {
	t.Parallel()
	get := site(t, &fakeClock{time.Unix(1_800_000_000, 0)})
	for _, group := range routers() {
		for _, r := range group.Routes {
			if r.Free {
				require.Equal(t, http.StatusNoContent, get("/docs/levels"+r.Path).status)
				continue
			}
			got := get(r.Path)
			require.Equal(t, http.StatusOK, got.status)
			for range 200 {
				levels := get("/docs/levels"+r.Path, "X-Plan", "free")
				require.Equal(t, http.StatusNoContent, levels.status)
				require.Equal(t, got.header["Ratelimit"], levels.header["Ratelimit"])
			}
		}
	}
	for get("/").status == http.StatusOK {
	}
	require.Equal(t, map[string]string{"/ 5/10s": "0 of 5"}, fields(t, get("/docs/levels/")))
	require.Equal(t, http.StatusNotFound, get("/docs/levels/nope").status)
}
