package failover_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/storage/failover"
)

func TestAStateIsJSONWithItsCauses(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)
	for want, s := range map[string]failover.State{
		`{"degraded":false,"pending":0,"lag_seconds":0}`: {},
		`{"degraded":true,"cause":"connection refused","since":"2026-11-30T12:00:00Z","transitions":3,"doubted":"2026-11-30T12:00:00Z","pending":2,` +
			`"lag_seconds":1.5,"flushed":"2026-11-30T12:00:00Z","flush_error":"too slow","relayed":4,"forgotten":5}`: {
			Degraded: true, Cause: errors.New("connection refused"), Since: at, Transitions: 3, Doubted: at, Pending: 2,
			Lag: 1500 * time.Millisecond, Flushed: at, FlushError: errors.New("too slow"), Relayed: 4, Forgotten: 5,
		},
	} {
		got, err := json.Marshal(s)
		require.NoError(t, err)
		assert.Equal(t, want, string(got))
	}
}

func TestTheStatsHaveTheNamesOfMetrics(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		p := w.process(nil)
		assert.Equal(t, []string{
			"failover_degraded", "failover_flush_failing", "failover_forgotten_total", "failover_lag_seconds",
			"failover_pending", "failover_relayed_total", "failover_transitions_total",
		}, slices.Sorted(maps.Keys(maps.Collect(p.storage.Stats()))))
		for range p.storage.Stats() {
			break
		}
	})
}

func TestTheLogOfADoubleOutageIsOneLineASecond(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var b bytes.Buffer
		observe := failover.Log(slog.New(slog.NewTextHandler(&b, nil)))
		down := errors.New("connection refused")
		observe(failover.Event{Kind: failover.Flushed})
		observe(failover.Event{Kind: failover.PrimaryLost, Err: down})
		for range 25 {
			observe(failover.Event{Kind: failover.FlushFailed, Err: down, Lag: time.Second, Pending: 3})
			<-time.After(100 * time.Millisecond)
		}
		observe(failover.Event{Kind: failover.Flushed, Err: down})
		observe(failover.Event{Kind: failover.Flushed})
		observe(failover.Event{Kind: failover.Flushed})
		observe(failover.Event{Kind: failover.PrimaryBack})
		var got []string
		for line := range strings.Lines(b.String()) {
			_, line, _ = strings.Cut(strings.TrimSpace(line), "level=")
			got = append(got, line)
		}
		assert.Equal(t, []string{
			`WARN msg="Redis is lost, Postgres decides" error="connection refused" lag=0s pending=0`,
			`WARN msg="Postgres does not record what Redis admitted" error="connection refused" lag=1s pending=3 left_out=0`,
			`WARN msg="Postgres does not record what Redis admitted" error="connection refused" lag=1s pending=3 left_out=9`,
			`WARN msg="Postgres does not record what Redis admitted" error="connection refused" lag=1s pending=3 left_out=9`,
			`WARN msg="Postgres rejected admissions, which are forgotten" error="connection refused" lag=0s pending=0 left_out=0`,
			`INFO msg="Postgres records again" lag=0s pending=0`,
			`INFO msg="Redis is back and decides"`,
		}, got)
	})
}
