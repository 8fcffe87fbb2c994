package law

import (
	"encoding/binary"
	"runtime"
	"slices"
	"sync"
	"weak"
)

// RuleSet is the rules of an identifier's buckets, compiled once. It never changes. Equal sets are one pointer, so that
// whoever compares or caches by it never falls off a fast path when rules are made again.
type RuleSet struct {
	Rules []Rule // of different names; read only
	Least int64  // the smallest capacity: a cost up to it is valid for all

	like *RuleSet // of a set that is Shrunk: the full one, if both have the same laws
}

// interned is the sets in use, by key.
var interned struct {
	sync.Mutex
	sets map[string]weak.Pointer[RuleSet]
}

// NewRuleSet returns the set of these rules. It keeps a copy of the slice.
func NewRuleSet(rules ...Rule) *RuleSet { return intern(rules, nil) }

func intern(rules []Rule, like *RuleSet) *RuleSet {
	key := keyOf(rules)
	interned.Lock()
	defer interned.Unlock()
	if s := interned.sets[key].Value(); s != nil {
		return s
	}
	s := &RuleSet{Rules: slices.Clone(rules), like: like}
	for i := range rules {
		if i == 0 || rules[i].Capacity < s.Least {
			s.Least = rules[i].Capacity
		}
	}
	if interned.sets == nil {
		interned.sets = make(map[string]weak.Pointer[RuleSet])
	}
	interned.sets[key] = weak.Make(s)
	runtime.AddCleanup(s, forget, key)
	return s
}

// forget drops a set that nobody uses, unless the same rules have been made again.
func forget(key string) {
	interned.Lock()
	defer interned.Unlock()
	if interned.sets[key].Value() == nil {
		delete(interned.sets, key)
	}
}

// keyOf is equal for equal rules.
func keyOf(rules []Rule) string {
	var key []byte
	for i := range rules {
		r := &rules[i]
		key = append(binary.AppendUvarint(key, uint64(len(r.Name))), r.Name...)
		for _, n := range [...]int64{int64(r.Kind), r.Period, r.Refill, r.Tick, r.One, r.Drain, r.Grain, r.Capacity, r.Full, r.Window} {
			key = binary.AppendVarint(key, n)
		}
	}
	return string(key)
}

// Find is the index of the bucket of this name, or -1.
func (s *RuleSet) Find(name string) int {
	return slices.IndexFunc(s.Rules, func(r Rule) bool { return r.Name == name })
}
