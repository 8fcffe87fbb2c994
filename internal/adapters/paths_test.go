package adapters_test

import (
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/go-chi/chi/v5"
	chimiddleware "github.com/go-chi/chi/v5/middleware"
	fiberv2 "github.com/gofiber/fiber/v2"
	"github.com/gofiber/fiber/v3"
	"github.com/gorilla/handlers"
	"github.com/gorilla/mux"
	"github.com/labstack/echo/v4"
	echomiddleware "github.com/labstack/echo/v4/middleware"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// logins are routers that serve POST /login behind a limit, and accept other spellings of the path too. The options
// tell the limit which ones.
var logins = map[string]struct {
	on func(limit middleware) client
	o  throttlerhttp.Options
}{
	"chi":                   {func(limit middleware) client { return onChiWith(limit) }, throttlerhttp.Options{}},
	"chi with StripSlashes": {func(limit middleware) client { return onChiWith(chimiddleware.StripSlashes, limit) }, throttlerhttp.Options{IgnoreSlash: true}},
	"chi with CleanPath":    {func(limit middleware) client { return onChiWith(chimiddleware.CleanPath, limit) }, throttlerhttp.Options{IgnoreSlash: true}},
	"chi with both": {func(limit middleware) client {
		return onChiWith(limit, chimiddleware.CleanPath, chimiddleware.StripSlashes)
	}, throttlerhttp.Options{IgnoreSlash: true}},
	"echo": {func(limit middleware) client { return onEchoWith(limit) }, throttlerhttp.Options{}},
	"echo with RemoveTrailingSlash": {func(limit middleware) client {
		return onEchoWith(limit, echomiddleware.RemoveTrailingSlash())
	}, throttlerhttp.Options{IgnoreSlash: true}},
	"gin": {func(limit middleware) client {
		g := gin.New()
		g.RemoveExtraSlash = true
		g.Use(ginLimit(limit))
		g.POST("/login", func(c *gin.Context) { c.Status(http.StatusOK) })
		return recorded(g)
	}, throttlerhttp.Options{}},
	"gorilla": {func(limit middleware) client {
		r := mux.NewRouter().StrictSlash(true)
		r.Use(limit)
		r.HandleFunc("/login", func(http.ResponseWriter, *http.Request) {}).Methods(http.MethodPost)
		return recorded(r)
	}, throttlerhttp.Options{}},
	"fiber": {func(limit middleware) client {
		app := fiber.New()
		app.Use(fiberLimit(limit))
		app.Post("/login", func(c fiber.Ctx) error { return c.SendStatus(http.StatusOK) })
		return func(r *http.Request) *httptest.ResponseRecorder {
			return copied(func() (*http.Response, error) { return app.Test(r, fiber.TestConfig{}) })
		}
	}, throttlerhttp.Options{IgnoreCase: true, IgnoreSlash: true}},
	"fiber that unescapes": {func(limit middleware) client {
		app := fiber.New(fiber.Config{UnescapePath: true})
		app.Use(fiberLimit(limit))
		app.Post("/login", func(c fiber.Ctx) error { return c.SendStatus(http.StatusOK) })
		return func(r *http.Request) *httptest.ResponseRecorder {
			return copied(func() (*http.Response, error) { return app.Test(r, fiber.TestConfig{}) })
		}
	}, throttlerhttp.Options{IgnoreCase: true, IgnoreSlash: true}},
	"fiber 2": {func(limit middleware) client {
		app := fiberv2.New()
		app.Use(fiber2Limit(limit))
		app.Post("/login", func(c *fiberv2.Ctx) error { return c.SendStatus(http.StatusOK) })
		return func(r *http.Request) *httptest.ResponseRecorder {
			return copied(func() (*http.Response, error) { return app.Test(r, -1) })
		}
	}, throttlerhttp.Options{IgnoreCase: true, IgnoreSlash: true}},
}

func onChiWith(all ...func(http.Handler) http.Handler) client {
	r := chi.NewRouter()
	r.Use(all...)
	r.Post("/login", func(http.ResponseWriter, *http.Request) {})
	return recorded(r)
}

func onEchoWith(limit middleware, before ...echo.MiddlewareFunc) client {
	e := echo.New()
	e.Pre(echo.WrapMiddleware(limit)) // first, to see the path as it arrived
	e.Pre(before...)
	e.POST("/login", func(c echo.Context) error { return c.NoContent(http.StatusOK) })
	return recorded(e)
}

func TestNoWayToWriteThePathEvadesTheLimitOfALogin(t *testing.T) {
	t.Parallel()
	for name, router := range logins {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			limiter, err := throttler.New(throttler.Config{})
			require.NoError(t, err)
			o := router.o
			o.Buckets = []throttler.Bucket{throttler.NewBucket(time.Hour, 1000)}
			o.Routes = []throttlerhttp.Route{{Pattern: "POST /login", Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1)}}}
			limit, err := throttlerhttp.New(limiter, &o)
			require.NoError(t, err)
			ask, served := router.on(limit), 0
			for _, path := range []string{
				"/login", "/login/", "/LOGIN", "/Login/", "//login", "//login//", "/./login", "/login/.", "/x/../login", "/%6cogin", "/%4COGIN",
				"/login%2F", "/LOGIN%2f", "/%2Flogin", "/login//", "/.//login",
			} {
				if ask(httptest.NewRequest(http.MethodPost, "http://example.com"+path, nil)).Code == http.StatusOK {
					served++
				}
			}
			assert.Equal(t, 1, served)
		})
	}
}

func TestTheAddressThatOtherMiddlewareFoundIsTheClient(t *testing.T) {
	t.Parallel()
	for name, found := range map[string]middleware{"RealIP of chi": chimiddleware.RealIP, "ProxyHeaders of gorilla": handlers.ProxyHeaders} {
		limit := limited(t, throttlerhttp.Options{})
		ask := recorded(found(limit(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))))
		for _, client := range []string{"198.51.100.1", "2001:db8::1"} {
			var got []int
			for range 3 {
				r := httptest.NewRequest(http.MethodGet, "/", nil)
				r.Header.Set("X-Real-IP", client)
				got = append(got, ask(r).Code)
			}
			assert.Equal(t, []int{200, 200, 429}, got, name)
		}
	}
}

func TestAllLinesOfAHeaderReachTheLimit(t *testing.T) {
	t.Parallel()
	for _, router := range routers {
		t.Run(router.name, func(t *testing.T) {
			t.Parallel()
			trusted := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("10.0.0.0/8")}
			var keys []string
			key := throttlerhttp.Join(throttlerhttp.Address(&throttlerhttp.AddressOptions{Trusted: trusted}), throttlerhttp.APIKey("X-API-Key"))
			ask := router.on(limited(t, throttlerhttp.Options{Key: func(r *http.Request) string {
				keys = append(keys, key(r))
				return keys[len(keys)-1]
			}}), func() int { return http.StatusOK })
			r := httptest.NewRequest(http.MethodGet, "/", nil)
			r.Header["X-Forwarded-For"] = []string{"203.0.113.9", "198.51.100.7, 10.0.0.3", "10.0.0.2"}
			r.Header["X-Api-Key"] = []string{"secret", "invented"}
			ask(r)
			assert.Equal(t, []string{"ip:198.51.100.7 key:2bb80d537b1da3e38bd30361aa855686"}, keys, "the list, and the first key")
		})
	}
}
