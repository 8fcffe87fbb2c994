// Package replica is what package failover needs of a storage beyond deciding: to tell what it has recorded, and to be
// raised to what another store has recorded. docs/failover.md has the protocol and its words.
package replica

import (
	"context"

	"github.com/go-throttler/throttler/storage"
)

// Storage is a storage that can tell its debts and be raised to those of another. All methods are safe for concurrent
// use, and their errors are those of storage.Storage.
type Storage interface {
	storage.Storage

	// Debt returns d with its Amounts filled in: for each rule, what its bucket has spent that is not back, as
	// law.State.Debt has it. The Amounts that d has are ignored. It changes nothing.
	Debt(ctx context.Context, d Debt) (Debt, error)

	// Raise increases what each bucket has spent to at least its debt, as law.State.Raise does. Raising twice is
	// raising once, and nothing is lowered.
	Raise(ctx context.Context, d Debt) error
}

// Debt is what a store has recorded for the buckets of one identifier as spent and not yet back. A bucket without
// amounts owes nothing, and Raise leaves it alone. Name, Clocked and Now are as in storage.Request.
type Debt struct {
	Name       string
	Clocked    bool
	Now        int64
	Identifier string
	Rules      *storage.RuleSet
	Amounts    [][]storage.Amount // one list for each rule
}
