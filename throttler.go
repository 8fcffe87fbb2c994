// Package throttler limits rates: several buckets for each identifier ("5 per 10 s AND 100 per
// hour"), from which a call takes its cost all or none.
//
//	t, err := throttler.New(throttler.Config{})
//	err = t.AddBucket("user:42", throttler.NewBucket(10*time.Second, 5), throttler.NewBucket(time.Hour, 100))
//	v, err := t.Consume("user:42")
//	if err != nil { … }                          // the storage failed, or the call is wrong
//	if !v.Allowed { … v.RetryAfter … }           // a denial is a verdict, not an error
//
// Which buckets an identifier has is known to the Throttler only: those of AddBucket, else those of
// Config.Buckets, or for one call those of Using. What has been spent is kept by the storage, under
// the identifier and the bucket's name; a storage shared by several processes shares consumption,
// so each process defines the buckets and all of them spend from one.
//
// All numbers are integers and all times whole microseconds: RetryAfter is exact.
package throttler

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/runtime"
)

// Policy chooses what happens to a call that cannot be decided.
type Policy int

// The policies. Deny, the default, makes the call fail with an error.
const (
	Deny Policy = iota
	Allow
)

// Config of a Throttler. The zero value limits nobody yet and keeps consumption in this process.
type Config struct {
	// Name separates the consumption of throttlers that share a storage; equal names share it. At
	// most 64 characters of A-Z, a-z, 0-9, "_", "." and "-".
	Name string

	// Storage keeps what has been spent. Nil is a new runtime storage.
	Storage storage.Storage

	// Cost of a call that has no Cost option, in tokens. 0 is 1; below 0 is an error of New; above a
	// capacity each call but Charge is ErrCostExceedsCapacity.
	Cost int64

	// Buckets are for every identifier that has none of its own: at most 16 for an identifier, of
	// different names; more are a *BucketError.
	Buckets []Bucket

	// OnUnknownIdentifier is for an identifier without any buckets: Deny returns
	// ErrUnknownIdentifier, Allow a Verdict that is Allowed and has no Levels.
	OnUnknownIdentifier Policy

	// OnStorageError is for a decision that failed with ErrUnavailable: Deny returns the error,
	// Allow a Verdict that is Allowed and Degraded and has no Levels. Cancelled and invalid calls
	// always fail, and so do Charge, Refund and Reset.
	OnStorageError Policy

	// Clock replaces the storage's own clock, mostly in tests. Throttlers of one Name on one
	// storage use the same clock. In a testing/synctest bubble none is needed, if the Throttler is
	// made in the bubble.
	Clock Clock

	// Observe, if not nil, is called once after each decision and change of what is spent, also one that failed (a
	// Refund of several parts makes a change each), by the goroutine of the call, and must be safe for
	// concurrent use.
	Observe func(context.Context, Event)
}

// Throttler is safe for concurrent use. It is made by New only, and holds no resources of its own.
type Throttler struct {
	name     string
	storage  storage.Storage
	memory   *runtime.Storage // the storage, if it is one: called without copies
	direct   bool             // by its own clock, and nobody observes
	cost     int64
	defaults *set // nil: none
	unknown  Policy
	failed   Policy
	clock    Clock // nil: the storage's own
	observe  func(context.Context, Event)

	lines lines

	owned atomic.Bool // whether own has ever held a set: most throttlers never ask it
	own   sync.Map    // identifier -> *set, of AddBucket
	mu    sync.Mutex  // held to change own, and for what follows

	recent [8]*set // sets made lately: identifiers with the same buckets share one
	oldest int
}

var validName = regexp.MustCompile(`^[A-Za-z0-9_.-]{0,64}$`)

// New returns a Throttler, or all faults of the configuration joined.
func New(c Config) (*Throttler, error) {
	t := &Throttler{
		name: strings.Clone(c.Name), storage: c.Storage, cost: c.Cost, clock: c.Clock, observe: c.Observe,
		unknown: c.OnUnknownIdentifier, failed: c.OnStorageError,
	}
	if t.storage == nil {
		t.storage = runtime.New(nil)
	}
	t.memory, _ = t.storage.(*runtime.Storage)
	t.direct = t.memory != nil && t.clock == nil && t.observe == nil
	if t.cost == 0 {
		t.cost = 1
	}
	var faults []error
	if !validName.MatchString(c.Name) {
		faults = append(faults, fmt.Errorf("throttler: Config.Name is %.80q, must be at most 64 characters of A-Z, a-z, 0-9, '_', '.' and '-'", c.Name))
	}
	if c.Cost < 0 {
		faults = append(faults, fmt.Errorf("%w: Config.Cost is %d, must be 0 or more", ErrInvalidCost, c.Cost))
	}
	for _, p := range [...]Policy{t.unknown, t.failed} {
		if p != Deny && p != Allow {
			faults = append(faults, fmt.Errorf("throttler: a policy is %d, must be Deny or Allow", p))
		}
	}
	if len(c.Buckets) > 0 {
		t.defaults = newSet(slices.Clone(c.Buckets))
		faults = append(faults, t.defaults.err)
	}
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	return t, nil
}

// Consume takes the cost of a call from all buckets of the identifier, or from none. It returns an
// error when the call is wrong or the storage failed; a denial is a Verdict. A storage outside the process that
// fails in the middle may have taken the cost, once.
func (t *Throttler) Consume(id string, o ...Option) (v Verdict, err error) {
	err = t.decide(context.Background(), &v, storage.Take, id, o)
	return v, err
}

// ConsumeContext is Consume that gives up when the context is done. A call that gave up in the
// middle may have been charged, once.
func (t *Throttler) ConsumeContext(ctx context.Context, id string, o ...Option) (v Verdict, err error) {
	err = t.decide(ctx, &v, storage.Take, id, o)
	return v, err
}

// Peek answers what Consume with the same options would answer now, and takes nothing: the Levels
// of an allowed Peek are those after the cost. With Cost(0) they are those now.
func (t *Throttler) Peek(ctx context.Context, id string, o ...Option) (v Verdict, err error) {
	err = t.decide(ctx, &v, storage.Peek, id, o)
	return v, err
}

// Charge takes the cost, 0 or more, from all buckets, even where too little is left: for costs that are
// known only afterwards. That may leave a debt (Level.Debt), and calls are denied until it is paid. No more than 4
// capacities of a bucket are ever out: what exceeds them is not recorded, and the error joins a *DebtError for each bucket
// of which that is so. In a bucket that is
// not Continuous the debt is forgiven after one period, SlidingWindow two.
func (t *Throttler) Charge(ctx context.Context, id string, o ...Option) error {
	var v Verdict
	return t.decide(ctx, &v, storage.Force, id, o)
}

// ConsumeAll takes from all buckets of all parts, or from none. An identifier may stand in one part
// only.
func (t *Throttler) ConsumeAll(ctx context.Context, parts ...Part) (v Verdict, err error) {
	for i := range parts {
		var p storage.Part
		if err := t.part(&p, parts[i].id, parts[i].options); err != nil {
			t.rejected(ctx, OpConsume, parts[i].id, err)
			return Verdict{}, err
		}
		if p.Rules != nil {
			v.Ask(&p)
		}
	}
	if err = t.ask(ctx, &v, storage.Take); err != nil && errors.Is(err, ErrCostExceedsCapacity) {
		t.lookAll(ctx, &v, parts)
	}
	return v, err
}

// decide answers into a zero Verdict, whose first part is the request: so it is nowhere copied, and Consume is inlined
// into its caller.
func (t *Throttler) decide(ctx context.Context, v *Verdict, mode storage.Mode, id string, o []Option) error {
	if err := t.part(v.Part(0), id, o); err != nil {
		*v = Verdict{}
		t.rejected(ctx, opOf(mode), id, err)
		return err
	}
	err := t.ask(ctx, v, mode)
	if err != nil && errors.Is(err, ErrCostExceedsCapacity) {
		t.look(ctx, v, id, o)
	}
	return err
}

// look makes v, of a call that asked for more than a bucket holds, tell what the buckets have. It stays empty if that
// fails. The options are those of one identifier, and not a Part's: so they stay off the heap.
func (t *Throttler) look(ctx context.Context, v *Verdict, id string, o []Option) {
	*v = Verdict{}
	p := v.Part(0)
	if t.part(p, id, o) == nil && p.Rules != nil {
		p.Begin(id, p.Rules, 0)
		_ = t.answer(ctx, v, storage.Peek, storage.Elapsed())
	}
	v.Allowed = false
}

// lookAll is look for several identifiers.
func (t *Throttler) lookAll(ctx context.Context, v *Verdict, parts []Part) {
	*v = Verdict{}
	for i := range parts {
		var p, all storage.Part
		if t.part(&p, parts[i].id, parts[i].options) == nil && p.Rules != nil {
			all.Begin(p.Identifier, p.Rules, 0)
			v.Ask(&all)
		}
	}
	_ = t.answer(ctx, v, storage.Peek, storage.Elapsed())
	v.Allowed = false
}

// part is the request for one identifier, in place of a zero one. Without rules it is an unknown
// identifier that is allowed.
func (t *Throttler) part(p *storage.Part, id string, options []Option) error {
	s, cost := (*set)(nil), t.cost
	for i := range options {
		switch o := &options[i]; o.kind {
		case costOption:
			cost = o.n
		case usingOption:
			s = o.set
		}
	}
	if s == nil {
		s = t.set(id)
	}
	if s == nil || len(s.rules) == 0 {
		return t.unknownPart(p, id, cost)
	}
	if s.err != nil {
		return s.err
	}
	p.Begin(id, s.rules, cost)
	for i := range options {
		if o := &options[i]; o.kind == costOfOption {
			j := s.find(o.bucket)
			if j < 0 {
				return noSuchBucket(o.bucket, id)
			}
			p.SetCost(j, o.n)
		}
	}
	return nil
}

func noSuchBucket(bucket, id string) error {
	return &BucketError{Bucket: bucket, Field: "CostOf", Reason: fmt.Sprintf("names none of the buckets of %.64q", id)}
}

func (t *Throttler) unknownPart(p *storage.Part, id string, cost int64) error {
	if err := storage.ValidateIdentifier(id); err != nil {
		return err
	}
	if cost < 0 {
		return fmt.Errorf("%w: %d, must be 0 or more", ErrInvalidCost, cost)
	}
	if t.unknown == Allow {
		p.Identifier = id
		return nil
	}
	return fmt.Errorf("%w: %.64q has no buckets: use AddBucket, Config.Buckets or Using", ErrUnknownIdentifier, id)
}

// ask has the storage decide on the parts that v was asked, and observes.
func (t *Throttler) ask(ctx context.Context, v *Verdict, mode storage.Mode) error {
	if !t.direct || mode == storage.Force || v.Parts() == 0 {
		return t.askAnyhow(ctx, v, mode)
	}
	if err := t.memory.DecideInto(ctx, v, t.name, mode, false, storage.Monotonic()); err != nil {
		return t.orAllow(ctx, v, mode, err)
	}
	return nil
}

func (t *Throttler) askAnyhow(ctx context.Context, v *Verdict, mode storage.Mode) error {
	if t.observe != nil {
		return t.askObserved(ctx, v, mode)
	}
	return t.orAllow(ctx, v, mode, t.answer(ctx, v, mode, storage.Elapsed()))
}

func (t *Throttler) askObserved(ctx context.Context, v *Verdict, mode storage.Mode) error {
	id, cost, start := v.Part(0).Identifier, largestCost(v), storage.Elapsed()
	cause := t.answer(ctx, v, mode, start)
	err := t.orAllow(ctx, v, mode, cause)
	bucket := ""
	if v.RetryAfter > 0 {
		if denied, by := refusedBy(v); by != "" {
			id, bucket = denied, by
		}
	}
	t.observe(ctx, Event{Op: opOf(mode), Identifier: id, Cost: cost, Bucket: bucket, Verdict: *v, Err: cause, Duration: storage.Elapsed() - start})
	return err
}

// answer is the storage's. The call began at start, by which the runtime storage decides.
func (t *Throttler) answer(ctx context.Context, v *Verdict, mode storage.Mode, start time.Duration) error {
	if v.Parts() == 0 {
		t.tidy()
		*v = Verdict{Allowed: true}
		return nil
	}
	now, clocked, err := t.now()
	switch {
	case err != nil:
		*v = Verdict{}
	case t.memory == nil:
		*v, err = t.storage.Decide(ctx, v.Request(t.name, mode, clocked, now))
	default:
		if !clocked {
			now = storage.MonotonicAt(start)
		}
		err = t.memory.DecideInto(ctx, v, t.name, mode, clocked, now)
	}
	if err == nil && mode == storage.Force {
		err = unrecorded(v)
	}
	return err
}

// orAllow allows what the policy says of a storage that failed.
func (t *Throttler) orAllow(ctx context.Context, v *Verdict, mode storage.Mode, err error) error {
	if err != nil && t.failed == Allow && mode != storage.Force && errors.Is(err, ErrUnavailable) && ctx.Err() == nil {
		*v, err = Verdict{Allowed: true}, nil
		v.Degrade()
	}
	return err
}

// now tells the injected clock's time; without one the storage has its own.
func (t *Throttler) now() (micros int64, clocked bool, err error) {
	if t.clock == nil {
		return 0, false, nil
	}
	micros, err = storage.Micros(t.clock.Now())
	return micros, true, err
}

// tidy is for calls that do not ask the runtime storage, or do not tell it the time: it forgets who is full as calls come.
func (t *Throttler) tidy() {
	if t.memory == nil {
		return
	}
	now, clocked, err := t.now()
	if !clocked {
		now = storage.Monotonic()
	}
	if err == nil {
		var nothing Verdict
		_ = t.memory.DecideInto(context.Background(), &nothing, t.name, storage.Peek, clocked, now)
	}
}
