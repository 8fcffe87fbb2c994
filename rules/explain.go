// Explanations for people: why rules apply to a request, or do not.

package rules

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Explanation says whether a rule applies.
type Explanation struct {
	Rule    *Rule
	Applies bool
	Why     string // why it does not apply; "" if it does
}

// Explain says for each rule of a domain whether it applies to a descriptor, and if not, why.
func (s *Set) Explain(domain string, entries []Entry) (all []Explanation) {
	d := s.domain(domain)
	if d == nil {
		return nil
	}
	matched := d.match(nil, entries)
	for _, r := range s.rules {
		if r.domain != d {
			continue
		}
		x := Explanation{Rule: r}
		switch by := slices.IndexFunc(matched, r.isReplacedBy); {
		case !slices.Contains(matched, r) && r.path != nil:
			x.Why = d.tree.lost(entries)
		case !slices.Contains(matched, r):
			x.Why = r.unmet(entries)
		case by >= 0:
			x.Why = fmt.Sprintf("the rule %q replaces it", matched[by].ID)
		default:
			x.Applies = true
		}
		all = append(all, x)
	}
	return all
}

// unmet describes the first condition that does not hold.
func (r *Rule) unmet(entries []Entry) string {
	for i := range r.conditions {
		c := &r.conditions[i]
		if c.holds(entries) {
			continue
		}
		j := slices.IndexFunc(entries, func(e Entry) bool { return e.Key == c.key })
		if j < 0 {
			return fmt.Sprintf("there is no entry %q", c.key)
		}
		return fmt.Sprintf("the entry %q is %q, must be %s", c.key, entries[j].Value, c)
	}
	return ""
}

// String describes what the condition asks for.
func (c *condition) String() string {
	words := slices.Sorted(maps.Keys(c.exact))
	for _, p := range c.patterns {
		words = append(words, p.String())
	}
	for _, n := range c.networks {
		words = append(words, n.String())
	}
	return strings.Join(words, " or ")
}

// lost says where the entries leave the tree of a file of envoyproxy/ratelimit.
func (n *node) lost(entries []Entry) string {
	for _, e := range entries {
		k := n.keys[e.Key]
		if k == nil {
			return fmt.Sprintf("the entries lead to no descriptor: there is none of key %q here", e.Key)
		}
		if n = k.next(e.Value); n == nil {
			return fmt.Sprintf("the entries lead to no descriptor: there is none of key %q and value %q here", e.Key, e.Value)
		}
	}
	return "the entries, all and in their order, lead elsewhere"
}

// Reset clears what all rules that apply to the request have counted for its entries. It tries all of them and joins the
// errors.
func (e *Engine) Reset(ctx context.Context, r Request) error {
	p := plan{engine: e}
	if err := p.make(e.set.Load(), &r); err != nil {
		return err
	}
	var faults []error
	for i := range p.parts {
		faults = append(faults, e.t.Reset(ctx, p.parts[i].id))
	}
	return errors.Join(faults...)
}
