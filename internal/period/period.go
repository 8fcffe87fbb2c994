// Package period formats durations as they are in the names of buckets and in the test vectors.
package period

import (
	"strings"
	"time"
)

// Format returns d like String, but without zero units at the end and with u for µ: 1h, 1m30s, 250ms, 5us.
func Format(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return strings.ReplaceAll(s, "µ", "u")
}
