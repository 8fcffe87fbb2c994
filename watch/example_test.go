package watch_test

import (
	"expvar"
	"fmt"
	"net/http"
	"time"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/watch"
)

func Example() {
	w := watch.New(nil)
	t, err := throttler.New(throttler.Config{
		Observe: w.Observe,
		Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 3)},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	staffOnly := func(next http.Handler) http.Handler { return next } // your own login
	http.Handle("/debug/throttler/", staffOnly(w))
	expvar.Publish("throttler", expvar.Func(func() any { return w.Snapshot() }))

	for range 5 {
		if _, err := t.Consume("user:42"); err != nil {
			fmt.Println(err)
		}
	}
	for _, h := range w.Snapshot().MostDenied {
		fmt.Printf("%s asked for %d tokens, and was denied %d times\n", h.Identifier, h.Asked, h.Denied)
	}
	// Output: user:42 asked for 5 tokens, and was denied 2 times
}
