// Package seldom limits how often a message is logged.
package seldom

import (
	"sync"
	"time"
)

// Line is a log message that may be written once a second. The zero value may be written at once. A Line is safe for
// concurrent use, and must not be copied.
type Line struct {
	mu   sync.Mutex // guards the fields below
	next time.Time  // when it may be written again
	left int64      // how often it was left out since it was written last
}

// Due reports whether the line may be written now. If so, left is how often it was left out since it was written
// last, and the caller must write it. Otherwise left is 0.
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
