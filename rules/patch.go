// Patches of a file: some of its rules change, and all else stays.

package rules

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"

	"go.yaml.in/yaml/v4"
)

// patchName is the File of a Fault in a patch.
const patchName = "the patch"

// Patch returns the file with some of its native rules changed. The patch is JSON: {"rules": [{"name": "api", "limits":
// ["10/1s"]}]}, with a "domain" if the file has rules of several. Each rule is found by its name, and what the patch says
// is merged into it as RFC 7396 says: a word that it does not have stays, null removes a word, a mapping is merged, and
// anything else, a list too, is replaced as a whole. A patch adds, removes and renames no rule.
//
// Comments, the order of rules and their words, and other rules stay. The text is written anew, so empty lines and
// alignment go. A rule with anchors, aliases or << is a fault, because others may share what it has, and null would not
// remove what is merged.
//
// The error is of type Faults. Patch does not compile the rules: Compile all files with the change.
func Patch(f File, patch []byte) (File, error) {
	p := &patcher{file: &reader{file: f.Name, nodes: maxNodes + 10*len(f.Data)}, patch: &reader{file: patchName, nodes: maxNodes + 10*len(patch)}}
	docs := p.file.trees(f)
	var changes []*yaml.Node
	if p.patch.isText(patch) {
		changes = p.patch.json(patch)
	}
	if len(p.file.faults) == 0 && len(p.patch.faults) == 0 {
		p.apply(docs, changes[0])
	}
	if faults := append(p.file.faults, p.patch.faults...); len(faults) > 0 {
		return File{}, faults.sorted()
	}
	data, err := written(docs, isJSON(f))
	return File{f.Name, data}, err
}

type patcher struct {
	file, patch *reader

	rules map[string][]*yaml.Node // of the domain that the patch says, by their names
	near  nearestName
}

// apply changes the rules of the documents.
func (p *patcher) apply(docs []*yaml.Node, changes *yaml.Node) {
	domain, list := "", []*yaml.Node(nil)
	has := p.patch.mapping(changes, "a patch", []field{
		{"domain", func(n *yaml.Node) { domain = p.patch.domainName(n) }},
		{"rules", func(n *yaml.Node) { p.patch.list(n, "rules", func(n *yaml.Node) { list = append(list, n) }) }},
	})
	if has != nil && len(list) == 0 {
		p.patch.fault(changes, "", "the patch has no \"rules\"")
	}
	p.index(docs, domain)
	for _, change := range list {
		name, ok := "", false
		pairs, _ := p.patch.pairs(change, "a rule of the patch")
		for _, pair := range pairs {
			if pair.key.Value == "name" {
				name, ok = p.patch.text(pair.value, "name")
			}
		}
		if !ok {
			p.patch.fault(change, "", "the rule has no name: which one is to change?")
		} else if rule := p.find(name, change); rule != nil {
			p.once(change)
			merge(rule, change)
		}
	}
}

// once reports words that stand twice in a mapping: merge would take the last and say nothing.
func (p *patcher) once(n *yaml.Node) {
	if n.Kind == yaml.MappingNode {
		p.patch.pairs(n, "a mapping")
	}
	for _, child := range n.Content {
		p.once(child)
	}
}

// index finds the rules that have names. A domain of "" is any.
func (p *patcher) index(docs []*yaml.Node, domain string) {
	p.rules = map[string][]*yaml.Node{}
	for _, doc := range docs {
		root := doc.Content[0]
		if at := member(root, "domain"); domain != "" && (at < 0 && domain != DefaultDomain || at >= 0 && root.Content[at+1].Value != domain) {
			continue
		}
		at := member(root, "rules")
		if at < 0 {
			continue
		}
		for _, rule := range root.Content[at+1].Content {
			if i := member(rule, "name"); i >= 0 {
				name := rule.Content[i+1].Value
				p.rules[name] = append(p.rules[name], rule)
				p.near.names = append(p.near.names, name)
			}
		}
	}
}

// find returns the rule of this name, or nil after a fault.
func (p *patcher) find(name string, change *yaml.Node) *yaml.Node {
	switch found := p.rules[name]; {
	case len(found) == 0:
		p.patch.fault(change, p.near.to(name), "the file has no rule %q", name)
	case len(found) > 1:
		p.patch.fault(change, "", "the file has several rules %q: say the domain", name)
	case shares(found[0]):
		p.patch.fault(change, "", "the rule %q has anchors, aliases or << in line %d, which others may share: put the whole file", name, found[0].Line)
	default:
		return found[0]
	}
	return nil
}

// member returns the index of a key in the content of a mapping, or -1.
func member(n *yaml.Node, key string) int {
	for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return i
		}
	}
	return -1
}

func shares(n *yaml.Node) bool {
	return n.Anchor != "" || n.Kind == yaml.AliasNode || n.Kind == yaml.ScalarNode && n.ShortTag() == "!!merge" || slices.ContainsFunc(n.Content, shares)
}

// merge makes n what RFC 7396 makes of it. Comments and the style of what is replaced stay.
func merge(n, patch *yaml.Node) {
	if patch.Kind != yaml.MappingNode || n.Kind != yaml.MappingNode {
		n.Kind, n.Tag, n.Value, n.Content = patch.Kind, patch.Tag, patch.Value, nil
		n.Style &= yaml.FlowStyle
		if patch.Kind != yaml.MappingNode {
			n.Content = patch.Content
			return
		}
	}
	for i := 0; i+1 < len(patch.Content); i += 2 {
		key, value := patch.Content[i], patch.Content[i+1]
		at := member(n, key.Value)
		switch {
		case value.Tag == "!!null":
			if at >= 0 {
				n.Content = slices.Delete(n.Content, at, at+2)
			}
		case at >= 0:
			merge(n.Content[at+1], value)
		default:
			added := &yaml.Node{}
			merge(added, value)
			n.Content = append(n.Content, key, added)
		}
	}
}

// written returns the text of a file.
func written(docs []*yaml.Node, asJSON bool) ([]byte, error) {
	var out bytes.Buffer
	if asJSON {
		err := writeJSON(&out, docs[0].Content[0])
		var indented bytes.Buffer
		err = errors.Join(err, json.Indent(&indented, out.Bytes(), "", "  "))
		indented.WriteByte('\n')
		return indented.Bytes(), err
	}
	d, err := yaml.NewDumper(&out, yaml.WithIndent(2), yaml.WithCompactSeqIndent(isCompact(docs[0].Content[0])), yaml.WithLineWidth(-1))
	if err != nil {
		return nil, err
	}
	for _, doc := range docs {
		err = errors.Join(err, d.Dump(doc))
	}
	return out.Bytes(), errors.Join(err, d.Close())
}

// isCompact reports whether the dashes of a list stand below the first letter of its key.
func isCompact(root *yaml.Node) bool {
	at := member(root, "rules")
	return at >= 0 && root.Content[at].Column == root.Content[at+1].Column
}

// writeJSON writes a tree that came from JSON, with its keys in their order.
func writeJSON(out *bytes.Buffer, n *yaml.Node) (err error) {
	switch {
	case n.Kind == yaml.ScalarNode && n.Tag == "!!str":
		e := json.NewEncoder(out)
		e.SetEscapeHTML(false)
		return e.Encode(n.Value)
	case n.Kind == yaml.ScalarNode && n.Tag == "!!null":
		out.WriteString("null")
	case n.Kind == yaml.ScalarNode:
		out.WriteString(n.Value)
	}
	open, end := "[", "]"
	switch n.Kind {
	case yaml.ScalarNode:
		return nil
	case yaml.MappingNode:
		open, end = "{", "}"
	}
	out.WriteString(open)
	for i, child := range n.Content {
		switch {
		case i == 0:
		case n.Kind == yaml.MappingNode && i%2 == 1:
			out.WriteByte(':')
		default:
			out.WriteByte(',')
		}
		err = errors.Join(err, writeJSON(out, child))
	}
	out.WriteString(end)
	return err
}
