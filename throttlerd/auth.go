// Forward-auth: GET /auth for nginx's auth_request, Caddy's forward_auth and Traefik's ForwardAuth. 200 lets the request
// through, and anything else does not.

package main

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"strconv"
	"strings"

	"github.com/go-throttler/throttler/rules"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// known are the entries of every forward-auth request.
var known = []string{"path", "method", "host", "address", "agent"}

// auth answers a gateway. With ?denied=403 it says so in place of 429 and 413: nginx takes any other status for a
// fault. ?domain= names the domain.
func (s *service) auth(w http.ResponseWriter, r *http.Request) {
	asked, denied, err := s.authRequest(r)
	d := &decision{err: err}
	if err == nil {
		d = s.decide(r.Context(), asked)
	}
	d.admit = func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) }
	d.refuse = func(w http.ResponseWriter, r *http.Request, refusal throttlerhttp.Refusal) {
		if !d.denied() {
			problem(w, refusal.Status, title(d.err))
			return
		}
		if denied != 0 {
			refusal.Status = denied
		}
		throttlerhttp.Problem(w, r, refusal)
	}
	s.answer(w, r, d)
}

// authRequest is what the gateway says of the request.
func (s *service) authRequest(r *http.Request) (asked rules.Request, denied int, err error) {
	query := r.URL.Query()
	if text := query.Get("denied"); text != "" {
		if denied, err = strconv.Atoi(text); err != nil || denied < 400 || denied > 499 {
			return asked, 0, malformed("denied is %.64q, must be a status from 400 to 499", text)
		}
	}
	asked.Domain = s.config.domain
	if query.Has("domain") {
		asked.Domain = query.Get("domain")
	}
	asked.Entries, err = s.authEntries(r)
	return asked, denied, err
}

func (s *service) authEntries(r *http.Request) ([]rules.Entry, error) {
	uri, err := s.said(r, "X-Forwarded-Uri")
	if err != nil {
		return nil, err
	}
	u, err := url.ParseRequestURI(uri)
	if err != nil {
		return nil, malformed("X-Forwarded-Uri is no URI")
	}
	method, err := s.said(r, "X-Forwarded-Method")
	if err != nil {
		return nil, err
	}
	address, err := s.client(r)
	if err != nil {
		return nil, err
	}
	host := r.Header.Get("X-Forwarded-Host")
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	all := []rules.Entry{
		{Key: "path", Value: clean(u.Path)}, {Key: "method", Value: method}, {Key: "host", Value: strings.ToLower(host)},
		{Key: "address", Value: address}, {Key: "agent", Value: r.UserAgent()},
	}
	for _, h := range s.config.headers {
		if value := r.Header.Get(h.header); value != "" {
			all = append(all, rules.Entry{Key: h.key, Value: value})
		}
	}
	return all, nil
}

// said is the one line of a header that the gateway sets. Without it, or with a second one, anybody may have written it.
func (s *service) said(r *http.Request, header string) (string, error) {
	lines := r.Header.Values(header)
	if len(lines) != 1 || lines[0] == "" {
		return "", malformed("the gateway has to set %s, once", header)
	}
	return lines[0], nil
}

// clean is the path as a router sees it: "//a/../b/" is "/b/".
func clean(p string) string {
	c := path.Clean("/" + p)
	if c != "/" && strings.HasSuffix(p, "/") {
		c += "/"
	}
	return c
}

// client is the address of the client: of X-Forwarded-For the last that is no trusted proxy. Of IPv6 it is the /64, of
// which a client may have all addresses.
func (s *service) client(r *http.Request) (string, error) {
	list := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for i := len(list) - 1; i >= 0; i-- {
		a, err := parseAddress(strings.TrimSpace(list[i]))
		switch {
		case err != nil && i == len(list)-1:
			return "", malformed("the gateway has to set X-Forwarded-For, with the address of its client at the end")
		case err != nil: // written by a client: the proxy after it counts
			a, _ = parseAddress(strings.TrimSpace(list[i+1]))
		case i > 0 && s.trusts(a):
			continue
		}
		return network(a), nil
	}
	return "", fmt.Errorf("%w: no address", errInternal) // not reached: the first of the list returns
}

func (s *service) trusts(a netip.Addr) bool {
	for _, p := range s.config.trusted {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func parseAddress(text string) (netip.Addr, error) {
	if p, err := netip.ParseAddrPort(text); err == nil {
		return p.Addr().Unmap().WithZone(""), nil
	}
	a, err := netip.ParseAddr(strings.Trim(text, "[]"))
	return a.Unmap().WithZone(""), err
}

func network(a netip.Addr) string {
	if a.Is6() {
		p, _ := a.Prefix(64)
		a = p.Addr()
	}
	return a.String()
}
