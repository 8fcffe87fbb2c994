// Reading what an answer says about limits.

package throttlerhttp

import (
	"cmp"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dunglas/httpsfv"
)

// news is what an answer says about the next requests. The zero news is that of no answer.
type news struct {
	denied bool
	wait   time.Duration // that a denial names, else 0
	all    bool          // whether the denial is about the host
	served bool          // by the server, and not by a cache
	limits []rateLimit
}

func readNews(resp *http.Response) news {
	if resp == nil {
		return news{}
	}
	limited, unavailable := resp.StatusCode == http.StatusTooManyRequests, resp.StatusCode == http.StatusServiceUnavailable
	if aged(resp.Header) {
		return news{denied: limited}
	}
	n := news{limits: parseRateLimit(resp.Header.Values("RateLimit"))}
	wait, told := parseRetryAfter(resp.Header)
	n.denied = limited || unavailable && told
	n.all = unavailable || len(n.limits) == 0
	n.served = !n.denied
	if n.denied {
		n.wait = wait
	}
	for _, l := range n.limits {
		if n.denied && wait == 0 && l.remaining == 0 {
			n.wait = max(n.wait, l.reset)
		}
	}
	return n
}

// aged returns whether the answer is that of a cache (RFC 9111, section 5.1).
func aged(h http.Header) bool {
	age, ok := parseSeconds(h.Get("Age"))
	return ok && age > 0
}

// parseRetryAfter reads seconds, or a date, which is 0 if it is past. Of several fields the longest counts.
func parseRetryAfter(h http.Header) (wait time.Duration, ok bool) {
	for _, field := range h.Values("Retry-After") {
		if after, told := parseAfter(field, h.Get("Date")); told {
			wait, ok = max(wait, after), true
		}
	}
	return wait, ok
}

// parseAfter reads seconds, or a date by the clock of the server if that is known.
func parseAfter(field, date string) (time.Duration, bool) {
	if wait, ok := parseSeconds(field); ok {
		return wait, true
	}
	at, err := http.ParseTime(strings.TrimSpace(field))
	now, unknown := http.ParseTime(date)
	if unknown != nil {
		now = time.Now()
	}
	return min(at.Sub(now), wholeSeconds(1<<31)), err == nil
}

func parseSeconds(field string) (time.Duration, bool) {
	n, err := strconv.ParseUint(strings.TrimSpace(field), 10, 64)
	return wholeSeconds(n), err == nil || errors.Is(err, strconv.ErrRange)
}

// wholeSeconds are at most 68 years, so that they can be added to a time.
func wholeSeconds(n uint64) time.Duration { return time.Duration(min(n, 1<<31)) * time.Second }

// rateLimit is what an answer says about one policy.
type rateLimit struct {
	policy    string // the name and the partition key
	remaining int64
	reset     time.Duration // until there is more; 0 if that is not said
}

// mostLimits of one answer are heeded.
const mostLimits = 32

// parseRateLimit reads a list. Of a policy that is in it twice what leaves less counts.
func parseRateLimit(fields []string) (limits []rateLimit) {
	members := list(fields)
	for _, member := range members[:min(len(members), mostLimits)] {
		if l, ok := parseLimit(member); ok {
			limits = append(limits, l)
		}
	}
	slices.SortStableFunc(limits, func(a, b rateLimit) int {
		return cmp.Or(strings.Compare(a.policy, b.policy), cmp.Compare(a.remaining, b.remaining), cmp.Compare(b.reset, a.reset))
	})
	return slices.CompactFunc(limits, func(a, b rateLimit) bool { return a.policy == b.policy })
}

// parseLimit reads one limit, such as "5/10s";r=5;t=8.
func parseLimit(member httpsfv.Member) (l rateLimit, ok bool) {
	item, ok := member.(httpsfv.Item)
	if !ok {
		return l, false
	}
	name, named := item.Value.(string)
	r, _ := item.Params.Get("r")
	remaining, counted := r.(int64)
	t, has := item.Params.Get("t")
	seconds, timed := t.(int64)
	if !named || !counted || has && !timed || remaining < 0 || seconds < 0 {
		return l, false
	}
	pk, _ := item.Params.Get("pk")
	key, _ := pk.([]byte)
	return rateLimit{name + "\x00" + string(key), remaining, wholeSeconds(uint64(seconds))}, true
}
