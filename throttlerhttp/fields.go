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

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
)

// Fields are sets of header fields that tell a client about its limits, to be combined by |. Times are whole
// seconds, rounded up. A verdict without levels, which a policy gave, has none.
type Fields uint8

// The sets of fields.
const (
	// Draft10 is RateLimit-Policy and RateLimit of draft-ietf-httpapi-ratelimit-headers-10, with an item for
	// each bucket: "5/10s";q=5;w=10 is its capacity and its period, or with a Burst the time in which that comes
	// back; "5/10s";r=0;t=8 is what remains of it and when it is full again, which in a sliding window is up to
	// two periods. Names may change until there is an RFC; a later draft will be another constant.
	Draft10 Fields = 1 << iota

	// XSeconds is X-RateLimit-Limit, X-RateLimit-Remaining and X-RateLimit-Reset of the bucket that is nearest to
	// refusing. Reset is in how many seconds it is full again.
	XSeconds

	// XUnix is XSeconds with a Reset in seconds since the Unix epoch, by this machine's clock.
	XUnix

	// NoFields is none but Retry-After.
	NoFields
)

// write sets the fields. It allocates a string and a slice for a set.
func (f Fields) write(h http.Header, v *throttler.Verdict, known *policies) {
	levels := v.Levels()
	if len(levels) == 0 {
		return
	}
	if f == 0 || f&Draft10 != 0 {
		draft10(h, known.of(v), levels)
	}
	if f&(XSeconds|XUnix) == 0 {
		return
	}
	l := nearest(levels)
	reset := seconds(l.ResetAfter)
	if f&XUnix != 0 {
		reset = time.Now().Add(l.ResetAfter + time.Second - 1).Unix()
	}
	h.Set("X-RateLimit-Limit", strconv.FormatInt(l.Limit, 10))
	h.Set("X-RateLimit-Remaining", strconv.FormatInt(l.Remaining, 10))
	h.Set("X-RateLimit-Reset", strconv.FormatInt(reset, 10))
}

func draft10(h http.Header, p *policy, levels []throttler.Level) {
	var buf [256]byte
	out := buf[:0]
	for i := range levels {
		out = strconv.AppendInt(append(out, p.items[i]...), min(levels[i].Remaining, largest), 10)
		out = strconv.AppendInt(append(out, ";t="...), seconds(levels[i].ResetAfter), 10)
	}
	values := []string{p.field, string(out)}
	h["Ratelimit-Policy"], h["Ratelimit"] = values[:1:1], values[1:]
}

// policy is what is the same in all answers by some rules.
type policy struct {
	rules [][]storage.Rule // of each part
	field string           // RateLimit-Policy
	items []string         // how those of RateLimit begin
}

func newPolicy(v *throttler.Verdict) *policy {
	p := &policy{}
	for i := range v.Parts() {
		p.rules = append(p.rules, v.Part(i).Rules)
		for j := range p.rules[i] {
			rule, item := &p.rules[i][j], ""
			if len(p.items) > 0 {
				item = ", "
			}
			item += quoted(rule.Name)
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
// rounded up. NewRule holds the quotient below 2^50.
func window(r *storage.Rule) int64 {
	micros := uint64(r.Period)
	if r.Kind == storage.Continuous {
		hi, lo := bits.Mul64(uint64(r.Capacity), uint64(r.Period))
		quotient, rest := bits.Div64(hi, lo, uint64(r.Refill))
		micros = quotient + min(rest, 1)
	}
	return int64((micros + 999_999) / 1_000_000)
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
func seconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }
