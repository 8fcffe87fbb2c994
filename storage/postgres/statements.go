package postgres

import "strings"

// All SQL but the schema. Each statement says why it has its shape. What goes for all:
//
//   - Each parameter has a cast. In the simple protocol nothing else says of which type it is.
//   - Arrays are in subselects where the plan is reused. Otherwise Postgres sees how long they are, and plans anew for
//     another length.
//   - Rows are looked up by LATERAL joins with OFFSET 0 or FOR UPDATE, which Postgres does not flatten. That forces an index
//     lookup per id, whatever the planner believes about the table's size: a new table has no statistics yet.
//   - Arrays of ids are sorted, and a nested loop keeps their order. So rows are locked in one order by all.
//   - Times are microseconds since the epoch: numbers, which are written alike whatever DateStyle and TimeZone are.

// clock is the server's time. It goes on within a transaction, unlike now().
const clock = `(1000000 * extract(epoch FROM clock_timestamp()))::bigint`

// statements are those that name the table.
type statements struct {
	read, insert, update, recall, one string // of a batch
	blank, lock, free                 string // of contended calls
	absent, claim, record             string // of a Record
	sweep                             string
}

func statementsOf(o *Options) statements {
	on := func(sql string) string { return strings.ReplaceAll(sql, "throttler_state", o.table()) }
	return statements{
		read: on(sqlRead), insert: on(sqlInsert), update: on(sqlUpdate), recall: on(sqlRecall), one: on(sqlOne),
		blank: on(sqlBlank), lock: on(sqlLock), free: on(sqlFree),
		absent: on(sqlAbsent), claim: on(sqlClaim), record: on(sqlRecord),
		sweep: on(sqlSweep),
	}
}

// sqlRead reads rows by their ids, and the clock. It locks nothing. A row that is not there has version 0. The place is that
// of the id in the array, which saves sending the ids back.
const sqlRead = `SELECT u.place, coalesce(t.version, 0), t.state, ` + clock + `
	FROM unnest((SELECT $1::bytea[])) WITH ORDINALITY AS u (id, place)
	LEFT JOIN LATERAL (SELECT version, state FROM throttler_state WHERE id = u.id OFFSET 0) AS t ON true`

const sqlRows = `INSERT INTO throttler_state AS t (id, version, before, state, full_at, clocked)
	SELECT u.*
	FROM unnest((SELECT $1::bytea[]), (SELECT $2::bigint[]), (SELECT $3::bigint[]), (SELECT $4::bytea[]), (SELECT $5::bigint[]), (SELECT $6::boolean[]))
		AS u (id, version, before, state, full_at, clocked) `

// sqlInsert writes rows that were not there when they were read. One that is there by now is left alone and not returned.
const sqlInsert = sqlRows + `ON CONFLICT DO NOTHING RETURNING id`

// sqlUpdate writes rows that still have the version that was read, and returns their ids. It is an INSERT because an UPDATE of
// a join may lock the rows in any order, and two batches then deadlock. The LATERAL join leaves out rows that are gone by
// now: an INSERT would bring back what a Reset has removed.
const sqlUpdate = sqlReplace + `RETURNING id`

const sqlReplace = sqlRows + `CROSS JOIN LATERAL (SELECT FROM throttler_state WHERE id = u.id OFFSET 0) AS there
	ON CONFLICT (id) DO UPDATE SET version = EXCLUDED.version, before = EXCLUDED.before, state = EXCLUDED.state,
		full_at = EXCLUDED.full_at, clocked = EXCLUDED.clocked
	WHERE t.version = EXCLUDED.before `

// sqlRecall is sqlUpdate for a batch that read nothing. The server also checks the time that the process has estimated, to
// 1 ms before and 5 ms after.
const sqlRecall = sqlReplace + `AND ` + clock + ` - $7::bigint BETWEEN -1000 AND 5000 RETURNING id`

// sqlOne is sqlUpdate or sqlRecall, by whether $7 is null, for one row, in half of the server's time.
const sqlOne = `UPDATE throttler_state SET version = $2::bigint, before = $3::bigint, state = $4::bytea, full_at = $5::bigint, clocked = $6::boolean
	WHERE id = $1::bytea AND version = $3::bigint AND ($7::bigint IS NULL OR ` + clock + ` - $7::bigint BETWEEN -1000 AND 5000)`

// sqlBlank makes rows that are missing, so that sqlLock has something to lock. The conflict with a row that is there takes no
// lock; it waits for a transaction that inserts the same id.
const sqlBlank = `INSERT INTO throttler_state (id, version, before, state, full_at, clocked)
	SELECT id, ` + clock + `, 0, '', 0, false FROM unnest($1::bytea[]) AS id ON CONFLICT DO NOTHING`

// sqlLock locks rows in the order of their ids and reads what is there then, not when the statement began. A row that a sweep
// removed since sqlBlank is not returned, and the transaction begins again.
const sqlLock = `SELECT u.place, t.version, t.state, ` + clock + ` FROM unnest($1::bytea[]) WITH ORDINALITY AS u (id, place)
	CROSS JOIN LATERAL (SELECT version, state FROM throttler_state WHERE id = u.id FOR UPDATE) AS t`

// sqlFree tells after a lock timeout which rows nobody locks. The server does not say for which row it waited.
const sqlFree = `SELECT u.place FROM unnest($1::bytea[]) WITH ORDINALITY AS u (id, place)
	CROSS JOIN LATERAL (SELECT FROM throttler_state WHERE id = u.id FOR UPDATE SKIP LOCKED) AS t`

// sqlAbsent is sqlBlank for batches of thousands of rows, most of which are there: a lookup is cheaper than an insertion that
// conflicts.
const sqlAbsent = `INSERT INTO throttler_state (id, version, before, state, full_at, clocked)
	SELECT u.id, ` + clock + `, 0, '', 0, false FROM unnest((SELECT $1::bytea[])) AS u (id)
		LEFT JOIN LATERAL (SELECT true AS is FROM throttler_state WHERE id = u.id OFFSET 0) AS there ON true
	WHERE there.is IS NULL ON CONFLICT DO NOTHING`

// sqlClaim is sqlLock that also returns where the rows are: a locked row keeps its ctid.
const sqlClaim = `SELECT u.place, t.version, t.state, t.ctid, ` + clock + ` FROM unnest((SELECT $1::bytea[])) WITH ORDINALITY AS u (id, place)
	CROSS JOIN LATERAL (SELECT version, state, ctid FROM throttler_state WHERE id = u.id FOR UPDATE) AS t`

// sqlRecord writes rows that sqlClaim has locked, by their ctid and so without the index. In any order: they are locked. The
// comparison of ids is no equality, or Postgres might look up the ids instead.
const sqlRecord = `UPDATE throttler_state AS t SET version = u.version, before = u.before, state = u.state, full_at = u.full_at, clocked = u.clocked
	FROM unnest((SELECT $1::bytea[]), (SELECT $2::bigint[]), (SELECT $3::bigint[]), (SELECT $4::bytea[]), (SELECT $5::bigint[]), (SELECT $6::boolean[]), (SELECT $7::tid[]))
		AS u (id, version, before, state, full_at, clocked, ctid)
	WHERE t.ctid = u.ctid AND t.id IS NOT DISTINCT FROM u.id`

// sqlSweep examines the next $2 rows after $1, and removes those that are full. It returns how many, and the last row
// examined, null at the end of the table. Rows by a client's clock count only for the throttler ($3, $4) and the time ($5)
// of the call, and if they were not written after $6.
//
// It has three steps because the row that a lock finally gets may be newer than the one that was found: gone checks again
// what it has locked, and SKIP LOCKED waits for nobody. The CTEs are MATERIALIZED, so that each runs once and LIMIT counts
// what was examined, not what was found.
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

// sqlBegin is for transactions that wait for a lock and then read what others have committed. Under a stricter isolation, which
// may be the default, they would be rolled back instead.
const sqlBegin = "BEGIN ISOLATION LEVEL READ COMMITTED"

// sqlSettings lasts for the rest of the transaction, which a pipelined batch is without BEGIN, too. So a pooler may give the
// connection to somebody else afterwards.
const sqlSettings = `SELECT set_config('lock_timeout', $1::text, true), set_config('statement_timeout', $2::text, true),
	set_config('idle_in_transaction_session_timeout', $2::text, true), CASE WHEN $3::text <> '' THEN set_config('synchronous_commit', $3::text, true) END`

// sqlNoScan is for sqlRecord: while Postgres knows little of the table's size it would rather read all of it.
const sqlNoScan = "SET LOCAL enable_seqscan = off"

// sqlInstall comes before the schema in one exchange, which is one transaction also where a pooler allows no BEGIN. The lock lets
// one process at a time create the table: CREATE TABLE IF NOT EXISTS fails if two of them race.
const sqlInstall = "SELECT pg_advisory_xact_lock(8270132754410527301);\nSET LOCAL client_min_messages = warning;\n"

// sqlFind says what has the name of the table: its schema, its kind, its columns and whether id is unique, in a form that
// compares with shape. It asks the catalogs because information_schema hides what the role may not use.
const sqlFind = `SELECT coalesce(n.nspname, current_schema())::text, c.relkind::text, concat_ws(', ',
		(SELECT string_agg(concat_ws(' ', a.attname, t.typname, CASE WHEN a.attgenerated <> '' OR a.attidentity <> '' THEN 'generated' END), ', ' ORDER BY a.attname)
			FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
		(SELECT 'unique ' || min(a.attname::text) FROM pg_index AS i JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
			WHERE i.indrelid = c.oid AND i.indisunique AND i.indimmediate AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts = 1 AND a.attname = 'id'))
	FROM (SELECT to_regclass($1::text) AS oid) AS r LEFT JOIN pg_class AS c USING (oid) LEFT JOIN pg_namespace AS n ON n.oid = c.relnamespace`
