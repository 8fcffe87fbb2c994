package failover

import (
	"math/rand/v2"
	"time"
)

type (
	Primary = primary
	Ledger  = ledger
)

// What the failover computes without a law.State.
var (
	Drains  = drains
	Held    = held
	Longest = longest
)

// Open is New for other stores, with pauses that are the same in each run of a seed.
func Open(p Primary, l Ledger, o *Options, seed uint64) (*Storage, error) {
	s, err := open(p, l, o)
	if err == nil {
		rnd := rand.New(rand.NewPCG(seed, 0))
		s.jitter = func(d time.Duration) time.Duration { return time.Duration(rnd.Int64N(int64(d))) }
	}
	return s, err
}
