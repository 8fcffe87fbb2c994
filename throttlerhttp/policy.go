// The fields of Draft10 for the buckets of one limiter.

package throttlerhttp

import (
	"fmt"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
)

// policy is the part of the fields that depends on the rules alone.
type policy struct {
	rules [][]storage.Rule // of each part
	field string           // RateLimit-Policy
	items []string         // of RateLimit, up to their numbers
	twice bool             // two parts have a bucket of one name
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

// names reports whether a field has the limits of this policy and no others, with whatever numbers.
func (p *policy) names(limits string) bool {
	for _, item := range p.items {
		after, ok := strings.CutPrefix(limits, item)
		if !ok {
			return false
		}
		end := strings.IndexByte(after, ',')
		if end < 0 {
			end = len(after)
		}
		limits = after[end:]
	}
	return limits == ""
}

// next is the time until one more token may be taken, at most the time until a denied call may be made again.
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

// policies remembers those of the first rules. Rules never change, and most requests are limited by a few sets of them.
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
	if !v.Degraded() { // a fallback may make rules for one verdict
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

// seconds is d in seconds, rounded up.
func seconds(d time.Duration) int64 {
	s := int64(d / time.Second)
	if d%time.Second > 0 {
		s++
	}
	return s
}
