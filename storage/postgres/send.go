package postgres

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

// Statements are sent in the mode with which the pool was opened; by default they are prepared and have a name.
// Behind a pooler the next transaction may get another connection to the server, where the name does not exist. The
// first error of that kind makes this storage send unnamed statements from then on. That is pgx's mode exec, which
// works with every server and pooler.

// plain reports whether statements are sent unnamed: a pooler has lost names, or the mode is simple_protocol and pgx
// cannot quote values under the settings of the connection.
func (s *Storage) plain(conn *pgx.Conn) bool {
	is := conn.PgConn().ParameterStatus
	return s.forgetful.Load() || s.mode == pgx.QueryExecModeSimpleProtocol && (is("standard_conforming_strings") != "on" || is("client_encoding") != "UTF8")
}

// query sends one statement through any connection, and scan reads the answer. A statement whose name was lost has
// not been executed, so it is sent again without a name.
func (s *Storage) query(ctx context.Context, sql string, arg any, scan func(pgx.Rows) error) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	for {
		// In describe_exec pgx sends a statement in two halves. A pooler may execute the second half after the first
		// half of another client's statement.
		plain := s.plain(conn.Conn()) || s.mode == pgx.QueryExecModeDescribeExec
		args := []any{arg}
		if plain {
			args = []any{pgx.QueryExecModeExec, arg}
		}
		rows, err := conn.Query(ctx, sql, args...)
		if err == nil {
			err = scan(rows)
		}
		if plain || !forgotten(err) {
			return err
		}
		s.forgetful.Store(true)
	}
}

// exchangeAny is exchange through any connection.
func (s *Storage) exchangeAny(ctx context.Context, b *pgx.Batch) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	return s.exchange(ctx, conn.Conn(), b)
}

// exchange sends a batch of statements in one round trip, and lets the function of each statement read its answer. It
// does not repeat a batch whose names were lost; rolledBack tells the caller that it may.
func (s *Storage) exchange(ctx context.Context, conn *pgx.Conn, b *pgx.Batch) error {
	if s.plain(conn) {
		return sendPlain(ctx, conn, b)
	}
	err := conn.SendBatch(ctx, b).Close()
	if forgotten(err) {
		s.forgetful.Store(true)
	}
	return err
}

// sendPlain is pgx's SendBatch in the mode exec: it sends a batch of unnamed statements, and stops at the first error.
func sendPlain(ctx context.Context, conn *pgx.Conn, b *pgx.Batch) error {
	out, args := &pgconn.Batch{}, &pgx.ExtendedQueryBuilder{}
	for _, q := range b.QueuedQueries {
		if err := args.Build(conn.TypeMap(), nil, q.Arguments); err != nil {
			return err
		}
		out.ExecParams(q.SQL, args.ParamValues, nil, args.ParamFormats, args.ResultFormats)
	}
	answer := conn.PgConn().ExecBatch(ctx, out)
	for _, q := range b.QueuedQueries {
		if !answer.NextResult() {
			break
		}
		r, err := result{reader: answer.ResultReader(), types: conn.TypeMap()}, error(nil)
		if q.Fn != nil {
			err = q.Fn(r)
		} else {
			_, err = r.Exec()
		}
		if err != nil {
			_ = answer.Close()
			return err
		}
	}
	return answer.Close()
}

// result is the answer to one statement of a batch.
type result struct {
	pgx.BatchResults // nil: its other methods are never called
	reader           *pgconn.ResultReader
	types            *pgtype.Map
}

// Exec implements pgx.BatchResults.
func (r result) Exec() (pgconn.CommandTag, error) { return r.reader.Close() }

// Query implements pgx.BatchResults.
func (r result) Query() (pgx.Rows, error) { return pgx.RowsFromResultReader(r.types, r.reader), nil }

// octets returns column i, a bytea, of the present row. It is valid until the next row is read. In a text answer it
// is in one of two forms, depending on the setting bytea_output.
func octets(r pgx.Rows, i int) ([]byte, error) {
	raw := r.RawValues()[i]
	switch {
	case raw == nil || r.FieldDescriptions()[i].Format == pgx.BinaryFormatCode:
		return raw, nil
	case bytes.HasPrefix(raw, []byte(`\x`)):
		return hex.AppendDecode(nil, raw[2:])
	}
	return unescape(raw)
}

// unescape decodes the form "escape" of a bytea: a backslash is doubled, or begins three octal digits that stand for
// a byte. See https://www.postgresql.org/docs/current/datatype-binary.html.
func unescape(raw []byte) ([]byte, error) {
	out := make([]byte, 0, len(raw))
	for len(raw) > 0 {
		switch {
		case raw[0] != '\\':
			out, raw = append(out, raw[0]), raw[1:]
		case len(raw) > 1 && raw[1] == '\\':
			out, raw = append(out, '\\'), raw[2:]
		default:
			n, err := strconv.ParseUint(string(raw[1:min(4, len(raw))]), 8, 8)
			if err != nil || len(raw) < 4 {
				return nil, fmt.Errorf("throttler: postgres: %.99q is no bytea", raw)
			}
			out, raw = append(out, byte(n)), raw[4:]
		}
	}
	return out, nil
}

// settings returns the parameters of sqlSettings. The server must give up before ctx ends, because pgx then closes the
// connection. So a statement may take the time that ctx has left, less a tenth of Options.Timeout (at least 5 ms). The
// duration lock bounds the wait for each lock. If less than a millisecond is left, the error is DeadlineExceeded.
func (s *Storage) settings(ctx context.Context, lock time.Duration) ([]any, error) {
	deadline, _ := ctx.Deadline()
	left := time.Until(deadline) - max(5*time.Millisecond, s.options.Timeout/10)
	if left < time.Millisecond {
		return nil, context.DeadlineExceeded
	}
	return []any{milliseconds(max(time.Millisecond, min(lock, left))), milliseconds(left), s.options.SynchronousCommit}, nil
}

// milliseconds returns a duration as a Postgres setting.
func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }
