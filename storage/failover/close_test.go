package failover_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/failover"
)

// deaf is a ledger that takes a given time for each batch, even if the context ends before. It may reject batches of
// several entries.
type deaf struct {
	*link
	time    time.Duration
	refuses bool
	told    *atomic.Int64 // how many batches it was given
}

func (l deaf) Record(ctx context.Context, origin string, seq int64, batch []storage.Charge) ([]replica.Debt, error) {
	<-time.After(l.time)
	l.told.Add(1)
	if l.refuses && len(batch) > 1 {
		return nil, storage.ErrCorruptState
	}
	return l.link.Record(context.WithoutCancel(ctx), origin, seq, batch)
}

// deafProcess starts a process with a deaf ledger, in which some identifiers are pending.
func (w *world) deafProcess(l deaf, pending int) (p *process, told *atomic.Int64) {
	w.t.Helper()
	l.link, l.told = &link{to: w.pg, trip: 2 * trip, timeout: 250 * time.Millisecond}, new(atomic.Int64)
	p = &process{redis: &link{to: w.redis, trip: trip}, pg: l.link}
	var err error
	p.storage, err = failover.Open(p.redis, l, &failover.Options{FlushInterval: time.Minute}, 1)
	require.NoError(w.t, err)
	w.redis.scripts[p.redis] = true
	for i := range pending {
		require.True(w.t, w.do(p, fmt.Sprint("id", i), 1))
	}
	return p, l.told
}

// closeIn closes a process with a context that ends after d.
func closeIn(p *process, d time.Duration) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(bg, d)
	defer cancel()
	began := time.Now()
	err = p.storage.Close(ctx)
	return time.Since(began), err
}

func TestRuleCloseEndsWithItsContextThoughTheLedgerDoesNot(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		for name, l := range map[string]deaf{
			"never ends":                {time: time.Hour},
			"takes long for each batch": {time: 30 * time.Millisecond},
			"refuses whole batches":     {time: 30 * time.Millisecond, refuses: true},
		} {
			p, told := w.deafProcess(l, 2000)
			took, err := closeIn(p, 50*time.Millisecond)
			require.ErrorIs(t, err, context.DeadlineExceeded, name)
			assert.Equal(t, 50*time.Millisecond, took, name)
			<-time.After(2 * time.Hour)
			assert.LessOrEqual(t, told.Load(), int64(2), "%s: it goes on after Close", name)
			assert.ErrorIs(t, p.storage.Close(bg), context.DeadlineExceeded, "%s: twice", name)
		}
	})
}

func TestRule10CloseEndsAFlushThatHasBegun(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		require.True(t, w.do(p, "a", 1))
		p.pg.timeout = time.Hour
		p.pg.set(swallows)
		<-time.After(interval + 50*time.Millisecond)
		took, err := closeIn(p, 50*time.Millisecond)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Equal(t, 50*time.Millisecond, took)
		<-time.After(time.Millisecond)
		assert.Error(t, p.storage.State().FlushError, "it is still waited for")
		<-time.After(time.Hour)
	})
}

func TestRule10ASecondCloseHasItsOwnContext(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p, _ := w.deafProcess(deaf{time: 500 * time.Millisecond}, 1)
		first := make(chan error)
		go func() { first <- p.storage.Close(bg) }()
		<-time.After(time.Millisecond)
		took, err := closeIn(p, 50*time.Millisecond)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Equal(t, 50*time.Millisecond, took)
		require.NoError(t, <-first)
		assert.NoError(t, p.storage.Close(bg))
		assert.EqualValues(t, 1, w.owes(w.pg, "id0"))
	})
}
