package postgres

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5/pgtype"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// row is one identifier in one batch. These are its states, and what may be done in each:
//
//	missing     version 0: nothing is stored. It is written by an INSERT that does nothing if another one was first
//	read        as the server has it. It is written on the condition of its version
//	remembered  as this process wrote it last. It is written on the same condition; if it is not written it must be
//	            read before a call is answered (memory)
//	locked      read under a lock. The condition always holds
//	faulty      read, but not in the form of this package. All calls fail except a Reset, which replaces it
//	changed     by a call. It must be written back
//	written     Postgres has executed the write. Until the commit is answered it may still roll back
//
// One rule keeps decisions exact: a call that changes a row is answered only after the commit, and any other call
// only from a row that was read.
//
// A row is removed when a sweep finds it full, a minute after a Reset, or by hand. Its version is at least the
// server's time in microseconds when it was written. So a row that is made again never repeats a version.
type row struct {
	id      []byte
	version int64      // 0 if the row does not exist
	next    int64      // its version once it is written
	written bool       // Postgres has executed the write, but may still roll back
	at      pgtype.TID // where the row is, if a Record has locked it
	buckets []bucket
	fault   error // why the buckets cannot be read, or nil

	changed    bool  // by a call, and not written yet
	remembered bool  // version and buckets are from memory
	now        int64 // when it was changed, in microseconds
	clocked    bool  // now is a caller's time, not the server's

	rules *storage.RuleSet // the rules that its buckets probably have: those of its first call
	calls []*call          // its calls, if each call of the batch has one identifier
}

// bucket is the state of a bucket that was not full when the row was written.
type bucket struct {
	name  string
	state law.State
}

// lastVersion is the largest version that the table takes.
const lastVersion = 1 << 62

// nextVersion returns the version of the row once it is written at the server's time now. It is at least that time, so
// that a row which was deleted and made again never has an earlier version. Only somebody who wrote it by hand can have
// set the last version. Then the time is the next one, because no row has reached that by itself.
func (r *row) nextVersion(now int64) int64 {
	if r.version >= lastVersion {
		return now
	}
	return max(r.version+1, now)
}

// is reports whether b is the bucket of a rule: name, kind and period are equal.
func (b *bucket) is(r *law.Rule) bool { return b.name == r.Name && b.state.Law.Same(&r.Law) }

// find returns the bucket of a rule, or nil.
func (r *row) find(rule *law.Rule) *bucket {
	for i := range r.buckets {
		if r.buckets[i].is(rule) {
			return &r.buckets[i]
		}
	}
	return nil
}

// state returns the state of the bucket of a rule, or the zero State if there is none.
func (r *row) state(rule *law.Rule) (s law.State) {
	if b := r.find(rule); b != nil {
		s = b.state
	}
	return s
}

// set stores the state of the bucket of a rule.
func (r *row) set(rule *law.Rule, s law.State) {
	if b := r.find(rule); b != nil {
		b.state = s
		return
	}
	r.buckets = append(r.buckets, bucket{rule.Name, s})
}

// room returns an error if a call with these rules would leave more than law.MaxBuckets buckets in the row. Other
// buckets that are full do not count.
func (r *row) room(rules *storage.RuleSet, now int64) error {
	n := len(rules.Rules)
	if n+len(r.buckets) <= law.MaxBuckets {
		return nil
	}
	for i := range r.buckets {
		b := &r.buckets[i]
		if !slices.ContainsFunc(rules.Rules, func(rule law.Rule) bool { return b.is(&rule) }) && !b.state.Full(now) {
			n++
		}
	}
	return storage.TooManyBuckets(rules, n)
}

// debt returns the debts of the buckets of rules, or nil if the row cannot be read.
func (r *row) debt(rules *storage.RuleSet, now int64) [][]storage.Amount {
	if r.fault != nil {
		return nil
	}
	out := make([][]storage.Amount, len(rules.Rules))
	for i := range rules.Rules {
		rule := &rules.Rules[i]
		out[i] = r.state(rule).Debt(rule, now)
	}
	return out
}

// touch marks the row as changed at a time.
func (r *row) touch(clocked bool, now int64) { r.changed, r.clocked, r.now = true, clocked, now }

// reset removes all buckets, even if they cannot be read. A row that does not exist stays so.
func (r *row) reset(now int64) {
	if r.version > 0 || len(r.buckets) > 0 {
		r.buckets, r.fault = nil, nil
		r.touch(false, now)
	}
}

// tombstone is how long an empty row stays, in microseconds. Meanwhile a process that has read or remembers the old row
// finds another version, and its write fails. It must be longer than a process remembers rows (memory.go).
const tombstone = 60_000_000

// forget drops the buckets that are full, and returns the time at which all others are full.
func (r *row) forget() (fullAt int64) {
	r.buckets = slices.DeleteFunc(r.buckets, func(b bucket) bool { return b.state.Full(r.now) })
	if len(r.buckets) == 0 {
		return r.now + tombstone
	}
	for i := range r.buckets {
		fullAt = max(fullAt, r.buckets[i].state.FullAt(r.now))
	}
	return fullAt
}

// format is the first byte of the state column: the version of its form. The buckets follow, each with
//
//   - the length of its name, and the name
//   - kind and period; a Continuous one also refill, tick, units in a token and units that drain in a tick
//   - the time of its last change
//   - the number of its holds, and of each the time from the end before (or from 0) to its end, and its N
//
// All numbers are varints. The column is empty if the row has no buckets, as after a Reset.
const format = 2

// encode returns the state column.
func (r *row) encode() []byte {
	if len(r.buckets) == 0 {
		return []byte{}
	}
	out := append(make([]byte, 0, 40*len(r.buckets)), format)
	for i := range r.buckets {
		b := &r.buckets[i]
		s := &b.state
		out = binary.AppendUvarint(out, uint64(len(b.name)))
		out = append(out, b.name...)
		numbers := [...]int64{int64(s.Law.Kind), s.Law.Period, s.Law.Refill, s.Law.Tick, s.Law.One, s.Law.Drain}
		stored := numbers[:]
		if s.Law.Kind != law.Continuous {
			stored = stored[:2]
		}
		for _, n := range stored {
			out = binary.AppendUvarint(out, uint64(n))
		}
		out = binary.AppendUvarint(out, uint64(s.Seen))
		out = binary.AppendUvarint(out, uint64(len(s.Holds())))
		end := int64(0)
		for _, h := range s.Holds() {
			out = binary.AppendUvarint(out, uint64(h.End-end))
			out = binary.AppendUvarint(out, uint64(h.N))
			end = h.End
		}
	}
	return out
}

// read sets the row to what Postgres has: its buckets, or a fault. It checks everything that the arithmetic relies on,
// because a row may be damaged or written by hand.
//
// If a bucket belongs to the rule at the same index, and counts in the same units, it shares the rule's name and law.
// That saves two allocations.
func (r *row) read(version int64, state []byte) {
	d := decoder{rest: state}
	if len(state) > 0 && d.bytes(1)[0] != format {
		d.fail("format")
	}
	r.version, r.buckets, r.fault, r.changed, r.remembered = version, nil, nil, false, false
	var expected []law.Rule
	if r.rules != nil {
		expected = r.rules.Rules
	}
	for i := 0; len(d.rest) > 0; i++ {
		name := d.bytes(d.number("name", 1<<16))
		l := law.Law{
			Kind:   law.Kind(d.number("kind", int64(law.SlidingLog))),
			Period: d.number("period", most), Tick: 1, One: 1, Grain: 1,
		}
		if l.Kind == law.Continuous {
			l.Refill, l.Tick = d.number("refill", most), d.number("tick", most)
			l.One, l.Drain = d.number("units", most), d.number("units", most)
		}
		if l.Period == 0 || l.Tick == 0 || l.One == 0 || l.Period%l.Tick != 0 || l.Kind == law.Continuous && (l.Refill == 0 || l.Drain == 0) {
			d.fail("law")
		}
		b := bucket{state: law.State{Seen: d.number("time", most)}}
		if i < len(expected) && string(name) == expected[i].Name && l.Same(&expected[i].Law) && (l.Kind != law.Continuous || l == expected[i].Law) {
			b.name, b.state.Law = expected[i].Name, &expected[i].Law
		} else {
			own := l
			b.name, b.state.Law = string(name), &own
		}
		end, all := int64(0), int64(0)
		for n := d.number("number of holds", int64(len(d.rest))); n > 0; n-- {
			h := law.Hold{End: min(most, end+d.number("end", most)), N: d.number("tokens", most)}
			if end, all = h.End, all+h.N; all > mostHeld {
				d.fail("tokens")
				break
			}
			b.state.Append(h)
		}
		if l.Kind == law.Continuous && len(b.state.Holds()) > 1 {
			d.fail("number of levels")
		}
		r.buckets = append(r.buckets, b)
	}
	if d.fault != "" {
		r.fault = fmt.Errorf("%w: the row of id %.99q is none of this package's, or one of a later version: its %s cannot be read", storage.ErrCorruptState, r.id, d.fault)
	}
}

// most is the largest number that may be stored: the arithmetic is exact below 2^53.
const most = 1<<53 - 1

// mostHeld is the most tokens that all holds of a bucket may have together. It is twice the largest number because the
// holds of a SlidingWindow that fade count in part.
const mostHeld = 2 * (most + 1)

// decoder decodes a state column. After a fault nothing is left, and everything further is zero.
type decoder struct {
	rest  []byte
	fault string // the first thing that cannot be read, or ""
}

// fail ends the decoding.
func (d *decoder) fail(what string) {
	if d.fault == "" {
		d.fault = what
	}
	d.rest = nil
}

// number decodes a varint, which is a fault if it is above most.
func (d *decoder) number(what string, most int64) int64 {
	n, size := binary.Uvarint(d.rest)
	if size <= 0 || n > uint64(most) {
		d.fail(what)
		return 0
	}
	d.rest = d.rest[size:]
	return int64(n)
}

// bytes returns the next n bytes, which are part of the column.
func (d *decoder) bytes(n int64) []byte {
	if n > int64(len(d.rest)) {
		d.fail("name")
		return nil
	}
	out := d.rest[:n]
	d.rest = d.rest[n:]
	return out
}
