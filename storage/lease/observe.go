package lease

import "iter"

// State describes a Storage, for metrics.
type State struct {
	Identifiers int   // that are remembered
	Tokens      int64 // leased and not used, of all buckets
	Calls       int64 // to the shared storage
	Local       int64 // calls admitted by a lease, Peeks among them
	Remembered  int64 // calls denied by a denial that is remembered
	Returned    int64 // leases given back
}

// State returns the present state, without I/O.
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

// Stats yields the present State in numbers, by the names that metrics have for them.
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
