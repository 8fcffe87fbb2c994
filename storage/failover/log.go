package failover

// The events of a storage, written to a log.

import (
	"context"
	"log/slog"

	"github.com/go-throttler/throttler/internal/seldom"
)

// Log returns a function for Options.Observe that writes events to a log: each change from Redis to Postgres and back,
// and that Postgres does not record or rejects admissions. The latter two are written at most once a second each,
// because a double outage would repeat them with each flush; left_out counts those that were not written. The function
// is not safe for concurrent use, which Options.Observe does not need.
func Log(log *slog.Logger) func(Event) {
	var failed, rejected seldom.Line
	failing := false // needs no lock: only one call of Observe runs at a time
	return func(e Event) {
		switch {
		case e.Kind == PrimaryLost:
			log.Warn("Redis is lost, Postgres decides", failure(e)...)
		case e.Kind == PrimaryBack:
			log.Info("Redis is back and decides")
		case e.Kind == FlushFailed:
			failing = true
			warn(&failed, log, "Postgres does not record what Redis admitted", e)
		case e.Err != nil:
			warn(&rejected, log, "Postgres rejected admissions, which are forgotten", e)
		case failing:
			failing = false
			log.Info("Postgres records again", "lag", e.Lag, "pending", e.Pending)
		}
	}
}

func warn(line *seldom.Line, log *slog.Logger, what string, e Event) {
	if left, due := line.Due(); due {
		log.Log(context.Background(), slog.LevelWarn, what, append(failure(e), "left_out", left)...)
	}
}

func failure(e Event) []any {
	return []any{"error", e.Err, "lag", e.Lag, "pending", e.Pending}
}
