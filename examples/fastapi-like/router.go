package main

import (
	"errors"
	"log/slog"
	"net/http"
	"time"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/throttlerhttp"
)

type limits []throttler.Bucket

// router is a group of routes and their limits.
type router struct {
	Name, About string
	Limits      limits // for routes without limits of their own
	Tier        func(*http.Request) string
	Tiers       map[string][]throttler.Bucket // instead of Limits, if Tier names one
	Routes      []route
}

// route answers GET on one path.
type route struct {
	Path, About string
	Limits      limits // instead of the router's
	Adds        bool   // Limits are added to the router's
	Free        bool   // not limited
	Cost        func(*http.Request) int64
	Input       *input                                           // what /docs asks for
	Refuse      func(http.ResponseWriter, throttlerhttp.Refusal) // a 429 of its own
	Handler     http.HandlerFunc
}

// input is a query parameter or a header.
type input struct {
	In, Name string
	Choices  []string
}

// Pattern returns the route's pattern for http.ServeMux.
func (r *route) Pattern() string {
	if r.Path == "/" {
		return "GET /{$}"
	}
	return "GET " + r.Path
}

// options returns the options of the middleware. Without pay a request costs 0, so that the answer shows the levels and takes
// nothing.
func (g *router) options(pay bool, took func(time.Duration)) *throttlerhttp.Options {
	o := &throttlerhttp.Options{Key: client, Buckets: g.Limits, Tier: g.Tier, Tiers: g.Tiers, Refuse: g.refuse, Took: took}
	if !pay {
		o.Cost = func(*http.Request) int64 { return 0 }
	}
	for _, r := range g.Routes {
		route := throttlerhttp.Route{Pattern: r.Pattern(), Name: r.Path, Buckets: r.Limits, Adds: r.Adds, Free: r.Free}
		if pay {
			route.Cost = r.Cost
		}
		o.Routes = append(o.Routes, route)
	}
	return o
}

// refuse answers a request instead of the handler.
func (g *router) refuse(w http.ResponseWriter, r *http.Request, f throttlerhttp.Refusal) {
	switch {
	case f.Status == http.StatusTooManyRequests:
		for i := range g.Routes {
			if route := &g.Routes[i]; route.Refuse != nil && route.Pattern() == r.Pattern {
				route.Refuse(w, f)
				return
			}
		}
		answer(w, f.Status, message{"You've reached the limit!"})
	case f.Status == http.StatusRequestEntityTooLarge:
		answer(w, f.Status, message{"This costs more than the limit ever admits."})
	case errors.Is(f.Err, throttler.ErrInvalidCost):
		answer(w, http.StatusBadRequest, message{"The weight must be a whole number from 1 to 5."})
	default:
		failed(w, f.Err)
		answer(w, f.Status, message{"The service is unavailable, please try again later."})
	}
}

// newHandler makes the service from the table. It calls took with the time that each handler took. A second middleware,
// which takes nothing, tells the page /docs the levels.
func newHandler(t *throttler.Throttler, log *slog.Logger, took func(time.Duration)) (http.Handler, error) {
	table := routers()
	served, levels := http.NewServeMux(), http.NewServeMux()
	served.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusNotFound, message{"Not found."})
	})
	for i := range table {
		group := &table[i]
		limit, err := throttlerhttp.New(t, group.options(true, took))
		if err != nil {
			return nil, err
		}
		peek, err := throttlerhttp.New(t, group.options(false, nil))
		if err != nil {
			return nil, err
		}
		for _, r := range group.Routes {
			served.Handle(r.Pattern(), limit(r.Handler))
			served.HandleFunc(r.Pattern()[len("GET "):], onlyGet)
			levels.Handle(r.Pattern(), peek(http.HandlerFunc(noContent)))
		}
	}
	page, err := docs(table)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("/", logged(log, served))
	mux.Handle("GET /docs", page)
	mux.Handle("GET /docs/levels/", http.StripPrefix("/docs/levels", levels))
	return mux, nil
}
