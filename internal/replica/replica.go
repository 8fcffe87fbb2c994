// Package replica is what package failover asks of a storage beyond deciding: to tell what it has
// recorded, and to be brought up to what another has. docs/failover.md has the protocol.
package replica

import (
	"context"

	"github.com/go-throttler/throttler/storage"
)

// Storage is a storage that can be brought up to what another has recorded.
type Storage interface {
	storage.Storage

	// Debt returns d with its Amounts: for each rule, what its bucket has spent that has not come back,
	// as law.State.Debt has it. It changes nothing.
	Debt(ctx context.Context, d Debt) (Debt, error)

	// Raise lifts what each bucket has spent to at least its debt, as law.State.Raise does. Raising twice is
	// raising once.
	Raise(ctx context.Context, d Debt) error
}

// Debt is, for each bucket of one identifier, what another store has recorded as spent and not yet
// returned; none leaves its bucket alone. Name, Clocked and Now are those of storage.Request.
type Debt struct {
	Name       string
	Clocked    bool
	Now        int64
	Identifier string
	Rules      *storage.RuleSet
	Amounts    [][]storage.Amount // one list for each rule
}
