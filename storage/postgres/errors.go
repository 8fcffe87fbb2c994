package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	combine "github.com/go-throttler/throttler/internal/batch"
	"github.com/go-throttler/throttler/storage"
)

// code returns the SQLSTATE of an error, or "" if it is not an error of the server.
func code(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// The SQLSTATEs that this package acts on: https://www.postgresql.org/docs/current/errcodes-appendix.html.
const (
	serializationFailure = "40001"
	deadlockDetected     = "40P01"
	lockNotAvailable     = "55P03"
)

// rolledBack reports whether the error proves that nothing has happened, so that the same may be sent again. No other
// error does: if the answer is lost, the statement may have been executed.
func rolledBack(err error) bool {
	return code(err) == serializationFailure || code(err) == deadlockDetected || forgotten(err)
}

// noBlocks reports whether PgBouncer refused a transaction of several round trips because it pools statements.
func noBlocks(err error) bool {
	return code(err) == "08P01" && strings.Contains(err.Error(), "statement pooling mode")
}

// forgotten reports whether a pooler has lost a prepared statement: its name does not exist on the server connection
// that got it (26000), or another statement has that name there (42P05). Nothing has happened.
func forgotten(err error) bool { return code(err) == "26000" || code(err) == "42P05" }

// fail ends calls with the error of a round trip.
func (s *Storage) fail(calls []*call, err error) {
	err = s.unavailable(err)
	for _, c := range calls {
		c.Err = err
	}
}

// unavailable wraps the error of a round trip in ErrUnavailable. It replaces the context errors of a batch by words,
// because callers that test with errors.Is would take them for the end of their own context.
func (s *Storage) unavailable(err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.Is(err, combine.ErrTimeout) {
		return fmt.Errorf("%w: no answer from Postgres within %v%s", storage.ErrUnavailable, s.options.Timeout, s.busy())
	}
	return fmt.Errorf("%w: %w", storage.ErrUnavailable, err)
}

// busy returns what the state of the pool adds to the error of a missing answer.
func (s *Storage) busy() string {
	pool := s.pool.Stat()
	switch {
	case pool.ConstructingConns() > 0:
		return ": a connection is still being opened"
	case pool.AcquiredConns() >= pool.MaxConns():
		return fmt.Sprintf(": all connections of the pool, %d, are in use", pool.MaxConns())
	}
	return ""
}

// wrap returns the error of a round trip that was made with the caller's own context: the error of ctx if that has
// ended, and otherwise one that wraps ErrUnavailable.
func wrap(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w: %s", storage.ErrUnavailable, err.Error()) // a deadline of pgx, and not the caller's
	}
	return fmt.Errorf("%w: %w", storage.ErrUnavailable, err)
}
