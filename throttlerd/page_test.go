package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// surfer behaves like a browser with regard to cookies and redirects.
type surfer struct {
	*http.Client
	base string
}

func (r *running) surfer(t *testing.T) *surfer {
	t.Helper()
	jar, err := cookiejar.New(nil)
	require.NoError(t, err)
	return &surfer{&http.Client{Jar: jar, Transport: &http.Transport{DisableKeepAlives: true}}, "http://" + r.address("admin")}
}

func (s *surfer) do(t *testing.T, method, path, body string, header ...string) answer {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, s.base+path, strings.NewReader(body))
	require.NoError(t, err)
	r.Header.Set("Accept", "text/html")
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	out, err := s.Do(r)
	require.NoError(t, err)
	defer func() { _ = out.Body.Close() }()
	data, err := io.ReadAll(out.Body)
	require.NoError(t, err)
	return answer{out.StatusCode, out.Header, string(data)}
}

func (s *surfer) login(t *testing.T, token string) answer {
	t.Helper()
	return s.do(t, "POST", "/login", url.Values{"token": {token}}.Encode(), "Content-Type", "application/x-www-form-urlencoded")
}

func TestABrowserLogsInWithTheTokenAndOut(t *testing.T) {
	t.Parallel()
	d := start(t, withToken, "-rules", "../examples/rules")
	s := d.surfer(t)
	for _, path := range []string{"/", "/debug/throttler/", "/page/rules", "/v1/rules"} {
		a := s.do(t, "GET", path, "")
		require.Equal(t, 200, a.status)
		require.Contains(t, a.body, `name="token"`, "the form is there, and nothing else: %s", path)
		require.NotContains(t, a.body, "gold")
	}
	a := s.login(t, "wrong-horse-battery")
	require.Equal(t, http.StatusUnauthorized, a.status)
	require.Contains(t, a.body, "This is not the token.")
	require.Empty(t, a.header.Values("Set-Cookie"))
	require.Equal(t, http.StatusUnauthorized, s.login(t, "").status)
	require.Equal(t, http.StatusUnauthorized, s.login(t, strings.Repeat("x", maxForm)).status)

	s.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	a = s.login(t, token)
	require.Equal(t, http.StatusSeeOther, a.status)
	cookie := a.header.Get("Set-Cookie")
	for _, word := range []string{"HttpOnly", "SameSite=Strict", "Path=/", "Max-Age=43200"} {
		require.Contains(t, cookie, word)
	}
	require.NotContains(t, cookie, token)
	require.NotContains(t, cookie, "Secure", "this listener has no TLS")
	a = s.do(t, "GET", "/", "")
	require.Equal(t, 200, a.status)
	require.Contains(t, a.body, "gold")
	require.Contains(t, a.header.Get("Content-Security-Policy"), "default-src 'none'")
	require.Contains(t, s.do(t, "GET", "/debug/throttler/", "").body, "Rate limits now")
	require.Equal(t, 200, s.do(t, "GET", "/v1/rules", "").status)
	require.Equal(t, http.StatusUnauthorized, s.do(t, "GET", "/v1/rules", "", "Authorization", "Bearer wrong").status, "a wrong token is not mended by a cookie")

	before := s.Jar.Cookies(mustParse(t, s.base))
	require.Equal(t, http.StatusSeeOther, s.do(t, "POST", "/logout", "").status)
	require.Equal(t, http.StatusSeeOther, s.do(t, "GET", "/", "").status)
	s.Jar.SetCookies(mustParse(t, s.base), before)
	require.Equal(t, http.StatusSeeOther, s.do(t, "GET", "/", "").status, "who kept the cookie has nothing")
	log := d.log.String()
	require.Contains(t, log, `"did":"login"`)
	require.Contains(t, log, `"did":"logout"`)
	require.NotContains(t, log, "battery")
	require.NotContains(t, log, before[0].Value)
}

func mustParse(t *testing.T, address string) *url.URL {
	t.Helper()
	u, err := url.Parse(address)
	require.NoError(t, err)
	return u
}

func TestBehindAProxyWithTLSTheCookieIsSecure(t *testing.T) {
	t.Parallel()
	s := start(t, withToken, "-rules", "../examples/rules").surfer(t)
	s.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	a := s.do(t, "POST", "/login", "token="+token, "Content-Type", "application/x-www-form-urlencoded", "X-Forwarded-Proto", "https")
	require.Contains(t, a.header.Get("Set-Cookie"), "Secure")
}

// TestAPageOfAnotherOriginChangesNothing sends the header fields of a browser's cross-origin request, with the cookie
// that a browser would send to another port of the host.
func TestAPageOfAnotherOriginChangesNothing(t *testing.T) {
	t.Parallel()
	d := start(t, withToken, "-source", "memory", "-rules", written(t, "rules: [{name: a, limits: [1/1h]}]\n"))
	s := d.surfer(t)
	require.Equal(t, 200, s.login(t, token).status)
	before := d.engine.Rules().ETag()
	for _, header := range [][]string{
		{"Sec-Fetch-Site", "cross-site"}, {"Sec-Fetch-Site", "same-site"}, {"Origin", "http://evil.test"}, {"Origin", "null"}, {"Origin", "http://127.0.0.1:1"},
	} {
		for _, what := range [][2]string{{"PUT", "/v1/rules/rules.yaml"}, {"DELETE", "/v1/rules/rules.yaml"}, {"DELETE", "/v1/levels"}, {"POST", "/login"}, {"POST", "/logout"}} {
			a := s.do(t, what[0], what[1], "rules: []", append([]string{"If-Match", "*"}, header...)...)
			require.Equal(t, http.StatusForbidden, a.status, "%v %v", header, what)
		}
	}
	require.Equal(t, before, d.engine.Rules().ETag())
	require.Equal(t, 200, s.do(t, "DELETE", "/v1/rules/rules.yaml", "", "If-Match", "*", "Sec-Fetch-Site", "same-origin").status)
}

func TestSessionsEndAndAreFew(t *testing.T) {
	t.Parallel()
	var s sessions
	now := time.Now()
	first := s.begin(now)
	require.True(t, s.has(first, now))
	require.False(t, s.has("", now))
	require.False(t, s.has(first, now.Add(sessionLasts)))
	for i := range maxSessions {
		s.begin(now.Add(time.Duration(i+1) * time.Second))
	}
	require.Len(t, s.until, maxSessions)
	require.False(t, s.has(first, now), "the oldest went")
}

func TestThePageShowsWhatRulesDoAndExplainsARequest(t *testing.T) {
	t.Parallel()
	d := start(t, withToken, "-rules", written(t, countedRules+"- {name: <script>, when: {path: '<b>'}, limits: [1/1h]}\n"))
	for range 3 {
		d.post(t, "/v1/decide", `{"domain":"x","entries":{"path":"/small"}}`)
	}
	a := d.administer(t, "GET", "/page/rules", "")
	require.Equal(t, 200, a.status)
	require.Contains(t, a.body, ">small</button>")
	require.Contains(t, a.body, `<td data-label="admitted">1</td><td data-label="denied">2</td>`)
	require.NotContains(t, a.body, "<script>")
	a = d.administer(t, "GET", "/page/rules?find=unas", "")
	require.Contains(t, a.body, "unasked")
	require.NotContains(t, a.body, ">small<")
	a = d.administer(t, "GET", "/page/match?domain=x&entry=path%3D/small", "")
	require.Contains(t, a.body, "Denied</strong> by small, for another ")
	require.Contains(t, a.body, "large/1h: 99 of 100")
	require.Contains(t, a.body, "must be /never")
	a = d.administer(t, "GET", "/page/match?domain=x&entry=path%3D/never", "")
	require.Contains(t, a.body, "asks for more than there can be")
	for range 2 { // asking takes nothing
		a = d.administer(t, "GET", "/page/match?domain=x&entry=path%3D%3Cb%3E", "")
		require.Contains(t, a.body, "Admitted</strong> by all rules")
		require.NotContains(t, a.body, "<b>")
	}
	require.Contains(t, d.administer(t, "GET", "/page/match?domain=x&entry=path", "").body, "must be key=value")
	require.Len(t, d.scrape(t, "throttlerd_rule_decisions_total"), 6, "looking counts nothing")
}

func TestThePageHasNotMoreThanTheBusiestOfManyRules(t *testing.T) {
	t.Parallel()
	var text strings.Builder
	text.WriteString("domain: x\nrules:\n")
	for i := range 3 * maxRows {
		_, _ = fmt.Fprintf(&text, "- {name: r%d, when: {user: u%[1]d}, limits: [1/1h]}\n", i)
	}
	d := start(t, withToken, "-rules", written(t, text.String()))
	d.post(t, "/v1/decide", `{"domain":"x","entries":{"user":"u599"}}`)
	a := d.administer(t, "GET", "/page/rules", "")
	require.Equal(t, maxRows+1, strings.Count(a.body, "<tr>"))
	require.Contains(t, a.body, "busiest of 600")
	require.Contains(t, a.body, ">r599<")
	require.Contains(t, d.administer(t, "GET", "/page/match?domain=x&entry=user%3Du", "").body, "and 400 more do not apply")
}

func TestRulesOfFilesAreCheckedAndNotSaved(t *testing.T) {
	t.Parallel()
	d := start(t, withToken, "-rules", "../examples/rules")
	path := "/v1/rules/" + url.PathEscape("../examples/rules/api.yaml")
	a := d.administer(t, "GET", path, "")
	require.Equal(t, 200, a.status)
	tag := a.header.Get("Etag")
	require.Equal(t, 200, d.administer(t, "PUT", path+"?dry-run", a.body, "If-Match", tag).status)
	require.Equal(t, 422, d.administer(t, "PUT", path+"?dry-run", "rules: [{}]", "If-Match", tag).status)
	require.Equal(t, 412, d.administer(t, "PUT", path+"?dry-run", a.body, "If-Match", `"x"`).status)
	require.Equal(t, 409, d.administer(t, "PUT", path, a.body, "If-Match", tag).status)
}

// TestWhoLooksAtTheLivePageDoesNotHoldUpTheEnd opens the event stream of the live page, which never ends by itself.
func TestWhoLooksAtTheLivePageDoesNotHoldUpTheEnd(t *testing.T) {
	t.Parallel()
	d := start(t, withToken, "-rules", "../examples/rules", "-drain", "10m")
	d.post(t, "/v1/decide", `{"domain":"api","entries":{"path":"/api/x","user":"42"}}`)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+d.address("admin")+"/debug/throttler/events", nil)
	require.NoError(t, err)
	r.Header.Set("Authorization", "Bearer "+token)
	out, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(r)
	require.NoError(t, err)
	defer func() { _ = out.Body.Close() }()
	require.Equal(t, 200, out.StatusCode)
	require.NoError(t, d.stop())
	body, err := io.ReadAll(out.Body)
	require.NoError(t, err)
	require.Contains(t, string(body), "data: ")
	require.Contains(t, string(body), "user=2:42", "it names who asks")
}
