package lease_test

import (
	"context"
	"fmt"
	"time"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage/lease"
	"github.com/go-throttler/throttler/storage/runtime"
)

func Example() {
	shared := runtime.New(nil) // in a service: a Redis or a Postgres
	store, err := lease.New(shared, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = store.Close(context.Background()) }() // gives back what is left; then close the shared one
	t, err := throttler.New(throttler.Config{
		Storage: store,
		Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 1_000_000)},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	for range 100_000 {
		if _, err := t.Consume("everybody"); err != nil {
			fmt.Println(err)
			return
		}
	}
	fmt.Println("few are asked of the shared storage:", store.State().Calls < 1000)
	// Output:
	// few are asked of the shared storage: true
}
