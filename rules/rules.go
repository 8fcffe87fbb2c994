// Package rules decides by rules that an operator writes in files and may change while the program runs.
//
//	domain: api
//	rules:
//	  - name: api
//	    when: {path: /api/*}                # all of them; a list means any of; * matches anything
//	    per: [user]                         # one set of buckets for each value; none: one for everybody
//	    limits: [5/10s, 100/1h sliding]     # the words of throttler.ParseBucket
//	  - name: gold
//	    when: {path: /api/*, plan: gold}
//	    per: [user]
//	    limits: [100/10s continuous burst 200]
//	    replaces: [api]
//
// An Engine loads the rules from a Source and decides:
//
//	engine, err := rules.NewEngine(t, rules.Files("rules.d"), nil)   // looks for changes until Close
//	v, applied, err := engine.Decide(ctx, rules.Request{Domain: "api", Entries: []rules.Entry{{"path", "/api/x"}, {"user", "42"}}})
//
// Every rule that matches a request applies to it. All of their buckets are one decision, all or nothing: a request that
// one rule denies takes nothing from the others.
//
// Files of envoyproxy/ratelimit load unchanged. Both kinds may be YAML or JSON. docs/rules.md describes every word and
// the differences from envoyproxy/ratelimit.
package rules

import (
	"cmp"
	"slices"

	"github.com/go-throttler/throttler"
)

// DefaultDomain is the domain of a file or a Request that names none.
const DefaultDomain = "default"

// File is the text of one file of rules. Faults and Rule.File carry its Name.
type File struct {
	Name string
	Data []byte
}

// Entry is a fact about a request, such as its path or its sender.
type Entry struct{ Key, Value string }

// Rule limits the requests that it matches. It never changes: treat its slices and maps as read-only.
type Rule struct {
	// Domain and Name are as written in the file. In a file of envoyproxy/ratelimit, where a name is optional, Name is
	// that of the rate_limit and may be "".
	Domain, Name string

	// ID names the rule within its domain, for logs and metrics. It is the Name, or in a file of envoyproxy/ratelimit the
	// keys and values, such as "key_value.key".
	ID string

	// File, Line and Column are where the rule is written. Line is 0 for the limit of a request (Descriptor.Limit).
	File         string
	Line, Column int

	// Limits are the buckets of the rule; there are none if it is Unlimited. Unless the file names a bucket, its name is
	// "rule/period" followed by the kind, or without "rule/" in a file of envoyproxy/ratelimit.
	Limits    []throttler.Bucket
	Unlimited bool

	// A Shadow rule is decided and counted, but never denies.
	Shadow bool

	// Quota is quota_mode of a file of envoyproxy/ratelimit. The rule never denies, as with Shadow, but callers are told
	// that it would.
	Quota bool

	// A Charge rule takes the cost whatever is left, and may leave a debt: it is for costs that are known only
	// afterwards. It never denies a cost above 0, of which it records what Throttler.Charge can. It denies a cost of 0
	// while not even one token is left.
	Charge bool

	// Metadata is for the program that reads the rule. The engine does not look at it.
	Metadata map[string]any

	// DetailedMetric and ValueToMetric are the settings of the same names in a file of envoyproxy/ratelimit.
	DetailedMetric, ValueToMetric bool

	domain     *domain
	order      int // position among the native rules of its domain
	conditions []condition
	rest       []*condition // all conditions but the one by which the matcher finds the rule
	per        []string
	cost       cost
	replaces   []string
	using      throttler.Option
	path       path   // of a file of envoyproxy/ratelimit, otherwise nil
	prefix     string // of its identifiers
}

// Mode says what a Request does with the tokens.
type Mode uint8

// The modes of a Request.
const (
	Consume Mode = iota // take tokens if every rule admits
	Peek                // answer as Consume would, and take nothing
	Charge              // take tokens even if there are too few: for costs that are known only afterwards; may leave a debt
)

// Request asks for one decision: all of its descriptors are admitted, or none. It has at most 256 Descriptors of at most
// 64 entries each, whose keys and values have at most 256 KiB.
type Request struct {
	Domain string // whose rules apply; "" is DefaultDomain
	Mode   Mode

	// Entries and Cost describe the request if it has one Descriptor without a Limit, as most have.
	Entries []Entry
	Cost    *int64

	// Descriptors are further descriptions. The rules match each of them separately.
	Descriptors []Descriptor
}

// Descriptor is one of several descriptions of a request.
type Descriptor struct {
	// Entries are the facts. Their order matters only to rules of envoyproxy/ratelimit files.
	Entries []Entry

	// Cost is in tokens, 0 or more; nil is 1. A cost of 0 takes nothing.
	Cost *int64

	// GiveBack gives the cost back instead of taking it, if everything else in the request is admitted: see
	// Throttler.GiveBack. No bucket becomes more than full. Nothing denies it; a Peek only looks. Its rules replace none of
	// the descriptors that take.
	GiveBack bool

	// Limit, if not nil, replaces the rules: it limits the entries, with one bucket for each combination of values.
	// Envoy's limit overrides use it. If descriptors have the same entries, all of their limits count; of those with the
	// same name, period and kind the smallest. The domain must have rules, otherwise nothing limits the request.
	Limit *throttler.Bucket
}

// Applied is a rule that applied to a descriptor.
type Applied struct {
	Rule       *Rule
	Descriptor int   // index of the descriptor: Request.Entries, if there are any, then Request.Descriptors
	Cost       int64 // in tokens, asked of each bucket

	// Denied reports that the rule denies, or for a Shadow or Quota rule that it would.
	Denied bool

	// Levels describe the rule's buckets after the decision, in the order of Rule.Limits. There are none if the rule is
	// Unlimited, if it was charged, if the storage could not tell, or for a Shadow or Quota rule of a request that other
	// rules denied.
	Levels []throttler.Level

	fromEntry bool // the Cost is the value of an entry, times the factor
	back      bool // the Cost was given back
}

// Set is a compiled set of rules. It never changes and is safe for concurrent use. The zero value has no rules.
type Set struct {
	rules   []*Rule
	domains map[string]*domain
	etag    string
}

// domain holds the rules of one domain.
type domain struct {
	name    string
	rules   []*Rule
	names   map[string]*Rule
	matcher matcher // of native rules
	tree    *node   // of envoyproxy/ratelimit files, nil without one
}

// Rules returns all rules, in the order of the files.
func (s *Set) Rules() []*Rule { return slices.Clone(s.rules) }

// Domains returns the names of the domains that have rules, sorted.
func (s *Set) Domains() []string {
	var names []string
	for name := range s.domains {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// ETag returns a hash of the files' names and data: the same files in the same order have the same ETag.
func (s *Set) ETag() string { return s.etag }

// Match returns the rules that apply to a descriptor: first the rules of native files, in their order, then the one of an
// envoyproxy/ratelimit file. Rules that a matching rule replaces are left out. An unknown domain has none.
func (s *Set) Match(domain string, entries []Entry) []*Rule {
	return s.AppendMatch(nil, domain, entries)
}

// AppendMatch is Match, but appends to dst. It does not allocate if dst has room.
func (s *Set) AppendMatch(dst []*Rule, domain string, entries []Entry) []*Rule {
	d := s.domain(domain)
	if d == nil {
		return dst
	}
	return unreplaced(d.match(dst, entries), len(dst))
}

func (s *Set) domain(name string) *domain { return s.domains[cmp.Or(name, DefaultDomain)] }

// match appends the rules that match, including those that others of them replace.
func (d *domain) match(dst []*Rule, entries []Entry) []*Rule {
	dst = d.matcher.match(dst, entries)
	if r := d.tree.find(entries); r != nil {
		dst = append(dst, r)
	}
	return dst
}

// unreplaced removes from all[n:] the rules that others in all[n:] replace.
func unreplaced(all []*Rule, n int) []*Rule {
	matched := all[n:]
	if !slices.ContainsFunc(matched, func(r *Rule) bool { return r.replaces != nil }) {
		return all
	}
	var kept [16]*Rule
	return append(all[:n], keep(kept[:0], matched)...)
}

func keep(dst, matched []*Rule) []*Rule {
	for _, r := range matched {
		if !isReplaced(r, matched) {
			dst = append(dst, r)
		}
	}
	return dst
}

func isReplaced(r *Rule, by []*Rule) bool { return slices.ContainsFunc(by, r.isReplacedBy) }

func (r *Rule) isReplacedBy(other *Rule) bool {
	return other != r && r.Name != "" && (slices.Contains(other.replaces, r.Name) || slices.Contains(other.replaces, everything))
}

// everything, in replaces, replaces all other rules.
const everything = "*"
