// The engine: the rules that count now, and looking for newer ones.

package rules

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-throttler/throttler"
)

// DefaultInterval is Options.Interval where that is 0.
const DefaultInterval = time.Second

// Options of NewEngine. The zero value is the default.
type Options struct {
	// Interval is how long after a look at the source the next one is, 0 for DefaultInterval. A Watcher is looked at
	// earlier when it says so, and a source that failed after DefaultInterval at the latest.
	Interval time.Duration

	// OnLoad, if not nil, is called with the rules after each change, and after a source that failed is right again; and
	// with an error, and no set, when a source begins to fail, or fails with another error: the rules then stay as they
	// are. It is not called for the first load, whose error NewEngine returns. It is called by one goroutine at a time,
	// and delays reloads until it returns.
	OnLoad func(set *Set, err error)
}

// Engine decides by the rules of a source. It is safe for concurrent use.
type Engine struct {
	t       *throttler.Throttler
	source  Source
	options Options
	set     atomic.Pointer[Set]
	failed  atomic.Pointer[failure] // nil if the last load was fine
	limits  overrides

	loading sync.Mutex // held by the one who loads; guards bad
	bad     struct {   // the last files that did not compile
		etag string
		err  error
	}

	stop  context.CancelFunc
	tasks sync.WaitGroup
}

type failure struct{ err error }

// NewEngine loads the rules, and looks for newer ones until Close. The throttler decides: its Config.Name separates the
// consumption of rules from that of others on its storage, and its buckets are not asked. Nil options are the default.
//
// The error is Faults if the rules are wrong, or that of the source. Later such an error leaves the rules as they are:
// Engine.Err and Options.OnLoad tell it.
func NewEngine(t *throttler.Throttler, s Source, o *Options) (*Engine, error) {
	if t == nil || s == nil {
		return nil, errors.New("rules: the Throttler and the Source must not be nil")
	}
	e := &Engine{t: t, source: s}
	if o != nil {
		e.options = *o
	}
	if e.options.Interval < 0 {
		return nil, fmt.Errorf("rules: Options.Interval is %v, must be 0 or more", e.options.Interval)
	}
	if e.options.Interval == 0 {
		e.options.Interval = DefaultInterval
	}
	e.set.Store(&Set{})
	if err := e.load(context.Background(), false); err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	e.stop = stop
	e.watch(ctx)
	return e, nil
}

// watch loads whenever the time has come, or the source says so.
func (e *Engine) watch(ctx context.Context) {
	changed := make(chan struct{}, 1)
	if w, ok := e.source.(Watcher); ok {
		e.tasks.Go(func() {
			w.Watch(ctx, func() {
				select {
				case changed <- struct{}{}:
				default: // the next look sees it
				}
			})
		})
	}
	e.tasks.Go(func() {
		for {
			wait := time.NewTimer(e.pause())
			select {
			case <-changed:
			case <-wait.C:
			case <-ctx.Done():
			}
			wait.Stop()
			if ctx.Err() != nil {
				return
			}
			_ = e.load(ctx, true) // told by Err and OnLoad
		}
	})
}

// pause is until the next look: a source that failed is not left alone for long, as its word of a change may be lost.
func (e *Engine) pause() time.Duration {
	var faults Faults
	if err := e.Err(); err != nil && !errors.As(err, &faults) {
		return min(e.options.Interval, DefaultInterval)
	}
	return e.options.Interval
}

// Close ends looking for newer rules, and waits for it. Decisions go on with the rules that there are. The Throttler and
// the source belong to the caller.
func (e *Engine) Close() {
	e.stop()
	e.tasks.Wait()
}

// Rules are those that count now.
func (e *Engine) Rules() *Set { return e.set.Load() }

// Err is why the rules that count are not the newest ones of the source: nil if they are.
func (e *Engine) Err() error {
	if f := e.failed.Load(); f != nil {
		return f.err
	}
	return nil
}

// Reload looks at the source now. It returns Err.
func (e *Engine) Reload(ctx context.Context) error { return e.load(ctx, true) }

// load takes the newest rules, if these have no fault.
func (e *Engine) load(ctx context.Context, tell bool) error {
	e.loading.Lock()
	defer e.loading.Unlock()
	set, err := e.newest(ctx)
	if err != nil && ctx.Err() != nil {
		return err // the source was not asked
	}
	before := e.Err()
	if err != nil {
		e.failed.Store(&failure{err})
	} else {
		e.failed.Store(nil)
	}
	switch {
	case err != nil && tell && (before == nil || before.Error() != err.Error()):
		e.tell(nil, err)
	case err == nil && (set != e.set.Load() || before != nil):
		e.set.Store(set)
		if tell {
			e.tell(set, nil)
		}
	}
	return err
}

func (e *Engine) tell(set *Set, err error) {
	if e.options.OnLoad != nil {
		e.options.OnLoad(set, err)
	}
}

// newest is the set of the source's files: the present one, if these are those.
func (e *Engine) newest(ctx context.Context) (*Set, error) {
	files, err := e.source.Files(ctx)
	if err != nil {
		return nil, err
	}
	now, tag := e.set.Load(), etag(files)
	if tag == now.etag {
		return now, nil
	}
	if tag == e.bad.etag {
		return nil, e.bad.err
	}
	set, err := Compile(files...)
	if err != nil {
		e.bad.etag, e.bad.err = tag, err
	}
	return set, err
}
