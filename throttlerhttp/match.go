// Finding the limit of a request, in whatever form its path is written.

package throttlerhttp

import (
	"errors"
	"net/http"
	"net/url"
	"path"
	"strings"
)

// errPath is the error of a request that two routes apply to.
var errPath = errors.New("throttlerhttp: the path is of one Route as it stands, and of another one without escapes")

// of returns the limit that applies to a request, or nil if two routes do.
//
// A ServeMux matches escaped paths, and the router behind the middleware may not. Nobody may get around a limit by
// "/api%2Fsearch" or "/static/%2e%2e/api", so an unusual path is matched in its usual form as well. A matching route
// wins over no route, and no route wins over a Free route.
func (m *middleware) of(r *http.Request) *limit {
	if m.mux == nil {
		return m.others
	}
	r = m.folded(r)
	l, usual := m.match(r), m.folded(usualForm(r))
	if usual == r {
		return l
	}
	u := m.match(usual)
	switch {
	case l == u || u.free:
		return l
	case l.free || l == m.others:
		return u
	case u == m.others:
		return l
	}
	return nil
}

// match is the limit for the path as it stands: that of a route, or that a Free route has for the method.
func (m *middleware) match(r *http.Request) *limit {
	l := m.matching(r)
	if spared := m.spared[r.Method]; spared != nil && l.method != r.Method {
		return spared
	}
	return l
}

func (m *middleware) matching(r *http.Request) *limit {
	if r.URL.RawPath == "" {
		if l := m.plain[plain{r.Method, r.URL.Path}]; l != nil {
			return l
		}
	}
	_, pattern := m.mux.Handler(r)
	if l := m.routes[pattern]; l != nil {
		return l
	}
	return m.others
}

// usualForm returns the request in its usual form, or a copy that is: with a clean path without escapes, a host in lower
// case without a dot at its end, and not the method CONNECT, whose paths a ServeMux does not clean.
func usualForm(r *http.Request) *http.Request {
	clean := r.URL.Path
	if !strings.HasPrefix(clean, "/") {
		clean = "/" + clean
	}
	clean = path.Clean(clean)
	if strings.HasSuffix(r.URL.Path, "/") && clean != "/" {
		clean += "/"
	}
	host, port, _ := strings.Cut(r.Host, ":")
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	if port != "" {
		host += ":" + port
	}
	if r.URL.RawPath == "" && clean == r.URL.Path && host == r.Host && r.Method != http.MethodConnect {
		return r
	}
	usual, u := *r, *r.URL
	u.Path, u.RawPath = clean, ""
	usual.URL, usual.Host = &u, host
	if r.Method == http.MethodConnect {
		usual.Method = "of CONNECT" // so that routes for all methods match
	}
	return &usual
}

// folded returns the request, or a copy whose path lacks what IgnoreCase and IgnoreSlash ignore.
func (m *middleware) folded(r *http.Request) *http.Request {
	p, raw := m.fold(r.URL.Path), r.URL.RawPath
	if raw != "" {
		raw = m.fold(raw)
		if unescaped, err := url.PathUnescape(raw); err == nil { // else it has been made by hand, and is ignored
			p = unescaped
		}
	}
	if p == r.URL.Path && raw == r.URL.RawPath {
		return r
	}
	folded, u := *r, *r.URL
	u.Path, u.RawPath = p, raw
	folded.URL = &u
	return &folded
}

func (m *middleware) fold(p string) string {
	if m.IgnoreCase {
		p = lower(p)
	}
	if m.IgnoreSlash && len(p) > 1 && strings.HasSuffix(p, "/") {
		p = "/" + strings.Trim(p, "/")
	}
	return p
}

// lower is s in lower case, with one letter for all that differ only in case: a router may take K, k and the Kelvin sign
// for equal.
func lower(s string) string {
	for i := range len(s) {
		if c := s[i]; 'A' <= c && c <= 'Z' || c >= 0x80 {
			return strings.ToLower(strings.ToUpper(s))
		}
	}
	return s
}
