package throttlerhttp

// Remembered returns how many gates and routes a Transport remembers.
func Remembered(t *Transport) int {
	t.gates.mu.Lock()
	defer t.gates.mu.Unlock()
	return len(t.gates.known) + len(t.gates.routes)
}
