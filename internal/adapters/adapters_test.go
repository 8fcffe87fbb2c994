// Package adapters_test shows the middleware of throttlerhttp under routers that are not net/http's. Its code is
// that of the section "With other routers" of docs/guide.md.
package adapters_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/go-chi/chi/v5"
	fiberv2 "github.com/gofiber/fiber/v2"
	adaptorv2 "github.com/gofiber/fiber/v2/middleware/adaptor"
	"github.com/gofiber/fiber/v3"
	"github.com/gofiber/fiber/v3/middleware/adaptor"
	"github.com/gorilla/mux"
	"github.com/labstack/echo/v4"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/throttlerhttp"
)

type middleware = func(http.Handler) http.Handler

// ginLimit limits the handlers that are used after it.
func ginLimit(limit func(http.Handler) http.Handler) gin.HandlerFunc {
	return func(c *gin.Context) {
		admitted := false
		limit(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			admitted = true
			c.Request = r
			c.Next()
			w.WriteHeader(c.Writer.Status()) // tells RefundIf, and changes nothing
		})).ServeHTTP(c.Writer, c.Request)
		if !admitted {
			c.Abort()
		}
	}
}

// echoErrors answers errors at once, where the limit sees their status.
func echoErrors(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		if err := next(c); err != nil {
			c.Error(err)
		}
		return nil
	}
}

// fiberLimit limits the handlers that are used after it.
func fiberLimit(limit func(http.Handler) http.Handler) fiber.Handler {
	return func(c fiber.Ctx) error {
		r, err := adaptor.ConvertRequest(c, true)
		if err != nil {
			return err
		}
		r.Header = http.Header{}
		for name, value := range c.Request().Header.All() {
			r.Header.Add(string(name), string(value)) // all lines, of which the adaptor keeps the last
		}
		admitted, answer := false, httptest.NewRecorder()
		limit(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			admitted = true
			if err = c.Next(); err != nil {
				err = c.App().ErrorHandler(c, err) // answers at once, where the limit sees the status
			}
			status := c.Response().StatusCode()
			if err != nil {
				status = http.StatusInternalServerError
			}
			w.WriteHeader(status) // tells RefundIf, and changes nothing
		})).ServeHTTP(answer, r.WithContext(c.RequestCtx()))
		for name, values := range answer.Header() {
			for _, value := range values {
				c.Response().Header.Add(name, value)
			}
		}
		if admitted {
			return err
		}
		return c.Status(answer.Code).Send(answer.Body.Bytes())
	}
}

// fiber2Limit is fiberLimit for fiber 2.
func fiber2Limit(limit func(http.Handler) http.Handler) fiberv2.Handler {
	return func(c *fiberv2.Ctx) error {
		r, err := adaptorv2.ConvertRequest(c, true)
		if err != nil {
			return err
		}
		r.Header = http.Header{}
		for name, value := range c.Request().Header.All() {
			r.Header.Add(string(name), string(value))
		}
		admitted, answer := false, httptest.NewRecorder()
		limit(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			admitted = true
			if err = c.Next(); err != nil {
				err = c.App().ErrorHandler(c, err) // answers at once, where the limit sees the status
			}
			status := c.Response().StatusCode()
			if err != nil {
				status = http.StatusInternalServerError
			}
			w.WriteHeader(status)
		})).ServeHTTP(answer, r.WithContext(c.Context()))
		for name, values := range answer.Header() {
			for _, value := range values {
				c.Response().Header.Add(name, value)
			}
		}
		if admitted {
			return err
		}
		return c.Status(answer.Code).Send(answer.Body.Bytes())
	}
}

// client sends a request to a router and returns the answer.
type client func(*http.Request) *httptest.ResponseRecorder

// router makes a router that serves GET / behind a limit. The handler calls served and answers with the status that it
// returns.
type router func(limit middleware, served func() int) client

func onChi(limit middleware, served func() int) client {
	r := chi.NewRouter()
	r.Use(limit)
	r.Get("/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(served()) })
	return recorded(r)
}

func onEcho(limit middleware, served func() int) client {
	e := echo.New()
	e.Use(echo.WrapMiddleware(limit))
	e.GET("/", func(c echo.Context) error { return echo.NewHTTPError(served()) })
	return recorded(e)
}

func onEchoThatAnswersErrorsAtOnce(limit middleware, served func() int) client {
	e := echo.New()
	e.Use(echo.WrapMiddleware(limit), echoErrors)
	e.GET("/", func(c echo.Context) error { return echo.NewHTTPError(served()) })
	return recorded(e)
}

func onGin(limit middleware, served func() int) client {
	g := gin.New()
	g.Use(ginLimit(limit))
	g.GET("/", func(c *gin.Context) { c.JSON(served(), "hello") })
	return recorded(g)
}

func onGinWithoutBody(limit middleware, served func() int) client {
	g := gin.New()
	g.Use(ginLimit(limit))
	g.GET("/", func(c *gin.Context) { c.Status(served()) })
	return recorded(g)
}

func onGorilla(limit middleware, served func() int) client {
	r := mux.NewRouter()
	r.Use(limit)
	r.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(served()) })
	return recorded(r)
}

func onFiberThatFails(limit middleware, served func() int) client {
	app := fiber.New()
	app.Use(fiberLimit(limit))
	app.Get("/", func(fiber.Ctx) error { return fiber.NewError(served()) })
	return func(r *http.Request) *httptest.ResponseRecorder {
		return copied(func() (*http.Response, error) { return app.Test(r, fiber.TestConfig{}) })
	}
}

func onFiber(limit middleware, served func() int) client {
	app := fiber.New()
	app.Use(fiberLimit(limit))
	app.Get("/", func(c fiber.Ctx) error { return c.SendStatus(served()) })
	return func(r *http.Request) *httptest.ResponseRecorder {
		return copied(func() (*http.Response, error) { return app.Test(r, fiber.TestConfig{}) })
	}
}

func onFiberThatHandlesErrors(limit middleware, served func() int) client {
	app := fiber.New(fiber.Config{ErrorHandler: func(c fiber.Ctx, _ error) error { return c.SendStatus(served()) }})
	app.Use(fiberLimit(limit))
	app.Get("/", func(fiber.Ctx) error { return errors.New("of the application") })
	return func(r *http.Request) *httptest.ResponseRecorder {
		return copied(func() (*http.Response, error) { return app.Test(r, fiber.TestConfig{}) })
	}
}

func onFiber2ThatHandlesErrors(limit middleware, served func() int) client {
	app := fiberv2.New(fiberv2.Config{ErrorHandler: func(c *fiberv2.Ctx, _ error) error { return c.SendStatus(served()) }})
	app.Use(fiber2Limit(limit))
	app.Get("/", func(*fiberv2.Ctx) error { return errors.New("of the application") })
	return func(r *http.Request) *httptest.ResponseRecorder {
		return copied(func() (*http.Response, error) { return app.Test(r, -1) })
	}
}

func onFiber2(limit middleware, served func() int) client {
	app := fiberv2.New()
	app.Use(fiber2Limit(limit))
	app.Get("/", func(c *fiberv2.Ctx) error { return c.SendStatus(served()) })
	return func(r *http.Request) *httptest.ResponseRecorder {
		return copied(func() (*http.Response, error) { return app.Test(r, -1) })
	}
}

// copied converts an answer of fiber, whose tests return a *http.Response.
func copied(test func() (*http.Response, error)) *httptest.ResponseRecorder {
	res, err := test()
	if err != nil {
		panic(err)
	}
	defer func() { _ = res.Body.Close() }()
	w := httptest.NewRecorder()
	for name, values := range res.Header {
		w.Header()[name] = values
	}
	w.WriteHeader(res.StatusCode)
	_, _ = io.Copy(w, res.Body)
	return w
}

// recorded returns a client of a handler.
func recorded(h http.Handler) client {
	return func(r *http.Request) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w
	}
}

// routers are all routers, and whether RefundIf sees the status of their answers.
var routers = []struct {
	name string
	on   router
	sees bool
}{
	{"chi", onChi, true},
	{"echo", onEcho, false},
	{"echo that answers errors at once", onEchoThatAnswersErrorsAtOnce, true},
	{"gin", onGin, true},
	{"gin without a body", onGinWithoutBody, true},
	{"gorilla", onGorilla, true},
	{"fiber", onFiber, true},
	{"fiber with an error", onFiberThatFails, true},
	{"fiber with an error handler", onFiberThatHandlesErrors, true},
	{"fiber 2", onFiber2, true},
	{"fiber 2 with an error handler", onFiber2ThatHandlesErrors, true},
}

func init() { gin.SetMode(gin.ReleaseMode) }

// limited returns middleware that admits two requests of each client.
func limited(t *testing.T, o throttlerhttp.Options) middleware {
	t.Helper()
	limiter, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	o.Buckets = []throttler.Bucket{throttler.NewBucket(time.Hour, 2)}
	limit, err := throttlerhttp.New(limiter, &o)
	require.NoError(t, err)
	return limit
}

// get sends one request.
func get(ask client) int { return ask(httptest.NewRequest(http.MethodGet, "/", nil)).Code }

func TestTheThirdRequestIsRefusedWithFieldsAndReachesNoHandler(t *testing.T) {
	t.Parallel()
	for _, router := range routers {
		t.Run(router.name, func(t *testing.T) {
			t.Parallel()
			served := 0
			ask := router.on(limited(t, throttlerhttp.Options{}), func() int { served++; return http.StatusAccepted })
			for i := range 3 {
				res := ask(httptest.NewRequest(http.MethodGet, "/", nil))
				assert.Equal(t, []string{`"2/1h";q=2;w=3600`}, res.Header().Values("RateLimit-Policy"))
				if i < 2 {
					assert.Equal(t, http.StatusAccepted, res.Code)
					assert.Empty(t, res.Header().Get("Retry-After"))
					continue
				}
				assert.Equal(t, http.StatusTooManyRequests, res.Code)
				assert.Regexp(t, `^3(600|59\d)$`, res.Header().Get("Retry-After"))
				assert.Regexp(t, `^"2/1h";r=0;t=3(600|59\d)$`, res.Header().Get("RateLimit"))
				assert.Equal(t, "application/problem+json", res.Header().Get("Content-Type"))
			}
			assert.Equal(t, 2, served)
		})
	}
}

func TestRefundSeesTheStatusOfTheAnswerOnlyWhereTheGuideSaysSo(t *testing.T) {
	t.Parallel()
	for _, router := range routers {
		t.Run(router.name, func(t *testing.T) {
			t.Parallel()
			failed := limited(t, throttlerhttp.Options{RefundIf: func(status int) bool { return status != http.StatusUnauthorized }})
			ask := router.on(failed, func() int { return http.StatusUnauthorized })
			var got []int
			for range 3 {
				got = append(got, get(ask))
			}
			if router.sees {
				assert.Equal(t, []int{401, 401, 429}, got)
			} else {
				assert.Equal(t, []int{401, 401, 401}, got)
			}
		})
	}
}

func TestGinStreamsInsideOfTheMiddleware(t *testing.T) {
	t.Parallel()
	for _, o := range []throttlerhttp.Options{{}, {RefundIf: func(status int) bool { return status < 400 }}} {
		g := gin.New()
		g.GET("/", func(c *gin.Context) {
			sent := 0
			c.Stream(func(w io.Writer) bool { // Stream needs CloseNotify of the server's writer, and flushes
				sent++
				_, err := io.WriteString(w, "line\n")
				return err == nil && sent < 3
			})
		})
		server := httptest.NewServer(limited(t, o)(g))
		defer server.Close()
		res, err := server.Client().Get(server.URL)
		require.NoError(t, err)
		body, err := io.ReadAll(res.Body)
		require.NoError(t, err)
		require.NoError(t, res.Body.Close())
		assert.Equal(t, strings.Repeat("line\n", 3), string(body))
		remaining := map[bool]string{true: `"2/1h";r=1;t=3600`, false: `"2/1h";r=2`}[o.RefundIf == nil]
		assert.Equal(t, []string{remaining}, res.Header.Values("RateLimit"))
	}
}

type userKey struct{}

func TestUserReadsTheContextOfTheRequest(t *testing.T) {
	t.Parallel()
	user := throttlerhttp.User(func(ctx context.Context) string { id, _ := ctx.Value(userKey{}).(string); return id })
	limit := limited(t, throttlerhttp.Options{Key: user})
	login := func(r *http.Request) *http.Request {
		return r.WithContext(context.WithValue(r.Context(), userKey{}, "42"))
	}
	ok := func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) }

	r := chi.NewRouter()
	r.Use(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { next.ServeHTTP(w, login(r)) })
	}, limit)
	r.Get("/", ok)
	assert.Equal(t, 200, get(recorded(r)))

	e := echo.New()
	e.Use(func(next echo.HandlerFunc) echo.HandlerFunc {
		return func(c echo.Context) error {
			c.SetRequest(login(c.Request()))
			return next(c)
		}
	}, echo.WrapMiddleware(limit))
	e.GET("/", echo.WrapHandler(http.HandlerFunc(ok)))
	assert.Equal(t, 200, get(recorded(e)))

	g := gin.New()
	g.Use(func(c *gin.Context) { c.Request = login(c.Request) }, ginLimit(limit))
	g.GET("/", gin.WrapF(ok))
	assert.Equal(t, 429, get(recorded(g)), "they are one user")

	app := fiber.New()
	app.Use(func(c fiber.Ctx) error {
		c.Locals(userKey{}, "42")
		return c.Next()
	}, fiberLimit(limit))
	app.Get("/", adaptor.HTTPHandlerFunc(ok))
	assert.Equal(t, 429, get(func(r *http.Request) *httptest.ResponseRecorder {
		return copied(func() (*http.Response, error) { return app.Test(r, fiber.TestConfig{}) })
	}))

	g = gin.New()
	g.Use(func(c *gin.Context) { c.Set("user", "42") }, ginLimit(limit))
	g.GET("/", gin.WrapF(ok))
	assert.Equal(t, 500, get(recorded(g)), "what the router keeps is not in it")
}

func TestTheCodeOfOtherRoutersInTheGuideIsThatOfThisFile(t *testing.T) {
	t.Parallel()
	guide, err := os.ReadFile("../../docs/guide.md")
	require.NoError(t, err)
	this, err := os.ReadFile("adapters_test.go")
	require.NoError(t, err)
	_, section, found := strings.Cut(string(guide), "\n## With other routers\n")
	require.True(t, found)
	section, _, _ = strings.Cut(section, "\n## ")
	indentation := regexp.MustCompile(`(?m)^\t+`)
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(section, -1)
	require.NotEmpty(t, blocks)
	for _, block := range blocks {
		assert.Contains(t, indentation.ReplaceAllString(string(this), ""), indentation.ReplaceAllString(block[1], ""))
	}
	lines := regexp.MustCompile("(?m)^\\| .*\\| `([^`]*)` \\|").FindAllStringSubmatch(section, -1)
	require.NotEmpty(t, lines)
	for _, line := range lines {
		assert.Contains(t, string(this), "\t"+line[1]+"\n")
	}
}
