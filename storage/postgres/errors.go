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

// code is the SQLSTATE of an error, empty if it is none of Postgres.
func code(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

const ( // SQLSTATEs
	serializationFailure = "40001"
	deadlockDetected     = "40P01"
	lockNotAvailable     = "55P03"
)

// rolledBack reports whether the error says that nothing has happened, so that the same may be sent again. No other error
// does: when an answer is lost the statement may have been executed.
func rolledBack(err error) bool {
	return code(err) == serializationFailure || code(err) == deadlockDetected || forgotten(err)
}

// noBlocks reports whether PgBouncer refused a transaction of several round trips, as it does in statement mode.
func noBlocks(err error) bool {
	return code(err) == "08P01" && strings.Contains(err.Error(), "statement pooling mode")
}

// forgotten reports whether a pooler has lost a prepared statement: its name does not exist on the server connection that it
// was sent to, or exists there already. Nothing has happened.
func forgotten(err error) bool { return code(err) == "26000" || code(err) == "42P05" }

func (s *Storage) fail(calls []*call, err error) {
	err = s.unavailable(err)
	for _, c := range calls {
		c.Err = err
	}
}

// unavailable wraps the error of a round trip. The context of a batch is not the caller's, so its end is told in words:
// errors.Is must not find it.
func (s *Storage) unavailable(err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.Is(err, combine.ErrTimeout) {
		return fmt.Errorf("%w: no answer from Postgres within %v%s", storage.ErrUnavailable, s.options.Timeout, s.busy())
	}
	return fmt.Errorf("%w: %w", storage.ErrUnavailable, err)
}

// busy says what the pool knows about a missing answer.
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

// wrap returns the error of a round trip, or that of the context of the caller if it has ended.
func wrap(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w: %s", storage.ErrUnavailable, err.Error()) // by pgx's own deadline, and not the caller's
	}
	return fmt.Errorf("%w: %w", storage.ErrUnavailable, err)
}
