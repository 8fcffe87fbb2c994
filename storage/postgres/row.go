package postgres

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5/pgtype"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// row is one identifier in one batch. Its states, and what may be done in each:
//
//	missing     version 0: nothing is stored. Written by an INSERT that does nothing if somebody else was first
//	read        as the server has it. Written on the condition of its version
//	remembered  as this process wrote it last. The same, but what is not written has to be read first (memory)
//	locked      read under a lock. The condition always holds
//	faulty      read, but not of this package. All calls fail but a Reset, which replaces it
//	changed     by a call, and has to be stored
//	written     Postgres says so. Until the commit is answered it may still be rolled back
//
// The rule that keeps it exact: a call that changes a row is answered when the write is committed, and any other call only
// from a row that was read.
//
// A row goes away when a sweep finds it full, a minute after a Reset, or when somebody deletes it. Its version is at least the
// server's time, in microseconds, so a row that is made anew repeats none.
type row struct {
	id      []byte
	version int64      // 0 if there is none
	next    int64      // the version after it is written
	written bool       // Postgres says so, but may still roll back
	at      pgtype.TID // where it is, if a Record has locked it
	buckets []bucket
	fault   error // why the buckets cannot be read

	changed    bool // and not written yet
	remembered bool // its version and buckets are from memory
	now        int64
	clocked    bool // now is the client's, not the server's

	rules *storage.RuleSet // those that the buckets probably have
	calls []*call          // those of this identifier, if none of the batch has several
}

// bucket is one that was not full when the row was written.
type bucket struct {
	name  string
	state law.State
}

// is reports whether it is the bucket of a rule.
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

// state is that of a bucket, the zero State if there is none.
func (r *row) state(rule *law.Rule) (s law.State) {
	if b := r.find(rule); b != nil {
		s = b.state
	}
	return s
}

func (r *row) set(rule *law.Rule, s law.State) {
	if b := r.find(rule); b != nil {
		b.state = s
		return
	}
	r.buckets = append(r.buckets, bucket{rule.Name, s})
}

// room returns the error of a call by rules which would leave more buckets than may be.
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

// debt is what the buckets of rules owe, nil if the row cannot be read.
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

// touch says that the row was changed, and when.
func (r *row) touch(clocked bool, now int64) { r.changed, r.clocked, r.now = true, clocked, now }

// reset forgets all buckets, also those that cannot be read.
func (r *row) reset(now int64) {
	if r.version > 0 || len(r.buckets) > 0 {
		r.buckets, r.fault = nil, nil
		r.touch(false, now)
	}
}

// tombstone is how many microseconds the row of an identifier that was reset stays, so that a process which has read or
// remembers it finds another version.
const tombstone = 60_000_000

// forget drops the buckets that are full, and returns when all others are.
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

// The state column is format and then, for each bucket, its name behind its length, kind and period, those of a
// Continuous one refill, tick, units a token and units a tick, when it was last changed, and behind their number its holds:
// by how much later each ends than the one
// before, and N. All numbers are varints. It is empty for an identifier that was reset.
const format = 2

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

// read sets the row to what Postgres has: buckets or a fault. Where a bucket is that of the rule in the same
// place, and counts in the same units, it shares the rule's name and law.
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
		if l.Period == 0 || l.Tick == 0 || l.One == 0 || l.Period%l.Tick != 0 || l.Kind == law.Continuous && l.Drain == 0 {
			d.fail("law")
		}
		b := bucket{state: law.State{Seen: d.number("time", most)}}
		if i < len(expected) && string(name) == expected[i].Name && l.Same(&expected[i].Law) && (l.Kind != law.Continuous || l == expected[i].Law) {
			b.name, b.state.Law = expected[i].Name, &expected[i].Law
		} else {
			own := l
			b.name, b.state.Law = string(name), &own
		}
		end := int64(0)
		for n := d.number("number of holds", int64(len(d.rest))); n > 0; n-- {
			end = min(most, end+d.number("end", most))
			b.state.Append(law.Hold{End: end, N: d.number("tokens", most)})
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

// most is the largest number of the arithmetic.
const most = 1<<53 - 1

// decoder reads what there is. After a fault there is nothing more.
type decoder struct {
	rest  []byte
	fault string // what cannot be read
}

func (d *decoder) fail(what string) {
	if d.fault == "" {
		d.fault = what
	}
	d.rest = nil
}

func (d *decoder) number(what string, most int64) int64 {
	n, size := binary.Uvarint(d.rest)
	if size <= 0 || n > uint64(most) {
		d.fail(what)
		return 0
	}
	d.rest = d.rest[size:]
	return int64(n)
}

func (d *decoder) bytes(n int64) []byte {
	if n > int64(len(d.rest)) {
		d.fail("name")
		return nil
	}
	out := d.rest[:n]
	d.rest = d.rest[n:]
	return out
}
