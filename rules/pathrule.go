// Rules that have a path and descriptors instead of when, per and limits:
//
//	rules:
//	  - path: /login
//	    descriptors:
//	      - {key: user, unit: minute, requests_per_unit: 5}
//	      - {key: plan, value: free, unit: hour, requests_per_unit: 100}
//
// Each descriptor becomes a rule of its own for requests to the path. With a value it limits the requests that have this
// value; without one it limits each value of the key separately.

package rules

import (
	"go.yaml.in/yaml/v4"

	"github.com/go-throttler/throttler"
)

func (f *nativeFile) pathRule(n *yaml.Node) {
	path, name, list := (*yaml.Node)(nil), "", []*yaml.Node(nil)
	has := f.mapping(n, "a rule with descriptors", []field{
		{"name", func(n *yaml.Node) { name = f.name(n) }},
		{"path", func(n *yaml.Node) { path = n }},
		{"descriptors", func(n *yaml.Node) { f.list(n, "descriptors", func(n *yaml.Node) { list = append(list, n) }) }},
	})
	if has["path"] == nil {
		f.fault(n, "", "a rule with descriptors has no path")
		return
	}
	text, _ := f.text(path, "path")
	if name == "" {
		name = text
	}
	for _, n := range list {
		f.pathDescriptor(n, name, path)
	}
}

func (f *nativeFile) pathDescriptor(n *yaml.Node, name string, path *yaml.Node) {
	var key, value, unit string
	var requests int64
	at := n
	has := f.mapping(n, "a descriptor", []field{
		{"key", func(n *yaml.Node) { key, _ = f.text(n, "key") }},
		{"value", func(n *yaml.Node) { value = f.optional(n, "value") }},
		{"unit", func(n *yaml.Node) { unit, at = f.optional(n, "unit"), n }},
		{"requests_per_unit", func(n *yaml.Node) { requests = f.integer(n, "requests_per_unit", 0, maxRequests) }},
	})
	if has == nil {
		return
	}
	if key == "" {
		f.fault(n, "", "the descriptor has no key")
	}
	period, _ := f.unit(at, unit)
	r := &Rule{Name: name + " " + key, domain: f.domain, cost: cost{factor: 1}, order: len(f.domain.rules)}
	f.condition(r, "path", path)
	if value == "" {
		r.per = []string{key}
		r.conditions = append(r.conditions, condition{key: key})
	} else {
		c := condition{key: key, exact: map[string]bool{}}
		f.value(&c, n, value)
		r.conditions = append(r.conditions, c)
		r.Name += "=" + value
	}
	r.ID, r.prefix = r.Name, nativePrefix(f.domain.name, r.Name)
	r.Limits = []throttler.Bucket{throttler.NewBucket(period, requests).FixedWindow()}
	f.add(f.reader, n, r)
	f.domain.rules = append(f.domain.rules, r)
}
