// Package throttler is a rate limiter in which an identifier may have several buckets, such as "5 per 10 s AND
// 100 per hour". A call takes its cost from all of these buckets or from none.
//
//	t, err := throttler.New(throttler.Config{})
//	err = t.AddBucket("user:42", throttler.NewBucket(10*time.Second, 5), throttler.NewBucket(time.Hour, 100))
//	v, err := t.Consume("user:42")
//	if err != nil { … }                          // the storage failed, or the call is wrong
//	if !v.Allowed { … v.RetryAfter … }           // a denial is a verdict, not an error
//
// Only the Throttler knows which buckets an identifier has: those of [Using] for one call, otherwise those of
// [Throttler.AddBucket], otherwise those of [Config].Buckets. The storage keeps only what has been spent, under the
// identifier and the bucket's name, kind and period. Several processes may share a storage. Each of them then defines
// the buckets itself, and all of them spend from the same ones.
//
// All numbers are integers and all times are whole microseconds, so RetryAfter is exact.
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
	"github.com/go-throttler/throttler/storage/lease"
	"github.com/go-throttler/throttler/storage/runtime"
)

// Throttler decides which calls are allowed. It is safe for concurrent use. It must be made by [New]. It holds no
// resources of its own, so it has no Close.
type Throttler struct {
	name     string
	storage  storage.Storage
	memory   *runtime.Storage // storage, if it is the runtime storage: called without copies; otherwise nil
	leases   *lease.Storage   // storage, if it is this one; otherwise nil
	direct   bool             // memory is set and uses its own clock: decideOne may be tried
	cost     int64
	defaults *set // nil: none
	unknown  Policy
	failed   Policy
	clock    Clock // nil: the storage's own
	load     func() float64
	observe  func(context.Context, *Event)

	waiters waiters

	owned atomic.Bool // whether own has ever held a set; most throttlers never do, and skip the look-up
	own   sync.Map    // identifier -> *set, from AddBucket
	mu    sync.Mutex  // held to change own; reading own needs no lock
}

// Consume takes the cost of a call from all buckets of the identifier, or from none. A denial is a Verdict that is not
// Allowed. An error means that the call is wrong or that the storage failed. If a storage outside the process fails
// during the call, the cost may have been taken, at most once; leases may have taken tokens ahead with it.
func (t *Throttler) Consume(id string, o ...Option) (v Verdict, err error) {
	err = t.decide(context.Background(), &v, storage.Take, id, o)
	return v, err
}

// ConsumeContext is Consume that gives up when ctx is done. A call that gave up while the storage was deciding may have
// been charged, at most once.
func (t *Throttler) ConsumeContext(ctx context.Context, id string, o ...Option) (v Verdict, err error) {
	err = t.decide(ctx, &v, storage.Take, id, o)
	return v, err
}

// Peek answers what Consume with the same options would answer now, and takes nothing. The Levels of an allowed Peek
// are those that the buckets would have after the cost; with Cost(0) they are the present ones.
func (t *Throttler) Peek(ctx context.Context, id string, o ...Option) (v Verdict, err error) {
	err = t.decide(ctx, &v, storage.Peek, id, o)
	return v, err
}

// Charge takes the cost, 0 or more, from all buckets even if they hold less. It is for costs that are known only
// afterwards. A bucket that held less then has a debt (Level.Debt), and its calls are denied until the debt has been
// refilled.
//
// At most 4 capacities of a bucket can be outstanding, or what is refilled in 4 periods if that is more. What exceeds
// this is not recorded; the error then joins a [*DebtError] for each bucket concerned. A Continuous bucket refills its
// debt token by token. In the other kinds a debt is forgiven after one period, in SlidingWindow after two.
func (t *Throttler) Charge(ctx context.Context, id string, o ...Option) error {
	var v Verdict
	err := t.decide(ctx, &v, storage.Force, id, o)
	t.waiters.tell(id, freed)
	return err
}

// ConsumeAll takes the costs from all buckets of all parts, or from none. There are at most 256 parts, and each
// identifier may appear in one part only; otherwise the error is ErrInvalidIdentifier. Without parts it is
// ErrUnknownIdentifier, unless Config.OnUnknownIdentifier allows that.
func (t *Throttler) ConsumeAll(ctx context.Context, parts ...Part) (v Verdict, _ error) {
	err := t.decideAll(ctx, &v, storage.Take, 0, 0, parts)
	return v, err
}

// PeekAll answers what ConsumeAll with the same parts would answer now, and takes nothing.
func (t *Throttler) PeekAll(ctx context.Context, parts ...Part) (v Verdict, _ error) {
	err := t.decideAll(ctx, &v, storage.Peek, 0, 0, parts)
	return v, err
}

// ChargeAll is Charge for several identifiers, in one atomic change.
func (t *Throttler) ChargeAll(ctx context.Context, parts ...Part) error {
	var v Verdict
	err := t.decideAll(ctx, &v, storage.Force, 0, 0, parts)
	for i := range parts {
		t.waiters.tell(parts[i].id, freed)
	}
	return err
}

// decideAll is decide for several parts. If within, in microseconds, is above 0 and all buckets can be reserved ahead,
// it makes a reservation.
func (t *Throttler) decideAll(ctx context.Context, v *Verdict, mode storage.Mode, within int64, attempt int, parts []Part) error {
	if err := t.addAll(ctx, v, mode, attempt, parts); err != nil {
		return err
	}
	if within > 0 && reservable(v) {
		v.within = within
	}
	return t.ask(ctx, v, mode, attempt)
}

// addAll appends all parts to the request in v, or ends a call that is wrong. A list that is empty by mistake must not admit
// everything.
func (t *Throttler) addAll(ctx context.Context, v *Verdict, mode storage.Mode, attempt int, parts []Part) error {
	if len(parts) == 0 && mode != storage.Force && t.unknown != Allow {
		err := fmt.Errorf("%w: the call names none", ErrUnknownIdentifier)
		t.rejected(ctx, opOf(mode), attempt, "", err)
		return err
	}
	for i := range parts {
		err := t.add(v, mode, parts[i].id, parts[i].options)
		if err != nil && (mode != storage.Force || !errors.Is(err, ErrCostExceedsCapacity)) {
			t.rejected(ctx, opOf(mode), attempt, parts[i].id, err)
			*v = t.tooCostly(ctx, err, parts...)
			return err
		}
	}
	return nil
}

// reservable reports whether v can be reserved ahead: all of its buckets are Continuous, and no part has AtMost.
func reservable(v *Verdict) bool {
	for _, p := range v.parts() {
		if p.AtMost || slices.ContainsFunc(p.Rules.Rules, func(r law.Rule) bool { return r.Kind != law.Continuous }) {
			return false
		}
	}
	return true
}

// Reserve takes the cost now, all or nothing, if the caller may use it within most. Verdict.Delay says how long after
// the decision that is. What is reserved is spent for everybody else, and [Throttler.Refund] cancels it.
//
// Only Continuous buckets are reserved ahead, each by at most 4 capacities, or by what is refilled in 4 periods if that
// is more. A bucket of another kind must hold the cost now. A denial changes nothing; the same Reserve is admitted
// after RetryAfter if nobody else takes tokens.
//
// The range of most is 0, which makes it Consume, to 366 days, in whole microseconds. A time outside of it is
// ErrInvalidReserve.
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

// decide answers into *v, which must be zero and also holds the request. Nothing is therefore copied, and Consume is
// small enough to be inlined into its caller.
func (t *Throttler) decide(ctx context.Context, v *Verdict, mode storage.Mode, id string, o []Option) error {
	if t.direct && mode != storage.Force && t.decideOne(ctx, v, mode, id, o) {
		return nil
	}
	if err := t.add(v, mode, id, o); err != nil && (mode != storage.Force || !errors.Is(err, ErrCostExceedsCapacity)) {
		return t.wrong(ctx, v, mode, 0, id, o, err)
	}
	return t.ask(ctx, v, mode, 0)
}

// decideOne is decide for the common call: one cost for at most four buckets of an identifier that the runtime storage
// already holds, by the storage's own clock. For any other call, and for a wrong one, it changes nothing and returns
// false.
func (t *Throttler) decideOne(ctx context.Context, v *Verdict, mode storage.Mode, id string, o []Option) bool {
	s, cost := t.defaults, t.cost
	if t.owned.Load() {
		s = t.set(id)
	}
	for i := range o {
		switch o := &o[i]; o.kind {
		case costOption:
			cost = o.n
		case usingOption:
			s = o.set
		default:
			return false
		}
	}
	// The conversions to unsigned integers make one comparison refuse an empty identifier too, and below a negative cost.
	if s == nil || s.rules == nil || uint(len(id)-1) >= law.MaxIdentifier || ctx.Err() != nil {
		return false
	}
	rules := s.rules
	if s.elastic != nil && t.load != nil {
		rules = s.elastic.at(t.load())
	}
	n := len(rules.Rules)
	if n > inline || uint64(cost) > uint64(rules.Least) {
		return false
	}
	v.few[0].Identifier, v.few[0].Rules, v.nParts, v.nBuckets = id, rules, 1, uint8(n)
	v.costs = [inline]int64{cost, cost, cost, cost}
	start := law.Elapsed()
	v.at = law.MonotonicAt(start)
	allowed, done := t.memory.DecideOne(t.name, mode, v.at, v.within, false, &v.few[0], v.costs[:n], v.counts[:n])
	if !done {
		v.nParts, v.nBuckets = 0, 0 // so that add finds an empty request
		return false
	}
	v.Allowed, v.source, v.peeked = allowed, runtime.Source, mode == storage.Peek
	if !allowed || v.within != 0 {
		v.waits()
	}
	if t.observe != nil {
		t.tell(ctx, t.event(opOf(mode), 0, id, cost), v, nil, start, law.Elapsed())
	}
	return true
}

// wrong ends a call that is wrong and never reaches the storage. The attempt is that of a Wait, otherwise 0.
func (t *Throttler) wrong(ctx context.Context, v *Verdict, mode storage.Mode, attempt int, id string, o []Option, err error) error {
	t.rejected(ctx, opOf(mode), attempt, id, err)
	*v = t.tooCostly(ctx, err, For(id, slices.Clone(o)...)) // cloned, so that o can stay on the caller's stack
	return err
}

// tooCostly returns the present levels to a call whose cost exceeds the capacity of a bucket. After any other error, if
// another part is wrong too, or if the storage fails, it returns a zero Verdict.
func (t *Throttler) tooCostly(ctx context.Context, err error, parts ...Part) (v Verdict) {
	if !errors.Is(err, ErrCostExceedsCapacity) {
		return v
	}
	for i := range parts {
		if validIdentifier(parts[i].id) != nil { // the parts after the costly one were not looked at yet
			return Verdict{}
		}
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

// setOf returns the buckets of a call, and the cost of those that CostOf does not name.
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

// add appends an identifier to the request in v. An unknown identifier that the policy allows adds nothing.
func (t *Throttler) add(v *Verdict, mode storage.Mode, id string, options []Option) error {
	if id == "" || len(id) > law.MaxIdentifier {
		return validIdentifier(id)
	}
	s, cost := t.set(id), t.cost
	if len(options) > 0 {
		s, cost = t.setOf(id, options)
	}
	if s == nil || len(s.buckets) == 0 {
		if v.empty() {
			v.few[0].Identifier = id // read by first, for Observe
		}
		v.unlimited(cost, options)
		return t.unknownIdentifier(id, cost)
	}
	if s.err != nil {
		return s.err
	}
	if s.rules == nil { // all buckets are Unlimited: no storage is asked
		v.unlimited(cost, options)
		return s.costsOf(nil, id, cost, options)
	}
	rules := s.rules
	if s.elastic != nil && t.load != nil && mode != storage.Force { // a Charge is recorded up to 4 full capacities
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
		}
	}
	if len(options) > 0 || cost < 0 || cost > rules.Least { // any other cost is valid for every bucket
		return s.validCosts(v, costs, id)
	}
	return nil
}

// contentWithLess reports whether the last option that sets the cost is AtMost.
func contentWithLess(options []Option) (atMost bool) {
	for i := range options {
		if k := options[i].kind; k == costOption || k == atMostOption {
			atMost = k == atMostOption
		}
	}
	return atMost
}

// costsOf sets the costs that CostOf options name. The names of Unlimited buckets are valid too; their costs are only
// checked, and must not be below 0.
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
			var names []string
			for _, b := range s.buckets {
				names = append(names, b.Name())
			}
			return noSuchBucket(o.bucket, id, names)
		case o.n < 0:
			return fmt.Errorf("%w: %d asked of bucket %q, must be 0 or more", ErrInvalidCost, o.n, o.bucket)
		}
	}
	return nil
}

func noSuchBucket(bucket, id string, names []string) error {
	return &BucketError{Bucket: bucket, Field: "CostOf", Reason: fmt.Sprintf("names none of the buckets of %.64q, which are %q", id, names)}
}

func (t *Throttler) unknownIdentifier(id string, cost int64) error {
	if cost < 0 {
		return fmt.Errorf("%w: %d, must be 0 or more", ErrInvalidCost, cost)
	}
	if t.unknown == Allow {
		return nil
	}
	return fmt.Errorf("%w: %.64q has no buckets: use AddBucket, Config.Buckets, or Using with at least one", ErrUnknownIdentifier, id)
}

func validIdentifier(id string) error {
	if id == "" || len(id) > law.MaxIdentifier {
		return fmt.Errorf("%w: it has %d bytes, must have 1 to %d", ErrInvalidIdentifier, len(id), law.MaxIdentifier)
	}
	return nil
}

// validCosts returns the first negative cost as an error, otherwise the first one above a capacity. Callers of a Charge
// ignore the latter. With atMost a cost may exceed a capacity, but not one of 0, which never has the one token that it needs.
func validCosts(costs []int64, atMost bool, rules *storage.RuleSet, id string) (err error) {
	for i, cost := range costs {
		if cost < 0 {
			return fmt.Errorf("%w: %d tokens asked of bucket %q of identifier %.64q, must be 0 or more", ErrInvalidCost, cost, rules.Rules[i].Name, id)
		}
		if r := &rules.Rules[i]; cost > r.Capacity && (!atMost || r.Capacity == 0) && err == nil {
			err = fmt.Errorf("%w: %d tokens asked of bucket %q of identifier %.64q, which holds %d: waiting never helps", ErrCostExceedsCapacity, cost, r.Name, id, r.Capacity)
		}
	}
	return err
}

// ask lets the storage decide the request in v, and calls Observe.
func (t *Throttler) ask(ctx context.Context, v *Verdict, mode storage.Mode, attempt int) error {
	if t.observe != nil {
		return t.askObserved(ctx, v, mode, attempt)
	}
	cost := largestCost(v)
	return t.orAllow(ctx, v, mode, cost, t.answer(ctx, v, mode, 0))
}

func (t *Throttler) askObserved(ctx context.Context, v *Verdict, mode storage.Mode, attempt int) error {
	id, cost, start := first(v), largestCost(v), law.Elapsed()
	cause := t.answer(ctx, v, mode, law.MonotonicAt(start))
	err := t.orAllow(ctx, v, mode, cost, cause)
	t.tell(ctx, t.event(opOf(mode), attempt, id, cost), v, cause, start, law.Elapsed())
	return err
}

// answer lets the storage decide the request in v. A real above 0 is the process's own clock as the caller has just read
// it, in microseconds. A storage that decides in place by that clock gets it, which saves a second reading, unless there is
// a Config.Clock. Any other storage does not: with a time, each request to Redis would look different from the others, and
// a batch would carry the limits of each.
func (t *Throttler) answer(ctx context.Context, v *Verdict, mode storage.Mode, real int64) error {
	if v.empty() { // nothing limits the call
		t.tidy()
		*v = Verdict{Allowed: true, tokens: v.tokens}
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

// inMemory lets the runtime storage decide in place, on the caller's stack. The storage copies identifiers that it keeps.
func (t *Throttler) inMemory(ctx context.Context, v *Verdict, mode storage.Mode, clocked bool, now int64) error {
	var r storage.Request // filled field by field: a literal would be built elsewhere and copied
	var a storage.Answer
	r.Name, r.Mode, r.Clocked, r.Now, r.Within = t.name, mode, clocked, now, v.within
	r.Parts, r.Costs, a.Counts = v.parts(), v.asked(), v.all()
	if err := t.memory.Decide(ctx, &r, &a); err != nil {
		*v = Verdict{}
		return err
	}
	v.answered(&a, runtime.Source, mode)
	return nil
}

// byLease lets the leases decide in place, as inMemory does, and reports whether they could.
func (t *Throttler) byLease(v *Verdict, mode storage.Mode, now int64) bool {
	var r storage.Request
	var a storage.Answer
	r.Name, r.Mode, r.Now, r.Within = t.name, mode, now, v.within
	r.Parts, r.Costs, a.Counts = v.parts(), v.asked(), v.all()
	if !t.leases.DecideNow(&r, &a) {
		return false
	}
	v.answered(&a, lease.Source, mode)
	return true
}

// elsewhere lets any other storage decide, on copies: it may still use them after the caller has left with its context.
func (t *Throttler) elsewhere(ctx context.Context, v *Verdict, mode storage.Mode, clocked bool, now int64) error {
	if !clocked {
		if t.leases != nil && ctx.Err() == nil && t.byLease(v, mode, now) {
			return nil
		}
		now = 0 // whoever decides now has a clock of its own
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

// orAllow turns the failure of the storage into an admission of the cost if the policy says so. Charges, and calls whose
// context is done, fail in any case.
func (t *Throttler) orAllow(ctx context.Context, v *Verdict, mode storage.Mode, cost int64, err error) error {
	if err != nil && t.failed == Allow && mode != storage.Force && errors.Is(err, ErrUnavailable) && ctx.Err() == nil {
		*v, err = Verdict{Allowed: true, degraded: true, tokens: cost}, nil
	}
	return err
}

// now returns the time of the injected clock. If there is none, clocked is false and the storage uses its own clock.
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

// tidy lets the runtime storage remove full identifiers after a call that did not reach it or did not tell it the time.
// Memory then shrinks whatever calls come.
func (t *Throttler) tidy() {
	if t.memory == nil {
		return
	}
	if now, clocked, err := t.now(); err == nil {
		_ = t.memory.Decide(context.Background(), &storage.Request{Name: t.name, Clocked: clocked, Now: now}, &storage.Answer{})
	}
}
