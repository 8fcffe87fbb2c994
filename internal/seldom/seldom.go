// Package seldom bounds how often something is said.
package seldom

import (
	"sync"
	"time"
)

// Line may be said once a second. The zero value may be said at once. It is safe for concurrent use.
type Line struct {
	mu   sync.Mutex
	next time.Time
	left int64
}

// Due reports whether the line may be said now, and how often it was left out since it was said.
func (l *Line) Due() (left int64, due bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if now.Before(l.next) {
		l.left++
		return 0, false
	}
	left, l.left, l.next = l.left, 0, now.Add(time.Second)
	return left, true
}
