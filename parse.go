// Buckets as text, for configuration files.

package throttler

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/nearest"
	"github.com/go-throttler/throttler/internal/period"
)

const unlimited = "unlimited"

// kinds maps the words of ParseBucket to kinds.
var kinds = map[string]law.Kind{
	"replenish":  law.Replenish,
	"continuous": law.Continuous,
	"fixed":      law.FixedWindow,
	"sliding":    law.SlidingWindow,
	"log":        law.SlidingLog,
}

// ParseBucket reads a bucket from text such as:
//
//	5/10s                             NewBucket(10*time.Second, 5)
//	100/1h sliding                    NewBucket(time.Hour, 100).SlidingWindow()
//	100/10s continuous burst 200      NewBucket(10*time.Second, 100).Continuous().Burst(200)
//	1000/30d fixed named plan         NewBucket(30*24*time.Hour, 1000).FixedWindow().Named("plan")
//	0/1s                              admits nothing
//	unlimited                         Unlimited()
//
// The text begins with capacity/period. The period has the form of time.ParseDuration, optionally with weeks and days
// before it ("1d12h"), or is a unit alone, which means one of it ("100/h", "100/hour"). These may follow in any order: the
// kind, which is replenish (the default), continuous, fixed, sliding or log; "burst n"; and "named x", where x has no
// spaces or is a Go string in quotes. Case matters only in names.
//
// The error is a *BucketError, or several joined. It also covers a bucket that NewBucket would find faulty. For a
// misspelled word it names the nearest one that is allowed. After some faults the rest of the text is not read.
func ParseBucket(s string) (Bucket, error) {
	p := parser{given: s[:min(len(s), mostGiven)]}
	p.bucket(s)
	if len(p.faults) > 0 {
		return Bucket{}, errors.Join(p.faults...)
	}
	if err := newSet([]Bucket{p.b}).err; err != nil {
		return Bucket{}, err
	}
	return p.b, nil
}

// String returns the bucket in the form that ParseBucket reads. Elastic has no such form and is left out.
func (b Bucket) String() string {
	var out strings.Builder
	if b.free {
		out.WriteString(unlimited)
	} else {
		fmt.Fprintf(&out, "%d/%s", b.tokens, period.Format(b.period))
		if b.kind != law.Replenish {
			out.WriteString(" " + b.kind.String())
		}
	}
	if b.hasBurst && !b.free {
		fmt.Fprintf(&out, " burst %d", b.burst)
	}
	if b.named {
		out.WriteString(" named " + quotedName(b.name))
	}
	return out.String()
}

func quotedName(name string) string {
	if name == "" || strings.ContainsAny(name, " \"'`") {
		return strconv.Quote(name)
	}
	return name
}

// Each fault quotes the text, which a request may have brought. Without a bound the error would grow with the square of its
// length.
const (
	mostGiven  = 256 // bytes of the text that a fault quotes
	mostFaults = 8   // after which the rest is not read
)

// parser builds a bucket and collects the faults of its text.
type parser struct {
	given  string
	b      Bucket
	faults []error
}

func (p *parser) fault(field, format string, args ...any) {
	p.faults = append(p.faults, &BucketError{Bucket: p.given, Field: field, Reason: fmt.Sprintf(format, args...)})
}

func (p *parser) bucket(s string) {
	limit, rest := word(s)
	if p.b = Unlimited(); !strings.EqualFold(limit, unlimited) {
		if !strings.Contains(limit, "/") { // it has another form, such as "5 per 10s", so the rest has no other words
			p.fault("Capacity", "has to come first, as capacity/period, such as 5/10s%s", meant(limit, []string{unlimited}))
			return
		}
		p.b = p.limit(limit)
	}
	kind := ""
	for rest != "" && len(p.faults) < mostFaults {
		var w string
		if w, rest = word(rest); strings.EqualFold(w, "burst") {
			rest = p.burst(rest)
			continue
		}
		if strings.EqualFold(w, "named") {
			rest = p.named(rest)
			continue
		}
		kind = p.kind(kind, strings.ToLower(w))
	}
	if p.b.free && (kind != "" || p.b.hasBurst) {
		p.fault("Kind", "and burst are not for unlimited")
	}
}

// word returns the first word of s and what follows it, both without surrounding spaces.
func word(s string) (first, rest string) {
	s = strings.TrimSpace(s)
	if i := strings.IndexAny(s, " \t\r\n"); i >= 0 {
		return s[:i], strings.TrimSpace(s[i:])
	}
	return s, ""
}

// limit reads capacity/period.
func (p *parser) limit(s string) Bucket {
	n, per, _ := strings.Cut(s, "/")
	capacity, err := strconv.ParseInt(n, 10, 64)
	if err != nil {
		p.fault("Capacity", "is %.64q, must be a whole number of tokens", n)
	}
	d, ok := parsePeriod(strings.ToLower(per))
	if !ok {
		p.fault("Period", "is %.64q, must be a duration such as 10s, 1h30m or 30d%s", per, meant(strings.TrimLeft(per, "0123456789."), unitNames))
	}
	return NewBucket(d, capacity)
}

func (p *parser) burst(rest string) string {
	n, rest := word(rest)
	burst, err := strconv.ParseInt(n, 10, 64)
	if err != nil {
		p.fault("Burst", "is %.64q, must be a whole number of tokens", n)
	}
	p.b = p.b.Burst(burst)
	return rest
}

func (p *parser) named(rest string) string {
	name, after := word(rest)
	if name == "" {
		p.fault("Name", "is missing after %q, must be 1 to 64 printable ASCII characters", "named")
		return ""
	}
	if quoted, err := strconv.QuotedPrefix(rest); err == nil {
		name, _ = strconv.Unquote(quoted) // cannot fail
		after = strings.TrimSpace(rest[len(quoted):])
	}
	p.b = p.b.Named(name)
	return after
}

func (p *parser) kind(before, given string) string {
	k, known := kinds[given]
	switch {
	case !known:
		p.fault("Kind", "is %.64q, must be replenish, continuous, fixed, sliding or log, or else burst or named has to come here%s",
			given, meant(given, []string{"replenish", "continuous", "fixed", "sliding", "log", "burst", "named"}))
	case before != "":
		p.fault("Kind", "is %q after %q, must be one", given, before)
	case !p.b.free:
		p.b.kind = k
		p.b = p.b.made()
	}
	return given
}

func meant(given string, words []string) string {
	if w := nearest.Word(given, words); w != "" {
		return fmt.Sprintf(": did you mean %q?", w)
	}
	return ""
}

// units are the words that mean one unit as a period. Only days and weeks are also looked up to read a count of them, as
// time.ParseDuration knows the others.
var units = map[string]time.Duration{
	"us": time.Microsecond, "µs": time.Microsecond, "ms": time.Millisecond, "s": time.Second, "m": time.Minute, "h": time.Hour,
	"d": day, "w": 7 * day,
	"second": time.Second, "minute": time.Minute, "hour": time.Hour, "day": day, "week": 7 * day,
}

var unitNames = []string{"second", "minute", "hour", "day", "week"}

const day = 24 * time.Hour

// parsePeriod reads a duration that may begin with weeks and days, or a unit alone. Counts of weeks and of days are below
// 2048 each, so that their sum cannot overflow.
func parsePeriod(s string) (time.Duration, bool) {
	if d, ok := units[s]; ok {
		return d, true
	}
	var days time.Duration
	for _, unit := range []string{"w", "d"} {
		if n, rest, ok := strings.Cut(s, unit); ok {
			count, err := strconv.ParseUint(n, 10, 11)
			if err != nil {
				return 0, false
			}
			days += time.Duration(count) * units[unit]
			s = rest
		}
	}
	if s == "" && days > 0 {
		return days, true
	}
	d, err := time.ParseDuration(s)
	return days + d, err == nil && d >= 0 && d <= math.MaxInt64-days
}
