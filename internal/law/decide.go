// Package law is the arithmetic of all buckets: how tokens come back, what a decision takes and what it answers. It is
// the only definition in Go. The Lua scripts of storage/redis repeat its steps, and package storagetest compares the
// two.
//
// Start with decide.go, the steps of a decision, and law.go, the table of the kinds. A Rule has the numbers of a bucket
// (rule.go). A State is what was spent from it (state.go), and a Cell is the same in three numbers (cell.go). An Amount
// is what crosses from one store to another (amount.go). A RuleSet makes equal rules one pointer (ruleset.go), and
// elastic.go shrinks it.
//
// Nothing in this package does I/O or takes a lock, except for the table of rule sets. States and cells are not safe
// for concurrent use: a storage guards them.
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
	Force             // take whatever the answer is; consumption never exceeds Rule.Ceiling
)

// MaxWithin is the longest that a reservation looks ahead, in microseconds: 366 days.
const MaxWithin = int64(maxPeriod / time.Microsecond)

// Count is what a decision says about one bucket, in tokens and in microseconds from the decision on.
type Count struct {
	// Remaining is what may still be taken. Below zero it is owed, or reserved. After a Force it is what would remain
	// if everything had been recorded: the part below Capacity - Rule.Ceiling was not.
	Remaining int64

	ResetAfter int64 // until the bucket is full
	NextAfter  int64 // until one token more than Remaining may be taken, or the first one; 0 if it is full
	RetryAfter int64 // until the bucket admits the denied cost, or has what was reserved; 0 if it has
	HeldFor    int64 // until all that an admitted call took has come back by itself; 0 if it took nothing
}

// The steps of a decision. Other implementations, the Lua scripts and cell.go, have the same steps under the same
// numbers:
//
//  1. The state counts as empty, and the bucket as full, if there is no state, or if it was seen later than the real
//     time by more than one period plus 60 s. So a clock that steps back by less never refills a bucket; a larger step
//     costs at most one extra capacity, once. But if a storage has forgotten an empty state before the clock steps
//     back, the bucket stays full.
//  2. now = max(real, seen): time never runs backwards for a bucket.
//  3. Spent, in whole tokens. What is left of a token that drains (Continuous) counts as a whole one. What is left of a
//     hold that fades (SlidingWindow) is rounded down, with the present tick counted as over.
//  4. Admit if spent + cost <= capacity in every bucket that is asked for more than 0. A reservation looks ahead in a
//     Continuous bucket: what will be spent at real + within counts, and no more than the ceiling may be out now.
//     AtMost needs one token of each bucket that is asked in this way, and then takes as many as all of these have.
//  5. If admitted: drop the dead holds in each bucket that is asked for more than 0, and add the cost.
//
// All times are microseconds since the epoch. All numbers are integers below 2^53.
//
// RetryAfter is exact: the same call is denied a microsecond earlier and admitted at that time, if nobody else takes.
// Three cases are left out:
//
//   - Of several buckets, one counts as empty by step 1 while another denies. As the denial changes nothing, the first
//     is believed again once the clock has caught up, and may deny then, unless it was forgotten meanwhile.
//   - The refill of a Continuous bucket was lowered. Then RetryAfter may be too late, because what was spent is back by
//     the time at which it would have been under the refill before.
//   - The capacity of a SlidingWindow was lowered. Then RetryAfter may be too late by a tick of the law before, because a
//     storage forgets what was spent when it has faded by that law, and the last tick counts as over.

// Draw is one bucket in a decision.
type Draw struct {
	Rule   *Rule
	Cost   int64
	Within int64 // of a reservation: microseconds until a Continuous bucket has to have what is taken now
	AtMost bool  // less than the cost may be taken; Decide lowers the cost to what is taken
	State  State // changed if something is taken
	Count  Count // set by Decide

	spent int64 // by steps 1 to 3
	room  int64 // the most that the call may take
}

// Decide answers one request: whether the buckets of all draws admit their costs at the time real, in microseconds
// since the epoch. If they do, and mode is not Peek, it takes all costs. Otherwise it changes no state. The counts of a
// denial describe the buckets as they are, those of an admission as they are afterwards, in a Peek too.
//
// Costs are 0 or more, and at most the capacity unless mode is Force or the draw is AtMost. Force takes costs whole and
// ignores Within.
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

// look is steps 1 to 3: it finds out what is spent, and how much room there is.
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

// least returns the fewest tokens with which the call is admitted.
func (d *Draw) least() int64 {
	if d.AtMost {
		return min(d.Cost, 1)
	}
	return d.Cost
}

// share lowers the costs of the draws that are AtMost to what all of their buckets have now, but not below one. A
// reservation may be admitted where a bucket has none now, and gets that one later.
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

// Taken returns the largest cost of the draws that are AtMost, and 0 if none is. After Decide each of them has given
// that many tokens, or what its own cost was if that is less.
func Taken(draws []Draw) (most int64) {
	for i := range draws {
		if d := &draws[i]; d.AtMost {
			most = max(most, d.Cost)
		}
	}
	return most
}

// tell sets the count of a bucket as it is, and when it admits the cost if it denies it.
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

// retry returns when the bucket admits the cost that it denies. A reservation is admitted Within earlier than the
// tokens are there, but only once no more than the ceiling would be out.
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

// count sets the Count of a state that has spent so many tokens.
func (d *Draw) count(s *State, now, real, spent int64) {
	c := d.Rule.Capacity
	d.Count = Count{
		Remaining:  c - spent,
		ResetAfter: s.back(d.Rule, now, 0, spent) - real,
		NextAfter:  s.back(d.Rule, now, max(0, min(spent, c)-1), spent) - real,
	}
}

// take is step 5. Tokens beyond the ceiling, which only Force can take, are not recorded, but Remaining counts them.
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
