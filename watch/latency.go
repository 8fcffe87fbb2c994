package watch

// How long decisions take.

import (
	"math/bits"
	"time"
)

// histogram counts durations in bins. The upper edge of a bin is at most a quarter above its lower edge. The bins reach
// up to 2^42 ns, more than an hour; longer durations count in the last one.
type histogram [40 * 4]uint32

// bin returns the index of the bin of d. Each octave from 4 ns on has four bins.
func bin(d time.Duration) int {
	n := uint64(max(d, 4))
	octave := bits.Len64(n) - 3 // n>>octave is from 4 to 7
	return min(octave*4+int(n>>octave)-4, len(histogram{})-1)
}

// edge returns the upper edge of a bin.
func edge(bin int) time.Duration { return time.Duration(bin%4+5) << (bin / 4) }

func (h *histogram) add(o *histogram) {
	for i, n := range o {
		h[i] += n
	}
}

// quantile returns a duration that the share q of all durations does not exceed. It is at most a quarter too long.
func (h *histogram) quantile(q float64) time.Duration {
	total, seen := 0.0, 0.0
	for _, n := range h {
		total += float64(n)
	}
	for i, n := range h {
		if seen += float64(n); seen > 0 && seen >= q*total {
			return edge(i)
		}
	}
	return 0
}
