package throttlerhttp_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/assert"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// TestMemoryOfARequestMayBeUsedForTheNextOne sends requests as adapters to fasthttp make them: all of their strings are in
// memory that is reused once they were answered.
func TestMemoryOfARequestMayBeUsedForTheNextOne(t *testing.T) {
	t.Parallel()
	id := func(r *http.Request) string { return r.Header.Get("X-User") }
	ofContext := throttlerhttp.User(userOf)
	for name, key := range map[string]throttlerhttp.Key{
		"Key":     id,
		"User":    ofContext,
		"APIKey":  throttlerhttp.APIKey("X-User"),
		"Address": throttlerhttp.Address(nil),
		"First":   throttlerhttp.First(func(*http.Request) string { return "" }, id),
		"Join":    throttlerhttp.Join(id, ofContext),
	} {
		var asked []string
		h := serve(t, throttler.Config{}, throttlerhttp.Options{
			Key:     key,
			Tier:    func(r *http.Request) string { return r.Header.Get("X-Plan") },
			Tiers:   map[string][]throttler.Bucket{"small": buckets(perHour(5).Named("plan")), "large": buckets(perHour(7).Named("plan"))},
			Routes:  []throttlerhttp.Route{{Pattern: "GET /wrong", RefundIf: func(status int) bool { return status >= 400 }}, {Pattern: "GET /add", Adds: true, Buckets: buckets(perHour(2))}},
			Buckets: buckets(perHour(3).Named("plan")),
		}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked = append(asked, r.URL.Path)
			if r.URL.Path == "/wrong" {
				w.WriteHeader(http.StatusBadRequest)
			}
		}))
		memory := make([]byte, 0, 1024)
		request := func(user, plan, path string) (status int) {
			memory = memory[:0]
			lend := func(s string) string {
				memory = append(memory, s...)
				return unsafe.String(unsafe.SliceData(memory[len(memory)-len(s):]), len(s))
			}
			r := httptest.NewRequest(http.MethodGet, "/", nil)
			r.Method, r.URL.Path, r.RemoteAddr = lend("GET"), lend(path), lend("192.0.2."+user+":80")
			r.Header["X-User"], r.Header["X-Plan"] = []string{lend(user)}, []string{lend(plan)}
			r = r.WithContext(context.WithValue(r.Context(), userKey{}, lend(user)))
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			for i := range memory {
				memory[i] = '1'
			}
			return w.Code
		}
		limits := map[string]int{"": 3, "small": 5, "large": 7}
		for round := range 8 {
			for i := range 12 {
				plan := []string{"", "small", "large"}[i%3]
				want := http.StatusOK
				if round >= limits[plan] {
					want = http.StatusTooManyRequests
				} else {
					assert.Equal(t, http.StatusBadRequest, request(fmt.Sprint(i+20), plan, "/wrong"), "%s: which is given back", name)
				}
				assert.Equal(t, want, request(fmt.Sprint(i+20), plan, "/"), "%s: user %d of plan %q in round %d", name, i, plan, round)
			}
		}
		assert.Equal(t, http.StatusOK, request("11", "", "/add"), "%s: a user by the name of what the memory is overwritten with", name)
		assert.Equal(t, http.StatusOK, request("11", "", "/add"), name)
		assert.Equal(t, http.StatusTooManyRequests, request("11", "", "/add"), name)
		assert.Len(t, asked, 4*(3+5+7)*2+2, name)
	}
}
