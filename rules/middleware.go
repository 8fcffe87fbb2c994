// Rules as net/http middleware.

package rules

import (
	"fmt"
	"net/http"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// MiddlewareOptions are the options of Engine.Middleware. The zero value means the defaults.
type MiddlewareOptions struct {
	Domain string // whose rules apply; "" is DefaultDomain

	// Cost returns the cost of a request in tokens, 0 or more. Nil means 1.
	Cost func(*http.Request) int64

	// The following are as in throttlerhttp.Options.
	RefundIf func(status int) bool
	Fields   throttlerhttp.Fields
	Refuse   func(http.ResponseWriter, *http.Request, throttlerhttp.Refusal)
	OnError  func(*http.Request, error)
}

// Middleware limits the requests of a net/http server. The function entries describes each request: its path, its method,
// its sender. Package throttlerhttp writes the answers. Nil options mean the defaults.
func (e *Engine) Middleware(entries func(*http.Request) []Entry, o *MiddlewareOptions) func(http.Handler) http.Handler {
	if o == nil {
		o = &MiddlewareOptions{}
	}
	domain, cost := o.Domain, o.Cost
	limit, _ := throttlerhttp.New(e.t, &throttlerhttp.Options{ // no error is possible: none of these can be faulty
		Decide: func(r *http.Request) (throttler.Verdict, error) {
			asked := Request{Domain: domain, Entries: entries(r)}
			if cost != nil {
				asked.Cost = new(cost(r))
			}
			v, applied, err := e.Decide(r.Context(), asked)
			if err == nil && !v.Allowed && v.RetryAfter == 0 {
				err = fmt.Errorf("%w: %s", throttler.ErrCostExceedsCapacity, deniedBy(applied))
			}
			return v, err
		},
		RefundIf: o.RefundIf, Fields: o.Fields, Refuse: o.Refuse, OnError: o.OnError,
	})
	return limit
}

// deniedBy names the rules that denied.
func deniedBy(applied []Applied) string {
	names := "denied by"
	for i := range applied {
		if a := &applied[i]; a.Denied {
			names = fmt.Sprintf("%s rule %q", names, a.Rule.ID)
		}
	}
	return names
}
