// Package rules decides by rules that an operator writes in files, and changes while the program runs.
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
// An Engine loads them from a Source and decides:
//
//	engine, err := rules.NewEngine(t, rules.Files("rules.d"), nil)   // looks for changes until Close
//	v, applied, err := engine.Decide(ctx, rules.Request{Domain: "api", Entries: []rules.Entry{{"path", "/api/x"}, {"user", "42"}}})
//
// Every rule that matches a request applies to it. The buckets of all of them are one decision, all or nothing: a
// request that one rule denies takes nothing from the others.
//
// Files of envoyproxy/ratelimit load unchanged, and both kinds may be YAML or JSON. docs/rules.md has every word, and what
// is different from envoyproxy/ratelimit.
package rules

import (
	"cmp"
	"slices"

	"github.com/go-throttler/throttler"
)

// DefaultDomain is that of a file, and of a Request, that names none.
const DefaultDomain = "default"

// File is a text of rules. Its Name stands in faults and in Rule.File.
type File struct {
	Name string
	Data []byte
}

// Entry is something that is known of a request, such as its path or who sent it.
type Entry struct{ Key, Value string }

// Rule limits the requests that it matches. It never changes: treat its slices and maps as read-only.
type Rule struct {
	// Domain and Name are what a file says. Of a file of envoyproxy/ratelimit, where a name is optional, Name is
	// that of the rate_limit, and may be "".
	Domain, Name string

	// ID names the rule in one domain, for logs and metrics: its Name, or in a file of envoyproxy/ratelimit its keys
	// and values, "key_value.key".
	ID string

	// File, Line and Column are where the rule is written. Line is 0 for the limit of a request (Descriptor.Limit).
	File         string
	Line, Column int

	// Limits are the buckets, none if the rule is Unlimited. Their names are "rule/period", followed by the kind, unless
	// the file names them.
	Limits    []throttler.Bucket
	Unlimited bool

	// Shadow rules are decided and counted, but never deny.
	Shadow bool

	// Quota is quota_mode of a file of envoyproxy/ratelimit: the rule never denies, as a Shadow, and callers are told
	// that it would.
	Quota bool

	// Charge rules take what they are asked for, whatever there is, and never deny a cost above 0: for costs that are
	// known only afterwards, and may leave a debt. A cost of 0 is denied while there is not one token.
	Charge bool

	// Metadata is for whoever asks: the engine does not look at it.
	Metadata map[string]any

	// DetailedMetric and ValueToMetric are what a file of envoyproxy/ratelimit says of the metrics of the rule.
	DetailedMetric, ValueToMetric bool

	domain     *domain
	order      int // in its domain
	conditions []condition
	rest       []*condition // without the one by which the rule is found
	per        []string
	cost       cost
	replaces   []string
	using      throttler.Option
	path       path   // of a file of envoyproxy/ratelimit, else nil
	prefix     string // of its identifiers
}

// Mode says what a Request does.
type Mode uint8

// The modes of a Request.
const (
	Consume Mode = iota // take if every rule admits
	Peek                // answer as Consume would, and take nothing
	Charge              // take whatever the answer is: for costs that are known only afterwards, which may leave a debt
)

// Request asks for one decision: all of its descriptors are admitted, or none.
type Request struct {
	Domain string // whose rules apply; "" is DefaultDomain
	Mode   Mode

	// Entries and Cost are the request, if it has one Descriptor without a Limit, as most have.
	Entries []Entry
	Cost    *int64

	// Descriptors are more of them, each of which the rules match by itself.
	Descriptors []Descriptor
}

// Descriptor is one of several descriptions of a request.
type Descriptor struct {
	// Entries are what is known. Their order counts in the rules of envoyproxy/ratelimit files only.
	Entries []Entry

	// Cost is in tokens, 0 or more; nil is 1. A cost of 0 takes nothing.
	Cost *int64

	// Limit, if not nil, limits the entries, each combination of which has its bucket, in place of the rules. It is
	// how the limit overrides of Envoy are said. The domain must have rules.
	Limit *throttler.Bucket
}

// Applied is a rule that applied to a descriptor.
type Applied struct {
	Rule       *Rule
	Descriptor int   // which: Request.Entries, if there are any, and then Request.Descriptors
	Cost       int64 // in tokens, that was asked of each bucket

	// Denied says that the rule denies, or if it is a Shadow or Quota, that it would.
	Denied bool

	// Levels are those of the rule's buckets after the decision, in the order of Rule.Limits. There are none if the
	// rule is Unlimited, if the storage could not tell, or if it is a Shadow or Quota of a request that others denied.
	Levels []throttler.Level
}

// Set is rules that were compiled. It never changes, and is safe for concurrent use. The zero value has no rules.
type Set struct {
	rules   []*Rule
	domains map[string]*domain
	etag    string
}

// domain has the rules of one name space.
type domain struct {
	name    string
	rules   []*Rule
	names   map[string]*Rule
	matcher matcher // of native rules
	tree    *node   // of envoyproxy/ratelimit files, nil without one
}

// Rules are all rules, in the order of the files.
func (s *Set) Rules() []*Rule { return slices.Clone(s.rules) }

// Domains are the names of the domains that have rules.
func (s *Set) Domains() []string {
	var names []string
	for name := range s.domains {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// ETag is a hash of the files: equal files in one order have equal ones.
func (s *Set) ETag() string { return s.etag }

// Match returns the rules that apply to a descriptor: first those of native files, in their order, then the one of an
// envoyproxy/ratelimit file. Rules that others replace are left out. An unknown domain has none.
func (s *Set) Match(domain string, entries []Entry) []*Rule {
	return s.AppendMatch(nil, domain, entries)
}

// AppendMatch is Match that appends to dst. It does not allocate where dst has room.
func (s *Set) AppendMatch(dst []*Rule, domain string, entries []Entry) []*Rule {
	d := s.domain(domain)
	if d == nil {
		return dst
	}
	return unreplaced(d.match(dst, entries), len(dst))
}

func (s *Set) domain(name string) *domain { return s.domains[cmp.Or(name, DefaultDomain)] }

// match appends the rules that match, whether or not others replace them.
func (d *domain) match(dst []*Rule, entries []Entry) []*Rule {
	dst = d.matcher.match(dst, entries)
	if r := d.tree.find(entries); r != nil {
		dst = append(dst, r)
	}
	return dst
}

// unreplaced removes the rules after the first n that others of them replace.
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

// everything in replaces takes all other rules out.
const everything = "*"
