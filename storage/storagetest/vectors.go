package storagetest

import (
	"embed"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/period"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
)

// A vector file is a list of steps, played in order on one storage:
//
//	# a comment
//	bucket NAME CAPACITY/PERIOD [continuous|fixed|sliding|log] [burst N]
//	TIME take|peek|force PART [+ PART]… -> ok|no [TOOK] NAME=REMAINING/RESET[/RETRY]… [after DELAY]
//	TIME reserve WITHIN PART [+ PART]… -> the same
//	TIME charge ID NAME=N@IN…
//	TIME reset ID
//
// TIME is the time since the epoch, by an injected clock. A PART is ID [xCOST|<=COST] [NAME[=COST]]…: the buckets that
// it names, or all in the order of their definition. Without a cost it asks for 1; with <= it is AtMost. A bucket that
// is defined again has a new rule from then on.
//
// What follows -> is the expected answer. Each bucket has what remains, the time until it is full, and if it denied,
// the time until it would not. TOOK is how many tokens were taken, if a part is AtMost. DELAY is the time until what
// was reserved may be used.

//go:embed testdata/*.txt
var files embed.FS

// vectors plays every file, each on a name of its own.
func vectors(t *testing.T, s storage.Storage) {
	found, err := fs.Glob(files, "testdata/*.txt")
	require.NoError(t, err)
	require.NotEmpty(t, found)
	for _, file := range found {
		text, err := files.ReadFile(file)
		require.NoError(t, err)
		t.Run(path.Base(file), func(t *testing.T) {
			p := player{t: t, storage: s, name: newName()}
			for i, line := range strings.Split(string(text), "\n") {
				line, _, _ = strings.Cut(line, "#")
				if fields := strings.Fields(line); len(fields) > 0 {
					p.where = fmt.Sprintf("%s:%d: %s", path.Base(file), i+1, strings.TrimSpace(line))
					p.step(fields)
				}
			}
		})
	}
}

// player plays one file.
type player struct {
	t       *testing.T
	storage storage.Storage
	name    string
	rules   []law.Rule
	where   string
}

// step plays one line, which is split into fields.
func (p *player) step(fields []string) {
	p.t.Helper()
	if fields[0] == "bucket" {
		p.bucket(fields[1:])
		return
	}
	at := p.time(fields[0])
	switch verb := fields[1]; verb {
	case "reset":
		require.NoError(p.t, p.storage.Reset(p.t.Context(), p.name, fields[2]), p.where)
	case "charge":
		p.charge(at, fields[2], fields[3:])
	case "take", "peek", "force":
		asked, want, found := strings.Cut(strings.Join(fields[2:], " "), " -> ")
		require.True(p.t, found, "%s: no ->", p.where)
		mode := map[string]storage.Mode{"take": storage.Take, "peek": storage.Peek, "force": storage.Force}[verb]
		require.Equal(p.t, want, p.decide(at, mode, 0, asked), p.where)
	case "reserve":
		asked, want, found := strings.Cut(strings.Join(fields[3:], " "), " -> ")
		require.True(p.t, found, "%s: no ->", p.where)
		require.Equal(p.t, want, p.decide(at, storage.Take, p.time(fields[2]), asked), p.where)
	default:
		require.Fail(p.t, "unknown verb", p.where)
	}
}

var (
	limit = regexp.MustCompile(`^(\d+)/(.+)$`)
	asks  = regexp.MustCompile(`^(x|<=)(-?\d+)$`)
)

// bucket defines a bucket, or defines it again.
func (p *player) bucket(fields []string) {
	m := limit.FindStringSubmatch(fields[1])
	require.NotNil(p.t, m, p.where)
	capacity := p.number(m[1])
	kind, refill := law.Replenish, capacity
	for i := 2; i < len(fields); i++ {
		switch word := fields[i]; word {
		case "burst":
			i++
			capacity = p.number(fields[i])
		default:
			for kind.String() != word {
				kind++
				require.LessOrEqual(p.t, kind, law.SlidingLog, p.where)
			}
		}
	}
	period := time.Duration(p.time(m[2])) * time.Microsecond
	made, faults := law.NewRule(fields[0], kind, period, capacity, refill)
	require.Empty(p.t, faults, p.where)
	p.rules = append([]law.Rule(nil), p.rules...)
	for i := range p.rules {
		if p.rules[i].Name == made.Name {
			p.rules[i] = made
			return
		}
	}
	p.rules = append(p.rules, made)
}

// decide makes a request and returns its answer as the vectors write it.
func (p *player) decide(at int64, mode storage.Mode, within int64, asked string) string {
	r := storecheck.Request{Name: p.name, Mode: mode, Clocked: true, Now: at, Within: within}
	for _, words := range strings.Split(asked, " + ") {
		r.Parts = append(r.Parts, p.part(strings.Fields(words)))
	}
	v, err := storecheck.Decide(p.t.Context(), p.storage, r)
	require.NoError(p.t, err, p.where)
	return format(&v)
}

// format returns a verdict as the vectors write it.
func format(v *storecheck.Verdict) string {
	out := map[bool]string{true: "ok", false: "no"}[v.Allowed]
	for i := range v.Parts() {
		if v.Part(i).AtMost && v.Allowed {
			out += fmt.Sprint(" ", v.Tokens())
			break
		}
	}
	for _, l := range v.Levels() {
		out += fmt.Sprintf(" %s=%d/%s", l.Bucket, l.Remaining, period.Format(l.ResetAfter))
		if l.RetryAfter != 0 {
			out += "/" + period.Format(l.RetryAfter)
		}
	}
	if v.Delay > 0 {
		out += " after " + period.Format(v.Delay)
	}
	return out
}

// part reads a PART.
func (p *player) part(fields []string) storecheck.Part {
	cost, names, atMost := int64(1), fields[1:], false
	if len(names) > 0 {
		if m := asks.FindStringSubmatch(names[0]); m != nil {
			cost, names, atMost = p.number(m[2]), names[1:], m[1] == "<="
		}
	}
	if len(names) == 0 {
		part := storecheck.NewPart(p.id(fields[0]), p.rules, cost)
		part.AtMost = atMost
		return part
	}
	var rules []law.Rule
	for _, word := range names {
		name, _, _ := strings.Cut(word, "=")
		rules = append(rules, p.rule(name))
	}
	part := storecheck.NewPart(p.id(fields[0]), rules, cost)
	part.AtMost = atMost
	for i, word := range names {
		if _, n, found := strings.Cut(word, "="); found {
			part.Costs[i] = p.number(n)
		}
	}
	return part
}

// charge makes a charge. An amount below zero gives tokens back.
func (p *player) charge(at int64, id string, words []string) {
	c := storage.Charge{Name: p.name, Clocked: true, Now: at, Identifier: id}
	var rules []law.Rule
	for _, word := range words {
		name, amount, _ := strings.Cut(word, "=")
		n, in, found := strings.Cut(amount, "@")
		require.True(p.t, found, p.where)
		rules = append(rules, p.rule(name))
		c.Amounts = append(c.Amounts, storage.Amount{N: p.number(n), In: p.time(in)})
	}
	c.Rules = law.NewRuleSet(rules...)
	require.NoError(p.t, p.storage.Charge(p.t.Context(), &c), p.where)
}

// rule returns the rule of a defined bucket.
func (p *player) rule(name string) law.Rule {
	for _, r := range p.rules {
		if r.Name == name {
			return r
		}
	}
	require.Fail(p.t, "unknown bucket "+name, p.where)
	return law.Rule{}
}

// id reads an identifier. In quotes it may be empty, and x*N is x, N times.
func (p *player) id(word string) string {
	if text, times, found := strings.Cut(word, "*"); found {
		return strings.Repeat(text, int(p.number(times)))
	}
	return strings.Trim(word, `"`)
}

// number reads a number.
func (p *player) number(word string) int64 {
	p.t.Helper()
	n, err := strconv.ParseInt(word, 10, 64)
	require.NoError(p.t, err, p.where)
	return n
}

// time reads a duration and returns it in microseconds. It may have days and be a sum, such as 2d+3us.
func (p *player) time(word string) int64 {
	p.t.Helper()
	total := int64(0)
	for _, term := range strings.Split(word, "+") {
		if days, found := strings.CutSuffix(term, "d"); found {
			total += p.number(days) * 24 * time.Hour.Microseconds()
			continue
		}
		d, err := time.ParseDuration(term)
		require.NoError(p.t, err, p.where)
		total += d.Microseconds()
	}
	return total
}
