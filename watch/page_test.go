package watch_test

import (
	"bufio"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/watch"
)

func get(t *testing.T, w *watch.Watch, path string) *httptest.ResponseRecorder {
	rec := httptest.NewRecorder()
	w.ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
	return rec
}

func TestThePageIsWhereItIsMounted(t *testing.T) {
	t.Parallel()
	w := watch.New(nil)
	for _, mounted := range []string{"/", "/debug/throttler/"} {
		page := get(t, w, mounted)
		require.Equal(t, http.StatusOK, page.Code)
		require.Contains(t, page.Body.String(), "<!doctype html>")
		require.Contains(t, page.Header().Get("Content-Security-Policy"), "default-src 'none'")
		require.Equal(t, "no-store", page.Header().Get("Cache-Control"))
		require.Equal(t, http.StatusNotFound, get(t, w, mounted+"other").Code)
		require.Equal(t, "application/json", get(t, w, mounted+"json").Header().Get("Content-Type"))
	}
}

func TestThePageOnlyReads(t *testing.T) {
	t.Parallel()
	w := watch.New(nil)
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodOptions} {
		for _, path := range []string{"/", "/json", "/events"} {
			rec := httptest.NewRecorder()
			w.ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), method, path, nil))
			require.Equal(t, http.StatusMethodNotAllowed, rec.Code)
			require.Equal(t, "GET, HEAD", rec.Header().Get("Allow"))
		}
	}
	rec := httptest.NewRecorder()
	w.ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), http.MethodHead, "/events", nil))
	require.Equal(t, "text/event-stream", rec.Header().Get("Content-Type"))
}

func TestAnIdentifierIsTextOnThePage(t *testing.T) {
	t.Parallel()
	w := watch.New(nil)
	for _, id := range []string{"<script>alert(1)</script>", "line\nbreak", "\xff", "left\u202eright", "user:42\x00GET /search"} {
		ask(w, id, 1)
	}
	page := get(t, w, "/").Body.String()
	require.Contains(t, page, "&lt;script&gt;alert(1)&lt;/script&gt;")
	require.Contains(t, page, `&#34;line\nbreak&#34;`)
	require.Contains(t, page, `&#34;\xff&#34;`)
	require.Contains(t, page, `left\u202eright`)
	require.Contains(t, page, "user:42 · GET /search")
}

func TestTheJSONIsTheSnapshot(t *testing.T) {
	t.Parallel()
	state := struct {
		Degraded bool
		Cause    string
	}{true, "connection refused"}
	w := watch.New(&watch.Options{State: func() any { return state }})
	consume(t, observed(t, w, throttler.Config{Buckets: []throttler.Bucket{plenty}}), 3, "a")
	var s watch.Snapshot
	require.NoError(t, json.Unmarshal(get(t, w, "/json").Body.Bytes(), &s))
	require.Equal(t, w.Snapshot().MostAsked, s.MostAsked)
	require.Equal(t, map[string]any{"Degraded": true, "Cause": "connection refused"}, s.State)
	page := get(t, w, "/").Body.String()
	require.Contains(t, page, "<dt>Degraded</dt><dd>true</dd>")
	require.Contains(t, page, "<dt>Cause</dt><dd>connection refused</dd>")
}

func TestAStateThatIsNoObjectIsShownAllTheSame(t *testing.T) {
	t.Parallel()
	for want, state := range map[string]any{"<dt>state</dt><dd>7</dd>": 7, "<dt>error</dt><dd>json: unsupported type: chan int</dd>": make(chan int)} {
		w := watch.New(&watch.Options{State: func() any { return state }})
		require.Contains(t, get(t, w, "/").Body.String(), want)
	}
	w := watch.New(&watch.Options{State: func() any { return make(chan int) }})
	require.Equal(t, http.StatusInternalServerError, get(t, w, "/json").Code)
}

// events opens the stream of server-sent events and returns a scanner of its lines.
func events(t *testing.T, ctx context.Context, address string) *bufio.Scanner {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, address+"/events", nil)
	require.NoError(t, err)
	answer, err := http.DefaultClient.Do(r)
	require.NoError(t, err)
	t.Cleanup(func() { _ = answer.Body.Close(); http.DefaultClient.CloseIdleConnections() })
	lines := bufio.NewScanner(answer.Body)
	lines.Buffer(nil, 1<<20)
	return lines
}

func next(t *testing.T, lines *bufio.Scanner) string {
	for lines.Scan() {
		if data, ok := strings.CutPrefix(lines.Text(), "data: "); ok {
			return data
		}
	}
	require.NoError(t, lines.Err())
	require.FailNow(t, "the stream has ended")
	return ""
}

func TestEventsOutliveTheWriteTimeoutOfTheServer(t *testing.T) {
	t.Parallel()
	w := watch.New(nil)
	server := httptest.NewUnstartedServer(w)
	server.Config.WriteTimeout = 500 * time.Millisecond // shorter than the time to the second event
	server.Start()
	t.Cleanup(server.Close)
	lines := events(t, t.Context(), server.URL)
	require.Contains(t, next(t, lines), "Nobody.")
	ask(w, "line\nbreak", 1)
	require.Contains(t, next(t, lines), `line\nbreak`)
}

func TestEventsEndWithTheServersContext(t *testing.T) {
	t.Parallel()
	serving, end := context.WithCancel(t.Context())
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		watch.New(nil).ServeHTTP(rw, r.WithContext(serving))
	}))
	server.Start()
	lines := events(t, t.Context(), server.URL)
	next(t, lines)
	end()
	for lines.Scan() {
	}
	require.NoError(t, lines.Err())
	server.Close() // waits for the handler
}

func TestEventsNeedAFlusher(t *testing.T) {
	t.Parallel()
	rec := httptest.NewRecorder()
	w := watch.New(nil)
	w.ServeHTTP(struct{ http.ResponseWriter }{rec}, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/events", nil))
	require.Equal(t, http.StatusInternalServerError, rec.Code)
	require.Contains(t, rec.Body.String(), "Unwrap")
}
