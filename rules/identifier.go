// Whom a rule counts for, and what it asks of a request.

package rules

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/go-throttler/throttler"
)

// Identifiers are written so that different ones never meet: each value follows its length. They begin with the domain,
// by which a hash tag may put what one request asks into one slot of a Redis cluster.

func nativePrefix(domain, rule string) string {
	return string(appendValue(appendValue(nil, "domain", domain), "rule", rule))
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

// identifier is whom the rule counts a descriptor for.
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

// value is that of the first entry with the key.
func value(entries []Entry, key string) string {
	for i := range entries {
		if entries[i].Key == key {
			return entries[i].Value
		}
	}
	return ""
}

const maxIdentifier = 1024

// hashed is the identifier b, or what stands for it if it is longer than a storage takes.
func hashed(b []byte, prefix string) string {
	if len(b) <= maxIdentifier {
		return string(b)
	}
	sum := sha256.Sum256(b)
	return prefix + " sha256=" + hex.EncodeToString(sum[:])
}

const maxCost = math.MaxInt64

// cost is what a rule asks for: the cost of the request, or the value of an entry, times a factor.
type cost struct {
	factor int64
	key    string // of the entry, "" for the cost of the request
}

// of is the cost of a descriptor, that asks for base.
func (c cost) of(r *Rule, base int64, entries []Entry) (int64, error) {
	if c.key != "" {
		if text := value(entries, c.key); text != "" {
			n, err := strconv.ParseInt(text, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("%w: the rule %q takes its cost from the entry %q, which is %.64q, must be a whole number", throttler.ErrInvalidCost, r.ID, c.key, text)
			}
			base = n
		}
	}
	if base < 0 {
		return 0, fmt.Errorf("%w: %d, must be 0 or more", throttler.ErrInvalidCost, base)
	}
	if c.factor > 0 && base > math.MaxInt64/c.factor {
		return math.MaxInt64, nil
	}
	return base * c.factor, nil
}

// HashTag is the domain in an identifier of the engine, for redis.Options.HashTag: on a Redis cluster all that one request
// asks has to be in one slot, and so is then all of a domain. Other identifiers are their own tag.
func HashTag(identifier string) string {
	key, rest, _ := strings.Cut(identifier, "=")
	length, rest, ok := strings.Cut(rest, ":")
	n, err := strconv.Atoi(length)
	if !ok || err != nil || n < 0 || n > len(rest) || key != "domain" && key != "envoy" {
		return identifier
	}
	return rest[:n]
}
