// The fields of Draft10 for the buckets of one limiter.

package throttlerhttp

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-throttler/throttler"
)

// policy is the part of the fields that depends on the limits alone.
type policy struct {
	of    []throttler.Level // of which Bucket, Full and Window count: a policy does not change with the load
	field string            // RateLimit-Policy
	items []string          // of RateLimit, up to their numbers
	twice bool              // two parts have a bucket of one name
}

func newPolicy(levels []throttler.Level) *policy {
	p := &policy{of: slices.Clone(levels)}
	for i := range levels {
		l, item := &levels[i], ""
		if i > 0 {
			item = separator
		}
		name := quoted(l.Bucket)
		p.twice = p.twice || slices.ContainsFunc(p.items, func(own string) bool { return strings.TrimPrefix(own, separator) == name+";r=" })
		item += name
		p.items = append(p.items, item+";r=")
		p.field += fmt.Sprintf("%s;q=%d;w=%d", item, min(l.Full, largest), seconds(l.Window))
	}
	return p
}

// is reports whether the policy is that of some levels.
func (p *policy) is(levels []throttler.Level) bool {
	if len(p.of) != len(levels) {
		return false
	}
	for i := range levels {
		own, l := &p.of[i], &levels[i]
		if own.Bucket != l.Bucket || own.Full != l.Full || own.Window != l.Window {
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

// policies remembers the first ones. Most requests are limited by a few sets of limits.
type policies struct{ known atomic.Pointer[[]*policy] }

const mostPolicies = 16

// of is the policy of the levels of a verdict.
func (p *policies) of(v *throttler.Verdict, levels []throttler.Level) *policy {
	known := p.known.Load()
	if known != nil {
		for _, k := range *known {
			if k.is(levels) {
				return k
			}
		}
	}
	made := newPolicy(levels)
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

// seconds is d in seconds, rounded up.
func seconds(d time.Duration) int64 {
	s := int64(d / time.Second)
	if d%time.Second > 0 {
		s++
	}
	return s
}
