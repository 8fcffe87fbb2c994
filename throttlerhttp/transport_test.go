package throttlerhttp_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/throttlerhttp"
)

// answer is one answer of a fakeServer. fields alternates names and values.
type answer struct {
	status int
	fields []string
}

// fakeServer is a base that gives its answers in order, repeats the last one, and records the requests.
type fakeServer struct {
	answers []answer

	mu     sync.Mutex
	start  time.Time
	at     []time.Duration // when each request was sent
	bodies []string
	open   int // number of answer bodies not closed yet
	unread int // bytes left unread in closed bodies
	idle   bool
	takes  time.Duration
}

func newFakeServer(a ...answer) *fakeServer { return &fakeServer{answers: a, start: time.Now()} }

func (s *fakeServer) RoundTrip(r *http.Request) (*http.Response, error) {
	var sent []byte
	if r.Body != nil {
		sent, _ = io.ReadAll(r.Body)
		_ = r.Body.Close()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.answers[min(len(s.at), len(s.answers)-1)]
	s.at = append(s.at, time.Since(s.start))
	s.bodies = append(s.bodies, string(sent))
	s.open++
	s.mu.Unlock()
	<-time.After(s.takes)
	s.mu.Lock()
	h := http.Header{}
	for i := 0; i < len(a.fields); i += 2 {
		h.Add(a.fields[i], a.fields[i+1])
	}
	return &http.Response{StatusCode: a.status, Header: h, Body: &fakeBody{strings.NewReader("an answer"), s}, Request: r}, nil
}

func (s *fakeServer) CloseIdleConnections() { s.idle = true }

type fakeBody struct {
	*strings.Reader

	server *fakeServer
}

func (b *fakeBody) Close() error {
	b.server.mu.Lock()
	defer b.server.mu.Unlock()
	b.server.open--
	b.server.unread += b.Len()
	return nil
}

// get sends a GET and returns the status of the answer.
func get(ctx context.Context, tr http.RoundTripper, url string) (int, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err
	}
	return send(tr, r)
}

func send(tr http.RoundTripper, r *http.Request) (int, error) {
	resp, err := tr.RoundTrip(r)
	if err != nil {
		return 0, err
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, resp.Body.Close()
}

const api = "http://api.test/"

func limitedFor(after string) answer {
	return answer{http.StatusTooManyRequests, []string{"Retry-After", after}}
}

func limits(field string) answer { return answer{http.StatusOK, []string{"RateLimit", field}} }

var served = answer{status: http.StatusOK}

// waits asserts the time before each request that was sent: at least the given wait, and at most a tenth more.
func waits(t *testing.T, s *fakeServer, waits ...time.Duration) {
	t.Helper()
	require.Len(t, s.at, len(waits))
	before := time.Duration(0)
	for i, at := range s.at {
		got := at - before
		assert.GreaterOrEqual(t, got, waits[i], "send %d", i)
		assert.LessOrEqual(t, got, waits[i]+waits[i]/10, "send %d", i)
		before = at
	}
}

func TestTransportWaitsForRetryAfterAndSendsAgain(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		refusal answer
		waits   []time.Duration
		status  int
	}{
		"seconds":     {limitedFor("7"), []time.Duration{0, 7 * time.Second}, 200},
		"none at all": {limitedFor("0"), []time.Duration{0, time.Second}, 200},
		"with spaces": {limitedFor(" 7 "), []time.Duration{0, 7 * time.Second}, 200},
		"twice":       {answer{429, []string{"Retry-After", "2", "Retry-After", "7"}}, []time.Duration{0, 7 * time.Second}, 200},
		"a date after that of a server whose clock is early": {answer{429, []string{"Retry-After", "Fri, 01 Jan 1999 00:00:09 GMT", "Date", "Fri, 01 Jan 1999 00:00:02 GMT"}},
			[]time.Duration{0, 7 * time.Second}, 200},
		"a date after that of a server whose clock is late": {answer{429, []string{"Retry-After", "Mon, 01 Jan 2001 00:00:09 GMT", "Date", "Mon, 01 Jan 2001 00:00:02 GMT"}},
			[]time.Duration{0, 7 * time.Second}, 200},
		"a date at that of the server": {answer{429, []string{"Retry-After", "Mon, 01 Jan 2001 00:00:02 GMT", "Date", "Mon, 01 Jan 2001 00:00:02 GMT"}},
			[]time.Duration{0, time.Second}, 200},
		"a date after a Date that is none":       {answer{429, []string{"Retry-After", "Sat, 01 Jan 2000 00:00:09 GMT", "Date", "now"}}, []time.Duration{0, 9 * time.Second}, 200},
		"the last date of all":                   {limitedFor("Fri, 31 Dec 9999 23:59:59 GMT"), []time.Duration{0}, 429},
		"a reset of RateLimit after none at all": {answer{429, []string{"RateLimit", `"5/10s";r=0;t=6`, "Retry-After", "0"}}, []time.Duration{0, 6 * time.Second}, 200},
		"a fraction":                             {limitedFor("0.5"), []time.Duration{0, time.Second}, 200},
		"a date":                                 {limitedFor("Sat, 01 Jan 2000 00:00:09 GMT"), []time.Duration{0, 9 * time.Second}, 200},
		"a past date":                            {limitedFor("Fri, 31 Dec 1999 23:59:59 GMT"), []time.Duration{0, time.Second}, 200},
		"negative":                               {limitedFor("-5"), []time.Duration{0, time.Second}, 200},
		"garbage":                                {limitedFor("soon"), []time.Duration{0, time.Second}, 200},
		"missing":                                {answer{status: 429}, []time.Duration{0, time.Second}, 200},
		"the reset of RateLimit":                 {answer{429, []string{"RateLimit", `"5/10s";r=0;t=6`}}, []time.Duration{0, 6 * time.Second}, 200},
		"Retry-After before RateLimit":           {answer{429, []string{"RateLimit", `"5/10s";r=0;t=6`, "Retry-After", "2"}}, []time.Duration{0, 2 * time.Second}, 200},
		"as long as MaxWait":                     {limitedFor("60"), []time.Duration{0, time.Minute}, 200},
		"longer than MaxWait":                    {limitedFor("61"), []time.Duration{0}, 429},
		"longer than any time":                   {limitedFor("99999999999999999999999"), []time.Duration{0}, 429},
		"a negative reset":                       {answer{429, []string{"RateLimit", `"5/10s";r=0;t=-6`}}, []time.Duration{0, time.Second}, 200},
		"RateLimit beyond MaxWait":               {answer{429, []string{"RateLimit", `"100/1h";r=0;t=999999999999999`}}, []time.Duration{0}, 429},
		"503 with seconds":                       {answer{503, []string{"Retry-After", "7"}}, []time.Duration{0, 7 * time.Second}, 200},
		"503 with none at all":                   {answer{503, []string{"Retry-After", "0"}}, []time.Duration{0, time.Second}, 200},
		"503 with a past date":                   {answer{503, []string{"Retry-After", "Fri, 31 Dec 1999 23:59:59 GMT"}}, []time.Duration{0, time.Second}, 200},
		"503 without":                            {answer{status: 503}, []time.Duration{0}, 503},
		"503 with garbage":                       {answer{503, []string{"Retry-After", "soon"}}, []time.Duration{0}, 503},
		"another status":                         {answer{500, []string{"Retry-After", "7"}}, []time.Duration{0}, 500},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := newFakeServer(c.refusal, served)
				status, err := get(t.Context(), throttlerhttp.NewTransport(server, nil), api)
				require.NoError(t, err)
				assert.Equal(t, c.status, status)
				waits(t, server, c.waits...)
				assert.Zero(t, server.open, "bodies that were not closed")
				assert.Zero(t, server.unread, "bytes that keep a connection from being used again")
			})
		})
	}
}

func TestTransportNeverComesBackEarlyAndWithinATenthAtRandom(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var least, most = time.Hour, time.Duration(0)
		for range 300 {
			server := newFakeServer(limitedFor("50"), served)
			_, err := get(t.Context(), throttlerhttp.NewTransport(server, nil), api)
			require.NoError(t, err)
			least, most = min(least, server.at[1]), max(most, server.at[1])
		}
		assert.GreaterOrEqual(t, least, 50*time.Second)
		assert.LessOrEqual(t, most, 55*time.Second)
		assert.Greater(t, most-least, 3*time.Second)
	})
}

func TestTransportDoublesTheWaitUntilItsAttemptsAreUsedUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(answer{status: 429})
		status, err := get(t.Context(), throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{Attempts: 5}), api)
		require.NoError(t, err)
		assert.Equal(t, 429, status)
		waits(t, server, 0, time.Second, 2*time.Second, 4*time.Second, 8*time.Second)
		assert.Zero(t, server.open)
	})
}

func TestTransportHoldsARequestBackNoLongerThanMaxWaitInAll(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limitedFor("4"))
		status, err := get(t.Context(), throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{MaxWait: 10 * time.Second, Attempts: 9}), api)
		require.NoError(t, err)
		assert.Equal(t, 429, status)
		waits(t, server, 0, 4*time.Second, 4*time.Second)
	})
}

func TestTransportWithNegativeOptionsIsItsBase(t *testing.T) {
	t.Parallel()
	for _, o := range []throttlerhttp.TransportOptions{{MaxWait: -1}, {Attempts: -1}, {Attempts: 1}, {RetryBurst: -1}} {
		synctest.Test(t, func(t *testing.T) {
			server := newFakeServer(limitedFor("4"))
			status, err := get(t.Context(), throttlerhttp.NewTransport(server, &o), api)
			require.NoError(t, err)
			assert.Equal(t, 429, status)
			waits(t, server, 0)
		})
	}
}

func TestTransportReturnsTheErrorOfAContextThatEndsWhileItWaits(t *testing.T) {
	t.Parallel()
	for name, first := range map[string]answer{"for a refusal": limitedFor("30"), "before it is sent": limits(`"5/10s";r=0;t=30`)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := newFakeServer(first)
				tr := throttlerhttp.NewTransport(server, nil)
				if first.status == http.StatusOK {
					_, err := get(t.Context(), tr, api)
					require.NoError(t, err)
				}
				ctx, cancel := context.WithCancel(t.Context())
				time.AfterFunc(5*time.Second, cancel)
				body := &closedBody{Reader: strings.NewReader("x")}
				r, err := http.NewRequestWithContext(ctx, http.MethodGet, api, body)
				require.NoError(t, err)
				r.GetBody = func() (io.ReadCloser, error) { return body, nil }
				_, err = send(tr, r)
				require.ErrorIs(t, err, context.Canceled)
				assert.Equal(t, 5*time.Second, time.Since(server.start))
				assert.Len(t, server.at, 1)
				assert.True(t, body.closed)
				assert.Zero(t, server.open)
			})
		})
	}
}

type closedBody struct {
	io.Reader

	closed bool
}

func (b *closedBody) Close() error {
	b.closed = true
	return nil
}

func TestTransportHeedsTheTimeoutOfAClient(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limitedFor("30"), served)
		for timeout, status := range map[time.Duration]int{29 * time.Second: 429, 31 * time.Second: 200} {
			server.at = nil
			client := http.Client{Timeout: timeout, Transport: throttlerhttp.NewTransport(server, nil)}
			resp, err := client.Get(api)
			require.NoError(t, err)
			require.NoError(t, resp.Body.Close())
			assert.Equal(t, status, resp.StatusCode)
		}
	})
}

func TestTransportSendsTheBodyAgainIfItCanBeReplayed(t *testing.T) {
	t.Parallel()
	stream := func() io.Reader { return io.MultiReader(strings.NewReader("cargo")) }
	for name, c := range map[string]struct {
		method string
		body   io.Reader
		status int
		key    string
		sent   []string
	}{
		"POST on 429":                    {"POST", strings.NewReader("cargo"), 429, "", []string{"cargo", "cargo"}},
		"POST on 429 without a body":     {"POST", nil, 429, "", []string{"", ""}},
		"POST on 429 with an empty body": {"POST", http.NoBody, 429, "", []string{"", ""}},
		"POST on 429 of a stream":        {"POST", stream(), 429, "", []string{"cargo"}},
		"POST on 503":                    {"POST", strings.NewReader("cargo"), 503, "", []string{"cargo"}},
		"POST on 503 with a key":         {"POST", strings.NewReader("cargo"), 503, "k1", []string{"cargo", "cargo"}},
		"PATCH on 503":                   {"PATCH", strings.NewReader("cargo"), 503, "", []string{"cargo"}},
		"PUT on 503":                     {"PUT", strings.NewReader("cargo"), 503, "", []string{"cargo", "cargo"}},
		"PUT on 503 of a stream":         {"PUT", stream(), 503, "", []string{"cargo"}},
		"DELETE on 503":                  {"DELETE", nil, 503, "", []string{"", ""}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := newFakeServer(answer{c.status, []string{"Retry-After", "1"}}, served)
				r, err := http.NewRequestWithContext(t.Context(), c.method, api, c.body)
				require.NoError(t, err)
				if c.key != "" {
					r.Header.Set("Idempotency-Key", c.key)
				}
				status, err := send(throttlerhttp.NewTransport(server, nil), r)
				require.NoError(t, err)
				assert.Equal(t, c.sent, server.bodies)
				assert.Equal(t, len(c.sent) == 2, status == http.StatusOK)
				assert.Zero(t, server.open)
			})
		})
	}
}

func TestTransportReturnsTheErrorOfGetBody(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server, gone := newFakeServer(limitedFor("1")), errors.New("gone")
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, api, strings.NewReader("cargo"))
		require.NoError(t, err)
		r.GetBody = func() (io.ReadCloser, error) { return nil, gone }
		_, err = send(throttlerhttp.NewTransport(server, nil), r)
		assert.ErrorIs(t, err, gone)
		assert.Zero(t, server.open)
	})
}

func TestTransportLeavesTheRequestOfTheCallerAsItIs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, api, strings.NewReader("cargo"))
		require.NoError(t, err)
		r.Header.Set("A", "b")
		body := &closedBody{Reader: strings.NewReader("cargo")}
		r.Body = body
		header, url := r.Header.Clone(), *r.URL
		_, err = send(throttlerhttp.NewTransport(newFakeServer(limitedFor("1"), served), nil), r)
		require.NoError(t, err)
		assert.Same(t, body, r.Body, "not the body of the second send")
		assert.Equal(t, url, *r.URL)
		assert.Equal(t, header, r.Header)
	})
}

// fleet sends n GETs at once and counts the statuses of the answers. Status 0 stands for a NotSentError.
func fleet(t *testing.T, tr http.RoundTripper, n int) map[int]int {
	t.Helper()
	var mu sync.Mutex
	var wg sync.WaitGroup
	count := map[int]int{}
	for range n {
		wg.Go(func() {
			status, err := get(t.Context(), tr, api)
			if notSent := new(throttlerhttp.NotSentError); !errors.As(err, &notSent) {
				assert.NoError(t, err)
			}
			mu.Lock()
			defer mu.Unlock()
			count[status]++
		})
	}
	wg.Wait()
	return count
}

func TestTransportDoesNotStormAServerThatAlwaysRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		o     *throttlerhttp.TransportOptions
		sends int
	}{
		"by default":              {nil, 100 + 10 + 10},
		"with a budget of 50 %":   {&throttlerhttp.TransportOptions{RetryPercent: 50, RetryBurst: 1}, 100 + 50 + 1},
		"with a burst only":       {&throttlerhttp.TransportOptions{RetryPercent: -1, RetryBurst: 5}, 100 + 5},
		"with the largest budget": {&throttlerhttp.TransportOptions{RetryPercent: 1 << 30, RetryBurst: 1 << 30, Attempts: 2}, 100 + 100},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := newFakeServer(answer{status: 429})
				server.takes = time.Millisecond // so that all are in flight at the same time
				count := fleet(t, throttlerhttp.NewTransport(server, c.o), 100)
				assert.Equal(t, 100, count[429]+count[0])
				assert.LessOrEqual(t, len(server.at), c.sends)
				assert.Greater(t, len(server.at), 100)
				assert.Zero(t, server.open)
			})
		})
	}
}

func TestTransportEarnsItsBudgetByRequests(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(answer{status: 429})
		tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{RetryBurst: 1, Attempts: 2})
		for range 101 {
			_, err := get(t.Context(), tr, api)
			require.NoError(t, err)
		}
		assert.Len(t, server.at, 101+1+10, "the burst, and one of ten")
	})
}

func TestTransportSavesNoBudgetBeyondTheBurst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var a []answer
		for range 50 {
			a = append(a, served)
		}
		server := newFakeServer(append(a, answer{status: 429})...)
		tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{RetryBurst: 2, Attempts: 5})
		for range 51 {
			_, err := get(t.Context(), tr, api)
			require.NoError(t, err)
		}
		assert.Len(t, server.at, 51+2)
	})
}

func TestTransportHoldsAllRequestsToAHostThatRefusedOne(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limitedFor("20"), served)
		tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{Attempts: 1})
		_, err := get(t.Context(), tr, api)
		require.NoError(t, err)
		for _, other := range []string{"https://api.test/", "http://api.test:81/", "http://other.test/"} {
			_, err = get(t.Context(), tr, other)
			require.NoError(t, err)
		}
		waits(t, server, 0, 0, 0, 0)
		assert.Equal(t, map[int]int{200: 50}, fleet(t, tr, 50))
		assert.GreaterOrEqual(t, server.at[4], 20*time.Second)
		assert.LessOrEqual(t, server.at[53], 22*time.Second)
		fleet(t, tr, 1)
		assert.Equal(t, server.at[53], server.at[54], "once the time has passed nobody waits")
	})
}

func TestTransportGoesOnWaitingWhenTheHostRefusesAnotherMeanwhile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limitedFor("10"), limitedFor("20"), served)
		tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{Attempts: 1})
		_, err := get(t.Context(), tr, api)
		require.NoError(t, err)
		count := fleet(t, tr, 20)
		assert.Equal(t, map[int]int{429: 1, 200: 19}, count)
		assert.GreaterOrEqual(t, server.at[2], 30*time.Second)
	})
}

func TestTransportWaitsForWhatTheHostSaidToAnotherBeforeItSendsAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(answer{status: 429}, limitedFor("30"), served)
		tr := throttlerhttp.NewTransport(server, nil)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(10*time.Second, cancel)
		go func() {
			_, err := get(ctx, tr, api) // it would be sent again after a second
			assert.ErrorIs(t, err, context.Canceled)
		}()
		synctest.Wait()
		fleet(t, tr, 1)
		waits(t, server, 0, time.Second, 30*time.Second)
		assert.Zero(t, server.open)
	})
}

func TestTransportWaitsForTheLongestRetryAfterWithinMaxWait(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		first, second answer
		wait          time.Duration
	}{
		"the first is longer":              {limitedFor("20"), limitedFor("3"), 20 * time.Second},
		"the second is longer":             {limitedFor("3"), limitedFor("20"), 20 * time.Second},
		"one is that of a 503":             {limitedFor("3"), answer{503, []string{"Retry-After", "20"}}, 20 * time.Second},
		"one has nothing to do with rates": {limitedFor("3"), answer{202, []string{"Retry-After", "20"}}, 3 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := newFakeServer(c.first, c.second, served)
				server.takes = time.Second // so that both are in flight at the same time
				tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{Attempts: 1})
				fleet(t, tr, 2)
				_, err := get(t.Context(), tr, strings.ToUpper(api))
				require.NoError(t, err)
				server.at[2] -= server.takes
				waits(t, server, 0, 0, c.wait)
			})
		})
	}
}

func TestTransportSlowsDownByRateLimit(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fields []string
		wait   time.Duration // before the next request
	}{
		"nothing remains":               {[]string{`"5/10s";r=0;t=8`}, 8 * time.Second},
		"of one limit nothing remains":  {[]string{`"5/10s";r=0;t=8, "100/1h";r=50;t=1800`}, 8 * time.Second},
		"of two limits nothing remains": {[]string{`"5/10s";r=0;t=8`, `"9/20s";r=0;t=18`}, 18 * time.Second},
		"of one limit twice":            {[]string{`"a";r=0;t=8, "a";r=9;t=90`}, 8 * time.Second},
		"of one limit twice, the worse": {[]string{`"a";r=9;t=90, "a";r=0;t=4, "a";r=0;t=8`}, 8 * time.Second},
		"some until the next second":    {[]string{`"5/10s";r=3;t=1`}, 0},
		"some remain":                   {[]string{`"5/10s";r=3;t=8`}, 2 * time.Second},
		"the longest pause counts":      {[]string{`"5/10s";r=3;t=8, "9/1m";r=1;t=40, "9/1s";r=5;t=1`}, 20 * time.Second},
		"ten remain":                    {[]string{`"20/22s";r=10;t=22`}, 2 * time.Second},
		"eleven remain":                 {[]string{`"20/22s";r=11;t=22`}, 0},
		"the reset is now":              {[]string{`"5/10s";r=0;t=0`}, 0},
		"the reset is beyond MaxWait":   {[]string{`"100/1h";r=0;t=61`}, 0},
		"the pause is beyond MaxWait":   {[]string{`"100/1h";r=1;t=122, "5/10s";r=3;t=8`}, 2 * time.Second},
		"other parameters":              {[]string{`"5/10s";r=0;t=8;pk=:dXNlcg==:;x=1.5;y`}, 8 * time.Second},
		"no field":                      {nil, 0},
		"an empty field":                {[]string{""}, 0},
		"not a list":                    {[]string{`"5/10s";r=0;t=8,`}, 0},
		"not closed":                    {[]string{`"5/10s;r=0;t=8`}, 0},
		"of an older draft":             {[]string{`limit=5, remaining=0, reset=8`}, 0},
		"not a string":                  {[]string{`5;r=0;t=8, default;r=0;t=8, ("a" "b");r=0;t=8`}, 0},
		"no reset":                      {[]string{`"5/10s";r=0`}, 0},
		"nothing about what remains":    {[]string{`"5/10s";t=8`}, 0},
		"not integers":                  {[]string{`"a";r=0.0;t=8, "b";r=0;t="8", "c";r;t=8`}, 0},
		"negative":                      {[]string{`"a";r=-1;t=8, "b";r=0;t=-8`}, 0},
		"too large":                     {[]string{`"a";r=0;t=9999999999999999999`}, 0},
		"the largest":                   {[]string{`"a";r=999999999999999;t=999999999999999`}, 0},
		"an odd string":                 {[]string{`"a";r=0;t=8;d=%"`}, 0},
		"a number that ends at once":    {[]string{`"a";r=-`}, 0},
		"one faulty limit among others": {[]string{`"a";r=0, "b";r=0;t=8`}, 8 * time.Second},
		"the faulty limit is the last":  {[]string{`"a";r=3;t=8, "b";r=0`}, 2 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				first := served
				for _, f := range c.fields {
					first.fields = append(first.fields, "RateLimit", f)
				}
				server := newFakeServer(first, served)
				tr := throttlerhttp.NewTransport(server, nil)
				for range 2 {
					_, err := get(t.Context(), tr, api)
					require.NoError(t, err)
				}
				waits(t, server, 0, c.wait)
			})
		})
	}
}

func TestTransportSpreadsWhatRemainsOverTheTimeUntilTheReset(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limits(`"5/10s";r=3;t=8`), served)
		tr := throttlerhttp.NewTransport(server, nil)
		fleet(t, tr, 1)
		fleet(t, tr, 6)
		for i, n := range []int{2, 4, 6, 8, 8, 8} { // 3 before the reset, the others at the reset
			turn := time.Duration(n) * time.Second
			assert.GreaterOrEqual(t, server.at[i+1], turn)
			assert.LessOrEqual(t, server.at[i+1], turn+turn/10)
		}
		fleet(t, tr, 5)
		assert.Equal(t, server.at[6], server.at[11], "after the reset nobody waits")
	})
}

func TestTransportGivesNoTurnToARequestThatCannotWaitForIt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limits(`"20/2m";r=10;t=110`), served)
		tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{MaxWait: 15 * time.Second})
		fleet(t, tr, 1)
		fleet(t, tr, 3) // the turns are after 10, 20 and 30 s; only the first is within MaxWait
		fleet(t, tr, 1)
		waits(t, server, 0, 0, 0, 10*time.Second, 20*time.Second-server.at[3])
	})
}

func TestTransportForgetsAPauseWhenALaterAnswerHasNone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limits(`"5/10s";r=1;t=10`), limits(`"5/10s";r=11;t=10`), limits(`"5/10s";r=4;t=10`), served)
		tr := throttlerhttp.NewTransport(server, nil)
		for range 4 {
			fleet(t, tr, 1)
		}
		waits(t, server, 0, 5*time.Second, 0, 2*time.Second)
	})
}

func TestTransportRemembersAThousandHosts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limits(`"5/10s";r=0;t=8`))
		tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{MaxWait: 10 * time.Second})
		for i := range 1001 {
			_, err := get(t.Context(), tr, fmt.Sprintf("http://host%d.test/", i))
			require.NoError(t, err)
			<-time.After(time.Millisecond)
		}
		before := time.Since(server.start)
		_, err := get(t.Context(), tr, "http://host0.test/")
		require.NoError(t, err)
		assert.Equal(t, before, time.Since(server.start), "the oldest is forgotten")
		_, err = get(t.Context(), tr, "http://host1000.test/")
		require.NoError(t, err)
		assert.Greater(t, time.Since(server.start), before+7*time.Second)
	})
}

func TestTransportReturnsTheErrorsOfItsBase(t *testing.T) {
	t.Parallel()
	_, err := send(throttlerhttp.NewTransport(nil, nil), &http.Request{})
	assert.ErrorContains(t, err, "nil Request.URL")
	_, err = get(t.Context(), throttlerhttp.NewTransport(nil, nil), "gopher://localhost")
	assert.ErrorContains(t, err, "unsupported protocol")
}

func TestTransportClosesTheIdleConnectionsOfItsBase(t *testing.T) {
	t.Parallel()
	server := newFakeServer(served)
	throttlerhttp.NewTransport(server, nil).CloseIdleConnections()
	assert.True(t, server.idle)
	throttlerhttp.NewTransport(struct{ http.RoundTripper }{server}, nil).CloseIdleConnections()
}

func TestTransportSendsAgainByTheSameConnection(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(refusesFirst())
	t.Cleanup(server.Close)
	var reused []bool
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
		GotConn: func(c httptrace.GotConnInfo) { reused = append(reused, c.Reused) },
	})
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, server.URL, strings.NewReader("cargo"))
	require.NoError(t, err)
	status, err := send(throttlerhttp.NewTransport(server.Client().Transport, nil), r)
	require.NoError(t, err)
	assert.Equal(t, http.StatusOK, status)
	assert.Equal(t, []bool{false, true}, reused)
}

func TestTransportMayBeUsedByManyGoroutines(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limits(`"5/10s";r=3;t=8`), limitedFor("1"), answer{status: 429}, limits(`"5/10s";r=0;t=1`), limitedFor("2"), served)
		tr := throttlerhttp.NewTransport(server, nil)
		count := fleet(t, tr, 200)
		assert.Equal(t, 200, count[200]+count[429])
		assert.Zero(t, server.open)
	})
}

// refusesFirst denies the first request without naming a time.
func refusesFirst() http.Handler {
	var once sync.Once
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		once.Do(func() {
			w.Header().Set("Retry-After", "0")
			w.WriteHeader(http.StatusTooManyRequests)
		})
		_, _ = io.WriteString(w, "welcome")
	})
}

func ExampleNewTransport() {
	server := httptest.NewServer(refusesFirst())
	defer server.Close()

	transport := throttlerhttp.NewTransport(nil, &throttlerhttp.TransportOptions{MaxWait: 10 * time.Second})
	client := &http.Client{Transport: transport, Timeout: 30 * time.Second}
	resp, err := client.Get(server.URL)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = resp.Body.Close() }()
	fmt.Println(resp.Status)
	// Output: 200 OK
}
