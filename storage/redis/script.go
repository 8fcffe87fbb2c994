package redis

import (
	"context"
	"crypto/sha1"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"

	goredis "github.com/redis/go-redis/v9"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/storage"
)

// The scripts. The head of each script defines its arguments and its answer; this file encodes the former and decodes
// the latter. Both scripts include state.lua, which has what they share.
var (
	//go:embed decide.lua
	decideLua string
	//go:embed change.lua
	changeLua string
	//go:embed state.lua
	stateLua string

	decideScript = newScript(decideLua)
	changeScript = newScript(changeLua)
)

// script is a Lua script as it is sent, and its SHA-1 in hex, by which servers know it.
type script struct{ text, sha string }

// comment matches a comment line of a script. Such lines are not sent.
var comment = regexp.MustCompile(`(?m)^ *--.*\n`)

// named matches a line that gives names to the places of a list.
var named = regexp.MustCompile(`(?m)^--#slots (.*)\n`)

// numbered matches a line that gives names to the numbers from 0 on.
var numbered = regexp.MustCompile(`(?m)^--#numbers (.*)\n`)

// newScript makes the script that is sent from a file: it includes state.lua, replaces each [$name] by the number of
// its place and each $NAME by its number, and removes comment lines.
func newScript(text string) *script {
	text = strings.Replace(text, "--#include state.lua\n", stateLua, 1)
	for _, names := range numbered.FindAllStringSubmatch(text, -1) {
		for i, name := range strings.Fields(names[1]) {
			text = strings.ReplaceAll(text, "$"+name, strconv.Itoa(i))
		}
	}
	for _, names := range named.FindAllStringSubmatch(text, -1) {
		for i, name := range strings.Fields(names[1]) {
			text = strings.ReplaceAll(text, "[$"+name+"]", fmt.Sprintf("[%d]", i+1))
		}
	}
	text = comment.ReplaceAllString(text, "")
	sum := sha1.Sum([]byte(text)) // not for security: EVALSHA finds scripts by their SHA-1
	return &script{text, hex.EncodeToString(sum[:])}
}

// variants is the number of variants of the decision script. It bounds how many copies a server caches.
const variants = 256

// variant returns variant n of the decision script. It decides the same, but has a hash of its own, so that a server
// caches each variant separately.
func variant(n int) *script { return newScript(fmt.Sprintf("local variant = %d\n", n) + decideLua) }

// command is a script call that no client retries after an error: it may have been executed although no answer came.
// go-redis still follows MOVED and ASK, because then nothing ran.
type command struct{ *goredis.Cmd }

// NoRetry tells go-redis to send the command once.
func (command) NoRetry() bool { return true }

// call returns the command that runs the script by its hash or, if byText, by its text.
func (s *script) call(ctx context.Context, byText bool, keys []string, args ...[]byte) command {
	all := make([]any, 0, 3+len(keys)+len(args))
	if byText {
		all = append(all, "eval", s.text)
	} else {
		all = append(all, "evalsha", s.sha)
	}
	all = append(all, len(keys))
	for _, k := range keys {
		all = append(all, k)
	}
	for _, a := range args {
		all = append(all, a)
	}
	return command{goredis.NewCmd(ctx, all...)}
}

// The first byte of an answer. After refused and admitted come the counts of the buckets. After refusedValues and
// admittedValues come the stored values, from which compute derives the counts.
const (
	refused        = iota // denied
	admitted              // admitted, or the change is done
	foreign               // a value is not of this package
	wrongType             // a key holds no string
	tooMany               // an identifier would have too many buckets that are not full
	tooManyHolds          // a bucket would have more holds than a value can store
	stale                 // DecideFresh would admit on a doubtful state
	refusedValues         // denied
	admittedValues        // admitted
)

// The first byte of a change. Zero charges or refunds amounts.
const (
	opRaise   = 1 // raise buckets to debts
	opReset   = 2 // remove the key
	opDebt    = 3 // answer the debts
	isClocked = 4 // added to the others: the caller's time follows
)

// countBytes is the length of a bucket's counts in an answer: six integers of 7 bytes.
const countBytes = 42

// decideArgs returns the arguments of the decision script: the index and the shapes. The index is empty if all requests
// begin with the first shape.
func decideArgs(s *shapes) [][]byte {
	var index []byte
	if slices.ContainsFunc(s.index, func(i int) bool { return i > 0 }) {
		for _, i := range s.index {
			index = binary.LittleEndian.AppendUint16(index, uint16(i))
		}
	}
	out := [][]byte{index}
	for i := range s.all {
		out = append(out, s.all[i].arg())
	}
	return out
}

// arg encodes a shape for the decision script, in the form that the head of decide.lua defines.
func (s *shape) arg() []byte {
	rules := s.rules.Rules
	hold, flags, now, within, age := "I7I4", byte(0), int64(-1), int64(0), int64(0)
	if wide(rules) {
		hold = "I7I7"
	}
	if s.clocked {
		now = s.now
	}
	if s.more {
		flags |= 1
	}
	if s.since != 0 {
		flags |= 2
		age = s.age()
	}
	if s.mode != storage.Force {
		if within = s.within; s.atMost {
			flags |= 4
		}
	}
	prefix := appendPrefix(make([]byte, 0, prefixBytes(rules)), rules)
	form := fmt.Sprintf("<c%dI7%s", len(prefix), strings.Repeat(hold, len(rules)))
	b := make([]byte, 0, 34+len(prefix)+len(form)+57*len(rules))
	b = append(appendUint(b, uint64(len(prefix)), 2), prefix...)
	b = append(append(b, byte(len(form))), form...)
	b = append(appendUint(b, uint64(valueBytes(rules)), 2), byte(s.mode), flags)
	b = append(appendNumbers(b, now, within, age), byte(len(rules)))
	for i := range rules {
		r := &rules[i]
		// No more than the ceiling is recorded, so a larger cost need not be sent. 0 would mean that the bucket is not
		// asked, also if the ceiling is 0.
		cost := min(s.costs[i], max(1, r.Ceiling()))
		b = append(b, byte(r.Kind))
		b = appendNumbers(b, r.Period, r.Drain, r.Tick, r.Grain, r.One, r.Capacity, cost)
	}
	return b
}

// appendPrefix appends the prefix of a plain value.
//
// A plain value has one hold for each bucket of a part, nothing else, and one time of change for all buckets.
// Everything before the times is its prefix, and depends on the rules only. The script therefore recognises a plain
// value by its length and its prefix. The form is defined at the head of state.lua.
func appendPrefix(b []byte, rules []law.Rule) []byte {
	head := byte(len(rules))
	if wide(rules) {
		head |= 32
	}
	b = append(b, 't', '2', head)
	for i := range rules {
		b = append(appendLaw(b, &rules[i]), 1) // 1: the number of holds
	}
	return b
}

// prefixBytes is the length of what appendPrefix appends.
func prefixBytes(rules []law.Rule) int {
	n := 3
	for i := range rules {
		n += 1 + len(rules[i].Name) + 6 + 1
		if rules[i].Kind == law.Continuous {
			n += 7 + 6
		}
	}
	return n
}

// valueBytes is the length of a plain value.
func valueBytes(rules []law.Rule) int {
	n := prefixBytes(rules) + 7 + 11*len(rules) // the time of change, then ends of 7 bytes and counts of 4
	if wide(rules) {
		n += 3 * len(rules)
	}
	return n
}

// wide reports whether the counts of a plain value have 7 bytes instead of 4. That depends on what the buckets can ever
// hold, and not on what they hold now, so the length of the value does not change with consumption.
func wide(rules []law.Rule) bool {
	return slices.ContainsFunc(rules, func(r law.Rule) bool { return most(&r) >= 1<<32 })
}

// age returns the age in µs below which a state is not in doubt. It is sent instead of since because the script
// compares it with the server's clock. A caller's clock may stand still, so by it every state is in doubt.
func (s *shape) age() int64 {
	if s.clocked {
		return -ever
	}
	return law.Monotonic() - s.since
}

// ever is more than any state can be ahead of a clock, in µs.
const ever = 1 << 53

// appendNumbers appends numbers as doubles, the only numbers of Lua. Integers up to 2^53 are exact.
func appendNumbers(b []byte, numbers ...int64) []byte {
	for _, n := range numbers {
		b = binary.LittleEndian.AppendUint64(b, math.Float64bits(float64(n)))
	}
	return b
}

// most is the largest N that a hold of the rule can have.
func most(r *law.Rule) int64 {
	if r.Kind == law.Continuous {
		return r.Ceiling() * r.One
	}
	return r.Ceiling()
}

// appendLaw appends the stored form of a rule's name and law, the head of a bucket. Capacity is not part of it.
func appendLaw(b []byte, r *law.Rule) []byte {
	b = append(b, byte(len(r.Name)))
	b = append(b, r.Name...)
	b = appendUint(b, uint64(r.Kind)<<45+uint64(r.Period), 6)
	if r.Kind == law.Continuous {
		b = appendUint(appendUint(b, uint64(r.Refill), 7), uint64(r.Tick), 6)
	}
	return b
}

// appendUint appends the low size bytes of n, little-endian.
func appendUint(b []byte, n uint64, size int) []byte {
	for range size {
		b = append(b, byte(n))
		n >>= 8
	}
	return b
}

// appendCharge appends the argument of the change script for a charge. Amounts are sent as 8-byte integers although Lua
// holds integers only up to 2^53: appendAmounts clamps them, and no bucket holds that much.
func appendCharge(b []byte, c *storage.Charge) []byte {
	b = appendChange(b, 0, c.Clocked, c.Now, len(c.Amounts))
	for i := range c.Amounts {
		b = appendAmounts(b, &c.Rules.Rules[i], c.Amounts[i:i+1])
	}
	return b
}

// appendDebt is appendCharge for a debt.
func appendDebt(b []byte, d *replica.Debt) []byte {
	b = appendChange(b, opRaise, d.Clocked, d.Now, len(d.Amounts))
	for i := range d.Amounts {
		b = appendAmounts(b, &d.Rules.Rules[i], d.Amounts[i])
	}
	return b
}

// appendQuestion is appendCharge for the question which debts there are.
func appendQuestion(b []byte, d *replica.Debt) []byte {
	b = appendChange(b, opDebt, d.Clocked, d.Now, len(d.Rules.Rules))
	for i := range d.Rules.Rules {
		b = appendAmounts(b, &d.Rules.Rules[i], nil)
	}
	return b
}

// appendChange appends the beginning of a change: the operation, the number of buckets, and the caller's time if it has
// one.
func appendChange(b []byte, op byte, clocked bool, now int64, buckets int) []byte {
	if !clocked {
		return append(b, op, byte(buckets))
	}
	return appendUint(append(b, op|isClocked, byte(buckets)), uint64(now), 7)
}

// appendAmounts appends a rule and the amounts for its bucket.
func appendAmounts(b []byte, r *law.Rule, amounts []storage.Amount) []byte {
	b = appendUint(appendLaw(b, r), uint64(r.Capacity), 7)
	b = appendUint(b, uint64(max(r.Tick, r.Grain)), 6)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(amounts)))
	for _, a := range amounts {
		a = a.Clamp()
		b = binary.LittleEndian.AppendUint64(b, uint64(a.N))
		b = binary.LittleEndian.AppendUint64(b, uint64(a.In))
	}
	return b
}

// fill decodes the answer to a decision. answerBytes has checked its length.
func (a *answer) fill(to *storage.Answer, r *storage.Request) error {
	if a.text[0] >= refusedValues {
		return a.compute(to, r)
	}
	to.Allowed = a.text[0] == admitted
	to.Tokens = 0
	n, s := 0, a.text[1:]
	for _, p := range r.Parts {
		for j := range p.Rules.Rules {
			to.Counts[n] = storage.Count{
				Remaining: p.Rules.Rules[j].Capacity - integer(s), ResetAfter: integer(s[7:]), NextAfter: integer(s[14:]),
				RetryAfter: integer(s[21:]), HeldFor: integer(s[28:]),
			}
			switch {
			case p.AtMost && r.Mode == storage.Force: // Force takes the whole cost, also what it does not record
				to.Tokens = max(to.Tokens, r.Costs[n])
			case p.AtMost:
				to.Tokens = max(to.Tokens, integer(s[35:]))
			}
			n, s = n+1, s[countBytes:]
		}
	}
	return nil
}

// compute makes the decision again from the stored values that the script found. So the fast way of the script does not
// compute the counts; law.Decide does. Both use the same integers, and a different result is an error.
func (a *answer) compute(to *storage.Answer, r *storage.Request) error {
	real := a.real
	if r.Clocked {
		real = r.Now
	}
	var few [4]law.Draw
	draws, text := few[:0], a.text[1:]
	for _, p := range r.Parts {
		value, rules := text[:plainBytes(text, p.Rules)], p.Rules.Rules
		text = text[len(value):]
		for j := range rules {
			draws = append(draws, law.Draw{Rule: &rules[j], Cost: r.Costs[len(draws)], Within: r.Within, AtMost: p.AtMost, State: plainState(value, rules, j)})
		}
	}
	to.Allowed = law.Decide(r.Mode, real, draws)
	to.Tokens = law.Taken(draws)
	if to.Allowed != (a.text[0] == admittedValues) {
		return errors.New("the script decided otherwise than the value that it found says")
	}
	for i := range draws {
		to.Counts[i] = draws[i].Count
	}
	return nil
}

// plainBytes is the length of a part's value at the beginning of text: one zero byte if there was no value.
func plainBytes(text string, rules *storage.RuleSet) int {
	if text != "" && text[0] == 0 {
		return 1
	}
	return valueBytes(rules.Rules)
}

// plainState returns the state of bucket i from a plain value, or an empty state if there was no value.
func plainState(value string, rules []law.Rule, i int) law.State {
	if len(value) == 1 {
		return law.State{}
	}
	// The times begin with the time of change; then each hold has 11 bytes, or 14 in a wide value.
	times, hold := value[prefixBytes(rules):], (len(value)-prefixBytes(rules)-7)/len(rules)
	h := times[7+hold*i:]
	n := int64(h[7]) | int64(h[8])<<8 | int64(h[9])<<16 | int64(h[10])<<24
	if hold == 14 {
		n = integer(h[7:])
	}
	s := law.State{Law: &rules[i].Law, Seen: integer(times)}
	s.Append(law.Hold{End: integer(h), N: n})
	return s
}

// amounts decodes the answer to a Debt: a list of amounts for each bucket.
func (a *answer) amounts(buckets int) [][]storage.Amount {
	out, s := make([][]storage.Amount, buckets), a.text[1:]
	for i := range out {
		n := amounts(s)
		for s = s[2:]; n > 0; n, s = n-1, s[amountBytes:] {
			out[i] = append(out[i], storage.Amount{N: integer(s), In: integer(s[7:])})
		}
	}
	return out
}

// amountBytes is the length of an amount in an answer: N and In, 7 bytes each.
const amountBytes = 14

// amounts decodes the number of amounts that follow, in 2 bytes.
func amounts(s string) int { return int(s[0]) | int(s[1])<<8 }

// integer decodes the first 7 bytes of s, little-endian.
func integer(s string) int64 {
	return int64(s[0]) | int64(s[1])<<8 | int64(s[2])<<16 | int64(s[3])<<24 | int64(s[4])<<32 | int64(s[5])<<40 | int64(s[6])<<48
}
