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

// Connections send statements in the mode that the pool was opened with, by default as prepared statements with a name. Behind
// a pooler a name may be gone at the next transaction, which has another connection to the server. The first error that shows
// it has this storage send unnamed statements from then on, as in the mode exec, which every server and pooler takes.

// plain reports whether statements go unnamed: where names were lost, and in simple_protocol if pgx cannot quote values.
func (s *Storage) plain(conn *pgx.Conn) bool {
	is := conn.PgConn().ParameterStatus
	return s.forgetful.Load() || s.mode == pgx.QueryExecModeSimpleProtocol && (is("standard_conforming_strings") != "on" || is("client_encoding") != "UTF8")
}

// query sends one statement, by any connection.
func (s *Storage) query(ctx context.Context, sql string, arg any, scan func(pgx.Rows) error) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	for {
		// In describe_exec pgx sends it in two halves, and a pooler may join the second one with the first of another.
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

// exchangeAny is exchange by any connection.
func (s *Storage) exchangeAny(ctx context.Context, b *pgx.Batch) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	return s.exchange(ctx, conn.Conn(), b)
}

// exchange sends a batch in one round trip, and has its functions read the answers.
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

// sendPlain is SendBatch of pgx in the mode exec.
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
	pgx.BatchResults // whose other methods nobody calls
	reader           *pgconn.ResultReader
	types            *pgtype.Map
}

func (r result) Exec() (pgconn.CommandTag, error) { return r.reader.Close() }

func (r result) Query() (pgx.Rows, error) { return pgx.RowsFromResultReader(r.types, r.reader), nil }

// octets are column i, a bytea, of the row that was read, valid until the next one is. As text it has one of two
// forms, by the setting bytea_output.
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

// unescape decodes the form "escape": a backslash is doubled, or before the three octal digits of another byte.
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

// settings are such that the server gives up before the context does, as pgx closes the connection when that
// ends. No lock is waited for longer than given.
func (s *Storage) settings(ctx context.Context, lock time.Duration) ([]any, error) {
	deadline, _ := ctx.Deadline()
	left := time.Until(deadline) - max(5*time.Millisecond, s.options.Timeout/10)
	if left < time.Millisecond {
		return nil, context.DeadlineExceeded
	}
	return []any{milliseconds(max(time.Millisecond, min(lock, left))), milliseconds(left), s.options.SynchronousCommit}, nil
}

func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }
