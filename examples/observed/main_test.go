package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"regexp"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/watch"
)

func TestTheDemonstrationNamesTheAttacker(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	require.NoError(t, run(t.Context(), watch.New(nil), []string{"-addr", "127.0.0.1:0", "-load", "3s"}, &out))
	require.Regexp(t, `Open http://127.0.0.1:\d+/debug/throttler/ `, out.String())
	require.Regexp(t, `Denied most: user:mallory on /api/search, \d+ calls`, out.String())
}

// serve runs the service until the test ends, and returns its address. At the end it checks that the service stops at
// once.
func serve(t *testing.T, args ...string) string {
	ctx, end := context.WithCancel(t.Context())
	in, out := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		defer func() { _ = out.Close() }()
		ended <- run(ctx, watch.New(nil), append(args, "-addr", "127.0.0.1:0"), out)
	}()
	t.Cleanup(func() {
		end()
		select {
		case err := <-ended:
			require.NoError(t, err)
		case <-time.After(4 * time.Second): // Shutdown gives up after five
			require.Fail(t, "it waits for who looks at the page")
		}
	})
	lines := bufio.NewReader(in)
	line, err := lines.ReadString('\n')
	require.NoError(t, err)
	go func() { _, _ = io.Copy(io.Discard, lines) }() // drains the output until out is closed
	return regexp.MustCompile(`http://[^/]+`).FindString(line)
}

// get returns the body of the answer.
func get(t *testing.T, url string) io.Reader {
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	require.NoError(t, err)
	answer, err := http.DefaultClient.Do(r)
	require.NoError(t, err)
	t.Cleanup(func() { _ = answer.Body.Close() })
	return answer.Body
}

func TestTheServiceEndsWhileSomebodyLooks(t *testing.T) {
	t.Parallel()
	base := serve(t)
	for range 7 {
		get(t, base+"/")
	}
	looking := get(t, base+"/debug/throttler/events")
	_, err := bufio.NewReader(looking).ReadString('\n')
	require.NoError(t, err)

	var seen watch.Snapshot
	require.NoError(t, json.NewDecoder(get(t, base+"/debug/throttler/json")).Decode(&seen))
	require.Equal(t, int64(2), seen.MostDenied[0].Denied)
}
