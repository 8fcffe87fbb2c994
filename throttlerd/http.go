// What all HTTP listeners share, and POST /v1/decide for programs in any language.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/rules"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// problem answers with application/problem+json (RFC 9457). The detail is for people and never quotes a storage's error.
func problem(w http.ResponseWriter, status int, detail string) {
	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	writeJSON(w, map[string]any{"title": http.StatusText(status), "status": status, "detail": detail})
}

func writeJSON(w io.Writer, v any) {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	_ = e.Encode(v) // fails only if the client has gone
}

// title returns what callers may read about an error: what they did wrong, but nothing about the internals.
func title(err error) string {
	switch status := statusOf(err, 0); {
	case status == 0:
		return "over the limit"
	case status == http.StatusServiceUnavailable:
		return "the storage could not decide"
	case status >= http.StatusInternalServerError:
		return errInternal.Error()
	}
	return err.Error()
}

// readJSON reads a body of at most maxBody bytes; unknown words are errors, and so is a word that stands twice. If it
// returns false it has answered the request.
func readJSON(w http.ResponseWriter, r *http.Request, to any) bool {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err == nil {
		d := json.NewDecoder(bytes.NewReader(body))
		d.DisallowUnknownFields()
		if err = d.Decode(to); err == nil {
			if _, more := d.Token(); !errors.Is(more, io.EOF) {
				err = errors.New("more follows the value")
			}
		}
	}
	if err == nil {
		err = repeated(body)
	}
	tooLarge := (*http.MaxBytesError)(nil)
	switch {
	case errors.As(err, &tooLarge):
		problem(w, http.StatusRequestEntityTooLarge, "the body is too large")
	case err != nil:
		problem(w, http.StatusBadRequest, "the body is wrong: "+worded(err))
	}
	return err == nil
}

// repeated returns an error if an object of a JSON text has a key twice. Package json takes the last one, and merges lists
// of objects: a descriptor would have the cost of another. It does not mind the case of keys, but entries have any keys.
func repeated(text []byte) error {
	type object struct {
		keys  map[string]bool // nil in a list
		last  string          // the last key
		value bool            // its value follows
		any   bool            // the keys are those of entries
	}
	open := []object{{}}
	d := json.NewDecoder(bytes.NewReader(text))
	for {
		token, err := d.Token()
		if err != nil {
			return nil //nolint:nilerr // the end; the text was decoded before
		}
		in := &open[len(open)-1]
		switch token {
		case json.Delim('{'):
			open = append(open, object{keys: map[string]bool{}, any: in.last == "entries"})
			continue
		case json.Delim('['):
			open = append(open, object{})
			continue
		case json.Delim('}'), json.Delim(']'):
			open = open[:len(open)-1]
			in = &open[len(open)-1]
		default:
			if key, isText := token.(string); isText && in.keys != nil && !in.value {
				if !in.any {
					key = strings.ToLower(key)
				}
				if in.keys[key] {
					return fmt.Errorf("%.64q stands there twice", key)
				}
				in.keys[key], in.last, in.value = true, key, true
				continue
			}
		}
		in.value = false
	}
}

// worded returns the error of a decoder without the names of Go types, which say nothing to callers.
func worded(err error) string {
	var wrong *json.UnmarshalTypeError
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return "it ends before the value does"
	case errors.Is(err, io.EOF):
		return "it is empty"
	case errors.As(err, &wrong):
		word := wrong.Field[strings.LastIndexByte(wrong.Field, '.')+1:] // behind the names of embedded structs
		kind, number, _ := strings.Cut(wrong.Value, " ")
		given := map[string]string{"array": "a list", "object": "an object", "bool": "true or false", "string": "text", "number": "a number"}[kind]
		must := map[reflect.Kind]string{reflect.Int64: "a whole number", reflect.String: "text", reflect.Slice: "a list"}[wrong.Type.Kind()]
		return fmt.Sprintf("%s is %.64s, must be %s", cmp.Or(word, "it"), cmp.Or(number, given), cmp.Or(must, "an object"))
	}
	return strings.TrimPrefix(err.Error(), "json: ")
}

// asking is the body of POST /v1/decide: one descriptor, or several.
type asking struct {
	Domain string `json:"domain"`
	Mode   string `json:"mode"` // consume, which is the default, peek, charge, refund or settle
	descriptor
	Descriptors []descriptor `json:"descriptors"`
	Receipt     wanted       `json:"receipt"` // true asks for one; a refund and a settle pass the text that was got
}

// wanted is true, or a text.
type wanted struct {
	wants bool
	id    string
}

func (w *wanted) UnmarshalJSON(data []byte) error {
	if json.Unmarshal(data, &w.wants) == nil || json.Unmarshal(data, &w.id) == nil {
		return nil
	}
	return errors.New("receipt must be true, or in a refund and a settle the text that was got")
}

// descriptor is one description of a request.
type descriptor struct {
	Entries entries `json:"entries"`
	Cost    *int64  `json:"cost"`
	Limit   string  `json:"limit"` // in the syntax of ParseBucket; replaces the rules
}

// entries are an object, or a list of pairs such as [["path", "/x"], ["user", "42"]]. Their order is kept in both.
type entries []rules.Entry

func (e *entries) UnmarshalJSON(data []byte) error {
	*e = nil
	if string(data) == "null" {
		return nil // as if it were not there
	}
	var pairs [][]*string // not [2]string, which package json also makes of less, of more and of null
	if json.Unmarshal(data, &pairs) != nil {
		return e.object(data)
	}
	*e = entries{}
	for _, p := range pairs {
		if len(p) != 2 || p[0] == nil || p[1] == nil {
			return errEntries
		}
		*e = append(*e, rules.Entry{Key: *p[0], Value: *p[1]})
	}
	return nil
}

var errEntries = errors.New("entries must be an object of texts, or a list of pairs of texts")

// object reads a JSON object. It keeps the order of the keys, which a Go map would lose and which counts in rules of
// envoyproxy/ratelimit. The first pass checks that all values are texts or null, the second one that none is null.
func (e *entries) object(data []byte) error {
	var all map[string]string
	if err := json.Unmarshal(data, &all); err != nil {
		return errEntries
	}
	*e = entries{}
	d := json.NewDecoder(bytes.NewReader(data))
	_, _ = d.Token()
	for d.More() {
		key, _ := d.Token()
		value, _ := d.Token()
		k, _ := key.(string)
		v, isText := value.(string)
		if !isText {
			return errEntries
		}
		*e = append(*e, rules.Entry{Key: k, Value: v})
	}
	return nil
}

var modes = map[string]rules.Mode{"": rules.Consume, "consume": rules.Consume, "peek": rules.Peek, "charge": rules.Charge}

func (a *asking) request() (rules.Request, error) {
	mode, known := modes[a.Mode]
	if !known {
		return rules.Request{}, malformed("mode is %.64q, must be consume, peek, charge, refund or settle", a.Mode)
	}
	if a.Receipt.id != "" || a.Receipt.wants && mode != rules.Consume {
		return rules.Request{}, malformed("receipt must be true, and the mode consume; or the mode is refund or settle")
	}
	all := a.Descriptors
	switch {
	case a.Entries != nil:
		all = append([]descriptor{a.descriptor}, all...)
	case len(all) == 0:
		return rules.Request{}, malformed("it has no entries")
	case a.Cost != nil || a.Limit != "":
		return rules.Request{}, malformed("cost and limit are beside descriptors, and belong to no entries: each descriptor has its own")
	}
	if i := slices.IndexFunc(a.Descriptors, func(d descriptor) bool { return d.Entries == nil }); i >= 0 {
		return rules.Request{}, malformed("descriptors[%d] has no entries", i)
	}
	r := rules.Request{Domain: a.Domain, Mode: mode}
	for _, d := range all {
		to := rules.Descriptor{Entries: d.Entries, Cost: d.Cost}
		if d.Limit != "" {
			b, err := throttler.ParseBucket(d.Limit)
			if err != nil {
				return rules.Request{}, malformed("limit: %v", err)
			}
			to.Limit = &b
		}
		r.Descriptors = append(r.Descriptors, to)
	}
	return r, nil
}

// answered is the body of an answer with status 200 and of a denial.
type answered struct {
	Allowed    bool          `json:"allowed"`
	Degraded   bool          `json:"degraded,omitempty"`    // by -on-storage-error allow, or by a fallback
	RetryAfter float64       `json:"retry_after,omitempty"` // seconds
	Receipt    string        `json:"receipt,omitempty"`
	Rules      []appliedJSON `json:"rules"`
}

type appliedJSON struct {
	Rule       string      `json:"rule"`
	Descriptor int         `json:"descriptor"`
	Cost       int64       `json:"cost"`
	Denied     bool        `json:"denied"`
	Shadow     bool        `json:"shadow,omitempty"` // it never denies; also set for quota_mode
	Unlimited  bool        `json:"unlimited,omitempty"`
	Limits     []levelJSON `json:"limits,omitempty"`
}

type levelJSON struct {
	Name       string  `json:"name"`
	Limit      int64   `json:"limit"`
	Remaining  int64   `json:"remaining"`
	Debt       int64   `json:"debt,omitempty"`
	Period     float64 `json:"period"` // this and the following are in seconds
	ResetAfter float64 `json:"reset_after"`
	RetryAfter float64 `json:"retry_after"`
}

func (d *decision) body() answered {
	out := answered{Allowed: d.v.Allowed, Degraded: d.v.Degraded(), RetryAfter: d.v.RetryAfter.Seconds(), Rules: []appliedJSON{}}
	for i := range d.applied {
		a := &d.applied[i]
		one := appliedJSON{Rule: a.Rule.ID, Descriptor: a.Descriptor, Cost: a.Cost, Denied: a.Denied, Shadow: a.Rule.Shadow || a.Rule.Quota, Unlimited: a.Rule.Unlimited}
		for _, l := range a.Levels {
			one.Limits = append(one.Limits, levelJSON{l.Bucket, l.Limit, l.Remaining, l.Debt, l.Period.Seconds(), l.ResetAfter.Seconds(), l.RetryAfter.Seconds()})
		}
		out.Rules = append(out.Rules, one)
	}
	return out
}

// decideHTTP is POST /v1/decide.
func (s *service) decideHTTP(w http.ResponseWriter, r *http.Request) {
	var a asking
	if !readJSON(w, r, &a) {
		return
	}
	var d *decision
	switch a.Mode {
	case "refund":
		d = s.refund(r.Context(), &a)
	case "settle":
		d = s.settle(r.Context(), &a)
	default:
		d = s.decideAsked(r.Context(), &a)
	}
	body := d.body()
	if a.Receipt.wants && d.err == nil && d.v.Taken() {
		body.Receipt = s.receipts.give(d, time.Now())
	}
	write := func(w http.ResponseWriter, status int) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		writeJSON(w, body)
	}
	d.admit = func(w http.ResponseWriter, _ *http.Request) { write(w, http.StatusOK) }
	d.refuse = func(w http.ResponseWriter, _ *http.Request, refusal throttlerhttp.Refusal) {
		if d.denied() {
			write(w, refusal.Status)
			return
		}
		problem(w, refusal.Status, title(d.err))
	}
	s.answer(w, r, d)
}

func (s *service) decideAsked(ctx context.Context, a *asking) *decision {
	asked, err := a.request()
	if err != nil {
		return &decision{err: err}
	}
	return s.decide(ctx, asked)
}

// refund returns the tokens that a receipt stands for.
func (s *service) refund(ctx context.Context, a *asking) *decision {
	if a.Receipt.id == "" || a.Entries != nil || a.Cost != nil || a.Limit != "" || len(a.Descriptors) > 0 {
		return &decision{err: malformed("a refund has a receipt and nothing else")}
	}
	return s.redeem(a, func(r *receipt) error { return s.throttler.Refund(context.WithoutCancel(ctx), r.v) })
}

// settle makes what a receipt stands for the real cost.
func (s *service) settle(ctx context.Context, a *asking) *decision {
	if a.Receipt.id == "" || a.Cost == nil && len(a.Entries) == 0 || a.Limit != "" || len(a.Descriptors) > 0 {
		return &decision{err: malformed("a settle has a receipt, and the real cost, or the entries that are costs, and nothing else")}
	}
	real := rules.Descriptor{Cost: a.Cost, Entries: a.Entries}
	return s.redeem(a, func(r *receipt) error { return s.engine.Settle(context.WithoutCancel(ctx), r.v, r.applied, real) })
}

// redeem uses a receipt. It is used up even if the storage fails, because some of the tokens may have been returned by
// then: a second try could return them twice. Only a wrong request, which changes nothing, leaves it valid.
func (s *service) redeem(a *asking, by func(*receipt) error) *decision {
	d := &decision{err: errUnknownReceipt}
	if r, ok := s.receipts.take(a.Receipt.id, time.Now()); ok {
		if d.err = r.isOf(a.Domain); d.err == nil {
			d.err = by(r)
		}
		switch status := statusOf(d.err, 0); {
		case errors.Is(d.err, errMalformed), errors.Is(d.err, throttler.ErrInvalidCost):
			s.receipts.put(r, time.Now())
		case status >= http.StatusInternalServerError:
			s.fault(d.err)
		}
	}
	d.v.Allowed = d.err == nil
	return d
}

// newServer sets timeouts and a header limit, so that slow clients cannot hold connections forever.
func newServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 3 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
	}
}
