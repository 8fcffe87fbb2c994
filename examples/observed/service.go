package main

import (
	"encoding/json"
	"expvar"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/go-throttler/throttler"
	memstore "github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/throttlerhttp"
	"github.com/go-throttler/throttler/throttlerprom"
	"github.com/go-throttler/throttler/watch"
)

// user returns whom a request counts for. It stands in for a login: a real service does not trust such a header.
func user(r *http.Request) string {
	if name := r.Header.Get("X-User"); name != "" {
		return "user:" + name
	}
	return ""
}

// newHandler returns the service, its limits, and the pages that show them.
func newHandler(w *watch.Watch) (http.Handler, error) {
	m, err := throttlerprom.New(prometheus.DefaultRegisterer, nil)
	if err != nil {
		return nil, err
	}
	store := memstore.New(nil)
	m.Storage("main", store)
	t, err := throttler.New(throttler.Config{Name: "observed", Storage: store, Observe: throttler.Observers(w.Observe, m.Observe)})
	if err != nil {
		return nil, err
	}
	limit, err := throttlerhttp.New(t, &throttlerhttp.Options{
		Key:     throttlerhttp.First(user, throttlerhttp.Address(nil)),
		Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 100).Named("app")},
		Routes: []throttlerhttp.Route{
			{Pattern: "GET /{$}", Name: "/", Buckets: []throttler.Bucket{throttler.NewBucket(10*time.Second, 5)}},
			{Pattern: "GET /api/search", Adds: true, Name: "/api/search", Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 20).Continuous()}},
		},
	})
	if err != nil {
		return nil, err
	}
	limited := http.NewServeMux()
	limited.Handle("GET /{$}", say("Hello User, you have access!"))
	limited.Handle("GET /api/items", say("Items."))
	limited.Handle("GET /api/search", say("Found."))
	mux := http.NewServeMux()
	mux.Handle("/", limit(limited))
	mux.Handle("/debug/throttler/", w) // a real service puts a login before it
	mux.Handle("GET /debug/vars", expvar.Handler())
	mux.Handle("GET /metrics", promhttp.Handler())
	return mux, nil
}

func say(text string) http.Handler {
	out, _ := json.Marshal(map[string]string{"message": text}) // cannot fail
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(out) // fails only if the client has gone
	})
}
