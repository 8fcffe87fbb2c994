package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/rules"
)

const token = "correct-horse-battery"

var withToken = map[string]string{"THROTTLERD_ADMIN_TOKEN": token}

// administer sends a request to the admin API with the token.
func (r *running) administer(t *testing.T, method, path, body string, header ...string) answer {
	t.Helper()
	return do(t, method, "http://"+r.address("admin")+path, body, append([]string{"Authorization", "Bearer " + token}, header...)...)
}

func TestWithoutATokenThereIsNoAdminAPI(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", "../examples/rules")
	require.Empty(t, d.address("admin"))
	_, err := parse([]string{"-rules", "x"}, func(string) string { return "short" }, &text{})
	require.ErrorContains(t, err, "at least 16")
	require.NotContains(t, err.Error(), "short")
}

func TestATokenMayEndWithANewline(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "token")
	overwrite(t, file, token+"\n")
	none := func(string) string { return "" }
	environment := func(string) string { return token + "\n" }
	for _, test := range []struct {
		args []string
		env  func(string) string
	}{{[]string{"-rules", "x", "-admin-token-file", file}, none}, {[]string{"-rules", "x"}, environment}} {
		c, err := parse(test.args, test.env, io.Discard)
		require.NoError(t, err)
		require.Equal(t, token, c.adminToken)
	}
}

func TestNothingIsDoneWithoutTheToken(t *testing.T) {
	t.Parallel()
	d := start(t, withToken, "-rules", written(t, "rules: [{name: a, limits: [1/1h]}]\n"), "-source", "memory")
	before := d.engine.Rules().ETag()
	for _, authorization := range []string{"", token, "Bearer", "Bearer ", "Bearer wrong-horse-battery", "Bearer " + token + "x", "Bearer " + token[:20], "Basic " + token, "Bearer " + token + ", Bearer x"} {
		for _, what := range [][2]string{{"PUT", "/v1/rules/x"}, {"DELETE", "/v1/rules/rules.yaml"}, {"GET", "/v1/rules"}, {"GET", "/v1/levels"}, {"DELETE", "/v1/levels"}, {"GET", "/nowhere"}} {
			a := do(t, what[0], "http://"+d.address("admin")+what[1], "rules: []", "Authorization", authorization, "If-Match", "*")
			require.Equal(t, http.StatusUnauthorized, a.status, "%s %v", authorization, what)
			require.NotEmpty(t, a.header.Get("Www-Authenticate"))
		}
	}
	require.Equal(t, before, d.engine.Rules().ETag())
	require.Contains(t, d.log.String(), `"did":"refused"`)
	require.NotContains(t, d.log.String(), "battery", "no token is logged, right or wrong")
	for _, path := range []string{"/v1/rules", "/v1/levels"} {
		require.Equal(t, http.StatusNotFound, d.get(t, path, "Authorization", "Bearer "+token).status, "the other listener has no admin API")
	}
}

func TestAChangeCountsBeforeItsAnswer(t *testing.T) {
	t.Parallel()
	d := start(t, withToken, "-rules", written(t, "rules: [{name: a, limits: [1/1h]}]\n"), "-source", "memory")
	const body = `{"entries":{}}`
	require.Equal(t, 200, d.post(t, "/v1/decide", body).status)
	require.Equal(t, 429, d.post(t, "/v1/decide", body).status)

	a := d.administer(t, "GET", "/v1/rules/rules.yaml", "")
	require.Equal(t, 200, a.status)
	require.Equal(t, "rules: [{name: a, limits: [1/1h]}]\n", a.body)
	tag := a.header.Get("Etag")
	const two = "rules: [{name: a, limits: [2/1h]}]\n"
	require.Equal(t, http.StatusPreconditionRequired, d.administer(t, "PUT", "/v1/rules/rules.yaml", two).status)
	a = d.administer(t, "PUT", "/v1/rules/rules.yaml?dry-run", two, "If-Match", tag)
	require.Equal(t, 200, a.status, a.body)
	require.Contains(t, a.body, `"changed":false`)
	require.Equal(t, http.StatusBadRequest, d.administer(t, "PUT", "/v1/rules/rules.yaml?dry-run=yes", two, "If-Match", tag).status)
	require.Equal(t, 200, d.administer(t, "PUT", "/v1/rules/rules.yaml?dry-run=true", two, "If-Match", tag).status)
	require.Equal(t, 429, d.post(t, "/v1/decide", body).status, "a dry run changes nothing")
	a = d.administer(t, "PUT", "/v1/rules/rules.yaml?dry-run=false", two, "If-Match", tag)
	require.Equal(t, 200, a.status, a.body)
	require.Equal(t, 200, d.post(t, "/v1/decide", body).status, "and what was spent stays spent")
	require.Equal(t, 429, d.post(t, "/v1/decide", body).status)
	require.Contains(t, d.log.String(), `"did":"changed"`)
	require.Contains(t, d.log.String(), strings.Trim(tag, `"`), "the audit has the ETag before")

	require.Equal(t, http.StatusPreconditionFailed, d.administer(t, "PUT", "/v1/rules/rules.yaml", two, "If-Match", tag).status, "somebody has changed it")
	require.Equal(t, http.StatusPreconditionFailed, d.administer(t, "PUT", "/v1/rules/rules.yaml", two, "If-None-Match", "*").status)
	require.Equal(t, http.StatusPreconditionFailed, d.administer(t, "DELETE", "/v1/rules/rules.yaml", "", "If-Match", tag).status)
	require.Equal(t, http.StatusNotFound, d.administer(t, "DELETE", "/v1/rules/other.yaml", "", "If-Match", "*").status)
	require.Equal(t, http.StatusBadRequest, d.administer(t, "PUT", "/v1/rules/rules.yaml", two, "If-Match", "x").status)
	require.Equal(t, 200, d.administer(t, "DELETE", "/v1/rules/rules.yaml", "", "If-Match", "*").status)
	require.Equal(t, 404, d.post(t, "/v1/decide", body).status, "without rules nobody is let in")
	require.Equal(t, 200, d.administer(t, "PUT", "/v1/rules/rules.yaml", two, "If-None-Match", "*").status)
	require.Equal(t, 429, d.post(t, "/v1/decide", body).status)
}

func TestWrongRulesAreRefusedWithAllFaults(t *testing.T) {
	t.Parallel()
	d := start(t, withToken, "-rules", written(t, "rules: [{name: a, limits: [1/1h]}]\n"), "-source", "memory")
	a := d.administer(t, "PUT", "/v1/rules/b.yaml", "rules:\n- {name: a, limits: [1/1h]}\n- {name: b, limit: [1/1h]}\n", "If-None-Match", "*")
	require.Equal(t, http.StatusUnprocessableEntity, a.status)
	faults, _ := a.json(t)["faults"].([]any)
	require.GreaterOrEqual(t, len(faults), 2, a.body)
	require.Contains(t, a.body, `"meant":"limits"`)
	require.Contains(t, a.body, "must be unique")
	require.Len(t, d.engine.Rules().Rules(), 1)
}

func TestAPatchChangesOneRuleAndKeepsTheRest(t *testing.T) {
	t.Parallel()
	d := start(t, withToken, "-rules", written(t, "rules:\n# the first\n- {name: a, limits: [1/1h]}\n- name: b # the second\n  when: {path: /b}\n  limits: [1/1h]\n"), "-source", "memory")
	const file, patch = "/v1/rules/rules.yaml", `{"rules":[{"name":"a","limits":["3/1h"]}]}`
	body := `{"entries":{"path":"/a"}}`
	require.Equal(t, 200, d.post(t, "/v1/decide", body).status)
	require.Equal(t, 429, d.post(t, "/v1/decide", body).status)
	tag := d.administer(t, "GET", file, "").header.Get("Etag")

	require.Equal(t, http.StatusPreconditionRequired, d.administer(t, "PATCH", file, patch).status)
	require.Equal(t, http.StatusPreconditionFailed, d.administer(t, "PATCH", file, patch, "If-Match", `"other"`).status)
	require.Equal(t, http.StatusPreconditionFailed, d.administer(t, "PATCH", file, patch, "If-None-Match", "*").status)
	require.Equal(t, http.StatusNotFound, d.administer(t, "PATCH", "/v1/rules/other.yaml", patch, "If-Match", "*").status)
	dry := d.administer(t, "PATCH", file+"?dry-run", patch, "If-Match", tag)
	require.Equal(t, 200, dry.status, dry.body)
	require.Contains(t, dry.body, `"changed":false`)
	require.NotEqual(t, tag, dry.header.Get("Etag"))
	require.Equal(t, 429, d.post(t, "/v1/decide", body).status, "a dry run changes nothing")

	for wrong, says := range map[string]string{
		`{"rules":[{"name":"aa","limits":["3/1h"]}]}`: `"meant":"a"`,
		`{"rules":[{"name":"a","limit":["3/1h"]}]}`:   `"meant":"limits"`,
		`{"rules":[{"name":"a","limits":null}]}`:      "has no limits",
		`rules`:                                       `"file":"the patch","line":1`,
	} {
		a := d.administer(t, "PATCH", file, wrong, "If-Match", tag)
		require.Equal(t, http.StatusUnprocessableEntity, a.status, a.body)
		require.Contains(t, a.body, says)
	}
	require.Equal(t, tag, d.administer(t, "GET", file, "").header.Get("Etag"), "what is wrong changes nothing")

	a := d.administer(t, "PATCH", file, patch, "If-Match", tag, "Content-Type", "application/merge-patch+json")
	require.Equal(t, 200, a.status, a.body)
	require.Equal(t, dry.header.Get("Etag"), a.header.Get("Etag"))
	require.Equal(t, 200, d.post(t, "/v1/decide", body).status, "it counts before the answer, and what was spent stays spent")
	require.Equal(t, 200, d.post(t, "/v1/decide", body).status)
	require.Equal(t, 429, d.post(t, "/v1/decide", body).status)
	now := d.administer(t, "GET", file, "")
	require.Equal(t, a.header.Get("Etag"), now.header.Get("Etag"))
	require.Equal(t, "rules:\n# the first\n- {name: a, limits: [3/1h]}\n- name: b # the second\n  when: {path: /b}\n  limits: [1/1h]\n", now.body)
	require.Contains(t, d.log.String(), `"method":"PATCH"`)
	require.Contains(t, d.log.String(), strings.Trim(a.header.Get("Etag"), `"`), "the audit has the ETag after")
}

func TestWhatIsOutOfDateIsToldBeforeAnythingElse(t *testing.T) {
	t.Parallel()
	d := start(t, withToken, "-source", "memory", "-rules", written(t, "rules: [{name: a, limits: [1/1h]}, {name: b, limits: [1/1h]}]\n"))
	const file, patch, right = "/v1/rules/rules.yaml", `{"rules":[{"name":"a","limits":["3/1h"]}]}`, "domain: x\nrules: []\n"
	stale := d.administer(t, "GET", file, "").header.Get("Etag")
	require.Equal(t, 200, d.administer(t, "PUT", file, "rules: [{name: b, limits: [1/1h]}]\n", "If-Match", stale).status)
	for _, dry := range []string{"", "?dry-run"} {
		for _, asked := range [][]string{
			{"PATCH", file, patch, "If-Match", stale}, {"PATCH", file, "wrong", "If-Match", stale}, {"PUT", file, "wrong", "If-Match", stale}, {"DELETE", file, "", "If-Match", stale},
			{"PATCH", "/v1/rules/gone", patch, "If-Match", stale}, {"PUT", "/v1/rules/gone", right, "If-Match", stale}, {"DELETE", "/v1/rules/gone", "", "If-Match", stale},
			{"PUT", "/v1/rules/gone", right, "If-Match", `"absent"`},
		} {
			a := d.administer(t, asked[0], asked[1]+dry, asked[2], asked[3:]...)
			require.Equal(t, http.StatusPreconditionFailed, a.status, "%v: %s", asked, a.body)
			require.Contains(t, a.body, "somebody else")
		}
		a := d.administer(t, "PUT", file+dry, "wrong", "If-None-Match", "*")
		require.Equal(t, http.StatusPreconditionFailed, a.status)
		require.Contains(t, a.body, "there is a file of this name already")
		require.Equal(t, http.StatusBadRequest, d.administer(t, "PUT", file+dry, right, "If-Match", stale+", "+stale).status)
	}
}

// TestABodyThatBreaksOffIsNoneThatIsTooLarge sends less than it says.
func TestABodyThatBreaksOffIsNoneThatIsTooLarge(t *testing.T) {
	t.Parallel()
	for _, put := range []func(*admin, http.ResponseWriter, *http.Request){(*admin).put, (*admin).patch} {
		w := httptest.NewRecorder()
		put(&admin{}, w, httptest.NewRequestWithContext(t.Context(), http.MethodPut, "/v1/rules/x", iotest.ErrReader(io.ErrUnexpectedEOF)))
		require.Equal(t, http.StatusBadRequest, w.Code)
		require.Contains(t, w.Body.String(), "did not arrive")
	}
}

func TestRulesOfFilesAreReadOnly(t *testing.T) {
	t.Parallel()
	d := start(t, withToken, "-rules", "../examples/rules")
	a := d.administer(t, "GET", "/v1/rules", "")
	require.Equal(t, 200, a.status)
	require.Contains(t, a.body, `"writable":false`)
	require.Contains(t, a.body, "envoy.yaml")
	require.Equal(t, http.StatusConflict, d.administer(t, "PUT", "/v1/rules/x", "rules: []", "If-Match", "*").status)
}

func TestTheCurlOfTheDocChecksAFile(t *testing.T) {
	t.Parallel()
	doc := read(t, "../docs/throttlerd.md")
	found := regexp.MustCompile(`(?s)-T (\S+) \\\s+'localhost:8082(/v1/rules/\S+)'`).FindStringSubmatch(doc)
	require.NotNil(t, found)
	require.Contains(t, doc, "go run . -rules ../examples/rules\n")
	d := start(t, withToken, "-rules", "../examples/rules")
	a := d.administer(t, "PUT", found[2], read(t, found[1]), "If-Match", "*")
	require.Equal(t, 200, a.status, a.body)
	require.Contains(t, a.body, `"changed":false`)
}

func TestMatchLevelsAndReset(t *testing.T) {
	t.Parallel()
	d := start(t, withToken, "-rules", "../examples/rules")
	for range 5 {
		require.Equal(t, 200, d.post(t, "/v1/decide", `{"domain":"api","entries":{"path":"/api/x","user":"42"}}`).status)
	}
	const query = "?domain=api&entry=path=/api/x&entry=user=42"
	a := d.administer(t, "GET", "/v1/match"+query, "")
	require.Contains(t, a.body, `{"rule":"api","file":"../examples/rules/api.yaml","line":8,"applies":true}`)
	require.Contains(t, a.body, `"applies":false,"why":"the entry \"path\" is \"/api/x\", must be /login"`)
	require.Contains(t, d.administer(t, "GET", "/v1/levels"+query, "").body, `"limit":5,"remaining":0`)
	require.Equal(t, http.StatusNoContent, d.administer(t, "DELETE", "/v1/levels"+query, "").status)
	require.Contains(t, d.administer(t, "GET", "/v1/levels"+query, "").body, `"limit":5,"remaining":5`)
	require.Contains(t, d.log.String(), `"did":"reset"`)
	require.Equal(t, http.StatusBadRequest, d.administer(t, "GET", "/v1/levels?entry=x", "").status)
}

func TestTheAdminAPIDoesNothingByWordsThatItDoesNotKnow(t *testing.T) {
	t.Parallel()
	d := start(t, withToken, "-rules", "../examples/rules", "-source", "memory")
	before := d.engine.Rules().ETag()
	for _, c := range []struct {
		method, path string
		status       int
		want         string
	}{
		{"DELETE", "/v1/levels?domain=api&entries=user=42", 400, `the parameter \"entries\" is unknown here, must be domain or entry`},
		{"DELETE", "/v1/levels?domain=api&entry=user", 400, "must be key=value"},
		{"DELETE", "/v1/levels?domain=api&domain=auth&entry=user=42", 400, `the parameter \"domain\" is given 2 times`},
		{"PUT", "/v1/rules/api.yaml?dry-run=false&dry-run=true", 400, `the parameter \"dry-run\" is given 2 times`},
		{"DELETE", "/v1/levels?domain=api&entry=path=/a;b", 400, "; is %3B"},
		{"DELETE", "/v1/levels?domain=apo&entry=user=42", 404, `the domain \"apo\" has no rules, 3 others have: [\"api\"`},
		{"DELETE", "/v1/levels?domain=api&entry=usr=42", 404, "no rule applies"},
		{"GET", "/v1/levels?domain=apo", 404, "has no rules"},
		{"GET", "/v1/levels?Domain=api", 400, `\"Domain\" is unknown here`},
		{"GET", "/v1/match?domain=apo", 404, "has no rules"},
		{"GET", "/v1/match?domain=api&user=42", 400, `\"user\" is unknown here`},
		{"GET", "/v1/rules?find=x", 400, `\"find\" is unknown here, must be left out`},
		{"DELETE", "/v1/rules/api.yaml?dryrun", 400, `\"dryrun\" is unknown here, must be dry-run`},
		{"PUT", "/v1/rules/api.yaml?dry_run=true", 400, `\"dry_run\" is unknown here`},
		{"PATCH", "/v1/rules/api.yaml?dry-run&force", 400, `\"force\" is unknown here`},
	} {
		a := d.administer(t, c.method, c.path, "rules: []", "If-Match", "*")
		require.Equal(t, c.status, a.status, "%s %s: %s", c.method, c.path, a.body)
		require.Contains(t, a.body, c.want, c.path)
	}
	r := httptest.NewRequest("PUT", "/v1/rules/api.yaml", strings.NewReader("rules: []"))
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header["If-Match"] = []string{"*", `"zzz"`}
	w := httptest.NewRecorder()
	d.admin.handler().ServeHTTP(w, r)
	require.Equal(t, http.StatusBadRequest, w.Code)
	require.Equal(t, before, d.engine.Rules().ETag())
	require.NotContains(t, d.log.String(), `"did":"reset"`)
}

func TestADomainThatIsNotNamedIsTheDefault(t *testing.T) {
	t.Parallel()
	file := written(t, "rules: [{name: a, per: [user], limits: [1/1h]}]\n")
	d := start(t, withToken, "-rules", file)
	for _, domain := range []string{"", "domain=default&"} {
		require.Contains(t, d.administer(t, "GET", "/v1/match?"+domain+"entry=user=42", "").body, `"applies":true`)
		require.Equal(t, 200, d.administer(t, "GET", "/v1/levels?"+domain+"entry=user=42", "").status)
		require.Equal(t, http.StatusNoContent, d.administer(t, "DELETE", "/v1/levels?"+domain+"entry=user=42", "").status)
	}
	require.Equal(t, 0, command(t.Context(), []string{"match", file, "user=42"}, io.Discard, io.Discard))
}

func TestWhatPostgresCannotStoreIsAFaultOfTheClient(t *testing.T) {
	t.Parallel()
	for _, source := range [][]string{{"-source", "memory"}, {"-source", "postgres", "-postgres-url", servers.Postgres(t).URL()}} {
		d := start(t, withToken, append(source, "-rules", written(t, "rules: []\n"))...)
		for _, dry := range []string{"", "?dry-run"} {
			const right = "domain: x\nrules: []\n"
			a := d.administer(t, "PUT", "/v1/rules/b.json"+dry, "{\"domain\": \"x\", \"rules\": [], \"$schema\": \"J\xfcrgen\"}", "If-Match", "*")
			require.Equal(t, http.StatusUnprocessableEntity, a.status, a.body)
			require.Contains(t, a.body, "is not UTF-8")
			require.Equal(t, http.StatusUnprocessableEntity, d.administer(t, "PUT", "/v1/rules/b.yaml"+dry, right+"# \x00", "If-Match", "*").status)
			for _, name := range []string{"%ff.yaml", "a%00", "%ed%a0%80"} {
				for method, status := range map[string]int{"PUT": 400, "DELETE": 404} {
					a := d.administer(t, method, "/v1/rules/"+name+dry, right, "If-Match", "*")
					require.Equal(t, status, a.status, "%s %s: %s", method, name, a.body)
				}
				require.Equal(t, http.StatusNotFound, d.administer(t, "GET", "/v1/rules/"+name, "").status, name)
			}
		}
	}
}

func TestTheBodyOfAFileIsBounded(t *testing.T) {
	t.Parallel()
	d := start(t, withToken, "-source", "memory")
	a := d.administer(t, "PUT", "/v1/rules/x", strings.Repeat("#", maxRules+1), "If-Match", "*")
	require.Equal(t, http.StatusRequestEntityTooLarge, a.status)
}

// administered returns an admin API whose engine does not look for newer rules within an hour.
func administered(t *testing.T, source rules.Store, log *text) *admin {
	t.Helper()
	limits, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	engine, err := rules.NewEngine(limits, source, &rules.Options{Interval: time.Hour})
	require.NoError(t, err)
	t.Cleanup(engine.Close)
	a := newAdmin(token, slog.New(slog.NewJSONHandler(log, nil)), newActivity(), nil)
	t.Cleanup(a.leave)
	a.serves(engine, source)
	return a
}

// putting returns a request that puts the file x.
func putting(ctx context.Context, url string) *http.Request {
	r, _ := http.NewRequestWithContext(ctx, http.MethodPut, url+"/v1/rules/x", strings.NewReader("rules: [{name: a, limits: [1/1h]}]"))
	r.Header.Set("Authorization", "bearer "+token)
	r.Header.Set("If-None-Match", "*")
	return r
}

// TestAnAnswerWaitsForTheReload uses a source that reports no changes. Only the reload before the answer can put the new
// rules in force.
func TestAnAnswerWaitsForTheReload(t *testing.T) {
	t.Parallel()
	a := administered(t, struct{ rules.Store }{rules.NewMemory()}, &text{})
	w := httptest.NewRecorder()
	a.handler().ServeHTTP(w, putting(t.Context(), ""))
	require.Equal(t, http.StatusOK, w.Code, w.Body)
	require.Len(t, a.engine.Rules().Rules(), 1)
}

// watched is a Store that calls functions before and after a change.
type watched struct {
	rules.Store
	before, after func()
}

func (w watched) Change(ctx context.Context, edit func([]rules.File) ([]rules.File, error)) error {
	w.before()
	defer w.after()
	return errors.Join(ctx.Err(), w.Store.Change(ctx, edit))
}

func TestAChangeWhoseClientLeavesIsMadeAndInTheAudit(t *testing.T) {
	t.Parallel()
	for i := range 2 {
		ctx, leave := context.WithCancel(t.Context())
		leaves := []func(){func() {}, func() {}}
		leaves[i] = leave
		log := &text{}
		a := administered(t, watched{rules.NewMemory(), leaves[0], leaves[1]}, log)
		a.handler().ServeHTTP(httptest.NewRecorder(), putting(ctx, ""))
		require.Contains(t, log.String(), `"did":"changed"`)
		require.Len(t, a.engine.Rules().Rules(), 1)
	}
}

// TestAChangeThatTakesLongIsAnswered takes longer than answers may.
func TestAChangeThatTakesLongIsAnswered(t *testing.T) {
	t.Parallel()
	const answers = 200 * time.Millisecond
	a := administered(t, watched{rules.NewMemory(), func() { <-time.After(2 * answers) }, func() {}}, &text{})
	s := httptest.NewUnstartedServer(a.handler())
	s.Config.WriteTimeout = answers
	s.Start()
	defer s.Close()
	out, err := s.Client().Do(putting(t.Context(), s.URL))
	require.NoError(t, err)
	require.NoError(t, out.Body.Close())
	require.Equal(t, http.StatusOK, out.StatusCode)
}

// committed is a Store that loses the answer of a commit.
type committed struct{ rules.Store }

func (c committed) Change(ctx context.Context, edit func([]rules.File) ([]rules.File, error)) error {
	return errors.Join(c.Store.Change(ctx, edit), errors.New("the connection is lost"))
}

func TestAChangeThatMayBeStoredIsInTheAudit(t *testing.T) {
	t.Parallel()
	log := &text{}
	a := administered(t, committed{rules.NewMemory()}, log)
	w := httptest.NewRecorder()
	a.handler().ServeHTTP(w, putting(t.Context(), ""))
	require.Equal(t, http.StatusServiceUnavailable, w.Code)
	require.Contains(t, log.String(), `"did":"perhaps changed"`)
}
