// Package law is the arithmetic of all buckets: how tokens come back, what a decision takes and what it tells. It is the
// only definition of it in Go; the Lua scripts of storage/redis carry the same steps, and package storagetest compares them.
//
// Start with decide.go, the steps of a decision, and law.go, the table of the kinds. A Rule has the numbers of a bucket
// (rule.go), a State what was spent from it (state.go), a Cell the same in three numbers (cell.go), and an Amount is what
// crosses from one store to another (amount.go).
package law

import (
	"math"
	"slices"
	"time"
)

// Limits of a call.
const (
	MaxIdentifier = 1024 // bytes of an identifier
	MaxBuckets    = 16   // buckets of one identifier
)

// Mode says what a decision may do.
type Mode uint8

// The modes.
const (
	Take  Mode = iota // take when every bucket admits
	Peek              // answer exactly as Take would, and take nothing
	Force             // take whatever the answer is; consumption saturates at Rule.Ceiling
)

// MaxWithin is the longest that a reservation looks ahead, in microseconds: 366 days.
const MaxWithin = int64(maxPeriod / time.Microsecond)

// Count is what a decision says of one bucket: tokens, and microseconds from the decision.
type Count struct {
	// Remaining is what may still be taken. Below zero it is a debt, or reserved. By Force it is what would remain if
	// nothing were forgotten: what is below the capacity less Rule.Ceiling was not recorded.
	Remaining int64

	ResetAfter int64 // until the bucket is full
	NextAfter  int64 // until one token more than Remaining may be taken, or the first one; 0 if it is full
	RetryAfter int64 // until the bucket admits the denied cost, or has what was reserved; 0 if it has
	HeldFor    int64 // until all that an admitted call took has come back by itself; 0 if it took nothing
}

// The steps of a decision are numbered; other implementations (the Lua scripts, and cell.go for states in
// three numbers) carry the same numbers:
//
//  1. No state, or one seen later than the real time by more than one period plus 60 s: empty.
//     A clock that steps back less never refills a state; more costs at most one extra capacity,
//     once. A storage may have forgotten a full state before the clock stepped back: then it is full.
//  2. now = max(real, seen): time never runs backwards for a bucket.
//  3. Spent, in whole tokens. What is left of a token that drains (Continuous) counts as a whole one. What is left of
//     a hold that fades (SlidingWindow) is rounded down, with the present tick counted as over.
//  4. Admit if spent + cost <= capacity in every bucket that is asked for more than 0. A reservation looks ahead in a
//     Continuous bucket: what will be spent at real + within counts, and now no more than the ceiling may be out. AtMost
//     asks for one token, and then takes what all have that are asked in this way.
//  5. Admitted: in each such bucket drop dead holds, add the cost.
//
// All times are microseconds since the epoch. All numbers are integers below 2^53.
//
// RetryAfter is exact: the same call a microsecond earlier is denied, at it admitted, if nobody else
// takes. One case is left out: several buckets, of which one is empty by step 1 when another denies.
// As the denial changes nothing, the first is believed again once the clock has caught up, unless it
// was forgotten meanwhile. And after the refill of a Continuous bucket was lowered RetryAfter may be too late: what was spent
// is also back when it would have been by the refill before.

// Draw is one bucket in a decision.
type Draw struct {
	Rule   *Rule
	Cost   int64
	Within int64 // of a reservation: microseconds until a Continuous bucket has to have what is taken now
	AtMost bool  // less than the cost may be taken: then Decide lowers it
	State  State // changed when something is taken
	Count  Count // set by Decide

	spent int64 // steps 1 to 3
	room  int64 // of which a call may take at most so much
}

// Decide answers one request: whether the buckets of all draws admit their costs at the time
// real. If so, and unless mode is Peek, it takes them all; otherwise it changes no state. The
// counts of a denial tell what is, those of an admission what is after it. Costs are 0 or more,
// and at most the capacity unless mode is Force or the draw is AtMost. Force takes whole costs, and looks at no Within.
func Decide(mode Mode, real int64, draws []Draw) bool {
	allowed := true
	for i := range draws {
		d := &draws[i]
		if mode == Force {
			d.Within = 0
		}
		d.look(real)
		if !d.admits() && mode != Force { // 4
			allowed = false
		}
	}
	if allowed && mode != Force {
		share(draws)
	}
	for i := range draws {
		switch d := &draws[i]; {
		case !allowed || d.Cost == 0:
			d.tell(real)
		case mode == Peek:
			peeked := *d
			peeked.State.many = slices.Clone(d.State.many)
			peeked.take(real)
			d.Count = peeked.Count
		default:
			d.take(real)
		}
	}
	return allowed
}

// look is steps 1 to 3.
func (d *Draw) look(real int64) {
	r, s := d.Rule, &d.State
	if d.spent, d.room = 0, r.Capacity; !s.believable(&r.Law, real) { // 1
		return
	}
	now := max(real, s.Seen)  // 2
	d.spent = s.spent(r, now) // 3
	d.room -= d.spent
	if until := real + d.Within; r.Kind == Continuous && until > now {
		later := int64(0)
		if d.spent > 0 {
			later = r.drained(s.units(&r.Law), s.Seen, until)
		}
		d.room = min(r.Capacity-ceil(later, r.One), r.Ceiling()-d.spent)
	}
}

// admits is step 4 for one bucket.
func (d *Draw) admits() bool { return d.Cost == 0 || d.least() <= d.room }

// least is the least that a call is content with.
func (d *Draw) least() int64 {
	if d.AtMost {
		return min(d.Cost, 1)
	}
	return d.Cost
}

// share lowers the costs of the draws that are AtMost to what each of their buckets has now, and to one at least: a
// reservation may get that later.
func share(draws []Draw) {
	most := int64(math.MaxInt64)
	for i := range draws {
		d := &draws[i]
		if has := d.Rule.Capacity - d.spent; d.AtMost && has < d.Cost {
			most = min(most, max(1, has))
		}
	}
	for i := range draws {
		if d := &draws[i]; d.AtMost {
			d.Cost = min(d.Cost, most)
		}
	}
}

// Taken is the largest cost of the draws that are AtMost. After Decide it tells what each of them gave: its cost, or this if
// that is less.
func Taken(draws []Draw) (most int64) {
	for i := range draws {
		if d := &draws[i]; d.AtMost {
			most = max(most, d.Cost)
		}
	}
	return most
}

// tell counts what is.
func (d *Draw) tell(real int64) {
	s := &d.State
	if !s.believable(&d.Rule.Law, real) {
		s = &State{Seen: real}
	}
	now := max(real, s.Seen)
	d.count(s, now, real, d.spent)
	if !d.admits() {
		d.Count.RetryAfter = d.retry(s, now) - real
	}
}

// retry is when the bucket admits the cost that it denies.
func (d *Draw) retry(s *State, now int64) int64 {
	r := d.Rule
	at := s.back(r, now, r.Capacity-d.least(), d.spent)
	if r.Kind == Continuous {
		at -= d.Within
	}
	if room := r.Ceiling() - d.least(); d.spent > room {
		at = max(at, s.back(r, now, room, d.spent))
	}
	return at
}

// count sets what a state that has spent so much says of its bucket.
func (d *Draw) count(s *State, now, real, spent int64) {
	c := d.Rule.Capacity
	d.Count = Count{
		Remaining:  c - spent,
		ResetAfter: s.back(d.Rule, now, 0, spent) - real,
		NextAfter:  s.back(d.Rule, now, max(0, min(spent, c)-1), spent) - real,
	}
}

// take is step 5. What would exceed the ceiling is not recorded, but counted.
func (d *Draw) take(real int64) {
	s, r := &d.State, d.Rule
	now := s.open(r, real)
	cost := r.recorded(d.Cost, d.spent)
	if r.Kind == Continuous {
		s.level(cost * r.One)
	} else if cost > 0 {
		holds := s.Holds()
		if k := len(holds); k > 0 && r.joins(holds[k-1], now) {
			holds[k-1].N += cost
		} else {
			s.insert(k, Hold{r.end(now), cost})
		}
	}
	d.count(s, now, real, d.spent+cost)
	d.Count.HeldFor = s.goneAt(&r.Law) - real
	d.Count.Remaining -= min(d.Cost, r.Ceiling()) - cost
	if d.Within > 0 && d.spent+cost > r.Capacity {
		d.Count.RetryAfter = s.back(r, now, r.Capacity, d.spent+cost) - real
	}
}
