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
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/runtime"
)

// Throttler is safe for concurrent use. It is made by New only, and holds no resources of its own.
type Throttler struct {
	name     string
	storage  storage.Storage
	memory   *runtime.Storage // the storage, if it is one: called without copies
	quick    quick            // the storage, if it knows some answers at once
	direct   bool             // by its own clock, and nobody observes
	cost     int64
	defaults *set // nil: none
	unknown  Policy
	failed   Policy
	clock    Clock // nil: the storage's own
	load     func() float64
	observe  func(context.Context, *Event)

	waiters waiters

	owned atomic.Bool // whether own has ever held a set: most throttlers never ask it
	own   sync.Map    // identifier -> *set, of AddBucket
	mu    sync.Mutex  // held to change own
}

// Consume takes the cost of a call from all buckets of the identifier, or from none. It returns an
// error when the call is wrong or the storage failed; a denial is a Verdict. A storage outside the process that
// fails in the middle may have taken the cost, once; leases may have taken tokens ahead with it.
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
// capacities of a bucket are ever out, or 4 periods' refill where that is more: what exceeds them is not recorded, and
// the error joins a *DebtError for each bucket of which that is so. In a bucket that is not Continuous the debt is forgiven after one period, SlidingWindow two.
func (t *Throttler) Charge(ctx context.Context, id string, o ...Option) error {
	var v Verdict
	err := t.decide(ctx, &v, storage.Force, id, o)
	t.waiters.tell(id, freed)
	return err
}

// ConsumeAll takes from all buckets of all parts, or from none. An identifier may stand in one part
// only, and there are at most 256 parts.
func (t *Throttler) ConsumeAll(ctx context.Context, parts ...Part) (v Verdict, _ error) {
	err := t.decideAll(ctx, &v, storage.Take, 0, 0, parts)
	return v, err
}

// PeekAll answers what ConsumeAll with the same parts would answer now, and takes nothing.
func (t *Throttler) PeekAll(ctx context.Context, parts ...Part) (v Verdict, _ error) {
	err := t.decideAll(ctx, &v, storage.Peek, 0, 0, parts)
	return v, err
}

// ChargeAll is Charge for several identifiers, in one change.
func (t *Throttler) ChargeAll(ctx context.Context, parts ...Part) error {
	var v Verdict
	err := t.decideAll(ctx, &v, storage.Force, 0, 0, parts)
	for i := range parts {
		t.waiters.tell(parts[i].id, freed)
	}
	return err
}

// decideAll is decide for several parts. Only where a level is all that there is, it is a reservation within the time.
func (t *Throttler) decideAll(ctx context.Context, v *Verdict, mode storage.Mode, within int64, attempt int, parts []Part) error {
	for i := range parts {
		err := t.add(v, mode, parts[i].id, parts[i].options)
		if err != nil && (mode != storage.Force || !errors.Is(err, ErrCostExceedsCapacity)) {
			t.rejected(ctx, opOf(mode), attempt, parts[i].id, err)
			*v = t.tooCostly(ctx, err, parts...)
			return err
		}
	}
	if reservable(v) {
		v.within = within
	}
	return t.ask(ctx, v, mode, attempt)
}

// reservable says that all buckets are Continuous, and have to give whole costs.
func reservable(v *Verdict) bool {
	for _, p := range v.parts() {
		if p.AtMost || slices.ContainsFunc(p.Rules.Rules, func(r law.Rule) bool { return r.Kind != law.Continuous }) {
			return false
		}
	}
	return true
}

// Reserve takes the cost now, all or none, if it may be used within most: that is Verdict.Delay after the decision. Only a
// Continuous bucket is reserved ahead, at most 4 periods' refill or 4 capacities of it; one of another kind has to have the
// cost now. What is reserved is spent for all others. A denial changes nothing, and after RetryAfter the same Reserve is
// admitted, if nobody else takes. Most is from 0, which is Consume, to 366 days, in whole microseconds; another is
// ErrInvalidReserve. Refund cancels.
func (t *Throttler) Reserve(ctx context.Context, id string, most time.Duration, o ...Option) (v Verdict, err error) {
	within := most.Microseconds()
	if most < 0 || within > law.MaxWithin {
		err = fmt.Errorf("%w: %v, must be 0 to %v", ErrInvalidReserve, most, duration(law.MaxWithin))
		t.rejected(ctx, OpConsume, 0, id, err)
		return v, err
	}
	v.within = within
	err = t.decide(ctx, &v, storage.Take, id, o)
	return v, err
}

// decide answers into a zero Verdict, which also is the request: so it is nowhere copied, and Consume is inlined
// into its caller.
func (t *Throttler) decide(ctx context.Context, v *Verdict, mode storage.Mode, id string, o []Option) error {
	if err := t.add(v, mode, id, o); err != nil && (mode != storage.Force || !errors.Is(err, ErrCostExceedsCapacity)) {
		return t.wrong(ctx, v, mode, 0, id, o, err)
	}
	return t.ask(ctx, v, mode, 0)
}

// wrong is the end of a call that no storage is asked about. The attempt is that of a Wait, else 0.
func (t *Throttler) wrong(ctx context.Context, v *Verdict, mode storage.Mode, attempt int, id string, o []Option, err error) error {
	t.rejected(ctx, opOf(mode), attempt, id, err)
	*v = t.tooCostly(ctx, err, For(id, slices.Clone(o)...)) // cloned, as the caller's are on its stack
	return err
}

// tooCostly tells what the buckets have to a call that asks for more than one of them holds. After other errors, and if the
// storage fails, it tells nothing.
func (t *Throttler) tooCostly(ctx context.Context, err error, parts ...Part) (v Verdict) {
	if !errors.Is(err, ErrCostExceedsCapacity) {
		return v
	}
	for i := range parts {
		if s, _ := t.setOf(parts[i].id, parts[i].options); s != nil && s.rules != nil {
			if _, err := v.add(parts[i].id, s.rules); err != nil {
				return Verdict{}
			}
		}
	}
	_ = t.answer(ctx, &v, storage.Peek, 0)
	v.Allowed = false
	return v
}

// setOf is the buckets of a call, and its cost for those that CostOf does not name.
func (t *Throttler) setOf(id string, options []Option) (s *set, cost int64) {
	cost = t.cost
	for i := range options {
		switch o := &options[i]; o.kind {
		case costOption:
			cost = o.n
		case atMostOption:
			cost = o.n
		case usingOption:
			s = o.set
		}
	}
	if s == nil {
		s = t.set(id)
	}
	return s, cost
}

// add makes an identifier a part of the request that v is. One without buckets that is allowed makes none.
func (t *Throttler) add(v *Verdict, mode storage.Mode, id string, options []Option) error {
	if id == "" || len(id) > law.MaxIdentifier {
		return validIdentifier(id)
	}
	s, cost := t.set(id), t.cost
	if len(options) > 0 {
		s, cost = t.setOf(id, options)
	}
	if s == nil || len(s.buckets) == 0 {
		if v.more == nil && v.one[0].Rules == nil {
			v.one[0].Identifier = id // for Observe
		}
		return t.unknownIdentifier(id, cost)
	}
	if s.err != nil {
		return s.err
	}
	if s.rules == nil {
		return s.costsOf(nil, id, cost, options)
	}
	rules := s.rules
	if s.elastic != nil && t.load != nil && mode != storage.Force {
		rules = s.elastic.at(t.load())
	}
	costs, err := v.add(id, rules)
	if err != nil {
		return err
	}
	for i := range costs {
		costs[i] = cost
	}
	if len(options) > 0 {
		if err := s.costsOf(costs, id, cost, options); err != nil {
			return err
		}
		if contentWithLess(options) {
			all := v.parts()
			all[len(all)-1].AtMost = true
			return lawful(s.validCosts(v, costs, id))
		}
	}
	if len(options) > 0 || cost < 0 || cost > rules.Least {
		return s.validCosts(v, costs, id)
	}
	return nil
}

// contentWithLess says that AtMost is the last word on the cost.
func contentWithLess(options []Option) (atMost bool) {
	for i := range options {
		if k := options[i].kind; k == costOption || k == atMostOption {
			atMost = k == atMostOption
		}
	}
	return atMost
}

// lawful is the error of costs that may be above a capacity.
func lawful(err error) error {
	if errors.Is(err, ErrCostExceedsCapacity) {
		return nil
	}
	return err
}

// costsOf sets the costs of the buckets that options name. Those of Unlimited buckets only must not be below 0.
func (s *set) costsOf(costs []int64, id string, cost int64, options []Option) error {
	if s.rules == nil && cost < 0 {
		return fmt.Errorf("%w: %d, must be 0 or more", ErrInvalidCost, cost)
	}
	for i := range options {
		o := &options[i]
		if o.kind != costOfOption {
			continue
		}
		j := -1
		if s.rules != nil {
			j = s.rules.Find(o.bucket)
		}
		switch {
		case j >= 0:
			costs[j] = o.n
		case !s.frees(o.bucket):
			return noSuchBucket(o.bucket, id)
		case o.n < 0:
			return fmt.Errorf("%w: %d asked of bucket %q, must be 0 or more", ErrInvalidCost, o.n, o.bucket)
		}
	}
	return nil
}

func noSuchBucket(bucket, id string) error {
	return &BucketError{Bucket: bucket, Field: "CostOf", Reason: fmt.Sprintf("names none of the buckets of %.64q", id)}
}

func (t *Throttler) unknownIdentifier(id string, cost int64) error {
	if cost < 0 {
		return fmt.Errorf("%w: %d, must be 0 or more", ErrInvalidCost, cost)
	}
	if t.unknown == Allow {
		return nil
	}
	return fmt.Errorf("%w: %.64q has no buckets: use AddBucket, Config.Buckets or Using", ErrUnknownIdentifier, id)
}

func validIdentifier(id string) error {
	if id == "" || len(id) > law.MaxIdentifier {
		return fmt.Errorf("%w: it has %d bytes, must have 1 to %d", ErrInvalidIdentifier, len(id), law.MaxIdentifier)
	}
	return nil
}

// validCosts returns the error of the first cost that is wrong. One above a capacity is not for a Charge.
func validCosts(costs []int64, rules *storage.RuleSet, id string) (err error) {
	for i, cost := range costs {
		if cost < 0 {
			return fmt.Errorf("%w: %d tokens asked of bucket %q of identifier %.64q, must be 0 or more", ErrInvalidCost, cost, rules.Rules[i].Name, id)
		}
		if r := &rules.Rules[i]; cost > r.Capacity && err == nil {
			err = fmt.Errorf("%w: %d tokens asked of bucket %q of identifier %.64q, which holds %d: waiting never helps", ErrCostExceedsCapacity, cost, r.Name, id, r.Capacity)
		}
	}
	return err
}

// ask has the storage decide on the request that v is, and observes.
func (t *Throttler) ask(ctx context.Context, v *Verdict, mode storage.Mode, attempt int) error {
	if !t.direct || mode == storage.Force || len(v.parts()) == 0 {
		return t.askAnyhow(ctx, v, mode, attempt)
	}
	if err := t.inMemory(ctx, v, mode, false, law.Monotonic()); err != nil {
		return t.orAllow(ctx, v, mode, err)
	}
	return nil
}

func (t *Throttler) askAnyhow(ctx context.Context, v *Verdict, mode storage.Mode, attempt int) error {
	if t.observe != nil {
		return t.askObserved(ctx, v, mode, attempt)
	}
	return t.orAllow(ctx, v, mode, t.answer(ctx, v, mode, 0))
}

func (t *Throttler) askObserved(ctx context.Context, v *Verdict, mode storage.Mode, attempt int) error {
	id, cost, start := first(v), largestCost(v), law.Elapsed()
	cause := t.answer(ctx, v, mode, law.MonotonicAt(start))
	err := t.orAllow(ctx, v, mode, cause)
	t.tell(ctx, t.event(opOf(mode), attempt, id, cost), v, cause, start, law.Elapsed())
	return err
}

// answer is the storage's. The time is that of this process, or 0 if it has not been read; a storage in the process decides
// by it, unless there is a Config.Clock.
func (t *Throttler) answer(ctx context.Context, v *Verdict, mode storage.Mode, real int64) error {
	if len(v.parts()) == 0 {
		t.tidy()
		*v = Verdict{Allowed: true}
		return nil
	}
	now, clocked, err := t.now()
	switch {
	case err != nil:
		*v = Verdict{}
		return err
	case !clocked:
		now = real
	}
	if t.memory != nil {
		err = t.inMemory(ctx, v, mode, clocked, now)
	} else {
		err = t.elsewhere(ctx, v, mode, clocked, now)
	}
	if err == nil && mode == storage.Force {
		err = unrecorded(v)
	}
	return err
}

// inMemory has the runtime storage decide in place, on the caller's stack. It makes the identifiers copies.
func (t *Throttler) inMemory(ctx context.Context, v *Verdict, mode storage.Mode, clocked bool, now int64) error {
	var r storage.Request // field by field, as a literal would be made elsewhere and copied
	var a storage.Answer
	r.Name, r.Mode, r.Clocked, r.Now, r.Within = t.name, mode, clocked, now, v.within
	if v.more == nil {
		n := len(v.one[0].Rules.Rules)
		r.Parts, r.Costs, a.Counts = v.one[:], v.costs[:n], v.counts[:n]
	} else {
		r.Parts, r.Costs, a.Counts = v.more.parts, v.more.costs, v.more.counts
	}
	if err := t.memory.Decide(ctx, &r, &a); err != nil {
		*v = Verdict{}
		return err
	}
	v.answered(&a, runtime.Source, mode)
	return nil
}

// quick is a storage that knows some answers at once: a *lease.Storage.
type quick interface {
	// DecideNow reports whether it has decided. It keeps nothing of the request, and puts copies in place of the identifiers.
	DecideNow(r *storage.Request, a *storage.Answer) bool
}

// scratch is a request of one part and its answer. What an interface is given is kept on the heap, so it is used again.
type scratch struct {
	request storage.Request
	answer  storage.Answer
	parts   [1]storage.Part
	costs   [inline]int64
	counts  [inline]storage.Count
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// atOnce asks a storage that may know the answer, and reports whether it does.
func (t *Throttler) atOnce(v *Verdict, mode storage.Mode, now int64) bool {
	s, n := scratches.Get().(*scratch), len(v.one[0].Rules.Rules)
	s.parts, s.costs = v.one, v.costs
	s.request = storage.Request{Name: t.name, Mode: mode, Now: now, Within: v.within, Parts: s.parts[:], Costs: s.costs[:n]}
	s.answer = storage.Answer{Counts: s.counts[:n]}
	done := t.quick.DecideNow(&s.request, &s.answer)
	if done {
		v.one, v.counts = s.parts, s.counts
		v.answered(&s.answer, s.answer.Source, mode)
	}
	s.parts[0] = storage.Part{}
	scratches.Put(s)
	return done
}

// elsewhere has any storage decide, on copies: it may go on with them after the caller has left.
func (t *Throttler) elsewhere(ctx context.Context, v *Verdict, mode storage.Mode, clocked bool, now int64) error {
	if t.quick != nil && v.more == nil && !clocked && ctx.Err() == nil && t.atOnce(v, mode, now) {
		return nil
	}
	own := *v
	parts := own.parts()
	for i := range parts {
		parts[i].Identifier = strings.Clone(parts[i].Identifier)
	}
	r := storage.Request{Name: t.name, Mode: mode, Clocked: clocked, Now: now, Within: v.within, Parts: parts, Costs: own.asked()}
	a := storage.Answer{Counts: own.all()}
	if err := t.storage.Decide(ctx, &r, &a); err != nil {
		*v = Verdict{}
		return err
	}
	own.answered(&a, a.Source, mode)
	*v = own
	return nil
}

// orAllow allows what the policy says of a storage that failed.
func (t *Throttler) orAllow(ctx context.Context, v *Verdict, mode storage.Mode, err error) error {
	if err != nil && t.failed == Allow && mode != storage.Force && errors.Is(err, ErrUnavailable) && ctx.Err() == nil {
		*v, err = Verdict{Allowed: true, degraded: true}, nil
	}
	return err
}

// now tells the injected clock's time; without one the storage has its own.
func (t *Throttler) now() (micros int64, clocked bool, err error) {
	if t.clock == nil {
		return 0, false, nil
	}
	at := t.clock.Now()
	micros, ok := law.Micros(at)
	if !ok {
		err = fmt.Errorf("%w: it reads %v", ErrInvalidClock, at)
	}
	return micros, true, err
}

// tidy is for calls that do not ask the runtime storage, or do not tell it the time: it forgets who is full as calls come.
func (t *Throttler) tidy() {
	if t.memory == nil {
		return
	}
	if now, clocked, err := t.now(); err == nil {
		_ = t.memory.Decide(context.Background(), &storage.Request{Name: t.name, Clocked: clocked, Now: now}, &storage.Answer{})
	}
}
