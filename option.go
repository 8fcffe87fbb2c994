// What changes one call: its costs, its buckets, its identifiers.

package throttler

import "slices"

// Option changes one call. Options are values; one may be made once and used for many calls.
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

// Cost asks every bucket for n tokens, 0 or more, in place of Config.Cost.
func Cost(n int64) Option { return Option{kind: costOption, n: n} }

// AtMost asks every bucket for n tokens in place of Config.Cost, and is content with less: as many are taken as every bucket
// has, which Verdict.Tokens tells. None is a denial. N may be above a capacity. A cost that CostOf names is also one at most.
// A Reserve takes what is there, or else one token that comes back in time. In a ConsumeAll the parts with AtMost take what
// all of them have, and the others their whole cost. Charge and Refund take it as Cost.
func AtMost(n int64) Option { return Option{kind: atMostOption, n: n} }

// CostOf asks the bucket of this name for n tokens, whatever Cost says of the others.
func CostOf(bucket string, n int64) Option { return Option{kind: costOfOption, bucket: bucket, n: n} }

// Using decides the call by these buckets, whichever the identifier has. Give them names
// (Bucket.Named): an identifier that moves to a bucket of the same name and another limit keeps
// what it has spent. Of all buckets that its calls name at most 16 may be less than full at a time.
// Making the Option compiles the buckets; keep it in a variable.
func Using(b ...Bucket) Option {
	return Option{kind: usingOption, set: newSet(slices.Clone(b))}
}

// Part is one identifier of a ConsumeAll.
type Part struct {
	id      string
	options []Option
}

// For names an identifier of a ConsumeAll, with the options of its own.
func For(id string, o ...Option) Part { return Part{id, o} }
