package law_test

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/go-throttler/throttler/internal/law"
)

const (
	steps     = 40
	exact     = int64(1) << 53
	lastClock = exact - exact/4 - 1 // the year 2184
	tolerance = int64(60_000_000)
)

func TestDecideAgreesWithADumbTwinAtRefillInstants(t *testing.T) {
	t.Parallel()
	for seed := range uint64(4) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(seed, 0))
			for range 150 {
				story := make([]byte, 10+random.IntN(80))
				for i := range story {
					story[i] = byte(random.Uint32())
				}
				agree(t, story, false)
				agree(t, story, true)
			}
		})
	}
}

func FuzzDecide(f *testing.F) {
	for kind := range byte(5) {
		f.Add([]byte{
			0, kind, 12, 7, 0, 2, // one bucket of 100 in 10 s, in the year 2023
			5, 1, 0, 15, 5, 1, 0, 15, 5, 1, 0, 15, 5, 1, 0, 15, // 1 token every 1.25 s
			0, 24, 15, // a look
			0, 0, 3, 0, 0, 15, // all that is left, and a refusal
			10, 0, 0, 15, 10, 1, 24, 15, 10, 2, 0, 15, // around its RetryAfter
			0, 7, 0, 2, (kind + 2) % 5, 15, 7, 1, 0, 15, // another kind, to its ResetAfter
		})
	}
	f.Add([]byte{
		0, 3, 12, 7, 0, 2, // a sliding window of 100 in 10 s
		0, 32, 7, 1, // 400 by force
		0, 7, 0, 1, 4, 0, // 5 in 10 s
		0, 39, 0, 2, 1, 15, // the same continuously
		10, 1, 0, 15,
	})
	f.Add([]byte{
		0, 4, 12, 7, 0, 2, // a log of 100 in 10 s
		5, 1, 0, 15, 5, 1, 0, 15, 5, 1, 0, 15, // three holds
		0, 7, 0, 1, 11, 15, // 1000 in 10 s, which has a grain: one hold
		5, 1, 0, 15, 5, 1, 0, 15, 5, 1, 0, 15, 5, 1, 0, 15, 5, 1, 0, 15, 5, 1, 0, 15, 5, 1, 0, 15,
	})
	f.Fuzz(func(t *testing.T, story []byte) {
		agree(t, story, false)
		agree(t, story, true)
	})
}

// agree plays the same story on Decide and on the twin, and compares all their answers.
func agree(t *testing.T, story []byte, reserves bool) {
	p := newPlay(story, reserves)
	for n := 0; n < steps && len(p.feed) > 0; n++ {
		p.moveClock()
		mode := p.chooseMode()
		p.chooseCosts(mode)
		kept := cloned(p.draws)
		if err := p.step(mode, kept); err != nil {
			t.Fatalf("step %d of %q:\n%s%v", n, story, describe(mode, p.real, kept), err)
		}
	}
}

// play is a story being played: the bytes that are left of it, the time, and the same buckets in both forms.
type play struct {
	feed
	real     int64
	draws    []law.Draw
	asks     []ask
	reserves bool            // calls may be reservations and AtMost
	left     map[bucket]kept // buckets whose place has a rule of another kind or period now
}

// bucket is the key of a state, and kept is the state in both forms.
type (
	bucket struct {
		place  int
		kind   law.Kind
		period int64
	}
	kept struct {
		state law.State
		twin  twin
	}
)

func newPlay(story []byte, reserves bool) *play {
	p := &play{feed: story, reserves: reserves, left: map[bucket]kept{}}
	for range p.among(1, 1, 1, 2, 2, 3, 4) {
		r := p.rule()
		p.draws = append(p.draws, law.Draw{Rule: r})
		p.asks = append(p.asks, ask{rule: r})
	}
	p.real = p.among(0, 1, 1_700_000_000_123_456, 1_799_999_999_999_999, lastClock, -1)
	if p.real < 0 {
		p.real = p.number() % (lastClock + 1)
	}
	return p
}

// step makes one call and checks what must be true of it. Kept are the buckets as they were before.
func (p *play) step(mode law.Mode, kept []law.Draw) error {
	got := law.Decide(mode, p.real, p.draws)
	want, counts := decideDumbly(mode, p.real, p.asks)
	if got != want {
		return fmt.Errorf("Decide allows: %v, the twin: %v", got, want)
	}
	for i := range p.draws {
		if p.draws[i].Cost != p.asks[i].cost {
			return fmt.Errorf("bucket %d: Decide takes %d, the twin %d", i, p.draws[i].Cost, p.asks[i].cost)
		}
		if got && counts[i].RetryAfter > max(0, p.draws[i].Within) {
			return fmt.Errorf("bucket %d: reserved for %d, within %d", i, counts[i].RetryAfter, p.draws[i].Within)
		}
		if p.draws[i].Count != counts[i] {
			return fmt.Errorf("bucket %d: Decide counts %+v, the twin %+v", i, p.draws[i].Count, counts[i])
		}
		if (!got || mode == law.Peek) && !same(p.draws[i].State, kept[i].State) {
			return fmt.Errorf("bucket %d was changed:\n%s", i, describe(mode, p.real, p.draws))
		}
		if err := sound(p.draws[i].State); err != nil {
			return fmt.Errorf("bucket %d: %w", i, err)
		}
	}
	if !got {
		return p.retryIsExact()
	}
	return nil
}

// same reports whether all that can be seen of two states is equal.
func same(a, b law.State) bool {
	return reflect.DeepEqual(a.Law, b.Law) && a.Seen == b.Seen && slices.Equal(a.Holds(), b.Holds())
}

// sound returns an error unless the numbers of a state are below 2^53 and its holds are in order.
func sound(s law.State) error {
	holds := s.Holds()
	for i, h := range holds {
		if h.N < 0 || h.N >= exact || h.End < 0 || h.End >= exact || i > 0 && h.End <= holds[i-1].End {
			return fmt.Errorf("hold %d of %+v", i, holds)
		}
	}
	return nil
}

// retryIsExact checks a denied call: it is denied until RetryAfter has passed, and not longer.
func (p *play) retryIsExact() error {
	retry := int64(0)
	for i := range p.draws {
		retry = max(retry, p.draws[i].Count.RetryAfter)
	}
	if retry <= 0 {
		return errors.New("refused, and RetryAfter is zero")
	}
	for _, a := range p.asks {
		if a.twin.changed(a.rule) { // Tokens may be back earlier, under the rule before.
			return nil
		}
	}
	if law.Decide(law.Peek, p.real+retry-1, cloned(p.draws)) {
		return fmt.Errorf("admitted 1µs before RetryAfter %d", retry)
	}
	if p.believed() && retry < exact/8 && !law.Decide(law.Peek, p.real+retry, cloned(p.draws)) {
		return fmt.Errorf("refused at RetryAfter %d", retry)
	}
	return nil
}

// believed reports whether no state is so far ahead of the clock that it counts as empty. A denial by another bucket
// leaves such a state alone. It counts again when the clock has come nearer, and may deny then.
func (p *play) believed() bool {
	for _, a := range p.asks {
		if a.twin.known && !a.twin.believable(a.rule, p.real) {
			return false
		}
	}
	return true
}

func cloned(draws []law.Draw) []law.Draw {
	out := slices.Clone(draws)
	for i := range out {
		s := &out[i].State
		*s = law.MakeState(s.Law, s.Seen, slices.Clone(s.Holds()))
	}
	return out
}

// moveClock moves, in more than half of all steps, to the time at which something comes back by the last answer: random
// times alone miss the faults.
func (p *play) moveClock() {
	move, edge := p.below(16), int64(0)
	if move >= 4 {
		edge = p.among(-1, 0, 1)
	}
	d := p.anyDraw()
	switch move {
	case 0:
	case 1:
		p.real += int64(p.byte())
	case 2:
		p.real += p.number() >> 12
	case 3:
		p.real -= p.number() % tolerance
	case 4:
		p.real = d.State.Seen - d.Rule.Period - tolerance + edge
	case 5:
		p.real += d.Rule.Period/8 + edge
	case 6:
		p.real += d.Rule.Period - p.real%d.Rule.Period + edge
	case 7, 8:
		p.real += d.Count.ResetAfter + edge
	case 9:
		p.real += d.Count.NextAfter + edge
	default:
		p.real += nearest(p.draws) + edge
	}
	p.real = min(max(0, p.real), lastClock)
}

func (p *play) anyDraw() *law.Draw {
	if len(p.draws) == 1 {
		return &p.draws[0]
	}
	return &p.draws[p.below(len(p.draws))]
}

// nearest returns the RetryAfter of the last call, or the nearest ResetAfter if it was admitted.
func nearest(draws []law.Draw) int64 {
	retry, reset := int64(0), int64(math.MaxInt64)
	for i := range draws {
		retry = max(retry, draws[i].Count.RetryAfter)
		reset = min(reset, draws[i].Count.ResetAfter)
	}
	if retry > 0 {
		return retry
	}
	return reset
}

// chooseMode chooses a Mode. In one step of eight it also gives a bucket another rule.
func (p *play) chooseMode() law.Mode {
	b := p.byte()
	if b%8 == 7 {
		p.swapRule()
	}
	return [...]law.Mode{law.Take, law.Take, law.Take, law.Peek, law.Force}[b/8%5]
}

func (p *play) swapRule() {
	i := p.below(len(p.draws))
	old := p.draws[i].Rule
	p.left[bucket{i, old.Kind, old.Period}] = kept{p.draws[i].State, p.asks[i].twin}
	kind, period, capacity, refill := old.Kind, time.Duration(old.Period)*time.Microsecond, old.Capacity, max(1, old.Refill)
	switch p.below(4) {
	case 0:
		p.draws[i].Rule = p.rule()
	case 1: // Another capacity may change the tick or the grain.
		p.draws[i].Rule = p.makeRule(kind, period, p.capacity(), refill)
	case 2: // Another kind, or the same one again.
		p.draws[i].Rule = p.makeRule(law.Kind(p.below(5)), period, capacity, refill)
	case 3:
		p.draws[i].Rule = p.makeRule(kind, period, capacity, p.capacity())
	}
	r := p.draws[i].Rule
	now := p.left[bucket{i, r.Kind, r.Period}]
	p.asks[i].rule, p.draws[i].State, p.asks[i].twin = r, now.state, now.twin
}

func (p *play) chooseCosts(mode law.Mode) {
	for i := range p.draws {
		d, a := &p.draws[i], &p.asks[i]
		d.Within, d.AtMost = 0, false
		c := p.cost(d)
		if p.reserves && d.Rule.Capacity > 0 { // a Throttler refuses to ask others for anything
			p.chooseTerms(d)
		}
		if mode != law.Force && !d.AtMost {
			c = min(c, d.Rule.Capacity)
		}
		d.Cost, a.cost, a.within, a.atMost = c, c, d.Within, d.AtMost
	}
}

// chooseTerms makes a draw a reservation, AtMost, or both, or leaves it as it is.
func (p *play) chooseTerms(d *law.Draw) {
	b := p.byte()
	d.AtMost = b%4 == 3
	switch b / 4 % 8 {
	case 0:
		d.Within = 1 + p.number()%law.MaxWithin
	case 1, 2:
		d.Within = d.Rule.Period
	case 3:
		d.Within = max(0, d.Count.ResetAfter+p.among(-1, 0, 1))
	case 4:
		d.Within = max(0, d.Count.RetryAfter+p.among(-1, 0, 1))
	case 5:
		d.Within = law.MaxWithin
	}
	d.Within = min(d.Within, law.MaxWithin)
}

func (p *play) cost(d *law.Draw) int64 {
	most, left := d.Rule.Capacity, max(0, d.Count.Remaining)
	switch p.below(16) {
	case 0:
		return 0
	case 1:
		return most
	case 2:
		return most - most/3
	case 3:
		return left
	case 4:
		return left + 1
	case 5:
		return p.number() % (most + 1)
	case 6:
		return p.number() // beyond the capacity only in Force
	case 7:
		return p.among(max(0, 4*most-1), 4*most, math.MaxInt64)
	case 8, 9, 10:
		return 1 + most/16
	}
	return 1
}

// rule is one that NewRule accepts.
func (p *play) rule() *law.Rule {
	kind := law.Kind(p.below(5))
	period := p.period()
	capacity := p.capacity()
	refill := capacity
	switch p.below(4) {
	case 1:
		refill = 1
	case 2:
		refill = 1 + capacity/3
	case 3:
		refill = 1 + p.number()%(exact/4-1)
	}
	return p.makeRule(kind, period, capacity, refill)
}

// makeRule halves what is too much until NewRule accepts it.
func (p *play) makeRule(kind law.Kind, period time.Duration, capacity, refill int64) *law.Rule {
	for {
		r, faults := law.NewRule("bucket", kind, period, capacity, refill)
		if len(faults) == 0 {
			return &r
		}
		capacity, refill = max(1, capacity/2), max(1, refill/2)
	}
}

func (p *play) period() time.Duration {
	day := 24 * time.Hour
	common := [...]time.Duration{
		time.Microsecond, 2 * time.Microsecond, 3*time.Microsecond - 1, 7 * time.Microsecond,
		999 * time.Microsecond, time.Millisecond, 1001 * time.Microsecond, 17 * time.Millisecond,
		999_983 * time.Microsecond, time.Second, 1500 * time.Millisecond, 7 * time.Second,
		10 * time.Second, time.Minute, 90*time.Second + 1, time.Hour, day, 7 * day, 30*day + time.Millisecond, 366 * day,
	}
	if i := p.below(len(common) + 5); i < len(common) {
		return common[i]
	}
	return 1000 + time.Duration(p.number())%(366*day-1000)
}

func (p *play) capacity() int64 {
	common := [...]int64{1, 2, 3, 0, 5, 7, 10, 100, 255, 256, 257, 1000, 1_000_003, 1 << 31, 1 << 40, exact/4 - 1}
	if i := p.below(len(common) + 4); i < len(common) {
		return common[i]
	}
	return 1 + p.number()%(exact/4-1)
}

// describe is for a failure: the call, and the states before it.
func describe(mode law.Mode, real int64, draws []law.Draw) string {
	out := fmt.Sprintf("mode %d at %d\n", mode, real)
	for _, d := range draws {
		out += fmt.Sprintf("  %+v cost %d within %d at most %v, seen %d, holds %v", *d.Rule, d.Cost, d.Within, d.AtMost, d.State.Seen, d.State.Holds())
		if d.State.Law != nil {
			out += fmt.Sprintf(" by %+v", *d.State.Law)
		}
		out += "\n"
	}
	return out
}

// feed gives out the bytes of a story, and zeros when there are no more.
type feed []byte

func (f *feed) byte() byte {
	if len(*f) == 0 {
		return 0
	}
	b := (*f)[0]
	*f = (*f)[1:]
	return b
}

func (f *feed) below(n int) int { return int(f.byte()) % n }

func (f *feed) among(n ...int64) int64 { return n[f.below(len(n))] }

// number has any size from 0 to 63 bits.
func (f *feed) number() int64 {
	bits := f.below(64)
	n := uint64(0)
	for range (bits + 7) / 8 {
		n = n<<8 | uint64(f.byte())
	}
	return int64(n & (1<<bits - 1))
}

func FuzzRule(f *testing.F) {
	f.Add("5/10s", uint8(0), int64(10*time.Second), int64(5), int64(0))
	f.Add("100/1h/continuous", uint8(1), int64(time.Hour), int64(100), int64(10))
	f.Add("1000/1m/sliding", uint8(3), int64(time.Minute), int64(1000), int64(-1))
	f.Add("257/1µs/log", uint8(4), int64(time.Microsecond), int64(257), int64(0))
	f.Add("", uint8(5), int64(999), int64(0), int64(0))
	f.Add("nothing", uint8(1), int64(time.Hour), int64(0), int64(0))
	f.Add("nothing", uint8(3), int64(1013), int64(0), int64(38))
	f.Add("most", uint8(1), int64(math.MaxInt64), int64(math.MaxInt64), int64(math.MaxInt64))
	f.Add("least", uint8(255), int64(math.MinInt64), int64(math.MinInt64), int64(math.MinInt64))
	f.Fuzz(func(t *testing.T, name string, kind uint8, period, capacity, refill int64) {
		w := wanted{name, law.Kind(kind), time.Duration(period), capacity, refill}
		r, faults := law.NewRule(name, w.kind, w.period, capacity, refill)
		if capacity == 0 && refill == 0 {
			w.refill = 1 // of no tokens, none could come back
		}
		for _, fault := range faults {
			if fault.Bucket != name || fault.Field == "" || fault.Reason == "" {
				t.Errorf("%+v: a fault that does not say what is wrong: %#v", w, fault)
			}
		}
		if possible := w.possible(); possible != (len(faults) == 0) {
			t.Errorf("%+v: possible: %v, faults: %v", w, possible, faults)
		}
		if len(faults) == 0 && r != w.rule() {
			t.Errorf("%+v: rule %+v, must be %+v", w, r, w.rule())
		}
	})
}

// wanted is what NewRule is asked for. Its methods compute the rule once more, with numbers of any size.
type wanted struct {
	name             string
	kind             law.Kind
	period           time.Duration
	capacity, refill int64
}

// possible reports whether every bound is kept.
func (w wanted) possible() bool {
	return w.named() && w.kind <= law.SlidingLog &&
		w.period >= time.Microsecond && w.period <= 366*24*time.Hour &&
		(w.capacity == 0 || small(w.capacity)) && (w.kind != law.Continuous || small(w.refill) && w.comesBack()) &&
		w.tick() > 0
}

func small(n int64) bool { return n >= 1 && n < exact/4 }

func (w wanted) named() bool {
	for _, b := range []byte(w.name) {
		if b < 0x20 || b > 0x7e {
			return false
		}
	}
	return len(w.name) >= 1 && len(w.name) <= 64
}

// comesBack reports whether 4 capacities come back within 2^50 microseconds, which are 35 years, counted in whole
// periods.
func (w wanted) comesBack() bool {
	periods := ceiling(quotient(product(rat(4), rat(w.capacity)), rat(w.refill)))
	return product(periods, rat(w.micros())).Cmp(rat(exact/8)) <= 0
}

// micros returns the period in microseconds, rounded up.
func (w wanted) micros() int64 { return whole(ceiling(quotient(rat(int64(w.period)), rat(1000)))) }

// largest returns the number of tokens that bounds the units.
func (w wanted) largest() int64 {
	if w.kind == law.Continuous {
		return max(w.capacity, w.refill)
	}
	return w.capacity
}

// tick returns the Tick for the larger of capacity and refill. If there is none, or if more than the capacity comes
// back in it, it is the Tick for the capacity.
func (w wanted) tick() int64 {
	if w.kind != law.Continuous && w.kind != law.SlidingWindow {
		return 1
	}
	tick := w.tickBy(w.largest())
	if w.kind == law.Continuous && (tick == 0 || product(rat(w.refill), quotient(rat(tick), rat(w.micros()))).Cmp(rat(w.capacity)) > 0) {
		if other := w.tickBy(w.capacity); other > 0 {
			return other
		}
	}
	return tick
}

// tickBy returns the finest Tick that will do, or 0: a microsecond, a millisecond, a second, or the shortest that
// divides the period into at least 16 ticks, whose number has no prime factor above 7.
func (w wanted) tickBy(largest int64) int64 {
	for _, tick := range []int64{1, 1000, 1_000_000} {
		if w.micros()%tick == 0 && (tick == 1 || w.micros()/tick >= 16) && w.fits(largest, w.micros()/tick) {
			return tick
		}
	}
	most, best := (exact-1)/4/max(1, largest), int64(0)
	for a := int64(1); a <= most; a *= 2 {
		for b := a; b <= most; b *= 3 {
			for c := b; c <= most; c *= 5 {
				for d := c; d <= most; d *= 7 {
					if w.micros()%d == 0 && d >= 16 {
						best = max(best, d)
					}
				}
			}
		}
	}
	if best == 0 {
		return 0
	}
	return w.micros() / best
}

// fits reports whether 4 times the largest number, in units, is below 2^53.
func (w wanted) fits(largest, steps int64) bool {
	units := new(big.Int).Mul(big.NewInt(largest), big.NewInt(w.one(steps)))
	return units.Mul(units, big.NewInt(4)).Cmp(big.NewInt(exact)) < 0
}

// one returns how many units a token has if a period has so many steps: the fewest for which a whole number comes back
// each step.
func (w wanted) one(steps int64) int64 {
	if w.kind != law.Continuous {
		return steps
	}
	return quotient(rat(w.refill), rat(steps)).Denom().Int64()
}

// rule returns the rule that NewRule has to make.
func (w wanted) rule() law.Rule {
	l := law.Law{Kind: w.kind, Period: w.micros(), Tick: w.tick(), One: 1, Grain: 1}
	if w.kind == law.SlidingWindow {
		l.One = l.Period / l.Tick
	}
	if w.kind == law.Continuous {
		l.Refill, l.One = w.refill, w.one(l.Period/l.Tick)
		l.Drain = whole(quotient(product(rat(l.Refill), rat(l.One)), rat(l.Period/l.Tick)))
	}
	if w.kind == law.SlidingLog && w.capacity > 256 { // at most about 256 holds
		l.Grain = whole(ceiling(quotient(rat(l.Period), rat(256))))
	}
	window := l.Period
	if w.kind == law.Continuous {
		window = whole(ceiling(quotient(product(rat(w.capacity), rat(l.Period)), rat(l.Refill))))
	}
	return law.Rule{Name: w.name, Law: l, Capacity: w.capacity, Full: w.capacity, Window: window}
}
