// Package throttlerslog logs errors of Throttlers by package log/slog, at a bounded rate.
package throttlerslog

import (
	"context"
	"log/slog"
	"sync"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/seldom"
)

// Observe returns a function for the Config.Observe of one Throttler or of several. It logs errors, including those that a
// policy then allowed. For each Throttler and type of error (Event.ErrorType) it writes at most one line per second, which
// says how many were left out before it. Denials and cancelled calls are not logged. The level is Error if the storage
// failed, and Warn otherwise. The function is safe for concurrent use.
//
// The text of an error may contain the identifier.
func Observe(log *slog.Logger) func(context.Context, *throttler.Event) {
	var lines sync.Map // nameAndType -> *seldom.Line
	return func(ctx context.Context, e *throttler.Event) {
		if e.Err == nil || e.Op == throttler.OpWait { // the attempts of a Wait were logged already
			return
		}
		kind := e.ErrorType()
		if kind == "cancelled" {
			return
		}
		line, _ := lines.LoadOrStore(nameAndType{e.Name, kind}, new(seldom.Line))
		if left, due := line.(*seldom.Line).Due(); due {
			log.LogAttrs(ctx, level(kind), "throttler: a call failed", attributes(e, kind, left)...)
		}
	}
}

type nameAndType struct{ name, kind string }

func level(kind string) slog.Level {
	switch kind {
	case "unavailable", "corrupt", "closed":
		return slog.LevelError
	}
	return slog.LevelWarn
}

func attributes(e *throttler.Event, kind string, left int64) []slog.Attr {
	all := []slog.Attr{
		slog.String("name", e.Name), slog.String("op", string(e.Op)), slog.String("type", kind),
		slog.Bool("bypassed", e.Bypassed()), slog.String("error", e.Err.Error()),
	}
	if left > 0 {
		all = append(all, slog.Int64("left_out", left))
	}
	return all
}
