// Merging the limits of several limiters into one list: nested middlewares, a handler that asks a Throttler itself, a
// server behind a ReverseProxy.

package throttlerhttp

import "github.com/dunglas/httpsfv"

// mostBytes is how many bytes of a field written by another limiter are read at most: parsing takes time and memory.
const mostBytes = 16 << 10

// list parses the lines of a field. If they are not a list, or are too long, the whole field is ignored.
func list(lines []string) httpsfv.List {
	n := 0
	for _, line := range lines {
		n += len(line)
	}
	if n > mostBytes {
		return nil
	}
	l, _ := httpsfv.UnmarshalList(lines)
	return l
}

// merge adds the fields of one limiter to the limits and policies of others. If two limits have one name, the result has the
// one of which less remains, and its policy.
func merge(limits, policies httpsfv.List, own [2]string) [2]string {
	var limit, policy named
	for _, m := range limits {
		limit.lower(m)
	}
	for _, m := range policies {
		policy.put(m)
	}
	ownLimits, _ := httpsfv.UnmarshalList(own[1:])
	ownPolicies, _ := httpsfv.UnmarshalList(own[:1]) // with the same names, in the same order
	for i, m := range ownLimits {
		if limit.lower(m) || policy.of(m) == nil {
			policy.put(ownPolicies[i])
		}
	}
	p, err := httpsfv.Marshal(policy.list)
	l, err2 := httpsfv.Marshal(limit.list)
	if err != nil || err2 != nil {
		return own
	}
	return [2]string{p, l}
}

// without returns the limits that are not in others. Limits are compared by name and by their numbers.
func without(limits, others httpsfv.List) (rest httpsfv.List) {
	var remove named
	for _, m := range others {
		remove.put(m)
	}
	for _, m := range limits {
		if other := remove.of(m); other == nil || nearer(m, other) || nearer(other, m) {
			rest = append(rest, m)
		}
	}
	return rest
}

// named is a list with at most one item per name.
type named struct {
	list httpsfv.List
	at   map[policyName]int
}

// policyName is the name of a policy and the partition key, "pk" in the draft.
type policyName struct{ name, partition string }

func nameOf(m httpsfv.Member) (n policyName) {
	if item, ok := m.(httpsfv.Item); ok {
		n.name, _ = item.Value.(string)
		key, _ := item.Params.Get("pk")
		bytes, _ := key.([]byte)
		n.partition = string(bytes)
	}
	return n
}

// of returns the item with the same name as m, or nil. An item without a name equals no other.
func (l *named) of(m httpsfv.Member) httpsfv.Member {
	if i, ok := l.at[nameOf(m)]; ok {
		return l.list[i]
	}
	return nil
}

// put adds m to the list, or replaces the item of its name.
func (l *named) put(m httpsfv.Member) {
	name := nameOf(m)
	if i, ok := l.at[name]; ok {
		l.list[i] = m
		return
	}
	if l.at == nil {
		l.at = map[policyName]int{}
	}
	if name.name != "" {
		l.at[name] = len(l.list)
	}
	l.list = append(l.list, m)
}

// lower puts a limit into the list, unless the list has one of its name that is at least as near to denying. It
// reports whether it did.
func (l *named) lower(m httpsfv.Member) bool {
	if old := l.of(m); old != nil && !nearer(m, old) {
		return false
	}
	l.put(m)
	return true
}

// nearer reports whether less remains of a than of b, or equally little for a longer time.
func nearer(a, b httpsfv.Member) bool {
	r, s := number(a, "r"), number(b, "r")
	return r < s || r == s && number(a, "t") > number(b, "t")
}

// number returns an integer parameter of an item, or -1 if there is none.
func number(m httpsfv.Member, name string) int64 {
	if item, ok := m.(httpsfv.Item); ok {
		value, _ := item.Params.Get(name)
		if n, ok := value.(int64); ok {
			return n
		}
	}
	return -1
}
