package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// A picture has its own background, so that it can be read on any page. throttler is blue, and floors are dashed.
const svgHead = `<svg xmlns="http://www.w3.org/2000/svg" width="640" height="%[1]d" viewBox="0 0 640 %[1]d" role="img">
<title>%[2]s</title>
<style>
text,.of{font:12px system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;fill:#59636e}
.card{fill:#fff;stroke:#d1d9e0}.grid{stroke:#e3e8ed}
.name{font-size:15px;font-weight:600;fill:#1f2328}.mid{text-anchor:middle}.end{text-anchor:end}
.bar{fill:#afb8c1}.us{fill:#2f6feb}.idle{fill:none;stroke:#afb8c1;stroke-dasharray:4 3}
.line{fill:none;stroke:#8b949e;stroke-width:1.4}.line.us{fill:none;stroke:#2f6feb;stroke-width:2.6}.line.idle{stroke-dasharray:4 3}
text.us{fill:#2f6feb;font-weight:600}
@media(prefers-color-scheme:dark){text,.of{fill:#9ea7b1}.card{fill:#151b23;stroke:#3d444d}.grid{stroke:#2a313a}.name{fill:#f0f6fc}
.bar{fill:#656c76}.us,text.us{fill:#6ea8ff}.idle{fill:none;stroke:#656c76}.line.us{fill:none;stroke:#6ea8ff}}
</style>
<rect class="card" x=".5" y=".5" width="639" height="%[3]d" rx="8"/>
<text class="name" x="16" y="25">%[2]s</text>
<text x="16" y="43">%[4]s</text>
`

func svgStart(height int, title, what string) *strings.Builder {
	var s strings.Builder
	fmt.Fprintf(&s, svgHead, height, html.EscapeString(title), height-1, html.EscapeString(what))
	return &s
}

// class returns the style of row i: ours, a floor's or a peer's.
func class(rows []row, i int) string {
	switch {
	case i == 0:
		return " us"
	case rows[i].idle:
		return " idle"
	}
	return ""
}

// barChart draws a bar for each row, as long as its figure.
func barChart(title, what, format string, rows []row, figure func(turn) float64) string {
	const step, from, long = 24, 190, 370
	most := 0.0
	for i := range rows {
		most = max(most, rows[i].median(figure))
	}
	s := svgStart(64+step*len(rows), title, what)
	for i := range rows {
		n, y := rows[i].median(figure), 58+step*i
		width := max(1, long*n/max(most, 1e-9))
		fmt.Fprintf(s, `<text class="end%s" x="%d" y="%d">%s</text>`, textClass(i), from-8, y+13, html.EscapeString(rows[i].name))
		fmt.Fprintf(s, `<rect class="bar%s" x="%d" y="%d" width="%.1f" height="16" rx="2"/>`, class(rows, i), from, y, width)
		fmt.Fprintf(s, `<text class="of%s" x="%.1f" y="%d">%s</text>`+"\n", textClass(i), from+width+6, y+13, grouped(fmt.Sprintf(format, n)))
	}
	return s.String() + "</svg>\n"
}

func textClass(i int) string {
	if i == 0 {
		return " us"
	}
	return ""
}

func grouped(digits string) string {
	var n int
	if _, err := fmt.Sscan(digits, &n); err != nil {
		return digits
	}
	return thousands(n)
}

// The area of a line chart that has the lines, in pixels.
const (
	plotLeft, plotRight = 70, 470
	plotTop, plotBottom = 62, 292
)

// lineChart draws a line for each row, through its figure at each place. Both axes are logarithmic.
func lineChart(title, what, axis string, c curve, figure func(turn) float64) string {
	low, high := extent(c, figure)
	x := func(n int) float64 {
		first, last := math.Log(float64(c.at[0])), math.Log(float64(c.at[len(c.at)-1]))
		return plotLeft + (plotRight-plotLeft)*(math.Log(float64(n))-first)/(last-first)
	}
	y := func(v float64) float64 {
		return plotBottom - (plotBottom-plotTop)*math.Log(v/low)/math.Log(high/low)
	}
	s := svgStart(330, title, what)
	drawGrid(s, c, axis, low, high, x, y)
	labels := make([]label, 0, len(c.rows[0]))
	for i := range c.rows[0] {
		if l, ok := drawLine(s, c, i, figure, x, y); ok {
			labels = append(labels, l)
		}
	}
	drawLabels(s, labels)
	return s.String() + "</svg>\n"
}

// extent returns a range that is a little wider than the range of the figures.
func extent(c curve, figure func(turn) float64) (low, high float64) {
	low = math.Inf(1)
	for _, rows := range c.rows {
		for i := range rows {
			if v := rows[i].median(figure); v > 0 {
				low, high = min(low, v), max(high, v)
			}
		}
	}
	return low / 1.1, high * 1.1
}

func drawGrid(s *strings.Builder, c curve, axis string, low, high float64, x func(int) float64, y func(float64) float64) {
	for decade := math.Pow(10, math.Floor(math.Log10(low))); decade < high; decade *= 10 {
		for _, v := range []float64{decade, 2 * decade, 5 * decade} {
			if v > low && v < high {
				fmt.Fprintf(s, `<path class="grid" d="M%d %.1fH%d"/><text class="end" x="%d" y="%.1f">%s</text>`+"\n",
					plotLeft, y(v), plotRight, plotLeft-6, y(v)+4, thousands(int(v)))
			}
		}
	}
	for _, n := range c.at {
		fmt.Fprintf(s, `<path class="grid" d="M%.1f %dV%d"/><text class="mid" x="%[1]f" y="%[4]d">%[5]s</text>`+"\n",
			x(n), plotTop, plotBottom, plotBottom+16, thousands(n))
	}
	fmt.Fprintf(s, `<text class="mid" x="%d" y="%d">%s</text>`+"\n", (plotLeft+plotRight)/2, plotBottom+32, axis)
}

// label is the name at the end of a line.
type label struct {
	text, class string
	y           float64
}

func drawLine(s *strings.Builder, c curve, i int, figure func(turn) float64, x func(int) float64, y func(float64) float64) (l label, ok bool) {
	var points []string
	for at, n := range c.at {
		if v := c.rows[at][i].median(figure); v > 0 {
			l.y = y(v)
			points = append(points, fmt.Sprintf("%.1f %.1f", x(n), l.y))
		}
	}
	if len(points) == 0 {
		return l, false
	}
	fmt.Fprintf(s, `<path class="line%s" d="M%s"/>`+"\n", class(c.rows[0], i), strings.Join(points, "L"))
	l.text, l.class = c.rows[0][i].name, textClass(i)
	return l, true
}

// drawLabels draws the labels and keeps them apart. First it moves each down if it is too close to the one above it.
func drawLabels(s *strings.Builder, labels []label) {
	slices.SortFunc(labels, func(a, b label) int { return int(math.Copysign(1, a.y-b.y)) })
	const apart = 14
	for i := range labels {
		if i > 0 {
			labels[i].y = max(labels[i].y, labels[i-1].y+apart)
		}
	}
	for i := len(labels) - 1; i >= 0; i-- { // then labels that are below the plot move up, and so do those above them
		lowest := float64(plotBottom)
		if i < len(labels)-1 {
			lowest = labels[i+1].y - apart
		}
		labels[i].y = min(labels[i].y, lowest)
	}
	for _, l := range labels {
		fmt.Fprintf(s, `<text class="of%s" x="%d" y="%.1f">%s</text>`+"\n", l.class, plotRight+8, l.y+4, html.EscapeString(l.text))
	}
}
