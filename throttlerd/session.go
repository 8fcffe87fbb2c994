// How a browser authenticates: it sends the token once, in a form, and then a cookie. Scripts cannot read the cookie, and
// other sites cannot make the browser send it.

package main

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

const (
	sessionLasts = 12 * time.Hour
	maxSessions  = 64
	maxForm      = 4 << 10 // bytes
)

// sessions holds the browsers that have logged in, in memory, until the process ends. It is safe for concurrent
// use.
type sessions struct {
	mu    sync.Mutex
	until map[[sha256.Size]byte]time.Time // by the hash of the cookie's value
}

// begin starts a session and returns the value of its cookie. At maxSessions it ends the session that would expire first.
func (s *sessions) begin(now time.Time) string {
	id := rand.Text() + rand.Text()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.until == nil {
		s.until = map[[sha256.Size]byte]time.Time{}
	}
	for len(s.until) >= maxSessions {
		first, end := [sha256.Size]byte{}, time.Time{}
		for sum, until := range s.until {
			if end.IsZero() || until.Before(end) {
				first, end = sum, until
			}
		}
		delete(s.until, first)
	}
	s.until[sha256.Sum256([]byte(id))] = now.Add(sessionLasts)
	return id
}

func (s *sessions) has(id string, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return now.Before(s.until[sha256.Sum256([]byte(id))])
}

func (s *sessions) end(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.until, sha256.Sum256([]byte(id)))
}

// cookieName includes the port. Browsers send a cookie to all ports of a host, so with one name several daemons on a host
// would end each other's sessions.
func cookieName(r *http.Request) string {
	_, port, _ := net.SplitHostPort(r.Host)
	return strings.TrimSuffix("throttlerd-"+port, "-")
}

// setCookie sets the cookie, or removes it if id is "".
func setCookie(w http.ResponseWriter, r *http.Request, id string) {
	c := &http.Cookie{Name: cookieName(r), Value: id, Path: "/", HttpOnly: true, SameSite: http.SameSiteStrictMode, MaxAge: int(sessionLasts / time.Second)}
	if id == "" {
		c.MaxAge = -1
	}
	c.Secure = r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https"
	http.SetCookie(w, c)
}

// knows reports whether the request has the token or the cookie of a session. A request with an Authorization header is
// judged by that alone.
func (a *admin) knows(r *http.Request) bool {
	if scheme, given, said := strings.Cut(r.Header.Get("Authorization"), " "); said {
		return strings.EqualFold(scheme, "Bearer") && a.isToken(strings.TrimSpace(given))
	}
	c, err := r.Cookie(cookieName(r))
	return err == nil && r.Header.Get("Authorization") == "" && a.sessions.has(c.Value, time.Now())
}

// isToken compares in a time that does not depend on the token: it compares hashes, so the length does not show either.
func (a *admin) isToken(given string) bool {
	sum := sha256.Sum256([]byte(given))
	return subtle.ConstantTimeCompare(sum[:], a.token[:]) == 1
}

// login is POST /login.
func (a *admin) login(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	if !a.isToken(strings.TrimSpace(r.PostFormValue("token"))) {
		a.audit(r, "refused", slog.String("path", "/login"))
		writePage(w, "login", http.StatusUnauthorized, "This is not the token.")
		return
	}
	setCookie(w, r, a.sessions.begin(time.Now()))
	a.audit(r, "login")
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

// logout is POST /logout.
func (a *admin) logout(w http.ResponseWriter, r *http.Request) {
	if c, err := r.Cookie(cookieName(r)); err == nil {
		a.sessions.end(c.Value)
	}
	setCookie(w, r, "")
	a.audit(r, "logout")
	http.Redirect(w, r, "/login", http.StatusSeeOther)
}
