package postgres_test

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
)

// sqlDo executes statements, and sqlGet returns the only value of a query.
func sqlDo(t testing.TB, pool *pgxpool.Pool, sql string, args ...any) {
	t.Helper()
	_, err := pool.Exec(t.Context(), sql, args...)
	require.NoError(t, err, sql)
}

func sqlGet[T any](t testing.TB, pool *pgxpool.Pool, sql string, args ...any) (v T) {
	t.Helper()
	require.NoError(t, pool.QueryRow(t.Context(), sql, args...).Scan(&v), sql)
	return v
}

// freshID returns an identifier that nobody has used, even on a shared server.
func freshID(t testing.TB) string { return fmt.Sprint(t.Name(), time.Now().UnixNano()) }

// logged returns the first three messages in the server's log with one of the words, such as ERROR.
func logged(t testing.TB, pool *pgxpool.Pool, words string) []string {
	t.Helper()
	log := sqlGet[string](t, pool, "SELECT pg_read_file(current_setting('data_directory') || '/../log')")
	return regexp.MustCompile(`.*(`+words+`): .*(\n.*(DETAIL|CONTEXT): .*(\n\t.*)*)*`).FindAllString(log, 3)
}

// writers returns the number that the next transaction gets which writes or locks a row. Other transactions get no
// number, so the difference of two results counts those.
func writers(t testing.TB, pool *pgxpool.Pool) int64 {
	t.Helper()
	return sqlGet[int64](t, pool, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
}

// holder is a transaction of another client that has locked or written the row of an identifier.
type holder struct {
	pool *pgxpool.Pool
	tx   pgx.Tx
}

const (
	lockIt  = "SELECT FROM throttler_state WHERE id = $1 FOR UPDATE"
	writeIt = "UPDATE throttler_state SET version = version + 1 WHERE id = $1"
)

// hold executes a statement in a new transaction, which stays open.
func hold(t testing.TB, pool *pgxpool.Pool, sql string, arg any) holder {
	t.Helper()
	tx, err := pool.Begin(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { _ = tx.Rollback(context.Background()) })
	tag, err := tx.Exec(t.Context(), sql, arg)
	require.NoError(t, err)
	require.Equal(t, int64(1), tag.RowsAffected())
	return holder{pool, tx}
}

// awaited returns when n transactions wait for this one.
func (h holder) awaited(t testing.TB, n int) {
	t.Helper()
	const waiters = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND $1 = ANY (pg_blocking_pids(pid))"
	storecheck.Recovery(t, storecheck.Patient, func() error {
		if got := sqlGet[int](t, h.pool, waiters, int32(h.tx.Conn().PgConn().PID())); got < n {
			return fmt.Errorf("%d wait", got)
		}
		return nil
	})
}

// commit ends the transaction.
func (h holder) commit(t testing.TB) {
	t.Helper()
	require.NoError(t, h.tx.Commit(t.Context()))
}

// awaitCount returns when n has reached want.
func awaitCount(t testing.TB, n *atomic.Int64, want int64) {
	t.Helper()
	storecheck.Recovery(t, storecheck.Patient, func() error {
		if got := n.Load(); got < want {
			return fmt.Errorf("it is %d", got)
		}
		return nil
	})
}

// limits returns two limits, the smaller one first.
func limits(t testing.TB, kind law.Kind) []law.Rule {
	t.Helper()
	return []law.Rule{storecheck.Rule(t, "600/1h", kind, time.Hour, 600), storecheck.Rule(t, "630/1d", kind, 24*time.Hour, 630)}
}

var twoKinds = []law.Kind{law.Replenish, law.SlidingLog}

// burst lets 50 goroutines ask four times each, for limits of each of twoKinds, and returns how many calls were
// admitted.
func burst(t testing.TB, s *pgstore.Storage, id string) (admitted []int64) {
	t.Helper()
	for i, kind := range twoKinds {
		var all storecheck.Told
		r := storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart(fmt.Sprint(id, i), limits(t, kind), 1)}}
		storecheck.Crowd(50, func(int) {
			for range 4 {
				assert.NoError(t, all.Ask(s, r))
			}
		})
		admitted = append(admitted, all.Admitted.Load())
	}
	return admitted
}

// workerID is the environment variable with the identifier for which a worker asks.
const workerID = "THROTTLER_TEST_WORKER_ID"

// TestOneOfFourProcesses is executed by the next test in processes of their own, which begin at the same moment.
// Without the environment variable it runs alone.
func TestOneOfFourProcesses(t *testing.T) {
	t.Parallel()
	pool, id := connect(t, servers.PostgresURL(t)), cmp.Or(os.Getenv(workerID), freshID(t))
	s := open(t, pool, pgstore.Options{TablePrefix: "shared"})
	sqlDo(t, pool, "SELECT pg_advisory_lock_shared(hashtext($1))", id)
	admitted := burst(t, s, id)
	t.Log("admitted", admitted[0], admitted[1])
	if os.Getenv(workerID) == "" {
		assert.Equal(t, []int64{200, 200}, admitted)
	}
}

func TestFourProcessesShareTwoLimitsExactly(t *testing.T) {
	t.Parallel()
	url, id := servers.PostgresURL(t), freshID(t)
	pool := connect(t, url)
	s := open(t, pool, pgstore.Options{TablePrefix: "shared"})
	program, err := os.Executable()
	require.NoError(t, err)
	start := hold(t, pool, "SELECT pg_advisory_xact_lock(hashtext($1))", id)
	var sum [2]atomic.Int64
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			worker := exec.CommandContext(t.Context(), program, "-test.run=^TestOneOfFourProcesses$", "-test.v")
			worker.Env = append(os.Environ(), "THROTTLER_POSTGRES_URL="+url, workerID+"="+id)
			out, err := worker.CombinedOutput()
			assert.NoError(t, err, string(out))
			_, admitted, _ := strings.Cut(string(out), "admitted ")
			var a, b int64
			_, err = fmt.Sscan(admitted, &a, &b)
			assert.NoError(t, err, string(out))
			t.Log(a, b)
			sum[0].Add(a)
			sum[1].Add(b)
		})
	}
	start.awaited(t, 4)
	start.commit(t)
	all.Wait()
	for i, kind := range twoKinds {
		rules := limits(t, kind)
		slices.Reverse(rules)
		assert.Equal(t, int64(600), sum[i].Load(), kind)
		assert.Equal(t, int64(600), storecheck.Spent(t, s, storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart(fmt.Sprint(id, i), rules, 1)}}), kind)
	}
}

func TestRacingFirstCallsOfAnIdentifierAreAdmittedUpToTheLimit(t *testing.T) {
	t.Parallel()
	url := servers.PostgresURL(t)
	stores := []*pgstore.Storage{open(t, connect(t, url), pgstore.Options{TablePrefix: "shared"}), open(t, connect(t, url), pgstore.Options{TablePrefix: "shared"})}
	for range 10 {
		var all storecheck.Told
		r := storecheck.Hourly(t, freshID(t), 57)
		storecheck.Crowd(200, func(i int) { assert.NoError(t, all.Ask(stores[i%2], r)) })
		assert.Equal(t, int64(57), all.Admitted.Load())
		assert.Equal(t, int64(57), storecheck.Spent(t, stores[0], r))
	}
}

// chargeOne returns a charge of one token from the only bucket of r, and owesOne the same as a debt.
func chargeOne(r storecheck.Request) storage.Charge {
	return storage.Charge{Identifier: r.Parts[0].Identifier, Rules: r.Parts[0].Rules, Amounts: []storage.Amount{{N: 1, In: time.Hour.Microseconds()}}}
}

// charge is s.Charge for a value.
func charge(ctx context.Context, s storage.Storage, c storage.Charge) error { return s.Charge(ctx, &c) }

func owesOne(r storecheck.Request) replica.Debt {
	c := chargeOne(r)
	return replica.Debt{Identifier: c.Identifier, Rules: c.Rules, Amounts: [][]storage.Amount{c.Amounts}}
}

// mixed makes all kinds of calls on two storages, and counts what they took together.
type mixed struct {
	stores [2]*pgstore.Storage
	all    map[string]law.Rule
	sum    map[string]*atomic.Int64
}

func (m *mixed) part(id string) storecheck.Part {
	return storecheck.NewPart(id, []law.Rule{m.all[id]}, 1)
}

func (m *mixed) ask(t testing.TB, s *pgstore.Storage, ids ...string) {
	r := storecheck.Request{Parts: []storecheck.Part{m.part(ids[0])}}
	for _, id := range ids[1:] {
		r.Parts = append(r.Parts, m.part(id))
	}
	if v, err := storecheck.Decide(t.Context(), s, r); assert.NoError(t, err) && v.Allowed {
		for _, id := range ids {
			m.sum[id].Add(1)
		}
	}
}

func (m *mixed) charge(t testing.TB, s *pgstore.Storage, id string) {
	if assert.NoError(t, charge(t.Context(), s, chargeOne(storecheck.Request{Parts: []storecheck.Part{m.part(id)}}))) {
		m.sum[id].Add(1)
	}
}

// Some identifiers have rows from the start, and one is new in each round. One is reset now and then, so its sum is not
// checked.
func TestRequestsOfSeveralIdentifiersInAnyOrderAreExactAndNeverInEachOthersWay(t *testing.T) {
	t.Parallel()
	server := servers.Postgres(t)
	pool := connect(t, server.URL())
	m := &mixed{all: map[string]law.Rule{}, sum: map[string]*atomic.Int64{}}
	for i := range m.stores {
		m.stores[i] = open(t, connect(t, server.URL()), pgstore.Options{})
	}
	const rounds = 12
	news := func(round int) string { return fmt.Sprint("m", round) }
	add := func(id string, n int64) {
		m.all[id], m.sum[id] = storecheck.Rule(t, "r", law.Replenish, time.Hour, n), new(atomic.Int64)
	}
	for _, id := range []string{"a", "b", "forgotten", "y", "z"} {
		add(id, 1_000_000)
		m.ask(t, m.stores[0], id)
	}
	add("few", 100)
	for round := range rounds {
		add(news(round), 1_000_000)
	}
	storecheck.Crowd(72, func(i int) {
		s := m.stores[i%2]
		for round := range rounds {
			switch id := news(round); (i/2 + round) % 9 {
			case 0:
				m.ask(t, s, "a", "b", id, "few", "z")
			case 1:
				m.ask(t, s, "z", "few", id, "b", "a")
			case 2:
				m.ask(t, s, id, "forgotten", "a")
			case 3:
				m.ask(t, s, id)
			case 4:
				m.ask(t, s, "a")
			case 5:
				m.charge(t, s, "a")
			case 6:
				m.charge(t, s, id)
			case 7:
				m.ask(t, s, "b", "y", id)
			case 8:
				assert.NoError(t, s.Reset(t.Context(), "", "forgotten"))
			}
		}
	})
	assert.Equal(t, int64(100), m.sum["few"].Load())
	for id, sum := range m.sum {
		if id != "forgotten" {
			assert.Equal(t, sum.Load(), storecheck.Spent(t, m.stores[0], storecheck.Request{Parts: []storecheck.Part{m.part(id)}}), id)
		}
	}
	assert.Empty(t, logged(t, pool, "ERROR"), "nobody was a victim of a deadlock, not even unseen")
}

// While a request of a and b waits for the row of a, the row of b is removed, as by a sweep, and made again. The
// request has not locked the new row.
func TestARequestOfSeveralIdentifiersIsChargedToAllOfThemWhenARowIsReplaced(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t).URL()+"&pool_max_conns=9")
	s := open(t, pool, pgstore.Options{})
	both, b := storecheck.FivePerHour(t, "a"), storecheck.FivePerHour(t, "b")
	require.Equal(t, 2, storecheck.Take(t, s, both, 1)+storecheck.Take(t, s, b, 1))
	both.Parts = append(both.Parts, b.Parts...)
	ofA := hold(t, pool, lockIt, []byte(":a"))
	var asked storecheck.Told
	done := make(chan error, 1)
	go func() { done <- asked.Ask(s, both) }()
	ofA.awaited(t, 1)
	sqlDo(t, pool, "DELETE FROM throttler_state WHERE id = ':b'")
	require.Equal(t, 1, storecheck.Take(t, s, b, 1))
	ofB := hold(t, pool, writeIt, []byte(":b"))
	ofA.commit(t)
	ofB.awaited(t, 1)
	ofB.commit(t)
	require.NoError(t, <-done)
	require.Equal(t, int64(1), asked.Admitted.Load())
	assert.Equal(t, []int64{2, 2}, []int64{storecheck.Spent(t, s, both), storecheck.Spent(t, s, b)})
}

// A batch of many requests, in all modes, has the same result as the same requests one after another.
func TestABatchOfOneIdentifierIsExact(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t).URL())
	s, hot := open(t, pool, pgstore.Options{}), storecheck.Hourly(t, "hot", 60)
	require.Equal(t, 1, storecheck.Take(t, s, hot, 1))
	held, before := hold(t, pool, lockIt, []byte(":hot")), writers(t, pool)
	type step struct{ left, cost int64 }
	var mu sync.Mutex
	var steps []step
	var begun, last atomic.Int64
	var all sync.WaitGroup
	for i := range 121 {
		r := hot
		r.Mode = []storage.Mode{storage.Take, storage.Take, storage.Peek, storage.Take, storage.Force, storage.Take, storage.Peek}[i%7]
		r.Parts = []storecheck.Part{storecheck.NewPart("hot", hot.Parts[0].Rules.Rules, int64(1+i%3))}
		all.Go(func() {
			begun.Add(1)
			v, err := storecheck.Decide(t.Context(), s, r)
			assert.NoError(t, err)
			cost, left := r.Parts[0].Costs[0], v.Count(0).Remaining
			if !v.Allowed {
				assert.Greater(t, cost, left)
			}
			if v.Taken() {
				mu.Lock()
				defer mu.Unlock()
				steps = append(steps, step{left, cost})
			}
			if v.Taken() && r.Mode == storage.Take && left == 0 {
				last.Add(1)
			}
		})
	}
	awaitCount(t, &begun, 121)
	held.awaited(t, 1)
	held.commit(t)
	all.Wait()
	slices.SortFunc(steps, func(a, b step) int { return cmp.Or(cmp.Compare(b.left, a.left), cmp.Compare(b.cost, a.cost)) })
	sum, left := int64(1), int64(59)
	for _, step := range steps {
		sum, left = sum+step.cost, left-step.cost
		assert.Equal(t, left, step.left)
	}
	assert.LessOrEqual(t, left, int64(0), "the forced ones leave a debt")
	assert.LessOrEqual(t, last.Load(), int64(1), "only forced ones come after the last that fitted")
	assert.Equal(t, sum, storecheck.Spent(t, s, storecheck.Hourly(t, "hot", 1000)))
	assert.Less(t, writers(t, pool)-before, int64(20), "transactions for 121 requests")
}

func TestTwentyProcessesInstallTheSchemaAtOnce(t *testing.T) {
	t.Parallel()
	server := servers.Postgres(t)
	var all storecheck.Told
	storecheck.Crowd(20, func(int) {
		pool, err := pgxpool.New(t.Context(), server.URL())
		if !assert.NoError(t, err) {
			return
		}
		defer pool.Close()
		s, err := pgstore.New(t.Context(), pool, &pgstore.Options{Timeout: storecheck.Patient})
		if assert.NoError(t, err) {
			assert.NoError(t, all.Ask(s, storecheck.FivePerHour(t, "a")))
			assert.NoError(t, s.Close(bg))
		}
	})
	assert.Equal(t, int64(5), all.Admitted.Load())
	assert.Empty(t, logged(t, connect(t, server.URL()), "ERROR"))
}

const commentOf = "SELECT coalesce(obj_description('throttler_state'::regclass, 'pg_class'), 'none')"

func TestACommentOnTheTableIsNobodysBusiness(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t).URL())
	s := open(t, pool, pgstore.Options{})
	require.Equal(t, 3, storecheck.Take(t, s, storecheck.FivePerHour(t, "a"), 3))
	assert.Equal(t, "none", sqlGet[string](t, pool, commentOf))
	for _, comment := range []string{"another", "none"} {
		sqlDo(t, pool, `COMMENT ON TABLE throttler_state IS '`+comment+`'`)
		s = open(t, pool, pgstore.Options{})
		assert.Equal(t, comment, sqlGet[string](t, pool, commentOf))
		assert.Equal(t, int64(3), storecheck.Spent(t, s, storecheck.FivePerHour(t, "a")))
	}
}

// ownColumns has the columns of this package's table, in another order.
const ownColumns = "clocked boolean NOT NULL, id bytea PRIMARY KEY, full_at bigint NOT NULL, state bytea NOT NULL, before bigint NOT NULL, version bigint NOT NULL"

func TestWhatElseHasTheNameOfTheTableIsAnErrorAndLeftAlone(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t, "-c", "fsync=off").URL())
	table := func(columns string) string { return "CREATE TABLE throttler_state (" + columns + ")" }
	without := func(old, now string) string { return table(strings.Replace(ownColumns, old, now, 1)) }
	for what, sql := range map[string]string{
		"a table of somebody else":  table("id int"),
		"a table without columns":   table(""),
		"a column less":             without("before bigint NOT NULL, ", ""),
		"a column more":             table(ownColumns + ", owner text"),
		"a column of another name":  without("full_at", "Full_At_"),
		"a column of another type":  without("clocked boolean", "clocked int"),
		"a smaller number":          without("version bigint", "version int"),
		"a text for a bytea":        without("state bytea", "state text"),
		"an array":                  without("state bytea", "state bytea[]"),
		"a column that is computed": without("before bigint NOT NULL", "before bigint GENERATED ALWAYS AS (version - 1) STORED"),
		"no unique id":              without(" PRIMARY KEY", ""),
		"an id with more":           without(" PRIMARY KEY", "") + "; ALTER TABLE throttler_state ADD PRIMARY KEY (id, version)",
		"an id that may be twice":   without(" PRIMARY KEY", "") + "; CREATE UNIQUE INDEX ON throttler_state (id) WHERE clocked",
		"an id checked later":       without(" PRIMARY KEY", "") + "; ALTER TABLE throttler_state ADD UNIQUE (id) DEFERRABLE",
		"a partitioned table":       table(ownColumns) + " PARTITION BY HASH (id)",
		"a foreign table":           "DROP FOREIGN DATA WRAPPER IF EXISTS w CASCADE; CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w; CREATE FOREIGN TABLE throttler_state (id int) SERVER s",
		"a view":                    "CREATE TABLE under (" + ownColumns + "); CREATE VIEW throttler_state AS SELECT * FROM under",
		"a materialized view":       "CREATE MATERIALIZED VIEW throttler_state AS SELECT 1 AS id",
		"a sequence":                "CREATE SEQUENCE throttler_state",
		"an index":                  "CREATE TABLE under (id int); CREATE INDEX throttler_state ON under (id)",
		"a type":                    "CREATE TYPE throttler_state AS (id int)",
	} {
		sqlDo(t, pool, "DROP SCHEMA public CASCADE; CREATE SCHEMA public; "+sql)
		const is = "SELECT string_agg(t::text, E'\n' ORDER BY oid) FROM pg_class AS t WHERE relnamespace = 'public'::regnamespace"
		before, comments := sqlGet[string](t, pool, is), sqlGet[int](t, pool, "SELECT count(*) FROM pg_description")
		for _, o := range []pgstore.Options{{}, {Schema: "public"}} {
			_, err := pgstore.New(t.Context(), pool, &o)
			assert.ErrorIs(t, err, storage.ErrCorruptState, what)
			assert.NotErrorIs(t, err, storage.ErrUnavailable, what)
			var e *pgstore.OptionError
			if assert.ErrorAs(t, err, &e, what) {
				assert.Equal(t, "TablePrefix", e.Field)
				assert.Contains(t, e.Reason, "throttler_state")
			}
		}
		assert.Equal(t, before, sqlGet[string](t, pool, is), what)
		assert.Equal(t, comments, sqlGet[int](t, pool, "SELECT count(*) FROM pg_description"), what)
	}
	sqlDo(t, pool, "DROP SCHEMA public CASCADE; CREATE SCHEMA public; "+table(ownColumns))
	assert.NoError(t, everything(t.Context(), open(t, pool, pgstore.Options{}), storecheck.FivePerHour(t, "a")), "the order of the columns is nobody's business")
}

// everything makes every kind of call, and returns the first error.
func everything(ctx context.Context, s *pgstore.Storage, r storecheck.Request) error {
	several := r
	several.Parts = append(several.Parts, storecheck.NewPart("other", r.Parts[0].Rules.Rules, 1))
	for _, ask := range []storecheck.Request{r, r, several, several} {
		if _, err := storecheck.Decide(ctx, s, ask); err != nil {
			return err
		}
	}
	if err := charge(ctx, s, chargeOne(r)); err != nil {
		return err
	}
	if err := s.Raise(ctx, owesOne(r)); err != nil {
		return err
	}
	if _, err := s.Debt(ctx, owesOne(r)); err != nil {
		return err
	}
	if _, err := s.Record(ctx, "origin", time.Now().UnixNano(), []storage.Charge{chargeOne(r), chargeOne(several)}); err != nil {
		return err
	}
	if err := s.Reset(ctx, r.Name, r.Parts[0].Identifier); err != nil {
		return err
	}
	_, err := s.Sweep(ctx)
	return err
}

func TestCallsWriteNothingToTheLogOfTheServer(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t).URL())
	s := open(t, pool, pgstore.Options{})
	require.NoError(t, everything(t.Context(), s, storecheck.FivePerHour(t, "a")))
	assert.Empty(t, logged(t, pool, "WARNING|ERROR"))
}

func assertRefused(t testing.TB, err error, code string) {
	t.Helper()
	var e *pgconn.PgError
	assert.ErrorIs(t, err, storage.ErrUnavailable)
	if assert.ErrorAs(t, err, &e) {
		assert.Equal(t, code, e.Code, e.Message)
	}
}

// assertPoolerRefuses is assertRefused for a call that a pooler refuses. The pooler then also closes the connection.
// So the call is repeated if it gets a connection that was closed before.
func assertPoolerRefuses(t testing.TB, call func() error) {
	t.Helper()
	err := call()
	for n := 0; n < 10 && err != nil && strings.Contains(err.Error(), "conn closed"); n++ {
		err = call()
	}
	assertRefused(t, err, "08P01")
	assert.ErrorContains(t, err, "transaction blocks not allowed in statement pooling mode")
}

func TestTheLeastRightsOfARole(t *testing.T) {
	t.Parallel()
	url := servers.Postgres(t).URL()
	pool := connect(t, url)
	sqlDo(t, pool, `CREATE SCHEMA limits; CREATE ROLE app LOGIN; REVOKE ALL ON SCHEMA public FROM public`)
	open(t, pool, pgstore.Options{Schema: "limits"})
	rights := []string{
		"USAGE ON SCHEMA limits", "SELECT ON limits.throttler_state", "INSERT ON limits.throttler_state",
		"UPDATE ON limits.throttler_state", "DELETE ON limits.throttler_state",
	}
	sqlDo(t, pool, "GRANT "+strings.Join(rights, " TO app; GRANT ")+" TO app")
	try := func(o pgstore.Options) error {
		pool := connect(t, strings.Replace(url, "postgres@", "app@", 1)) // a new pool, in which no statement is prepared
		s, err := pgstore.New(t.Context(), pool, &o)
		if err != nil {
			return err
		}
		defer func() { assert.NoError(t, s.Close(bg)) }()
		return everything(t.Context(), s, storecheck.FivePerHour(t, "a"))
	}
	assert.NoError(t, try(pgstore.Options{Schema: "limits", Timeout: storecheck.Patient, NoSchema: true}))
	assert.NoError(t, try(pgstore.Options{Schema: "limits", Timeout: storecheck.Patient}), "New has nothing to create")
	for _, right := range rights {
		sqlDo(t, pool, "REVOKE "+right+" FROM app")
		t.Log("without", right)
		assertRefused(t, try(pgstore.Options{Schema: "limits", Timeout: storecheck.Patient, NoSchema: true}), "42501")
		sqlDo(t, pool, "GRANT "+right+" TO app")
	}
	assertRefused(t, try(pgstore.Options{Schema: "limits", TablePrefix: "other"}), "42501")
}

func TestSchemaAndNameMayHaveAnyCharacters(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t, "-c", "fsync=off").URL())
	names := []string{
		"select", `Upper with "double" quotes; --comment`, `naïve 日本語 100%s back\slash`, "dotted.name /*comment $1 one$dollar", "throttler_state",
		"'); DROP TABLE x", "it's", "two$$dollars", "new\nline",
	}
	for _, name := range names {
		quoted := pgx.Identifier{name}.Sanitize()
		sqlDo(t, pool, "CREATE SCHEMA "+quoted)
		for _, o := range []pgstore.Options{{TablePrefix: name, Timeout: storecheck.Patient}, {Schema: name, TablePrefix: name, Timeout: storecheck.Patient}} {
			s, err := pgstore.New(t.Context(), pool, &o)
			if !assert.NoError(t, err, "%+v", o) {
				continue
			}
			assert.NoError(t, everything(t.Context(), s, storecheck.FivePerHour(t, "a")), "%+v", o)
			assert.Equal(t, 5, storecheck.Take(t, s, storecheck.FivePerHour(t, "b"), 7), "nobody else's table: %+v", o)
			assert.NoError(t, s.Close(bg))
			table := pgx.Identifier{o.TablePrefix + "_state"}.Sanitize()
			if o.Schema != "" {
				table = quoted + "." + table
			}
			assert.Equal(t, 1, sqlGet[int](t, pool, "SELECT count(*) FROM "+table+" WHERE id = ':b'"))
		}
	}
}

func TestASchemaThatIsNamedWorksUnderAnySearchPath(t *testing.T) {
	t.Parallel()
	url := servers.Postgres(t).URL()
	sqlDo(t, connect(t, url), "CREATE SCHEMA one; CREATE SCHEMA two")
	in := func(path string) *pgxpool.Pool { return connect(t, url+"&search_path="+path) }
	s, r := open(t, in("two"), pgstore.Options{Schema: "one"}), storecheck.FivePerHour(t, "b")
	require.Equal(t, 1, storecheck.Take(t, s, r, 1))
	for i, path := range []string{"''", "two", "two,one"} {
		other := open(t, in(path), pgstore.Options{Schema: "one"})
		assert.NoError(t, everything(t.Context(), other, storecheck.FivePerHour(t, "a")), path)
		assert.Equal(t, 1, storecheck.Take(t, other, r, 1))
		assert.Equal(t, int64(2+i), storecheck.Spent(t, s, r), path)
	}
	_, err := storecheck.Decide(t.Context(), open(t, in("two"), pgstore.Options{NoSchema: true}), r)
	assertRefused(t, err, "42P01")
	own := open(t, in("two"), pgstore.Options{})
	require.Equal(t, 3, storecheck.Take(t, own, r, 3))
	assert.Equal(t, int64(3), storecheck.Spent(t, open(t, in("one,two"), pgstore.Options{Schema: "two"}), r), "the first of the path")
	assert.Equal(t, int64(3), storecheck.Spent(t, own, r))
	assert.Equal(t, int64(4), storecheck.Spent(t, s, r), "another table")
}

func TestOneSchemaIsTheSameWhetherItIsNamedOrFoundByASearchPath(t *testing.T) {
	t.Parallel()
	url := servers.Postgres(t).URL()
	sqlDo(t, connect(t, url), "CREATE SCHEMA one; CREATE SCHEMA two")
	in := func(path string) *pgxpool.Pool { return connect(t, url+"&search_path="+path) }
	r := storecheck.FivePerHour(t, "a")
	require.Equal(t, 1, storecheck.Take(t, open(t, in("two"), pgstore.Options{Schema: "one"}), r, 1))
	assert.Equal(t, int64(1), storecheck.Spent(t, open(t, in("two,one"), pgstore.Options{}), r), "Postgres finds the table in the second")
	assert.Equal(t, int64(1), storecheck.Spent(t, open(t, in("one"), pgstore.Options{}), r))
}

func TestDecisionsThroughAPgBouncerAreExactAndLeaveItsConnectionsAsTheyWere(t *testing.T) {
	t.Parallel()
	bouncer := servers.PgBouncer(t, servers.Postgres(t), "default_pool_size = 5")
	pool := connect(t, bouncer.URL()+"&default_query_exec_mode=exec&pool_max_conns=20")
	stores := []*pgstore.Storage{open(t, pool, pgstore.Options{SynchronousCommit: "off"}), open(t, pool, pgstore.Options{})}
	var one, two storecheck.Told
	r, several := storecheck.Hourly(t, "hot", 130), storecheck.Hourly(t, "a", 70)
	several.Parts = append(several.Parts, storecheck.Hourly(t, "b", 90).Parts...)
	storecheck.Crowd(50, func(i int) {
		for range 4 {
			assert.NoError(t, one.Ask(stores[i%2], r))
			assert.NoError(t, two.Ask(stores[i%2], several))
		}
		assert.NoError(t, everything(t.Context(), stores[i%2], storecheck.FivePerHour(t, fmt.Sprint(i))))
	})
	assert.Equal(t, []int64{130, 70}, []int64{one.Admitted.Load(), two.Admitted.Load()})
	const settings = `SELECT concat_ws(' ', current_setting('statement_timeout'), current_setting('lock_timeout'),
		current_setting('idle_in_transaction_session_timeout'), current_setting('synchronous_commit'), current_setting('transaction_isolation'))`
	seen := map[int]bool{}
	for range 5 {
		tx, err := pool.Begin(t.Context()) // stays open, so each has another connection
		require.NoError(t, err)
		defer func() { assert.NoError(t, tx.Rollback(t.Context())) }()
		var is string
		var pid int
		require.NoError(t, tx.QueryRow(t.Context(), settings+", pg_backend_pid()").Scan(&is, &pid))
		assert.Equal(t, "0 0 0 on read committed", is)
		seen[pid] = true
	}
	assert.Len(t, seen, 5)
}

func TestNewSaysThatASchemaDoesNotExist(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.PostgresURL(t))
	_, err := pgstore.New(t.Context(), pool, &pgstore.Options{Schema: "nowhere to be found"})
	assertRefused(t, err, "3F000")
	assert.ErrorContains(t, err, `schema "nowhere to be found" does not exist`)
}

func TestASchemaThatAMigrationExecutedNeedsNothingMore(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t).URL())
	sqlDo(t, pool, `CREATE SCHEMA "Mine"`)
	o := pgstore.Options{Schema: "Mine", TablePrefix: "of ours", Unlogged: true, NoSchema: true}
	s := open(t, pool, o)
	assertRefused(t, everything(t.Context(), s, storecheck.FivePerHour(t, "a")), "42P01")
	for range 2 {
		conn, err := pool.Acquire(t.Context())
		require.NoError(t, err)
		_, err = conn.Conn().PgConn().Exec(t.Context(), pgstore.Schema(&o)).ReadAll() // as psql does
		conn.Release()
		require.NoError(t, err)
		assert.NoError(t, everything(t.Context(), s, storecheck.FivePerHour(t, "a")))
	}
	assert.Equal(t, "u", sqlGet[string](t, pool, `SELECT relpersistence::text FROM pg_class WHERE oid = '"Mine"."of ours_state"'::regclass`))
	before := writers(t, pool)
	open(t, pool, pgstore.Options{Schema: "Mine", TablePrefix: "of ours", Unlogged: true})
	assert.Equal(t, before, writers(t, pool), "New finds all that it would create")
}

func TestFaultsOfOptionsAreNamed(t *testing.T) {
	t.Parallel()
	pool := connect(t, "postgres://nobody.invalid/")
	for field, o := range map[string]pgstore.Options{
		"TablePrefix":       {TablePrefix: strings.Repeat("n", 41)},
		"Timeout":           {Timeout: 9 * time.Millisecond},
		"SynchronousCommit": {SynchronousCommit: "off; DROP TABLE x"},
	} {
		_, err := pgstore.New(t.Context(), pool, &o)
		var e *pgstore.OptionError
		if assert.ErrorAs(t, err, &e) {
			assert.Equal(t, field, e.Field, err)
		}
		_, err = pgstore.New(t.Context(), nil, &o)
		assert.ErrorContains(t, err, "Pool is nil")
		assert.ErrorContains(t, err, e.Error(), "all faults at once")
	}
	_, err := pgstore.New(t.Context(), nil, nil)
	assert.EqualError(t, err, "throttler: postgres: Pool is nil")
	_, err = pgstore.New(t.Context(), pool, &pgstore.Options{Timeout: -time.Second, NoSchema: true})
	assert.ErrorContains(t, err, "Timeout is -1s")
	_, err = pgstore.New(t.Context(), pool, &pgstore.Options{Timeout: math.MaxInt64, NoSchema: true})
	assert.ErrorContains(t, err, "Timeout is 2562047h47m16.854775807s", "Postgres takes no such time")
}

func TestTheLongestTimeoutDecidesAndRecords(t *testing.T) {
	t.Parallel()
	s := open(t, connect(t, servers.PostgresURL(t)), pgstore.Options{Timeout: math.MaxInt32 * time.Millisecond})
	r := storecheck.FivePerHour(t, freshID(t))
	assert.Equal(t, 1, storecheck.Take(t, s, r, 1))
	_, err := s.Record(t.Context(), fmt.Sprint(time.Now().UnixNano()), 1, []storage.Charge{chargeOne(r)})
	assert.NoError(t, err)
}

// Only transactions that write or lock a row get a number, and the numbers are consecutive.
func TestRefusalsAndPeeksWriteAndLockNothing(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t, "-c", "autovacuum=off").URL())
	s := open(t, pool, pgstore.Options{})
	spent, unknown := storecheck.FivePerHour(t, "spent"), storecheck.FivePerHour(t, "unknown")
	require.Equal(t, 5, storecheck.Take(t, s, spent, 5))
	row := func() string {
		return sqlGet[string](t, pool, "SELECT string_agg(concat(ctid, xmin, xmax, t), ' ') FROM throttler_state t")
	}
	peek, several, free := unknown, unknown, unknown
	peek.Mode, several.Parts = storage.Peek, append(slices.Clone(unknown.Parts), spent.Parts...)
	free.Parts = []storecheck.Part{storecheck.NewPart("free", unknown.Parts[0].Rules.Rules, 0)}
	before, rowBefore := writers(t, pool), row()
	for i, r := range []storecheck.Request{peek, free, spent, several} {
		var all storecheck.Told
		storecheck.Crowd(50, func(int) {
			for range 2 {
				assert.NoError(t, all.Ask(s, r))
			}
		})
		assert.Equal(t, int64(i/2*100), all.Denied.Load())
	}
	assert.Equal(t, before, writers(t, pool))
	assert.Equal(t, rowBefore, row())
	require.Equal(t, 1, storecheck.Take(t, s, unknown, 1))
	assert.Equal(t, before+1, writers(t, pool), "the test would see a write")
}

// Another transaction writes the row at the same time. For a while after that, its calls lock it first.
func TestRefusalsOfAnIdentifierThatWasContendedWriteAndLockNothing(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t, "-c", "autovacuum=off").URL()+"&pool_max_conns=9")
	s, r := open(t, pool, pgstore.Options{}), storecheck.FivePerHour(t, "a")
	require.Equal(t, 4, storecheck.Take(t, s, r, 4))
	other := hold(t, pool, writeIt, []byte(":a"))
	var asked storecheck.Told
	done := make(chan error, 1)
	go func() { done <- asked.Ask(s, r) }()
	other.awaited(t, 1)
	other.commit(t)
	require.NoError(t, <-done)
	require.Equal(t, int64(1), asked.Admitted.Load())
	before := writers(t, pool)
	require.Zero(t, storecheck.Take(t, s, r, 10))
	assert.Equal(t, before, writers(t, pool))
}

func TestUpdatesStayInThePageOfTheRowAndTheTableDoesNotGrow(t *testing.T) {
	t.Parallel()
	server := servers.Postgres(t)
	pool := connect(t, server.URL())
	busy := connect(t, server.URL())
	s := open(t, busy, pgstore.Options{SynchronousCommit: "off"})
	const callers, each = 64, 16
	rounds := 20
	if os.Getenv("THROTTLER_LONG") != "" {
		rounds = 100
	}
	began := time.Now()
	storecheck.Crowd(callers, func(c int) {
		for round := range rounds {
			for i := range each {
				r := storecheck.Hourly(t, fmt.Sprintf("user-%010d", c+callers*((i*7+round)%each)), 1000)
				v, err := storecheck.Decide(t.Context(), s, r)
				assert.NoError(t, err)
				assert.True(t, v.Allowed)
			}
		}
	})
	took := time.Since(began)
	require.NoError(t, s.Close(bg))
	busy.Close() // connections report their statistics when they end
	storecheck.Recovery(t, storecheck.Patient, func() error {
		if sqlGet[int](t, pool, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'") > 1 {
			return errors.New("there are other connections")
		}
		return nil
	})
	updates := sqlGet[int64](t, pool, "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'throttler_state'")
	hot := sqlGet[int64](t, pool, "SELECT n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'throttler_state'")
	assert.Equal(t, int64(callers*each*(rounds-1)), updates)
	assert.GreaterOrEqual(t, float64(hot), 0.8*float64(updates), "all, but for those on a page of which a slow connection still sees old rows")
	table, index := sqlGet[int64](t, pool, "SELECT pg_relation_size('throttler_state')"), sqlGet[int64](t, pool, "SELECT pg_relation_size('throttler_state_pkey')")
	row := sqlGet[float64](t, pool, "SELECT avg(pg_column_size(t))::float8 FROM throttler_state t")
	assert.Less(t, table, int64(callers*each*1000))
	t.Logf("%d updates in %v, HOT %.2f %%; a row: %.0f bytes, of the table %d, of its index %d",
		updates, took.Round(time.Millisecond), 100*float64(hot)/float64(updates), row, table/callers/each, index/callers/each)
}

// stateOf encodes a bucket in the form of row.go: the format, the name and numbers.
func stateOf(name string, numbers ...uint64) []byte {
	out := append(binary.AppendUvarint([]byte{2}, uint64(len(name))), name...)
	for _, n := range numbers {
		out = binary.AppendUvarint(out, n)
	}
	return out
}

// foreignState is a value of the state column that is not in the form of this package, and the part of it that is told to be
// wrong.
type foreignState struct {
	wrong string
	state []byte
}

// foreignStates returns one for each check of the decoder. The good state, from which they are made, is accepted.
func foreignStates() (good []byte, bad map[string]foreignState) {
	const hour, now, end, huge, negative = 3_600_000_000, 1_700_000_000_000_000, 8_000_000_000_000_000, 1 << 63, math.MaxUint64
	good = stateOf("hourly", 0, hour, now, 1, end, 2)
	bad = map[string]foreignState{
		"another format": {"format", append([]byte{1}, good[1:]...)},
		"no format":      {"format", good[1:]},
		"text":           {"format", []byte("hourly")},
		"zeros":          {"format", make([]byte, 40)},
		"more":           {"name", append(slices.Clone(good), 7)},
	}
	for n := 2; n < len(good); n += 3 {
		bad[fmt.Sprint("the first ", n)] = foreignState{"", good[:n]}
	}
	for what, c := range map[string]struct {
		wrong   string
		numbers []uint64
	}{
		"kind":            {"kind", []uint64{5, hour, now, 0}},
		"negative kind":   {"kind", []uint64{negative, hour, now, 0}},
		"no period":       {"law", []uint64{0, 0, now, 0}},
		"huge period":     {"period", []uint64{0, huge, now, 0}},
		"no refill":       {"law", []uint64{1, hour, 0, 720_000_000, 1, 1, now, 1, 0, 5}},
		"no tick":         {"law", []uint64{1, hour, 5, 0, 1, 1, now, 1, 0, 5}},
		"odd tick":        {"law", []uint64{1, hour, 5, 7001, 1, 1, now, 1, 0, 5}},
		"no units":        {"law", []uint64{1, hour, 5, 720_000_000, 0, 1, now, 1, 0, 5}},
		"no drain":        {"law", []uint64{1, hour, 5, 720_000_000, 1, 0, now, 1, 0, 5}},
		"two levels":      {"number of levels", []uint64{1, hour, 5, 720_000_000, 1, 1, now, 2, 0, 5, 0, 5}},
		"negative time":   {"time", []uint64{0, hour, negative, 0}},
		"huge count":      {"number of holds", []uint64{0, hour, now, huge}},
		"count":           {"end", []uint64{0, hour, now, 3, end, 2}},
		"negative end":    {"end", []uint64{0, hour, now, 1, negative, 2}},
		"negative tokens": {"tokens", []uint64{0, hour, now, 1, end, negative}},
		"huge tokens":     {"tokens", []uint64{0, hour, now, 1, end, huge}},
	} {
		bad[what] = foreignState{c.wrong, stateOf("hourly", c.numbers...)}
	}
	many := []uint64{0, hour, now, 2000, end, 1 << 52}
	for range 1999 {
		many = append(many, 0, 1<<52)
	}
	bad["tokens whose sum is no int64"] = foreignState{"tokens", stateOf("hourly", many...)}
	return good, bad
}

func TestRowsThatAreNoneOfOursAreCorruptStateAndHurtNobodyElse(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t, "-c", "fsync=off").URL())
	s := open(t, pool, pgstore.Options{})
	calls := map[string]func(storecheck.Request) error{
		"Decide": func(r storecheck.Request) error { _, err := storecheck.Decide(t.Context(), s, r); return err },
		"Decide of several": func(r storecheck.Request) error {
			several := storecheck.FivePerHour(t, "good")
			several.Parts = append(several.Parts, r.Parts...)
			_, err := storecheck.Decide(t.Context(), s, several)
			return err
		},
		"Charge": func(r storecheck.Request) error { return charge(t.Context(), s, chargeOne(r)) },
		"Raise":  func(r storecheck.Request) error { return s.Raise(t.Context(), owesOne(r)) },
		"Debt":   func(r storecheck.Request) error { _, err := s.Debt(t.Context(), owesOne(r)); return err },
	}
	stored := func(identifier string, state []byte) storecheck.Request {
		r := storecheck.FivePerHour(t, identifier)
		require.Equal(t, 1, storecheck.Take(t, s, r, 1))
		sqlDo(t, pool, "UPDATE throttler_state SET state = $1, version = version + 1 WHERE id = $2", state, []byte(":"+identifier))
		return r
	}
	good, foreign := foreignStates()
	require.NoError(t, calls["Decide"](stored("of ours", good)))
	var bad []storecheck.Request
	for what, f := range foreign {
		r := stored(fmt.Sprint("bad", len(bad)), f.state)
		for call, do := range calls {
			err := do(r)
			assert.ErrorIs(t, err, storage.ErrCorruptState, "%s: %s", what, call)
			assert.ErrorContains(t, err, f.wrong+" cannot be read", "%s: %s", what, call)
		}
		bad = append(bad, r)
	}
	storecheck.Crowd(100, func(i int) {
		_, err := storecheck.Decide(t.Context(), s, storecheck.FivePerHour(t, fmt.Sprint("good", i)))
		assert.NoError(t, err, "an identifier in the batch of those that are corrupt")
		assert.ErrorIs(t, calls["Decide"](bad[i%len(bad)]), storage.ErrCorruptState)
	})
	for _, r := range bad {
		assert.NoError(t, s.Reset(t.Context(), "", r.Parts[0].Identifier))
		assert.Equal(t, 5, storecheck.Take(t, s, r, 6))
	}
	assert.Empty(t, logged(t, pool, "ERROR"))
}

// Version 0 stands for a missing row, and after the largest version there is no next one.
func TestTheTableTakesNoRowsOfAnImpossibleVersion(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t).URL())
	s := open(t, pool, pgstore.Options{})
	require.Equal(t, 1, storecheck.Take(t, s, storecheck.FivePerHour(t, "a"), 1))
	for _, version := range []int64{0, -1, math.MaxInt64} {
		_, err := pool.Exec(t.Context(), "UPDATE throttler_state SET version = $1", version)
		assert.Equal(t, "23514", code(err), version)
	}
}

// The largest version has no next one. Whoever writes it by hand must not stop the calls that share a batch with it.
func TestARowOfTheLargestVersionIsChangedLikeAnyOther(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t, "-c", "fsync=off").URL())
	s := open(t, pool, pgstore.Options{})
	r := storecheck.FivePerHour(t, "a")
	several := storecheck.FivePerHour(t, "b")
	several.Parts = append(several.Parts, r.Parts...)
	for what, change := range map[string]func() error{
		"Decide":            func() error { _, err := storecheck.Decide(t.Context(), s, r); return err },
		"Decide of several": func() error { _, err := storecheck.Decide(t.Context(), s, several); return err },
		"Charge":            func() error { return charge(t.Context(), s, chargeOne(r)) },
		"Record":            func() error { _, err := s.Record(t.Context(), "origin", 1, []storage.Charge{chargeOne(r)}); return err },
		"Reset":             func() error { return s.Reset(t.Context(), "", "a") },
	} {
		require.Equal(t, 1, storecheck.Take(t, s, r, 1))
		sqlDo(t, pool, "UPDATE throttler_state SET version = 4611686018427387904 WHERE id = ':a'")
		assert.NoError(t, change(), what)
		assert.Less(t, sqlGet[int64](t, pool, "SELECT version FROM throttler_state WHERE id = ':a'"), int64(1)<<62, what)
		require.NoError(t, s.Reset(t.Context(), "", "a"))
	}
}
