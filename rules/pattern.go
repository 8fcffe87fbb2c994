// Patterns of values, in which * stands for anything, and finding those of many that match.

package rules

import (
	"slices"
	"strings"
)

// pattern is what stands between the stars: a*b has the pieces a and b.
type pattern []string

func newPattern(s string) pattern { return strings.Split(s, "*") }

// exact reports whether the pattern has no star.
func (p pattern) exact() bool { return len(p) == 1 }

// match reports whether the pattern is the whole value. Each piece is taken where it comes first, so that it takes no
// longer than to look for all pieces once.
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

// patterns finds those of many patterns that match a value, by a tree of their first pieces: it looks only at patterns
// that begin as the value does.
type patterns struct {
	all  []pattern
	root prefix
}

// prefix is a node of the tree: the label that leads to it, and what begins with all labels down to here.
type prefix struct {
	label    string
	patterns []int32   // that have no more in their first piece
	next     []*prefix // whose labels begin with different bytes, sorted
}

// add returns the index of the new pattern.
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

// String is the pattern as it was written.
func (p pattern) String() string { return strings.Join(p, "*") }
