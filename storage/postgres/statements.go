package postgres

import (
	"strings"
)

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

// begin is for what waits for a lock and then reads what others have committed.
const begin = "BEGIN ISOLATION LEVEL READ COMMITTED"

// setSettings is for the rest of a transaction, which a batch is.
const setSettings = `SELECT set_config('lock_timeout', $1::text, true), set_config('statement_timeout', $2::text, true),
	set_config('idle_in_transaction_session_timeout', $2::text, true), CASE WHEN $3::text <> '' THEN set_config('synchronous_commit', $3::text, true) END`

// noScan is for an update of rows whose places are known, while Postgres knows little of the size of the table.
const noScan = "SET LOCAL enable_seqscan = off"
