// Files of rules in this package's own words.

package rules

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/nearest"
)

// nativeFile reads one document.
type nativeFile struct {
	*reader
	*compiler

	domain    *domain
	addresses map[string]bool // keys whose values are addresses
}

func (f *nativeFile) read(root *yaml.Node) {
	name, at, list := DefaultDomain, root, []*yaml.Node(nil)
	has := f.mapping(root, "a file", []field{
		{"domain", func(n *yaml.Node) { name, at = f.domainName(n), n }},
		{"addresses", func(n *yaml.Node) { _, f.addresses = f.keys(n, "addresses") }},
		{"rules", func(n *yaml.Node) { f.list(n, "rules", func(n *yaml.Node) { list = append(list, n) }) }},
		{"$schema", func(*yaml.Node) {}}, // for editors
	})
	if has != nil && has["rules"] == nil {
		f.fault(root, "", "the file has no \"rules\", nor \"descriptors\" as a file of envoyproxy/ratelimit has")
	}
	f.domain = f.compiler.domain(f.reader, at, name)
	for _, n := range list {
		f.rule(n)
	}
}

// keys reads a list of keys of entries, and returns it as a set too.
func (f *nativeFile) keys(n *yaml.Node, what string) (keys []string, set map[string]bool) {
	set = map[string]bool{}
	f.listOrOne(n, what, func(n *yaml.Node) {
		key, ok := f.text(n, "a key of "+what)
		if ok && key == "" {
			f.fault(n, "", "a key of %s is empty", what)
		}
		if set[key] {
			f.fault(n, "", "%s has %q twice", what, key)
		}
		keys, set[key] = append(keys, key), true
	})
	return keys, set
}

// rule reads a rule. It adds even a faulty rule to the domain, so that rules which replace it do not get a second fault.
func (f *nativeFile) rule(n *yaml.Node) {
	r := &Rule{domain: f.domain, cost: cost{factor: 1}, order: len(f.domain.rules)}
	var replaces []*yaml.Node
	has := f.mapping(n, "a rule", []field{
		{"name", func(n *yaml.Node) { r.Name = f.name(n) }},
		{"when", func(n *yaml.Node) { f.when(r, n) }},
		{"per", func(n *yaml.Node) { r.per, _ = f.keys(n, "per") }},
		{"limits", func(n *yaml.Node) { f.limits(r, n) }},
		{"unlimited", func(n *yaml.Node) { r.Unlimited = f.boolean(n, "unlimited") }},
		{"replaces", func(n *yaml.Node) { f.listOrOne(n, "replaces", func(n *yaml.Node) { replaces = append(replaces, n) }) }},
		{"cost", func(n *yaml.Node) { r.cost = f.cost(n) }},
		{"shadow", func(n *yaml.Node) { r.Shadow = f.boolean(n, "shadow") }},
		{"mode", func(n *yaml.Node) { r.Charge = f.mode(n) }},
		{"metadata", func(n *yaml.Node) { r.Metadata = f.metadata(n) }},
		{"path", func(*yaml.Node) {}},
		{"descriptors", func(*yaml.Node) {}},
	})
	if has == nil {
		return
	}
	if has["descriptors"] != nil {
		f.pathRule(n)
		return
	}
	if has["path"] != nil {
		f.fault(has["path"], "when", "\"path\" alone is no word of a rule")
	}
	if has["name"] == nil {
		f.fault(n, "", "the rule has no name")
	}
	f.complete(r, n, has)
	for _, n := range replaces {
		f.replaces(r, n)
	}
	conditions := map[string]bool{}
	for i := range r.conditions {
		conditions[r.conditions[i].key] = true
	}
	for _, key := range r.per {
		if !conditions[key] {
			r.conditions = append(r.conditions, condition{key: key})
		}
	}
	r.ID, r.prefix = r.Name, nativePrefix(f.domain.name, r.Name)
	f.add(f.reader, n, r)
	f.domain.rules = append(f.domain.rules, r)
}

const maxRuleName = 40 // leaves room for the period in the names of limits

func (f *nativeFile) name(n *yaml.Node) string {
	name, ok := f.text(n, "name")
	if ok && (name == "" || len(name) > maxRuleName || !isPrintable(name) || name == everything) {
		f.fault(n, "", "name is %.64q, must be 1 to %d printable ASCII characters, and not %q", name, maxRuleName, everything)
	}
	return name
}

// complete checks which words of a rule go together.
func (f *nativeFile) complete(r *Rule, n *yaml.Node, has map[string]*yaml.Node) {
	switch {
	case r.Unlimited && has["limits"] != nil:
		f.fault(has["limits"], "", "the rule is unlimited, and has limits")
	case !r.Unlimited && has["limits"] == nil:
		f.fault(n, "", "the rule has no limits, and is not unlimited")
	}
	if r.Shadow && has["replaces"] != nil {
		f.fault(has["replaces"], "", "a shadow rule changes nothing, so it cannot replace rules")
	}
}

func (f *nativeFile) when(r *Rule, n *yaml.Node) {
	pairs, _ := f.pairs(n, "when")
	for _, p := range pairs {
		f.condition(r, p.key.Value, p.value)
	}
}

// condition reads the values that an entry of the key may have.
func (f *nativeFile) condition(r *Rule, key string, n *yaml.Node) {
	c := condition{key: key, exact: map[string]bool{}}
	anything, values := false, 0
	f.listOrOne(n, fmt.Sprintf("%q of when", key), func(n *yaml.Node) {
		value, ok := f.text(n, fmt.Sprintf("a value of %q", key))
		if values++; ok && value == "*" {
			anything = true
		} else if ok {
			f.value(&c, n, value)
		}
	})
	if values == 0 {
		f.fault(n, "", "%q of when has no values, so that the rule would match nothing; \"*\" is anything", key)
	}
	if anything {
		c = condition{key: key}
	}
	r.conditions = append(r.conditions, c)
}

// value adds a value to a condition.
func (f *nativeFile) value(c *condition, n *yaml.Node, value string) {
	if f.addresses[c.key] {
		network, err := parseNetwork(value)
		if err != nil {
			f.fault(n, "", "%q is none of the addresses that %q has, must be one such as 192.0.2.1, or a network such as 192.0.2.0/24", value, c.key)
		}
		c.networks = append(c.networks, network)
		return
	}
	if p := newPattern(value); !p.exact() {
		c.patterns = append(c.patterns, p)
		return
	}
	c.exact[value] = true
}

func parseNetwork(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		a = a.Unmap().WithZone("")
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err == nil && p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), err
}

func (f *nativeFile) limits(r *Rule, n *yaml.Node) {
	if n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
		f.fault(n, "", "limits is an empty list: a rule without limits has \"unlimited: true\"")
	}
	f.listOrOne(n, "limits", func(n *yaml.Node) { f.limit(r, n) })
}

func (f *nativeFile) limit(r *Rule, n *yaml.Node) {
	words, ok := f.text(n, "a limit")
	if !ok {
		return
	}
	if b, ok := f.bucket(n, words); ok {
		r.Limits = append(r.Limits, b)
	}
	if last := len(r.Limits) - 1; last >= 0 && r.Limits[last].Unlimited() {
		f.fault(n, "", "a limit is unlimited: a rule without limits has \"unlimited: true\"")
	}
}

// bucket reads the words of a bucket.
func (r *reader) bucket(n *yaml.Node, words string) (throttler.Bucket, bool) {
	b, err := throttler.ParseBucket(words)
	if err == nil {
		return b, true
	}
	r.bucketFaults(n, err)
	return b, false
}

// bucketFaults adds all faults of a bucket.
func (r *reader) bucketFaults(n *yaml.Node, err error) {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			r.bucketFaults(n, e)
		}
		return
	}
	var fault *throttler.BucketError
	if !errors.As(err, &fault) {
		r.fault(n, "", "%v", err)
		return
	}
	reason, meant, _ := strings.Cut(fault.Reason, ": did you mean ")
	r.fault(n, strings.Trim(meant, `"?`), "%s of limit %q %s", strings.ToLower(fault.Field), n.Value, reason)
}

func (f *nativeFile) replaces(r *Rule, n *yaml.Node) {
	name, ok := f.text(n, "a name of replaces")
	if !ok {
		return
	}
	if name == r.Name {
		f.fault(n, "", "the rule replaces itself")
	}
	r.replaces = append(r.replaces, name)
	f.names = append(f.names, named{r, name, n})
}

// cost reads a factor, or the key of an entry whose value is the cost. Any other number is a fault, as is a truth value:
// as a key it would be an entry that no request has, so that the rule would ask the cost of the request.
func (f *nativeFile) cost(n *yaml.Node) cost {
	n = f.resolved(n)
	switch factor, err := strconv.ParseInt(strings.ReplaceAll(n.Value, "_", ""), 0, 64); {
	case n.ShortTag() == "!!int" && err == nil && factor >= 0:
		return cost{factor: factor}
	case n.ShortTag() != "!!str" || n.Value == "":
		f.fault(n, "", "cost is %s, must be a whole number from 0 to %d, or the key of an entry", described(n), int64(maxCost))
	}
	return cost{factor: 1, key: n.Value}
}

// mode reports whether the rule is a Charge rule.
func (r *reader) mode(n *yaml.Node) bool {
	words := []string{"consume", "charge"}
	text, ok := r.text(n, "mode")
	if ok && !slices.Contains(words, text) {
		r.fault(n, nearest.Word(text, words), "mode is %.64q, must be consume or charge", text)
	}
	return text == "charge"
}

func (r *reader) metadata(n *yaml.Node) (m map[string]any) {
	if n = r.resolved(n); n.Kind != yaml.MappingNode {
		r.fault(n, "", "metadata is %s, must be a mapping", described(n))
		return nil
	}
	faults := len(r.faults)
	if r.copied(n); len(r.faults) > faults || r.nodes < 0 {
		return nil
	}
	if err := n.Load(&m); err != nil {
		r.fault(n, "", "metadata cannot be read: %v", err)
	}
	return m
}
