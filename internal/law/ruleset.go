package law

import (
	"encoding/binary"
	"runtime"
	"slices"
	"sync"
	"weak"
)

// RuleSet is the rules of an identifier's buckets, made once by NewRuleSet or Shrunk. It never changes and is safe for
// concurrent use. Equal sets are one pointer. So a storage may compare sets and cache by pointer, and stays on its fast
// path when the same rules are made again, as on a reload.
type RuleSet struct {
	Rules []Rule // of different names; read only
	Least int64  // the smallest capacity: a cost up to it is valid for all rules

	like *RuleSet // the set that a Shrunk one was made from, if both have the same laws; else nil
}

// interned has the sets that are in use, by key. The pointers are weak, so that limits which only one request brought
// do not stay in memory for ever.
var interned struct {
	sync.Mutex
	sets map[string]weak.Pointer[RuleSet]
}

// NewRuleSet returns the set of these rules. It copies the slice.
func NewRuleSet(rules ...Rule) *RuleSet { return intern(rules, nil) }

// intern returns the one set of these rules, and makes it if there is none.
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

// forget drops the entry of a set that nobody uses any more. It runs some time after the set was collected, and
// meanwhile the same rules may have been made again: then the entry is that of the new set and stays.
func forget(key string) {
	interned.Lock()
	defer interned.Unlock()
	if interned.sets[key].Value() == nil {
		delete(interned.sets, key)
	}
}

// keyOf returns a key that is equal for equal rules only: names are preceded by their lengths.
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

// Find returns the index of the rule with this name, or -1.
func (s *RuleSet) Find(name string) int {
	return slices.IndexFunc(s.Rules, func(r Rule) bool { return r.Name == name })
}
