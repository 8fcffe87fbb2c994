// Options of one call: its costs, its buckets, its identifiers.

package throttler

import "slices"

// Option changes one call. It is an immutable value: make it once and use it for any number of calls, also concurrently.
// If several options of a call set the same thing, the last one counts.
type Option struct {
	kind   optionKind
	n      int64
	bucket string
	set    *set
}

type optionKind uint8

const (
	costOption optionKind = iota + 1 // the zero Option does nothing
	costOfOption
	usingOption
	atMostOption
)

// Cost asks every bucket for n tokens, 0 or more, instead of Config.Cost.
func Cost(n int64) Option { return Option{kind: costOption, n: n} }

// AtMost asks every bucket for up to n tokens instead of Config.Cost. The call takes the same number from each bucket: as
// many as all of them have, at most n. Verdict.Tokens says how many. If a bucket has none the call is denied. It is no
// error if n exceeds a capacity, unless that is 0.
//
// A cost set by CostOf becomes an upper bound too. A Reserve takes what the buckets hold now, or else one token that is
// refilled in time. In a ConsumeAll the parts with AtMost take what all of them have, and the other parts take their whole
// cost. Charge and Refund treat AtMost as Cost.
func AtMost(n int64) Option { return Option{kind: atMostOption, n: n} }

// CostOf asks the bucket of this name for n tokens, whatever Cost says about the others. A name that the identifier has no
// bucket of is a *BucketError.
func CostOf(bucket string, n int64) Option { return Option{kind: costOfOption, bucket: bucket, n: n} }

// Using decides the call by these buckets, whatever buckets the identifier has. Give them names (Bucket.Named): an
// identifier that moves to a bucket of the same name, kind and period but with another limit keeps what it has spent.
//
// At most 16 buckets of one identifier may be partly spent at a time, counting all sets used for it; a call that would
// exceed this is a *BucketError. Using compiles the buckets, so make the Option once and keep it in a variable.
func Using(b ...Bucket) Option {
	return Option{kind: usingOption, set: newSet(slices.Clone(b))}
}

// Part is one identifier of a call for several, such as ConsumeAll, with its options. It is made by For.
type Part struct {
	id      string
	options []Option
}

// For returns the Part of an identifier, with the options that apply to it.
func For(id string, o ...Option) Part { return Part{id, o} }
