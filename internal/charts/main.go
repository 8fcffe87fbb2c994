// Command charts draws docs/charts. For each kind of bucket a chart shows what the bucket admits to its worst client,
// and the window of one period in which it admits most. Every mark is an answer of law.Decide; nothing is drawn by
// hand. Run it from the root of the module:
//
//	go run ./internal/charts
package main

import (
	"flag"
	"log"
	"os"
	"path/filepath"

	"github.com/go-throttler/throttler/internal/law"
)

//go:generate go run . -dir ../../docs/charts

func main() {
	dir := flag.String("dir", filepath.Join("docs", "charts"), "the folder that the charts are written to")
	flag.Parse()
	if err := write(*dir); err != nil {
		log.Fatal(err)
	}
}

// write writes all charts into a folder, and makes the folder if it is missing.
func write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, c := range charts {
		if err := os.WriteFile(filepath.Join(dir, c.file()), c.svg(), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// chart is one kind of bucket, and what its worst client does.
type chart struct {
	kind   law.Kind
	name   string
	client string // what the client does, in a line of text
	script []ask
}

// ask is a series of calls for one token each: count calls at step from, and again after every further every steps,
// until before step to.
type ask struct{ from, to, every, count int }

// at returns count calls at one step.
func at(step, count int) ask { return ask{step, step + 1, 1, count} }

// file returns the name of the chart's file.
func (c chart) file() string { return c.kind.String() + ".svg" }

// charts has the scripts of all kinds. Each has one call more than there can be tokens, to show a denial. "Just
// before" an edge is half a second here, so that one can see it; a microsecond would admit the same number of calls.
var charts = []chart{
	{law.Replenish, "Replenish", "one call opens the period, the others wait for its end; then as many as there are", []ask{
		at(10, 1), at(105, 5), at(110, 6), {130, 210, 20, 1}, at(210, 6), {230, 300, 20, 1},
	}},
	{law.Continuous, "Continuous", "all at once, then each token as it comes back; a pause, and all at once again", []ask{
		at(40, 6), {50, 140, 10, 1}, at(260, 6), {270, 300, 10, 1},
	}},
	{law.FixedWindow, "FixedWindow", "nothing until just before the edge at 10 s, then as many as there are, before it and after it", []ask{
		at(95, 6), at(100, 6), {120, 200, 20, 1}, at(200, 6), {220, 300, 20, 1},
	}},
	{law.SlidingWindow, "SlidingWindow", "all at once just before the edge at 10 s, then each token as it fades; then a pause", []ask{
		at(95, 6), {100, 200, 10, 1}, at(290, 5),
	}},
	{law.SlidingLog, "SlidingLog", "one call, a wait for the others, then whatever comes back: never more than the capacity", []ask{
		at(20, 1), at(95, 5), at(100, 5), {115, 300, 10, 1},
	}},
}
