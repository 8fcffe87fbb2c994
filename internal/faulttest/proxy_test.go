// Package faulttest_test tests what becomes of calls when the network between this module and a server
// fails. It is a module of its own because of what toxiproxy needs.
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

// proxy is the network between this process and a server.
type proxy struct {
	*toxiproxy.Proxy

	server *servers.Server
}

// before puts a proxy before a server, for as long as the test lasts.
func before(t testing.TB, server *servers.Server) *proxy {
	t.Helper()
	p := toxiproxy.NewProxy(toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop()), server.Addr(), "127.0.0.1:0", server.Addr())
	require.NoError(t, p.Start())
	t.Cleanup(p.Stop)
	return &proxy{p, server}
}

// URL is the server's, by way of the proxy.
func (p *proxy) URL() string { return strings.Replace(p.server.URL(), p.server.Addr(), p.Listen, 1) }

// attributes of a toxic, as toxiproxy documents them.
type attributes map[string]int

// The directions of a toxic.
const (
	requests = "upstream"
	replies  = "downstream"
)

// poison does harm to a direction of all connections, those that are open and new ones, until it is healed.
func (p *proxy) poison(t testing.TB, kind, direction string, a attributes) (heal func()) {
	t.Helper()
	toxic, err := json.Marshal(map[string]any{"type": kind, "stream": direction, "attributes": a})
	require.NoError(t, err)
	wrapper, err := p.Toxics.AddToxicJson(strings.NewReader(string(toxic)))
	require.NoError(t, err)
	heal = sync.OnceFunc(func() { require.NoError(t, p.Toxics.RemoveToxic(t.Context(), wrapper.Name)) })
	return heal
}

// hole swallows everything, in both directions, until it is healed.
func (p *proxy) hole(t testing.TB) (heal func()) {
	t.Helper()
	heals := []func(){p.poison(t, "timeout", requests, attributes{"timeout": 0}), p.poison(t, "timeout", replies, attributes{"timeout": 0})}
	return func() {
		for _, heal := range heals {
			heal()
		}
	}
}
