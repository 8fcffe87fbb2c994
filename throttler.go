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

// Verdict is the answer to a call: Allowed bool; RetryAfter time.Duration, exact to 1 µs, 0 if allowed;
// Levels() []Level; Source() string, "runtime", "redis" or "postgres", or "" if no storage answered;
// Degraded() and Taken() bool. The methods have pointer receivers. See storage.Verdict.
type Verdict = storage.Verdict

// Level is the state of one bucket right after a decision: Identifier and Bucket, string; Limit and
// Remaining, int64, in tokens; Period, ResetAfter until full, and RetryAfter until this bucket admits
// the refused cost, 0 if it did, each a time.Duration. See storage.Level.
type Level = storage.Level

// Clock tells the time and waits: github.com/benbjohnson/clock has some.
type Clock = storage.Clock

// BucketError is a fault in the definition of a bucket, or in the way a call uses one: the Bucket, the
// Field and the Reason. See storage.BucketError.
type BucketError = storage.BucketError

// The errors, always wrapped with the particulars: test with errors.Is. A faulty bucket is a
// *BucketError.
var (
	ErrUnknownIdentifier   = storage.ErrUnknownIdentifier        // it has no buckets, and Config has none for it
	ErrInvalidIdentifier   = storage.ErrInvalidIdentifier        // empty, over 1024 bytes, twice in one call, or over 256 of them
	ErrInvalidCost         = storage.ErrInvalidCost              // below zero, or a refund above what was taken
	ErrCostExceedsCapacity = storage.ErrCostExceedsCapacity      // waiting never helps; the Verdict beside it has the Levels
	ErrDebtLimit           = errors.New("throttler: debt limit") // a Charge that was recorded in part: a *DebtError
	ErrInvalidClock        = storage.ErrInvalidClock             // Config.Clock reads a time outside 1970 to 2184
	ErrUnavailable         = storage.ErrUnavailable              // the storage could not decide
	ErrCorruptState        = storage.ErrCorruptState             // the storage holds a value that is not ours; never the runtime storage
	ErrClosed              = storage.ErrClosed                   // the storage was closed; never the runtime storage
)

// ErrLimited is what a LimitedError is, for errors.Is.
var ErrLimited = errors.New("throttler: limited")

// LimitedError is a denial for callers that want an error: return &LimitedError{Verdict: v} when v is not
// Allowed. Consume itself never returns it.
type LimitedError struct{ Verdict Verdict }

// Error says who was limited, by which bucket and for how long.
func (e *LimitedError) Error() string {
	id, bucket := refusedBy(&e.Verdict)
	return fmt.Sprintf("%v: %.64q by bucket %q, retry after %v", ErrLimited, id, bucket, e.Verdict.RetryAfter)
}

// Unwrap returns ErrLimited.
func (e *LimitedError) Unwrap() error { return ErrLimited }

// DebtError is what a Charge returns for a bucket that owes too much: at most 4 capacities are ever out of one.
type DebtError struct {
	Identifier, Bucket string
	Asked, Recorded    int64 // tokens
	Limit              int64 // tokens that may be out: 4 capacities
}

// Error says how much of the charge was recorded.
func (e *DebtError) Error() string {
	return fmt.Sprintf("%v: of %d tokens charged to bucket %q of %.64q, %d are recorded, as no more than %d may be out", ErrDebtLimit, e.Asked, e.Bucket, e.Identifier, e.Recorded, e.Limit)
}

// Unwrap returns ErrDebtLimit.
func (e *DebtError) Unwrap() error { return ErrDebtLimit }

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

// AddBucket gives the identifier buckets of its own: the first ones replace Config.Buckets for it,
// later ones are added. They are known to this Throttler only, until they are removed: call it in every process that
// limits the identifier. A bucket of a name that it has replaces that one, and what was spent
// stays spent. An identifier has at most 16 buckets, of different names; more are a *BucketError. If any
// is faulty none is added, and all faults are returned, joined. An invalid identifier is
// ErrInvalidIdentifier; no buckets change nothing.
func (t *Throttler) AddBucket(id string, b ...Bucket) error {
	if err := storage.ValidateIdentifier(id); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.ownSet(id).with(b)
	if s.err != nil {
		return s.err
	}
	if len(s.buckets) > 0 {
		t.own.Store(strings.Clone(id), t.shared(s))
		t.owned.Store(true)
	}
	return nil
}

// shared is a set of the same buckets that was made lately, or s.
func (t *Throttler) shared(s *set) *set {
	for _, r := range t.recent {
		if r != nil && slices.Equal(r.rules, s.rules) {
			return r
		}
	}
	t.recent[t.oldest] = s
	t.oldest = (t.oldest + 1) % len(t.recent)
	return s
}

// Buckets returns the identifier's buckets: its own, else those of Config.Buckets.
func (t *Throttler) Buckets(id string) []Bucket {
	s := t.set(id)
	if s == nil {
		return nil
	}
	return slices.Clone(s.buckets)
}

// RemoveBucket removes the identifier's own bucket of this name and reports whether it had one.
// After the last one Config.Buckets applies again. What was spent from it is not forgotten.
func (t *Throttler) RemoveBucket(id, name string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	var rest []Bucket
	had := t.ownSet(id)
	if had == nil {
		return false
	}
	for _, b := range had.buckets {
		if b.Name() != name {
			rest = append(rest, b)
		}
	}
	if len(rest) == 0 {
		t.own.Delete(id)
	} else {
		t.own.Store(strings.Clone(id), t.shared(newSet(rest)))
	}
	return len(rest) < len(had.buckets)
}

// RemoveBuckets removes all buckets of the identifier's own.
func (t *Throttler) RemoveBuckets(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.own.Delete(id)
}

func (t *Throttler) ownSet(id string) *set {
	if !t.owned.Load() {
		return nil
	}
	s, _ := t.own.Load(id)
	own, _ := s.(*set)
	return own
}

// set is the buckets that apply to the identifier, or nil.
func (t *Throttler) set(id string) *set {
	if s := t.ownSet(id); s != nil {
		return s
	}
	return t.defaults
}

// Option changes one call. Options are values; one may be made once and used for many calls.
type Option struct {
	kind   optionKind
	n      int64
	bucket string
	set    *set
}

type optionKind uint8

const (
	costOption optionKind = iota + 1 // the zero Option does nothing
	costOfOption
	usingOption
)

// Cost asks every bucket for n tokens, 0 or more, in place of Config.Cost.
func Cost(n int64) Option { return Option{kind: costOption, n: n} }

// CostOf asks the bucket of this name for n tokens, whatever Cost says of the others.
func CostOf(bucket string, n int64) Option { return Option{kind: costOfOption, bucket: bucket, n: n} }

// Using decides the call by these buckets, whichever the identifier has. Give them names
// (Bucket.Named): an identifier that moves to a bucket of the same name and another limit keeps
// what it has spent. Of all buckets that its calls name at most 16 may be less than full at a time.
// Making the Option compiles the buckets; keep it in a variable.
func Using(b ...Bucket) Option {
	return Option{kind: usingOption, set: newSet(slices.Clone(b))}
}

// Part is one identifier of a ConsumeAll.
type Part struct {
	id      string
	options []Option
}

// For names an identifier of a ConsumeAll, with the options of its own.
func For(id string, o ...Option) Part { return Part{id, o} }

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

// unrecorded is the error of a Charge that some buckets did not take whole, of which the counts then tell what is.
func unrecorded(v *Verdict) error {
	var faults []error
	n := 0
	for i := range v.Parts() {
		p := v.Part(i)
		for j := range p.Rules {
			r, c, asked := &p.Rules[j], v.Count(n), p.Cost(j)
			if over := -c.Remaining - 3*r.Capacity; over > 0 && asked > 0 {
				most := min(asked, 4*r.Capacity)
				recorded := max(0, most-over)
				c.Remaining += most - recorded
				v.Set(n, c)
				faults = append(faults, &DebtError{p.Identifier, r.Name, asked, recorded, 4 * r.Capacity})
			} else if asked > 4*r.Capacity {
				faults = append(faults, &DebtError{p.Identifier, r.Name, asked, 4 * r.Capacity, 4 * r.Capacity})
			}
			n++
		}
	}
	return errors.Join(faults...)
}

// now tells the injected clock's time; without one the storage has its own.
func (t *Throttler) now() (micros int64, clocked bool, err error) {
	if t.clock == nil {
		return 0, false, nil
	}
	micros, err = storage.Micros(t.clock.Now())
	return micros, true, err
}

// Refund gives back what v took. With options it gives back what they name and nothing else: Cost(n) n to every bucket,
// CostOf(bucket, n) n to that one. More than was taken is ErrInvalidCost. Tokens that have already come back by themselves are not given back; a Continuous
// bucket's share that drained in the meantime is known to a tick, nearly always one microsecond. The
// verdict must come from a Throttler of this Name and storage; refund each once: it does not remember.
// A verdict that took nothing, a denial or a Peek, gives nothing back. After an error of the storage
// some of several parts may have been given back: do not try again.
func (t *Throttler) Refund(ctx context.Context, v Verdict, o ...Option) error {
	if !v.Taken() {
		return nil
	}
	if err := refundable(&v, o); err != nil {
		t.rejected(ctx, OpRefund, v.Part(0).Identifier, err)
		return err
	}
	charges := make([]storage.Charge, v.Parts())
	n := 0
	for i := range charges {
		p := v.Part(i)
		if err := t.refund(&charges[i], &v, p, n, o); err != nil {
			t.rejected(ctx, OpRefund, p.Identifier, err)
			return err
		}
		n += len(p.Rules)
	}
	var failed []error
	for _, c := range charges {
		start := time.Now()
		err := t.storage.Charge(ctx, c)
		if t.observe != nil {
			e := Event{Op: OpRefund, Identifier: c.Identifier, Verdict: v, Err: err, Duration: time.Since(start)}
			for _, a := range c.Amounts {
				e.Cost = max(e.Cost, -a.N)
			}
			t.observe(ctx, e)
		}
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}

// refund makes the charge of one part, whose counts begin at number from.
func (t *Throttler) refund(c *storage.Charge, v *Verdict, p *storage.Part, from int, options []Option) error {
	c.Name, c.Identifier, c.Rules = t.name, p.Identifier, p.Rules
	var err error
	if c.Now, c.Clocked, err = t.now(); err != nil {
		return err
	}
	now := c.Now
	if !c.Clocked {
		now = storage.Monotonic()
	}
	for j := range p.Rules {
		taken := p.Cost(j)
		n := refundOf(p.Rules[j].Name, taken, options)
		if n < 0 || n > taken {
			return fmt.Errorf("%w: a refund of %d tokens to bucket %q, must be 0 to the %d that were taken", ErrInvalidCost, n, p.Rules[j].Name, taken)
		}
		c.Amounts = append(c.Amounts, storage.Amount{N: -n, In: v.Count(from+j).HeldFor - max(0, now-v.At())})
	}
	return nil
}

// refundable checks that each CostOf names a bucket of v.
func refundable(v *Verdict, options []Option) error {
options:
	for _, o := range options {
		if o.kind != costOfOption {
			continue
		}
		for i := range v.Parts() {
			if slices.ContainsFunc(v.Part(i).Rules, func(r storage.Rule) bool { return r.Name == o.bucket }) {
				continue options
			}
		}
		return noSuchBucket(o.bucket, v.Part(0).Identifier)
	}
	return nil
}

// refundOf is what the options ask to give back to one bucket: everything if they name no cost.
func refundOf(bucket string, taken int64, options []Option) int64 {
	n := taken
	for _, o := range options {
		if o.kind == costOfOption {
			n = 0
		}
	}
	for _, o := range options {
		if o.kind == costOption {
			n = o.n
		}
	}
	for _, o := range options {
		if o.kind == costOfOption && o.bucket == bucket {
			n = o.n
		}
	}
	return n
}

// Reset forgets what the identifier has spent, from all of its buckets.
func (t *Throttler) Reset(ctx context.Context, id string) error {
	err := storage.ValidateIdentifier(id)
	start := time.Now()
	if err == nil {
		err = t.storage.Reset(ctx, t.name, id)
	}
	t.tidy()
	if t.observe != nil {
		t.observe(ctx, Event{Op: OpReset, Identifier: id, Err: err, Duration: time.Since(start)})
	}
	return err
}

// Op names what an Event is about.
type Op string

// The values of Op. Each try of a Wait is an OpConsume, after an OpPeek when it has to queue.
const (
	OpConsume Op = "consume"
	OpPeek    Op = "peek"
	OpCharge  Op = "charge"
	OpRefund  Op = "refund"
	OpReset   Op = "reset"
)

func opOf(m storage.Mode) Op {
	return [...]Op{storage.Take: OpConsume, storage.Peek: OpPeek, storage.Force: OpCharge}[m]
}

// Event is what Observe is told of a call. The identifiers in it may be the caller's strings: where callers use their
// memory again, as on fasthttp, an Observe that keeps one clones it.
type Event struct {
	Op         Op
	Identifier string        // of several parts the first, or the one that refused; Levels names all
	Cost       int64         // the largest cost asked of a bucket, or given back to one
	Bucket     string        // refused: the bucket with the longest RetryAfter
	Verdict    Verdict       // as the caller got it: Allowed, Levels, Source, Degraded; of OpRefund the refunded one
	Err        error         // also when a policy allowed the call
	Duration   time.Duration // of the call, storage included
}

// largestCost is the most that v was asked of one bucket.
func largestCost(v *Verdict) (cost int64) {
	for i := range v.Parts() {
		p := v.Part(i)
		for j := range p.Rules {
			cost = max(cost, p.Cost(j))
		}
	}
	return cost
}

// refusedBy is the identifier and the bucket with the longest RetryAfter, if any has one.
func refusedBy(v *Verdict) (id, bucket string) {
	for _, l := range v.Levels() {
		if l.RetryAfter > 0 && l.RetryAfter == v.RetryAfter {
			id, bucket = l.Identifier, l.Bucket
		}
	}
	return id, bucket
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

// Report tells Observe of a call that was denied before the Throttler was asked, and why: for middleware that does not know
// whom a request counts for. The Event is an OpConsume with this Err.
func (t *Throttler) Report(ctx context.Context, id string, err error) {
	t.rejected(ctx, OpConsume, id, err)
}

// rejected observes a call that was wrong.
func (t *Throttler) rejected(ctx context.Context, op Op, id string, err error) {
	t.tidy()
	if t.observe != nil {
		t.observe(ctx, Event{Op: op, Identifier: id, Err: err})
	}
}
