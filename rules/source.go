// Where rules come from: files, and memory. Package rules/postgres keeps them in a table.

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

// Source provides the files of an Engine. It must be safe for concurrent use.
type Source interface {
	// Files returns all files as they are now. It returns early, with an error, if ctx ends.
	Files(ctx context.Context) ([]File, error)
}

// Watcher is a Source that reports changes, so that an Engine learns of them before it looks again.
type Watcher interface {
	Source

	// Watch calls changed whenever the files may have changed. It returns when ctx ends.
	Watch(ctx context.Context, changed func())
}

// Store is a Source that can be changed. It does not compile what it is given: Compile all files with the change first.
type Store interface {
	Source

	// Put adds the file, or replaces the file of the same name. ifMatch is the expected ETag of that file, Absent if
	// there must be none, or "" for no check. If it does not match, Put changes nothing and returns ErrConflict.
	Put(ctx context.Context, f File, ifMatch string) error

	// Delete removes the file of this name. It checks ifMatch as Put does, and returns ErrNotFound if there is no such
	// file.
	Delete(ctx context.Context, name, ifMatch string) error

	// Change makes the files what edit makes of them, all of it or nothing. Nobody else changes the store between the
	// read and the write, so what edit has found to be right together is right together afterwards. If edit returns an
	// error, Change changes nothing and returns it. The names of the files must differ. edit must not use the store.
	Change(ctx context.Context, edit func(files []File) ([]File, error)) error
}

// Absent is the ETag of a file that a Store does not have.
const Absent = "absent"

// Errors of a Store.
var (
	ErrConflict = errors.New("rules: somebody else has changed the file")
	ErrNotFound = errors.New("rules: no such file")
)

// ETag returns a hash of the file's data.
func (f *File) ETag() string {
	sum := sha256.Sum256(f.Data)
	return hex.EncodeToString(sum[:16])
}

// Matches is the check of ifMatch that a Store makes. It returns an error that wraps ErrConflict, or nil. A nil file
// stands for a file that does not exist.
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

// Memory is a Store in this process. NewMemory makes one. It is safe for concurrent use.
type Memory struct {
	changing turn // held during a change

	mu      sync.Mutex    // guards the following
	files   []File        // sorted by name
	changed chan struct{} // closed by the next change, and replaced then
}

// NewMemory returns a Memory with these files.
func NewMemory(files ...File) *Memory {
	m := &Memory{changing: newTurn(), changed: make(chan struct{})}
	for _, f := range files {
		_ = m.Put(context.Background(), f, "") // cannot fail without an ifMatch
	}
	return m
}

// Files returns the files, sorted by name.
func (m *Memory) Files(context.Context) ([]File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.files), nil
}

// Put implements Store. It keeps the data, which must not be changed afterwards.
func (m *Memory) Put(ctx context.Context, f File, ifMatch string) error {
	return m.Change(ctx, func(files []File) ([]File, error) {
		i, had := find(files, f.Name)
		if err := had.Matches(ifMatch); err != nil {
			return nil, err
		}
		if had == nil {
			return slices.Insert(files, i, f), nil
		}
		files[i] = f
		return files, nil
	})
}

// Delete implements Store.
func (m *Memory) Delete(ctx context.Context, name, ifMatch string) error {
	return m.Change(ctx, func(files []File) ([]File, error) {
		i, had := find(files, name)
		if had == nil {
			return nil, fmt.Errorf("%w: %q", ErrNotFound, name)
		}
		return slices.Delete(files, i, i+1), had.Matches(ifMatch)
	})
}

// Change implements Store. Files returns the files from before until edit has returned.
func (m *Memory) Change(ctx context.Context, edit func([]File) ([]File, error)) error {
	if err := m.changing.take(ctx); err != nil {
		return err
	}
	defer m.changing.leave()
	before, _ := m.Files(ctx)
	after, err := edit(before)
	if err != nil {
		return err
	}
	after = slices.Clone(after)
	slices.SortFunc(after, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	m.mu.Lock()
	defer m.mu.Unlock()
	m.files = after
	m.tell()
	return nil
}

func find(files []File, name string) (int, *File) {
	i, found := slices.BinarySearchFunc(files, name, func(f File, name string) int { return strings.Compare(f.Name, name) })
	if !found {
		return i, nil
	}
	return i, new(files[i])
}

func (m *Memory) tell() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// Watch implements Watcher.
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

// Files returns a Source of files and folders. Of a folder it reads all files *.yaml, *.yml and *.json, by name, except
// files in subfolders and files whose name begins with a dot. It compares contents rather than times or links, so it
// works with the volumes of Kubernetes and with any editor.
//
// A file that has changed is read again until it stays the same for a tenth of a second, at most ten times. A folder
// without such files is an error: if the rules are gone by mistake, nothing would be limited.
func Files(paths ...string) Source { return &files{paths: slices.Clone(paths), turn: newTurn()} }

type files struct {
	paths []string

	turn turn // guards last
	last []File
}

// turn is a lock that callers wait for no longer than their context lasts.
type turn chan struct{}

func newTurn() turn { return make(turn, 1) }

func (t turn) take(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t turn) leave() { <-t }

const settled = 100 * time.Millisecond

// The turn is kept while waiting for files to settle: another caller would only read the same unfinished files.
func (s *files) Files(ctx context.Context) ([]File, error) {
	if err := s.turn.take(ctx); err != nil {
		return nil, err
	}
	defer s.turn.leave()
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

// filesIn returns the path itself, or the files in it if it is a folder.
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
