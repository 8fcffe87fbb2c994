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
// The middleware is a func(http.Handler) http.Handler. Around a single handler it needs no Routes. Of two that
// are around each other each decides for itself, so that what the outer one took stays taken when the inner one
// refuses; let one middleware know both limits instead. The very same middleware twice around a handler asks once,
// unless another of its routes, or another key, is inside.
//
// The ResponseWriter of the handler has those of http.Flusher, http.Hijacker, http.Pusher and io.ReaderFrom that the
// server's has, and what http.ResponseController needs.
package throttlerhttp

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"path"
	"slices"
	"strings"

	"github.com/go-throttler/throttler"
)

// Options of New. The zero value limits each address by the buckets that the Throttler has.
type Options struct {
	// Key names whom a request counts for. Nil is Address(nil).
	Key Key

	// Buckets limit the requests. None: those that the Throttler has for the key.
	//
	// What is spent is found by key and bucket name: two middlewares on Throttlers of one Name and storage share
	// buckets of one name, such as two of 5 per 10 s. Use Routes, or Named, to keep them apart.
	Buckets []throttler.Bucket

	// Tier names the set of Tiers that limits a request in place of Buckets; empty is Buckets. Give the buckets
	// of different tiers the same names (Bucket.Named), so that who changes tiers keeps what was spent.
	Tier  func(*http.Request) string
	Tiers map[string][]throttler.Bucket

	// Routes have limits of their own.
	Routes []Route

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
}

// Route has the limits of some of the requests.
type Route struct {
	// Pattern is one of http.ServeMux: "/api/", "POST /login", "/users/{id}". Of several that match a request
	// the most specific counts, as there.
	Pattern string

	// Name stands before the names of the route's buckets, so that they are not those of another route. By
	// default it is Pattern. Clients see it in the fields. Routes of one Name share what is spent.
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
}

// limit is what applies to some of the requests.
type limit struct {
	free     bool
	key      Key
	cost     func(*http.Request) int64
	refundIf func(int) bool
	refuse   func(http.ResponseWriter, *http.Request, Refusal)
	sets     map[string]throttler.Option // by tiers; the Throttler's buckets if there is none for ""
	policies policies
}

// compile makes the limits, so that nothing is left to do for a request but to choose.
func (m *middleware) compile() error {
	var faults []error
	if m.t == nil {
		faults = append(faults, errors.New("throttlerhttp: the Throttler is nil"))
	}
	if m.Tier == nil && len(m.Tiers) > 0 {
		faults = append(faults, errors.New("throttlerhttp: Options.Tiers needs a Tier that chooses one"))
	}
	for tier, set := range m.Tiers {
		if len(set) == 0 {
			faults = append(faults, fmt.Errorf("throttlerhttp: Options.Tiers[%q] has no buckets", tier))
		}
	}
	var err error
	if m.others, err = m.limit("Options", nil); err != nil {
		faults = append(faults, err)
	}
	if len(m.Routes) > 0 {
		m.mux, m.routes = http.NewServeMux(), map[string]*limit{}
	}
	for i := range m.Routes {
		r := &m.Routes[i]
		where := fmt.Sprintf("Options.Routes[%d] %q", i, r.Pattern)
		l, err := m.limit(where, r)
		if err == nil {
			err = m.register(where, r.Pattern)
		}
		if err != nil {
			faults = append(faults, err)
		}
		m.routes[r.Pattern] = l
	}
	m.plain = plainRoutes(m.routes)
	return errors.Join(faults...)
}

// register adds a pattern to the mux, which panics if it is no pattern or there are two of it.
func (m *middleware) register(where, pattern string) (err error) {
	defer func() {
		if fault := recover(); fault != nil {
			err = fmt.Errorf("throttlerhttp: %s: %v", where, fault)
		}
	}()
	m.mux.Handle(pattern, http.NotFoundHandler())
	return nil
}

// limit makes that of a route, or of the requests without one, for which r is nil.
func (m *middleware) limit(where string, r *Route) (*limit, error) {
	l := &limit{key: m.Key, cost: m.Cost, refundIf: m.RefundIf, refuse: m.Refuse, sets: map[string]throttler.Option{}}
	if r != nil {
		if err := l.override(r); err != nil {
			return l, fmt.Errorf("throttlerhttp: %s: %w", where, err)
		}
	}
	tiers := map[string][]throttler.Bucket{"": m.Buckets}
	maps.Copy(tiers, m.Tiers)
	if r != nil && r.Adds && len(tiers[""]) == 0 {
		return l, fmt.Errorf("throttlerhttp: %s: Adds needs Options.Buckets to add to; those of the Throttler it does not know", where)
	}
	for tier, set := range tiers {
		if r != nil && len(r.Buckets) > 0 {
			if !r.Adds {
				set = nil
			}
			set = slices.Concat(set, r.scoped())
		}
		if len(set) == 0 {
			continue
		}
		if _, err := throttler.New(throttler.Config{Buckets: set}); err != nil {
			return l, fmt.Errorf("throttlerhttp: %s: %w", where, err)
		}
		l.sets[tier] = throttler.Using(set...)
	}
	return l, nil
}

// override sets what the route has of its own, apart from buckets.
func (l *limit) override(r *Route) error {
	l.free = r.Free
	if r.Key != nil {
		l.key = r.Key
	}
	if r.Cost != nil {
		l.cost = r.Cost
	}
	if r.RefundIf != nil {
		l.refundIf = r.RefundIf
	}
	if r.Refuse != nil {
		l.refuse = r.Refuse
	}
	switch {
	case r.Free && (len(r.Buckets) > 0 || r.Adds):
		return errors.New("it is Free and has Buckets")
	case r.Adds && len(r.Buckets) == 0:
		return errors.New("it has no Buckets that Adds could add")
	}
	for _, b := range r.scoped() {
		if len(b.Name()) > 64 {
			return fmt.Errorf("the name of a bucket would be %q, %d bytes of at most 64: give the Route a shorter Name", b.Name(), len(b.Name()))
		}
	}
	return nil
}

// scoped returns the buckets with the route in their names.
func (r *Route) scoped() []throttler.Bucket {
	out := make([]throttler.Bucket, len(r.Buckets))
	for i, b := range r.Buckets {
		out[i] = b.Named(cmp.Or(r.Name, r.Pattern) + " " + b.Name())
	}
	return out
}

// serve is the flow of a request.
func (m *middleware) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	l := m.of(r)
	if l == nil {
		m.Refuse(w, r, Refusal{Status: http.StatusBadRequest, Err: errPath})
		return
	}
	if l.free || l.asked(w, r) {
		next.ServeHTTP(w, r)
		return
	}
	v, err := m.ask(r, l)
	if err != nil || !v.Allowed {
		l.answer(w, r, m.Fields, v, err)
		return
	}
	rec := &recorder{ResponseWriter: w, m: m, l: l, r: r}
	if v.Parts() > 0 {
		rec.id = v.Part(0).Identifier
		rec.said.say(m.Fields, w.Header(), l.policies.of(&v, v.Part(0).Rules), v.Levels())
	}
	if l.refundIf != nil {
		taken := v
		rec.v = &taken
	}
	defer rec.end()
	next.ServeHTTP(rec.as(), r)
	rec.returned = true
}

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
	l, usual := m.match(r), usualForm(r)
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

func (m *middleware) match(r *http.Request) *limit {
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

// plain is a route's pattern that is only a method and a literal path. No other pattern can match such a request better,
// so a map answers it as the ServeMux would, without allocating.
type plain struct{ method, path string }

// plainRoutes finds those routes. With hosts in any pattern there are none, as one with a host matches better.
func plainRoutes(routes map[string]*limit) map[plain]*limit {
	found := map[plain]*limit{}
	for pattern, l := range routes {
		method, path := "", pattern
		if i := strings.IndexAny(pattern, " \t"); i >= 0 {
			method, path = pattern[:i], strings.TrimLeft(pattern[i:], " \t")
		}
		if !strings.HasPrefix(path, "/") {
			return nil
		}
		if method != "" && method != http.MethodConnect && !strings.HasSuffix(path, "/") && !strings.ContainsAny(path, "{%") {
			found[plain{method, path}] = l
		}
	}
	return found
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

func (m *middleware) ask(r *http.Request, l *limit) (v throttler.Verdict, err error) {
	key := l.key(r)
	if key == "" {
		return v, ErrNoKey
	}
	var few [2]throttler.Option
	options := few[:0]
	tier := ""
	if m.Tier != nil {
		tier = m.Tier(r)
	}
	if set, ok := l.sets[tier]; ok {
		options = append(options, set)
	} else if tier != "" {
		return v, fmt.Errorf("throttlerhttp: Options.Tier returned %q, which is none of Options.Tiers", tier)
	}
	if l.cost != nil {
		options = append(options, throttler.Cost(l.cost(r)))
	}
	if v, err = m.t.ConsumeContext(r.Context(), key, options...); errors.Is(err, throttler.ErrCostExceedsCapacity) {
		v, _ = m.t.Peek(r.Context(), key, append(options, throttler.Cost(0))...) // for the fields
		v.Allowed = false
	}
	return v, err
}
