// YAML and JSON as one tree of nodes that know their positions, and the functions that read it. Unknown words are faults.

package rules

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"

	"github.com/go-throttler/throttler/internal/nearest"
)

// Bounds of what a file may make the reader do. Without them, aliases could make that endless.
const (
	maxNodes = 100_000 // plus 10 for each byte of the file
	maxDepth = 64
)

// reader reads one file and collects its faults.
type reader struct {
	file   string
	faults Faults
	nodes  int // how many nodes may still be visited
	depth  int // of the present node
}

// deeper enters a node and reports whether it may be read. The caller must call up afterwards in either case.
func (r *reader) deeper(n *yaml.Node) bool {
	if r.depth++; r.depth == maxDepth {
		r.fault(n, "", "the file has over %d levels", maxDepth)
	}
	return r.depth < maxDepth
}

func (r *reader) up() { r.depth-- }

func (r *reader) fault(n *yaml.Node, meant, format string, args ...any) {
	if r.nodes < 0 {
		return
	}
	problem := fmt.Sprintf(format, args...)
	switch {
	case len(r.faults) > mostFaults:
		return
	case len(r.faults) == mostFaults:
		problem, meant = fmt.Sprintf("this file has more than %d faults, and the others are not told", mostFaults), ""
	}
	r.faults = append(r.faults, &Fault{r.file, n.Line, n.Column, problem, meant})
}

const mostFaults = 1000 // of a file: without a bound, a file of 8 MB makes an error of 300

// documents returns the roots of the documents in a file.
func (r *reader) documents(f File) (roots []*yaml.Node) {
	for _, doc := range r.trees(f) {
		roots = append(roots, doc.Content[0])
	}
	return roots
}

// trees returns the documents in a file, each a node whose only content is its root.
func (r *reader) trees(f File) (docs []*yaml.Node) {
	if !r.isText(f.Data) {
		return nil
	}
	if isJSON(f) {
		if roots := r.json(f.Data); roots != nil {
			docs = append(docs, &yaml.Node{Kind: yaml.DocumentNode, Content: roots})
		}
		return docs
	}
	l, err := yaml.NewLoader(bytes.NewReader(f.Data))
	for err == nil {
		var n yaml.Node
		if err = l.Load(&n); err == nil && len(n.Content) > 0 {
			docs = append(docs, &n)
		}
	}
	var fault *yaml.LoadError
	switch {
	case errors.Is(err, io.EOF):
	case errors.As(err, &fault):
		r.fault(&yaml.Node{Line: fault.Mark.Line, Column: fault.Mark.Column}, "", "%s", strings.Trim(fault.ContextMsg+": "+fault.Message, ": "))
	default:
		r.fault(&yaml.Node{}, "", "is not YAML: %v", err)
	}
	return docs
}

// isText reports whether the data is UTF-8 without NUL; if not, it reports the fault. Of JSON the decoder would replace
// what is not UTF-8 silently, and Postgres stores neither.
func (r *reader) isText(data []byte) bool {
	d := &jsonDecoder{data: data, line: 1, column: 1}
	at, problem := bytes.IndexByte(data, 0), "has a NUL"
	if !utf8.Valid(data) {
		problem = "is not UTF-8"
		for at = 0; ; {
			c, size := utf8.DecodeRune(data[at:])
			if c == utf8.RuneError && size == 1 {
				break
			}
			at += size
		}
	}
	if at < 0 {
		return true
	}
	n := &yaml.Node{}
	d.place(n, int64(at))
	r.fault(n, "", "%s", problem)
	return false
}

func isJSON(f File) bool {
	if strings.EqualFold(filepath.Ext(f.Name), ".json") {
		return true
	}
	start := bytes.TrimSpace(f.Data)
	return len(start) > 0 && start[0] == '{' && json.Valid(f.Data)
}

// json reads the one value of a JSON file.
func (r *reader) json(data []byte) []*yaml.Node {
	d := &jsonDecoder{d: json.NewDecoder(bytes.NewReader(data)), data: data, line: 1, column: 1}
	d.d.UseNumber()
	root, err := d.value()
	if err == nil {
		if _, more := d.d.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("more follows the value")
		}
	}
	if err != nil {
		at := d.d.InputOffset()
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			at = max(at, syntax.Offset-1)
		}
		if errors.Is(err, io.EOF) {
			err = errors.New("it ends too early")
		}
		n := &yaml.Node{}
		d.place(n, at)
		r.fault(n, "", "is not JSON: %v", err)
		return nil
	}
	return []*yaml.Node{root}
}

// jsonDecoder makes YAML nodes from JSON. It counts lines as it goes, so the file is scanned for them only once.
type jsonDecoder struct {
	d    *json.Decoder
	data []byte

	depth        int
	line, column int   // at the offset seen
	seen         int64 // offset up to which lines and columns have been counted
}

// place sets the line and column of an offset, which must not lie before that of the last call.
func (d *jsonDecoder) place(n *yaml.Node, at int64) {
	for ; d.seen < min(at, int64(len(d.data))); d.seen++ {
		switch c := d.data[d.seen]; {
		case c == '\n':
			d.line, d.column = d.line+1, 1
		case utf8.RuneStart(c):
			d.column++
		}
	}
	n.Line, n.Column = d.line, d.column
}

func (d *jsonDecoder) value() (*yaml.Node, error) {
	at := d.d.InputOffset()
	for at < int64(len(d.data)) && strings.IndexByte(" \t\r\n,:", d.data[at]) >= 0 {
		at++
	}
	n := &yaml.Node{Kind: yaml.ScalarNode}
	d.place(n, at)
	t, err := d.d.Token()
	if err != nil {
		return nil, err
	}
	switch t := t.(type) {
	case json.Delim:
		n.Kind = yaml.SequenceNode
		if t == '{' {
			n.Kind = yaml.MappingNode
		}
		return n, d.content(n)
	case string:
		n.Tag, n.Value = "!!str", t
	case json.Number:
		n.Tag, n.Value = "!!float", t.String()
		if _, err := strconv.ParseInt(n.Value, 10, 64); err == nil {
			n.Tag = "!!int"
		}
	case bool:
		n.Tag, n.Value = "!!bool", strconv.FormatBool(t)
	default:
		n.Tag = "!!null"
	}
	return n, nil
}

func (d *jsonDecoder) content(n *yaml.Node) error {
	if d.depth++; d.depth > maxDepth {
		return fmt.Errorf("it has over %d levels", maxDepth)
	}
	defer func() { d.depth-- }()
	for d.d.More() {
		child, err := d.value()
		if err != nil {
			return err
		}
		n.Content = append(n.Content, child)
	}
	_, err := d.d.Token()
	return err
}

// resolved returns the node that an alias stands for, or the node itself. It counts the nodes it visits, so that reading
// ends even if aliases repeat aliases or contain themselves. Beyond the bound it returns a null.
func (r *reader) resolved(n *yaml.Node) *yaml.Node {
	for n.Kind == yaml.AliasNode && n.Alias != nil && r.visit(n, 1) {
		n = n.Alias
	}
	if !r.visit(n, 1) {
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!null", Line: n.Line, Column: n.Column}
	}
	return n
}

// visit counts nodes, and reports whether more may be visited. The first time that is not so is a fault. The faults that
// follow from it are not reported.
func (r *reader) visit(n *yaml.Node, nodes int) bool {
	if r.nodes < 0 {
		return false
	}
	if r.nodes -= nodes; r.nodes > 0 {
		return true
	}
	r.nodes = 0
	r.fault(n, "", "the file has too many values, since its aliases repeat each other")
	r.nodes = -1
	return false
}

// perCopy is how many visits a node of metadata counts for. Metadata are copied, which takes far more time and memory
// than a visit. A file without aliases has no more than a node for every two of its bytes, so it stays within the bound.
const perCopy = 10

// copied counts the nodes that a copy of n has, which repeats what aliases and << stand for.
func (r *reader) copied(n *yaml.Node) {
	defer r.up()
	if !r.deeper(n) {
		return
	}
	n = r.resolved(n)
	if !r.visit(n, perCopy) {
		return
	}
	for _, child := range n.Content {
		r.copied(child)
	}
}

// field is a word that a mapping may have, and the function that reads its value.
type field struct {
	name string
	read func(*yaml.Node)
}

// mapping reads the fields of n. It returns the keys that are present, or nil if n is not a mapping.
func (r *reader) mapping(n *yaml.Node, what string, fields []field) map[string]*yaml.Node {
	pairs, ok := r.pairs(n, what)
	if !ok {
		return nil
	}
	seen := map[string]*yaml.Node{}
	for _, p := range pairs {
		seen[p.key.Value] = p.key
		i := slices.IndexFunc(fields, func(f field) bool { return f.name == p.key.Value })
		if i < 0 {
			names := make([]string, len(fields))
			for i := range fields {
				names[i] = fields[i].name
			}
			r.fault(p.key, nearest.Word(p.key.Value, names), "%q is no word of %s, which are %s", p.key.Value, what, strings.Join(names, ", "))
			continue
		}
		fields[i].read(p.value)
	}
	return seen
}

type pair struct{ key, value *yaml.Node }

// pairs returns the keys and values of a mapping. Merged ones ("<<") come last, and are left out if the mapping has the
// key itself.
func (r *reader) pairs(n *yaml.Node, what string) (pairs []pair, ok bool) {
	defer r.up()
	if !r.deeper(n) {
		return nil, false
	}
	n = r.resolved(n)
	if n.Kind != yaml.MappingNode {
		r.fault(n, "", "%s is %s, must be a mapping", what, described(n))
		return nil, false
	}
	seen, merged := map[string]*yaml.Node{}, []*yaml.Node(nil)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := r.resolved(n.Content[i]), r.resolved(n.Content[i+1])
		switch {
		case key.Kind != yaml.ScalarNode:
			r.fault(key, "", "a key is %s, must be a word", described(key))
		case key.ShortTag() == "!!merge":
			merged = append(merged, value)
		case seen[key.Value] != nil:
			r.fault(key, "", "%q stands here twice, before in line %d", key.Value, seen[key.Value].Line)
		default:
			seen[key.Value] = key
			pairs = append(pairs, pair{key, value})
		}
	}
	for _, m := range merged {
		pairs = r.merge(pairs, seen, m)
	}
	return pairs, true
}

func (r *reader) merge(pairs []pair, seen map[string]*yaml.Node, from *yaml.Node) []pair {
	sources := []*yaml.Node{from}
	if from.Kind == yaml.SequenceNode {
		sources = from.Content
	}
	for _, s := range sources {
		more, _ := r.pairs(s, "what << merges")
		for _, p := range more {
			if seen[p.key.Value] == nil {
				seen[p.key.Value] = p.key
				pairs = append(pairs, p)
			}
		}
	}
	return pairs
}

// list reads each element of a sequence.
func (r *reader) list(n *yaml.Node, what string, read func(*yaml.Node)) {
	defer r.up()
	if !r.deeper(n) {
		return
	}
	n = r.resolved(n)
	if n.Kind != yaml.SequenceNode {
		r.fault(n, "", "%s is %s, must be a list", what, described(n))
		return
	}
	for _, e := range n.Content {
		read(r.resolved(e))
	}
}

// listOrOne is list, but also reads a single element that is not in a list.
func (r *reader) listOrOne(n *yaml.Node, what string, read func(*yaml.Node)) {
	if n = r.resolved(n); n.Kind == yaml.SequenceNode {
		r.list(n, what, read)
		return
	}
	read(n)
}

// domainName reads the name of a domain. If that is not text, it reports the fault and returns DefaultDomain, so that no
// second fault follows.
func (r *reader) domainName(n *yaml.Node) string {
	if name, ok := r.text(n, "domain"); ok {
		return name
	}
	return DefaultDomain
}

// text reads a scalar as it is written. Null is a fault.
func (r *reader) text(n *yaml.Node, what string) (string, bool) {
	if n = r.resolved(n); n.Kind != yaml.ScalarNode || n.ShortTag() == "!!null" {
		r.fault(n, "", "%s is %s, must be text", what, described(n))
		return "", false
	}
	return n.Value, true
}

func (r *reader) boolean(n *yaml.Node, what string) bool {
	n = r.resolved(n)
	word := strings.ToLower(n.Value)
	if n.Kind == yaml.ScalarNode && slices.Contains([]string{"true", "yes", "on"}, word) {
		return true
	}
	if n.Kind != yaml.ScalarNode || !slices.Contains([]string{"false", "no", "off"}, word) {
		r.fault(n, nearest.Word(word, []string{"true", "false"}), "%s is %s, must be true or false", what, described(n))
	}
	return false
}

func (r *reader) integer(n *yaml.Node, what string, least, most int64) int64 {
	n = r.resolved(n)
	i, err := strconv.ParseInt(strings.ReplaceAll(n.Value, "_", ""), 0, 64)
	if n.Kind != yaml.ScalarNode || err != nil || i < least || i > most {
		r.fault(n, "", "%s is %s, must be a whole number from %d to %d", what, described(n), least, most)
		return 0
	}
	return i
}

// described is what a fault says that a node is.
func described(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case n.ShortTag() == "!!null":
		return "empty"
	case len(n.Value) > 64:
		return strconv.Quote(n.Value[:64]) + "…"
	}
	return strconv.Quote(n.Value)
}
