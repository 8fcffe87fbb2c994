package throttlerhttp_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/benbjohnson/clock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
	memstore "github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// has returns the names of the interfaces that a ResponseWriter has.
func has(w http.ResponseWriter) (names []string) {
	for name, ok := range map[string]func() bool{
		"Flusher":  func() bool { _, ok := w.(http.Flusher); return ok },
		"Hijacker": func() bool { _, ok := w.(http.Hijacker); return ok },
		"Pusher":   func() bool { _, ok := w.(http.Pusher); return ok },
	} {
		if ok() {
			names = append(names, name)
		}
	}
	return names
}

type (
	flusher  struct{ called func(string) }
	hijacker struct{ called func(string) }
	pusher   struct{ called func(string) }
	reader   struct{ called func(string) }
)

func (f flusher) Flush() { f.called("Flusher") }
func (h hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	h.called("Hijacker")
	return nil, nil, nil
}
func (p pusher) Push(string, *http.PushOptions) error { p.called("Pusher"); return nil }
func (r reader) ReadFrom(from io.Reader) (int64, error) {
	r.called("ReaderFrom")
	return io.Copy(io.Discard, from)
}

func TestTheWriterOfTheHandlerHasWhatTheServersHas(t *testing.T) {
	t.Parallel()
	var called []string
	call := func(what string) { called = append(called, what) }
	f, h, p, r := flusher{call}, hijacker{call}, pusher{call}, reader{call}
	type writer = http.ResponseWriter
	w := httptest.NewRecorder()
	base := plain{w}
	limit := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(1000)), RefundIf: never}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		call(strings.Join(has(w), " "))
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
		if p, ok := w.(http.Pusher); ok {
			assert.NoError(t, p.Push("/", nil))
		}
		_, err := w.(io.ReaderFrom).ReadFrom(strings.NewReader(strings.Repeat("text", 1000)))
		assert.NoError(t, err)
		if h, ok := w.(http.Hijacker); ok {
			_, _, err := h.Hijack()
			assert.NoError(t, err)
		}
	}))
	for _, w := range []http.ResponseWriter{
		base,
		struct {
			writer
			flusher
		}{base, f},
		struct {
			writer
			hijacker
		}{base, h},
		struct {
			writer
			pusher
		}{base, p},
		struct {
			writer
			reader
		}{base, r},
		struct {
			writer
			flusher
			hijacker
		}{base, f, h},
		struct {
			writer
			flusher
			pusher
		}{base, f, p},
		struct {
			writer
			flusher
			reader
		}{base, f, r},
		struct {
			writer
			hijacker
			pusher
		}{base, h, p},
		struct {
			writer
			hijacker
			reader
		}{base, h, r},
		struct {
			writer
			pusher
			reader
		}{base, p, r},
		struct {
			writer
			flusher
			hijacker
			pusher
		}{base, f, h, p},
		struct {
			writer
			flusher
			hijacker
			reader
		}{base, f, h, r},
		struct {
			writer
			flusher
			pusher
			reader
		}{base, f, p, r},
		struct {
			writer
			hijacker
			pusher
			reader
		}{base, h, p, r},
		struct {
			writer
			flusher
			hijacker
			pusher
			reader
		}{base, f, h, p, r},
	} {
		called = nil
		limit.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
		require.NotEmpty(t, called)
		assert.ElementsMatch(t, has(w), strings.Fields(called[0]))
		want := has(w)
		if _, ok := w.(io.ReaderFrom); ok {
			want = append(want, "ReaderFrom")
		}
		assert.ElementsMatch(t, want, called[1:], "each of them reaches the server's")
	}
}

func TestACopyThatFailsAtOnceIsNoAnswer(t *testing.T) {
	t.Parallel()
	for body, status := range map[string]int{"": http.StatusBadGateway, "some of it": http.StatusOK} {
		told := make(chan int, 1)
		h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9)), RefundIf: func(s int) bool { told <- s; return false }},
			http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				n, err := io.Copy(w, io.MultiReader(strings.NewReader(body), iotest.ErrReader(io.ErrUnexpectedEOF)))
				assert.EqualValues(t, len(body), n)
				assert.ErrorIs(t, err, io.ErrUnexpectedEOF)
				if n == 0 {
					w.WriteHeader(http.StatusBadGateway)
				}
			}))
		assert.Equal(t, status, sent(t, h).StatusCode)
		assert.Equal(t, status, <-told)
	}
}

func TestAFileIsCopiedWhole(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, size := range []int{0, 1, 511, 512, 513, 1 << 20} {
		want := bytes.Repeat([]byte("x"), size)
		require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), want, 0o600))
		server := httptest.NewServer(serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9))}, http.FileServer(http.Dir(dir))))
		r, err := server.Client().Get(server.URL + "/file")
		require.NoError(t, err)
		got, err := io.ReadAll(r.Body)
		require.NoError(t, err)
		assert.Len(t, got, len(want))
		assert.EqualValues(t, size, r.ContentLength)
		require.NoError(t, r.Body.Close())
		server.Close()
	}
}

func TestTheWriterIsThatOfTheProtocol(t *testing.T) {
	t.Parallel()
	for _, two := range []bool{false, true} {
		asked := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			assert.Equal(t, two, r.ProtoMajor == 2)
			c := http.NewResponseController(w)
			assert.NoError(t, c.SetReadDeadline(time.Now().Add(time.Minute)))
			assert.NoError(t, c.SetWriteDeadline(time.Now().Add(time.Minute)))
			assert.NoError(t, c.EnableFullDuplex())
			_, closes := w.(interface{ CloseNotify() <-chan bool })
			assert.True(t, closes, "gin demands it")
			names := has(w)
			slices.Sort(names)
			_, _ = io.WriteString(w, strings.Join(names, " "))
			assert.NoError(t, c.Flush())
			if _, hijacker := w.(http.Hijacker); !hijacker {
				_, _, err := c.Hijack()
				assert.ErrorIs(t, err, http.ErrNotSupported)
			}
		})
		mux := http.NewServeMux()
		mux.Handle("/bare", asked)
		mux.Handle("/limited", serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9))}, asked))
		mux.Handle("/refunded", serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9)), RefundIf: never}, asked))
		server := httptest.NewUnstartedServer(mux)
		server.EnableHTTP2 = two
		server.StartTLS()
		defer server.Close()
		for _, path := range []string{"/bare", "/limited", "/refunded"} {
			r, err := server.Client().Get(server.URL + path)
			require.NoError(t, err)
			names, err := io.ReadAll(r.Body)
			require.NoError(t, err)
			require.NoError(t, r.Body.Close())
			assert.Equal(t, map[bool]string{false: "Flusher Hijacker", true: "Flusher Pusher"}[two], string(names), path)
		}
	}
}

// outer is a ResponseWriter with no method of its own but Unwrap.
type outer struct{ http.ResponseWriter }

func (o outer) Unwrap() http.ResponseWriter { return o.ResponseWriter }

func TestAHijackThroughOtherWritersIsSeen(t *testing.T) {
	t.Parallel()
	told := make(chan int, 1)
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9)), RefundIf: func(s int) bool { told <- s; return false }},
		http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if assert.NoError(t, err) {
				_, _ = io.WriteString(conn, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
				assert.NoError(t, conn.Close())
			}
		}))
	assert.Equal(t, http.StatusNoContent, sent(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { h.ServeHTTP(outer{w}, r) })).StatusCode)
	assert.Equal(t, http.StatusSwitchingProtocols, <-told)
}

func TestTheSameMiddlewareTwiceCountsOnce(t *testing.T) {
	t.Parallel()
	for name, twice := range map[string]func(limit func(http.Handler) http.Handler) http.Handler{
		"directly": func(limit func(http.Handler) http.Handler) http.Handler { return limit(limit(limit(ok))) },
		"around a mux": func(limit func(http.Handler) http.Handler) http.Handler {
			mux := http.NewServeMux()
			mux.Handle("/", limit(ok))
			return limit(mux)
		},
		"with another and a wrapped writer between": func(limit func(http.Handler) http.Handler) http.Handler {
			other := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9).Named("other"))}, limit(ok))
			return limit(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { other.ServeHTTP(outer{w}, r) }))
		},
	} {
		limiter, err := throttler.New(throttler.Config{})
		require.NoError(t, err)
		limit, err := throttlerhttp.New(limiter, &throttlerhttp.Options{Key: whoever, Buckets: buckets(perHour(3))})
		require.NoError(t, err)
		assert.Equal(t, 3, admitted(twice(limit), 5, "GET /"), name)
	}
}

func TestTheSameMiddlewareTwiceCountsOnceAlsoWhereAPartHasNoLimit(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	limit, err := throttlerhttp.New(limiter, &throttlerhttp.Options{
		Key: whoever, Buckets: buckets(throttler.Unlimited()),
		Routes: []throttlerhttp.Route{{Pattern: "/", Adds: true, Buckets: buckets(perHour(3))}},
	})
	require.NoError(t, err)
	assert.Equal(t, 3, admitted(limit(limit(ok)), 5, "GET /"))
	asked := 0
	limit, err = throttlerhttp.New(limiter, &throttlerhttp.Options{Decide: func(*http.Request) (throttler.Verdict, error) {
		asked++
		return throttler.Verdict{Allowed: true}, nil // as where no rule matches
	}})
	require.NoError(t, err)
	require.Equal(t, 1, admitted(limit(limit(ok)), 1, "GET /"))
	assert.Equal(t, 1, asked)
}

func TestTheSameMiddlewareInsideAsksForAnotherRouteOrKey(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	limit, err := throttlerhttp.New(limiter, &throttlerhttp.Options{
		Key: func(r *http.Request) string { return "user:" + r.Header.Get("User") }, Buckets: buckets(perHour(100)),
		Routes: []throttlerhttp.Route{{Pattern: "/login", Buckets: buckets(perHour(1))}},
	})
	require.NoError(t, err)
	inner := limit(ok)
	h := limit(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/rewritten":
			r.URL.Path = "/login"
		case "/authenticated":
			r.Header.Set("User", "42")
		}
		inner.ServeHTTP(w, r)
	}))
	assert.Equal(t, 1, admitted(h, 3, "GET /rewritten"))
	for range 2 {
		ask(h, "GET /authenticated")
	}
	assert.Equal(t, "97", fmt.Sprint(parsed(t, ask(h, "GET /", "User", "42"), "RateLimit")["100/1h"]["r"]))
}

// everything is a blank writer with all interfaces that the server's writer has.
type everything struct {
	blank
	flusher
	hijacker
	reader
}

func TestTheWriterOfAServerCostsNoMoreAllocations(t *testing.T) {
	w := &everything{blank: blank{http.Header{}}}
	for range 2 {
		h, r := limitedByAddress(t, 1<<40)
		assert.LessOrEqual(t, testing.AllocsPerRun(1000, func() { again(h, w, r) }), 3.0)
	}
}

func TestRequestsThatAHandlerMakesCount(t *testing.T) {
	t.Parallel()
	limiter, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	limit, err := throttlerhttp.New(limiter, &throttlerhttp.Options{Key: whoever, Buckets: buckets(perHour(3))})
	require.NoError(t, err)
	var h http.Handler
	h = limit(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { // "GET /batch" calls "GET /" several times
		if r.URL.Path == "/batch" {
			for range 10 {
				h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil).WithContext(r.Context()))
			}
		}
	}))
	ask(h, "GET /batch")
	assert.Equal(t, http.StatusTooManyRequests, ask(h, "GET /").StatusCode)
}

// refunds returns an Observe that counts the refunds of a Throttler.
func refunds(n *int) func(context.Context, *throttler.Event) {
	return func(_ context.Context, e *throttler.Event) {
		if e.Op == throttler.OpRefund {
			*n++
		}
	}
}

func TestTheFieldsAreThoseAfterARefund(t *testing.T) {
	t.Parallel()
	for name, answers := range map[string]http.HandlerFunc{
		"nothing":      func(http.ResponseWriter, *http.Request) {},
		"status":       func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) },
		"body":         func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok")) },
		"string":       func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") },
		"copy":         func(w http.ResponseWriter, _ *http.Request) { _, _ = io.Copy(w, strings.NewReader("ok")) },
		"flush":        func(w http.ResponseWriter, _ *http.Request) { w.(http.Flusher).Flush() },
		"flush of a c": func(w http.ResponseWriter, _ *http.Request) { _ = http.NewResponseController(w).Flush() },
		"early hints": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusEarlyHints)
			w.WriteHeader(http.StatusOK)
		},
		"panic afterwards": func(w http.ResponseWriter, _ *http.Request) {
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		},
		"two statuses": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusOK)
			_, _ = w.Write([]byte("ok"))
			w.WriteHeader(http.StatusAccepted)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := 0
			h := serve(t, throttler.Config{Clock: clock.NewMock(), Observe: refunds(&n)}, throttlerhttp.Options{
				Buckets: buckets(throttler.NewBucket(time.Minute, 5).Named("b"), throttler.NewBucket(time.Hour, 7).SlidingLog().Named("c")),
				Fields:  throttlerhttp.Draft10 | throttlerhttp.XSeconds, RefundIf: func(s int) bool { return s < 400 },
			}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/" {
					answers(w, r)
					return
				}
				assert.Equal(t, []string{`"b";r=3;t=60, "c";r=5;t=3600`}, w.Header().Values("RateLimit"), "while the handler runs")
				w.WriteHeader(http.StatusUnauthorized)
			}))
			server := httptest.NewServer(h)
			defer server.Close()
			for _, method := range []string{http.MethodGet, http.MethodHead} {
				r, err := http.NewRequest(method, server.URL, nil)
				require.NoError(t, err)
				res, err := server.Client().Do(r)
				require.NoError(t, err)
				require.NoError(t, res.Body.Close())
				assert.Equal(t, []string{`"b";r=5, "c";r=7`}, res.Header.Values("RateLimit"))
				assert.Equal(t, []string{"5", "5", "0"}, []string{res.Header.Get("X-RateLimit-Limit"), res.Header.Get("X-RateLimit-Remaining"), res.Header.Get("X-RateLimit-Reset")})
			}
		})
	}
}

func TestTheFieldsOfARefundBesideOthers(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{Clock: clock.NewMock()}, throttlerhttp.Options{
		Buckets: buckets(throttler.NewBucket(10*time.Second, 10).Continuous().Named("b")), Fields: throttlerhttp.Draft10 | throttlerhttp.XSeconds,
		Cost:     func(r *http.Request) int64 { return int64(len(r.URL.Path)) },
		RefundIf: func(s int) bool { return s < 400 },
	}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/abc" {
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	assert.Equal(t, "6", ask(h, "GET /abc").Header.Get("X-RateLimit-Remaining"))
	r := ask(h, "GET /12")
	assert.Equal(t, int64(6), parsed(t, r, "RateLimit")["b"]["r"], "what was taken before is out")
	assert.Equal(t, []string{"6", "4"}, []string{r.Header.Get("X-RateLimit-Remaining"), r.Header.Get("X-RateLimit-Reset")})
	all := inside(t, h, throttlerhttp.Options{Buckets: buckets(perHour(9).Named("all"))})
	h = inside(t, all, throttlerhttp.Options{Buckets: buckets(perHour(9).Named("top")), RefundIf: func(int) bool { return true }})
	got := parsed(t, ask(h, "GET /"), "RateLimit")
	assert.Equal(t, []int64{6, 8, 9}, []int64{got["b"]["r"], got["all"]["r"], got["top"]["r"]})
}

func TestARefundIsMadeBeforeTheHeaderIsSentAndOnce(t *testing.T) {
	t.Parallel()
	n, told := 0, []int(nil)
	h := serve(t, throttler.Config{Observe: refunds(&n)}, throttlerhttp.Options{Buckets: buckets(perHour(1)), RefundIf: func(s int) bool { told = append(told, s); return s == 200 }},
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/" {
				assert.Zero(t, n)
				w.WriteHeader(http.StatusOK)
				assert.Equal(t, 1, n, "who reads the fields may come back at once")
				_, _ = io.WriteString(w, "more")
				panic(http.ErrAbortHandler)
			}
		}))
	assert.Panics(t, func() { ask(h, "GET /") })
	assert.Equal(t, 1, n)
	assert.Equal(t, []int{200}, told)
}

// unrefundable is a storage that fails to give tokens back.
type unrefundable struct{ storage.Storage }

func (unrefundable) Charge(context.Context, *storage.Charge) error { return throttler.ErrUnavailable }

func TestARefundThatFailsIsNotInTheFields(t *testing.T) {
	t.Parallel()
	n := 0
	h := serve(t, throttler.Config{Storage: unrefundable{memstore.New(nil)}, Clock: clock.NewMock(), Observe: refunds(&n)},
		throttlerhttp.Options{Buckets: buckets(perHour(5).Named("b")), RefundIf: func(int) bool { return true }}, ok)
	assert.Equal(t, `"b";r=4;t=3600`, ask(h, "GET /").Header.Get("RateLimit"))
	assert.Equal(t, 1, n)
}

func TestAFlushThatIsNotSupportedIsNoAnswer(t *testing.T) {
	t.Parallel()
	told := 0
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9)), RefundIf: func(s int) bool { told = s; return false }},
		http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			assert.ErrorIs(t, http.NewResponseController(w).Flush(), http.ErrNotSupported)
			w.WriteHeader(http.StatusTeapot)
		}))
	h.ServeHTTP(plain{httptest.NewRecorder()}, httptest.NewRequest(http.MethodGet, "/", nil))
	assert.Equal(t, http.StatusTeapot, told)
}

func TestCloseNotifyTellsThatTheClientHasGone(t *testing.T) {
	t.Parallel()
	ctx, leave := context.WithCancel(t.Context())
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Buckets: buckets(perHour(9))}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		gone := w.(interface{ CloseNotify() <-chan bool }).CloseNotify()
		leave()
		assert.True(t, <-gone)
	}))
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil).WithContext(ctx))
}
