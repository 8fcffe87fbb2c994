package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/go-throttler/throttler/internal/combine"
	"github.com/go-throttler/throttler/storage"
)

// code is what Postgres calls an error, empty if it is not one of Postgres.
func code(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

const (
	serializationFailure = "40001"
	deadlockDetected     = "40P01"
	lockNotAvailable     = "55P03"
)

// rolledBack tells of an error after which nothing has happened, and the same may be tried again.
func rolledBack(err error) bool {
	return code(err) == serializationFailure || code(err) == deadlockDetected || forgotten(err)
}

// noBlocks tells of the error by which PgBouncer refuses a transaction of several round trips.
func noBlocks(err error) bool {
	return code(err) == "08P01" && strings.Contains(err.Error(), "statement pooling mode")
}

// forgotten tells of the errors by which a pooler shows that it loses prepared statements: the name of one does not
// exist, or does so already. Nothing has happened.
func forgotten(err error) bool { return code(err) == "26000" || code(err) == "42P05" }

func (s *Storage) fail(calls []*call, err error) {
	err = s.unavailable(err)
	for _, c := range calls {
		c.Err = err
	}
}

// unavailable wraps the error of a round trip. The context of a flight is not the caller's, and must not
// look like it.
func (s *Storage) unavailable(err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.Is(err, combine.ErrTimeout) {
		return fmt.Errorf("%w: no answer from Postgres within %v%s", storage.ErrUnavailable, s.options.Timeout, s.busy())
	}
	return fmt.Errorf("%w: %w", storage.ErrUnavailable, err)
}

// busy is what the pool knows of why there is no answer.
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
