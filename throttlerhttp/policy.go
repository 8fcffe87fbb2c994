// The Draft10 fields for the buckets of one limiter.

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

// policy is the part of the fields that depends on the limits only. It is built once and reused by many answers.
type policy struct {
	of    []throttler.Level // only Bucket, Full and Window count: a policy does not change with the load
	field string            // RateLimit-Policy
	items []string          // the items of RateLimit, up to the number that remains
	twice bool              // two parts have a bucket of the same name
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

// is reports whether this is the policy of the levels.
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

// limits returns the value of RateLimit.
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

// names reports whether a RateLimit field has exactly the limits of this policy, with any numbers.
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

// next returns the time until one more token may be taken, but not more than the time until a denied call is admitted.
func next(l *throttler.Level) time.Duration {
	if l.RetryAfter > 0 {
		return min(l.NextAfter, l.RetryAfter)
	}
	return l.NextAfter
}

// separator stands between the items of a list.
const separator = ", "

// largest is the largest integer that structured fields can hold (RFC 9651, section 3.3.1).
const largest = 999_999_999_999_999

// quoted returns the name of a bucket as a string of structured fields (RFC 9651, section 3.3.3). Names are printable ASCII,
// so a string can hold any of them.
func quoted(name string) string {
	return `"` + strings.NewReplacer(`"`, `\"`, `\`, `\\`).Replace(name) + `"`
}

// policies caches the first policies that are needed, at most mostPolicies. It suffices, as most requests are limited by a
// few sets of limits.
type policies struct{ known atomic.Pointer[[]*policy] }

const mostPolicies = 16

// of returns the policy of a verdict's levels.
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
	if !v.Degraded() { // a fallback may make rules for one verdict only, which would fill the cache
		p.add(known, made)
	}
	return made
}

// add caches a policy, unless another one was cached since known was loaded: a lost race only means to build it again.
func (p *policies) add(known *[]*policy, made *policy) {
	all := []*policy{made}
	if known != nil {
		all = append(slices.Clip(*known), made)
	}
	if len(all) <= mostPolicies {
		p.known.CompareAndSwap(known, &all)
	}
}

// seconds returns d in seconds, rounded up.
func seconds(d time.Duration) int64 {
	s := int64(d / time.Second)
	if d%time.Second > 0 {
		s++
	}
	return s
}
