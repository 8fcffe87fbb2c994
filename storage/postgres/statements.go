package postgres

import "strings"

// This file has all SQL except the schema. Each statement has a comment on its form. These points apply to all of them:
//
//   - Each parameter has a cast. In the simple protocol nothing else tells its type.
//   - In statements whose plan is reused, arrays are in subselects. Otherwise Postgres sees their length and makes
//     another plan for another length.
//   - Rows are looked up by LATERAL joins with OFFSET 0 or FOR UPDATE, which Postgres does not flatten. That forces an
//     index lookup for each id, whatever the planner believes about the table's size: a new table has no statistics.
//   - Arrays of ids are sorted, and the nested loop keeps their order. So all statements lock rows in the same order.
//   - Times are microseconds since the epoch: integers, whose text does not depend on DateStyle or TimeZone.

// clock is the server's time in microseconds. Unlike now() it advances within a transaction.
const clock = `(1000000 * extract(epoch FROM clock_timestamp()))::bigint`

// statements has the statements that name the table.
type statements struct {
	read, insert, update, recall, one string // of a batch
	blank, lock, free                 string // of contended calls
	absent, claim, record             string // of a Record
	sweep                             string
}

// statementsOf returns the statements for the table of o.
func statementsOf(o *Options) statements {
	on := func(sql string) string { return strings.ReplaceAll(sql, "throttler_state", o.table()) }
	return statements{
		read: on(sqlRead), insert: on(sqlInsert), update: on(sqlUpdate), recall: on(sqlRecall), one: on(sqlOne),
		blank: on(sqlBlank), lock: on(sqlLock), free: on(sqlFree),
		absent: on(sqlAbsent), claim: on(sqlClaim), record: on(sqlRecord),
		sweep: on(sqlSweep),
	}
}

// sqlRead reads rows by their ids, and the clock. It locks nothing. A missing row has version 0. The answer has the
// place of each id in the array ($1) instead of the id, which is shorter.
const sqlRead = `SELECT u.place, coalesce(t.version, 0), t.state, ` + clock + `
	FROM unnest((SELECT $1::bytea[])) WITH ORDINALITY AS u (id, place)
	LEFT JOIN LATERAL (SELECT version, state FROM throttler_state WHERE id = u.id OFFSET 0) AS t ON true`

// sqlRows begins the statements that write rows: one array for each column.
const sqlRows = `INSERT INTO throttler_state AS t (id, version, before, state, full_at, clocked)
	SELECT u.*
	FROM unnest((SELECT $1::bytea[]), (SELECT $2::bigint[]), (SELECT $3::bigint[]), (SELECT $4::bytea[]), (SELECT $5::bigint[]), (SELECT $6::boolean[]))
		AS u (id, version, before, state, full_at, clocked) `

// sqlInsert writes rows that did not exist when they were read, and returns their ids. A row that exists by now is left
// alone and not returned.
const sqlInsert = sqlRows + `ON CONFLICT DO NOTHING RETURNING id`

// sqlUpdate writes the rows that still have the version that was read, and returns their ids. It is an INSERT because
// an UPDATE of a join may lock rows in any order, and then two batches can deadlock. The LATERAL join leaves out rows
// that no longer exist: the INSERT would bring back what was deleted.
const sqlUpdate = sqlReplace + `RETURNING id`

// sqlReplace is sqlUpdate without its end.
const sqlReplace = sqlRows + `CROSS JOIN LATERAL (SELECT FROM throttler_state WHERE id = u.id OFFSET 0) AS there
	ON CONFLICT (id) DO UPDATE SET version = EXCLUDED.version, before = EXCLUDED.before, state = EXCLUDED.state,
		full_at = EXCLUDED.full_at, clocked = EXCLUDED.clocked
	WHERE t.version = EXCLUDED.before `

// sqlRecall is sqlUpdate for a batch that read nothing. The server also checks the estimate of its time ($7): its
// clock must be at most 1 ms before and 5 ms after the estimate.
const sqlRecall = sqlReplace + `AND ` + clock + ` - $7::bigint BETWEEN -1000 AND 5000 RETURNING id`

// sqlOne writes one row in half of the server's time: like sqlUpdate if $7 is null, and otherwise like sqlRecall.
const sqlOne = `UPDATE throttler_state SET version = $2::bigint, before = $3::bigint, state = $4::bytea, full_at = $5::bigint, clocked = $6::boolean
	WHERE id = $1::bytea AND version = $3::bigint AND ($7::bigint IS NULL OR ` + clock + ` - $7::bigint BETWEEN -1000 AND 5000)`

// sqlBlank inserts missing rows, so that sqlLock has something to lock. A conflict with an existing row takes no
// lock, but it waits for a transaction that is inserting the same id.
const sqlBlank = `INSERT INTO throttler_state (id, version, before, state, full_at, clocked)
	SELECT id, ` + clock + `, 0, '', 0, false FROM unnest($1::bytea[]) AS id ON CONFLICT DO NOTHING`

// sqlLock locks rows in the order of their ids. It reads each row after its lock was granted, and not as it was when
// the statement began. A row that a sweep removed after sqlBlank is not returned, and the transaction begins again.
const sqlLock = `SELECT u.place, t.version, t.state, ` + clock + ` FROM unnest($1::bytea[]) WITH ORDINALITY AS u (id, place)
	CROSS JOIN LATERAL (SELECT version, state FROM throttler_state WHERE id = u.id FOR UPDATE) AS t`

// sqlFree returns the places of the rows that are not locked. It is for use after a lock timeout, because the server
// does not say for which row it waited. A missing row is not returned.
const sqlFree = `SELECT u.place FROM unnest($1::bytea[]) WITH ORDINALITY AS u (id, place)
	CROSS JOIN LATERAL (SELECT FROM throttler_state WHERE id = u.id FOR UPDATE SKIP LOCKED) AS t`

// sqlAbsent is sqlBlank for batches of thousands of rows that mostly exist: a lookup is cheaper than an insertion that
// conflicts.
const sqlAbsent = `INSERT INTO throttler_state (id, version, before, state, full_at, clocked)
	SELECT u.id, ` + clock + `, 0, '', 0, false FROM unnest((SELECT $1::bytea[])) AS u (id)
		LEFT JOIN LATERAL (SELECT true AS is FROM throttler_state WHERE id = u.id OFFSET 0) AS there ON true
	WHERE there.is IS NULL ON CONFLICT DO NOTHING`

// sqlClaim is sqlLock, and also returns the ctid of each row: its place, which it keeps as long as it is locked.
const sqlClaim = `SELECT u.place, t.version, t.state, t.ctid, ` + clock + ` FROM unnest((SELECT $1::bytea[])) WITH ORDINALITY AS u (id, place)
	CROSS JOIN LATERAL (SELECT version, state, ctid FROM throttler_state WHERE id = u.id FOR UPDATE) AS t`

// sqlRecord writes rows that sqlClaim has locked. It finds them by their ctid, without the index. It may write them
// in any order, because they are locked already. The ids are compared by IS NOT DISTINCT FROM: with = Postgres might
// look up the ids instead.
const sqlRecord = `UPDATE throttler_state AS t SET version = u.version, before = u.before, state = u.state, full_at = u.full_at, clocked = u.clocked
	FROM unnest((SELECT $1::bytea[]), (SELECT $2::bigint[]), (SELECT $3::bigint[]), (SELECT $4::bytea[]), (SELECT $5::bigint[]), (SELECT $6::boolean[]), (SELECT $7::tid[]))
		AS u (id, version, before, state, full_at, clocked, ctid)
	WHERE t.ctid = u.ctid AND t.id IS NOT DISTINCT FROM u.id`

// sqlSweep examines the next $2 rows after $1 and removes those that are full. It returns how many it removed, and
// the last row that it examined, or null at the end of the table. A row with a client's clock is removed only if it
// belongs to the throttler of the call ($3, $4), is full at the time of the call ($5), and was not written after $6.
//
// It finds, locks and deletes in three steps because the version that a lock gets may be newer than the one that was
// found. So gone checks the condition again on what it has locked. SKIP LOCKED makes it wait for no lock. The CTEs
// are MATERIALIZED, so that each runs once, and LIMIT counts the rows that were examined and not those that were
// found.
const sqlSweep = `WITH clock AS MATERIALIZED (SELECT ` + clock + ` AS now),
	near AS MATERIALIZED (SELECT id, version, full_at, clocked FROM throttler_state WHERE id > $1::bytea ORDER BY id LIMIT $2::bigint),
	found AS MATERIALIZED (
		SELECT id FROM near, clock
		WHERE CASE WHEN clocked THEN full_at <= $5::bigint AND version <= $6::bigint AND id >= $3::bytea AND id < $4::bytea ELSE full_at <= now END),
	gone AS MATERIALIZED (
		SELECT t.id FROM throttler_state AS t JOIN found USING (id), clock
		WHERE CASE WHEN t.clocked THEN t.full_at <= $5::bigint AND t.version <= $6::bigint ELSE t.full_at <= now END
		FOR UPDATE OF t SKIP LOCKED),
	deleted AS (DELETE FROM throttler_state AS t USING gone WHERE t.id = gone.id RETURNING t.id)
	SELECT (SELECT count(*) FROM deleted), (SELECT id FROM near ORDER BY id OFFSET $2::bigint - 1)`

// sqlBegin begins transactions that wait for a lock and then read what others have committed. With a stricter isolation
// level, which may be the default, Postgres would roll them back instead.
const sqlBegin = "BEGIN ISOLATION LEVEL READ COMMITTED"

// sqlSettings has an effect until the end of the transaction. A pipelined batch is one transaction even without
// BEGIN. So the connection is as before when a pooler gives it to another client.
const sqlSettings = `SELECT set_config('lock_timeout', $1::text, true), set_config('statement_timeout', $2::text, true),
	set_config('idle_in_transaction_session_timeout', $2::text, true), CASE WHEN $3::text <> '' THEN set_config('synchronous_commit', $3::text, true) END`

// sqlNoScan is for sqlRecord: while Postgres has few statistics of the table it would read all of it.
const sqlNoScan = "SET LOCAL enable_seqscan = off"

// sqlInstall precedes the schema in the same message, which is one transaction even if a pooler allows no BEGIN. The
// advisory lock lets one process at a time create the table, because CREATE TABLE IF NOT EXISTS fails if two race.
const sqlInstall = "SELECT pg_advisory_xact_lock(8270132754410527301);\nSET LOCAL client_min_messages = warning;\n"

// sqlFind describes the relation that has the name of the table: its schema, its kind, and its columns and whether id
// is unique, in the form of shape. It reads the catalogs because information_schema hides what the role may not use.
const sqlFind = `SELECT coalesce(n.nspname, current_schema())::text, c.relkind::text, concat_ws(', ',
		(SELECT string_agg(concat_ws(' ', a.attname, t.typname, CASE WHEN a.attgenerated <> '' OR a.attidentity <> '' THEN 'generated' END), ', ' ORDER BY a.attname)
			FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
		(SELECT 'unique ' || min(a.attname::text) FROM pg_index AS i JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
			WHERE i.indrelid = c.oid AND i.indisunique AND i.indimmediate AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts = 1 AND a.attname = 'id'))
	FROM (SELECT to_regclass($1::text) AS oid) AS r LEFT JOIN pg_class AS c USING (oid) LEFT JOIN pg_namespace AS n ON n.oid = c.relnamespace`
