// Patterns of values, in which * stands for any text, and an index that finds the matching ones among many.

package rules

import (
	"slices"
	"strings"
)

// pattern is the pieces between the stars: a*b has the pieces a and b.
type pattern []string

func newPattern(s string) pattern { return strings.Split(s, "*") }

// exact reports whether the pattern has no star.
func (p pattern) exact() bool { return len(p) == 1 }

// match reports whether the pattern matches the whole value. It takes each piece at its first occurrence, which leaves
// the most text for the pieces after it. So it never needs to go back, and searches for each piece only once.
func (p pattern) match(value string) bool {
	if p.exact() {
		return value == p[0]
	}
	value, ok := strings.CutPrefix(value, p[0])
	if !ok {
		return false
	}
	last := len(p) - 1
	if value, ok = strings.CutSuffix(value, p[last]); !ok {
		return false
	}
	for _, piece := range p[1:last] {
		i := strings.Index(value, piece)
		if i < 0 {
			return false
		}
		value = value[i+len(piece):]
	}
	return true
}

// patterns finds the patterns that match a value. It is a tree of their first pieces, and so tries only patterns that
// begin as the value does.
type patterns struct {
	all  []pattern
	root prefix
}

// prefix is a node of the tree. Its label leads to it from its parent; the labels from the root down to it are the prefix
// of everything below.
type prefix struct {
	label    string
	patterns []int32   // indexes of patterns whose first piece ends here
	next     []*prefix // children, sorted; no two labels begin with the same byte
}

// add adds a pattern and returns its index.
func (p *patterns) add(new pattern) int {
	n := len(p.all)
	p.all = append(p.all, new)
	p.root.add(new[0], int32(n))
	return n
}

func (n *prefix) add(rest string, index int32) {
	if rest == "" {
		n.patterns = append(n.patterns, index)
		return
	}
	i, found := n.find(rest[0])
	if !found {
		n.next = slices.Insert(n.next, i, &prefix{label: rest, patterns: []int32{index}})
		return
	}
	child := n.next[i]
	common := 0
	for common < min(len(rest), len(child.label)) && rest[common] == child.label[common] {
		common++
	}
	// The new piece leaves the label halfway, or ends there: split the label.
	if common < len(child.label) {
		n.next[i] = &prefix{label: rest[:common], next: []*prefix{child}}
		child.label = child.label[common:]
	}
	n.next[i].add(rest[common:], index)
}

func (n *prefix) find(first byte) (int, bool) {
	return slices.BinarySearchFunc(n.next, first, func(p *prefix, b byte) int { return int(p.label[0]) - int(b) })
}

// match appends the indexes of the patterns that match.
func (p *patterns) match(dst []int32, value string) []int32 {
	n, rest := &p.root, value
	for {
		for _, i := range n.patterns {
			if p.all[i].match(value) {
				dst = append(dst, i)
			}
		}
		if rest == "" {
			return dst
		}
		i, found := n.find(rest[0])
		if !found || !strings.HasPrefix(rest, n.next[i].label) {
			return dst
		}
		n = n.next[i]
		rest = rest[len(n.label):]
	}
}

// String returns the pattern as it was written.
func (p pattern) String() string { return strings.Join(p, "*") }
