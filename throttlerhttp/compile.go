// Making the limits from the Options, once, and naming the faults of the Options.

package throttlerhttp

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/law"
)

// compile makes the limits, so that nothing is left to do for a request but to choose.
func (m *middleware) compile() error {
	var faults []error
	if m.t == nil {
		faults = append(faults, errors.New("throttlerhttp: the Throttler is nil"))
	}
	if m.Tier == nil && len(m.Tiers) > 0 {
		faults = append(faults, errors.New("throttlerhttp: Options.Tiers needs a Tier that chooses one"))
	}
	probe, err := throttler.New(throttler.Config{})
	c := &compiler{middleware: m, probe: probe, owners: map[string]different{}}
	faults = append(faults, err, c.unrouted())
	if len(m.Routes) > 0 {
		m.mux, m.routes, m.spared = http.NewServeMux(), map[string]*limit{}, map[string]*limit{}
	}
	for i := range m.Routes {
		r := &m.Routes[i]
		if err := c.route(r); err != nil {
			faults = append(faults, fmt.Errorf("throttlerhttp: Options.Routes[%d] %q: %w", i, r.Pattern, err))
		}
	}
	m.plain = plainRoutes(m.routes)
	return errors.Join(append(faults, c.tooMany())...)
}

// compiler makes the limits of a middleware.
type compiler struct {
	*middleware

	probe  *throttler.Throttler // tells the rules of buckets
	owners map[string]different // by how a fault calls those who share an identifier
}

// different are the buckets that one identifier may come to have: each is its name, kind and period.
type different map[state]bool

type state struct {
	name   string
	kind   string
	period time.Duration
}

// using is the Option of buckets of an owner, or what is wrong with them.
func (c *compiler) using(owner string, buckets []throttler.Bucket) ([]throttler.Option, error) {
	set := throttler.Using(buckets...)
	if _, err := c.probe.Peek(context.Background(), "anybody", set, throttler.Cost(0)); err != nil {
		return nil, err
	}
	if c.owners[owner] == nil {
		c.owners[owner] = different{}
	}
	for _, b := range buckets {
		c.owners[owner][state{b.Name(), b.Kind(), b.Period()}] = true
	}
	return []throttler.Option{set}, nil
}

// tooMany are the faults of owners that have too many buckets for one identifier.
func (c *compiler) tooMany() error {
	var faults []error
	for _, owner := range slices.Sorted(maps.Keys(c.owners)) {
		if n := len(c.owners[owner]); n > law.MaxBuckets {
			faults = append(faults, fmt.Errorf("throttlerhttp: %s have %d different buckets, by name, kind and period, must be at most %d", owner, n, law.MaxBuckets))
		}
	}
	return errors.Join(faults...)
}

// unrouted makes the limit of the requests that no route matches.
func (c *compiler) unrouted() error {
	var faults []error
	sets := map[string][]throttler.Option{}
	tiers := map[string][]throttler.Bucket{"": c.Buckets}
	maps.Copy(tiers, c.Tiers)
	for tier, buckets := range tiers {
		where := fmt.Sprintf("Options.Tiers[%q]", tier)
		if tier == "" {
			where = "Options.Buckets"
		}
		if _, named := c.Tiers[tier]; named && len(buckets) == 0 {
			faults = append(faults, fmt.Errorf("throttlerhttp: %s has no buckets", where))
		}
		if len(buckets) == 0 {
			continue
		}
		set, err := c.using("Options.Buckets and Options.Tiers", buckets)
		if err != nil {
			faults = append(faults, fmt.Errorf("throttlerhttp: %s: %w", where, err))
		}
		sets[tier] = set
	}
	c.others = &limit{m: c.middleware, key: c.Key, cost: c.Cost, refundIf: c.RefundIf, refuse: c.Refuse, set: sets[""]}
	if c.Tier != nil {
		c.others.tiers = sets
	}
	return errors.Join(faults...)
}

// route makes the limit of a route.
func (c *compiler) route(r *Route) error {
	others := c.others
	l := &limit{m: others.m, key: others.key, cost: others.cost, refundIf: others.refundIf, refuse: others.refuse, set: others.set, tiers: others.tiers}
	if err := l.override(r); err != nil {
		return err
	}
	if len(r.Buckets) > 0 {
		if err := c.own(l, r); err != nil {
			return err
		}
	}
	return c.register(r.Pattern, l)
}

// own gives the limit the buckets of its route.
func (c *compiler) own(l *limit, r *Route) error {
	if r.Adds && len(c.Buckets) == 0 {
		return errors.New("its Adds needs Options.Buckets to add to; those of the Throttler it does not know")
	}
	buckets := r.scoped()
	l.route = r.name()
	own, err := c.using(fmt.Sprintf("the Routes of the Name %q", l.route), buckets)
	if err != nil {
		return err
	}
	if !r.Adds {
		l.set, l.tiers = own, nil
		return nil
	}
	l.added = own
	for _, set := range append(slices.Collect(maps.Values(c.Tiers)), c.Buckets) { // in one answer, each needs a name
		for _, b := range set {
			if slices.ContainsFunc(buckets, func(own throttler.Bucket) bool { return own.Name() == b.Name() }) {
				return fmt.Errorf("it Adds a bucket %q to one of this name", b.Name())
			}
		}
	}
	return nil
}

// override sets what the route has in place of the Options, apart from buckets.
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
		out[i] = b.Named(r.name() + " " + b.Name())
	}
	return out
}

// register gives the limit to the requests that match the pattern.
func (m *middleware) register(pattern string, l *limit) (err error) {
	if right, hint := usualPattern(pattern); right != pattern {
		return fmt.Errorf("it would not match what it seems to: a pattern of http.ServeMux is written %q%s", right, hint)
	}
	if m.IgnoreCase {
		pattern = lowerPath(pattern)
	}
	method, path := splitPattern(pattern)
	l.method = method
	if l.free && path == "/" && (method == http.MethodOptions || method == http.MethodHead) {
		if m.spared[method] != nil {
			return errors.New("there is another Route for it")
		}
		m.spared[method] = l
		return nil
	}
	defer func() { // a ServeMux panics for what is no pattern, or conflicts with another
		if fault := recover(); fault != nil {
			err = fmt.Errorf("%v", fault)
		}
	}()
	m.mux.Handle(pattern, http.NotFoundHandler())
	m.routes[pattern] = l
	return nil
}

// plain is a pattern of a method and a literal path. No other pattern matches such a request better, so a map finds the
// route that the ServeMux would, without allocating.
type plain struct{ method, path string }

// plainRoutes are the routes with such patterns. If any pattern has a host there are none: it would match better.
func plainRoutes(routes map[string]*limit) map[plain]*limit {
	found := map[plain]*limit{}
	for pattern, l := range routes {
		method, path := splitPattern(pattern)
		if !strings.HasPrefix(path, "/") {
			return nil
		}
		if method != "" && method != http.MethodConnect && !strings.HasSuffix(path, "/") && !strings.ContainsAny(path, "{%") {
			found[plain{method, path}] = l
		}
	}
	return found
}

// name is what the route is called in identifiers and names of buckets.
func (r *Route) name() string { return cmp.Or(r.Name, strings.ReplaceAll(r.Pattern, "\t", " ")) }
