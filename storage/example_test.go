package storage_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/storagetest"
)

// memory is a storage of one's own. It never forgets an identifier.
type memory struct {
	mu    sync.Mutex
	spent map[key]*storage.Spent
}

type key struct{ name, identifier string }

// of is what an identifier has spent, under a copy of it: the caller may use its memory again.
func (m *memory) of(name, identifier string) *storage.Spent {
	k := key{name, strings.Clone(identifier)}
	if m.spent[k] == nil {
		m.spent[k] = &storage.Spent{}
	}
	return m.spent[k]
}

func (m *memory) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	spent := make([]*storage.Spent, len(r.Parts))
	for i, p := range r.Parts {
		spent[i] = m.of(r.Name, p.Identifier)
	}
	a.Source = "memory"
	return storage.Decide(r, a, 0, spent...)
}

func (m *memory) Charge(ctx context.Context, c *storage.Charge) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.of(c.Name, c.Identifier).Charge(c, 0)
}

func (m *memory) Reset(ctx context.Context, name, identifier string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.spent, key{name, identifier})
	return nil
}

func TestAStorageOfOnesOwnPassesTheSuite(t *testing.T) {
	storagetest.Run(t, func(testing.TB) storage.Storage { return &memory{spent: map[key]*storage.Spent{}} })
}

func Example() {
	t, err := throttler.New(throttler.Config{
		Storage: &memory{spent: map[key]*storage.Spent{}},
		Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1)},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	for range 2 {
		v, err := t.Consume("user:42")
		fmt.Println(v.Allowed, v.Source(), err)
	}
	// Output:
	// true memory <nil>
	// false memory <nil>
}
