package throttlerhttp_test

import (
	"context"
	"encoding/base64"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/throttlerhttp"
)

func TestAnAddressWithoutAPortIsAClient(t *testing.T) {
	t.Parallel()
	h := serve(t, throttler.Config{}, throttlerhttp.Options{Key: throttlerhttp.Address(nil), Buckets: buckets(perHour(1))}, ok)
	from := func(remote string) int {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.RemoteAddr = remote
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Code
	}
	for _, same := range [][]string{
		{"198.51.100.1", "198.51.100.1:80", "::ffff:198.51.100.1"},
		{"2001:db8:7::1", "[2001:db8:7::2]", "[2001:db8:7::3]:443", "2001:db8:7::4%eth0"},
	} {
		assert.Equal(t, http.StatusOK, from(same[0]))
		for _, remote := range same {
			assert.Equal(t, http.StatusTooManyRequests, from(remote), remote)
		}
	}
}

func TestClientsOfAUnixSocketAreNobody(t *testing.T) {
	t.Parallel()
	told := make(chan error, 1)
	h := serve(t, throttler.Config{}, throttlerhttp.Options{
		Key:     throttlerhttp.Address(&throttlerhttp.AddressOptions{Trusted: prefixes("0.0.0.0/0", "::/0")}),
		Buckets: buckets(perHour(1)), OnError: func(_ *http.Request, err error) { told <- err },
	}, ok)
	path := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", path)
	require.NoError(t, err)
	server := httptest.NewUnstartedServer(h)
	require.NoError(t, server.Listener.Close())
	server.Listener = listener
	server.Start()
	defer server.Close()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://unix/", nil)
	require.NoError(t, err)
	r.Header.Set("X-Forwarded-For", "192.0.2.1")
	res, err := transport.RoundTrip(r)
	require.NoError(t, err)
	require.NoError(t, res.Body.Close())
	assert.Equal(t, http.StatusInternalServerError, res.StatusCode)
	assert.ErrorIs(t, <-told, throttlerhttp.ErrNoKey)
}

func TestCredentialsThatSayTheSameAreOneKey(t *testing.T) {
	t.Parallel()
	basic := func(s string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(s)) }
	for _, header := range []string{"Authorization", "proxy-authorization"} {
		key := throttlerhttp.APIKey(header)
		of := func(value string) string {
			r := arriving("", "")
			r.Header[http.CanonicalHeaderKey(header)] = []string{value} // the value unchanged
			return key(r)
		}
		for _, same := range [][]string{
			{"Bearer abc", "bearer abc", "BEARER abc", "bEaReR  abc", "Bearer\tabc", " Bearer \t abc \t"},
			{basic("u:p"), "basic dTpw", "BASIC  dTpw "},
			{"Basic dTpwcA==", "basic dTpwcB=="}, // differ only in padding bits, which a decoder ignores
		} {
			for _, value := range same {
				assert.Equal(t, of(same[0]), of(value), "%q", value)
			}
		}
		made := map[string]string{}
		for _, value := range []string{"Bearer abc", "Bearer Abc", "Bearer  a bc", "Token abc", "abc", "ABC", "bearer", basic("u:p"), basic("u:q"), "Basic u:p", "Bearer dTpw"} {
			require.NotEmpty(t, of(value))
			require.NotContains(t, made, of(value), value)
			made[of(value)] = value
		}
		assert.Empty(t, of(" \t"))
	}
	other := throttlerhttp.APIKey("X-API-Key")
	assert.NotEqual(t, other(arriving("", "X-API-Key", "Bearer abc")), other(arriving("", "X-API-Key", "bearer abc")), "no scheme")
	assert.Equal(t, other(arriving("", "X-API-Key", "abc")), other(arriving("", "X-API-Key", "\tabc ")))
}

func TestTheFirstLineOfAnAPIKeyCounts(t *testing.T) {
	t.Parallel()
	for _, header := range []string{"X-API-Key", "Authorization"} {
		h := serve(t, throttler.Config{}, throttlerhttp.Options{Key: throttlerhttp.APIKey(header), Buckets: buckets(perHour(1))},
			http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get(header) != "Bearer mine" {
					w.WriteHeader(http.StatusUnauthorized)
				}
			}))
		assert.Equal(t, http.StatusOK, ask(h, "GET /", header, "Bearer mine").StatusCode)
		for _, invented := range []string{"a", "b", "c"} {
			assert.Equal(t, http.StatusTooManyRequests, ask(h, "GET /", header, "Bearer mine", header, invented).StatusCode)
		}
	}
}

func TestAllLinesOfXForwardedForAreOneList(t *testing.T) {
	t.Parallel()
	key := throttlerhttp.Address(&throttlerhttp.AddressOptions{Trusted: prefixes("10.0.0.0/8")})
	list := []string{"198.51.100.1", "192.0.2.7", "10.0.0.3", "10.0.0.2"}
	for split := range 1 << (len(list) - 1) { // the commas at which a new line begins
		lines := []string{list[0]}
		for i, entry := range list[1:] {
			if split&(1<<i) != 0 {
				lines = append(lines, entry)
			} else {
				lines[len(lines)-1] += ", " + entry
			}
		}
		assert.Equal(t, "ip:192.0.2.7", key(arriving("10.0.0.1:1", "X-Forwarded-For", lines...)), strings.Join(lines, " | "))
	}
}
