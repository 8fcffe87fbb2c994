// Package storage is the contract between a Throttler and the place that keeps what has been
// spent, and the only definition of the arithmetic.
//
// A storage decides; it is not a key-value store. One call carries identifiers, the rules of
// their buckets and the costs, and is answered as Decide answers it, atomically. Which buckets an
// identifier has is not stored: the rules travel with each request. What is stored is
// consumption: a State for each identifier and bucket name.
//
// Package storagetest proves an implementation: every storage of this module passes its Run.
package storage

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Storage keeps consumption and decides. All methods are safe for concurrent use.
//
// A call returns its context's error when the context is done before it begins, and then changes
// nothing. Invalid requests (Request.Validate) are refused before any I/O. A failure of the
// storage itself wraps ErrUnavailable, a stored value that cannot be read ErrCorruptState, and a
// call after Close ErrClosed.
//
// What is kept, or still on its way, after a call returns is a copy: callers may use the memory of an identifier and of
// a name again, also after a call that their context ended.
//
// An identifier keeps the states of all its buckets until they are full, also of those that a request
// does not name, up to MaxBuckets; one more is refused with TooManyBuckets.
type Storage interface {
	// Decide takes the costs of a request from all buckets of all its parts, or from none, as
	// the function Decide does for their states. A denied request changes nothing, and its verdict
	// has a RetryAfter above zero.
	Decide(ctx context.Context, r Request) (Verdict, error)

	// Charge applies amounts unconditionally: a positive one may leave debt, a negative one
	// gives tokens back (State.Charge, State.Refund).
	Charge(ctx context.Context, c Charge) error

	// Reset forgets what the identifier has spent under the given Config.Name.
	Reset(ctx context.Context, name, identifier string) error
}

// Mode says what a decision may do.
type Mode uint8

// The modes of a Request.
const (
	Take  Mode = iota // take when every bucket admits
	Peek              // answer exactly as Take would, and take nothing
	Force             // take whatever the answer is; consumption saturates at 4 capacities
)

// Limits of a request.
const (
	MaxIdentifier = 1024 // bytes of an identifier
	MaxBuckets    = 16   // buckets of one identifier
	MaxParts      = 256  // identifiers of one request
	maxDebt       = 4096 // amounts in a bucket's debt
)

// Request asks for one decision. It is a value: a storage may keep its slices, which nobody
// changes afterwards.
type Request struct {
	Name string // the throttler's name: equal names share consumption, others never meet
	Mode Mode

	// Clocked says that Now is the time, in microseconds since the epoch by the caller's clock.
	// Without it the storage's own clock is.
	Clocked bool
	Now     int64

	Part Part   // the first part, nearly always the only one
	More []Part // the others
}

// Parts is the number of parts, and Request.At returns one of them.
func (r *Request) Parts() int { return 1 + len(r.More) }

// At returns part i.
func (r *Request) At(i int) *Part {
	if i == 0 {
		return &r.Part
	}
	return &r.More[i-1]
}

// inline is how many buckets a part and a verdict hold without allocating.
const inline = 4

// Part is one identifier in a request, the rules of its buckets and what each is asked for.
type Part struct {
	Identifier string
	Rules      []Rule // of different names; never changed after the request is made

	costs [inline]int64
	rest  []int64 // costs of the rules after the first four; nil: that of the fourth
}

// NewPart asks every rule for the same cost.
func NewPart(identifier string, rules []Rule, cost int64) (p Part) {
	p.Begin(identifier, rules, cost)
	return p
}

// Begin is NewPart in place of a zero Part.
func (p *Part) Begin(identifier string, rules []Rule, cost int64) {
	p.Identifier, p.Rules = identifier, rules
	for i := range p.costs {
		p.costs[i] = cost
	}
}

// Cost is what rule i is asked for, in tokens.
func (p *Part) Cost(i int) int64 {
	if i < inline {
		return p.costs[i]
	}
	if p.rest == nil {
		return p.costs[inline-1]
	}
	return p.rest[i-inline]
}

// SetCost asks rule i for n tokens. It is for whoever makes the part.
func (p *Part) SetCost(i int, n int64) {
	if len(p.Rules) > inline && p.rest == nil {
		p.rest = slices.Repeat(p.costs[inline-1:], len(p.Rules)-inline)
	}
	if i < inline {
		p.costs[i] = n
	} else {
		p.rest[i-inline] = n
	}
}

// Validate returns the typed error of a request that no storage can answer: over MaxParts identifiers, one that is
// empty, over MaxIdentifier bytes or named twice, rules that are none or too many, a cost below
// zero, and, but for Force, a cost above a capacity; a time by an injected clock outside of what the
// arithmetic holds. It does not look for rules of the same name.
func (r *Request) Validate() error {
	if r.Clocked && (r.Now < 0 || r.Now >= maxClock) {
		return invalidClock(r.Now)
	}
	if r.Parts() > MaxParts {
		return fmt.Errorf("%w: %d of them in one call, must be at most %d", ErrInvalidIdentifier, r.Parts(), MaxParts)
	}
	if err := r.Part.validate(r.Mode); err != nil {
		return err
	}
	for i := range r.More {
		p := &r.More[i]
		if err := p.validate(r.Mode); err != nil {
			return err
		}
		for j := range i + 1 {
			if r.At(j).Identifier == p.Identifier {
				return fmt.Errorf("%w: %.64q stands in two parts of one call", ErrInvalidIdentifier, p.Identifier)
			}
		}
	}
	return nil
}

func (p *Part) validate(mode Mode) error {
	if err := ValidateIdentifier(p.Identifier); err != nil {
		return err
	}
	if len(p.Rules) == 0 || len(p.Rules) > MaxBuckets {
		return &BucketError{Field: "Buckets", Reason: fmt.Sprintf("of identifier %.64q: %d buckets in a call, must be 1 to %d", p.Identifier, len(p.Rules), MaxBuckets)}
	}
	for j := range p.Rules {
		if c := p.Cost(j); c < 0 || c > p.Rules[j].Capacity && mode != Force {
			return invalidCost(p.Identifier, p.Rules[j].Name, c, p.Rules[j].Capacity)
		}
	}
	return nil
}

// ValidateIdentifier returns ErrInvalidIdentifier unless id has 1 to MaxIdentifier bytes. Any bytes are
// allowed.
func ValidateIdentifier(id string) error {
	if id == "" || len(id) > MaxIdentifier {
		return fmt.Errorf("%w: it has %d bytes, must have 1 to %d", ErrInvalidIdentifier, len(id), MaxIdentifier)
	}
	return nil
}

func invalidClock(micros int64) error {
	return fmt.Errorf("%w: it reads %d µs since the epoch", ErrInvalidClock, micros)
}

func invalidCost(id, bucket string, cost, capacity int64) error {
	if cost < 0 {
		return fmt.Errorf("%w: %d tokens asked of bucket %q of identifier %.64q, must be 0 or more", ErrInvalidCost, cost, bucket, id)
	}
	return fmt.Errorf("%w: %d tokens asked of bucket %q of identifier %.64q, which holds %d: waiting never helps", ErrCostExceedsCapacity, cost, bucket, id, capacity)
}

// TooManyBuckets returns the BucketError of a call after which n buckets of an identifier would not be
// full, or nil when n is at most MaxBuckets.
func TooManyBuckets(rules []Rule, n int) error {
	if n <= MaxBuckets {
		return nil
	}
	return &BucketError{Bucket: rules[0].Name, Field: "Buckets", Reason: fmt.Sprintf("of the identifier that are not full would be %d with this call, must be at most %d", n, MaxBuckets)}
}

// Amount is N tokens of one bucket, all of which are back In microseconds from now by themselves.
// It is how consumption crosses stores: durations do, timestamps never. A negative N gives back.
type Amount struct{ N, In int64 }

// Clamp returns a in the bounds that all storages compute with, 2^53 tokens and 2^50 µs, which are
// more than any bucket holds and any token is out.
func (a Amount) Clamp() Amount {
	return Amount{max(-exact, min(a.N, exact)), max(0, min(a.In, farFuture))}
}

// Charge applies one amount to each bucket of one identifier; a zero Amount leaves its bucket
// alone. Name, Clocked and Now are those of Request.
type Charge struct {
	Name       string
	Clocked    bool
	Now        int64
	Identifier string
	Rules      []Rule
	Amounts    []Amount // one for each rule
}

// Validate is Request.Validate for a charge.
func (c *Charge) Validate() error {
	if c.Clocked && (c.Now < 0 || c.Now >= maxClock) {
		return invalidClock(c.Now)
	}
	if err := ValidateIdentifier(c.Identifier); err != nil {
		return err
	}
	if n := len(c.Rules); n == 0 || n > MaxBuckets || n != len(c.Amounts) {
		return &BucketError{Field: "Buckets", Reason: fmt.Sprintf("of identifier %.64q: %d amounts for %d buckets in a charge, must be one each for 1 to %d", c.Identifier, len(c.Amounts), n, MaxBuckets)}
	}
	return nil
}

// Debt is, for each bucket of one identifier, what another store has recorded as spent and not yet
// returned (State.Debt); none leaves its bucket alone. Name, Clocked and Now are those of Request.
type Debt struct {
	Name       string
	Clocked    bool
	Now        int64
	Identifier string
	Rules      []Rule
	Amounts    [][]Amount // one list for each rule
}

// Validate is Request.Validate for a debt.
func (d *Debt) Validate() error {
	if d.Amounts == nil { // which are asked for
		return (&Charge{Name: d.Name, Clocked: d.Clocked, Now: d.Now, Identifier: d.Identifier, Rules: d.Rules, Amounts: make([]Amount, len(d.Rules))}).Validate()
	}
	for i := range d.Amounts {
		if n := len(d.Amounts[i]); n > maxDebt {
			return &BucketError{Field: "Buckets", Reason: fmt.Sprintf("of identifier %.64q: %d amounts in the debt of one bucket, must be at most %d", d.Identifier, n, maxDebt)}
		}
	}
	c := Charge{Name: d.Name, Clocked: d.Clocked, Now: d.Now, Identifier: d.Identifier, Rules: d.Rules, Amounts: make([]Amount, len(d.Amounts))}
	return c.Validate()
}

// Replica is a Storage that can be brought up to what another has recorded.
type Replica interface {
	Storage

	// Debt returns d with its Amounts: for each rule, what its bucket has spent that has not come back,
	// as State.Debt has it. It changes nothing.
	Debt(ctx context.Context, d Debt) (Debt, error)

	// Raise lifts what each bucket has spent to at least its debt, as State.Raise does. Raising twice is
	// raising once.
	Raise(ctx context.Context, d Debt) error
}

// Verdict answers a request. It is a value, owned by the caller.
type Verdict struct {
	// Allowed says that the cost was taken from every bucket. Otherwise nothing was taken.
	Allowed bool

	// RetryAfter is how long after the decision the same call is admitted, if nobody else takes:
	// exact to the microsecond, zero when allowed.
	RetryAfter time.Duration

	source   string
	degraded bool
	peeked   bool
	at       int64
	part     Part
	counts   [inline]Count
	more     *more
}

// more is what few verdicts have: further parts, and counts after the first four.
type more struct {
	parts  []Part
	counts []Count
}

// Count is what a decision says of one bucket: tokens, and microseconds from the decision.
type Count struct {
	// Remaining is what may still be taken. Below zero it is a debt. By Force it is what would remain if nothing were
	// forgotten: what is less than 3 capacities below zero was not recorded.
	Remaining int64

	ResetAfter int64 // until the bucket is full
	NextAfter  int64 // until one token more than Remaining may be taken, or the first one; 0 if it is full
	RetryAfter int64 // until the bucket admits the denied cost; 0 if it did
	HeldFor    int64 // until all that an admitted call took has come back by itself; 0 if it took nothing
}

// NewVerdict begins the answer to r by the named store; a storage fills it with Set.
//
// At is when the decision was made, in microseconds: r.Now when r is Clocked, else by Monotonic of
// this process. A later Refund takes the time since then off what it gives back.
func NewVerdict(r *Request, source string, at int64) (v Verdict) {
	v.Begin(r, source, at)
	return v
}

// Begin is NewVerdict in place of a zero Verdict.
func (v *Verdict) Begin(r *Request, source string, at int64) {
	if v.part = r.Part; len(r.More) > 0 {
		v.more = &more{parts: r.More}
	}
	v.room()
	v.stamp(source, r.Mode, at)
}

// Ask adds a part to the request that v is going to answer. Part 0 may also be set in its place.
func (v *Verdict) Ask(p *Part) {
	switch {
	case v.part.Rules == nil:
		v.part = *p
	case v.more == nil:
		m := &struct {
			more
			one [1]Part
		}{}
		m.one[0] = *p
		v.more = &m.more
		v.more.parts = m.one[:]
	default:
		v.more.parts = append(v.more.parts, *p)
	}
}

// Request is the request of the parts that v was asked.
func (v *Verdict) Request(name string, mode Mode, clocked bool, now int64) Request {
	r := Request{Name: name, Mode: mode, Clocked: clocked, Now: now, Part: v.part}
	if v.more != nil {
		r.More = v.more.parts
	}
	return r
}

// room makes place for the counts of all buckets, and returns how many these are.
func (v *Verdict) room() (n int) {
	if n = len(v.part.Rules); n <= inline && v.more == nil {
		return n
	}
	return v.moreRoom()
}

func (v *Verdict) moreRoom() (n int) {
	for i := range max(1, v.Parts()) {
		n += len(v.Part(i).Rules)
	}
	if v.more == nil {
		m := &struct {
			more
			counts [MaxBuckets - inline]Count
		}{}
		v.more = &m.more
		v.more.counts = m.counts[:]
	}
	if n-inline > len(v.more.counts) {
		v.more.counts = make([]Count, n-inline)
	}
	return n
}

func (v *Verdict) stamp(source string, mode Mode, at int64) {
	v.source, v.peeked, v.at = source, mode == Peek, at
}

// Set records the count of bucket i, counted through all parts in order.
func (v *Verdict) Set(i int, c Count) {
	if c.RetryAfter > 0 {
		v.RetryAfter = max(v.RetryAfter, duration(c.RetryAfter))
	}
	*v.count(i) = c
}

// Count is the count of bucket i, counted through all parts in order.
func (v *Verdict) Count(i int) Count { return *v.count(i) }

func (v *Verdict) count(i int) *Count {
	if i < inline {
		return &v.counts[i]
	}
	return &v.more.counts[i-inline]
}

// Parts are the parts of the request that v answers.
func (v *Verdict) Parts() int {
	if v.part.Rules == nil {
		return 0
	}
	if v.more == nil {
		return 1
	}
	return 1 + len(v.more.parts)
}

// Part is part i of the request that v answers.
func (v *Verdict) Part(i int) *Part {
	if i == 0 {
		return &v.part
	}
	return &v.more.parts[i-1]
}

// At is the time that NewVerdict was given.
func (v *Verdict) At() int64 { return v.at }

// Source names the store that answered: "runtime" here. Empty when none did.
func (v *Verdict) Source() string { return v.source }

// Taken says that the costs were taken: v is Allowed, by a storage, and not the answer to a Peek.
func (v *Verdict) Taken() bool { return v.Allowed && !v.peeked && v.Parts() > 0 }

// Degraded says that the answer is not the storage's regular one: a policy or a fallback gave it.
func (v *Verdict) Degraded() bool { return v.degraded }

// Degrade marks v as degraded.
func (v *Verdict) Degrade() { v.degraded = true }

// Level is the state of one bucket right after a decision.
type Level struct {
	Identifier, Bucket string
	Limit, Remaining   int64         // tokens: the capacity, and what may still be taken now
	Debt               int64         // tokens that have to come back before Remaining rises from 0: a Charge may leave some
	Period             time.Duration // the bucket's period
	ResetAfter         time.Duration // until the bucket is full again, if nobody takes
	NextAfter          time.Duration // until one token more than Remaining may be taken, if nobody takes; zero if full
	RetryAfter         time.Duration // until this bucket admits the denied cost; zero if it did
}

// Levels returns the level of each bucket, in the order of the request. Up to four buckets it
// allocates nothing, as long as the result does not outlive the caller.
func (v *Verdict) Levels() []Level { return v.levels(make([]Level, 0, inline)) }

func (v *Verdict) levels(out []Level) []Level {
	n := 0
	for i := range v.Parts() {
		p := v.Part(i)
		for j := range p.Rules {
			c, r := v.Count(n), &p.Rules[j]
			n++
			out = append(out, Level{
				Identifier: p.Identifier, Bucket: r.Name,
				Limit: r.Capacity, Remaining: max(0, c.Remaining), Debt: max(0, -c.Remaining),
				Period:     duration(r.Period),
				ResetAfter: duration(c.ResetAfter), NextAfter: duration(c.NextAfter), RetryAfter: duration(c.RetryAfter),
			})
		}
	}
	return out
}

func duration(micros int64) time.Duration { return time.Duration(micros) * time.Microsecond }

// Clock tells the time and waits. The clocks of github.com/benbjohnson/clock satisfy it. It must
// be safe for concurrent use, and read between the years 1970 and 2184.
type Clock interface {
	Now() time.Time
	After(d time.Duration) <-chan time.Time
}

// Micros is t in microseconds since the epoch, or ErrInvalidClock for a time that the arithmetic
// cannot hold.
func Micros(t time.Time) (int64, error) {
	if s := t.Unix(); s < 0 || s >= maxClock/1_000_000 {
		return 0, fmt.Errorf("%w: it reads %v", ErrInvalidClock, t)
	}
	return t.UnixMicro(), nil
}

var (
	started       = time.Now()
	startedMicros = started.UnixMicro()
)

// Elapsed is how long the process has been running, and MonotonicAt what Monotonic was then.
func Elapsed() time.Duration { return time.Since(started) }

// MonotonicAt is Monotonic at a time of Elapsed.
func MonotonicAt(elapsed time.Duration) int64 { return startedMicros + int64(elapsed/time.Microsecond) }

// Monotonic is the time in microseconds since the epoch, by a clock that starts with the process
// and is never set: the clock of whatever has none injected.
func Monotonic() int64 { return MonotonicAt(Elapsed()) }

// The errors of this module, always wrapped with the particulars: test with errors.Is.
var (
	ErrUnknownIdentifier   = errors.New("throttler: unknown identifier")
	ErrInvalidIdentifier   = errors.New("throttler: invalid identifier")
	ErrInvalidCost         = errors.New("throttler: invalid cost")
	ErrCostExceedsCapacity = errors.New("throttler: cost exceeds capacity")
	ErrInvalidClock        = errors.New("throttler: the injected clock is outside the years 1970 to 2184")
	ErrUnavailable         = errors.New("throttler: storage unavailable")
	ErrCorruptState        = errors.New("throttler: corrupt state")
	ErrClosed              = errors.New("throttler: closed")
)
