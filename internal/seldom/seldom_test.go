package seldom_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/go-throttler/throttler/internal/seldom"
)

func TestALineIsDueOnceASecond(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var l seldom.Line
		said := map[time.Duration]int64{}
		for start := time.Now(); time.Since(start) < 3*time.Second; <-time.After(100 * time.Millisecond) {
			if left, due := l.Due(); due {
				said[time.Since(start)] = left
			}
		}
		assert.Equal(t, map[time.Duration]int64{0: 0, time.Second: 9, 2 * time.Second: 9}, said)
	})
}
