package rules

import _ "embed"

//go:embed rules.schema.json
var schema string

// Schema returns the JSON Schema of files of rules, of both kinds. Editors use it: put
//
//	# yaml-language-server: $schema=rules.schema.json
//
// at the beginning of a file. Parse finds more faults than a schema can.
func Schema() string { return schema }
