package browsertest_test

// The admin page of throttlerd, with the daemon behind it.

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
	"github.com/stretchr/testify/require"
)

const token = "correct-horse-battery"

const twoRules = `domain: api
rules:
- {name: small, when: {path: /api/*}, per: [user], limits: [2/1h]}
- {name: login, when: {path: /login}, per: [address], limits: [3/1h]}
`

// daemon starts throttlerd with rules from the source, and returns the addresses of the admin page and of the HTTP API.
func daemon(t *testing.T, source string) (admin, api string) {
	rules := filepath.Join(t.TempDir(), "api.yaml")
	require.NoError(t, os.WriteFile(rules, []byte(twoRules), 0o600))
	addresses := map[string]string{}
	runProgram(t, "throttlerd", func(line []byte) bool {
		var said struct{ Msg, For, Address string }
		if line != nil {
			require.NoError(t, json.Unmarshal(line, &said), "%s", line)
			addresses[said.For] = "http://" + said.Address
		}
		return said.Msg == "ready"
	}, []string{"THROTTLERD_ADMIN_TOKEN=" + token}, "-rules", rules, "-source", source, "-grpc", "", "-http", "127.0.0.1:0", "-admin", "127.0.0.1:0")
	return addresses["admin"], addresses["http"]
}

const request = `{"domain":"api","entries":{"path":"/api/x","user":"42"}}`

// decide asks the daemon for a decision, as a gateway does.
func decide(t *testing.T, api string) int {
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, api+"/v1/decide", strings.NewReader(request))
	require.NoError(t, err)
	out, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(r)
	require.NoError(t, err)
	_, _ = io.Copy(io.Discard, out.Body)
	require.NoError(t, out.Body.Close())
	return out.StatusCode
}

func login(t *testing.T, ctx context.Context, admin string) {
	require.NoError(t, chromedp.Run(ctx, chromedp.Navigate(admin), chromedp.WaitVisible(`#token`),
		chromedp.SendKeys(`#token`, token+"\r"), chromedp.WaitVisible(`#text`)))
	until(t, ctx, "it has the file", `document.querySelector('#text').value.includes('small')`)
}

// edit replaces the text of the editor, as typing would.
func edit(t *testing.T, ctx context.Context, text string) {
	require.NoError(t, chromedp.Run(ctx, chromedp.Evaluate(`document.querySelector('#text').select()`, nil), chromedp.Focus(`#text`),
		chromedp.KeyEvent("\b"), chromedp.SendKeys(`#text`, text)))
}

const (
	faults  = `document.querySelector('#faults').textContent`
	checked = `document.querySelector('#checked').textContent`
	mayn    = `document.querySelector('#save').disabled`
)

func TestTheAdminPageShowsExplainsAndEditsRules(t *testing.T) {
	t.Parallel()
	admin, api := daemon(t, "memory")
	ctx := browser(t)
	asked := requested(t, ctx)
	login(t, ctx, admin)

	for _, status := range []int{200, 200, 429} {
		require.Equal(t, status, decide(t, api))
	}
	small := `[...document.querySelectorAll('#activity tbody tr')].find(row => row.textContent.includes('small'))`
	until(t, ctx, "it shows what the rule did", small+`.querySelector('[data-label=admitted]').textContent === '2'`)
	until(t, ctx, "and what it denies now", `+`+small+`.querySelector('[data-label="denies a second"]').textContent > 0`)

	require.NoError(t, chromedp.Run(ctx, chromedp.SendKeys(`#entries`, "path=/api/x\nuser=42")))
	match := `document.querySelector('#match').textContent`
	until(t, ctx, "it says why", match+`.includes('Denied by small')`)
	until(t, ctx, "and why not", match+`.includes('must be /login')`)

	edit(t, ctx, strings.Replace(twoRules, "limits: [2/1h]", "limit: [3/1h]", 1))
	until(t, ctx, "it names the fault", faults+`.includes('did you mean limits?') && `+faults+`.includes('line 3')`)
	require.True(t, is(t, ctx, mayn), "what is wrong cannot be saved")
	require.NoError(t, chromedp.Run(ctx, chromedp.Evaluate(`[...document.querySelectorAll('#faults li')].find(li => li.textContent.includes('did you mean')).querySelector('button').click()`, nil)))
	require.Equal(t, "limit", text(t, ctx, `document.querySelector('#text').value.slice(document.querySelector('#text').selectionStart).slice(0, 5)`), "it goes there")
	edit(t, ctx, strings.Replace(twoRules, "limits: [2/1h]", "limits: [3/1h]", 1))
	until(t, ctx, "it has no fault", checked+`.includes('2 rules in all') && !`+mayn)
	require.Equal(t, 429, decide(t, api), "it was only checked")
	require.NoError(t, chromedp.Run(ctx, chromedp.Click(`#save`)))
	until(t, ctx, "it is saved", checked+`.includes('Saved')`)
	until(t, ctx, "and explained", match+`.includes('0 of 3')`)
	require.Equal(t, 200, decide(t, api), "it counts, and what was spent stays spent")

	put(t, admin, "api.yaml", strings.Replace(twoRules, "2/1h", "9/1h", 1))
	edit(t, ctx, strings.Replace(twoRules, "2/1h", "4/1h", 1))
	until(t, ctx, "what somebody else has changed is not overwritten", checked+`.includes('Somebody else has changed')`)
	require.True(t, is(t, ctx, mayn))
	require.NoError(t, chromedp.Run(ctx, chromedp.Click(`#revert`)))
	until(t, ctx, "but loaded", `document.querySelector('#text').value.includes('9/1h')`)

	require.NoError(t, chromedp.Run(ctx, chromedp.Evaluate(`(s => { s.value = ''; s.dispatchEvent(new Event('change')); })(document.querySelector('#file'))`, nil),
		chromedp.WaitVisible(`#name`), chromedp.SendKeys(`#name`, "more.yaml")))
	edit(t, ctx, "domain: more\nrules: [{name: third, limits: [1/1h]}]\n")
	until(t, ctx, "a new file is fine", checked+`.includes('3 rules in all') && !`+mayn)
	require.NoError(t, chromedp.Run(ctx, chromedp.Click(`#save`)))
	until(t, ctx, "it is there", `document.querySelector('#activity').textContent.includes('third') && document.querySelector('#file').value === 'more.yaml'`)
	require.NoError(t, chromedp.Run(ctx, chromedp.Click(`#delete`), chromedp.Click(`#delete`)))
	until(t, ctx, "and gone", `!document.querySelector('#activity').textContent.includes('third')`)

	origin, err := url.Parse(admin)
	require.NoError(t, err)
	for _, each := range *asked {
		u, err := url.Parse(each)
		require.NoError(t, err)
		require.True(t, u.Host == origin.Host || u.Scheme == "data", "it loads %s", each)
	}
	require.NoError(t, chromedp.Run(ctx, chromedp.Click(`nav a`), chromedp.WaitVisible(`#now h2`)))
	until(t, ctx, "the live page names who asks", `document.body.textContent.includes('user=2:42')`)
	require.NoError(t, chromedp.Run(ctx, chromedp.Navigate(admin), chromedp.Click(`nav button`), chromedp.WaitVisible(`#token`)))
	require.NoError(t, chromedp.Run(ctx, chromedp.Navigate(admin), chromedp.WaitVisible(`#token`)))
}

func is(t *testing.T, ctx context.Context, expression string) (b bool) {
	require.NoError(t, chromedp.Run(ctx, chromedp.Evaluate(expression, &b)))
	return b
}

// put changes a file through the admin API, as another user would.
func put(t *testing.T, admin, name, text string) {
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPut, admin+"/v1/rules/"+name, bytes.NewBufferString(text))
	require.NoError(t, err)
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("If-Match", "*")
	out, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(r)
	require.NoError(t, err)
	require.NoError(t, out.Body.Close())
	require.Equal(t, http.StatusOK, out.StatusCode)
}

func TestTheAdminPageFitsPhonesAndScreensInLightAndDark(t *testing.T) {
	t.Parallel()
	admin, api := daemon(t, "memory")
	ctx := browser(t)
	login(t, ctx, admin)
	for range 3 {
		decide(t, api)
	}
	background := make(map[string]string)
	for _, scheme := range []string{"light", "dark"} {
		for _, width := range []int64{360, 1280} {
			prefers := emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}})
			require.NoError(t, chromedp.Run(ctx, prefers, chromedp.EmulateViewport(width, 800), chromedp.Navigate(admin), chromedp.WaitVisible(`#entries`)))
			until(t, ctx, "it has the file", `document.querySelector('#text').value.includes('small')`)
			require.NoError(t, chromedp.Run(ctx, chromedp.SendKeys(`#entries`, "path=/api/x\nuser=42")))
			until(t, ctx, "it explains", `document.querySelector('#match').textContent.includes('Denied by small')`)
			edit(t, ctx, strings.Replace(twoRules, "limits: [2/1h]", "limit: [3/1h]", 1))
			until(t, ctx, "it names the fault", faults+`.includes('did you mean')`)
			require.EqualValues(t, width, number(t, ctx, `document.documentElement.scrollWidth`), "nothing is cut off")
			background[scheme] = text(t, ctx, `getComputedStyle(document.body).backgroundColor`)
			if folder := os.Getenv("SCREENSHOTS"); folder != "" {
				shoot(t, ctx, filepath.Join(folder, "throttlerd-"+scheme+"-"+jsonOf(t, width)+".png"))
			}
		}
	}
	require.NotEqual(t, background["light"], background["dark"])
}

func TestTheAdminPageChecksFilesAndDoesNotSaveThem(t *testing.T) {
	t.Parallel()
	admin, _ := daemon(t, "files")
	ctx := browser(t)
	login(t, ctx, admin)
	require.NoError(t, chromedp.Run(ctx, chromedp.WaitVisible(`#readonly`)))
	edit(t, ctx, strings.Replace(twoRules, "limits: [2/1h]", "limits: [2/1hr]", 1))
	until(t, ctx, "it names the fault", faults+`.includes('line 3')`)
	edit(t, ctx, strings.Replace(twoRules, "limits: [2/1h]", "limits: [3/1h]", 1))
	until(t, ctx, "it has no fault", checked+`.includes('2 rules in all')`)
	require.True(t, is(t, ctx, mayn), "it is the file that has to be changed")
}
