package main

import (
	"cmp"
	"math"
	"slices"
	"time"

	"github.com/go-throttler/throttler/storage/failover"
)

// call is when an admitted call began and ended, measured from the start of the run.
type call struct{ began, ended time.Duration }

// margin is the interval in the documented bound: the excess is at most what both stores admit in this time. It is twice
// the time until Postgres learns what Redis admitted.
const margin = 2 * (failover.DefaultFlushInterval + failover.DefaultPrimaryTimeout)

// excess returns by how many tokens the limit was exceeded, in the interval where it was exceeded most. A decision happens
// somewhere between the beginning and the end of its call, so an interval is from a beginning to an end. From call i to
// call n, in the order of their ends, n+1-i calls were admitted, and the limit allows rate + rate·(ended(n) - began(i)). The
// loop keeps the best rate·began(i) - i, so that one pass finds the largest difference.
func excess(calls []call) int {
	sorted := byEnd(calls)
	worst, best := 0.0, math.Inf(-1)
	for n, c := range sorted {
		best = max(best, rate*c.began.Seconds()-float64(n))
		worst = max(worst, best+float64(n+1)-rate-rate*c.ended.Seconds())
	}
	return int(worst)
}

// most returns the largest number of calls that ended within any interval of this length.
func most(calls []call, d time.Duration) (n int) {
	sorted, first := byEnd(calls), 0
	for i, c := range sorted {
		for sorted[first].ended < c.ended-d {
			first++
		}
		n = max(n, i+1-first)
	}
	return n
}

// span returns the time from the first beginning to the last end.
func span(calls []call) time.Duration {
	if len(calls) == 0 {
		return 0
	}
	sorted := byEnd(calls)
	first := slices.MinFunc(calls, func(a, b call) int { return cmp.Compare(a.began, b.began) })
	return sorted[len(sorted)-1].ended - first.began
}

func byEnd(calls []call) []call {
	return slices.SortedFunc(slices.Values(calls), func(a, b call) int { return cmp.Compare(a.ended, b.ended) })
}
