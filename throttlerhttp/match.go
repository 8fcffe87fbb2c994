package throttlerhttp

import (
	"errors"
	"net/http"
	"net/url"
	"path"
	"strings"
)

// errPath is that of a request to which two routes apply.
var errPath = errors.New("throttlerhttp: the path is of one Route as it stands, and of another one without escapes")

// of returns the limit that applies to a request, or nil if that is not clear.
//
// A ServeMux matches paths as they are escaped, and what is behind the middleware may not: so that nobody gets
// around a limit by "/api%2Fsearch" or "/static/%2e%2e/api", a request that is written in an unusual way is also
// matched as it is usually written. A route counts for more than none, and none for more than a Free one.
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

// match is the limit by the form of the request's path.
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

// usualForm returns the request, or a copy with a clean path that has no escapes, a host in lower case without
// the dot at its end, and a method for which a ServeMux does not go other ways, as for CONNECT.
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

// folded returns the request, or a copy whose path has no more of what Options ignore.
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

// lower is s with one letter in place of all that are equal but for case: a router may take K, k and the sign for
// Kelvin for one.
func lower(s string) string {
	for i := range len(s) {
		if c := s[i]; 'A' <= c && c <= 'Z' || c >= 0x80 {
			return strings.ToLower(strings.ToUpper(s))
		}
	}
	return s
}
