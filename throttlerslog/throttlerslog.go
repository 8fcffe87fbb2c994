// Package throttlerslog writes what fails to a log of package log/slog, at a bounded rate.
package throttlerslog

import (
	"context"
	"log/slog"
	"sync"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/internal/seldom"
)

// Observe returns a function for Config.Observe, of one Throttler or of several. It logs errors, also those that a policy
// allowed: of each Throttler and type (Event.ErrorType) at most one line a second, which says how many were left out before
// it. Denials and calls that were cancelled are no errors. A line is of level Error if the storage failed, and else Warn.
//
// The text of an error may have the identifier.
func Observe(log *slog.Logger) func(context.Context, *throttler.Event) {
	var lines sync.Map // nameAndType -> *seldom.Line
	return func(ctx context.Context, e *throttler.Event) {
		if e.Err == nil || e.Op == throttler.OpWait { // whose attempts have been logged
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
