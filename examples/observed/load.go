package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/go-throttler/throttler/watch"
)

const (
	users    = 40
	attacker = "mallory"
)

var paths = []string{"/", "/api/items", "/api/search"}

// callFor calls the service over HTTP for the time d: each user about once a second, and the attacker a few hundred times
// a second. The attacker begins after ten seconds, or after a third of d if that is shorter.
func callFor(ctx context.Context, base string, d time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: users + 8}}
	defer client.CloseIdleConnections()
	var callers sync.WaitGroup
	for i := range users {
		callers.Go(func() {
			for pause(ctx, time.Duration(500+rand.IntN(1000))*time.Millisecond) {
				call(ctx, client, base+paths[rand.IntN(len(paths))], fmt.Sprintf("guest-%d", i+1))
			}
		})
	}
	for range 4 {
		callers.Go(func() {
			if !pause(ctx, min(d/3, 10*time.Second)) {
				return
			}
			for pause(ctx, 10*time.Millisecond) {
				call(ctx, client, base+"/api/search", attacker)
			}
		})
	}
	callers.Wait()
}

// pause waits for d and reports whether ctx is still alive.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// call makes one call. It ignores the result, which the page shows.
func call(ctx context.Context, client *http.Client, url, user string) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return
	}
	r.Header.Set("X-User", user)
	answer, err := client.Do(r)
	if err != nil {
		return
	}
	_, _ = io.Copy(io.Discard, answer.Body)
	_ = answer.Body.Close()
}

// report prints in short what the page shows.
func report(out io.Writer, seen watch.Snapshot) {
	_, _ = fmt.Fprintf(out, "At most %d calls came in one second.\n", seen.Rate.Peak)
	if len(seen.MostDenied) > 0 {
		h := seen.MostDenied[0]
		key, route, _ := strings.Cut(h.Identifier, "\x00") // the form of throttlerhttp.RouteIdentifier
		_, _ = fmt.Fprintf(out, "Denied most: %s on %s, %d calls.\n", key, route, h.Denied)
	}
}
