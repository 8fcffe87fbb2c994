// Package throttlerhttp limits the requests that a net/http server serves.
//
//	limit, err := throttlerhttp.New(t, &throttlerhttp.Options{
//		Key:     throttlerhttp.First(throttlerhttp.User(userID), throttlerhttp.Address(nil)),
//		Buckets: []throttler.Bucket{throttler.NewBucket(10*time.Second, 5), throttler.NewBucket(time.Hour, 100)},
//		Routes: []throttlerhttp.Route{
//			{Pattern: "GET /api/search", Adds: true, Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 10)}},
//			{Pattern: "GET /health", Free: true},
//		},
//	})
//	http.ListenAndServe(":8000", limit(mux))
//
// A request is one decision on all buckets that apply to it: it takes from all of them, or from none. One that
// is admitted gets the fields of Options.Fields in its answer; one that is not never reaches the handler, and is
// answered by Options.Refuse: 429 with a Retry-After that is never too early, or what Refusal says.
//
// What the buckets of a route took is kept under an identifier of the key and the route (RouteIdentifier), so that
// nobody is refused by one route for what was taken by another.
//
// The middleware is a func(http.Handler) http.Handler. Around a single handler it needs no Routes. Of two that
// are around each other each decides for itself, so that what the outer one took stays taken when the inner one
// refuses; let one middleware know both limits instead. The very same middleware twice around a handler asks once,
// unless another of its routes, or another key, is inside.
//
// The ResponseWriter of the handler has those of http.Flusher, http.Hijacker, http.Pusher and io.ReaderFrom that the
// server's has, and what http.ResponseController needs.
package throttlerhttp

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/go-throttler/throttler"
)

// Options of New. The zero value limits each address by the buckets that the Throttler has.
type Options struct {
	// Key names whom a request counts for. Nil is Address(nil).
	Key Key

	// Buckets limit the requests. None: those that the Throttler has for the key.
	//
	// What is spent is found by key and bucket name: two middlewares on Throttlers of one Name and storage share
	// buckets of one name, such as two of 5 per 10 s. Use Routes, or Named, to keep them apart. Buckets and Tiers
	// together have at most 16 different ones, by name, kind and period: one client may come to have all of them.
	Buckets []throttler.Bucket

	// Tier names the set of Tiers that limits a request in place of Buckets; empty is Buckets. Give the buckets
	// of different tiers the same names (Bucket.Named), so that who changes tiers keeps what was spent.
	Tier  func(*http.Request) string
	Tiers map[string][]throttler.Bucket

	// Routes have limits of their own. A request belongs to the route that http.ServeMux would choose, both as it
	// stands and with a path that is clean and without escapes: "//login", "/./login" and "/%6Cogin" are "/login".
	Routes []Route

	// IgnoreCase and IgnoreSlash are for what is behind the middleware and serves "/LOGIN", or "/login/", as
	// "/login": its requests then belong to the same route. Set them as that router is set, since it decides
	// which handler runs. A ServeMux has neither.
	IgnoreCase, IgnoreSlash bool

	// Cost of a request in tokens, 0 or more. Nil is the Throttler's Config.Cost.
	Cost func(*http.Request) int64

	// RefundIf, if not nil, is told the status of each answer, and by true gives the cost back: to limit failed
	// logins only, give back those below 400. Until the handler writes a status or a body the cost is out; then it is
	// given back before anything is sent, and Fields say what is true after it. The status is the one that the
	// handler writes; frameworks that write it after the middleware has returned do not work with it. It is 500 for a
	// handler that panics before its cost was given back, 499 if it writes nothing and the client has gone, and 101
	// if it hijacks the connection.
	RefundIf func(status int) bool

	// Fields are those that tell clients about their limits. 0 is Draft10.
	Fields Fields

	// Refuse answers a request in place of the handler. Nil is Problem. Retry-After, Fields and a Cache-Control of
	// no-store are set before, and what was said of another body, such as its Content-Length, is removed.
	Refuse func(http.ResponseWriter, *http.Request, Refusal)

	// OnError, if not nil, is told why a request is answered otherwise than by the handler or a 429, before
	// Refuse answers it: ErrNoKey, a tier that Tiers does not have, a path of two routes, a cost that the buckets
	// cannot hold, and what the storage failed with. The Throttler's Observe hears only of what the Throttler was
	// asked, and so of none of the first three; of a failure that Config.OnStorageError allowed only Observe does.
	// It must be safe for concurrent use.
	//
	// A client that goes away before the storage has answered is no error: neither OnError nor Refuse is called,
	// no body is written, and the status, which only logs see, is 499. A deadline of the server is an error, and 503.
	OnError func(*http.Request, error)
}

// Route has the limits of some of the requests.
type Route struct {
	// Pattern is one of http.ServeMux: "/api/", "POST /login", "/users/{id}". Of several that match a request
	// the most specific counts, as there. One that a ServeMux takes and that does not match what it seems to, such
	// as "/api/*", "/users/:id" or "post /login", is an error of New, which says how it is written. In a path a
	// literal * is %2A, and a literal : is %3A.
	//
	// "OPTIONS /" and "HEAD /" of a Free route are for all requests of the method, whatever other patterns match
	// them, unless one has the same method: to a ServeMux "OPTIONS /" and "/api/" are a conflict.
	Pattern string

	// Name stands before the names of the route's buckets, for clients that read the fields, and in the
	// identifier under which is kept what was taken from them (RouteIdentifier). By default it is Pattern. Routes
	// of one Name share what is spent; together they have at most 16 different buckets.
	Name string

	// Buckets limit the requests in place of Options.Buckets and Options.Tiers, or, if Adds is set, besides
	// them, in one decision. None are those of Options. Nothing is inherited from a less specific route.
	Buckets []throttler.Bucket
	Adds    bool

	// Free requests are not limited.
	Free bool

	Key      Key                       // nil: that of Options
	Cost     func(*http.Request) int64 // nil: that of Options
	RefundIf func(status int) bool     // nil: that of Options

	Refuse func(http.ResponseWriter, *http.Request, Refusal) // nil: that of Options
}

// ErrNoKey is that a Key returned nothing.
var ErrNoKey = errors.New("throttlerhttp: the Key of the middleware knows nobody whom the request counts for")

// New returns middleware that asks the Throttler before each request. Nil options are the zero value. A nil
// Throttler is an error. It returns all faults of the options, joined. The middleware is safe for concurrent use,
// and may be put around several handlers, which then share the limits.
func New(t *throttler.Throttler, o *Options) (func(http.Handler) http.Handler, error) {
	m := &middleware{t: t}
	if o != nil {
		m.Options = *o
	}
	if m.Key == nil {
		m.Key = Address(nil)
	}
	if m.Refuse == nil {
		m.Refuse = Problem
	}
	if err := m.compile(); err != nil {
		return nil, err
	}
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { m.serve(w, r, next) })
	}, nil
}

type middleware struct {
	Options

	t      *throttler.Throttler
	others *limit // of requests that no route matches
	mux    *http.ServeMux
	routes map[string]*limit // by patterns
	plain  map[plain]*limit  // that a ServeMux need not look for
	spared map[string]*limit // Free ones of a method, whatever the path
}

// limit is what applies to some of the requests.
type limit struct {
	m        *middleware
	free     bool
	method   string // of the pattern, "" for all
	key      Key
	cost     func(*http.Request) int64
	refundIf func(int) bool
	refuse   func(http.ResponseWriter, *http.Request, Refusal)
	set      []throttler.Option            // Using of the buckets, empty for those of the Throttler
	tiers    map[string][]throttler.Option // in place of set; nil where tiers do not matter
	added    []throttler.Option            // the buckets of a route that Adds, else nil
	route    string                        // in the identifier of the route's own buckets, "" if it has none
	policies policies
}

// serve is the flow of a request.
func (m *middleware) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	l := m.of(r)
	if l == nil {
		m.tell(r, errPath)
		m.Refuse(w, r, Refusal{Status: http.StatusBadRequest, Err: errPath})
		return
	}
	if l.free || l.asked(w, r) {
		next.ServeHTTP(w, r)
		return
	}
	v, err := l.ask(r)
	switch {
	case err == nil && v.Allowed:
		l.admit(w, r, next, &v)
	case gone(r, err):
		w.WriteHeader(statusClientClosed)
	default:
		m.tell(r, err)
		l.answer(w, r, v, err)
	}
}

// admit has the handler serve the request.
func (l *limit) admit(w http.ResponseWriter, r *http.Request, next http.Handler, v *throttler.Verdict) {
	rec := &recorder{ResponseWriter: w, l: l, r: r}
	if v.Parts() > 0 {
		rec.id = v.Part(0).Identifier
		rec.said.say(l, w.Header(), v)
	}
	if l.refundIf != nil {
		taken := *v
		rec.v = &taken
	}
	defer rec.end()
	next.ServeHTTP(rec.as(), r)
	rec.returned = true
}

// gone says that the client went away before the storage answered.
func gone(r *http.Request, err error) bool {
	return err != nil && status(err) == http.StatusServiceUnavailable && errors.Is(r.Context().Err(), context.Canceled)
}

func (m *middleware) tell(r *http.Request, err error) {
	if err != nil && m.OnError != nil {
		m.OnError(r, err)
	}
}

// ask has the Throttler decide.
func (l *limit) ask(r *http.Request) (v throttler.Verdict, err error) {
	key := l.key(r)
	if key == "" {
		return v, fmt.Errorf("%w: its address is %.64q", ErrNoKey, r.RemoteAddr)
	}
	id, set, added := l.identifier(key), l.set, l.added
	if l.tiers != nil {
		if set, err = l.tier(r); err != nil {
			return v, err
		}
	}
	if l.cost != nil {
		cost := throttler.Cost(l.cost(r))
		set, added = with(set, cost), with(added, cost)
	}
	if l.added != nil {
		route := RouteIdentifier(key, l.route)
		v, err = l.m.t.ConsumeAll(r.Context(), throttler.For(id, set...), throttler.For(route, added...))
		id, set = route, added
	} else {
		v, err = l.m.t.ConsumeContext(r.Context(), id, set...)
	}
	if err != nil && errors.Is(err, throttler.ErrCostExceedsCapacity) {
		v, _ = l.m.t.Peek(r.Context(), id, with(set, throttler.Cost(0))...) // for the fields
		v.Allowed = false
	}
	return v, err
}

// with copies the options, which requests share, and adds one.
func with(options []throttler.Option, o throttler.Option) []throttler.Option {
	return append(slices.Clip(options), o)
}

// identifier is that of the first part of a decision for a key.
func (l *limit) identifier(key string) string {
	if l.added != nil {
		return RouteIdentifier(key, "")
	}
	return RouteIdentifier(key, l.route)
}

// tier is the set of the request's tier.
func (l *limit) tier(r *http.Request) ([]throttler.Option, error) {
	tier := l.m.Tier(r)
	set, known := l.tiers[tier]
	if !known && tier != "" {
		return set, fmt.Errorf("throttlerhttp: Options.Tier returned %q, which is none of Options.Tiers", tier)
	}
	return set, nil
}
