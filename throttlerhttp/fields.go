// The header fields that tell a client about its limits.

package throttlerhttp

import (
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/go-throttler/throttler"
)

// Fields is a set of header fields that tell a client about its limits. Sets are combined by |. Times are in whole
// seconds, rounded up. A verdict that a Policy gave has no levels, so its answer has no fields.
//
// An answer has each field once, even if something else limits the request too: another middleware outside or inside, a
// handler that calls Refuse, or the server behind a ReverseProxy.
type Fields uint8

// The sets of fields.
const (
	// Draft10 is RateLimit-Policy and RateLimit of draft-ietf-httpapi-ratelimit-headers-10, with an item for each
	// bucket. In RateLimit-Policy, "5/10s";q=5;w=10 is the full capacity and the period, or with a Burst the time in
	// which it is refilled. In RateLimit, "5/10s";r=0;t=8 is what remains, and the seconds until there is one more
	// token. A full bucket has no t. The names may change until there is an RFC; a later draft will be another constant.
	//
	// The limits of several limiters become one list. If two limits have one name, the list has the one with less left.
	Draft10 Fields = 1 << iota

	// XSeconds is X-RateLimit-Limit, X-RateLimit-Remaining and X-RateLimit-Reset of the bucket that is nearest to
	// denying. Reset is the seconds until the bucket is full. If there are several limiters the fields are those of
	// the one that denied, otherwise of the one with the smallest Remaining.
	XSeconds

	// XUnix is XSeconds with Reset in seconds since the Unix epoch, by this machine's clock.
	XUnix

	// NoFields leaves only Retry-After.
	NoFields
)

// said is what a limiter says about its limits in an answer.
type said struct {
	draft [2]string // RateLimit-Policy and RateLimit
	x     [3]string // the values of xNames
}

// say adds the fields of a verdict to an answer. For Draft10 it allocates one string.
func (s *said) say(l *limit, w http.ResponseWriter, v *throttler.Verdict, levels []throttler.Level) {
	h, p := w.Header(), s.tell(l, v, levels)
	var before said
	if have := h["Ratelimit"]; len(have) == 1 && p.names(have[0]) && saidOutside(w, have[0]) {
		before.draft[1] = have[0] // by this limiter or an equal one: put replaces it, and the recorder outside merges
	}
	s.put(h, &before, true, 0)
}

// saidOutside reports whether a recorder further out wrote this RateLimit field.
func saidOutside(w http.ResponseWriter, limits string) bool {
	for outer := recorded(w); outer != nil; outer = recorded(outer.ResponseWriter) {
		if outer.said.draft[1] == limits {
			return true
		}
	}
	return false
}

// tell fills s with the fields of levels and returns the policy of Draft10. It adds them to no answer yet.
func (s *said) tell(l *limit, v *throttler.Verdict, levels []throttler.Level) *policy {
	f, p, lowest := l.m.Fields, l.policies.of(v, levels), levels
	if p.twice {
		lowest = lowestOf(levels)
		p = l.policies.of(v, lowest)
	}
	if f == 0 || f&Draft10 != 0 {
		s.draft = [2]string{p.field, p.limits(lowest)}
	}
	if f&(XSeconds|XUnix) != 0 {
		s.x = f.ofNearest(levels)
	}
	return p
}

// lowestOf has one level of each name, of several the one of which less remains, or as little for longer.
func lowestOf(levels []throttler.Level) (lowest []throttler.Level) {
	for i := range levels {
		l := &levels[i]
		j := slices.IndexFunc(lowest, func(have throttler.Level) bool { return have.Bucket == l.Bucket })
		switch {
		case j < 0:
			lowest = append(lowest, *l)
		case l.Remaining < lowest[j].Remaining || l.Remaining == lowest[j].Remaining && next(l) > next(&lowest[j]):
			lowest[j] = *l
		}
	}
	return lowest
}

// put writes s into an answer, replacing what this limiter said before, which may be s itself. If others have added fields,
// it merges all into one set. Fields that were removed meanwhile stay removed, unless lost says that they have to be written
// again. For a status of 429 the X- fields of another limiter are kept, since that one denied.
//
// The values are slices of s, which saves an allocation. Their capacity is 1, so an append by somebody else copies them.
func (s *said) put(h http.Header, before *said, lost bool, status int) {
	switch have := h["Ratelimit"]; {
	case s.draft[1] == "" || len(have) == 0 && !lost:
	case len(have) == 0 || len(have) == 1 && have[0] == before.draft[1]:
		h["Ratelimit"] = s.draft[1:]
		if lost { // otherwise the policies are there already, and others may have added some
			h["Ratelimit-Policy"] = s.draft[:1:1]
		}
	default:
		all := merge(without(list(have), list(before.draft[1:])), list(h["Ratelimit-Policy"]), s.draft)
		h["Ratelimit-Policy"], h["Ratelimit"] = all[:1:1], all[1:]
	}
	if s.x[0] == "" || len(h[xNames[1]]) == 0 && !lost {
		return
	}
	x, theirs := &s.x, before.otherX(h)
	if less(theirs, *x) || status == http.StatusTooManyRequests && less(theirs, [3]string{}) { // theirs denied
		x = &theirs
	}
	for i, name := range xNames {
		if x[i] == "" {
			delete(h, name)
		} else {
			h[name] = x[i : i+1 : i+1]
		}
	}
}

var xNames = [...]string{"X-Ratelimit-Limit", "X-Ratelimit-Remaining", "X-Ratelimit-Reset"}

// ofNearest returns the values of xNames for the bucket that is nearest to denying.
func (f Fields) ofNearest(levels []throttler.Level) [3]string {
	l := nearest(levels)
	reset := seconds(l.ResetAfter)
	if f&XUnix != 0 {
		reset = time.Now().Add(l.ResetAfter + time.Second - 1).Unix()
	}
	return [...]string{strconv.FormatInt(l.Limit, 10), strconv.FormatInt(l.Remaining, 10), strconv.FormatInt(reset, 10)}
}

// otherX returns the values of xNames that another limiter wrote after s, either as further lines or over those of s. It is
// empty if only s wrote any.
func (s *said) otherX(h http.Header) (x [3]string) {
	lines := len(h[xNames[1]])
	for i, name := range xNames {
		if have := h[name]; len(have) > 0 && len(have) >= lines { // fewer lines: the other limiter wrote none of this name
			x[i] = have[len(have)-1]
		}
	}
	if x == s.x && lines == 1 {
		return [3]string{}
	}
	return x
}

// less reports whether less remains of x than of y. An unknown Remaining counts as more than any known one.
func less(x, y [3]string) bool {
	r, err := strconv.ParseInt(x[1], 10, 64)
	s, err2 := strconv.ParseInt(y[1], 10, 64)
	return err == nil && (err2 != nil || r < s)
}

// nearest returns the level with the longest RetryAfter, or among equal ones that with the least Remaining.
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
