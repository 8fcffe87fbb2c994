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
	"strings"

	goredis "github.com/redis/go-redis/v9"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/storage"
)

// The scripts. Their first lines say what they are sent and what they answer; this file is the other
// end of both. What they share is in state.lua, which each includes by a line.
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

type script struct{ text, sha string }

// comment is a line of a script that the servers need not read.
var comment = regexp.MustCompile(`(?m)^ *--.*\n`)

// named is a line that names places in a list.
var named = regexp.MustCompile(`(?m)^--#slots (.*)\n`)

func newScript(text string) *script {
	text = strings.Replace(text, "--#include state.lua\n", stateLua, 1)
	for _, names := range named.FindAllStringSubmatch(text, -1) {
		for i, name := range strings.Fields(names[1]) {
			text = strings.ReplaceAll(text, "[$"+name+"]", fmt.Sprintf("[%d]", i+1))
		}
	}
	text = comment.ReplaceAllString(text, "")
	sum := sha1.Sum([]byte(text)) // the name that Redis gives to a script
	return &script{text, hex.EncodeToString(sum[:])}
}

// variants is how many variants of the script for decisions a server may come to know.
const variants = 256

// variant is the script for decisions with another hash, so that the server knows it apart.
func variant(n int) *script { return newScript(fmt.Sprintf("local variant = %d\n", n) + decideLua) }

// command is a script call. Its NoRetry keeps every client from sending it again, but for MOVED and ASK
// where nothing ran: it may have been executed although no answer came.
type command struct{ *goredis.Cmd }

// NoRetry tells go-redis to send the command once.
func (command) NoRetry() bool { return true }

// call is the command that runs the script by its hash, or by its text.
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

// The first byte of an answer.
const (
	refused = iota
	admitted
	foreign
	wrongType
	tooMany
	tooManyHolds
	stale
	refusedValues  // and admittedValues: the values that were there follow, by which the client
	admittedValues // computes what the script did
)

// The first byte of a change.
const (
	opRaise   = 1
	opReset   = 2
	opDebt    = 3
	isClocked = 4
)

// countBytes is the length of a bucket's answer.
const countBytes = 42

// decideArgs are the arguments of the script for decisions.
func decideArgs(s *shapes) [][]byte {
	var index []byte
	if len(s.all) > 1 {
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

// arg is a shape as the script for decisions reads it.
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
		b = append(b, byte(r.Kind))
		b = appendNumbers(b, r.Period, r.Drain, r.Tick, r.Grain, r.One, r.Capacity, min(s.costs[i], r.Ceiling()))
	}
	return b
}

// A plain value has one hold for each bucket of a part, all changed at one time, and nothing else. Its prefix is what is
// before the times.
func appendPrefix(b []byte, rules []law.Rule) []byte {
	head := byte(len(rules))
	if wide(rules) {
		head |= 32
	}
	b = append(b, 't', '2', head)
	for i := range rules {
		b = append(appendLaw(b, &rules[i]), 1)
	}
	return b
}

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
	n := prefixBytes(rules) + 7 + 11*len(rules)
	if wide(rules) {
		n += 3 * len(rules)
	}
	return n
}

// wide says that the counts of a plain value have 7 bytes, and not 4.
func wide(rules []law.Rule) bool {
	return slices.ContainsFunc(rules, func(r law.Rule) bool { return most(&r) >= 1<<32 })
}

// age is how long ago a state has to have been changed that is not doubted. An injected clock may stand still, so by it no
// state is young.
func (s *shape) age() int64 {
	if s.clocked {
		return -ever
	}
	return law.Monotonic() - s.since
}

// ever is longer than any state is ahead of a clock.
const ever = 1 << 53

// appendNumbers appends what Lua computes with.
func appendNumbers(b []byte, numbers ...int64) []byte {
	for _, n := range numbers {
		b = binary.LittleEndian.AppendUint64(b, math.Float64bits(float64(n)))
	}
	return b
}

// most is the largest N of a hold.
func most(r *law.Rule) int64 {
	if r.Kind == law.Continuous {
		return r.Ceiling() * r.One
	}
	return r.Ceiling()
}

// appendLaw appends the name and law of a rule in the form in which they are stored.
func appendLaw(b []byte, r *law.Rule) []byte {
	b = append(b, byte(len(r.Name)))
	b = append(b, r.Name...)
	b = appendUint(b, uint64(r.Kind)<<45+uint64(r.Period), 6)
	if r.Kind == law.Continuous {
		b = appendUint(appendUint(b, uint64(r.Refill), 7), uint64(r.Tick), 6)
	}
	return b
}

func appendUint(b []byte, n uint64, size int) []byte {
	for range size {
		b = append(b, byte(n))
		n >>= 8
	}
	return b
}

// appendCharge appends what the script for changes is sent for a charge. A Lua number holds 2^53, which is
// more than any bucket does.
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

// appendQuestion appends what the script for changes is sent to tell a debt.
func appendQuestion(b []byte, d *replica.Debt) []byte {
	b = appendChange(b, opDebt, d.Clocked, d.Now, len(d.Rules.Rules))
	for i := range d.Rules.Rules {
		b = appendAmounts(b, &d.Rules.Rules[i], nil)
	}
	return b
}

func appendChange(b []byte, op byte, clocked bool, now int64, buckets int) []byte {
	if !clocked {
		return append(b, op, byte(buckets))
	}
	return appendUint(append(b, op|isClocked, byte(buckets)), uint64(now), 7)
}

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

// fill reads the answer to a decision.
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
			case p.AtMost && r.Mode == storage.Force:
				to.Tokens = max(to.Tokens, r.Costs[n])
			case p.AtMost:
				to.Tokens = max(to.Tokens, integer(s[35:]))
			}
			n, s = n+1, s[countBytes:]
		}
	}
	return nil
}

// compute makes the script's decision once more, from the values that the script found. The script therefore need not
// know what an answer tells, and law.Decide stays the one place that does. Both compute with the same integers.
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

// plainBytes is the length of a part's value in an answer: a byte if there was none.
func plainBytes(text string, rules *storage.RuleSet) int {
	if text != "" && text[0] == 0 {
		return 1
	}
	return valueBytes(rules.Rules)
}

// plainState is the state of bucket i in a plain value.
func plainState(value string, rules []law.Rule, i int) law.State {
	if len(value) == 1 {
		return law.State{}
	}
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

// amounts reads the answer to a debt.
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

// amountBytes is the length of an amount in an answer, and amounts reads how many follow.
const amountBytes = 14

func amounts(s string) int { return int(s[0]) | int(s[1])<<8 }

// integer reads seven bytes.
func integer(s string) int64 {
	return int64(s[0]) | int64(s[1])<<8 | int64(s[2])<<16 | int64(s[3])<<24 | int64(s[4])<<32 | int64(s[5])<<40 | int64(s[6])<<48
}
