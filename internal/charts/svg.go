package main

import (
	"bytes"
	"fmt"
)

// Positions and sizes in the picture, in pixels. A second has 18 pixels: so a step is a whole number of tenths of a
// pixel, and nothing is rounded differently on another machine.
const (
	left    = 72
	right   = left + 540
	banner  = 52 // the top of the shaded window, with its label
	full    = 76 // the level of a full bucket
	token   = 9  // the height of a token
	empty   = full + capacity*token
	ground  = 186 // the lowest call; calls of one step are stacked
	stack   = 9   // the distance of stacked calls
	axis    = 196
	caption = 212
)

// head begins the picture. It draws a background, so that the picture can be read on a page of any colour.
const head = `<svg xmlns="http://www.w3.org/2000/svg" width="640" height="224" viewBox="0 0 640 224" role="img">
<title>%[1]s, %[2]d per %[3]d s: in the worst %[3]d s %[4]d calls are admitted</title>
<style>
text,.of{font:12px system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;fill:#59636e}
.card{fill:#fff;stroke:#d1d9e0}.grid{stroke:#e3e8ed}.axis{stroke:#9aa4af}
.name{font-size:15px;font-weight:600;fill:#1f2328}.mid{text-anchor:middle}.end{text-anchor:end}
.worst{fill:#f59e0b;fill-opacity:.17}.label{fill:#9a4f00;font-weight:600}
.level{fill:none;stroke:#0f8a7e;stroke-width:1.8;stroke-linejoin:round}
.yes{fill:#2f6feb;stroke:#2f6feb}.no{fill:none;stroke:#8b949e}
@media(prefers-color-scheme:dark){text,.of{fill:#9ea7b1}.card{fill:#151b23;stroke:#3d444d}.grid{stroke:#2a313a}
.axis{stroke:#656c76}.name{fill:#f0f6fc}.label{fill:#f5b544}.level{stroke:#2dd4bf}.yes{fill:#6ea8ff;stroke:#6ea8ff}}
</style>
<defs><circle id="c" r="3.5"/></defs>
<rect class="card" x=".5" y=".5" width="639" height="223" rx="8"/>
<text class="name" x="16" y="25">%[1]s<tspan class="of" dx="9">%[2]d per %[3]d s</tspan></text>
<text x="16" y="43">%[5]s</text>
`

const legend = `<path class="level" d="M382 20.5h18"/><text x="406" y="25">tokens left</text>
<use href="#c" class="yes" x="489" y="20.5"/><text x="498" y="25">admitted</text>
<use href="#c" class="no" x="567" y="20.5"/><text x="576" y="25">refused</text>
`

// svg returns the content of the chart's file.
func (c chart) svg() []byte {
	var b bytes.Buffer
	r := c.run()
	from, most := r.worst(period)
	fmt.Fprintf(&b, head, c.name, capacity, period/1_000_000, most, c.client)
	b.WriteString(legend)
	drawWorst(&b, from, most)
	drawAxes(&b)
	drawLevels(&b, r.levels)
	drawCalls(&b, r.calls)
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// x returns the horizontal position of a time, in pixels with at most one decimal.
func x(at int64) string {
	tenths := left*10 + at*180/1_000_000
	if tenths%10 == 0 {
		return fmt.Sprint(tenths / 10)
	}
	return fmt.Sprintf("%d.%d", tenths/10, tenths%10)
}

// drawWorst shades the window in which most calls are admitted.
func drawWorst(b *bytes.Buffer, from int64, most int) {
	fmt.Fprintf(b, `<rect class="worst" x="%s" y="%d" width="%d" height="%d"/>`+"\n", x(from), banner, period*18/1_000_000, axis-banner)
	fmt.Fprintf(b, `<text class="label mid" x="%s" y="%d">worst %d s: %d admitted</text>`+"\n", x(from+period/2), banner+15, period/1_000_000, most)
}

// drawAxes draws the grid, the axes and their labels.
func drawAxes(b *bytes.Buffer) {
	for s := int64(0); s <= steps*step; s += period / 2 {
		fmt.Fprintf(b, `<path class="grid" d="M%s %dV%d"/>`, x(s), full, axis)
		fmt.Fprintf(b, `<text class="mid" x="%s" y="%d">%d s</text>`+"\n", x(s), caption, s/1_000_000)
	}
	fmt.Fprintf(b, `<path class="axis" d="M%d %dH%dM%[1]d %[4]dH%[3]d"/>`+"\n", left, empty, right, axis)
	fmt.Fprintf(b, `<text x="16" y="%d">tokens</text><text class="end" x="%d" y="%d">%d</text><text class="end" x="%[2]d" y="%[5]d">0</text>`+"\n",
		(full+empty)/2+4, left-6, full+4, capacity, empty+4)
	fmt.Fprintf(b, `<text x="16" y="%d">calls</text>`+"\n", (empty+axis)/2+4)
}

// drawLevels draws the line of the tokens that are left. It rises when tokens come back and falls when they are
// taken, even if both happen in one step.
func drawLevels(b *bytes.Buffer, levels []level) {
	last := levels[0].before
	fmt.Fprintf(b, `<path class="level" d="M%d %d`, left, height(last))
	for i, l := range levels {
		if l.before == last && l.after == last {
			continue
		}
		fmt.Fprintf(b, "H%s", x(int64(i)*step))
		if l.before != last {
			fmt.Fprintf(b, "V%d", height(l.before))
		}
		if l.after != l.before {
			fmt.Fprintf(b, "V%d", height(l.after))
		}
		last = l.after
	}
	fmt.Fprintf(b, `H%d"/>`+"\n", right)
}

// height returns the vertical position of a number of tokens.
func height(tokens int64) int64 { return empty - tokens*token }

// drawCalls draws a mark for each call, and stacks those of one step.
func drawCalls(b *bytes.Buffer, calls []call) {
	below := 0
	for i, c := range calls {
		if below++; i == 0 || calls[i-1].at != c.at {
			below = 0
		}
		class := "no"
		if c.admitted {
			class = "yes"
		}
		fmt.Fprintf(b, `<use href="#c" class="%s" x="%s" y="%d"/>`+"\n", class, x(c.at), ground-below*stack)
	}
}
