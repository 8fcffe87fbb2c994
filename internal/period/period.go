// Package period writes durations as the names of buckets and the vectors do.
package period

import (
	"strings"
	"time"
)

// Format is d without units that are zero: 1h, 1m30s, 250ms, 5us.
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
