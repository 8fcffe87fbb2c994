package main

import (
	"bytes"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// report builds docs/benchmarks.md.
type report struct {
	body    bytes.Buffer
	charts  map[string]string // by file name
	modules map[string]bool   // modules whose versions it names
	servers map[string]bool
}

func (r *report) printf(format string, args ...any) { fmt.Fprintf(&r.body, format, args...) }

// chart adds a picture to the text.
func (r *report) chart(file, title, svg string) {
	if r.charts == nil {
		r.charts = map[string]string{}
	}
	r.charts[file] = svg
	r.printf("![%s](benchmarks/%s)\n\n", title, file)
}

// table writes rows of cells. The first row is the header, and all columns but the first are numbers.
func (r *report) table(rows [][]string) {
	for i, cells := range rows {
		r.printf("| %s |\n", strings.Join(cells, " | "))
		if i == 0 {
			r.printf("|---%s|\n", strings.Repeat("|--:", len(cells)-1))
		}
	}
	r.printf("\n")
}

// spreads collects how much the ratios in a table vary from round to round.
type spreads []float64

func (s spreads) String() string {
	if len(s) == 0 {
		return ""
	}
	return fmt.Sprintf("From round to round: the middle half of a row's ratios reaches %.0f %% from their median in the typical cell, and %.0f %% at most.\n\n",
		100*quantile(s, 0.5), 100*quantile(s, 1))
}

func (r *report) name(c *contender, checks map[string]check) string {
	if r.modules == nil {
		r.modules = map[string]bool{}
	}
	if c.module != "" {
		r.modules[c.module] = true
	}
	return c.name + checks[c.name].mark()
}

const legend = "† admitted more than the limit, ‡ refused or failed where it should have admitted: see the table at the end of this section."

func (r *report) inProcess(allowed, denied, zipf grid, checks map[string]check) {
	r.printf("## In this process\n\nNanoseconds for a decision, on all processors together, and in brackets how many times that is of throttler's. %s\n\n", legend)
	bars := place{2, 1}
	if rows := allowed[bars]; rows != nil {
		r.chart("process.svg", "In process", barChart("One hot identifier, two buckets, one processor", "nanoseconds for an admission: less is better", "%.0f", rows, turn.nanoseconds))
	}
	r.grid("One hot identifier, admitted", allowed, checks)
	r.grid("One hot identifier, refused", denied, checks)
	r.grid("A million identifiers, by Zipf's law", zipf, checks)
	r.memory(zipf[bars], checks)
	r.checks(checks, inProcess)
}

// grid writes a table with a column for each place.
func (r *report) grid(title string, g grid, checks map[string]check) {
	if len(g) == 0 {
		return
	}
	var columns []place
	for _, p := range places() {
		if g[p] != nil {
			columns = append(columns, p)
		}
	}
	rows := [][]string{{""}}
	for _, p := range columns {
		rows[0] = append(rows[0], fmt.Sprintf("%s, %s", count(p.buckets, "bucket"), count(p.procs, "processor")))
	}
	var spread spreads
	for i := range g[columns[0]] {
		cells := []string{r.name(&g[columns[0]][i].contender, checks)}
		for _, p := range columns {
			cells = append(cells, timeCell(g[p], i, &spread))
		}
		rows = append(rows, cells)
	}
	r.printf("### %s\n\n", title)
	r.table(rows)
	r.printf("%v", spread)
}

// timeCell returns the time of row i, and its ratio to that of the first row.
func timeCell(rows []row, i int, spread *spreads) string {
	if len(rows[i].turns) == 0 {
		return "–"
	}
	text := number(rows[i].median(turn.nanoseconds))
	if i > 0 && len(rows[0].turns) == len(rows[i].turns) {
		ratio, s := rows[0].against(&rows[i])
		*spread = append(*spread, s)
		text += fmt.Sprintf(" (%s)", times(ratio))
	}
	return text + failures(&rows[i])
}

// failures says what part of the calls failed, or nothing if none did.
func failures(r *row) string {
	switch share := r.median(turn.share); {
	case share == 0:
		return ""
	case share < 0.0001:
		return ", under 0.01 % failed"
	default:
		return fmt.Sprintf(", %s %% failed", number(100*share))
	}
}

func (r *report) memory(rows []row, checks map[string]check) {
	if rows == nil {
		return
	}
	rows = slices.DeleteFunc(slices.Clone(rows), func(r row) bool { return r.idle })
	bytes := func(t turn) float64 { return t.bytes }
	r.printf("### Memory\n\nBytes that live in the heap for an identifier of 16 bytes with two limits, of a million. httprate keeps a hash of the identifier only.\n\n")
	r.chart("memory.svg", "Memory", barChart("Memory of an identifier", "bytes, of a million identifiers of 16 bytes with two limits: less is better", "%.0f", rows, bytes))
	out := [][]string{{"", "bytes", "of throttler's"}}
	for i := range rows {
		n := rows[i].median(bytes)
		out = append(out, []string{r.name(&rows[i].contender, checks), number(n), times(n / rows[0].median(bytes))})
	}
	r.table(out)
}

func (r *report) checks(checks map[string]check, all []contender) {
	r.printf("### What was admitted\n\n%d goroutines asked %d times for an identifier that has %d in %s.\n\n", askers, askers*asks, admits, "2 hours")
	rows := [][]string{{"", "admitted"}}
	for _, c := range all {
		if !c.idle {
			rows = append(rows, []string{c.name + checks[c.name].mark(), checks[c.name].String()})
		}
	}
	r.table(rows)
}

func (r *report) growth(buckets, identifiers curve) {
	if len(buckets.at)+len(identifiers.at) == 0 {
		return
	}
	r.printf("## Growth\n\nNanoseconds for an admission on one processor, and in brackets how many times that is of throttler's.\n\n")
	r.curve("buckets", "One hot identifier, from one bucket to eight", buckets)
	r.curve("identifiers", "Two buckets, all identifiers as likely", identifiers)
}

func (r *report) curve(what, title string, c curve) {
	if len(c.at) == 0 {
		return
	}
	rows := [][]string{{what}}
	var spread spreads
	for i, one := range c.rows[0] {
		cells := []string{r.name(&one.contender, nil)}
		for at := range c.at {
			cells = append(cells, timeCell(c.rows[at], i, &spread))
		}
		rows = append(rows, cells)
	}
	for _, n := range c.at {
		rows[0] = append(rows[0], thousands(n))
	}
	r.printf("### More %s\n\n", what)
	if len(c.at) > 1 {
		r.chart("growth-"+what+".svg", "Growth", lineChart(title, "nanoseconds for an admission: less is better", what, c, turn.nanoseconds))
	}
	r.table(rows)
	r.printf("%v", spread)
}

// server writes the tables of all cases with one server.
func (r *report) server(name, version string, results []result, checks map[string]check) {
	if r.servers == nil {
		r.servers = map[string]bool{}
	}
	for one := range strings.SplitSeq(version, " and ") {
		r.servers[one] = true
	}
	r.printf("## %s\n\n%s, beside the clients on the same processors. The second column is how many times the decisions of a row throttler made; "+
		"processor times are of this process and of the server, for a decision. %s\n\n", name, version, legend)
	last := 0
	for i, result := range results {
		if result.crowd.identifiers != last {
			last = result.crowd.identifiers
			r.printf("### %s\n\n", title(count(last, "identifier")))
			r.crowdChart(name, last, results[i:])
		}
		r.crowd(result, checks)
	}
	var all []contender
	for _, one := range results[0].rows {
		all = append(all, one.contender)
	}
	r.checks(checks, all)
}

// crowdChart draws the results with this many identifiers.
func (r *report) crowdChart(name string, identifiers int, results []result) {
	var c curve
	for _, one := range results {
		if one.crowd.identifiers == identifiers {
			c.at, c.rows = append(c.at, one.crowd.goroutines), append(c.rows, one.rows)
		}
	}
	if len(c.at) > 1 {
		file := fmt.Sprintf("%s-%d.svg", strings.ReplaceAll(strings.ToLower(name), " ", "-"), identifiers)
		r.chart(file, name, lineChart(name+", two buckets, "+count(identifiers, "identifier"), "decisions a second: more is better", "goroutines", c, turn.perSecond))
	}
}

func (r *report) crowd(result result, checks map[string]check) {
	out := [][]string{{count(result.crowd.goroutines, "goroutine"), "decisions/s", "throttler makes", "p50", "p99", "client CPU", "server CPU"}}
	var spread spreads
	for i := range result.rows {
		out = append(out, r.crowdRow(result.rows, i, checks, &spread))
	}
	r.table(out)
	r.printf("%v", spread)
}

func (r *report) crowdRow(rows []row, i int, checks map[string]check, spread *spreads) []string {
	one := &rows[i]
	ratio := ""
	if i > 0 {
		n, s := rows[0].against(one)
		ratio, *spread = times(n), append(*spread, s)
	}
	server := "–"
	if one.turns[0].server >= 0 {
		server = micros(one.median(func(t turn) float64 { return t.server.Seconds() / float64(t.decisions) }))
	}
	return []string{
		r.name(&one.contender, checks), thousands(int(one.median(turn.perSecond))) + failures(one), ratio,
		micros(one.median(func(t turn) float64 { return t.p50.Seconds() })),
		micros(one.median(func(t turn) float64 { return t.p99.Seconds() })),
		micros(one.median(func(t turn) float64 { return t.client.Seconds() / float64(t.decisions) })),
		server,
	}
}

func (r *report) http(rows []row) {
	r.printf("## HTTP\n\nA net/http server on loopback that answers with two bytes, asked by wrk over 64 connections from the same processors. " +
		"All come from one address, which has two limits, in this process. The second column is how many times the requests of a row throttlerhttp served.\n\n")
	r.chart("http.svg", "HTTP", barChart("A server with middleware", "requests a second: more is better", "%.0f", rows, turn.perSecond))
	out := [][]string{{"", "requests/s", "throttlerhttp serves", "p50", "p99", "server CPU"}}
	var spread spreads
	for i := range rows {
		ratio := ""
		if i > 0 {
			n, s := rows[0].against(&rows[i])
			ratio, spread = times(n), append(spread, s)
		}
		out = append(out, []string{
			rows[i].name, thousands(int(rows[i].median(turn.perSecond))), ratio,
			micros(rows[i].median(func(t turn) float64 { return t.p50.Seconds() })),
			micros(rows[i].median(func(t turn) float64 { return t.p99.Seconds() })),
			micros(rows[i].median(func(t turn) float64 { return t.server.Seconds() / float64(t.decisions) })),
		})
	}
	r.table(out)
	r.printf("%v", spread)
}

func (r *report) noHTTP() {
	r.printf("## HTTP\n\nIt was left out: there was no wrk on the machine.\n\n")
}

// finish adds the beginning and the end of the report, and writes it to a folder or prints it.
func (r *report) finish(b *bench, began time.Time, out string) error {
	if r.body.Len() == 0 {
		return fmt.Errorf("no case matches %q", b.only)
	}
	text := r.head(b, began) + r.body.String() + r.tail()
	if out == "" {
		_, err := fmt.Print(text)
		return err
	}
	dir := filepath.Join(out, "benchmarks")
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for file, svg := range r.charts {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(svg), 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(out, "benchmarks.md"), []byte(text), 0o644)
}

func (r *report) head(b *bench, began time.Time) string {
	return fmt.Sprintf(`<!-- Written by "make bench". Do not edit: the next run overwrites it. -->

# Benchmarks

This module beside its peers and beside floors, which decide nothing, in one run on one machine. Run it on yours: `+"`make bench`"+`.

| | |
|---|---|
| date | %s, for %s |
| machine | %s |
| servers | %s |
| this module | %s |
| rounds | %d, in turns of %v with a server, %v in the process |

`, began.UTC().Format("2006-01-02 15:04 UTC"), time.Since(began).Round(time.Second), machine(), strings.Join(slices.Sorted(maps.Keys(r.servers)), ", "), commit(), b.rounds, b.d, b.quick())
}

func (r *report) tail() string {
	var out strings.Builder
	out.WriteString(method)
	out.WriteString("\n| peer | version |\n|---|---|\n")
	known := versions()
	for _, m := range slices.Sorted(maps.Keys(r.modules)) {
		fmt.Fprintf(&out, "| %s | %s |\n", m, known[m])
	}
	return out.String()
}

const method = `## Method

- A case runs in rounds. In each round every contender has a turn, in another order each time, so that a slow moment of the machine meets all.
- A figure is the median over the rounds. A ratio is the median of the ratios within each round.
- The limits are two for each identifier, by the defaults of each contender, and admit everything that is asked, where nothing else is said. throttler decides about both in one call, all or none; x/time and failsafe-go stand in a map behind a mutex, both limits of an identifier together; the other peers have a limiter for each limit and are called once for each, until one refuses. What a peer took from the first limit is gone when the second refuses.
- Every row is called through one function value that takes an identifier and returns whether it was admitted. Inside it a peer is called as its README calls it, and throttler by Consume, which the compiler inlines there as it does in a handler. The verdict is not kept, and its Levels are not read.
- In the process a turn begins with a new limiter, after a garbage collection; a tenth of its time before it does not count. With a server a limiter stays, and a fifth does not count. Each has a client of its own, with up to 256 connections to Redis, 64 to Postgres.
- The servers have their default settings, but that Redis saves nothing and that Postgres takes more connections. Postgres writes each commit to the disk, except for Unlogged. They share the processors with the clients.
- A call that fails counts as no decision; where some did it is said how many.
- Client CPU is getrusage of this process, which makes the calls; server CPU is INFO of Redis, and the schedstat of all processes of Postgres.
- throttler on Postgres has a timeout of 10 s, as the patterns have none; on Redis its own of 250 ms.
- "SELECT FOR UPDATE" is the pattern of Bucket4j (Java), "upsert per limit" that of rate-limiter-flexible (Node), written in Go.
- Of 10,000,000 identifiers there is one turn, of some of the contenders, and none where the memory of the machine would not do.
`

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return thousands(n) + " " + what + "s"
}

func title(s string) string {
	if strings.HasPrefix(s, "1 ") {
		return "One hot" + s[1:]
	}
	return s
}

// number formats x with three digits, or with all of its digits before the point if these are more.
func number(x float64) string {
	switch {
	case x >= 1000:
		return thousands(int(math.Round(x)))
	case x >= 100:
		return fmt.Sprintf("%.0f", x)
	case x >= 10:
		return fmt.Sprintf("%.1f", x)
	}
	return fmt.Sprintf("%.2f", x)
}

func times(x float64) string { return number(x) + "×" }

func micros(seconds float64) string {
	if seconds >= 0.01 {
		return number(seconds*1e3) + " ms"
	}
	return number(seconds*1e6) + " µs"
}

func thousands(n int) string {
	text := fmt.Sprint(n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
