package lease

import "iter"

// State describes a Storage at one moment, for metrics. The counters start at zero when New returns and never decrease.
type State struct {
	Identifiers int   `json:"identifiers"` // that have a pool
	Tokens      int64 `json:"tokens"`      // leased and unused, summed over all buckets
	Calls       int64 `json:"calls"`       // calls to the shared storage: decisions, charges and resets
	Local       int64 `json:"local"`       // calls admitted by a lease, including Peeks
	Remembered  int64 `json:"remembered"`  // calls denied by a remembered denial
	Returned    int64 `json:"returned"`    // attempts to give a lease back
}

// State returns the current state. It does no I/O.
func (s *Storage) State() State {
	out := State{Identifiers: int(s.pools.Load()), Calls: s.calls.Load(), Returned: s.returned.Load()}
	for i := range s.shards {
		sh := &s.shards[i]
		sh.mu.Lock()
		out.Local += sh.local
		out.Remembered += sh.remembered
		for p := range sh.leased {
			for _, g := range p.lease.grants {
				out.Tokens += g.left
			}
		}
		sh.mu.Unlock()
	}
	return out
}

// Stats yields the fields of the current State under their metric names.
func (s *Storage) Stats() iter.Seq2[string, float64] {
	return func(yield func(string, float64) bool) {
		state := s.State()
		_ = yield("lease_identifiers", float64(state.Identifiers)) &&
			yield("lease_tokens", float64(state.Tokens)) &&
			yield("lease_calls_total", float64(state.Calls)) &&
			yield("lease_local_total", float64(state.Local)) &&
			yield("lease_remembered_total", float64(state.Remembered)) &&
			yield("lease_returned_total", float64(state.Returned))
	}
}
