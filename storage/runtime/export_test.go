package runtime

// Visited is how many entries all sweeps have looked at.
func (s *Storage) Visited() (n int) {
	for i := range s.shards {
		s.shards[i].mu.Lock()
		n += s.shards[i].visited
		s.shards[i].mu.Unlock()
	}
	return n
}

// Layouts is how many layouts are kept.
func (s *Storage) Layouts() (n int) {
	for i := range s.shards {
		s.shards[i].mu.Lock()
		n += len(s.shards[i].layouts)
		s.shards[i].mu.Unlock()
	}
	return n
}

// Room is how many entries there is memory for.
func (s *Storage) Room() (n int) {
	for i := range s.shards {
		s.shards[i].mu.Lock()
		n += len(s.shards[i].chunks) * chunk
		s.shards[i].mu.Unlock()
	}
	return n
}

// Slots is how many slots the indexes have.
func (s *Storage) Slots() (n int) {
	for i := range s.shards {
		s.shards[i].mu.Lock()
		n += len(s.shards[i].slots)
		s.shards[i].mu.Unlock()
	}
	return n
}
