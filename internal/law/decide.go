// Package law is the arithmetic of all buckets: how tokens come back, what a decision takes and what it tells. It is the
// only definition of it in Go; the Lua scripts of storage/redis carry the same steps, and package storagetest compares them.
//
// Start with decide.go, the steps of a decision, and law.go, the table of the kinds. A Rule has the numbers of a bucket
// (rule.go), a State what was spent from it (state.go), a Cell the same in three numbers (cell.go), and an Amount is what
// crosses from one store to another (amount.go).
package law

import "slices"

// MaxBuckets is the most buckets of one identifier.
const MaxBuckets = 16

// Mode says what a decision may do.
type Mode uint8

// The modes.
const (
	Take  Mode = iota // take when every bucket admits
	Peek              // answer exactly as Take would, and take nothing
	Force             // take whatever the answer is; consumption saturates at 4 capacities
)

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

// The steps of a decision are numbered; other implementations (the Lua scripts, and cell.go for states in
// three numbers) carry the same numbers:
//
//  1. No state, or one seen later than the real time by more than one period plus 60 s: empty.
//     A clock that steps back less never refills a state; more costs at most one extra capacity,
//     once. A storage may have forgotten a full state before the clock stepped back: then it is full.
//  2. now = max(real, seen): time never runs backwards for a bucket.
//  3. Spent, in whole tokens. What is left of a token that drains (Continuous) counts as a whole one. What is left of
//     a hold that fades (SlidingWindow) is rounded down, with the present tick counted as over.
//  4. Admit if spent + cost <= capacity in every bucket that is asked for more than 0.
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
	Rule  *Rule
	Cost  int64
	State State // changed when something is taken
	Count Count // set by Decide

	spent int64 // steps 1 to 3
}

// Decide answers one request: whether the buckets of all draws admit their costs at the time
// real. If so, and unless mode is Peek, it takes them all; otherwise it changes no state. The
// counts of a denial tell what is, those of an admission what is after it. Costs are 0 or more,
// and at most the capacity unless mode is Force.
func Decide(mode Mode, real int64, draws []Draw) bool {
	allowed := true
	for i := range draws {
		d := &draws[i]
		d.spent = 0
		if d.State.believable(&d.Rule.Law, real) { // 1
			d.spent = d.State.spent(d.Rule, max(real, d.State.Seen)) // 2, 3
		}
		if d.Cost > d.Rule.Capacity-d.spent && d.Cost > 0 && mode != Force { // 4
			allowed = false
		}
	}
	for i := range draws {
		switch d := &draws[i]; {
		case !allowed || d.Cost == 0:
			d.look(real)
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

// look counts what is.
func (d *Draw) look(real int64) {
	s, capacity := &d.State, d.Rule.Capacity
	if !s.believable(&d.Rule.Law, real) {
		s = &State{Seen: real}
	}
	d.count(s, max(real, s.Seen), real, d.spent)
	if d.Cost > 0 && d.Cost > capacity-d.spent {
		d.Count.RetryAfter = s.back(d.Rule, max(real, s.Seen), capacity-d.Cost, d.spent) - real
	}
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

// take is step 5. What would exceed 4 capacities is not recorded, but counted.
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
	d.Count.Remaining -= min(d.Cost, 4*r.Capacity) - cost
}
