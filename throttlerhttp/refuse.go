// Answering a request that does not reach the handler.

package throttlerhttp

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"reflect"
	"slices"
	"strconv"

	"github.com/go-throttler/throttler"
)

// Refusal is the reason why a request did not reach the handler: it was denied, or could not be decided.
type Refusal struct {
	// Status is 429 for a denied request; 413 if its cost exceeds a capacity, so that waiting does not help; 400 if the
	// cost is below zero; 403 if the key has no buckets, or a bucket of capacity 0; 503 if the storage could not decide;
	// 500 otherwise.
	Status int

	// Err is a *throttler.LimitedError with the Verdict if the Status is 429, otherwise what the Throttler returned, or
	// ErrNoKey. It names the identifier and parts of the program: do not show it to clients.
	Err error

	// Verdict is the denial if the Status is 429. For 413, and for 403 by a capacity of 0, it has the present Levels.
	Verdict throttler.Verdict

	// RetryAfter is the value of Retry-After in seconds if the Status is 429, otherwise 0.
	RetryAfter int64
}

// Limits returns the names of the buckets that denied.
func (r *Refusal) Limits() []string {
	var names []string
	for _, l := range r.Verdict.Levels() {
		if l.RetryAfter > 0 {
			names = append(names, l.Bucket)
		}
	}
	return names
}

// Refuse is for handlers that ask a Throttler themselves. It answers a denied request as the middleware does: 429 with
// Retry-After, the fields and a body. Inside a middleware of New it uses Options.Fields, and Refuse of the Options or the
// Route, provided that every ResponseWriter in between has a method Unwrap, as for http.ResponseController. Elsewhere it
// uses Draft10 and Problem.
func Refuse(w http.ResponseWriter, r *http.Request, v throttler.Verdict) {
	v.Allowed = false
	l := alone
	if outer := recorded(w); outer != nil { // its policies are cached for verdicts of its own
		l = &limit{m: outer.l.m, refuse: outer.l.refuse}
	}
	l.answer(w, r, v, nil)
}

// SetFields is for those who ask a Throttler themselves, also in other protocols than HTTP. It adds the fields of Draft10
// to h, and Retry-After if v is a denial. Fields of other limiters in h are kept, as the middleware keeps them. A verdict
// without levels adds nothing.
func SetFields(h http.Header, v throttler.Verdict) {
	if levels := v.Levels(); len(levels) > 0 {
		own := new(said)
		own.tell(alone, &v, levels)
		own.put(h, &said{}, true, 0)
	}
	if v.RetryAfter > 0 {
		h.Set("Retry-After", strconv.FormatInt(RetryAfterSeconds(v), 10))
	}
}

// alone is the limit of verdicts that no middleware has asked for.
var alone = &limit{m: &middleware{}, refuse: Problem}

// RetryAfterSeconds returns the Retry-After of a denial: its RetryAfter in seconds, rounded up, and at least 1. For a
// Verdict that is Allowed it returns 0.
func RetryAfterSeconds(v throttler.Verdict) int64 {
	if v.Allowed {
		return 0
	}
	return max(1, seconds(v.RetryAfter))
}

// answer sets the fields of a request that is not served, and lets refuse write the rest. A nil err means a denial.
func (l *limit) answer(w http.ResponseWriter, r *http.Request, v throttler.Verdict, err error) {
	h := w.Header()
	forget(w)
	if levels := v.Levels(); len(levels) > 0 {
		new(said).say(l, w, &v, levels)
	}
	refusal := Refusal{Status: status(err), Err: err, Verdict: v}
	if refusal.Status == http.StatusRequestEntityTooLarge && admitsNothing(&v) {
		refusal.Status = http.StatusForbidden
	}
	if err == nil {
		refusal.Err = &throttler.LimitedError{Verdict: v}
		refusal.RetryAfter = RetryAfterSeconds(v)
		h.Set("Retry-After", strconv.FormatInt(refusal.RetryAfter, 10))
	}
	l.refuse(w, r, refusal)
}

// admitsNothing reports whether a bucket has a capacity of 0, so that not even a smaller request would be admitted.
func admitsNothing(v *throttler.Verdict) bool {
	return slices.ContainsFunc(v.Levels(), func(l throttler.Level) bool { return l.Limit == 0 })
}

// ofBody are the fields that describe a body or say how long it may be cached.
var ofBody = [...]string{
	"Content-Length", "Content-Range", "Content-Disposition", "Content-Language", "Content-Location", "Content-Type", "Content-Md5",
	"Etag", "Last-Modified", "Accept-Ranges", "Digest", "Content-Digest", "Repr-Digest", "Transfer-Encoding", "Trailer",
	"Age", "Expires", "Pragma", "Cdn-Cache-Control", "Surrogate-Control",
}

// forget removes the fields of a body that is not sent, and forbids caches to keep the answer.
func forget(w http.ResponseWriter) {
	h := w.Header()
	for _, name := range ofBody {
		delete(h, name)
	}
	h.Set("Cache-Control", "no-store")
	if h["Content-Encoding"] != nil && !mayEncode(w) {
		delete(h, "Content-Encoding")
	}
}

// mayEncode reports whether something has wrapped the ResponseWriter around the limiters. It may compress whatever is
// written, so that Content-Encoding is true for every body.
func mayEncode(w http.ResponseWriter) bool {
	for rec := recorded(w); rec != nil; rec = recorded(w) {
		if w != rec.as() {
			return true
		}
		w = rec.ResponseWriter
	}
	t := reflect.TypeOf(w)
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return false
	}
	for i := range t.NumField() {
		if t.Field(i).Type == reflect.TypeFor[http.ResponseWriter]() {
			return true
		}
	}
	return false
}

// status maps the error of a decision to the status of the answer. Nil means a denial.
func status(err error) int {
	switch {
	case err == nil:
		return http.StatusTooManyRequests
	case errors.Is(err, throttler.ErrCostExceedsCapacity):
		return http.StatusRequestEntityTooLarge
	case errors.Is(err, throttler.ErrInvalidCost):
		return http.StatusBadRequest
	case errors.Is(err, throttler.ErrUnknownIdentifier):
		return http.StatusForbidden
	case errors.Is(err, throttler.ErrUnavailable), errors.Is(err, throttler.ErrClosed), errors.Is(err, throttler.ErrCorruptState),
		errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// Problem answers with application/problem+json (RFC 9457). For a 429 the problem has the type quota-exceeded of
// draft-ietf-httpapi-ratelimit-headers-10 and names the buckets that denied.
func Problem(w http.ResponseWriter, _ *http.Request, r Refusal) {
	problem := struct {
		Type       string   `json:"type"`
		Title      string   `json:"title"`
		Status     int      `json:"status"`
		Violated   []string `json:"violated-policies,omitempty"`
		RetryAfter int64    `json:"retry-after,omitempty"`
	}{"about:blank", http.StatusText(r.Status), r.Status, r.Limits(), r.RetryAfter}
	if r.Status == http.StatusTooManyRequests {
		problem.Type = "https://iana.org/assignments/http-problem-types#quota-exceeded"
		problem.Title = "The request exceeds the quota that you have been assigned."
	}
	write(w, r.Status, "application/problem+json", problem)
}

// JSON answers with {"error":"Too Many Requests","limits":["5/10s"],"retry_after":8}. The last two are left out unless the
// request was denied.
func JSON(w http.ResponseWriter, _ *http.Request, r Refusal) {
	write(w, r.Status, "application/json", struct {
		Error      string   `json:"error"`
		Limits     []string `json:"limits,omitempty"`
		RetryAfter int64    `json:"retry_after,omitempty"`
	}{http.StatusText(r.Status), r.Limits(), r.RetryAfter})
}

func write(w http.ResponseWriter, status int, kind string, body any) {
	text, _ := json.Marshal(body) // cannot fail
	w.Header().Set("Content-Type", kind)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(text) // fails if the client has left, and then nobody can be told
}
