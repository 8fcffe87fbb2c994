// The identifier that a rule counts for, and the cost that it asks for.

package rules

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/go-throttler/throttler"
)

// Two different identifiers are never written alike: each value is preceded by its length. An identifier begins with the
// domain. A hash tag can use that to put everything one request asks for into one slot of a Redis cluster.

// nativePrefix returns what the identifiers of a rule begin with. The name of a rule with a path may be longer than an
// identifier, and is hashed then: the prefix leaves room for the hash of the values. No other name is written "sha256:",
// because a length stands before it.
func nativePrefix(domain, rule string) string {
	of := appendValue(nil, "domain", domain)
	b := appendValue(slices.Clip(of), "rule", rule)
	if len(b) > maxIdentifier-len(hashKey)-2*sha256.Size {
		sum := sha256.Sum256([]byte(rule))
		b = append(of, " rule=sha256:"+hex.EncodeToString(sum[:])...)
	}
	return string(b)
}

func envoyPrefix(domain string) string { return string(appendValue(nil, "envoy", domain)) }

// appendValue appends " key=length:value".
func appendValue(b []byte, key, value string) []byte {
	if len(b) > 0 {
		b = append(b, ' ')
	}
	if strings.ContainsAny(key, "= \"") {
		b = strconv.AppendQuote(b, key)
	} else {
		b = append(b, key...)
	}
	b = strconv.AppendInt(append(b, '='), int64(len(value)), 10)
	return append(append(b, ':'), value...)
}

// identifier returns the identifier that the rule counts a descriptor for.
func (r *Rule) identifier(entries []Entry) string {
	var buf [256]byte
	b := append(buf[:0], r.prefix...)
	if r.path != nil {
		b = r.path.appendTo(b, entries)
	}
	for _, key := range r.per {
		b = appendValue(b, key, value(entries, key))
	}
	return hashed(b, r.prefix)
}

// value returns the value of the first entry with the key, or "".
func value(entries []Entry, key string) string {
	for i := range entries {
		if entries[i].Key == key {
			return entries[i].Value
		}
	}
	return ""
}

const (
	maxIdentifier = 1024
	hashKey       = " sha256="
)

// hashed returns the identifier b, or a hash of it if b is longer than a storage accepts. A hash cannot equal another
// identifier: the value of an entry named sha256 would be preceded by its length and a colon.
func hashed(b []byte, prefix string) string {
	if len(b) <= maxIdentifier {
		return string(b)
	}
	sum := sha256.Sum256(b)
	return prefix + hashKey + hex.EncodeToString(sum[:])
}

const maxCost = math.MaxInt64

// cost is what a rule asks for: the cost of the request, or the value of an entry, times a factor.
type cost struct {
	factor int64
	key    string // of the entry, "" for the cost of the request
}

// entry returns the index of the entry that is the cost, or -1. One that is "" is there, and is no number: else whoever can
// empty it would pay the cost of the request, which mostly is 1.
func (c cost) entry(entries []Entry) int {
	return slices.IndexFunc(entries, func(e Entry) bool { return c.key != "" && e.Key == c.key })
}

// of returns what the rule r asks for a descriptor whose cost is base. Without the entry the cost is base. A product
// above MaxInt64 becomes MaxInt64.
func (c cost) of(r *Rule, base int64, entries []Entry) (int64, error) {
	if i := c.entry(entries); i >= 0 {
		n, err := strconv.ParseInt(entries[i].Value, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%w: the rule %q takes its cost from the entry %q, which is %.64q, must be a whole number", throttler.ErrInvalidCost, r.ID, c.key, entries[i].Value)
		}
		base = n
	}
	if base < 0 {
		return 0, fmt.Errorf("%w: %d, must be 0 or more", throttler.ErrInvalidCost, base)
	}
	if c.factor > 0 && base > math.MaxInt64/c.factor {
		return math.MaxInt64, nil
	}
	return base * c.factor, nil
}

// HashTag returns the domain in an identifier of the engine, for redis.Options.HashTag. On a Redis cluster, everything
// that one request asks for must be in one slot; with this tag a whole domain is. Any other identifier is its own tag.
func HashTag(identifier string) string {
	key, rest, _ := strings.Cut(identifier, "=")
	length, rest, ok := strings.Cut(rest, ":")
	n, err := strconv.Atoi(length)
	if !ok || err != nil || n < 0 || n > len(rest) || key != "domain" && key != "envoy" {
		return identifier
	}
	return rest[:n]
}
