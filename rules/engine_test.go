package rules_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/rules"
	"github.com/go-throttler/throttler/storage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// limit returns a file with one rule for everybody that has this limit.
func limit(words string) []byte {
	return fmt.Appendf(nil, "rules: [{name: all, limits: [%s]}]\n", words)
}

func write(t *testing.T, name string, data []byte) {
	t.Helper()
	require.NoError(t, os.WriteFile(name, data, 0o600))
}

// folder returns an engine over a folder with one file. It runs in a synctest bubble.
func folder(t *testing.T, o *rules.Options) (e *rules.Engine, file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "rules.yaml")
	write(t, file, limit("5/1h"))
	l, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	e, err = rules.NewEngine(l, rules.Files(filepath.Dir(file)), o)
	require.NoError(t, err)
	t.Cleanup(e.Close)
	return e, file
}

// remaining asks for n tokens and returns what remains.
func remaining(t *testing.T, e *rules.Engine, n int64) int64 {
	t.Helper()
	v, applied, err := e.Decide(t.Context(), rules.Request{Cost: &n})
	require.NoError(t, err)
	require.Len(t, applied, 1)
	require.True(t, v.Allowed)
	return applied[0].Levels[0].Remaining
}

func TestAChangedFileCountsWithinTwoSeconds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		e, file := folder(t, nil)
		assert.Equal(t, int64(2), remaining(t, e, 3))
		for _, after := range []time.Duration{0, 500 * time.Millisecond, 999 * time.Millisecond} {
			<-time.After(after)
			write(t, file, limit("10/1h"))
			<-time.After(2 * time.Second)
			assert.Equal(t, int64(7), remaining(t, e, 0), "what was spent stays spent")
			write(t, file, limit("5/1h"))
			<-time.After(2 * time.Second)
			assert.Equal(t, int64(2), remaining(t, e, 0))
		}
	})
}

func TestABadFileChangesNothingAndIsTold(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var told []string
		e, file := folder(t, &rules.Options{OnLoad: func(set *rules.Set, err error) {
			told = append(told, fmt.Sprint(set != nil, " ", err))
		}})
		write(t, file, []byte("rules: [{name: all, limit: 5/1h}]"))
		<-time.After(5 * time.Second)
		assert.Equal(t, int64(4), remaining(t, e, 1))
		require.ErrorContains(t, e.Err(), `rules.yaml:1:21: "limit" is no word of a rule`)
		var faults rules.Faults
		require.ErrorAs(t, e.Err(), &faults)

		require.NoError(t, os.Remove(file))
		<-time.After(5 * time.Second)
		assert.Equal(t, int64(3), remaining(t, e, 1), "a folder that became empty lets nobody in")
		require.ErrorContains(t, e.Err(), "has no files")
		write(t, file, []byte("rules: [{name: all, limit: 5/1h}]"))
		<-time.After(5 * time.Second)
		require.ErrorContains(t, e.Err(), `"limit" is no word of a rule`)

		write(t, file, limit("5/1h"))
		<-time.After(2 * time.Second)
		require.NoError(t, e.Err())
		write(t, file, limit("6/1h"))
		<-time.After(2 * time.Second)
		synctest.Wait()
		require.Len(t, told, 5, "each once: %q", told)
		assert.Contains(t, told[0], "false ")
		assert.Equal(t, "true <nil>", told[4])
	})
}

func TestAFileIsNotReadWhileItIsWritten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var told atomic.Int64
		e, file := folder(t, &rules.Options{OnLoad: func(set *rules.Set, err error) { told.Add(1) }})
		write(t, file, nil)
		<-time.After(1050 * time.Millisecond) // the engine has looked and waits for the file to settle
		write(t, file, []byte("rules: ["))
		<-time.After(60 * time.Millisecond)
		write(t, file, limit("7/1h"))
		<-time.After(time.Second)
		require.NoError(t, e.Err())
		assert.Equal(t, int64(6), remaining(t, e, 1))
		assert.Equal(t, int64(1), told.Load())
	})
}

func TestFilesThatLinksLeadToAreFollowed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		// As Kubernetes mounts a ConfigMap: ..data is a link to a folder, and an update replaces the link.
		dir := t.TempDir()
		version := func(name, words string) {
			require.NoError(t, os.Mkdir(filepath.Join(dir, name), 0o700))
			write(t, filepath.Join(dir, name, "rules.yaml"), limit(words))
			require.NoError(t, os.Symlink(name, filepath.Join(dir, "..data_tmp")))
			require.NoError(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
		}
		version("..1", "5/1h")
		require.NoError(t, os.Symlink("..data/rules.yaml", filepath.Join(dir, "rules.yaml")))
		write(t, filepath.Join(dir, ".hidden.yaml"), []byte("x"))
		write(t, filepath.Join(dir, "README.md"), []byte("x"))
		require.NoError(t, os.Mkdir(filepath.Join(dir, "folder.yaml"), 0o700))
		l, err := throttler.New(throttler.Config{})
		require.NoError(t, err)
		e, err := rules.NewEngine(l, rules.Files(dir), nil)
		require.NoError(t, err)
		defer e.Close()
		assert.Equal(t, int64(4), remaining(t, e, 1))
		version("..2", "6/1h")
		<-time.After(2 * time.Second)
		assert.Equal(t, int64(4), remaining(t, e, 1))
	})
}

func TestAThousandReloadsUnderLoadAdmitExactlyTheLimit(t *testing.T) {
	t.Parallel()
	const capacity, callers, each, reloads = 20_000, 8, 5000, 1000
	version := func(i int) rules.File {
		return rules.File{Name: "a", Data: fmt.Appendf(nil, "rules:\n- {name: all, limits: [%d/24h log, %d/24h]}\n- {name: other, per: x, limits: [%d/1s]}\n", 1_000_000+i, capacity, i)}
	}
	l, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	source := rules.NewMemory(version(0))
	e, err := rules.NewEngine(l, source, nil)
	require.NoError(t, err)
	defer e.Close()
	first := weak.Make(e.Rules())
	var admitted, denied atomic.Int64
	var work sync.WaitGroup
	for range callers {
		work.Go(func() {
			for range each {
				v, applied, err := e.Decide(context.Background(), rules.Request{})
				if !assert.NoError(t, err) || !assert.Len(t, applied, 1) {
					return
				}
				if v.Allowed {
					admitted.Add(1)
				} else {
					denied.Add(1)
				}
			}
		})
	}
	work.Go(func() {
		for i := range reloads {
			assert.NoError(t, source.Put(context.Background(), version(i+1), ""))
			assert.NoError(t, e.Reload(context.Background()))
		}
	})
	work.Wait()
	assert.Equal(t, int64(capacity), admitted.Load())
	assert.Equal(t, int64(callers*each-capacity), denied.Load())
	assert.Equal(t, int64(1_000_000+reloads), e.Rules().Rules()[0].Limits[0].Capacity())
	runtime.GC()
	assert.Nil(t, first.Value(), "old rules are kept")
}

func TestRulesThatDidNotChangeKeepTheirBuckets(t *testing.T) {
	t.Parallel()
	spy := &spy{}
	l, err := throttler.New(throttler.Config{Storage: spy})
	require.NoError(t, err)
	source := rules.NewMemory(rules.File{Name: "a", Data: limit("5/1h")})
	e, err := rules.NewEngine(l, source, nil)
	require.NoError(t, err)
	defer e.Close()
	ask := func() *storage.RuleSet {
		_, _, err := e.Decide(t.Context(), rules.Request{})
		require.ErrorIs(t, err, errSpy)
		return spy.request.Load().Parts[0].Rules
	}
	before := ask()
	require.NoError(t, source.Put(t.Context(), rules.File{Name: "b", Data: []byte("domain: b\nrules: []")}, ""))
	require.NoError(t, e.Reload(t.Context()))
	require.Len(t, e.Rules().Domains(), 2)
	assert.Same(t, before, ask(), "a storage knows them by their address")
}

// spy is a storage that records what it is asked.
type spy struct {
	storage.Storage
	request atomic.Pointer[storage.Request]
}

func (s *spy) identifiers() (ids []string) {
	for _, p := range s.request.Load().Parts {
		ids = append(ids, p.Identifier)
	}
	return ids
}

var errSpy = errors.New("spy")

func (s *spy) Decide(_ context.Context, r *storage.Request, _ *storage.Answer) error {
	asked := *r
	s.request.Store(&asked)
	return errSpy
}

func TestMemoryTellsItsEnginesAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		source := rules.NewMemory(rules.File{Name: "b", Data: limit("5/1h")}, rules.File{Name: "a", Data: []byte("domain: a\nrules: []")})
		l, err := throttler.New(throttler.Config{})
		require.NoError(t, err)
		e, err := rules.NewEngine(l, source, &rules.Options{Interval: time.Hour})
		require.NoError(t, err)
		defer e.Close()
		synctest.Wait()
		files, err := source.Files(t.Context())
		require.NoError(t, err)
		assert.Equal(t, "a", files[0].Name)
		require.ErrorIs(t, source.Put(t.Context(), rules.File{Name: "b", Data: limit("6/1h")}, files[0].ETag()), rules.ErrConflict)
		require.ErrorIs(t, source.Put(t.Context(), rules.File{Name: "b", Data: limit("6/1h")}, rules.Absent), rules.ErrConflict)
		require.NoError(t, source.Put(t.Context(), rules.File{Name: "b", Data: limit("6/1h")}, files[1].ETag()))
		synctest.Wait()
		assert.Equal(t, int64(5), remaining(t, e, 1))
		require.ErrorIs(t, source.Delete(t.Context(), "b", files[1].ETag()), rules.ErrConflict)
		require.ErrorIs(t, source.Delete(t.Context(), "c", ""), rules.ErrNotFound)
		require.NoError(t, source.Delete(t.Context(), "b", ""))
		synctest.Wait()
		assert.Equal(t, []string{"a"}, e.Rules().Domains())
	})
}

func TestASourceThatFailedIsAskedAgainSoon(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		e, file := folder(t, &rules.Options{Interval: time.Hour})
		require.NoError(t, os.Rename(file, file+".away"))
		require.Error(t, e.Reload(t.Context()))
		<-time.After(time.Hour) // the engine looks at the source meanwhile, and fails
		write(t, file, limit("9/1h"))
		<-time.After(2 * time.Second)
		require.NoError(t, e.Err())
		assert.Equal(t, int64(8), remaining(t, e, 1))
	})
}

func TestAnEngineNeedsRulesThatAreRight(t *testing.T) {
	t.Parallel()
	l, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	for _, test := range []struct {
		source rules.Source
		want   string
	}{
		{rules.NewMemory(rules.File{Name: "a", Data: []byte("x: 1")}), "a:1:1"},
		{rules.Files("testdata/none"), "no such file"},
		{rules.Files("testdata"), "has no files *.yaml, *.yml or *.json"},
		{nil, "must not be nil"},
	} {
		_, err := rules.NewEngine(l, test.source, nil)
		require.ErrorContains(t, err, test.want)
	}
	_, err = rules.NewEngine(nil, rules.NewMemory(), nil)
	require.ErrorContains(t, err, "must not be nil")
	_, err = rules.NewEngine(l, rules.NewMemory(), &rules.Options{Interval: -1})
	require.ErrorContains(t, err, "Options.Interval is -1ns")
	e, err := rules.NewEngine(l, rules.NewMemory(), nil)
	require.NoError(t, err, "a memory may be empty at first")
	e.Close()
	e.Close()
}

// TestWhoWaitsForAnotherReadLeavesWithItsContext reads a file that another call waits for to settle.
func TestWhoWaitsForAnotherReadLeavesWithItsContext(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "a.yaml")
	write(t, file, limit("1/1h"))
	synctest.Test(t, func(t *testing.T) {
		source := rules.Files(file)
		_, err := source.Files(t.Context())
		require.NoError(t, err)
		write(t, file, limit("2/1h"))
		go func() { _, _ = source.Files(t.Context()) }()
		synctest.Wait()
		left, leave := context.WithCancel(t.Context())
		leave()
		_, err = source.Files(left)
		require.ErrorIs(t, err, context.Canceled)
	})
}

// held is a source that answers at once, and from the second time on when it is told to.
type held struct {
	asked  chan struct{}
	answer chan struct{}
}

func (h held) Files(context.Context) ([]rules.File, error) {
	h.asked <- struct{}{}
	<-h.answer
	return []rules.File{{Name: "a", Data: limit("1/1h")}}, nil
}

func TestWhoWaitsForAnotherReloadLeavesWithItsContext(t *testing.T) {
	t.Parallel()
	h := held{make(chan struct{}, 1), make(chan struct{}, 1)}
	th, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	h.answer <- struct{}{}
	e, err := rules.NewEngine(th, h, &rules.Options{Interval: time.Hour})
	require.NoError(t, err)
	<-h.asked
	done := make(chan error)
	go func() { done <- e.Reload(context.WithoutCancel(t.Context())) }()
	<-h.asked
	left, leave := context.WithCancel(t.Context())
	leave()
	require.ErrorIs(t, e.Reload(left), context.Canceled)
	h.answer <- struct{}{}
	require.NoError(t, <-done)
	e.Close()
}
