// Finding the limit of a request, however its path is written.

package throttlerhttp

import (
	"errors"
	"net/http"
	"net/url"
	"path"
	"strings"
)

// errPath is the error of a request that two routes apply to, one by the path as written and one by the path without
// escapes.
var errPath = errors.New("throttlerhttp: the path is of one Route as it stands, and of another one without escapes")

// of returns the limit that applies to a request, or nil if two routes do.
//
// A ServeMux matches the path with its escapes, but the router behind the middleware may match it without them. To keep
// "/api%2Fsearch" or "/static/%2e%2e/api" from evading a limit, an unusual path is matched in its usual form as well. If
// the two results differ, a matching route wins over no route, and no route wins over a Free route. Two different routes
// leave it open which one the handler will see, so of returns nil.
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

// match returns the limit for the path as it stands. A Free route for a whole method wins over any
// match but a route of the same method.
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

// usualForm returns the request if it has the usual form, otherwise a copy that has it: a clean path without escapes, a
// host in lower case without a dot at its end, and a method other than CONNECT, whose paths a ServeMux does not clean.
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
		usual.Method = "of CONNECT" // no pattern has this method, so only routes for all methods match
	}
	return &usual
}

// folded returns the request, or a copy whose path is changed as IgnoreCase and IgnoreSlash say.
func (m *middleware) folded(r *http.Request) *http.Request {
	p, raw := m.fold(r.URL.Path), r.URL.RawPath
	if raw != "" {
		raw = m.fold(raw)
		if unescaped, err := url.PathUnescape(raw); err == nil { // an invalid RawPath was set by hand, and is ignored
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

// lower returns s in lower case. Letters that differ only in case become equal, because a router may compare them so: K, k
// and the Kelvin sign all become k.
func lower(s string) string {
	for i := range len(s) {
		if c := s[i]; 'A' <= c && c <= 'Z' || c >= 0x80 {
			return strings.ToLower(strings.ToUpper(s))
		}
	}
	return s
}
