// The admin page: what the rules do now, why they apply to a request, and an editor that calls the admin API.

package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-throttler/throttler/rules"
)

//go:embed page.html
var pageHTML string

var pages = template.Must(template.New("").Funcs(template.FuncMap{"rate": rate, "seconds": seconds}).Parse(pageHTML))

// writePage writes a whole page. The page loads nothing from elsewhere: its Content-Security-Policy allows only its own
// style and script, by their hashes.
func writePage(w http.ResponseWriter, name string, status int, data any) {
	var out bytes.Buffer
	if err := pages.ExecuteTemplate(&out, name, data); err != nil {
		problem(w, http.StatusInternalServerError, errInternal.Error())
		return
	}
	w.Header().Set("Content-Security-Policy", fmt.Sprintf("default-src 'none'; style-src %s; script-src %s; connect-src 'self'; img-src data:; "+
		"base-uri 'none'; form-action 'self'; frame-ancestors 'none'", hashOf(out.Bytes(), "style"), hashOf(out.Bytes(), "script")))
	w.Header().Set("Referrer-Policy", "no-referrer")
	writeHTML(w, status, out.Bytes())
}

// hashOf returns the policy's source expression for the text of the page's only element of a kind.
func hashOf(page []byte, kind string) string {
	_, rest, _ := bytes.Cut(page, []byte("<"+kind+">"))
	text, _, _ := bytes.Cut(rest, []byte("</"+kind+">"))
	sum := sha256.Sum256(text)
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

func writeHTML(w http.ResponseWriter, status int, html []byte) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = w.Write(html) // fails only if the client has gone
}

// writePart writes a fragment that the page's script inserts into the page.
func writePart(w http.ResponseWriter, name string, data any) {
	var out bytes.Buffer
	if err := pages.ExecuteTemplate(&out, name, data); err != nil {
		problem(w, http.StatusInternalServerError, errInternal.Error())
		return
	}
	writeHTML(w, http.StatusOK, out.Bytes())
}

// page is GET /.
func (a *admin) page(w http.ResponseWriter, _ *http.Request) {
	writePage(w, "page", http.StatusOK, a.rulesNow(""))
}

// pageRules is GET /page/rules: the table of what the rules do. ?find= filters it by a part of the domain, ID or limits.
func (a *admin) pageRules(w http.ResponseWriter, r *http.Request) {
	writePart(w, "rules", a.rulesNow(r.URL.Query().Get("find")))
}

// maxRows is how many rules the page shows at once.
const maxRows = 200

// rulesNow is the content of the table.
type rulesNow struct {
	Rows     []row
	Found    int // rows that match, including those beyond maxRows
	Domains  []string
	Writable bool
	Error    string // why newer rules are not in force
}

// row is one rule.
type row struct {
	Domain, Rule, Limits, Note string
	File                       string // "" for limits that requests bring
	Line                       int

	Allowed, Denied           float64 // requests a second, of about the last ten; Denied includes what shadows would have denied
	AllowedTotal, DeniedTotal int64   // since the daemon started; Denied as above
	Failed                    int64   // could not be decided, or were admitted without a limit because the storage failed
}

func (a *admin) rulesNow(find string) rulesNow {
	set := a.engine.Rules()
	now := rulesNow{Domains: set.Domains(), Writable: a.store != nil}
	if err := a.engine.Err(); err != nil {
		now.Error = err.Error()
	}
	written := map[ruleName]*rules.Rule{}
	for _, r := range set.Rules() {
		written[nameOf(r)] = r
	}
	for _, active := range a.activity.all(time.Now()) {
		one := rowOf(&active, written[ruleName{active.domain, active.id}])
		if strings.Contains(one.Domain+" "+one.Rule+" "+one.Limits, find) {
			now.Rows = append(now.Rows, one)
		}
	}
	now.Found = len(now.Rows)
	busiest := func(x, y row) int { return cmp.Compare(y.Allowed+y.Denied, x.Allowed+x.Denied) }
	if now.Found > maxRows {
		slices.SortStableFunc(now.Rows, busiest)
		now.Rows = now.Rows[:maxRows]
	}
	return now
}

func rowOf(a *ruleActivity, r *rules.Rule) row {
	out := row{
		Domain: a.domain, Rule: a.id, Note: "limits of requests",
		Allowed: a.rate[allowed], Denied: a.rate[denied] + a.rate[wouldDeny],
		AllowedTotal: a.total[allowed], DeniedTotal: a.total[denied] + a.total[wouldDeny], Failed: a.total[failed] + a.total[bypassed],
	}
	if r == nil {
		return out
	}
	out.File, out.Line, out.Note = r.File, r.Line, ""
	var limits []string
	for i := range r.Limits {
		words, _, _ := strings.Cut(r.Limits[i].String(), " named ") // the name is mostly that of the rule
		limits = append(limits, words)
	}
	out.Limits = strings.Join(limits, ", ")
	switch {
	case r.Unlimited:
		out.Limits = "unlimited"
	case r.Shadow, r.Quota:
		out.Note = "never denies"
	}
	return out
}

// explained is the answer to "what would happen to this request?".
type explained struct {
	Problem string // why there is no answer
	Denied  bool
	By      []string // the rules that deny
	Wait    time.Duration
	Applied []appliedRow
	Others  []otherRow
	More    int // number of others that are not shown
}

type appliedRow struct {
	Rule, Note string
	Cost       int64
	Levels     []levelRow
}

type levelRow struct {
	Name             string
	Remaining, Limit int64
	Denies           bool
}

type otherRow struct{ Rule, Why string }

// pageMatch is GET /page/match, with the parameters of GET /v1/match: which rules apply, whether they would admit the
// request now, and why the others do not apply.
func (a *admin) pageMatch(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	entries, err := entriesOf(query["entry"])
	if err != nil {
		writePart(w, "match", explained{Problem: err.Error()})
		return
	}
	out := explained{}
	for _, x := range a.engine.Rules().Explain(query.Get("domain"), entries) {
		switch {
		case x.Applies:
		case len(out.Others) < maxRows:
			out.Others = append(out.Others, otherRow{x.Rule.ID, x.Why})
		default:
			out.More++
		}
	}
	d := &decision{}
	d.v, d.applied, d.err = a.engine.Decide(r.Context(), rules.Request{Domain: query.Get("domain"), Mode: rules.Peek, Entries: entries})
	out.decided(d)
	writePart(w, "match", out)
}

func (x *explained) decided(d *decision) {
	if !d.denied() {
		x.Problem = title(d.err)
	}
	x.Denied, x.By, x.Wait = !d.v.Allowed, d.deniedBy(), d.v.RetryAfter
	for i := range d.applied {
		a := &d.applied[i]
		one := appliedRow{Rule: a.Rule.ID, Cost: a.Cost}
		switch {
		case a.Rule.Unlimited:
			one.Note = "unlimited"
		case a.Rule.Shadow || a.Rule.Quota:
			one.Note = "never denies"
		}
		for _, l := range a.Levels {
			one.Levels = append(one.Levels, levelRow{l.Bucket, l.Remaining, l.Limit, l.RetryAfter > 0 || l.Limit < a.Cost})
		}
		x.Applied = append(x.Applied, one)
	}
}

// rate formats a rate, with one decimal where that matters: above 0 and below 10.
func rate(f float64) string {
	if f == 0 || f >= 10 {
		return strconv.FormatFloat(math.Round(f), 'f', 0, 64)
	}
	return strconv.FormatFloat(f, 'f', 1, 64)
}

// seconds formats a duration, rounded up to a tenth, so that nobody retries too early.
func seconds(d time.Duration) string {
	return strconv.FormatFloat(math.Ceil(d.Seconds()*10)/10, 'f', -1, 64)
}
