package watch

// The page: HTML that is made here, and made again each second for each viewer.

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html/template"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/go-throttler/throttler/internal/period"
)

//go:embed page.html
var pageHTML string

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"rate": rate, "count": count, "share": share, "took": took, "between": between, "printable": printable, "limit": limit, "chart": newChart, "pairs": pairs,
}).Parse(pageHTML))

// ServeHTTP serves the page at a path that ends with a slash, such as /debug/throttler/. Beside it, json is the Snapshot,
// and events is the main part of the page each second, as server-sent events. It only reads. Everybody who may call it
// sees identifiers, so put it behind a login. Let the contexts of requests end when the server shuts down
// (http.Server.BaseContext); otherwise Shutdown waits for those who have the page open.
func (w *Watch) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	h := rw.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		h.Set("Allow", "GET, HEAD")
		http.Error(rw, "this only reads", http.StatusMethodNotAllowed)
		return
	}
	switch r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:] {
	case "":
		w.servePage(rw)
	case "json":
		w.serveJSON(rw)
	case "events":
		w.serveEvents(rw, r)
	default:
		http.NotFound(rw, r)
	}
}

func (w *Watch) servePage(rw http.ResponseWriter) {
	out, err := w.render("page")
	if err != nil {
		http.Error(rw, err.Error(), http.StatusInternalServerError)
		return
	}
	rw.Header().Set("Content-Type", "text/html; charset=utf-8")
	rw.Header().Set("Content-Security-Policy", fmt.Sprintf("default-src 'none'; style-src %s; script-src %s; connect-src 'self'; img-src data:; "+
		"base-uri 'none'; form-action 'none'; frame-ancestors 'none'", hash(out, "style"), hash(out, "script")))
	_, _ = rw.Write(out) // fails only if the client has gone
}

// hash returns the policy's source expression for the text of the page's only element of a kind.
func hash(page []byte, kind string) string {
	_, rest, _ := bytes.Cut(page, []byte("<"+kind+">"))
	text, _, _ := bytes.Cut(rest, []byte("</"+kind+">"))
	sum := sha256.Sum256(text)
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

func (w *Watch) render(name string) ([]byte, error) {
	var out bytes.Buffer
	err := page.ExecuteTemplate(&out, name, w.Snapshot())
	return out.Bytes(), err
}

func (w *Watch) serveJSON(rw http.ResponseWriter) {
	out, err := json.Marshal(w.Snapshot())
	if err != nil {
		http.Error(rw, "watch: Options.State: "+err.Error(), http.StatusInternalServerError)
		return
	}
	rw.Header().Set("Content-Type", "application/json")
	_, _ = rw.Write(out) // as above
}

// serveEvents sends the main part of the page each second, until the client leaves or the server ends.
func (w *Watch) serveEvents(rw http.ResponseWriter, r *http.Request) {
	rw.Header().Set("Content-Type", "text/event-stream")
	if r.Method == http.MethodHead {
		return
	}
	if err := http.NewResponseController(rw).Flush(); err != nil {
		http.Error(rw, "watch: cannot send events: "+err.Error()+": a middleware has put a ResponseWriter without Unwrap in between", http.StatusInternalServerError)
		return
	}
	each := time.NewTicker(time.Second)
	defer each.Stop()
	for w.sendEvent(r.Context(), rw) == nil {
		select {
		case <-each.C:
		case <-r.Context().Done():
			return
		}
	}
}

// sendEvent sends the main part once. An empty line ends an event and each line of data needs a prefix, so newlines in
// the HTML become spaces.
func (w *Watch) sendEvent(ctx context.Context, rw http.ResponseWriter) error {
	out, err := w.render("now")
	if err != nil {
		return err
	}
	out = bytes.Map(func(r rune) rune {
		if r == '\n' || r == '\r' {
			return ' '
		}
		return r
	}, out)
	to := http.NewResponseController(rw)
	_ = to.SetWriteDeadline(time.Now().Add(10 * time.Second)) // where it cannot be set, WriteTimeout ends this, and the page asks again
	if _, err := fmt.Fprintf(rw, "retry: 1000\ndata: %s\n\n", out); err != nil {
		return err
	}
	if err := to.Flush(); err != nil {
		return err
	}
	return ctx.Err()
}

// The functions that the template uses.

// rate formats a rate with one decimal below 9.95 and none above.
func rate(f float64) string {
	if f == 0 || f >= 9.95 {
		return count(int64(f + 0.5))
	}
	return strconv.FormatFloat(f, 'f', 1, 64)
}

// count formats a number with a comma between thousands.
func count(n int64) string {
	text := strconv.FormatInt(n, 10)
	for i := len(text) - 3; i > 0 && text[i-1] != '-'; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

func share(part, of int64) string {
	if of == 0 {
		return "0 %"
	}
	return rate(100*float64(part)/float64(of)) + " %"
}

// took rounds a duration to two digits.
func took(d time.Duration) string {
	unit := time.Duration(1)
	for d/unit >= 100 {
		unit *= 10
	}
	return d.Round(unit).String()
}

// between formats a count, or its bounds if they differ.
func between(most, least int64) string {
	if most == least {
		return count(most)
	}
	return count(least) + " – " + count(most)
}

// printable quotes an identifier that would not show as it is. The NUL that package throttlerhttp puts before a route is
// shown as a dot instead.
func printable(id string) string {
	text := strings.ReplaceAll(id, "\x00", " · ")
	for _, r := range text {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return strconv.Quote(id)
		}
	}
	return text
}

func limit(b Bucket) string {
	if b.Period == 0 { // a limit of 0 is one that admits nothing
		return "" // the bucket "other" stands for many
	}
	return count(b.Limit) + " in " + period.Format(b.Period)
}

// pair is a field of Options.State.
type pair struct{ Key, Value string }

func pairs(state any) (out []pair) {
	text, err := json.Marshal(state)
	if err != nil {
		return []pair{{"error", err.Error()}}
	}
	in := json.NewDecoder(bytes.NewReader(text))
	if t, _ := in.Token(); t != json.Delim('{') {
		return []pair{{"state", string(text)}}
	}
	for in.More() {
		var value json.RawMessage
		key, _ := in.Token()
		if in.Decode(&value) != nil {
			break
		}
		text := ""
		if json.Unmarshal(value, &text) != nil {
			text = string(value) // not a string: shown as JSON
		}
		out = append(out, pair{fmt.Sprint(key), text})
	}
	return out
}

// chart is a picture of decisions: areas stacked on each other, in a frame of 1000 by 100.
type chart struct {
	Most  float64 // decisions a second at the upper edge
	Areas []area
}

type area struct{ Class, Points string }

func newChart(seconds []Second) (c chart) {
	for _, s := range seconds {
		c.Most = max(c.Most, s.Allowed+s.Bypassed+s.Denied+s.Failed)
	}
	below := make([]float64, len(seconds))
	c.pile("allowed", below, seconds, func(s Second) float64 { return s.Allowed })
	c.pile("bypassed", below, seconds, func(s Second) float64 { return s.Bypassed })
	c.pile("denied", below, seconds, func(s Second) float64 { return s.Denied })
	c.pile("failed", below, seconds, func(s Second) float64 { return s.Failed })
	return c
}

// pile stacks an area on those below, unless it is empty.
func (c *chart) pile(class string, below []float64, seconds []Second, of func(Second) float64) {
	var upper, lower []string
	empty, last := true, len(seconds)-1
	point := func(i int) string {
		return fmt.Sprintf("%.0f,%.1f", 1000*float64(i)/float64(last), 100-100*below[i]/max(1, c.Most))
	}
	for i := range seconds {
		lower = append(lower, point(last-i))
	}
	for i, s := range seconds {
		empty = empty && of(s) == 0
		below[i] += of(s)
		upper = append(upper, point(i))
	}
	if !empty {
		c.Areas = append(c.Areas, area{class, strings.Join(append(upper, lower...), " ")})
	}
}
