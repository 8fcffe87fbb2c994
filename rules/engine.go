// The engine: the rules in force, and how newer ones are loaded.

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

// DefaultInterval is the Interval of Options that leave it 0.
const DefaultInterval = time.Second

// Options are the options of NewEngine. The zero value means the defaults.
type Options struct {
	// Interval is the time from one look at the source to the next; 0 is DefaultInterval. The engine looks earlier if a
	// Watcher reports a change, and after at most DefaultInterval if the source failed.
	Interval time.Duration

	// OnLoad, if not nil, is called with the new rules after each change, and with the rules when a source works again
	// after a failure. It is called with an error and a nil set when a source begins to fail or fails with another error:
	// the rules then stay as they are. It is not called for the first load, whose error NewEngine returns. It is called
	// by one goroutine at a time, and reloads wait until it returns.
	OnLoad func(set *Set, err error)
}

// Engine decides by the rules of a source. It is safe for concurrent use.
type Engine struct {
	t       *throttler.Throttler
	source  Source
	options Options
	set     atomic.Pointer[Set]
	failed  atomic.Pointer[failure] // why the last load failed; nil if it did not
	limits  overrides

	loading turn     // held during a load, so that an older set never replaces a newer one; guards bad
	bad     struct { // the last files that did not compile: they are not compiled again at each look
		etag string
		err  error
	}

	stop  context.CancelFunc
	tasks sync.WaitGroup
}

type failure struct{ err error }

// NewEngine loads the rules and looks for newer ones until Close. Decisions go through t. Its Config.Name separates the
// consumption of rules from that of others on the same storage; its own buckets are not used. Nil options mean the
// defaults.
//
// The error is of type Faults if the rules are wrong; otherwise it is the error of the source. A later error leaves the
// rules as they are: see Engine.Err and Options.OnLoad.
func NewEngine(t *throttler.Throttler, s Source, o *Options) (*Engine, error) {
	if t == nil || s == nil {
		return nil, errors.New("rules: the Throttler and the Source must not be nil")
	}
	e := &Engine{t: t, source: s, loading: newTurn()}
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

// watch starts the goroutines that load the rules at each interval and whenever the source reports a change.
func (e *Engine) watch(ctx context.Context) {
	changed := make(chan struct{}, 1)
	if w, ok := e.source.(Watcher); ok {
		e.tasks.Go(func() {
			w.Watch(ctx, func() {
				select {
				case changed <- struct{}{}:
				default: // a load is due anyway, and will see this change too
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
			_ = e.load(ctx, true) // load reports the error by Err and OnLoad
		}
	})
}

// pause returns the time to the next look. A source that failed is asked again soon, because it may have lost the notice
// of a change. Faults are no failure of the source, so they do not shorten the pause.
func (e *Engine) pause() time.Duration {
	var faults Faults
	if err := e.Err(); err != nil && !errors.As(err, &faults) {
		return min(e.options.Interval, DefaultInterval)
	}
	return e.options.Interval
}

// Close stops looking for newer rules and waits until that has stopped. Decisions go on with the present rules. The
// Throttler and the source stay open: they belong to the caller.
func (e *Engine) Close() {
	e.stop()
	e.tasks.Wait()
}

// Rules returns the rules in force.
func (e *Engine) Rules() *Set { return e.set.Load() }

// Err returns why the rules in force are not the newest of the source, nil if they are.
func (e *Engine) Err() error {
	if f := e.failed.Load(); f != nil {
		return f.err
	}
	return nil
}

// Reload loads the rules now. Its error is that of Err, or of ctx if that ended before the load did.
func (e *Engine) Reload(ctx context.Context) error { return e.load(ctx, true) }

// load puts the newest rules in force if they have no fault. It calls OnLoad only if tell is set and something changed.
func (e *Engine) load(ctx context.Context, tell bool) error {
	if err := e.loading.take(ctx); err != nil {
		return err
	}
	defer e.loading.leave()
	set, err := e.newest(ctx)
	if err != nil && ctx.Err() != nil {
		return err // ctx ended, which says nothing about the source
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

// newest compiles the files of the source. If they have not changed it returns the present set itself, so that load can
// compare pointers.
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
