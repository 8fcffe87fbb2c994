// From files to a Set.

package rules

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/nearest"
)

// Parse compiles the rules of one file. The error is of type Faults and lists all that is wrong with it.
func Parse(name string, data []byte) (*Set, error) { return Compile(File{name, data}) }

// Compile makes one Set from files, in their order. Files may share a domain; a name is unique within its domain. The
// error is of type Faults and lists all that is wrong with any of the files. An empty file is a fault, because a file
// looks like that while it is being written.
func Compile(files ...File) (*Set, error) {
	c := &compiler{set: &Set{domains: map[string]*domain{}, etag: etag(files)}}
	for _, f := range files {
		c.file(f)
	}
	c.resolve()
	if len(c.faults) > 0 {
		return nil, c.faults.sorted()
	}
	for _, d := range c.set.domains {
		d.matcher = newMatcher(d.rules)
	}
	return c.set, nil
}

func etag(files []File) string {
	h := sha256.New()
	for _, f := range files {
		for _, part := range [][]byte{[]byte(f.Name), f.Data} {
			h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(part))))
			h.Write(part)
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

type compiler struct {
	set    *Set
	faults Faults
	names  []named // names in replaces of native files, which must exist
}

// named is a name in the file that must be a rule of the domain.
type named struct {
	rule *Rule
	name string
	node *yaml.Node
}

func (c *compiler) file(f File) {
	r := &reader{file: f.Name, nodes: maxNodes + 10*len(f.Data)}
	roots := r.documents(f)
	if len(roots) == 0 && len(r.faults) == 0 {
		r.fault(&yaml.Node{}, "", "has no rules: it is empty")
	}
	for _, root := range roots {
		if hasKey(root, "descriptors") && !hasKey(root, "rules") {
			(&envoyFile{reader: r, compiler: c}).read(root)
		} else {
			(&nativeFile{reader: r, compiler: c}).read(root)
		}
	}
	c.faults = append(c.faults, r.faults...)
}

func hasKey(n *yaml.Node, key string) bool {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Kind == yaml.MappingNode
		}
	}
	return false
}

const maxDomain = 255 // bytes of its name

// domain returns the domain of this name, and makes it if there is none.
func (c *compiler) domain(r *reader, n *yaml.Node, name string) *domain {
	if name == "" || len(name) > maxDomain {
		r.fault(n, "", "the domain has %d bytes, must have 1 to %d", len(name), maxDomain)
	}
	if c.set.domains[name] == nil {
		c.set.domains[name] = &domain{name: name, names: map[string]*Rule{}}
	}
	return c.set.domains[name]
}

// add makes a rule part of its domain.
func (c *compiler) add(r *reader, n *yaml.Node, rule *Rule) {
	d := rule.domain
	rule.Domain, rule.File, rule.Line, rule.Column = d.name, r.file, n.Line, n.Column
	if other := d.names[rule.Name]; other != nil && rule.Name != "" {
		r.fault(n, "", "the name %q is that of a rule in %s:%d, must be unique in the domain %q", rule.Name, other.File, other.Line, d.name)
	}
	d.names[rule.Name] = rule
	c.bind(r, n, rule)
	c.set.rules = append(c.set.rules, rule)
}

// bind names the buckets of the rule. A storage finds what was spent by these names, so they must stay the same when a
// limit changes.
func (c *compiler) bind(r *reader, n *yaml.Node, rule *Rule) {
	scope, names := rule.Name, map[string]bool{}
	if rule.path != nil {
		scope = "" // the entries identify what was spent, as in envoyproxy/ratelimit
	}
	for i := range rule.Limits {
		b := limitNamed(scope, rule.Limits[i])
		switch {
		case names[b.Name()] && isNamed(rule.Limits[i]):
			r.fault(n, "", "two limits are named %q, must have different names", b.Name())
		case names[b.Name()]:
			r.fault(n, "", "two limits have one period and kind: keep the smaller one, or tell them apart by \"named\" (they are called %q)", b.Name())
		}
		names[b.Name()] = true
		rule.Limits[i] = b
	}
	if len(rule.Limits) > maxLimits {
		r.fault(n, "", "a rule has %d limits, must have at most %d", len(rule.Limits), maxLimits)
	}
	rule.using = throttler.Using(rule.Limits...)
}

const maxLimits = 16 // how many buckets an identifier may have

// limitNamed names a bucket that has no name "rule/period/kind", which does not change with its capacity. It omits
// "rule/" if rule is empty, not printable or too long.
func limitNamed(rule string, b throttler.Bucket) throttler.Bucket {
	if b.Unlimited() || isNamed(b) {
		return b
	}
	_, name, _ := strings.Cut(b.Name(), "/")
	if rule != "" && isPrintable(rule) && len(rule)+1+len(name) <= maxBucketName {
		name = rule + "/" + name
	}
	return b.Named(name)
}

const maxBucketName = 64

func isPrintable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

func isNamed(b throttler.Bucket) bool { return strings.Contains(b.String(), " named ") }

// resolve checks the names that native rules replace. It runs after all files are read, when all names are known.
func (c *compiler) resolve() {
	near := map[*domain]*nearestName{}
	for _, n := range c.names {
		d := n.rule.domain
		if d.names[n.name] == nil && n.name != everything {
			if near[d] == nil {
				near[d] = &nearestName{names: slices.Sorted(maps.Keys(d.names))}
			}
			c.faults = append(c.faults, &Fault{n.rule.File, n.node.Line, n.node.Column, fmt.Sprintf("replaces %q, which is no rule of the domain %q", n.name, d.name), near[d].to(n.name)})
		}
	}
}

// nearestName finds the name that was probably meant by one that does not exist.
type nearestName struct {
	names    []string
	found    map[string]string
	compared int // how many names have been compared
}

// maxCompared is how many names are compared for the faults of a domain or a patch. Beyond it, faults name no nearest
// word, since to compare each wrong name with all others takes quadratic time.
const maxCompared = 100_000

func (n *nearestName) to(given string) string {
	word, known := n.found[given]
	if !known && n.compared < maxCompared {
		n.compared += len(n.names)
		word = nearest.Word(given, n.names)
		if n.found == nil {
			n.found = map[string]string{}
		}
		n.found[given] = word
	}
	return word
}
