// Package faulttest_test tests what happens to calls when a server, or the network in front of it, fails. It is a
// module of its own, so that the root module does not depend on toxiproxy.
package faulttest_test

import (
	"encoding/json"
	"os"
	"strings"
	"sync"
	"testing"

	toxiproxy "github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/go-throttler/throttler/internal/servers"
)

func TestMain(m *testing.M) {
	if where := os.Getenv(environment); where != "" {
		os.Exit(runNode(where))
	}
	// A link of toxiproxy 2.5 that ends while its toxics change may leave a goroutine behind.
	goleak.VerifyTestMain(program{m}, goleak.IgnoreTopFunction("github.com/Shopify/toxiproxy/v2/toxics.(*NoopToxic).Pipe"))
}

// proxy stands for the network between a process and a server.
type proxy struct {
	*toxiproxy.Proxy

	server *servers.Server
}

// before starts a proxy in front of a server. It stops after the test.
func before(t testing.TB, server *servers.Server) *proxy {
	t.Helper()
	p := toxiproxy.NewProxy(toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop()), server.Addr(), "127.0.0.1:0", server.Addr())
	require.NoError(t, p.Start())
	t.Cleanup(p.Stop)
	return &proxy{p, server}
}

// URL returns the server's URL with the address of the proxy.
func (p *proxy) URL() string { return strings.Replace(p.server.URL(), p.server.Addr(), p.Listen, 1) }

// attributes are those of a toxic: https://github.com/Shopify/toxiproxy#toxics.
type attributes map[string]int

// The directions of a toxic.
const (
	requests = "upstream"
	replies  = "downstream"
)

// poison adds a toxic to one direction of all connections, open and new ones. Heal removes it.
func (p *proxy) poison(t testing.TB, kind, direction string, a attributes) (heal func()) {
	t.Helper()
	toxic, err := json.Marshal(map[string]any{"type": kind, "stream": direction, "attributes": a})
	require.NoError(t, err)
	wrapper, err := p.Toxics.AddToxicJson(strings.NewReader(string(toxic)))
	require.NoError(t, err)
	heal = sync.OnceFunc(func() { require.NoError(t, p.Toxics.RemoveToxic(t.Context(), wrapper.Name)) })
	return heal
}

// hole swallows everything in both directions, until heal is called.
func (p *proxy) hole(t testing.TB) (heal func()) {
	t.Helper()
	heals := []func(){p.poison(t, "timeout", requests, attributes{"timeout": 0}), p.poison(t, "timeout", replies, attributes{"timeout": 0})}
	return func() {
		for _, heal := range heals {
			heal()
		}
	}
}
