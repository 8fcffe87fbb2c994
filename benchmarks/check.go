package main

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// check is the result of many goroutines that together asked for more than the tighter of two limits admits, on several
// identifiers. It shows whether a contender admits too much or too little under concurrency.
type check struct {
	idle         bool
	want         int
	least, most  int // admitted on one identifier
	asked, wrong int // all calls, and those that returned an error
}

const (
	askers  = 64
	asks    = 10 // calls of each asker
	admits  = 100
	between = 2 * time.Hour // period: no token is refilled during the check
)

func (c check) String() string {
	switch {
	case c.idle:
		return "decides nothing"
	case c.least == c.want && c.most == c.want && c.wrong == 0:
		return fmt.Sprintf("exactly %d", c.want)
	}
	text := fmt.Sprintf("%d to %d", c.least, c.most)
	if c.least == c.most {
		text = fmt.Sprint(c.most)
	}
	if c.most > c.want {
		text = "**" + text + "**"
	}
	if c.wrong > 0 {
		text += fmt.Sprintf(", and %d errors in %d calls", c.wrong, c.asked)
	}
	return text
}

// mark returns the sign that follows a contender's name in the tables: † if it admitted too much, ‡ if it admitted too
// little or returned errors.
func (c check) mark() string {
	switch {
	case c.idle:
		return ""
	case c.most > c.want:
		return " †"
	case c.least < c.want || c.wrong > 0:
		return " ‡"
	}
	return ""
}

// checkAll checks every contender, each on this many identifiers.
func checkAll(ctx context.Context, all []contender, identifiers int) (map[string]check, error) {
	out := map[string]check{}
	for _, c := range all {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		checked := check{idle: c.idle, want: admits, least: asks * askers}
		if !c.idle {
			if err := checked.ask(c, identifiers); err != nil {
				return nil, fmt.Errorf("%s: %w", c.name, err)
			}
		}
		out[c.name] = checked
	}
	return out, nil
}

func (c *check) ask(by contender, identifiers int) error {
	a, done, err := by.open([]limit{{admits, between}, {10 * admits, 4 * between}})
	if err != nil {
		return err
	}
	defer done()
	for i := range identifiers {
		admitted, wrong := together(a, fmt.Sprintf("check:%d", i))
		c.least, c.most = min(c.least, admitted), max(c.most, admitted)
		c.asked, c.wrong = c.asked+askers*asks, c.wrong+wrong
	}
	return nil
}

// together lets all askers ask for one identifier at the same time.
func together(a allow, id string) (admitted, wrong int) {
	var wg sync.WaitGroup
	start, tallies := make(chan struct{}), make([]tally, askers)
	for i := range tallies {
		wg.Go(func() {
			<-start
			for range asks {
				switch ok, err := a(id); {
				case err != nil:
					tallies[i].failed++
				case ok:
					tallies[i].decisions++
				}
			}
		})
	}
	close(start)
	wg.Wait()
	for _, t := range tallies {
		admitted, wrong = admitted+t.decisions, wrong+t.failed
	}
	return admitted, wrong
}
