package main

import (
	"fmt"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// client is what a request counts for: the API key if there is one, otherwise the address. A key is hashed, since it is a
// secret and appears in the log. X-Forwarded-For is not read, because anybody can send it. Anybody can also send a key that
// nobody checks, so a real service first makes sure that it has issued the key.
var client = throttlerhttp.First(throttlerhttp.APIKey("X-API-Key"), throttlerhttp.Address(nil))

// routers describes the service. The limits, the handler and the page /docs are all made from this table.
func routers() []router {
	app := throttler.NewBucket(time.Minute, 100).Named("app")
	api := throttler.NewBucket(time.Minute, 30).Named("api")
	return []router{{
		Name: "App", About: "100 calls a minute in all, where a route has no limit of its own.",
		Limits: limits{app},
		Routes: []route{
			{Path: "/", About: "5 calls in 10 seconds.", Limits: limits{throttler.NewBucket(10*time.Second, 5)},
				Handler: say("Hello User, you have access!")},
			{Path: "/status", About: "The limit of the app.", Handler: say("Up.")},
		},
	}, {
		Name: "API", About: "30 calls a minute in all, which count for the app too.",
		Limits: limits{app, api},
		Routes: []route{
			{Path: "/api/items", About: "The limits of the router.", Handler: say("Items.")},
			{Path: "/api/search", About: "20 calls a minute, added to the limits of the router.", Adds: true,
				Limits: limits{throttler.NewBucket(time.Minute, 20)}, Handler: say("Found.")},
			{Path: "/api/data", About: "10 calls a minute, in place of the limits of the router.",
				Limits: limits{throttler.NewBucket(time.Minute, 10)}, Handler: say("Data.")},
			{Path: "/api/free", About: "Not limited.", Free: true, Handler: say("Free for all.")},
			{Path: "/api/limited", About: "Bursts of 10, and then one call a second.",
				Limits: limits{throttler.NewBucket(time.Second, 1).Continuous().Burst(10)}, Handler: say("Served.")},
			{Path: "/api/strict", About: "Bursts of 3, and then one call in 2 seconds.",
				Limits: limits{throttler.NewBucket(2*time.Second, 1).Continuous().Burst(3)}, Handler: say("Served, strictly.")},
			{Path: "/api/expensive", About: "5 tokens, and one more every 2 seconds. A call costs its weight.",
				Limits: limits{throttler.NewBucket(2*time.Second, 1).Continuous().Burst(5)}, Cost: weight,
				Input: &input{In: "query", Name: "weight", Choices: []string{"1", "2", "3", "4", "5", "6", "heavy"}}, Handler: say("Computed.")},
			{Path: "/api/window", About: "60 calls in 60 seconds, by a sliding window, and an answer of its own beyond.",
				Limits: limits{throttler.NewBucket(time.Minute, 60).SlidingWindow()}, Refuse: refuseWindow, Handler: say("Within the window.")},
			{Path: "/api/work", About: "Computes for some milliseconds. 100 calls a second, 10 at once; with -elastic fewer while the process is loaded, but at least 2.",
				Limits: limits{throttler.NewBucket(time.Second, 100).Continuous().Burst(10).Elastic(2)}, Handler: work},
		},
	}, {
		Name: "Plans", About: "Who upgrades keeps what was spent, because the buckets of both plans have one name.",
		Limits: limits{throttler.NewBucket(time.Minute, 5).Named("plan")},
		Tier:   plan,
		Tiers:  map[string][]throttler.Bucket{"premium": {throttler.NewBucket(time.Minute, 20).Named("plan")}},
		Routes: []route{
			{Path: "/plan", About: "5 calls a minute for free, 20 with premium.",
				Input: &input{In: "header", Name: "X-Plan", Choices: []string{"free", "premium"}}, Handler: say("As planned.")},
		},
	}}
}

// refuseWindow answers 429 in a form of its own.
func refuseWindow(w http.ResponseWriter, f throttlerhttp.Refusal) {
	l := f.Verdict.Levels()[0]
	answer(w, f.Status, struct {
		Error  string `json:"error"`
		Window int64  `json:"window"`
		Limit  int64  `json:"limit"`
	}{fmt.Sprintf("Try again in %d s.", f.RetryAfter), int64(l.Period / time.Second), l.Limit})
}

// work keeps a processor busy.
func work(w http.ResponseWriter, _ *http.Request) {
	x := 1.0
	for range 500_000 {
		x = math.Sqrt(x + 1)
	}
	answer(w, http.StatusOK, message{fmt.Sprintf("The golden ratio is %.3f.", x)})
}

// weight returns the cost of a request. For a faulty weight it is below zero, which the middleware answers as an error.
func weight(r *http.Request) int64 {
	text := r.URL.Query().Get("weight")
	if text == "" {
		return 1
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 1 {
		return -1
	}
	return n
}

// plan stands in for looking up the account of the user who is logged in. Anything but premium is free.
func plan(r *http.Request) string {
	if r.Header.Get("X-Plan") == "premium" {
		return "premium"
	}
	return ""
}
