package runtime_test

import (
	"testing"

	"github.com/go-throttler/throttler/storage"
	memstore "github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/storage/storagetest"
)

func TestTheRuntimeStoragePassesTheSuite(t *testing.T) {
	storagetest.Run(t, func(testing.TB) storage.Storage { return memstore.New(nil) })
}
