// Faults of files of rules, and their positions.

package rules

import (
	"fmt"
	"slices"
	"strings"
)

// Fault is one thing that is wrong in a file.
type Fault struct {
	File    string `json:"file,omitempty"`
	Line    int    `json:"line"`   // from 1; 0 if the file as a whole is wrong
	Column  int    `json:"column"` // from 1, in characters
	Problem string `json:"problem"`
	Meant   string `json:"meant,omitempty"` // the nearest correct word, if there is one
}

// Error returns "file:line:column: problem".
func (f *Fault) Error() string {
	where := f.File
	if f.Line > 0 {
		where = strings.TrimPrefix(fmt.Sprintf("%s:%d:%d", f.File, f.Line, f.Column), ":")
	}
	if f.Meant != "" {
		return fmt.Sprintf("%s: %s: did you mean %q?", where, f.Problem, f.Meant)
	}
	return strings.TrimPrefix(where+": "+f.Problem, ": ")
}

// Faults are all that is wrong with files, ordered by file and position. It is the error type of Parse and Compile; use
// errors.As.
type Faults []*Fault

// Error returns a line for each fault.
func (f Faults) Error() string {
	lines := make([]string, len(f))
	for i := range f {
		lines[i] = f[i].Error()
	}
	return strings.Join(lines, "\n")
}

// sorted orders the faults by file and position. It removes duplicates, which arise if a node is read through several
// aliases.
func (f Faults) sorted() Faults {
	files := map[string]int{}
	for _, fault := range f {
		if _, known := files[fault.File]; !known {
			files[fault.File] = len(files)
		}
	}
	slices.SortStableFunc(f, func(a, b *Fault) int {
		if d := files[a.File] - files[b.File]; d != 0 {
			return d
		}
		if d := a.Line - b.Line; d != 0 {
			return d
		}
		return a.Column - b.Column
	})
	return slices.CompactFunc(f, func(a, b *Fault) bool { return *a == *b })
}
