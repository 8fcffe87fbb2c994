// Command charts draws docs/charts: what each kind of bucket admits to the client that it suits
// least, and the window of one period in which that is most. Every mark is an answer of
// law.Decide; nothing is drawn by hand. Run it from the root of the module:
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

// chart is one kind and the script of the client that it suits least.
type chart struct {
	kind   law.Kind
	name   string
	client string // what the client does, in a line
	script []ask
}

// ask is calls of one token each: count of them at from, and again every so often before to, all
// in steps.
type ask struct{ from, to, every, count int }

func at(step, count int) ask { return ask{step, step + 1, 1, count} }

func (c chart) file() string { return c.kind.String() + ".svg" }

// The scripts. One call more than there can be tokens shows the refusal. "Just before" is half a
// second here, for the eye: the counts are the same for a microsecond.
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
