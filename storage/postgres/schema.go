package postgres

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/go-throttler/throttler/storage"
)

//go:embed schema.sql
var schemaSQL string

// Schema returns the SQL that New executes: the table and the functions, for people who do that by
// migrations of their own (Options.NoSchema). It may be executed any number of times.
func Schema(o *Options) string {
	var p Options
	if o != nil {
		p = *o
	}
	if p.Name == "" {
		p.Name = DefaultName
	}
	sql := schemaSQL
	if p.Unlogged {
		sql = strings.Replace(sql, "CREATE TABLE", "CREATE UNLOGGED TABLE", 1)
	}
	sql = regexp.MustCompile(`\bthrottler_\w+`).ReplaceAllStringFunc(sql, func(name string) string {
		return qualified(&p, strings.TrimPrefix(name, "throttler"))
	})
	sum := sha256.Sum256([]byte(sql))
	return fmt.Sprintf("%s\nCOMMENT ON TABLE %s IS '%s';\n", sql, qualified(&p, "_state"), hex.EncodeToString(sum[:8]))
}

// qualified is the name of an object, quoted.
func qualified(o *Options, suffix string) string {
	if o.Schema == "" {
		return pgx.Identifier{o.Name + suffix}.Sanitize()
	}
	return pgx.Identifier{o.Schema, o.Name + suffix}.Sanitize()
}

// names are the statements that call the functions.
type names struct{ decide, decideAll, change, sweep string }

func namesOf(o *Options) names {
	call := func(function string, args int) string {
		var list []string
		for i := range args {
			list = append(list, fmt.Sprint("$", i+1))
		}
		return fmt.Sprintf("SELECT %s(%s)", qualified(o, "_"+function+"_1"), strings.Join(list, ", "))
	}
	return names{call("decide", 11), call("decide_all", 8), call("change", 10), strings.Replace(call("sweep", 5), "SELECT", "SELECT * FROM", 1)}
}

// install executes the schema unless the comment on the table says that it has been. One process at a
// time does: CREATE OR REPLACE fails when two replace the same function.
func (s *Storage) install(ctx context.Context) error {
	sql := Schema(&s.options)
	_, comment, _ := strings.Cut(sql, "COMMENT ON TABLE")
	_, want, _ := strings.Cut(comment, " IS '")
	want, _, _ = strings.Cut(want, "'")
	done := func(q interface {
		QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
	}) (bool, error) {
		var got *string
		err := q.QueryRow(ctx, "SELECT obj_description(to_regclass($1), 'pg_class')", qualified(&s.options, "_state")).Scan(&got)
		return got != nil && *got == want, err
	}
	if ok, err := done(s.pool); ok || err != nil {
		return wrap(err)
	}
	return wrap(pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock(8270132754410527301)"); err != nil {
			return err
		}
		if ok, err := done(tx); ok || err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "SET LOCAL client_min_messages = warning;\n"+sql)
		return err
	}))
}

func wrap(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%w: %w", storage.ErrUnavailable, err)
}
