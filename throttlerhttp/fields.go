package throttlerhttp

import (
	"math/bits"
	"net/http"
	"strconv"
	"strings"
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
func (f Fields) write(h http.Header, v *throttler.Verdict) {
	levels := v.Levels()
	if len(levels) == 0 {
		return
	}
	if f == 0 || f&Draft10 != 0 {
		draft10(h, v, levels)
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

func draft10(h http.Header, v *throttler.Verdict, levels []throttler.Level) {
	var buf [256]byte
	out := buf[:0]
	for i, rule := range v.Part(0).Rules { // the middleware asks for one identifier
		out = item(out, i, rule.Name)
		out = parameter(out, ";q=", rule.Capacity)
		out = parameter(out, ";w=", window(&rule))
	}
	policy := len(out)
	for i := range levels {
		l := &levels[i]
		out = item(out, i, l.Bucket)
		out = parameter(out, ";r=", l.Remaining)
		out = parameter(out, ";t=", seconds(l.ResetAfter))
	}
	both := string(out)
	values := []string{both[:policy], both[policy:]}
	h["Ratelimit-Policy"], h["Ratelimit"] = values[:1:1], values[1:]
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

// item begins item i of a list of structured fields (RFC 9651), a string: names of buckets are printable ASCII.
func item(out []byte, i int, name string) []byte {
	if i > 0 {
		out = append(out, ", "...)
	}
	out = append(out, '"')
	if strings.IndexByte(name, '"') >= 0 || strings.IndexByte(name, '\\') >= 0 {
		name = strings.NewReplacer(`"`, `\"`, `\`, `\\`).Replace(name)
	}
	return append(append(out, name...), '"')
}

// largest is the largest integer of structured fields.
const largest = 999_999_999_999_999

func parameter(out []byte, name string, n int64) []byte {
	return strconv.AppendInt(append(out, name...), min(n, largest), 10)
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
