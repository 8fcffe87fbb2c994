package throttlerhttp

import (
	"fmt"
	"math/bits"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/dunglas/httpsfv"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
)

// Fields are sets of header fields that tell a client about its limits, to be combined by |. Times are whole
// seconds, rounded up. A verdict without levels, which a policy gave, has none.
//
// An answer has one set of them, whoever else limits the request: another middleware outside or inside, a handler
// by Refuse, or the server behind a ReverseProxy.
type Fields uint8

// The sets of fields.
const (
	// Draft10 is RateLimit-Policy and RateLimit of draft-ietf-httpapi-ratelimit-headers-10, with an item for
	// each bucket: "5/10s";q=5;w=10 is its capacity and its period, or with a Burst the time in which that comes
	// back; "5/10s";r=0;t=8 is what remains of it and when one more token is there. A full bucket has no t. Names
	// may change until there is an RFC; a later draft will be another constant.
	//
	// Several limiters are one list. Of two limits of one name it has the one of which less remains.
	Draft10 Fields = 1 << iota

	// XSeconds is X-RateLimit-Limit, X-RateLimit-Remaining and X-RateLimit-Reset of the bucket that is nearest to
	// refusing. Reset is in how many seconds it is full again. Of several limiters the fields are those of the one
	// that refused, else of the one with the smallest Remaining.
	XSeconds

	// XUnix is XSeconds with a Reset in seconds since the Unix epoch, by this machine's clock.
	XUnix

	// NoFields is none but Retry-After.
	NoFields
)

// said is what a limiter says of its limits in an answer.
type said struct {
	policy *policy
	draft  [2]string // RateLimit-Policy and RateLimit
	x      [3]string // the values of xNames
}

// say puts the fields of a verdict into the answer to a refused request.
func (f Fields) say(h http.Header, v *throttler.Verdict, known *policies) {
	if levels := v.Levels(); len(levels) > 0 {
		new(said).say(f, h, known.of(v), levels)
	}
}

// say puts the fields of levels beside those of other limiters, or in their place: a recorder of
// another limiter, outside of this one, then finds the smaller ones. It allocates a string for Draft10.
func (s *said) say(f Fields, h http.Header, p *policy, levels []throttler.Level) {
	s.tell(f, p, levels)
	switch have := h["Ratelimit"]; {
	case s.draft[1] == "":
	case !p.twice && (len(have) == 0 || len(have) == 1 && p.names(have[0])):
		s.setDraft(h)
	default:
		s.join(h, "")
	}
	if theirs := lastX(h); s.x[0] != "" && !less(theirs, s.x) {
		setX(h, s.x)
	}
}

func (s *said) tell(f Fields, p *policy, levels []throttler.Level) {
	s.policy = p
	if f == 0 || f&Draft10 != 0 {
		s.draft = [2]string{p.field, p.limits(levels)}
	}
	s.x = f.ofNearest(levels)
}

// become changes the fields in an answer from s to now, which may be s, and leaves one set of them if others have
// added theirs meanwhile. What somebody has removed stays removed.
func (s *said) become(h http.Header, now *said, status int) {
	switch have := h["Ratelimit"]; {
	case len(have) == 0 || s.draft[1] == "":
	case len(have) > 1 || have[0] != s.draft[1]:
		now.join(h, s.draft[1])
	case s != now:
		now.setDraft(h)
	}
	if s.x[0] == "" || len(h[xNames[1]]) == 0 {
		return
	}
	x, theirs := now.x, s.otherX(h)
	if less(theirs, x) || status == http.StatusTooManyRequests && less(theirs, [3]string{}) { // it is they who refused
		x = theirs
	}
	setX(h, x)
}

// restore says again what somebody has removed.
func (s *said) restore(h http.Header) {
	if s.draft[1] != "" && len(h["Ratelimit"]) == 0 {
		s.setDraft(h)
	}
	if s.x[0] != "" && len(h[xNames[1]]) == 0 {
		setX(h, s.x)
	}
}

// setDraft has no other limits beside those of s.
func (s *said) setDraft(h http.Header) {
	h["Ratelimit-Policy"], h["Ratelimit"] = s.draft[:1:1], s.draft[1:]
}

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

var xNames = [...]string{"X-Ratelimit-Limit", "X-Ratelimit-Remaining", "X-Ratelimit-Reset"}

// ofNearest are the values of xNames, if f has them.
func (f Fields) ofNearest(levels []throttler.Level) (x [3]string) {
	if f&(XSeconds|XUnix) == 0 || len(levels) == 0 {
		return x
	}
	l := nearest(levels)
	reset := seconds(l.ResetAfter)
	if f&XUnix != 0 {
		reset = time.Now().Add(l.ResetAfter + time.Second - 1).Unix()
	}
	return [...]string{strconv.FormatInt(l.Limit, 10), strconv.FormatInt(l.Remaining, 10), strconv.FormatInt(reset, 10)}
}

// setX sets those of the fields that are not empty, and removes the others.
func setX(h http.Header, x [3]string) {
	for i, name := range xNames {
		if x[i] == "" {
			delete(h, name)
		} else {
			h[name] = []string{x[i]}
		}
	}
}

// lastX is what was set or added last.
func lastX(h http.Header) (x [3]string) {
	for i, name := range xNames {
		if have := h[name]; len(have) > 0 {
			x[i] = have[len(have)-1]
		}
	}
	return x
}

// otherX is what others have added to what s said, or set in its place.
func (s *said) otherX(h http.Header) [3]string {
	x := lastX(h)
	if x == s.x && len(h[xNames[1]]) == 1 {
		return [3]string{}
	}
	for i, name := range xNames {
		if len(h[name]) < len(h[xNames[1]]) {
			x[i] = "" // they have none
		}
	}
	return x
}

// less says that less remains of x than of y, or that only of x it is known.
func less(x, y [3]string) bool {
	r, err := strconv.ParseInt(x[1], 10, 64)
	s, err2 := strconv.ParseInt(y[1], 10, 64)
	return err == nil && (err2 != nil || r < s)
}

// refunded are the levels after everything that v took was given back. In a SlidingWindow the next token is then back
// at the time that is certain, when all are.
func refunded(v *throttler.Verdict) []throttler.Level {
	levels := v.Levels()
	rest := levels
	for i := range v.Parts() {
		part := v.Part(i)
		for j := range part.Rules {
			giveBack(&rest[j], &part.Rules[j], part.Cost(j))
		}
		rest = rest[len(part.Rules):]
	}
	return levels
}

func giveBack(l *throttler.Level, rule *storage.Rule, n int64) {
	l.Remaining = min(l.Limit, l.Remaining+n)
	switch {
	case l.Remaining == l.Limit:
		l.ResetAfter, l.NextAfter = 0, 0
	case rule.Kind == storage.Continuous:
		l.ResetAfter = max(l.NextAfter, l.ResetAfter-time.Duration(comesBack(rule, n))*time.Microsecond)
	case rule.Kind == storage.SlidingWindow && n > 0:
		l.NextAfter = l.ResetAfter
	}
}

// policy is what is the same in all answers by some rules.
type policy struct {
	rules [][]storage.Rule // of each part
	field string           // RateLimit-Policy
	items []string         // how those of RateLimit begin
	twice bool             // a name stands in two parts
}

func newPolicy(v *throttler.Verdict) *policy {
	p := &policy{}
	for i := range v.Parts() {
		p.rules = append(p.rules, v.Part(i).Rules)
		for j := range p.rules[i] {
			rule, item := &p.rules[i][j], ""
			if len(p.items) > 0 {
				item = separator
			}
			name := quoted(rule.Name)
			p.twice = p.twice || slices.ContainsFunc(p.items, func(own string) bool { return strings.TrimPrefix(own, separator) == name+";r=" })
			item += name
			p.items = append(p.items, item+";r=")
			p.field += fmt.Sprintf("%s;q=%d;w=%d", item, min(rule.Capacity, largest), window(rule))
		}
	}
	return p
}

// is reports whether the policy is that of a verdict.
func (p *policy) is(v *throttler.Verdict) bool {
	if len(p.rules) != v.Parts() {
		return false
	}
	for i, rules := range p.rules {
		if of := v.Part(i).Rules; &of[0] != &rules[0] || len(of) != len(rules) {
			return false
		}
	}
	return true
}

// limits is RateLimit.
func (p *policy) limits(levels []throttler.Level) string {
	var buf [256]byte
	out := buf[:0]
	for i := range levels {
		l := &levels[i]
		out = strconv.AppendInt(append(out, p.items[i]...), min(l.Remaining, largest), 10)
		if l.Remaining < l.Limit {
			out = strconv.AppendInt(append(out, ";t="...), seconds(next(l)), 10)
		}
	}
	return string(out)
}

// names says that a field has only limits of this policy.
func (p *policy) names(limits string) bool {
	for more := true; more; {
		var item string
		item, limits, more = strings.Cut(limits, separator)
		if !slices.ContainsFunc(p.items, func(own string) bool { return strings.HasPrefix(item, strings.TrimPrefix(own, separator)) }) {
			return false
		}
	}
	return true
}

// next is when one more token may be taken, and never later than a refused call may be made again.
func next(l *throttler.Level) time.Duration {
	if l.RetryAfter > 0 {
		return min(l.NextAfter, l.RetryAfter)
	}
	return l.NextAfter
}

// separator stands between the items of a list.
const separator = ", "

// largest is the largest integer of structured fields.
const largest = 999_999_999_999_999

// quoted is the name of a bucket as a string of structured fields (RFC 9651): names are printable ASCII.
func quoted(name string) string {
	return `"` + strings.NewReplacer(`"`, `\"`, `\`, `\\`).Replace(name) + `"`
}

// policies are those of the rules that came first. Rules never change, and few sets of them limit most requests.
type policies struct{ known atomic.Pointer[[]*policy] }

const mostPolicies = 16

// of is the policy of a verdict that has levels.
func (p *policies) of(v *throttler.Verdict) *policy {
	known := p.known.Load()
	if known != nil {
		for _, k := range *known {
			if k.is(v) {
				return k
			}
		}
	}
	made := newPolicy(v)
	if !v.Degraded() { // else they may be of this verdict only
		p.add(known, made)
	}
	return made
}

// add keeps a policy, unless another was kept since known was loaded.
func (p *policies) add(known *[]*policy, made *policy) {
	all := []*policy{made}
	if known != nil {
		all = append(slices.Clip(*known), made)
	}
	if len(all) <= mostPolicies {
		p.known.CompareAndSwap(known, &all)
	}
}

// window is the period, or of a Continuous bucket the time in which it becomes full from empty, in seconds,
// rounded up.
func window(r *storage.Rule) int64 {
	micros := r.Period
	if r.Kind == storage.Continuous {
		micros = comesBack(r, r.Capacity)
	}
	return (micros + 999_999) / 1_000_000
}

// comesBack is the time in which n tokens of a Continuous bucket come back, in microseconds, rounded up. NewRule holds
// it below 2^50 for the capacity.
func comesBack(r *storage.Rule, n int64) int64 {
	hi, lo := bits.Mul64(uint64(n), uint64(r.Period))
	quotient, rest := bits.Div64(hi, lo, uint64(r.Refill))
	return int64(quotient + min(rest, 1))
}

// nearest is the level whose bucket makes the next call wait longest, else that of which the least remains.
func nearest(levels []throttler.Level) *throttler.Level {
	best := &levels[0]
	for i := range levels {
		l := &levels[i]
		if l.RetryAfter > best.RetryAfter || l.RetryAfter == best.RetryAfter && l.Remaining < best.Remaining {
			best = l
		}
	}
	return best
}

// seconds is d in seconds, rounded up.
func seconds(d time.Duration) int64 {
	s := int64(d / time.Second)
	if d%time.Second > 0 {
		s++
	}
	return s
}
