// Compiling the Options into limits, once, and reporting their faults.

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

// compile makes all limits in advance, so that a request only has to choose one.
func (m *middleware) compile() error {
	var faults []error
	if m.t == nil {
		faults = append(faults, errors.New("throttlerhttp: the Throttler is nil"))
	}
	if m.Tier == nil && len(m.Tiers) > 0 {
		faults = append(faults, errors.New("throttlerhttp: Options.Tiers needs a Tier that chooses one"))
	}
	if m.Tier != nil && len(m.Tiers) == 0 && m.Decide == nil {
		faults = append(faults, errors.New("throttlerhttp: Options.Tier needs Tiers from which it chooses"))
	}
	if f := m.Fields; f >= NoFields<<1 || f&NoFields != 0 && f != NoFields {
		faults = append(faults, fmt.Errorf("throttlerhttp: Options.Fields is %d, must be any of Draft10, XSeconds and XUnix joined by |, or NoFields alone", f))
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

// compiler holds what is needed only while the limits of a middleware are made.
type compiler struct {
	*middleware

	probe  *throttler.Throttler // checks buckets
	owners map[string]different // buckets that share an identifier, by what a fault calls their owner
}

// different is the set of buckets that one identifier may come to have.
type different map[state]bool

// state is what tells buckets apart in a storage.
type state struct {
	name   string
	kind   string
	period time.Duration
}

// using returns the Option for an owner's buckets, or the faults of the buckets.
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

// tooMany returns a fault for each owner with more buckets than one identifier may have.
func (c *compiler) tooMany() error {
	var faults []error
	for _, owner := range slices.Sorted(maps.Keys(c.owners)) {
		if n := len(c.owners[owner]); n > law.MaxBuckets {
			faults = append(faults, fmt.Errorf("throttlerhttp: %s have %d different buckets, by name, kind and period, must be at most %d", owner, n, law.MaxBuckets))
		}
	}
	return errors.Join(faults...)
}

// unrouted makes the limit of requests that no route matches.
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
		switch _, isTier := c.Tiers[tier]; {
		case isTier && tier == "":
			faults = append(faults, errors.New(`throttlerhttp: Options.Tiers[""] needs a name, since an empty one means Options.Buckets`))
		case isTier && len(buckets) == 0:
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
	for _, set := range append(slices.Collect(maps.Values(c.Tiers)), c.Buckets) { // names in one answer must differ
		for _, b := range set {
			if slices.ContainsFunc(buckets, func(own throttler.Bucket) bool { return own.Name() == b.Name() }) {
				return fmt.Errorf("it Adds a bucket %q to one of this name", b.Name())
			}
		}
	}
	return nil
}

// override sets what the route has instead of the Options, apart from buckets.
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
	case r.Free && (r.Key != nil || r.Cost != nil || r.RefundIf != nil):
		return errors.New("it is Free, so its Key, Cost or RefundIf would never be asked")
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

// register maps the pattern to the limit.
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
	defer func() { // Handle panics on an invalid pattern, and on one that conflicts with another
		if fault := recover(); fault != nil {
			err = fmt.Errorf("%v", fault)
		}
	}()
	m.mux.Handle(pattern, http.NotFoundHandler())
	m.routes[pattern] = l
	return nil
}

// plain is a pattern of a method and a literal path. No other pattern matches its requests better, so a map finds the
// route that the ServeMux would find, without allocating.
type plain struct{ method, path string }

// plainRoutes returns the routes with such patterns. If any pattern has a host it returns none, since a pattern with a host
// would win.
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

// name returns the route's name in identifiers and in names of buckets.
func (r *Route) name() string { return cmp.Or(r.Name, strings.ReplaceAll(r.Pattern, "\t", " ")) }
