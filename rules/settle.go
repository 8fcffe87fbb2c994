// Settling: what a decision took becomes the real cost, once that is known.

package rules

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/go-throttler/throttler"
)

// Settle corrects what a decision of one descriptor took. It is for costs that are estimated before and known
// afterwards. v and applied are what Decide returned for a Consume. Settle each decision only once: it is not remembered.
//
// The descriptor says the real costs, as the request would have said them. Cost is that of the request, of which each
// rule asks its factor; nil leaves it as it was. An entry is the cost of the rules that take theirs from it, and of no
// others. A rule whose cost came from an entry that real does not have keeps what it took.
//
// If the real cost is less, the difference is given back, as by Throttler.Refund: nothing that has been refilled already.
// If it is more, the difference is charged, as by Throttler.Charge: it may leave a debt, and is never refused. Shadow,
// Quota and Charge rules keep what they counted. Where two rules give limits one name ("named x") and are due different
// amounts, each of them gets the smaller one back.
//
// ErrInvalidCost is returned, and nothing changed, for a cost below 0, for an entry that is no whole number or is the
// cost of no rule, for a Cost that no rule asks for, and after a decision of several descriptors.
func (e *Engine) Settle(ctx context.Context, v throttler.Verdict, applied []Applied, real Descriptor) error {
	if !v.Taken() {
		return nil
	}
	all, err := differences(applied, &real)
	if err != nil {
		return err
	}
	if back := giveBack(all); back != nil {
		err = e.t.Refund(ctx, v, back...)
	}
	var more []throttler.Part
	for _, d := range all {
		if d.more > 0 {
			more = append(more, throttler.For(d.Levels[0].Identifier, d.Rule.using, throttler.Cost(d.more)))
		}
	}
	if more != nil {
		err = errors.Join(err, e.t.ChargeAll(ctx, more...))
	}
	return err
}

// difference is how much more a rule should have taken; less if it is negative.
type difference struct {
	*Applied

	more int64
}

// differences returns those of the rules that took tokens.
func differences(applied []Applied, real *Descriptor) (all []difference, err error) {
	asked, used := real.Cost == nil, make([]bool, len(real.Entries))
	for i := range applied {
		a := &applied[i]
		if r := a.Rule; r.Unlimited || r.Shadow || r.Quota || r.Charge || a.back || len(a.Levels) == 0 {
			continue
		}
		if len(all) > 0 && all[0].Descriptor != a.Descriptor {
			return nil, fmt.Errorf("%w: a decision of several descriptors cannot be settled", throttler.ErrInvalidCost)
		}
		cost, entry, err := a.real(real)
		if err != nil {
			return nil, err
		}
		if entry >= 0 {
			used[entry] = true
		}
		asked = asked || entry < 0 && !a.fromEntry
		all = append(all, difference{a, cost - a.Cost})
	}
	if i := slices.Index(used, false); i >= 0 {
		return nil, fmt.Errorf("%w: the entry %.64q is the cost of no rule that applied, or is said twice", throttler.ErrInvalidCost, real.Entries[i].Key)
	}
	if !asked {
		return nil, fmt.Errorf("%w: each rule that applied takes its cost from an entry: say that entry", throttler.ErrInvalidCost)
	}
	return all, nil
}

// real returns the real cost of the rule, and the index of the entry that it comes from, or -1.
func (a *Applied) real(d *Descriptor) (cost int64, entry int, err error) {
	entry = a.Rule.cost.entry(d.Entries)
	switch cost = a.Cost; {
	case entry >= 0:
		cost, err = a.Rule.cost.of(a.Rule, 0, d.Entries[entry:])
	case d.Cost != nil && !a.fromEntry:
		cost, err = a.Rule.cost.of(a.Rule, *d.Cost, nil)
	}
	return cost, entry, err
}

// giveBack returns the options of a Refund; nil if nothing is to be given back. A Refund knows buckets by their name alone.
func giveBack(all []difference) (options []throttler.Option) {
	least := map[string]int64{}
	for _, d := range all {
		for i := range d.Levels {
			name, n := d.Levels[i].Bucket, max(0, -d.more)
			if had, known := least[name]; known {
				n = min(n, had)
			}
			least[name] = n
		}
	}
	for name, n := range least {
		if n > 0 {
			options = append(options, throttler.CostOf(name, n))
		}
	}
	return options
}
