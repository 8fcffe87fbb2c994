package main

import (
	"fmt"
	"time"

	"github.com/go-throttler/throttler"
)

// limit is n calls per period.
type limit struct {
	n      int64
	period time.Duration
}

// plenty returns limits that admit every call of a turn.
func plenty(buckets int, n int64) []limit {
	all := []limit{{n, 10 * time.Second}, {n, time.Hour}, {n, time.Minute}, {n, 10 * time.Minute},
		{n, 20 * time.Minute}, {n, 30 * time.Minute}, {n, 2 * time.Hour}, {n, 10 * time.Hour}}
	return all[:buckets]
}

// tight returns limits of which the first one admits a single call.
func tight(buckets int) []limit {
	return []limit{{1, time.Hour}, {1e9, 10 * time.Hour}}[:buckets]
}

// allow decides one call for an identifier.
type allow func(id string) (bool, error)

// contender is one way to decide.
type contender struct {
	name   string
	module string // the report names its version; empty for this module and for code written here
	idle   bool   // a floor: it does the least that any limiter must do, and decides nothing
	open   func([]limit) (allow, func(), error)
}

// us returns this module with its defaults. It must not be inlined into the list of contenders: in a closure of the
// package's initialization the compiler does not inline Consume, but in a handler it does.
//
//go:noinline
func us(name string, c func() (throttler.Config, func(), error)) contender {
	return contender{name: name, open: func(limits []limit) (allow, func(), error) {
		config, done, err := c()
		if err != nil {
			return nil, nil, err
		}
		for _, l := range limits {
			config.Buckets = append(config.Buckets, throttler.NewBucket(l.period, l.n))
		}
		t, err := throttler.New(config)
		return func(id string) (bool, error) {
			v, err := t.Consume(id)
			return v.Allowed, err
		}, done, err
	}}
}

// each returns a peer that has a limiter for each limit. They are asked in turn, until one denies.
func each(name, module string, open func(limit) (allow, func(), error)) contender {
	return contender{name: name, module: module, open: func(limits []limit) (allow, func(), error) {
		var all []allow
		var opened closers
		for _, l := range limits {
			a, done, err := open(l)
			if err != nil {
				opened.close()
				return nil, nil, err
			}
			all, opened = append(all, a), append(opened, done)
		}
		return inTurn(all), opened.close, nil
	}}
}

func inTurn(all []allow) allow {
	return func(id string) (bool, error) {
		for _, a := range all {
			if ok, err := a(id); !ok || err != nil {
				return false, err
			}
		}
		return true, nil
	}
}

// closers are the functions to be called at the end, the last one first.
type closers []func()

func (c closers) close() {
	for i := range c {
		c[len(c)-1-i]()
	}
}

func nothing() {}

// entrant is an opened contender.
type entrant struct {
	contender
	allow allow
}

// open opens all contenders with the same limits.
func open(contenders []contender, limits []limit) (entrants []entrant, done closers, err error) {
	for _, c := range contenders {
		a, closeIt, err := c.open(limits)
		if err != nil {
			done.close()
			return nil, nil, fmt.Errorf("%s: %w", c.name, err)
		}
		entrants, done = append(entrants, entrant{c, a}), append(done, closeIt)
	}
	return entrants, done, nil
}
