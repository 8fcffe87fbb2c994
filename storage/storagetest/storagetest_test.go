package storagetest_test

import (
	"testing"

	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/storagetest"
)

func TestTheModelPassesTheSuite(t *testing.T) {
	storagetest.Run(t, func(testing.TB) storage.Storage { return storagetest.NewModel() })
}
