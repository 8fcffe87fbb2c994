// Where rules come from: files, and memory. Package rules/postgres has a table.

package rules

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Source has the files of an Engine. It is safe for concurrent use.
type Source interface {
	// Files returns all files as they are now. It ends with its context.
	Files(ctx context.Context) ([]File, error)
}

// Watcher is a Source that knows of changes by itself, so that an Engine need not wait until it looks again.
type Watcher interface {
	Source

	// Watch calls changed when the files may have changed, until the context ends.
	Watch(ctx context.Context, changed func())
}

// Store is a Source that can be changed. What it is given is not compiled: Compile the files with the change before.
type Store interface {
	Source

	// Put adds the file, or replaces the one of its name. It returns ErrConflict, and changes nothing, unless ifMatch
	// is the ETag of that file, Absent if there must be none, or "" if that does not matter.
	Put(ctx context.Context, f File, ifMatch string) error

	// Delete removes the file of this name. ifMatch is that of Put. Without such a file it returns ErrNotFound.
	Delete(ctx context.Context, name, ifMatch string) error
}

// Absent is the ETag of a file that a Store does not have.
const Absent = "absent"

// The errors of a Store.
var (
	ErrConflict = errors.New("rules: somebody else has changed the file")
	ErrNotFound = errors.New("rules: no such file")
)

// ETag is a hash of the file's data.
func (f *File) ETag() string {
	sum := sha256.Sum256(f.Data)
	return hex.EncodeToString(sum[:16])
}

// Matches is the check that a Store makes of ifMatch. The file is nil if there is none.
func (f *File) Matches(ifMatch string) error {
	tag := Absent
	if f != nil {
		tag = f.ETag()
	}
	if ifMatch == "" || ifMatch == tag {
		return nil
	}
	return fmt.Errorf("%w: its ETag is %q, not %q", ErrConflict, tag, ifMatch)
}

// Memory is a Store in this process. NewMemory makes one.
type Memory struct {
	mu      sync.Mutex
	files   []File        // sorted by name
	changed chan struct{} // closed by the next change
}

// NewMemory returns a Memory that has these files.
func NewMemory(files ...File) *Memory {
	m := &Memory{changed: make(chan struct{})}
	for _, f := range files {
		_ = m.Put(context.Background(), f, "") // cannot fail
	}
	return m
}

// Files returns the files, sorted by name.
func (m *Memory) Files(context.Context) ([]File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.files), nil
}

// Put is that of Store. It keeps the data, which must not be changed afterwards.
func (m *Memory) Put(_ context.Context, f File, ifMatch string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	i, had := m.find(f.Name)
	if err := had.Matches(ifMatch); err != nil {
		return err
	}
	if had != nil {
		m.files[i] = f
	} else {
		m.files = slices.Insert(m.files, i, f)
	}
	m.tell()
	return nil
}

// Delete is that of Store.
func (m *Memory) Delete(_ context.Context, name, ifMatch string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	i, had := m.find(name)
	if had == nil {
		return fmt.Errorf("%w: %q", ErrNotFound, name)
	}
	if err := had.Matches(ifMatch); err != nil {
		return err
	}
	m.files = slices.Delete(m.files, i, i+1)
	m.tell()
	return nil
}

func (m *Memory) find(name string) (int, *File) {
	i, found := slices.BinarySearchFunc(m.files, name, func(f File, name string) int { return strings.Compare(f.Name, name) })
	if !found {
		return i, nil
	}
	return i, &m.files[i]
}

func (m *Memory) tell() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// Watch is that of Watcher.
func (m *Memory) Watch(ctx context.Context, changed func()) {
	for {
		m.mu.Lock()
		next := m.changed
		m.mu.Unlock()
		select {
		case <-next:
			changed()
		case <-ctx.Done():
			return
		}
	}
}

// Files is a Source of files, and of folders, of which it has all files *.yaml, *.yml and *.json, by name, but none of
// folders below, and none whose name begins with a dot. It looks at contents, and not at times or links, so that the
// volumes of Kubernetes and any editor work.
//
// A file that changes is read again until it stays as it is for a tenth of a second. A folder without such files is an
// error: rules that are gone by mistake would let everybody in.
func Files(paths ...string) Source { return &files{paths: slices.Clone(paths)} }

type files struct {
	paths []string

	mu   sync.Mutex
	last []File
}

const settled = 100 * time.Millisecond

func (s *files) Files(ctx context.Context) ([]File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, err := s.read()
	for range 10 {
		if err != nil || s.last == nil || equal(s.last, now) {
			break
		}
		select {
		case <-time.After(settled):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		s.last = now
		now, err = s.read()
	}
	if err == nil {
		s.last = now
	}
	return now, err
}

func equal(a, b []File) bool {
	return slices.EqualFunc(a, b, func(a, b File) bool { return a.Name == b.Name && string(a.Data) == string(b.Data) })
}

func (s *files) read() (all []File, err error) {
	for _, path := range s.paths {
		names, err := filesIn(path)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			data, err := os.ReadFile(name)
			if err != nil {
				return nil, fmt.Errorf("rules: %w", err)
			}
			all = append(all, File{name, data})
		}
	}
	return all, nil
}

// filesIn is the path itself, or the files of the folder that it is.
func filesIn(path string) (names []string, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("rules: %w", err)
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, fmt.Errorf("rules: %w", err)
	}
	for _, e := range entries {
		name := filepath.Join(path, e.Name())
		kind := slices.Contains([]string{".yaml", ".yml", ".json"}, strings.ToLower(filepath.Ext(name)))
		if info, err := os.Stat(name); kind && !strings.HasPrefix(e.Name(), ".") && err == nil && info.Mode().IsRegular() {
			names = append(names, name)
		}
	}
	if names == nil {
		return nil, fmt.Errorf("rules: the folder %s has no files *.yaml, *.yml or *.json", path)
	}
	return names, nil
}
