package throttlerhttp

// Remembered is how many gates and routes a Transport knows.
func Remembered(t *Transport) int {
	t.gates.mu.Lock()
	defer t.gates.mu.Unlock()
	return len(t.gates.known) + len(t.gates.routes)
}
