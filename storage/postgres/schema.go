package postgres

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/go-throttler/throttler/storage"
)

//go:embed schema.sql
var schemaSQL string

// Schema returns the SQL that New executes: one table, for people who do that by migrations of their own
// (Options.NoSchema). It may be executed any number of times.
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

// table is its name, quoted.
func (o *Options) table() string {
	if o.Schema == "" {
		return pgx.Identifier{o.TablePrefix + "_state"}.Sanitize()
	}
	return pgx.Identifier{o.Schema, o.TablePrefix + "_state"}.Sanitize()
}

// statements are the SQL of a flight.
type statements struct {
	read, insert, update, recall, one, blank, lock, free, sweep string
	absent, claim, record                                       string // those of a Record
}

// clock is the server's, in microseconds since the epoch. Times are numbers, which are written alike whatever is set.
const clock = `(1000000 * extract(epoch FROM clock_timestamp()))::bigint`

// Each parameter has a cast, as in the simple protocol nothing else says of what type it is.
//
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
		read: on(`SELECT u.place, coalesce(t.version, 0), t.state, ` + clock + ` FROM unnest((SELECT $1::bytea[])) WITH ORDINALITY AS u (id, place)
			LEFT JOIN LATERAL (SELECT version, state FROM throttler_state WHERE id = u.id OFFSET 0) AS t ON true`),
		insert: on(rows + `ON CONFLICT DO NOTHING RETURNING id`),
		update: on(update + `RETURNING id`),
		recall: on(update + `AND ` + clock + ` - $7::bigint BETWEEN -1000 AND 5000 RETURNING id`),
		one: on(`UPDATE throttler_state SET version = $2::bigint, before = $3::bigint, state = $4::bytea, full_at = $5::bigint, clocked = $6::boolean
			WHERE id = $1::bytea AND version = $3::bigint AND ($7::bigint IS NULL OR ` + clock + ` - $7::bigint BETWEEN -1000 AND 5000)`),
		blank: on(`INSERT INTO throttler_state (id, version, before, state, full_at, clocked)
			SELECT id, ` + clock + `, 0, '', 0, false FROM unnest($1::bytea[]) AS id ON CONFLICT DO NOTHING`),
		lock: on(`SELECT u.place, t.version, t.state, ` + clock + ` FROM unnest($1::bytea[]) WITH ORDINALITY AS u (id, place)
			CROSS JOIN LATERAL (SELECT version, state FROM throttler_state WHERE id = u.id FOR UPDATE) AS t`),
		free: on(`SELECT u.place FROM unnest($1::bytea[]) WITH ORDINALITY AS u (id, place)
			CROSS JOIN LATERAL (SELECT FROM throttler_state WHERE id = u.id FOR UPDATE SKIP LOCKED) AS t`),
		absent: on(`INSERT INTO throttler_state (id, version, before, state, full_at, clocked)
			SELECT u.id, ` + clock + `, 0, '', 0, false FROM unnest((SELECT $1::bytea[])) AS u (id)
				LEFT JOIN LATERAL (SELECT true AS is FROM throttler_state WHERE id = u.id OFFSET 0) AS there ON true
			WHERE there.is IS NULL ON CONFLICT DO NOTHING`),
		claim: on(`SELECT u.place, t.version, t.state, t.ctid, ` + clock + ` FROM unnest((SELECT $1::bytea[])) WITH ORDINALITY AS u (id, place)
			CROSS JOIN LATERAL (SELECT version, state, ctid FROM throttler_state WHERE id = u.id FOR UPDATE) AS t`),
		record: on(`UPDATE throttler_state AS t SET version = u.version, before = u.before, state = u.state, full_at = u.full_at, clocked = u.clocked
			FROM unnest((SELECT $1::bytea[]), (SELECT $2::bigint[]), (SELECT $3::bigint[]), (SELECT $4::bytea[]), (SELECT $5::bigint[]), (SELECT $6::boolean[]), (SELECT $7::tid[]))
				AS u (id, version, before, state, full_at, clocked, ctid)
			WHERE t.ctid = u.ctid AND t.id IS NOT DISTINCT FROM u.id`),
		sweep: on(`WITH clock AS MATERIALIZED (SELECT ` + clock + ` AS now),
			near AS MATERIALIZED (SELECT id, version, full_at, clocked FROM throttler_state WHERE id > $1::bytea ORDER BY id LIMIT $2::bigint),
			found AS MATERIALIZED (
				SELECT id FROM near, clock
				WHERE CASE WHEN clocked THEN full_at <= $5::bigint AND version <= $6::bigint AND id >= $3::bytea AND id < $4::bytea ELSE full_at <= now END),
			gone AS MATERIALIZED (
				SELECT t.id FROM throttler_state AS t JOIN found USING (id), clock
				WHERE CASE WHEN t.clocked THEN t.full_at <= $5::bigint AND t.version <= $6::bigint ELSE t.full_at <= now END
				FOR UPDATE OF t SKIP LOCKED),
			deleted AS (DELETE FROM throttler_state AS t USING gone WHERE t.id = gone.id RETURNING t.id)
			SELECT (SELECT count(*) FROM deleted), (SELECT id FROM near ORDER BY id OFFSET $2::bigint - 1)`),
	}
}

// install executes the schema unless the table is there. One process at a time does. Where no Schema was given it
// becomes that in which the table is, or will be.
func (s *Storage) install(ctx context.Context) error {
	there, err := s.find(ctx)
	if there || err != nil {
		return err
	}
	// Statements that are sent at once are one transaction, also where a pooler lets nobody begin one.
	_, failed := s.pool.Exec(ctx, "SELECT pg_advisory_xact_lock(8270132754410527301);\nSET LOCAL client_min_messages = warning;\n"+Schema(&s.options))
	if there, err = s.find(ctx); there || err != nil {
		return err // also if another process was first, and this one may not create it
	}
	return wrap(ctx, failed)
}

// shape are the columns of the table by name, and the one that is unique.
const shape = "before int8, clocked bool, full_at int8, id bytea, state bytea, version int8, unique id"

// kinds of what may have the name of a table.
var kinds = map[string]string{
	"r": "a table", "p": "a partitioned table", "f": "a foreign table", "v": "a view", "m": "a materialized view",
	"i": "an index", "I": "an index", "S": "a sequence", "c": "a type",
}

// find reports whether the table is there. What has its name and is none of ours is an error, and left alone.
func (s *Storage) find(ctx context.Context) (there bool, err error) {
	var schema, kind, found *string
	err = s.query(ctx, `SELECT coalesce(n.nspname, current_schema())::text, c.relkind::text, concat_ws(', ',
			(SELECT string_agg(concat_ws(' ', a.attname, t.typname, CASE WHEN a.attgenerated <> '' OR a.attidentity <> '' THEN 'generated' END), ', ' ORDER BY a.attname)
				FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
			(SELECT 'unique ' || min(a.attname::text) FROM pg_index AS i JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
				WHERE i.indrelid = c.oid AND i.indisunique AND i.indimmediate AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts = 1 AND a.attname = 'id'))
		FROM (SELECT to_regclass($1::text) AS oid) AS r LEFT JOIN pg_class AS c USING (oid) LEFT JOIN pg_namespace AS n ON n.oid = c.relnamespace`,
		s.options.table(), func(r pgx.Rows) error {
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
