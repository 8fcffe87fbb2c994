package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/go-throttler/throttler/internal/law"
)

func TestTheCommittedChartsAreWhatTheArithmeticDraws(t *testing.T) {
	t.Parallel()
	for _, c := range charts {
		drawn := c.svg()
		kept, err := os.ReadFile(filepath.Join("..", "..", "docs", "charts", c.file()))
		if err != nil || !bytes.Equal(kept, drawn) {
			t.Errorf("docs/charts/%s is not what the arithmetic draws (%v): run go run ./internal/charts in the root of the module", c.file(), err)
		}
		if len(drawn) > 8<<10 {
			t.Errorf("%s has %d bytes, should have at most 8 KB", c.file(), len(drawn))
		}
	}
}

// The most calls for one token that a kind admits with a capacity (and refill) of c, in half-open windows of one
// period and of a tenth of it. Why there cannot be more:
//
//	Replenish      At most two periods overlap the window. The call that opened the first one is a whole
//	               period before the first call of the second one, so one of the two lies outside.
//	Continuous     A full bucket, and what comes back in less than a period: all tokens but the last.
//	FixedWindow    Two whole windows meet at an edge.
//	SlidingWindow  All tokens just before an edge, and after it one in each c-th of the period: c in less
//	               than a period, and one in less than a c-th of it.
//	SlidingLog     What is spent are the tokens of the last period. With a capacity above 256, as few
//	               tokens as the even client takes in a grain may come back a grain early.
var bounds = map[law.Kind]struct{ period, tenth func(c int) int }{
	law.Replenish:     {func(c int) int { return 2*c - 1 }, func(c int) int { return 2*c - 1 }},
	law.Continuous:    {func(c int) int { return 2*c - 1 }, func(c int) int { return c + (c-1)/10 }},
	law.FixedWindow:   {func(c int) int { return 2 * c }, func(c int) int { return 2 * c }},
	law.SlidingWindow: {func(c int) int { return 2 * c }, func(c int) int { return c + (c+9)/10 }},
	law.SlidingLog:    {func(c int) int { return c }, func(c int) int { return c }},
}

func TestTheWorstPeriodOfEachChartIsTheWorstThereIs(t *testing.T) {
	t.Parallel()
	for _, c := range charts {
		r := c.run()
		from, most := r.worst(period)
		if want := bounds[c.kind].period(capacity); most != want {
			t.Errorf("%s: %d admitted from %d µs on, want %d", c.name, most, from, want)
		}
	}
}

func TestNoClientIsAdmittedMoreThanTheWorstAndSomeClientIsAdmittedThat(t *testing.T) {
	t.Parallel()
	for _, c := range charts {
		for _, tokens := range []int{5, 100} {
			t.Run(fmt.Sprintf("%s of %d", c.name, tokens), func(t *testing.T) {
				t.Parallel()
				inPeriod, inTenth := search(ruleOf(c.kind, int64(tokens)))
				t.Logf("%d = %.2f C in a period, %d = %.2f C in a tenth of it", inPeriod, float64(inPeriod)/float64(tokens), inTenth, float64(inTenth)/float64(tokens))
				if want := bounds[c.kind].period(tokens); inPeriod != want {
					t.Errorf("a client was admitted %d in one period, want %d", inPeriod, want)
				}
				if want := bounds[c.kind].tenth(tokens); inTenth != want {
					t.Errorf("a client was admitted %d in a tenth of a period, want %d", inTenth, want)
				}
			})
		}
	}
}

func TestALargeLogAdmitsAboutA256thMoreInTheWorstPeriod(t *testing.T) {
	t.Parallel()
	for _, tokens := range []int{257, 1000} {
		early := (tokens+255)/256 + 1
		inPeriod, _ := search(ruleOf(law.SlidingLog, int64(tokens)))
		t.Logf("%d of %d", inPeriod, tokens)
		if inPeriod < tokens || inPeriod > tokens+early {
			t.Errorf("a client was admitted %d in one period, want %d to %d", inPeriod, tokens, tokens+early)
		}
	}
}

// search simulates clients that can call 200 times a period. Some wait and then take whatever there is, with or
// without one call long before. The others change their behaviour at random.
func search(r *law.Rule) (inPeriod, inTenth int) {
	const fine = 200
	try := func(steps int, c client) {
		out := simulate(r, steps, period/fine, c)
		_, a := out.worst(period)
		_, b := out.worst(period / 10)
		inPeriod, inTenth = max(inPeriod, a), max(inTenth, b)
	}
	for opener := range int64(2) {
		for wait := 1; wait < 2*fine; wait += 3 {
			try(4*fine, greedy(opener, wait))
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 40 {
		try(10*fine, moody(random, fine))
	}
	return inPeriod, inTenth
}

// greedy returns a client that makes opener calls at once, waits for some steps, and then takes whatever there is.
func greedy(opener int64, wait int) client {
	return func(i int, remaining int64) int64 {
		switch {
		case i == 0:
			return opener
		case i < wait:
			return 0
		}
		return remaining
	}
}

// moody returns a client that is silent, curious or greedy for up to a period and a half, and then changes.
func moody(random *rand.Rand, fine int) client {
	mood, until := 0, 0
	return func(i int, remaining int64) int64 {
		if i >= until {
			mood, until = random.IntN(3), i+1+random.IntN(fine*3/2)
		}
		switch {
		case mood == 0:
			return 0
		case mood == 1 && i%8 != 0:
			return 0
		case mood == 1:
			return random.Int64N(remaining + 2)
		}
		return remaining
	}
}
