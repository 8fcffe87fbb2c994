// Forward-auth: GET /auth for nginx's auth_request, Caddy's forward_auth and Traefik's ForwardAuth. The answer
// is 200 if the gateway may let the request through, and an error status otherwise.

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

// known are the keys of the entries that every forward-auth request has.
var known = []string{"path", "method", "host", "address", "agent"}

// auth answers a gateway. ?denied=403 replaces the statuses of a denial, 429 and 413, because nginx treats any status but
// 401 and 403 as a fault. ?domain= names the domain.
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

// authRequest translates the gateway's request. denied is the status that it wants for denials, 0 if it names none.
func (s *service) authRequest(r *http.Request) (asked rules.Request, denied int, err error) {
	query, err := once(r.URL.RawQuery, "domain", "denied")
	if err != nil {
		return asked, 0, err
	}
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
	// To net/url a "#" is a character of a request's path. To the servers behind it begins a fragment, which is no part of
	// the path.
	uri, _, _ = strings.Cut(uri, "#")
	if p, _, _ := strings.Cut(uri, "?"); strings.Contains(p, `\`) {
		return nil, malformed(`X-Forwarded-Uri has a \ in its path, must have %%5C: some servers take it for a slash, and others do not`)
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
	host, err := single(r, "X-Forwarded-Host")
	if err != nil {
		return nil, err
	}
	all := []rules.Entry{
		{Key: "path", Value: clean(u.Path)}, {Key: "method", Value: method}, {Key: "host", Value: usualHost(host)},
		{Key: "address", Value: address}, {Key: "agent", Value: r.UserAgent()},
	}
	for _, h := range s.config.headers {
		value, err := single(r, h.header)
		if err != nil {
			return nil, err
		}
		if value != "" {
			all = append(all, rules.Entry{Key: h.key, Value: value})
		}
	}
	return all, nil
}

// said returns a header field that the gateway must set to exactly one line. A second line may come from the client, and
// without the field the gateway is not set up to pass it on.
func (s *service) said(r *http.Request, header string) (string, error) {
	lines := r.Header.Values(header)
	if len(lines) != 1 || lines[0] == "" {
		return "", malformed("the gateway has to set %s, once", header)
	}
	return lines[0], nil
}

// single returns a header field that the gateway may set, "" if it does not. Of two lines one may come from the client, and
// nobody knows which.
func single(r *http.Request, header string) (string, error) {
	lines := r.Header.Values(header)
	if len(lines) > 1 {
		return "", malformed("%s stands there %d times, must come from the gateway alone", header, len(lines))
	}
	return strings.Join(lines, ""), nil
}

// clean returns the path as a router sees it: "//a/../b/" becomes "/b/". Otherwise a client could escape a rule by
// spelling the path differently. A dot segment at the end leaves a slash, as in RFC 3986: "/b/." and "/b/c/.." are "/b/".
func clean(p string) string {
	p = "/" + p
	c := path.Clean(p)
	if last := p[strings.LastIndexByte(p, '/')+1:]; c != "/" && (last == "" || last == "." || last == "..") {
		c += "/"
	}
	return c
}

// usualHost returns the host in one spelling: in lower case, without a port, the dot that a full name may end with, or the
// brackets of an IPv6 address. Otherwise a client could escape a rule by spelling the host differently.
func usualHost(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	} else {
		host = strings.Trim(host, "[]") // SplitHostPort removes them only where there is a port
	}
	return strings.TrimRight(strings.ToLower(host), ".")
}

// client returns the address of the client: the last address in X-Forwarded-For that is not a trusted proxy, since each
// proxy appends the address it saw and everything before that may be forged. An IPv6 address is cut to its /64, because
// one client may use all addresses of such a network.
func (s *service) client(r *http.Request) (string, error) {
	list := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for i := len(list) - 1; i >= 0; i-- {
		a, err := parseAddress(strings.TrimSpace(list[i]))
		switch {
		case err != nil && i == len(list)-1:
			return "", malformed("the gateway has to set X-Forwarded-For, with the address of its client at the end")
		case err != nil: // a client wrote this: the request counts for the proxy after it
			a, _ = parseAddress(strings.TrimSpace(list[i+1]))
		case i > 0 && s.trusts(a):
			continue
		}
		return network(a), nil
	}
	return "", fmt.Errorf("%w: no address", errInternal) // not reached: the loop returns at the first address at the latest
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
