package postgres

import (
	"cmp"
	"context"
	_ "embed"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/go-throttler/throttler/storage"
)

//go:embed schema.sql
var schemaSQL string

// Schema returns the SQL by which New creates its table, for programs that execute it in a migration of their own and
// set Options.NoSchema. Executing it again does no harm. Only the options Schema, TablePrefix and Unlogged count; nil
// means the defaults. Schema does not check them.
func Schema(o *Options) string {
	var p Options
	if o != nil {
		p = *o
	}
	p.TablePrefix = cmp.Or(p.TablePrefix, DefaultTablePrefix)
	sql := schemaSQL
	if p.Unlogged {
		sql = strings.Replace(sql, "CREATE TABLE", "CREATE UNLOGGED TABLE", 1)
	}
	return strings.ReplaceAll(sql, "throttler_state", p.table())
}

// table returns the quoted name of the table.
func (o *Options) table() string {
	if o.Schema == "" {
		return pgx.Identifier{o.TablePrefix + "_state"}.Sanitize()
	}
	return pgx.Identifier{o.Schema, o.TablePrefix + "_state"}.Sanitize()
}

// install creates the table unless it exists; one process at a time does so. If Options.Schema is empty, install sets
// it to the schema in which the table is or will be. So later changes of the search_path do not lead to another
// table.
//
// A server may accept a connection and then say nothing. pgx would wait two minutes for it.
func (s *Storage) install(ctx context.Context) error {
	const patience = 10 * time.Second
	bounded, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := s.create(bounded)
	if err != nil && bounded.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("%w: no answer from Postgres within %v, or another transaction is making a table of this name%s", storage.ErrUnavailable, patience, s.busy())
	}
	return err
}

func (s *Storage) create(ctx context.Context) error {
	there, err := s.find(ctx)
	if there || err != nil {
		return err
	}
	_, failed := s.pool.Exec(ctx, sqlInstall+Schema(&s.options))
	if there, err = s.find(ctx); there || err != nil {
		return err // the table is there, even if the creation failed: another process was first
	}
	return wrap(ctx, failed)
}

// shape is the answer to sqlFind for the table of this package: its columns, sorted by name, and the unique one.
const shape = "before int8, clocked bool, full_at int8, id bytea, state bytea, version int8, unique id"

// kinds names the relations that may have the name of a table, by pg_class.relkind.
var kinds = map[string]string{
	"r": "a table", "p": "a partitioned table", "f": "a foreign table", "v": "a view", "m": "a materialized view",
	"i": "an index", "I": "an index", "S": "a sequence", "c": "a type",
}

// find reports whether the table exists. If something else has its name the error is an *OptionError, and nothing is
// changed.
func (s *Storage) find(ctx context.Context) (there bool, err error) {
	var schema, kind, found *string
	err = s.query(ctx, sqlFind, s.options.table(), func(r pgx.Rows) error {
		_, err := pgx.ForEachRow(r, []any{&schema, &kind, &found}, func() error { return nil })
		return err
	})
	if err != nil {
		return false, wrap(ctx, err)
	}
	if s.options.Schema == "" && schema != nil {
		s.options.Schema = *schema
	}
	if kind == nil {
		return false, nil
	}
	if *kind != "r" || *found != shape {
		return false, &OptionError{Field: "TablePrefix", cause: storage.ErrCorruptState, Reason: fmt.Sprintf(
			"leads to %s, which is none of this package's, or one of a later version: it is %s with (%s), must be a table with (%s); it is left alone",
			s.options.table(), kinds[*kind], *found, shape)}
	}
	return true, nil
}
