package failover

// What happens, in a log.

import (
	"context"
	"log/slog"

	"github.com/go-throttler/throttler/internal/seldom"
)

// Log returns a function for Options.Observe that writes to a log: each change of who decides, and at most once a second
// that Postgres does not record, which a double outage would repeat with each flush.
func Log(log *slog.Logger) func(Event) {
	var failed, rejected seldom.Line
	failing := false // only one Observe runs at a time
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
