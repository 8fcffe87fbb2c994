package browsertest_test

// Tests of the page of package watch, in examples/observed under its load.

import (
	"context"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/chromedp"
	"github.com/stretchr/testify/require"
)

// observed runs the example for two minutes under its load, and returns the address of the page.
func observed(t *testing.T) string {
	first := run(t, "observed", "-load", "2m")
	address := regexp.MustCompile(`http://\S+`).Find(first)
	require.NotNil(t, address, "%s", first)
	return string(address)
}

// requested returns a list that collects the addresses which the page requests.
func requested(t *testing.T, ctx context.Context) *[]string {
	all := new([]string)
	chromedp.ListenTarget(ctx, func(event any) {
		if e, ok := event.(*network.EventRequestWillBeSent); ok {
			*all = append(*all, e.Request.URL)
		}
	})
	require.NoError(t, chromedp.Run(ctx, network.Enable()))
	return all
}

const denied = `(document.querySelectorAll('section')[0]?.textContent ?? '')`

func TestThePageNamesTheAttackerWhileItLooks(t *testing.T) {
	t.Parallel()
	address, ctx := observed(t), browser(t)
	asked := requested(t, ctx)
	require.NoError(t, chromedp.Run(ctx, chromedp.Navigate(address)))
	until(t, ctx, "it is live", `document.querySelector('#live').textContent === 'live'`)
	until(t, ctx, "it shows the load", `+document.querySelector('#rate').textContent > 1`)
	require.NotContains(t, text(t, ctx, denied), "mallory", "who has not called yet")
	until(t, ctx, "it names the attacker", denied+`.includes('mallory')`)
	until(t, ctx, "it marks the bucket", `[...document.querySelectorAll('#buckets tr')].some(row => row.textContent.includes('/api/search') && row.querySelector('.spike'))`)

	require.NoError(t, chromedp.Run(ctx, chromedp.Evaluate(`getSelection().selectAllChildren(document.querySelector('td.name'))`, nil)))
	until(t, ctx, "it holds still while one selects", `document.querySelector('#live').textContent.includes('holding')`)
	require.NoError(t, chromedp.Run(ctx, chromedp.Evaluate(`getSelection().removeAllRanges()`, nil)))
	until(t, ctx, "and goes on", `document.querySelector('#live').textContent === 'live'`)

	origin, err := url.Parse(address)
	require.NoError(t, err)
	for _, each := range *asked {
		u, err := url.Parse(each)
		require.NoError(t, err)
		require.True(t, u.Host == origin.Host || u.Scheme == "data", "it loads %s", each)
	}
	require.NotEmpty(t, *asked)
}

func text(t *testing.T, ctx context.Context, expression string) (s string) {
	require.NoError(t, chromedp.Run(ctx, chromedp.Evaluate(expression, &s)))
	return s
}

func TestTheWatchFitsPhonesAndScreensInLightAndDark(t *testing.T) {
	t.Parallel()
	address, ctx := observed(t), browser(t)
	background := make(map[string]string)
	for _, scheme := range []string{"light", "dark"} {
		for _, width := range []int64{360, 1280} {
			prefers := emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}})
			require.NoError(t, chromedp.Run(ctx, prefers, chromedp.EmulateViewport(width, 800), chromedp.Navigate(address)))
			until(t, ctx, "it shows who asks", `document.querySelectorAll('table.heavy td.name').length > 5`)
			require.EqualValues(t, width, number(t, ctx, `document.documentElement.scrollWidth`), "nothing is cut off")
			background[scheme] = text(t, ctx, `getComputedStyle(document.body).backgroundColor`)
			if folder := os.Getenv("SCREENSHOTS"); folder != "" {
				shoot(t, ctx, filepath.Join(folder, "watch-"+scheme+"-"+jsonOf(t, width)+".png"))
			}
		}
	}
	require.NotEqual(t, background["light"], background["dark"])
}
