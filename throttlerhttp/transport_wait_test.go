package throttlerhttp_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/throttlerhttp"
)

// crowd sends n GETs with a deadline at once. errs has a NotSentError for each request that was not sent.
func crowd(t *testing.T, tr http.RoundTripper, n int, deadline time.Duration) []*throttlerhttp.NotSentError {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	errs := make([]*throttlerhttp.NotSentError, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			status, err := get(ctx, tr, api)
			if !errors.As(err, &errs[i]) {
				assert.NoError(t, err)
				assert.Equal(t, http.StatusTooManyRequests, status)
			}
		})
	}
	wg.Wait()
	return errs
}

func TestTransportCountsItsSendsToAServerThatAlwaysRefuses(t *testing.T) {
	t.Parallel()
	year := fmt.Sprint(365 * 24 * 3600)
	own := map[int]int{1: 3, 200: 5} // after 1, 2, 4, 8 and 16 s; a single request makes at most three attempts
	for name, c := range map[string]struct {
		refusal answer
		short   time.Duration // a deadline until which nothing may be sent
		long    time.Duration
		sends   map[int]int // sends until the longer deadline, by the number of callers
	}{
		"seconds":           {limitedFor("30"), 30 * time.Second, 45 * time.Second, map[int]int{1: 1, 200: 1}},
		"none at all":       {limitedFor("0"), time.Second, 40 * time.Second, own},
		"missing":           {answer{status: 429}, time.Second, 40 * time.Second, own},
		"garbage":           {limitedFor("soon"), time.Second, 40 * time.Second, own},
		"negative":          {limitedFor("-1"), time.Second, 40 * time.Second, own},
		"a past date":       {limitedFor("Fri, 31 Dec 1999 23:59:59 GMT"), time.Second, 40 * time.Second, own},
		"a date":            {limitedFor("Sat, 01 Jan 2000 00:00:30 GMT"), 30 * time.Second, 31 * time.Second, map[int]int{1: 1, 200: 1}},
		"a year":            {limitedFor(year), time.Hour, 24 * time.Hour, map[int]int{}},
		"a year as a date":  {limitedFor("Mon, 01 Jan 2001 00:00:00 GMT"), time.Hour, 24 * time.Hour, map[int]int{}},
		"beyond 64 bits":    {limitedFor("99999999999999999999"), time.Hour, 24 * time.Hour, map[int]int{}},
		"503":               {answer{503, []string{"Retry-After", "30"}}, 30 * time.Second, 31 * time.Second, nil},
		"by RateLimit":      {answer{429, []string{"RateLimit", `"a";r=0;t=30`}}, 30 * time.Second, 45 * time.Second, map[int]int{1: 1, 200: 1}},
		"with a RateLimit":  {answer{429, []string{"RateLimit", `"a";r=0;t=3`, "Retry-After", "30"}}, 30 * time.Second, 45 * time.Second, map[int]int{1: 1, 200: 1}},
		"with what remains": {answer{429, []string{"RateLimit", `"a";r=2;t=3`, "Retry-After", "30"}}, 30 * time.Second, 45 * time.Second, map[int]int{1: 1, 200: 1}},
	} {
		for _, callers := range []int{1, 200} {
			t.Run(fmt.Sprintf("%s, %d callers", name, callers), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					server := newFakeServer(c.refusal)
					tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{MaxWait: 2 * time.Hour, RetryBurst: 1000})
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					defer cancel()
					status, err := get(ctx, tr, api)
					require.NoError(t, err)
					assert.Equal(t, c.refusal.status, status)
					for _, err := range crowd(t, tr, callers, c.short) {
						require.NotNil(t, err)
						assert.ErrorIs(t, err, context.DeadlineExceeded)
						assert.False(t, err.At.Before(server.start.Add(c.short)))
					}
					assert.Zero(t, time.Since(server.start), "fails at once")
					require.Len(t, server.at, 1)
					if c.sends == nil {
						return
					}
					crowd(t, tr, callers, c.long)
					assert.Len(t, server.at, 1+c.sends[callers])
					assert.Zero(t, server.open)
				})
			})
		}
	}
}

func TestTransportTellsWhenTheServerMayBeAskedAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		tr := throttlerhttp.NewTransport(newFakeServer(limitedFor("30")), &throttlerhttp.TransportOptions{Attempts: 1})
		client := http.Client{Timeout: time.Second, Transport: tr}
		resp, err := client.Get(api)
		require.NoError(t, err)
		assert.NoError(t, resp.Body.Close())
		_, err = client.Get(api) //nolint:bodyclose // there is none
		require.ErrorIs(t, err, context.DeadlineExceeded)
		var told *throttlerhttp.NotSentError
		require.ErrorAs(t, err, &told)
		now := time.Now()
		assert.Equal(t, "http://api.test", told.Host)
		assert.True(t, now.Add(30*time.Second).Equal(told.At))
		assert.True(t, now.Add(time.Second-1).Equal(told.Until))
		assert.ErrorContains(t, err, "http://api.test may be asked again at "+told.At.Format(time.RFC3339Nano))
		var timeout interface{ Timeout() bool }
		require.ErrorAs(t, err, &timeout)
		assert.True(t, timeout.Timeout())
	})
}

func TestTransportClosesTheBodyOfWhatItDoesNotSend(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		tr := throttlerhttp.NewTransport(newFakeServer(limitedFor("3600")), nil)
		_, err := get(t.Context(), tr, api)
		require.NoError(t, err)
		body := &closedBody{Reader: strings.NewReader("cargo")}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, api, body)
		require.NoError(t, err)
		_, err = send(tr, r)
		assert.ErrorIs(t, err, context.DeadlineExceeded, "an hour is longer than MaxWait")
		assert.True(t, body.closed)
	})
}

func TestTransportThatNeverWaitsFailsAtOnceOrSends(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limitedFor("30"), limits(`"a";r=0;t=30`), served)
		tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{MaxWait: -1})
		assert.Equal(t, map[int]int{429: 1}, fleet(t, tr, 1))
		assert.Equal(t, map[int]int{0: 9}, fleet(t, tr, 9))
		<-time.After(30 * time.Second)
		assert.Equal(t, map[int]int{200: 1}, fleet(t, tr, 1))
		assert.Equal(t, map[int]int{200: 1}, fleet(t, tr, 1), "a forecast refuses nothing")
		assert.Len(t, server.at, 3)
	})
}

func TestTransportSendsOneProbeASecondToAServerThatAlwaysSaysSo(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		refusal answer
		longest time.Duration
	}{
		"with Retry-After only":   {limitedFor("1"), time.Minute},
		"with a policy":           {answer{429, []string{"RateLimit", `"a";r=0;t=1`, "Retry-After", "1"}}, 10 * time.Second},
		"with a policy that left": {answer{429, []string{"RateLimit", `"a";r=1;t=1`, "Retry-After", "1"}}, 10 * time.Second},
		"unavailable":             {answer{503, []string{"Retry-After", "1"}}, 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := newFakeServer(c.refusal)
				server.takes = 10 * time.Millisecond
				tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{MaxWait: c.longest, RetryBurst: 1000})
				fleet(t, tr, 200)
				seconds := int(c.longest / time.Second)
				assert.Equal(t, server.at[0], server.at[199], "before the first refusal")
				assert.GreaterOrEqual(t, len(server.at), 200+seconds*8/10, "then one a second")
				assert.LessOrEqual(t, len(server.at), 200+seconds)
				for i := 200; i < len(server.at); i++ {
					assert.GreaterOrEqual(t, server.at[i]-server.at[i-1], time.Second)
				}
				assert.LessOrEqual(t, time.Since(server.start), c.longest+3*server.takes)
				assert.Zero(t, server.open)
			})
		})
	}
}

func TestTransportLetsOthersFollowAsTheProbeIsAnswered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limitedFor("10"), served)
		tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{Attempts: 1})
		fleet(t, tr, 1)
		server.takes = time.Second
		assert.Equal(t, map[int]int{200: 100}, fleet(t, tr, 100))
		sent := map[time.Duration]int{}
		for _, at := range server.at[1:] {
			sent[(at-server.at[1])/time.Second]++
		}
		assert.Equal(t, map[time.Duration]int{0: 1, 1: 2, 2: 4, 3: 8, 4: 16, 5: 32, 6: 37}, sent)
	})
}

func TestTransportTellsThatTheProbeIsNotAnswered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limitedFor("10"), served)
		tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{Attempts: 1})
		fleet(t, tr, 1)
		<-time.After(11 * time.Second)
		server.takes = 30 * time.Second
		var probe sync.WaitGroup
		defer probe.Wait()
		probe.Go(func() { fleet(t, tr, 1) })
		synctest.Wait()
		err := crowd(t, tr, 1, 5*time.Second)[0]
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.ErrorContains(t, err, "has not yet answered")
		assert.Equal(t, 16*time.Second-1, time.Since(server.start))
		assert.Len(t, server.at, 2)
	})
}

func TestTransportForgetsWhatWaitsForNothingFirst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limitedFor("9"), limits(`"a";r=90;t=3600`))
		tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{Attempts: 1})
		for i := range 1500 {
			_, err := get(t.Context(), tr, fmt.Sprintf("http://host%d.test/", i))
			require.NoError(t, err)
		}
		assert.Zero(t, time.Since(server.start))
		_, err := get(t.Context(), tr, "http://host0.test/")
		require.NoError(t, err)
		assert.GreaterOrEqual(t, time.Since(server.start), 9*time.Second)
	})
}

func TestTransportIsOpenAMinuteAfterARefusal(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limitedFor("10"), served)
		tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{Attempts: 1})
		fleet(t, tr, 1)
		<-time.After(10*time.Second + time.Minute)
		server.takes = 5 * time.Minute
		assert.Equal(t, map[int]int{200: 50}, fleet(t, tr, 50))
		assert.Equal(t, server.at[1], server.at[50], "nobody waits for a slow answer to another")
	})
}

func TestTransportClosesAgainWhenTheNextOnesAreRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limitedFor("10"), served, limitedFor("10"), limitedFor("10"), served)
		tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{Attempts: 1})
		fleet(t, tr, 1)
		server.takes = time.Second
		fleet(t, tr, 50)
		assert.LessOrEqual(t, server.at[1], 11*time.Second)
		assert.GreaterOrEqual(t, server.at[2], server.at[1]+time.Second)
		assert.Equal(t, server.at[2], server.at[3], "two follow")
		assert.GreaterOrEqual(t, server.at[4], server.at[3]+11*time.Second)
		assert.GreaterOrEqual(t, server.at[5], server.at[4]+time.Second, "one goes first again")
	})
}

func TestTransportSendsTheNextProbeWhenOneEndsWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func() (*http.Response, error){
		"an error":         func() (*http.Response, error) { return nil, errors.New("connection reset") },
		"no answer":        func() (*http.Response, error) { return nil, nil }, //nolint:nilnil // what a faulty base does
		"a panic":          func() (*http.Response, error) { panic("faulty base") },
		"one from a cache": func() (*http.Response, error) { return says(200, "Age", "7"), context.Cause(t.Context()) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				sent := 0
				tr := throttlerhttp.NewTransport(tripper(func(*http.Request) (*http.Response, error) {
					switch sent++; sent {
					case 1:
						return says(429, "Retry-After", "10"), nil
					case 2:
						return end()
					}
					return says(200), nil
				}), &throttlerhttp.TransportOptions{Attempts: 1})
				ask := func() {
					defer func() { _ = recover() }()
					r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, api, nil)
					if resp, err := tr.RoundTrip(r); err == nil && resp != nil {
						_ = resp.Body.Close()
					}
				}
				for range 3 {
					ask()
				}
				assert.Equal(t, 3, sent)
			})
		})
	}
}

// says returns an answer with these fields and without a body.
func says(status int, fields ...string) *http.Response {
	h := http.Header{}
	for i := 0; i < len(fields); i += 2 {
		h.Add(fields[i], fields[i+1])
	}
	return &http.Response{StatusCode: status, Header: h, Body: http.NoBody}
}

func TestTransportIgnoresTheFieldsOfACache(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		first answer
		wait  time.Duration
	}{
		"a cached forecast":           {answer{200, []string{"RateLimit", `"a";r=0;t=8`, "Age", "1"}}, 0},
		"an old one":                  {answer{200, []string{"RateLimit", `"a";r=0;t=8`, "Age", "99999999999999999999"}}, 0},
		"one by way of a cache":       {answer{200, []string{"RateLimit", `"a";r=0;t=8`, "Age", "0"}}, 8 * time.Second},
		"an Age that is none":         {answer{200, []string{"RateLimit", `"a";r=0;t=8`, "Age", "old"}}, 8 * time.Second},
		"a negative Age":              {answer{200, []string{"RateLimit", `"a";r=0;t=8`, "Age", "-1"}}, 8 * time.Second},
		"a cached refusal":            {answer{429, []string{"Retry-After", "30", "Age", "1"}}, time.Second},
		"a cached refusal by a limit": {answer{429, []string{"RateLimit", `"a";r=0;t=8`, "Age", "1"}}, time.Second},
		"a cached 503":                {answer{503, []string{"Retry-After", "30", "Age", "1"}}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := newFakeServer(c.first, served)
				tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{Attempts: 1})
				fleet(t, tr, 1)
				fleet(t, tr, 1)
				waits(t, server, 0, c.wait)
			})
		})
	}
}

// routes is a base that answers by path and records the paths.
type routes struct {
	mu   sync.Mutex
	sent []string
	of   func(path string) answer
}

func (s *routes) RoundTrip(r *http.Request) (*http.Response, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent = append(s.sent, r.URL.Path)
	a := s.of(r.URL.Path)
	return says(a.status, a.fields...), nil
}

func (s *routes) take() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	sent := s.sent
	s.sent = nil
	return sent
}

func TestTransportStopsOnlyTheRoutesOfAnExhaustedPolicy(t *testing.T) {
	t.Parallel()
	for name, login := range map[string]answer{
		"refused":  {429, []string{"RateLimit", `"login";r=0;t=30, "all";r=90;t=60`, "Retry-After", "30"}},
		"by cost":  {429, []string{"RateLimit", `"login";r=3;t=30, "all";r=90;t=60`, "Retry-After", "30"}},
		"no field": {429, []string{"RateLimit", `"login";r=0;t=30, "all";r=90;t=60`}},
		"forecast": {200, []string{"RateLimit", `"login";r=0;t=30, "all";r=90;t=60`}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := &routes{of: func(path string) answer {
					if path == "/login" {
						return login
					}
					return answer{200, []string{"RateLimit", `"all";r=90;t=60`}}
				}}
				tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{Attempts: 1})
				start := time.Now()
				for _, path := range []string{"login", "known", "known", "other", "other?page=2", "login/help"} {
					_, err := get(t.Context(), tr, api+path)
					require.NoError(t, err)
				}
				assert.Zero(t, time.Since(start))
				_, err := get(t.Context(), tr, api+"login")
				require.NoError(t, err)
				assert.GreaterOrEqual(t, time.Since(start), 30*time.Second)
			})
		})
	}
}

func TestTransportStopsTheWholeHostByWhatNamesNoPolicy(t *testing.T) {
	t.Parallel()
	for name, refusal := range map[string]answer{
		"429 without a RateLimit": {429, []string{"Retry-After", "30"}},
		"429 with a faulty one":   {429, []string{"Retry-After", "30", "RateLimit", "faulty"}},
		"503 with a RateLimit":    {503, []string{"Retry-After", "30", "RateLimit", `"all";r=90;t=60`}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := &routes{of: func(path string) answer {
					if path == "/a" {
						return refusal
					}
					return answer{200, []string{"RateLimit", `"all";r=90;t=60`}}
				}}
				tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{Attempts: 1})
				start := time.Now()
				for _, path := range []string{"b", "a", "b"} {
					_, err := get(t.Context(), tr, api+path)
					require.NoError(t, err)
				}
				assert.GreaterOrEqual(t, time.Since(start), 30*time.Second)
			})
		})
	}
}

func TestTransportStopsAllRoutesOfAPolicyThatTheyShare(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		answers := map[string]answer{
			"/a": {200, []string{"RateLimit", `"all";r=90;t=60`}},
			"/b": {200, []string{"RateLimit", `"all";r=90;t=60;pk=:b64b:`}},
			"/c": {429, []string{"RateLimit", `"all";r=0;t=30`, "Retry-After", "30"}},
		}
		server := &routes{of: func(path string) answer { return answers[path] }}
		tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{Attempts: 1})
		ask := func(path string) time.Duration {
			start := time.Now()
			_, err := get(t.Context(), tr, "http://api.test"+path)
			require.NoError(t, err)
			return time.Since(start)
		}
		for _, path := range []string{"/a", "/b", "/c", "/b"} {
			assert.Zero(t, ask(path), "of %s", path)
		}
		assert.GreaterOrEqual(t, ask("/a"), 30*time.Second, "the same partition")
	})
}

func TestTransportAsksUnknownRoutesOneAtATimeAfterARefusal(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := &routes{of: func(string) answer {
			return answer{429, []string{"RateLimit", `"all";r=0;t=60`, "Retry-After", "60"}}
		}}
		tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{Attempts: 1})
		_, err := get(t.Context(), tr, api+"items/first")
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
		defer cancel()
		var wg sync.WaitGroup
		for i := range 200 {
			wg.Go(func() { _, _ = get(ctx, tr, fmt.Sprint(api, "items/", i)) })
		}
		synctest.Wait()
		assert.Len(t, server.take(), 2)
		wg.Wait()
		assert.Len(t, server.take(), 5, "after 1, 2, 4, 8 and 16 s")
	})
}

// tokens is a base with a Continuous bucket of 10 per 5 s. until chooses what its t means.
type tokens struct {
	mu    sync.Mutex
	spent time.Duration // a token is half a second
	seen  time.Time
	until func(spent time.Duration) time.Duration
	sent  int
	no    int
}

func (s *tokens) RoundTrip(*http.Request) (*http.Response, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	const token = time.Second / 2
	now := time.Now()
	s.spent, s.seen = max(s.spent-now.Sub(s.seen), 0), now
	status, after := 200, "0"
	s.sent++
	if s.spent+token > 10*token {
		s.no++
		status, after = 429, "1"
	} else {
		s.spent += token
	}
	t := math.Ceil(s.until(s.spent).Seconds())
	resp := says(status, "RateLimit", fmt.Sprintf(`"a";r=%d;t=%d`, (10*token-s.spent)/token, int(t)))
	if status == 429 {
		resp.Header.Set("Retry-After", after)
	}
	return resp, nil
}

func untilNext(spent time.Duration) time.Duration {
	if rest := spent % (time.Second / 2); rest > 0 {
		return rest
	}
	return time.Second / 2
}

func untilFull(spent time.Duration) time.Duration { return spent }

func TestTransportPacesByTheTimeUntilTheNextToken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server, start := &tokens{until: untilNext}, time.Now()
		tr := throttlerhttp.NewTransport(server, nil)
		fleet(t, tr, 13)
		assert.LessOrEqual(t, time.Since(start), 2300*time.Millisecond, "at once")
	})
	synctest.Test(t, func(t *testing.T) {
		server, start := &tokens{until: untilNext}, time.Now()
		tr := throttlerhttp.NewTransport(server, nil)
		for range 13 {
			fleet(t, tr, 1)
		}
		assert.LessOrEqual(t, time.Since(start), 2300*time.Millisecond, "one after another")
		assert.Zero(t, server.no)
	})
}

func TestTransportServesACrowdWithFewRefusals(t *testing.T) {
	t.Parallel()
	for name, until := range map[string]func(time.Duration) time.Duration{"t until the next token": untilNext, "t until all are back": untilFull} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := &tokens{until: until}
				tr := throttlerhttp.NewTransport(server, nil)
				fleet(t, tr, 1)
				count := fleet(t, tr, 100)
				assert.GreaterOrEqual(t, count[200], 60)
				assert.LessOrEqual(t, server.no, 20)
			})
		})
	}
}

func TestTransportSendsNoMoreThanWhatRemains(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		field string
		sent  []int // until one second, until the reset, and after it
	}{
		"many":              {`"a";r=40;t=20`, []int{40, 40, 100}},
		"a second":          {`"a";r=3;t=1`, []int{3, 100, 100}},
		"of several limits": {`"a";r=40;t=20, "b";r=20;t=5`, []int{20, 40, 100}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := newFakeServer(limits(c.field), served)
				server.takes = time.Second - 1
				tr := throttlerhttp.NewTransport(server, nil)
				fleet(t, tr, 1)
				go fleet(t, tr, 100)
				for i, at := range []time.Duration{time.Second / 2, 19 * time.Second, time.Minute} {
					<-time.After(time.Until(server.start.Add(time.Second + at)))
					server.mu.Lock()
					assert.Len(t, server.at, 1+c.sent[i])
					server.mu.Unlock()
				}
			})
		})
	}
}

func TestTransportWakesThoseWhoWaitWhenMoreRemains(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limits(`"a";r=1;t=50`), limits(`"a";r=90;t=50`), served)
		tr := throttlerhttp.NewTransport(server, nil)
		fleet(t, tr, 1)
		fleet(t, tr, 50)
		assert.LessOrEqual(t, server.at[50], 28*time.Second, "the time of the second, not the reset")
	})
}

func TestTransportCountsThoseWhoWaitForTheirTurnByTheLatestForecast(t *testing.T) {
	t.Parallel()
	for forecast, sent := range map[string][]time.Duration{ // of the last two: before the reset only as many as remain
		`"a";r=0;t=90`:  {100 * time.Second, 100 * time.Second},
		`"a";r=1;t=90`:  {20 * time.Second, 100 * time.Second},
		`"a";r=8;t=90`:  {20 * time.Second, 30 * time.Second},
		`"a";r=0;t=5`:   {20 * time.Second, 30 * time.Second},
		`"a";r=99;t=90`: {20 * time.Second, 30 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			server := newFakeServer(limits(`"a";r=9;t=100`), limits(forecast), served)
			tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{MaxWait: time.Hour})
			fleet(t, tr, 1)
			fleet(t, tr, 3)
			for i, at := range sent {
				assert.GreaterOrEqual(t, server.at[i+2], at, forecast)
				assert.LessOrEqual(t, server.at[i+2], at+at/5, forecast)
			}
		})
	}
}

func TestTransportLetsNobodyWaitBehindAnOldForecast(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limits(`"a";r=9;t=100`), limits(`"a";r=99;t=90`), served)
		tr := throttlerhttp.NewTransport(server, nil)
		fleet(t, tr, 1)
		var others sync.WaitGroup
		others.Go(func() { fleet(t, tr, 3) })
		<-time.After(12 * time.Second) // the first of them was sent, the others are to come at 20 and 30 s
		fleet(t, tr, 1)
		assert.Equal(t, 12*time.Second, time.Since(server.start))
		others.Wait()
	})
}

func TestTransportAsksOneAtATimeWhenNothingRemainsForLong(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(limits(`"a";r=0;t=3600`), limits(`"a";r=0;t=3600`), answer{429, []string{"RateLimit", `"a";r=0;t=3600`, "Retry-After", "600"}})
		server.takes = time.Second
		tr := throttlerhttp.NewTransport(server, nil)
		fleet(t, tr, 1)
		assert.Equal(t, map[int]int{200: 1, 429: 1, 0: 198}, fleet(t, tr, 200))
		assert.Len(t, server.at, 3)
		assert.Equal(t, 3*time.Second, time.Since(server.start))
	})
}

func TestTransportHeedsContextsWhileItDrains(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		body := newStalled()
		tr := throttlerhttp.NewTransport(tripper(func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: 429, Header: http.Header{"Retry-After": {"1"}}, Body: body}, nil
		}), nil)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(100*time.Millisecond, cancel)
		start := time.Now()
		_, err := get(ctx, tr, api)
		assert.ErrorIs(t, err, context.Canceled)
		assert.Equal(t, 100*time.Millisecond, time.Since(start))
	})
}

func TestTransportTakesAnswersWithoutABody(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sent := 0
		tr := throttlerhttp.NewTransport(tripper(func(*http.Request) (*http.Response, error) {
			sent++
			return &http.Response{StatusCode: 429}, nil
		}), nil)
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, api, nil)
		require.NoError(t, err)
		r.Method = ""            // is GET
		_, err = tr.RoundTrip(r) //nolint:bodyclose // there is none
		require.NoError(t, err)
		assert.Equal(t, 3, sent)
	})
}

func TestTransportFollowsRedirectsAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := &routes{of: func(path string) answer {
			if path == "/" {
				return answer{302, []string{"Location", "/there", "Retry-After", "30", "RateLimit", `"a";r=0;t=30`}}
			}
			return served
		}}
		client, start := http.Client{Transport: throttlerhttp.NewTransport(server, nil)}, time.Now()
		resp, err := client.Get(api)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		assert.Equal(t, []string{"/", "/there"}, server.take())
		assert.Zero(t, time.Since(start))
	})
}

func TestTransportBoundsItsMemoryOfHostsAndRoutes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := newFakeServer(answer{429, []string{"RateLimit", `"a";r=0;t=9, "b";r=0;t=9`, "Retry-After", "9"}})
		tr := throttlerhttp.NewTransport(server, &throttlerhttp.TransportOptions{MaxWait: 20 * time.Second, RetryBurst: 5000, Attempts: 2})
		var wg sync.WaitGroup
		for i := range 1500 {
			wg.Go(func() {
				status, err := get(t.Context(), tr, fmt.Sprintf("http://host%d.test/%d", i, i))
				assert.NoError(t, err)
				assert.Equal(t, 429, status)
			})
		}
		wg.Wait()
		assert.Len(t, server.at, 3000)
		assert.GreaterOrEqual(t, server.at[1500], 9*time.Second, "not even what was forgotten is asked early")
		assert.LessOrEqual(t, throttlerhttp.Remembered(tr), 2000)
	})
}

func TestTransportIgnoresTheFieldsOfInterimAnswers(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "30")
		w.Header().Set("RateLimit", `"a";r=0;t=30`)
		w.WriteHeader(http.StatusEarlyHints)
		clear(w.Header())
	}))
	t.Cleanup(server.Close)
	client := &http.Client{Timeout: 10 * time.Second, Transport: throttlerhttp.NewTransport(server.Client().Transport, nil)}
	for range 3 {
		resp, err := client.Get(server.URL)
		require.NoError(t, err)
		assert.NoError(t, resp.Body.Close())
		assert.Equal(t, http.StatusOK, resp.StatusCode)
	}
}

// refusing starts a real server that always gives this answer, and counts its requests.
func refusing(t *testing.T, status int, after string) (*httptest.Server, *atomic.Int64) {
	t.Helper()
	var sent atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sent.Add(1)
		_, _ = io.Copy(io.Discard, r.Body)
		if after != "" {
			w.Header().Set("Retry-After", after)
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, "not now")
	}))
	t.Cleanup(server.Close)
	return server, &sent
}

func TestTransportSendsNothingToARealServerBeforeItsTime(t *testing.T) {
	t.Parallel()
	for name, after := range map[string]string{
		"seconds": "30", "a date": time.Now().Add(time.Minute).UTC().Format(http.TimeFormat), "a year": "31536000", "none at all": "0", "missing": "",
		"a past date": time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat),
	} {
		server, sent := refusing(t, http.StatusTooManyRequests, after)
		base := &http.Transport{}
		client := &http.Client{Transport: throttlerhttp.NewTransport(base, &throttlerhttp.TransportOptions{Attempts: 1})}
		resp, err := client.Get(server.URL)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		assert.Equal(t, http.StatusTooManyRequests, resp.StatusCode)
		client.Timeout = 50 * time.Millisecond
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() {
				_, err := client.Get(server.URL) //nolint:bodyclose // there is none
				assert.ErrorIs(t, err, context.DeadlineExceeded, name)
			})
		}
		wg.Wait()
		assert.EqualValues(t, 1, sent.Load(), name)
		base.CloseIdleConnections()
		server.Close()
	}
}

func TestTransportSendsOneProbeASecondToARealServer(t *testing.T) {
	t.Parallel()
	server, sent := refusing(t, http.StatusTooManyRequests, "1")
	client := &http.Client{Timeout: 2500 * time.Millisecond, Transport: throttlerhttp.NewTransport(server.Client().Transport, &throttlerhttp.TransportOptions{Attempts: 1})}
	var wg sync.WaitGroup
	ask := func() {
		if resp, err := client.Post(server.URL, "text/plain", strings.NewReader("cargo")); err == nil {
			assert.NoError(t, resp.Body.Close())
		}
	}
	ask()
	for range 200 {
		wg.Go(ask)
	}
	wg.Wait()
	assert.GreaterOrEqual(t, sent.Load(), int64(2))
	assert.LessOrEqual(t, sent.Load(), int64(3))
}
