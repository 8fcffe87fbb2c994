package lease_test

import (
	"context"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/lease"
	"github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/storage/storagetest"
)

// over returns a storage in front of a shared one, and closes it at the end.
func over(t testing.TB, shared storage.Storage, o *lease.Options) *lease.Storage {
	t.Helper()
	s, err := lease.New(shared, o)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close(context.Background())) })
	return s
}

func TestTheStoragePassesTheSuite(t *testing.T) {
	t.Parallel()
	storagetest.Run(t, func(t testing.TB) storage.Storage { return over(t, runtime.New(nil), nil) })
}
