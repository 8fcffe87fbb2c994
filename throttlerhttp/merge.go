package throttlerhttp

import (
	"net/http"
	"slices"

	"github.com/dunglas/httpsfv"
)

// join makes one list of the limits in an answer and those of s, in place of what s has said before.
func (s *said) join(h http.Header, before string) {
	limits, policies, won := list(h["Ratelimit"]...), list(h["Ratelimit-Policy"]...), httpsfv.List(nil)
	for _, old := range list(before) {
		if i := slices.IndexFunc(limits, func(m httpsfv.Member) bool { return sameLimit(m, old) }); i >= 0 {
			limits = slices.Delete(limits, i, i+1)
		}
	}
	limits, _ = fold(nil, limits)
	limits, won = fold(limits, list(s.draft[1]))
	policies = replace(nil, policies)
	own := list(s.draft[0])
	policies = replace(policies, slices.DeleteFunc(own, func(m httpsfv.Member) bool { return find(policies, m) >= 0 && find(won, m) < 0 }))
	policy, err := httpsfv.Marshal(policies)
	limit, err2 := httpsfv.Marshal(limits)
	if err != nil || err2 != nil {
		s.setDraft(h)
		return
	}
	h["Ratelimit-Policy"], h["Ratelimit"] = []string{policy}, []string{limit}
}

// list reads a field. One that is no list is ignored as a whole, as RFC 9651 says.
func list(field ...string) httpsfv.List {
	l, _ := httpsfv.UnmarshalList(field)
	return l
}

// fold adds limits to a list, and tells which of them are in it: of two of one name the one of which less remains.
func fold(to, limits httpsfv.List) (all, won httpsfv.List) {
	for _, m := range limits {
		switch i := find(to, m); {
		case i < 0:
			to, won = append(to, m), append(won, m)
		case nearer(m, to[i]):
			to[i], won = m, append(won, m)
		}
	}
	return to, won
}

// replace adds policies to a list, in place of others of the same names.
func replace(in, policies httpsfv.List) httpsfv.List {
	for _, m := range policies {
		if i := find(in, m); i >= 0 {
			in[i] = m
		} else {
			in = append(in, m)
		}
	}
	return in
}

// find is the index of the item with the name of another, or -1.
func find(in httpsfv.List, m httpsfv.Member) int {
	name := nameOf(m)
	return slices.IndexFunc(in, func(other httpsfv.Member) bool { return name != "" && nameOf(other) == name })
}

// nameOf is the name of a policy and what follows the name to tell partitions apart, or empty.
func nameOf(m httpsfv.Member) string {
	item, _ := m.(httpsfv.Item)
	name, _ := item.Value.(string)
	if name == "" {
		return ""
	}
	partition, _ := item.Params.Get("pk")
	key, _ := partition.([]byte)
	return name + "\x00" + string(key)
}

func nearer(a, b httpsfv.Member) bool {
	r, s := number(a, "r"), number(b, "r")
	return r < s || r == s && number(a, "t") > number(b, "t")
}

func sameLimit(a, b httpsfv.Member) bool {
	return nameOf(a) != "" && nameOf(a) == nameOf(b) && number(a, "r") == number(b, "r") && number(a, "t") == number(b, "t")
}

// number is a parameter of an item, or -1.
func number(m httpsfv.Member, name string) int64 {
	if item, ok := m.(httpsfv.Item); ok {
		value, _ := item.Params.Get(name)
		if n, ok := value.(int64); ok {
			return n
		}
	}
	return -1
}
