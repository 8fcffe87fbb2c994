// Making one list of the limits of several limiters: of nested middlewares, a handler that asks for itself, a server
// behind a ReverseProxy.

package throttlerhttp

import "github.com/dunglas/httpsfv"

// mostBytes of a field of somebody else's are read.
const mostBytes = 16 << 10

// list reads the lines of a field. If they are no list, or too long, the field is ignored as a whole.
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

// merge adds the fields that a limiter has said to the limits and policies of others. Of two limits of one name it has
// the one of which less remains, and the policy of that one.
func merge(limits, policies httpsfv.List, own [2]string) [2]string {
	var limit, policy named
	for _, m := range limits {
		limit.lower(m)
	}
	for _, m := range policies {
		policy.put(m)
	}
	ownLimits, _ := httpsfv.UnmarshalList(own[1:])
	ownPolicies, _ := httpsfv.UnmarshalList(own[:1]) // of the same names, in the same order
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

// without returns the limits that are not among others, by their names and numbers.
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

// named is a list with one item of each name.
type named struct {
	list httpsfv.List
	at   map[policyName]int
}

// policyName is the name of a policy, and the key of one of its partitions.
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

// of is the item with the name of m, or nil. What has no name is like nothing else.
func (l *named) of(m httpsfv.Member) httpsfv.Member {
	if i, ok := l.at[nameOf(m)]; ok {
		return l.list[i]
	}
	return nil
}

// put puts m into the list, in place of the item of its name.
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

// lower puts a limit into the list unless that has one of its name of which no more remains.
func (l *named) lower(m httpsfv.Member) bool {
	if old := l.of(m); old != nil && !nearer(m, old) {
		return false
	}
	l.put(m)
	return true
}

// nearer reports whether less remains of a than of b, or as little for longer.
func nearer(a, b httpsfv.Member) bool {
	r, s := number(a, "r"), number(b, "r")
	return r < s || r == s && number(a, "t") > number(b, "t")
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
