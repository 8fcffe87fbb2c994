// Package browsertest_test opens pages in a real browser: /docs of examples/fastapi-like, the page of package watch in
// examples/observed, and the admin page of throttlerd. It is a module of its own, so that the root module does not depend
// on chromedp, which drives Chromium. It does not import the root module: it builds the programs and runs them.
package browsertest_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// patience bounds each test. Only an overloaded machine comes near it.
const patience = 2 * time.Minute

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start runs fastapi-like and returns the address of its page.
func start(t *testing.T) string {
	first := run(t, "fastapi-like")
	var line struct{ Msg, Address string }
	require.NoError(t, json.Unmarshal(first, &line))
	require.Equal(t, "listening", line.Msg)
	return "http://" + line.Address + "/docs"
}

// run runs an example in a process of its own until the test ends, and returns the first line that it prints.
func run(t *testing.T, example string, args ...string) []byte {
	return runProgram(t, "examples/"+example, func([]byte) bool { return true }, nil, append(args, "-addr", "127.0.0.1:0")...)
}

// runProgram builds and runs the program of a folder until the test ends, and returns the first line of its output that
// wanted accepts.
func runProgram(t *testing.T, folder string, wanted func(line []byte) bool, env []string, args ...string) []byte {
	program := filepath.Join(t.TempDir(), "program")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program, ".")
	build.Dir = "../../" + folder
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)
	run := exec.CommandContext(t.Context(), program, args...)
	run.Env = append(os.Environ(), env...)
	stdout, err := run.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, run.Start())
	var rest sync.WaitGroup
	t.Cleanup(func() {
		_ = run.Process.Kill() // an error means that it has ended
		rest.Wait()
		_ = run.Wait() // always an error, as it was killed
	})
	lines := bufio.NewScanner(stdout)
	var line []byte
	for !wanted(line) || line == nil {
		require.True(t, lines.Scan(), "the program has ended")
		line = bytes.Clone(lines.Bytes())
	}
	rest.Go(func() {
		for lines.Scan() { // or a full pipe would block the program
		}
	})
	return line
}

// chromium returns the program that $CHROMIUM names, or else the one that is installed.
func chromium(t *testing.T) string {
	if named := os.Getenv("CHROMIUM"); named != "" {
		return named
	}
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	require.FailNow(t, "no Chromium: make servers installs it, or name one in $CHROMIUM")
	return ""
}

// browser opens a tab in a new browser with a new profile. Every exception of the page, and every entry in the
// console's log except those about the network, fails the test.
func browser(t *testing.T) context.Context {
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(chromium(t)), chromedp.UserDataDir(t.TempDir()), chromedp.NoSandbox, chromedp.DisableGPU,
		chromedp.Flag("disable-quic", true), chromedp.Flag("disable-component-update", true))
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience) // Cancel ends it, after the test
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewExecAllocator(ctx, options...)
	t.Cleanup(cancel)
	ctx, _ = chromedp.NewContext(ctx)
	chromedp.ListenTarget(ctx, func(event any) {
		switch e := event.(type) {
		case *runtime.EventExceptionThrown:
			assert.Fail(t, "the page threw an exception", e.ExceptionDetails.Error())
		case *log.EventEntryAdded: // also of violations of the content security policy, and of answers of 400 or more
			assert.Equal(t, log.SourceNetwork, e.Entry.Source, e.Entry.Text)
		}
	})
	require.NoError(t, chromedp.Run(ctx, log.Enable()))
	t.Cleanup(func() { assert.NoError(t, chromedp.Cancel(ctx)) })
	return ctx
}

// card is the JavaScript expression for the card of the route "/".
const card = `document.querySelector('article[data-path="/"]')`

// until polls the page until an expression is true.
func until(t *testing.T, ctx context.Context, what, expression string) {
	err := chromedp.Run(ctx, chromedp.Poll(expression, nil, chromedp.WithPollingInterval(50*time.Millisecond)))
	require.NoError(t, err, what)
}

// number returns the value of an expression in the page.
func number(t *testing.T, ctx context.Context, expression string) (n int) {
	require.NoError(t, chromedp.Run(ctx, chromedp.Evaluate(expression, &n)))
	return n
}

const (
	status = card + `.querySelector('.pill').textContent`
	level  = `+` + card + `.querySelector('[role=meter]').getAttribute('aria-valuenow')`
	width  = `Math.round(100 * ` + card + `.querySelector('.fill').offsetWidth / ` + card + `.querySelector('.track').offsetWidth)`
	retry  = card + `.querySelector('.retry').textContent`
	wait   = `+(` + retry + `.match(/in (\d+) s/) ?? [0, 0])[1]`
)

func TestTheLevelFallsToEmptyAndRisesAgainWhenTheLimitSaysSo(t *testing.T) {
	t.Parallel()
	address, ctx := start(t), browser(t)
	require.NoError(t, chromedp.Run(ctx, chromedp.Navigate(address)))
	until(t, ctx, "full at first", level+` === 5 && `+width+` === 100`)

	calls := 0
	for current := ""; !strings.HasPrefix(current, "429"); calls++ {
		require.Less(t, calls, 20)
		require.NoError(t, chromedp.Run(ctx, chromedp.Evaluate(card+`.querySelector('.pill').textContent = ''`, nil),
			chromedp.Focus(`article[data-path="/"] .call`, chromedp.ByQuery), chromedp.KeyEvent("\r")))
		until(t, ctx, "answered", status+` !== ''`)
		require.NoError(t, chromedp.Run(ctx, chromedp.Evaluate(status, &current)))
	}
	require.Equal(t, 6, calls)
	require.Zero(t, number(t, ctx, level))
	until(t, ctx, "the bar is empty", width+` === 0`)

	first := number(t, ctx, wait)
	require.Positive(t, first, "it says when to call again")
	until(t, ctx, "the countdown runs", wait+` < `+jsonOf(t, first))
	until(t, ctx, "the countdown ends", retry+` === 'call again now'`)
	until(t, ctx, "all is back", level+` === 5 && `+width+` === 100`)
	require.NoError(t, chromedp.Run(ctx, chromedp.Click(`article[data-path="/"] .call`, chromedp.ByQuery)))
	until(t, ctx, "and may be spent", status+`.startsWith('200') && `+level+` === 4`)
}

func jsonOf(t *testing.T, v any) string {
	out, err := json.Marshal(v)
	require.NoError(t, err)
	return string(out)
}

func TestThePageFitsPhonesAndScreensInLightAndDark(t *testing.T) {
	t.Parallel()
	address, ctx := start(t), browser(t)
	for _, scheme := range []string{"light", "dark"} {
		for _, width := range []int64{360, 1280} {
			prefers := emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}})
			require.NoError(t, chromedp.Run(ctx, prefers, chromedp.EmulateViewport(width, 800), chromedp.Navigate(address)))
			require.NoError(t, chromedp.Run(ctx, chromedp.Click(`article[data-path="/api/search"] .twenty`, chromedp.ByQuery)))
			until(t, ctx, "called 20 times", `document.querySelectorAll('article[data-path="/api/search"] .calls i').length === 20`)
			require.EqualValues(t, width, number(t, ctx, `document.documentElement.scrollWidth`), "nothing is cut off")
			dark := number(t, ctx, `+matchMedia('(prefers-color-scheme: dark)').matches`)
			require.Equal(t, scheme == "dark", dark == 1)
			until(t, ctx, "the bar is empty", `document.querySelector('article[data-path="/api/search"] .low .fill').offsetWidth === 0`)
			if folder := os.Getenv("SCREENSHOTS"); folder != "" {
				shoot(t, ctx, filepath.Join(folder, scheme+"-"+jsonOf(t, width)+".png"))
			}
		}
	}
}

// shoot writes a picture of the whole page.
func shoot(t *testing.T, ctx context.Context, file string) {
	var png []byte
	require.NoError(t, chromedp.Run(ctx, chromedp.ActionFunc(func(ctx context.Context) (err error) {
		png, err = page.CaptureScreenshot().WithCaptureBeyondViewport(true).Do(ctx)
		return err
	})))
	require.NoError(t, os.WriteFile(file, png, 0o600))
}
