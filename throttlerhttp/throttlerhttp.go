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
// A request is one decision on all buckets that apply to it: it takes from all of them, or from none. The answer to an
// admitted request has the header fields that Options.Fields chooses. A denied request never reaches the handler. It is
// answered by Options.Refuse, with a 429 and a Retry-After that is never too early. See [Refusal] for the other statuses.
//
// The buckets of a route have an identifier of their own, made of the key and the route (see [RouteIdentifier]). So no
// route denies a client for what another route took.
//
// The middleware is a func(http.Handler) http.Handler. Around a single handler it needs no Routes. Nested middlewares
// decide separately: if the inner one denies, the outer one has still taken its tokens. Give both limits to one
// middleware instead. The same middleware twice around a handler decides once, unless the inner one sees another
// route or key, or something between them hides the ResponseWriter (no Unwrap, as in http.TimeoutHandler).
//
// The ResponseWriter of the handler is an http.Flusher, http.Hijacker or http.Pusher if that of the server is. It is
// always an io.ReaderFrom, and has what http.ResponseController needs.
package throttlerhttp

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/go-throttler/throttler"
)

// Options configures New. The zero value limits each address by the buckets that the Throttler has.
type Options struct {
	// Key names the client that a request counts for. Nil means Address(nil).
	Key Key

	// Buckets limit the requests. If there are none, the buckets that the Throttler has for the key do.
	//
	// The storage finds what is spent by key and bucket name. Two middlewares on Throttlers of one Name and storage
	// therefore share buckets of one name, such as two of 5 per 10 s. Routes, or Named, keep them apart. Buckets and
	// Tiers together have at most 16 different ones, by name, kind and period, because one client may use all of them.
	Buckets []throttler.Bucket

	// Tier names the set of Tiers that limits a request instead of Buckets; an empty name means Buckets. Give the
	// buckets of different tiers the same names (Bucket.Named): a client that changes tiers then keeps what it has
	// spent.
	Tier  func(*http.Request) string
	Tiers map[string][]throttler.Bucket

	// Routes are requests with limits of their own. A request belongs to the route that http.ServeMux would choose, both
	// for its path as written and for the clean path without escapes: "//login", "/./login" and "/%6Cogin" are "/login".
	Routes []Route

	// IgnoreCase and IgnoreSlash are for routers behind the middleware that serve "/LOGIN", or "/login/", as
	// "/login": these requests then belong to one route. Set them as that router is set, since it chooses the
	// handler. A ServeMux has neither.
	IgnoreCase, IgnoreSlash bool

	// Cost returns the cost of a request in tokens, 0 or more. Nil means the Throttler's Config.Cost.
	Cost func(*http.Request) int64

	// Decide, if not nil, decides instead of the Throttler. It is for limits of several identifiers, or for limits that
	// are looked up for each request. Key, Buckets, Tiers, Cost and Routes with Buckets are then ignored. RefundIf gives
	// back to the Throttler, so Decide must have asked the same one. Fields tell what was left before that,
	// since only Decide knows which buckets to look at afterwards.
	Decide func(*http.Request) (throttler.Verdict, error)

	// RefundIf, if not nil, is called with the status of the answer, and the cost is refunded if it returns true. To
	// limit failed logins only, refund those below 400. The tokens stay taken until the handler writes a status or a
	// body. The refund comes before anything is sent, and Fields tell what is left after it, except with Decide.
	//
	// The status is the one that the handler writes. It is 500 if the handler panics before the refund, 499 if it
	// writes nothing and the client has gone, and 101 if it hijacks the connection. Frameworks that write the status
	// after the middleware has returned do not work with RefundIf.
	RefundIf func(status int) bool

	// Fields are the header fields that tell clients about their limits. 0 means Draft10.
	Fields Fields

	// Refuse answers a request instead of the handler. Nil means Problem. Retry-After, Fields and "Cache-Control:
	// no-store" are set before it is called, and fields that describe another body, such as Content-Length, are removed.
	Refuse func(http.ResponseWriter, *http.Request, Refusal)

	// Took, if not nil, is called for each admitted request with the time that the handler took to begin its answer,
	// except for requests of Free routes. It must be quick and safe for concurrent use. Took of a load.Latency fits: it
	// makes a signal for limits that follow the load.
	Took func(time.Duration)

	// OnError, if not nil, is called with the reason of each answer that is neither the handler's nor a 429, before
	// Refuse writes it: ErrNoKey, a tier that Tiers does not have, a path of two routes, a cost above a capacity, a
	// failure of the storage. It must be safe for concurrent use. Observe of the Throttler gets these too, and it alone
	// gets a failure that Config.OnStorageError allowed.
	//
	// A client that leaves before the storage has answered is not an error: neither OnError nor Refuse is called, no body
	// is written, and the status, which only logs see, is 499. A deadline of the server is an error, and answered 503.
	OnError func(*http.Request, error)
}

// Route is some of the requests, and the limits that they have.
type Route struct {
	// Pattern is a pattern of http.ServeMux: "/api/", "POST /login", "/users/{id}". If several match a request the most
	// specific one wins, as in a ServeMux. New returns an error for a pattern of another router, such as "/api/*",
	// "/users/:id" or "post /login": a ServeMux accepts it, but would match other paths. The error says how to write
	// it. In a path a literal * is %2A, and a literal : is %3A.
	//
	// "OPTIONS /" and "HEAD /" of a Free route are for all requests of the method, whatever other patterns match
	// them, unless one has the same method. A ServeMux would reject "OPTIONS /" beside "/api/" as a conflict.
	Pattern string

	// Name is part of the names of the route's buckets, which clients see in the header fields, and of the buckets'
	// identifier (RouteIdentifier). The default is Pattern. Routes of one Name share what is spent; together they have
	// at most 16 different buckets.
	Name string

	// Buckets limit the requests instead of Options.Buckets and Options.Tiers. If Adds is set, they limit them in
	// addition, in one decision. If there are none, those of Options apply. Buckets of a less specific route never do.
	Buckets []throttler.Bucket
	Adds    bool

	// Free means that the requests are not limited.
	Free bool

	Key      Key                       // nil means that of Options
	Cost     func(*http.Request) int64 // nil means that of Options
	RefundIf func(status int) bool     // nil means that of Options

	Refuse func(http.ResponseWriter, *http.Request, Refusal) // nil means that of Options
}

// ErrNoKey is the error of a request for which the Key returned "".
var ErrNoKey = errors.New("throttlerhttp: the Key of the middleware knows nobody whom the request counts for")

// New returns middleware that asks the Throttler before each request. Nil options mean the zero value. The error joins all
// faults of the options. The middleware is safe for concurrent use. It may be put around several handlers, which then
// share the limits.
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
	routes map[string]*limit // by pattern
	plain  map[plain]*limit  // those of routes that are found without the mux
	spared map[string]*limit // by method: Free routes "OPTIONS /" and "HEAD /", which are for all paths
}

// limit is what applies to some of the requests. It is immutable, apart from the cache in policies.
type limit struct {
	m        *middleware
	free     bool
	method   string // of the pattern, "" if it is for all methods
	key      Key
	cost     func(*http.Request) int64
	refundIf func(int) bool
	refuse   func(http.ResponseWriter, *http.Request, Refusal)
	set      []throttler.Option            // Using of the buckets; empty for those of the Throttler
	tiers    map[string][]throttler.Option // by tier, instead of set; nil if the tier does not matter
	added    []throttler.Option            // Using of the buckets of a route that Adds, otherwise nil
	route    string                        // in the identifier of the route's own buckets; "" if it has none
	policies policies
}

// serve is the flow of a request.
func (m *middleware) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	l := m.of(r)
	if l == nil {
		m.tell(r, m.unasked(r, "", errPath))
		m.Refuse(w, r, Refusal{Status: http.StatusBadRequest, Err: errPath})
		return
	}
	if l.free || l.asked(w, r) {
		next.ServeHTTP(w, r)
		return
	}
	v, id, err := l.ask(r)
	switch {
	case err == nil && v.Allowed:
		l.admit(w, r, next, &v, id)
	case gone(r, err):
		w.WriteHeader(statusClientClosed)
	default:
		m.tell(r, err)
		l.answer(w, r, v, err)
	}
}

// admit lets the handler serve the request, behind a recorder.
func (l *limit) admit(w http.ResponseWriter, r *http.Request, next http.Handler, v *throttler.Verdict, id string) {
	rec := &recorder{ResponseWriter: w, l: l, r: r, id: id}
	if l.m.Took != nil {
		rec.admitted = time.Now()
	}
	if levels := v.Levels(); len(levels) > 0 {
		rec.said.say(l, w, v, levels)
	}
	if l.refundIf != nil { // only then does the verdict have to be copied to the heap
		taken := *v
		rec.v = &taken
	}
	defer rec.end()
	next.ServeHTTP(rec.as(), r)
	rec.returned = true
}

// gone reports whether the client went away before the storage answered.
func gone(r *http.Request, err error) bool {
	return err != nil && status(err) == http.StatusServiceUnavailable && errors.Is(r.Context().Err(), context.Canceled)
}

func (m *middleware) tell(r *http.Request, err error) {
	if err != nil && m.OnError != nil {
		m.OnError(r, err)
	}
}

// unasked reports a request to Observe that the Throttler is not asked about. It returns err.
func (m *middleware) unasked(r *http.Request, id string, err error) error {
	m.t.Report(r.Context(), id, err)
	return err
}

// ask lets the Throttler, or Options.Decide, decide. It returns the identifier of the first part too, which a verdict lacks
// if nothing limits that part.
func (l *limit) ask(r *http.Request) (v throttler.Verdict, id string, err error) {
	if l.m.Decide != nil {
		v, err = l.m.Decide(r)
		return v, "", err
	}
	key := l.key(r)
	if key == "" {
		return v, "", l.m.unasked(r, "", fmt.Errorf("%w: its address is %.64q", ErrNoKey, r.RemoteAddr))
	}
	id = l.identifier(key)
	set, added := l.set, l.added
	if l.tiers != nil {
		if set, err = l.tier(r); err != nil {
			return v, id, l.m.unasked(r, id, err)
		}
	}
	if l.cost != nil {
		cost := throttler.Cost(l.cost(r))
		set, added = with(set, cost), with(added, cost)
	}
	if l.added != nil {
		v, err = l.m.t.ConsumeAll(r.Context(), throttler.For(id, set...), throttler.For(RouteIdentifier(key, l.route), added...))
	} else {
		v, err = l.m.t.ConsumeContext(r.Context(), id, set...)
	}
	return v, id, err
}

// look returns what the buckets of v hold now, by a Peek that costs nothing. It is zero for a verdict of Options.Decide.
func (l *limit) look(r *http.Request, v *throttler.Verdict) (throttler.Verdict, error) {
	ctx, set := context.WithoutCancel(r.Context()), l.set
	if l.m.Decide != nil {
		return throttler.Verdict{}, nil
	}
	if l.tiers != nil {
		set, _ = l.tier(r) // no error, since the tier was found for v
	}
	set = with(set, throttler.Cost(0))
	if l.added != nil {
		key := l.key(r) // not from v: it lacks a part whose buckets are all Unlimited
		return l.m.t.PeekAll(ctx, throttler.For(l.identifier(key), set...), throttler.For(RouteIdentifier(key, l.route), with(l.added, throttler.Cost(0))...))
	}
	return l.m.t.Peek(ctx, v.Levels()[0].Identifier, set...)
}

// with returns a copy of the options with one more. The options themselves are shared by all requests.
func with(options []throttler.Option, o throttler.Option) []throttler.Option {
	return append(slices.Clip(options), o)
}

// identifier returns the identifier of the first part of a decision for a key, which mostly is the only part.
func (l *limit) identifier(key string) string {
	if l.added != nil {
		return RouteIdentifier(key, "")
	}
	return RouteIdentifier(key, l.route)
}

// tier returns the options of the request's tier.
func (l *limit) tier(r *http.Request) ([]throttler.Option, error) {
	tier := l.m.Tier(r)
	set, known := l.tiers[tier]
	if !known && tier != "" {
		return set, fmt.Errorf("throttlerhttp: Options.Tier returned %q, which is none of Options.Tiers", tier)
	}
	return set, nil
}
