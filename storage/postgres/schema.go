package postgres

import (
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/go-throttler/throttler/storage"
)

//go:embed schema.sql
var schemaSQL string

// schemaVersion is the comment on a table that schemaSQL has made.
var schemaVersion = fmt.Sprintf("%.8x", sha256.Sum256([]byte(schemaSQL)))

// Schema returns the SQL that New executes: one table, for people who do that by migrations of their own
// (Options.NoSchema). It may be executed any number of times.
func Schema(o *Options) string {
	var p Options
	if o != nil {
		p = *o
	}
	p.Name = cmp.Or(p.Name, DefaultName)
	sql := schemaSQL
	if p.Unlogged {
		sql = strings.Replace(sql, "CREATE TABLE", "CREATE UNLOGGED TABLE", 1)
	}
	sql += fmt.Sprintf("COMMENT ON TABLE throttler_state IS '%s';\n", schemaVersion)
	return strings.ReplaceAll(sql, "throttler_state", p.table())
}

// table is its name, quoted.
func (o *Options) table() string {
	if o.Schema == "" {
		return pgx.Identifier{o.Name + "_state"}.Sanitize()
	}
	return pgx.Identifier{o.Schema, o.Name + "_state"}.Sanitize()
}

// statements are the SQL of a flight.
type statements struct {
	read, insert, update, recall, one, blank, lock, free, sweep string
	absent, claim, record                                       string // those of a Record
}

// A row that is locked stays in its place, the ctid, where an update finds it without the index.
//
// The rows of statements that write are in the order of their ids, and so locks are taken in it. Joins are such
// that the only way is to look up each id, whatever Postgres knows of the size of the table. Arrays are in
// subselects, or Postgres would plan anew for their lengths.
func statementsOf(o *Options) statements {
	on := func(sql string) string { return strings.ReplaceAll(sql, "throttler_state", o.table()) }
	const rows = `INSERT INTO throttler_state AS t (id, version, before, state, full_at, clocked)
		SELECT u.* FROM unnest((SELECT $1::bytea[]), (SELECT $2::bigint[]), (SELECT $3::bigint[]), (SELECT $4::bytea[]), (SELECT $5::bigint[]), (SELECT $6::boolean[]))
			AS u (id, version, before, state, full_at, clocked) `
	const update = rows + `CROSS JOIN LATERAL (SELECT FROM throttler_state WHERE id = u.id OFFSET 0) AS there
		ON CONFLICT (id) DO UPDATE SET version = EXCLUDED.version, before = EXCLUDED.before, state = EXCLUDED.state,
			full_at = EXCLUDED.full_at, clocked = EXCLUDED.clocked
		WHERE t.version = EXCLUDED.before `
	return statements{
		read: on(`SELECT u.place, coalesce(t.version, 0), t.state, clock_timestamp() FROM unnest((SELECT $1::bytea[])) WITH ORDINALITY AS u (id, place)
			LEFT JOIN LATERAL (SELECT version, state FROM throttler_state WHERE id = u.id OFFSET 0) AS t ON true`),
		insert: on(rows + `ON CONFLICT DO NOTHING RETURNING id`),
		update: on(update + `RETURNING id`),
		recall: on(update + `AND clock_timestamp() BETWEEN $7::timestamptz - interval '1 ms' AND $7::timestamptz + interval '5 ms' RETURNING id`),
		one: on(`UPDATE throttler_state SET version = $2, before = $3, state = $4, full_at = $5, clocked = $6 WHERE id = $1 AND version = $3
			AND ($7::timestamptz IS NULL OR clock_timestamp() BETWEEN $7 - interval '1 ms' AND $7 + interval '5 ms')`),
		blank: on(`INSERT INTO throttler_state (id, version, before, state, full_at, clocked)
			SELECT id, 1000000 * extract(epoch FROM clock_timestamp()), 0, '', 0, false FROM unnest($1::bytea[]) AS id ON CONFLICT DO NOTHING`),
		lock: on(`SELECT u.place, t.version, t.state, clock_timestamp() FROM unnest($1::bytea[]) WITH ORDINALITY AS u (id, place)
			CROSS JOIN LATERAL (SELECT version, state FROM throttler_state WHERE id = u.id FOR UPDATE) AS t`),
		free: on(`SELECT u.place FROM unnest($1::bytea[]) WITH ORDINALITY AS u (id, place)
			CROSS JOIN LATERAL (SELECT FROM throttler_state WHERE id = u.id FOR UPDATE SKIP LOCKED) AS t`),
		absent: on(`INSERT INTO throttler_state (id, version, before, state, full_at, clocked)
			SELECT u.id, 1000000 * extract(epoch FROM clock_timestamp()), 0, '', 0, false FROM unnest((SELECT $1::bytea[])) AS u (id)
				LEFT JOIN LATERAL (SELECT true AS is FROM throttler_state WHERE id = u.id OFFSET 0) AS there ON true
			WHERE there.is IS NULL ON CONFLICT DO NOTHING`),
		claim: on(`SELECT u.place, t.version, t.state, t.ctid, clock_timestamp() FROM unnest((SELECT $1::bytea[])) WITH ORDINALITY AS u (id, place)
			CROSS JOIN LATERAL (SELECT version, state, ctid FROM throttler_state WHERE id = u.id FOR UPDATE) AS t`),
		record: on(`UPDATE throttler_state AS t SET version = u.version, before = u.before, state = u.state, full_at = u.full_at, clocked = u.clocked
			FROM unnest((SELECT $1::bytea[]), (SELECT $2::bigint[]), (SELECT $3::bigint[]), (SELECT $4::bytea[]), (SELECT $5::bigint[]), (SELECT $6::boolean[]), (SELECT $7::tid[]))
				AS u (id, version, before, state, full_at, clocked, ctid)
			WHERE t.ctid = u.ctid AND t.id IS NOT DISTINCT FROM u.id`),
		sweep: on(`WITH clock AS MATERIALIZED (SELECT (1000000 * extract(epoch FROM clock_timestamp()))::bigint AS now),
			near AS MATERIALIZED (SELECT id, version, full_at, clocked FROM throttler_state WHERE id > $1 ORDER BY id LIMIT $2),
			found AS MATERIALIZED (
				SELECT id FROM near, clock
				WHERE CASE WHEN clocked THEN full_at <= $5 AND version <= $6 AND id >= $3 AND id < $4 ELSE full_at <= now END),
			gone AS MATERIALIZED (
				SELECT t.id FROM throttler_state AS t JOIN found USING (id), clock
				WHERE CASE WHEN t.clocked THEN t.full_at <= $5 AND t.version <= $6 ELSE t.full_at <= now END
				FOR UPDATE OF t SKIP LOCKED),
			deleted AS (DELETE FROM throttler_state AS t USING gone WHERE t.id = gone.id RETURNING t.id)
			SELECT (SELECT count(*) FROM deleted), (SELECT id FROM near ORDER BY id OFFSET $2 - 1)`),
	}
}

// install executes the schema unless the comment on the table says that it has been. One process at a time
// does. Where no Schema was given it becomes that in which the table is, or will be.
func (s *Storage) install(ctx context.Context) error {
	type querier interface {
		QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
	}
	done := func(q querier) (bool, error) {
		var schema, version *string
		err := q.QueryRow(ctx, `SELECT coalesce(n.nspname, current_schema()), obj_description(c.oid, 'pg_class')
			FROM (SELECT to_regclass($1) AS oid) AS t LEFT JOIN pg_class AS c USING (oid) LEFT JOIN pg_namespace AS n ON n.oid = c.relnamespace`,
			s.options.table()).Scan(&schema, &version)
		if s.options.Schema == "" && schema != nil {
			s.options.Schema = *schema
		}
		return version != nil && *version == schemaVersion, err
	}
	if ok, err := done(s.pool); ok || err != nil {
		return wrap(ctx, err)
	}
	return wrap(ctx, pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock(8270132754410527301)"); err != nil {
			return err
		}
		if ok, err := done(tx); ok || err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "SET LOCAL client_min_messages = warning;\n"+Schema(&s.options))
		return err
	}))
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
