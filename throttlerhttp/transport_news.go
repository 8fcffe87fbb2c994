// What an answer says about limits.

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

// news is what an answer says about later requests. It is zero if there was no answer.
type news struct {
	denied bool
	wait   time.Duration // the wait that a denial names, or 0
	all    bool          // the denial concerns the whole host, not a route
	served bool          // not denied, and answered by the server itself instead of a cache
	limits []rateLimit
}

// readNews reads the news of an answer. The fields of a cached answer are ignored, since they are out of date; a cached 429 is
// still a denial. A Retry-After takes precedence over RateLimit (rule 3).
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

// aged reports whether an answer came from a cache: it has an Age above 0 (RFC 9111, section 5.1).
func aged(h http.Header) bool {
	age, ok := parseSeconds(h.Get("Age"))
	return ok && age > 0
}

// parseRetryAfter returns the longest wait of the Retry-After fields, and whether there was a valid one (RFC 9110, section
// 10.2.3). A date in the past is a wait of 0.
func parseRetryAfter(h http.Header) (wait time.Duration, ok bool) {
	for _, field := range h.Values("Retry-After") {
		if after, told := parseAfter(field, h.Get("Date")); told {
			wait, ok = max(wait, after), true
		}
	}
	return wait, ok
}

// parseAfter parses a number of seconds or a date. A date is compared with the server's clock if date, the Date field, is valid,
// otherwise with this machine's.
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

// wholeSeconds returns n seconds, but at most 68 years, so that they can be added to a time without overflow.
func wholeSeconds(n uint64) time.Duration { return time.Duration(min(n, 1<<31)) * time.Second }

// rateLimit is what an answer says about one policy.
type rateLimit struct {
	policy    string // name and partition key
	remaining int64
	reset     time.Duration // until more remains; 0 if the answer does not say
}

// mostLimits is how many policies of one answer are used at most.
const mostLimits = 32

// parseRateLimit parses a list of policies and skips invalid members. If it has a policy twice, the one with less remaining
// counts; if that is equal, the one with the later reset.
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

// parseLimit parses one policy, such as "5/10s";r=5;t=8.
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
