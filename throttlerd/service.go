// One decision, whatever protocol asked for it, and how its outcome is described.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/rules"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// service decides for all listeners. It is safe for concurrent use.
type service struct {
	config    *config
	throttler *throttler.Throttler
	engine    *rules.Engine
	receipts  *receipts
	limit     http.Handler    // writes the decision that is in the context of the request
	fault     func(error)     // called with errors that are not the caller's fault
	count     func(*decision) // called with every decision but those of Peek
}

// The errors of requests that were never decided by a rule.
var (
	errUnknownDomain = errors.New("the domain has no rules")
	errMalformed     = errors.New("the request is wrong")
	errInternal      = errors.New("a fault of throttlerd")

	errUnknownReceipt = errors.New("the receipt is unknown, used, or older than 10 minutes")
)

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errMalformed, fmt.Sprintf(format, args...))
}

func newService(t *throttler.Throttler, e *rules.Engine, c *config, count func(*decision), fault func(error)) (*service, error) {
	limit, err := throttlerhttp.New(t, &throttlerhttp.Options{
		Decide: func(r *http.Request) (throttler.Verdict, error) { d := decided(r); return d.v, d.err },
		Refuse: func(w http.ResponseWriter, r *http.Request, refusal throttlerhttp.Refusal) {
			d := decided(r)
			refusal.Status = statusOf(d.err, refusal.Status)
			d.refuse(w, r, refusal)
		},
	})
	if err != nil {
		return nil, err
	}
	return &service{
		config: c, throttler: t, engine: e, receipts: &receipts{}, count: count, fault: fault,
		limit: limit(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { decided(r).admit(w, r) })),
	}, nil
}

// decision is the outcome of a request. Its err is nil if the request was admitted, or if it was denied and waiting
// helps.
type decision struct {
	v       throttler.Verdict
	applied []rules.Applied
	err     error

	admit  http.HandlerFunc
	refuse func(http.ResponseWriter, *http.Request, throttlerhttp.Refusal)
}

// denied reports whether the rules decided: if the request was not admitted, then because of a limit, not because of a
// fault.
func (d *decision) denied() bool {
	return d.err == nil || errors.Is(d.err, throttler.ErrCostExceedsCapacity)
}

// bypassed reports whether the storage failed and the request was admitted without a limit.
func (d *decision) bypassed() bool {
	return d.v.Allowed && d.v.Degraded() && !slices.ContainsFunc(d.applied, func(a rules.Applied) bool { return a.Rule.Unlimited || len(a.Levels) > 0 })
}

type decisionKey struct{}

func decided(r *http.Request) *decision {
	d, _ := r.Context().Value(decisionKey{}).(*decision)
	return d
}

// maxDescriptors is how many identifiers one decision may have. A request with more descriptors would be rejected in
// the end anyway, after costing time.
const maxDescriptors = 256

// bounded returns an error for more descriptors than that.
func bounded(descriptors int) error {
	if descriptors > maxDescriptors {
		return malformed("it has %d descriptors, must have at most %d", descriptors, maxDescriptors)
	}
	return nil
}

// decide decides a request. A request that cannot be decided is not admitted, unless -on-storage-error or
// -on-unknown-domain allows it. A panic becomes errInternal, so that every protocol still gets an answer in its own form.
//
// The decision does not see the cancellation of ctx: a client that leaves must not escape a charge for what has happened,
// and the storage bounds each call by its own timeout. A call that cannot be cancelled halfway needs no second goroutine,
// which took a quarter of the time of a call on Redis.
func (s *service) decide(ctx context.Context, r rules.Request) (d *decision) {
	d = &decision{}
	defer func() {
		if p := recover(); p != nil {
			*d = decision{err: fmt.Errorf("%w: %v", errInternal, p)}
		}
		if d.err != nil && statusOf(d.err, 0) >= http.StatusInternalServerError {
			s.fault(d.err)
		}
	}()
	if d.err = bounded(len(r.Descriptors)); d.err != nil {
		return d
	}
	d.v, d.applied, d.err = s.engine.Decide(context.WithoutCancel(ctx), r)
	switch {
	case d.err == nil && d.v.Allowed && len(d.applied) == 0 && s.unknown(r.Domain):
		d.v, d.err = throttler.Verdict{}, fmt.Errorf("%w: %.64q", errUnknownDomain, cmp.Or(r.Domain, rules.DefaultDomain))
	case d.err == nil && !d.v.Allowed && d.v.RetryAfter == 0:
		d.err = fmt.Errorf("%w: denied by %q", throttler.ErrCostExceedsCapacity, d.deniedBy())
	case d.err != nil:
		d.v.Allowed = false
	}
	if r.Mode != rules.Peek {
		s.count(d)
	}
	return d
}

// unknown reports whether the domain has no rules although -on-unknown-domain demands some.
func (s *service) unknown(domain string) bool {
	return s.config.onUnknownDomain == "deny" && !slices.Contains(s.engine.Rules().Domains(), cmp.Or(domain, rules.DefaultDomain))
}

// deniedBy returns the IDs of the rules that denied.
func (d *decision) deniedBy() []string {
	return d.ids(func(a *rules.Applied) bool { return a.Denied && !a.Rule.Shadow && !a.Rule.Quota })
}

func (d *decision) ids(of func(*rules.Applied) bool) (ids []string) {
	for i := range d.applied {
		if a := &d.applied[i]; of(a) && !slices.Contains(ids, a.Rule.ID) {
			ids = append(ids, a.Rule.ID)
		}
	}
	return ids
}

// statusOf returns the HTTP status for an error, or otherwise where package throttlerhttp chooses the status: for an
// admission and a denial.
func statusOf(err error, otherwise int) int {
	switch {
	case err == nil || errors.Is(err, throttler.ErrCostExceedsCapacity):
		return otherwise
	case errors.Is(err, errMalformed), errors.Is(err, throttler.ErrInvalidCost), errors.Is(err, throttler.ErrInvalidIdentifier), errors.As(err, new(*throttler.BucketError)):
		return http.StatusBadRequest
	case errors.Is(err, errUnknownDomain), errors.Is(err, errUnknownReceipt):
		return http.StatusNotFound
	case errors.As(err, new(*throttler.DebtError)):
		return http.StatusUnprocessableEntity
	case errors.Is(err, errInternal):
		return http.StatusInternalServerError
	}
	return http.StatusServiceUnavailable
}

// answer writes the decision with the header fields of package throttlerhttp.
func (s *service) answer(w http.ResponseWriter, r *http.Request, d *decision) {
	s.limit.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), decisionKey{}, d)))
}
