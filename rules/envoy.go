// Files of envoyproxy/ratelimit.

package rules

import (
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/nearest"
)

// node is one level of descriptors.
type node struct {
	rule *Rule // for requests whose entries end here, or nil
	keys map[string]*nodeKey
}

// nodeKey holds the children of a node for entries of one key. An exact value wins over a pattern, and a pattern wins
// over "any value". If several patterns match, the first in the file wins.
type nodeKey struct {
	exact    map[string]*node
	patterns patterns
	matching []*node         // by the index of the pattern
	known    map[string]bool // the patterns as they are written
	anyValue *node
}

// find returns the rule where the path of all entries ends, or nil.
func (n *node) find(entries []Entry) *Rule {
	if n == nil || len(entries) == 0 {
		return nil
	}
	for i := range entries {
		k := n.keys[entries[i].Key]
		if k == nil {
			return nil
		}
		if n = k.next(entries[i].Value); n == nil {
			return nil
		}
	}
	return n.rule
}

func (k *nodeKey) next(value string) *node {
	if n := k.exact[value]; n != nil {
		return n
	}
	if len(k.matching) > 0 {
		var buf [32]int32
		if found := k.patterns.match(buf[:0], value); len(found) > 0 {
			return k.matching[slices.Min(found)]
		}
	}
	return k.anyValue
}

// path says how the entries of a rule form its identifier. An element is "" if the value of the entry counts. With
// share_threshold it is the pattern instead, so that all matching values share one count.
type path []string

func (p path) appendTo(b []byte, entries []Entry) []byte {
	for i := range entries {
		if i < len(p) && p[i] != "" {
			b = appendValue(b, entries[i].Key+"*", p[i])
		} else {
			b = appendValue(b, entries[i].Key, entries[i].Value)
		}
	}
	return b
}

// envoyFile reads one document.
type envoyFile struct {
	*reader
	*compiler

	domain *domain
}

func (f *envoyFile) read(root *yaml.Node) {
	name, at, list := "", root, []*yaml.Node(nil)
	f.mapping(root, "a file of envoyproxy/ratelimit", []field{
		{"domain", func(n *yaml.Node) { name, at = f.domainName(n), n }},
		{"descriptors", func(n *yaml.Node) { list = f.children(n) }},
		{"$schema", func(*yaml.Node) {}}, // for editors
	})
	f.domain = f.compiler.domain(f.reader, at, name)
	if f.domain.tree == nil {
		f.domain.tree = &node{}
	}
	for _, n := range list {
		f.descriptor(f.domain.tree, n, "", nil)
	}
}

// children returns the elements of a list that may be null.
func (f *envoyFile) children(n *yaml.Node) (list []*yaml.Node) {
	if n = f.resolved(n); n.ShortTag() != "!!null" {
		f.list(n, "descriptors", func(n *yaml.Node) { list = append(list, n) })
	}
	return list
}

// descriptor reads a descriptor below the node parent. id and above are the ID and the path of its ancestors.
func (f *envoyFile) descriptor(parent *node, n *yaml.Node, id string, above path) {
	defer f.up()
	if !f.deeper(n) {
		return
	}
	var (
		r        = &Rule{domain: f.domain, cost: cost{factor: 1}}
		key, val string
		limits   []*yaml.Node
		list     []*yaml.Node
		share    bool
		shareAt  *yaml.Node
		keyAt    = n
	)
	has := f.mapping(n, "a descriptor", []field{
		{"key", func(n *yaml.Node) { key, _ = f.text(n, "key"); keyAt = n }},
		{"value", func(n *yaml.Node) { val = f.optional(n, "value") }},
		{"rate_limit", func(n *yaml.Node) { limits = append(limits, n) }},
		{"rate_limits", func(n *yaml.Node) { f.list(n, "rate_limits", func(n *yaml.Node) { limits = append(limits, n) }) }},
		{"descriptors", func(n *yaml.Node) { list = f.children(n) }},
		{"shadow_mode", func(n *yaml.Node) { r.Shadow = f.boolean(n, "shadow_mode") }},
		{"quota_mode", func(n *yaml.Node) { r.Quota = f.boolean(n, "quota_mode") }},
		{"detailed_metric", func(n *yaml.Node) { r.DetailedMetric = f.boolean(n, "detailed_metric") }},
		{"value_to_metric", func(n *yaml.Node) { r.ValueToMetric = f.boolean(n, "value_to_metric") }},
		{"share_threshold", func(n *yaml.Node) { share, shareAt = f.boolean(n, "share_threshold"), n }},
		{"metadata", func(n *yaml.Node) { r.Metadata = f.metadata(n) }},
		{"mode", func(n *yaml.Node) { r.Charge = f.mode(n) }},
	})
	if has == nil {
		return
	}
	if key == "" {
		f.fault(keyAt, "", "the descriptor has no key")
	}
	if share && !strings.Contains(val, "*") {
		f.fault(shareAt, "", "share_threshold is for values with a *, this one is %q", val)
	}
	// Clip forces a copy, because the siblings append to the same path.
	here := append(slices.Clip(above), "")
	if share {
		here[len(above)] = val
	}
	r.ID = id + key
	if val != "" {
		r.ID += "_" + val
	}
	child := f.child(parent, keyAt, key, val)
	if f.limits(r, limits) {
		r.path, r.prefix = here, envoyPrefix(f.domain.name)
		f.add(f.reader, n, r)
		child.rule = r
	}
	for _, n := range list {
		f.descriptor(child, n, r.ID+".", here)
	}
}

// optional reads text that may be null.
func (r *reader) optional(n *yaml.Node, what string) string {
	if n = r.resolved(n); n.ShortTag() == "!!null" {
		return ""
	}
	text, _ := r.text(n, what)
	return text
}

// child makes the node for a key and value below parent. It is a fault if there is one already, since only the second
// would be found.
func (f *envoyFile) child(parent *node, n *yaml.Node, key, val string) *node {
	if parent.keys == nil {
		parent.keys = map[string]*nodeKey{}
	}
	k := parent.keys[key]
	if k == nil {
		k = &nodeKey{exact: map[string]*node{}, known: map[string]bool{}}
		parent.keys[key] = k
	}
	child, p := &node{}, newPattern(val)
	switch {
	case val == "" && k.anyValue == nil:
		k.anyValue = child
	case val != "" && p.exact() && k.exact[val] == nil:
		k.exact[val] = child
	case !p.exact() && !k.known[val]:
		k.known[val] = true
		k.patterns.add(p)
		k.matching = append(k.matching, child)
	default:
		f.fault(n, "", "the descriptor of key %q and value %q stands twice on this level", key, val)
	}
	return child
}

// limits reads the limits of a descriptor and reports whether there is any.
func (f *envoyFile) limits(r *Rule, nodes []*yaml.Node) bool {
	some := false
	for _, n := range nodes {
		switch n = f.resolved(n); {
		case n.ShortTag() == "!!null":
		case n.Kind == yaml.ScalarNode:
			some = true
			if b, ok := f.bucket(n, n.Value); ok && b.Unlimited() {
				r.Unlimited = true
			} else if ok {
				r.Limits = append(r.Limits, b)
			}
		default:
			some = true
			f.limit(r, n)
		}
	}
	if r.Unlimited && len(r.Limits) > 0 {
		f.fault(nodes[0], "", "the descriptor is unlimited, and has limits")
	}
	return some
}

// envoyLimit is a rate_limit as written in the file.
type envoyLimit struct {
	unit, algorithm, name string
	requests, burst       int64
	unlimited             bool
}

func (f *envoyFile) limit(r *Rule, n *yaml.Node) {
	var l envoyLimit
	var unitAt, algorithmAt = n, n
	has := f.mapping(n, "a rate_limit", []field{
		{"requests_per_unit", func(n *yaml.Node) { l.requests = f.integer(n, "requests_per_unit", 0, maxRequests) }},
		{"unit", func(n *yaml.Node) { l.unit, unitAt = f.optional(n, "unit"), n }},
		{"unlimited", func(n *yaml.Node) { l.unlimited = f.boolean(n, "unlimited") }},
		{"name", func(n *yaml.Node) { l.name = f.optional(n, "name") }},
		{"replaces", func(n *yaml.Node) { f.list(n, "replaces", func(n *yaml.Node) { f.replaces(r, n) }) }},
		{"algorithm", func(n *yaml.Node) { l.algorithm, algorithmAt = f.optional(n, "algorithm"), n }},
		{"burst", func(n *yaml.Node) { l.burst = f.integer(n, "burst", 1, maxRequests) }},
	})
	if has == nil {
		return
	}
	if r.Name == "" {
		r.Name = l.name
	}
	if slices.Contains(r.replaces, l.name) && l.name != "" {
		f.fault(n, "", "the rate_limit replaces itself")
	}
	if l.unlimited {
		if _, known := envoyUnits[strings.ToLower(l.unit)]; known {
			f.fault(unitAt, "", "an unlimited rate_limit has a unit")
		}
		r.Unlimited = true
		return
	}
	period, ok := f.unit(unitAt, l.unit)
	kind, known := f.algorithm(algorithmAt, l.algorithm, l.burst)
	if ok && known {
		f.bucketOf(r, n, kind(throttler.NewBucket(period, l.requests)), l.burst)
	}
}

func (f *envoyFile) bucketOf(r *Rule, n *yaml.Node, b throttler.Bucket, burst int64) {
	if burst > 0 {
		b = b.Burst(burst)
	}
	if _, err := throttler.ParseBucket(b.String()); err != nil {
		f.bucketFaults(n, err)
		return
	}
	r.Limits = append(r.Limits, b)
}

// replaces reads {name: other}. In these files a name that no rule has is not a fault.
func (f *envoyFile) replaces(r *Rule, n *yaml.Node) {
	name := ""
	f.mapping(n, "an element of replaces", []field{{"name", func(n *yaml.Node) { name, _ = f.text(n, "name") }}})
	if name == "" {
		f.fault(n, "", "an element of replaces has no name")
	}
	r.replaces = append(r.replaces, name)
}

const maxRequests = 1<<51 - 1 // per unit

const day = 24 * time.Hour

var envoyUnits = map[string]time.Duration{
	"second": time.Second, "minute": time.Minute, "hour": time.Hour, "day": day, "week": 7 * day, "month": 30 * day, "year": 365 * day,
}

// unit returns the period of a unit.
func (r *reader) unit(n *yaml.Node, given string) (time.Duration, bool) {
	period, known := envoyUnits[strings.ToLower(given)]
	if !known {
		words := []string{"second", "minute", "hour", "day", "week", "month", "year"}
		r.fault(n, nearest.Word(given, words), "unit is %q, must be %s", given, strings.Join(words, ", "))
	}
	return period, known
}

var algorithms = map[string]func(throttler.Bucket) throttler.Bucket{
	"fixed":      throttler.Bucket.FixedWindow,
	"continuous": throttler.Bucket.Continuous,
	"sliding":    throttler.Bucket.SlidingWindow,
	"log":        throttler.Bucket.SlidingLog,
	"replenish":  func(b throttler.Bucket) throttler.Bucket { return b },
}

// algorithm returns the function that sets the kind of a bucket. The default is a fixed window, or continuous if the
// limit has a burst.
func (f *envoyFile) algorithm(n *yaml.Node, given string, burst int64) (func(throttler.Bucket) throttler.Bucket, bool) {
	if given == "" && burst > 0 {
		given = "continuous"
	}
	if given == "" {
		given = "fixed"
	}
	kind, known := algorithms[strings.ToLower(given)]
	if !known {
		words := []string{"fixed", "continuous", "sliding", "log", "replenish"}
		f.fault(n, nearest.Word(given, words), "algorithm is %q, must be %s", given, strings.Join(words, ", "))
	}
	return kind, known
}
