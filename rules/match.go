// How the rules of native files are matched. An index finds each rule by one of its conditions, and then the rule's other
// conditions are checked.

package rules

import (
	"net/netip"
	"slices"
)

// condition asks that at least one entry of its key has a value that fits. Without any values, any entry of the key fits.
type condition struct {
	key      string
	exact    map[string]bool
	patterns []pattern
	networks []netip.Prefix
}

func (c *condition) anyValue() bool {
	return len(c.exact) == 0 && len(c.patterns) == 0 && len(c.networks) == 0
}

func (c *condition) holds(entries []Entry) bool {
	for i := range entries {
		if e := &entries[i]; e.Key == c.key && c.fits(e.Value) {
			return true
		}
	}
	return false
}

func (c *condition) fits(value string) bool {
	if c.anyValue() || c.exact[value] {
		return true
	}
	for _, p := range c.patterns {
		if p.match(value) {
			return true
		}
	}
	if len(c.networks) > 0 {
		a, err := netip.ParseAddr(value)
		a = a.Unmap().WithZone("")
		return err == nil && slices.ContainsFunc(c.networks, func(n netip.Prefix) bool { return n.Contains(a) })
	}
	return false
}

// matcher finds rules by their conditions.
type matcher struct {
	keys   map[string]*keyIndex
	always []*Rule // rules without conditions
}

// keyIndex holds the rules that are found by the entries of one key.
type keyIndex struct {
	exact     map[string][]*Rule
	patterns  patterns
	ofPattern [][]*Rule // by the index of the pattern
	indexes   map[string]int
	networks  map[netip.Prefix][]*Rule
	bits      []int // the different lengths of the networks
	anyValue  []*Rule
}

// newMatcher indexes each rule by the condition that it shares with the fewest other rules, so that a request looks at
// few rules in vain.
func newMatcher(rules []*Rule) matcher {
	m := matcher{keys: map[string]*keyIndex{}}
	shared := map[Entry]int{}
	for _, r := range rules {
		for i := range r.conditions {
			r.conditions[i].share(shared, 1)
		}
	}
	for _, r := range rules {
		if len(r.conditions) == 0 {
			m.always = append(m.always, r)
			continue
		}
		m.add(r, shared)
	}
	return m
}

// add indexes the rule by its best condition.
func (m *matcher) add(r *Rule, shared map[Entry]int) {
	best := 0
	for i := range r.conditions {
		if r.conditions[i].share(shared, 0) < r.conditions[best].share(shared, 0) {
			best = i
		}
	}
	for i := range r.conditions {
		if i != best {
			r.rest = append(r.rest, &r.conditions[i])
		}
	}
	m.index(r.conditions[best].key).add(r, &r.conditions[best])
}

// share adds n to the number of rules that ask for each value of the condition, and returns the largest such number. A
// pattern counts as its first piece, because the index finds it by that.
func (c *condition) share(shared map[Entry]int, n int) (most int) {
	count := func(value string) {
		e := Entry{c.key, value}
		shared[e] += n
		most = max(most, shared[e])
	}
	for value := range c.exact {
		count(value)
	}
	for _, p := range c.patterns {
		count(p[0] + "*")
	}
	for _, n := range c.networks {
		count(n.String())
	}
	if c.anyValue() {
		count("*")
	}
	return most
}

func (m *matcher) index(key string) *keyIndex {
	if m.keys[key] == nil {
		m.keys[key] = &keyIndex{exact: map[string][]*Rule{}, indexes: map[string]int{}, networks: map[netip.Prefix][]*Rule{}}
	}
	return m.keys[key]
}

func (k *keyIndex) add(r *Rule, c *condition) {
	for value := range c.exact {
		k.exact[value] = append(k.exact[value], r)
	}
	for _, p := range c.patterns {
		k.addPattern(r, p)
	}
	for _, n := range c.networks {
		if !slices.Contains(k.bits, n.Bits()) {
			k.bits = append(k.bits, n.Bits())
		}
		k.networks[n] = append(k.networks[n], r)
	}
	if c.anyValue() {
		k.anyValue = append(k.anyValue, r)
	}
}

func (k *keyIndex) addPattern(r *Rule, p pattern) {
	text := p.String()
	i, known := k.indexes[text]
	if !known {
		i = k.patterns.add(p)
		k.indexes[text] = i
		k.ofPattern = append(k.ofPattern, nil)
	}
	k.ofPattern[i] = append(k.ofPattern[i], r)
}

// match appends the rules whose conditions all hold, in the order of the file.
func (m *matcher) match(dst []*Rule, entries []Entry) []*Rule {
	n := len(dst)
	dst = append(dst, m.always...)
	for i := range entries {
		if k := m.keys[entries[i].Key]; k != nil {
			dst = k.match(dst, entries[i].Value, entries)
		}
	}
	found := dst[n:]
	slices.SortFunc(found, func(a, b *Rule) int { return a.order - b.order })
	return dst[:n+len(slices.Compact(found))] // a rule is found twice if several values fit
}

func (k *keyIndex) match(dst []*Rule, value string, entries []Entry) []*Rule {
	dst = appendHolding(dst, k.anyValue, entries)
	dst = appendHolding(dst, k.exact[value], entries)
	if len(k.ofPattern) > 0 {
		var buf [32]int32
		for _, i := range k.patterns.match(buf[:0], value) {
			dst = appendHolding(dst, k.ofPattern[i], entries)
		}
	}
	if len(k.bits) > 0 {
		dst = k.matchNetworks(dst, value, entries)
	}
	return dst
}

func (k *keyIndex) matchNetworks(dst []*Rule, value string, entries []Entry) []*Rule {
	a, err := netip.ParseAddr(value)
	if err != nil {
		return dst
	}
	a = a.Unmap().WithZone("")
	for _, bits := range k.bits {
		if n, err := a.Prefix(bits); err == nil { // fails if the address is shorter than bits
			dst = appendHolding(dst, k.networks[n], entries)
		}
	}
	return dst
}

// appendHolding appends those of the rules whose remaining conditions hold.
func appendHolding(dst, rules []*Rule, entries []Entry) []*Rule {
	for _, r := range rules {
		if r.holds(entries) {
			dst = append(dst, r)
		}
	}
	return dst
}

// holds reports whether all conditions hold other than the one by which the rule was found.
func (r *Rule) holds(entries []Entry) bool {
	for _, c := range r.rest {
		if !c.holds(entries) {
			return false
		}
	}
	return true
}
