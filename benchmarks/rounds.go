package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"
)

var start = time.Now() // when the program started

// row is what one contender did in a case: a turn for each round.
type row struct {
	contender

	turns []turn
}

// rounds lets n contenders play a turn in each round. In each round another one begins, and every second round goes
// backwards, so that no contender always follows the same other one.
func rounds[T any](ctx context.Context, b *bench, name string, n int, play func(i int) (T, error)) ([][]T, error) {
	fmt.Fprintf(os.Stderr, "%4.0f s  %s\n", time.Since(start).Seconds(), name)
	out := make([][]T, n)
	for r := b.first; r < b.first+b.rounds; r++ {
		for k := range n {
			i := (r + k) % n
			if r%2 == 1 {
				i = n - 1 - i
			}
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			played, err := play(i)
			if err != nil {
				return nil, err
			}
			out[i] = append(out[i], played)
		}
	}
	return out, nil
}

func (r *row) median(of func(turn) float64) float64 { return quantile(r.values(of), 0.5) }

func (r *row) values(of func(turn) float64) []float64 {
	out := make([]float64, len(r.turns))
	for i, t := range r.turns {
		out[i] = of(t)
	}
	return out
}

// against compares the decisions per second of r with those of other. The ratio is the median of the ratios within each
// round. The spread is how far the middle half of these ratios reaches from it, as a fraction of it.
func (r *row) against(other *row) (ratio, spread float64) {
	all := make([]float64, len(r.turns))
	for i := range all {
		all[i] = r.turns[i].perSecond() / other.turns[i].perSecond()
	}
	ratio = quantile(all, 0.5)
	return ratio, max(quantile(all, 0.75)-ratio, ratio-quantile(all, 0.25)) / ratio
}

// quantile returns the q-quantile of the values. Between two values it interpolates.
func quantile(all []float64, q float64) float64 {
	if len(all) == 0 {
		return 0
	}
	all = slices.Sorted(slices.Values(all))
	at := q * float64(len(all)-1)
	i := int(at)
	return all[i] + (at-float64(i))*(all[min(i+1, len(all)-1)]-all[i])
}
