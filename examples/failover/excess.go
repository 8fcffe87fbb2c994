package main

import (
	"cmp"
	"math"
	"slices"
	"time"

	"github.com/go-throttler/throttler/storage/failover"
)

// call is when one that was admitted began and ended, since the beginning.
type call struct{ began, ended time.Duration }

// margin is the interval of the documented bound: no more is admitted too much than both stores admit in so long,
// which is twice the time until Postgres learns what Redis admitted.
const margin = 2 * (failover.DefaultFlushInterval + failover.DefaultPrimaryTimeout)

// excess is by how many tokens the limit was exceeded in the interval in which it was most. A decision is somewhere
// between the beginning and the end of its call, so an interval is from a beginning to an end.
func excess(calls []call) int {
	sorted := byEnd(calls)
	worst, best := 0.0, math.Inf(-1)
	for n, c := range sorted {
		best = max(best, rate*c.began.Seconds()-float64(n))
		worst = max(worst, best+float64(n+1)-rate-rate*c.ended.Seconds())
	}
	return int(worst)
}

// most is how many calls ended in the interval of this length in which it was most.
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

// span is from the first beginning to the last end.
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
