package postgres_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
	"github.com/go-throttler/throttler/storage/storagetest"
)

var execModes = []string{"cache_statement", "cache_describe", "describe_exec", "exec", "simple_protocol"}

// settings has the settings of databases, by the name of the database. They change how values are written and read,
// and how statements are planned.
var settings = map[string][]string{
	"plain": nil,
	"german": {
		"DateStyle = 'German, DMY'", "IntervalStyle = sql_standard", "bytea_output = escape", "TimeZone = 'America/St_Johns'",
		"extra_float_digits = -15", "xmloption = document", "lc_monetary = 'C.utf8'", "lc_numeric = 'C.utf8'", "lc_time = 'C.utf8'", "lc_messages = 'C.utf8'",
	},
	"sql": {
		"DateStyle = 'SQL, MDY'", "IntervalStyle = iso_8601", "bytea_output = escape", "TimeZone = 'Asia/Kathmandu'",
		"standard_conforming_strings = off", "backslash_quote = off", "client_encoding = LATIN1",
	},
	"escaped": {
		"DateStyle = 'Postgres, DMY'", "IntervalStyle = postgres_verbose", "bytea_output = hex", "TimeZone = '-13:37'",
		"standard_conforming_strings = off", "quote_all_identifiers = on", "array_nulls = off", "transform_null_equals = on",
	},
	"planner": {
		"jit = off", "plan_cache_mode = force_generic_plan", "default_transaction_isolation = serializable", "search_path = limits", "statement_timeout = '20s'",
		"enable_seqscan = off", "enable_nestloop = off", "enable_tidscan = off", "enable_indexscan = off", "enable_hashjoin = off", "enable_sort = off",
		"enable_material = off", "join_collapse_limit = 1", "from_collapse_limit = 1",
	},
	"planner2": {
		"jit = off", "plan_cache_mode = force_custom_plan", "default_transaction_isolation = 'repeatable read'", `search_path = "$user", limits`, "row_security = off",
		"enable_indexscan = off", "enable_bitmapscan = off", "enable_indexonlyscan = off", "enable_mergejoin = off", "cursor_tuple_fraction = 0",
	},
}

// oddID is an identifier with everything that the text form of a value could get wrong.
const oddID = "it's \"odd\" \\x41 \\101 \x00\xff $1 日本 {a,NULL} --"

func TestEverySettingOfAConnectionIsAnsweredAlike(t *testing.T) {
	t.Parallel()
	server := servers.Postgres(t, "-c", "fsync=off")
	admin := connect(t, server.URL())
	for name, sets := range settings {
		sqlDo(t, admin, "CREATE DATABASE "+name)
		sqlDo(t, connect(t, in(server, name)), "CREATE SCHEMA limits")
		for _, set := range sets {
			sqlDo(t, admin, "ALTER DATABASE "+name+" SET "+set)
		}
	}
	poolers := [2]*servers.Server{}
	for i, mode := range poolModes {
		poolers[i] = servers.PgBouncer(t, server, "pool_mode = "+mode, "default_pool_size = 25", "max_client_conn = 1000")
	}
	for i, name := range slices.Sorted(maps.Keys(settings)) {
		for j, mode := range execModes {
			way := (i + j) % 2 // one of the poolers: each gets all settings and all modes, but not all combinations
			for way, server := range map[string]*servers.Server{"direct": server, poolModes[way]: poolers[way]} {
				t.Run(strings.Join([]string{way, name, mode}, "/"), func(t *testing.T) {
					t.Parallel()
					pool := connect(t, in(server, name)+"&pool_max_conns=4&default_query_exec_mode="+mode)
					assertAnsweredAlike(t, pool, way+" "+mode)
				})
			}
		}
	}
}

var poolModes = [2]string{"session", "transaction"}

// in returns the URL of a database on a server.
func in(server *servers.Server, database string) string {
	return strings.Replace(server.URL(), "/postgres?", "/"+database+"?", 1)
}

// assertAnsweredAlike makes all kinds of calls, and compares the answers with those of the model.
func assertAnsweredAlike(t *testing.T, pool *pgxpool.Pool, name string) {
	t.Helper()
	s, model := open(t, pool, pgstore.Options{TablePrefix: name}), storagetest.NewModel()
	random, now := rand.New(rand.NewPCG(1, 2)), int64(noon)
	var rules []law.Rule
	for _, kind := range storecheck.Kinds {
		rules = append(rules, storecheck.Rule(t, fmt.Sprint("kind ", kind), kind, time.Minute, 7))
	}
	for seq := range int64(12) {
		now += random.Int64N(10_000_000)
		id := []string{oddID, "b"}[random.IntN(2)]
		r := storecheck.Request{Name: "n", Clocked: true, Now: now, Parts: []storecheck.Part{storecheck.NewPart(id, rules, random.Int64N(3))}}
		if random.IntN(3) == 0 {
			r.Parts = append(r.Parts, storecheck.NewPart("several", rules, 1))
		}
		alike(t, func(s replica.Storage) (any, error) {
			v, err := storecheck.Decide(t.Context(), s, r)
			return fmt.Sprint(v.Allowed, v.RetryAfter, v.Levels()), err
		}, s, model)
		c := storage.Charge{Name: "n", Clocked: true, Now: now, Identifier: id, Rules: law.NewRuleSet(rules...), Amounts: make([]storage.Amount, len(rules))}
		for i := range c.Amounts {
			c.Amounts[i] = storage.Amount{N: random.Int64N(5) - 2, In: random.Int64N(60_000_000)}
		}
		alike(t, func(s replica.Storage) (any, error) { return nil, s.Charge(t.Context(), &c) }, s, model)
		d := replica.Debt{Name: "n", Clocked: true, Now: now, Identifier: id, Rules: law.NewRuleSet(rules...)}
		debt := func(s replica.Storage) (any, error) { return s.Debt(t.Context(), d) }
		alike(t, debt, s, model)
		d.Identifier, c.Identifier = "recorded", "recorded"
		require.NoError(t, model.Charge(t.Context(), &c))
		want, err := model.Debt(t.Context(), d)
		require.NoError(t, err)
		require.Equal(t, []replica.Debt{want}, record(t, s, "o", seq+1, c))
		require.Equal(t, []replica.Debt{want}, record(t, s, "o", seq+1, c), "once")
		raised := want
		raised.Identifier = "b"
		alike(t, func(s replica.Storage) (any, error) { return nil, s.Raise(t.Context(), raised) }, s, model)
		if seq%5 == 4 {
			alike(t, func(s replica.Storage) (any, error) { return nil, s.Reset(t.Context(), "n", id) }, s, model)
		}
	}
	assertCrowdAlike(t, pool, s, name)
	_, err := s.Sweep(t.Context())
	require.NoError(t, err)
}

// alike makes the same call on the storage and on the model, and compares the answers.
func alike(t *testing.T, do func(replica.Storage) (any, error), s, model replica.Storage) {
	t.Helper()
	want, err := do(model)
	require.NoError(t, err)
	got, err := do(s)
	require.NoError(t, err)
	require.Equal(t, want, got)
}

// assertCrowdAlike lets two storages race for one identifier and for two, by the server's clock, and asserts that
// exactly the limits were admitted.
func assertCrowdAlike(t *testing.T, pool *pgxpool.Pool, s *pgstore.Storage, name string) {
	t.Helper()
	other := open(t, pool, pgstore.Options{TablePrefix: name})
	hot, several := storecheck.Hourly(t, oddID, 21), storecheck.Hourly(t, "c", 13)
	several.Parts = append(several.Parts, storecheck.Hourly(t, oddID+"2", 17).Parts...)
	var one, two storecheck.Told
	storecheck.Crowd(10, func(i int) {
		s := []*pgstore.Storage{s, other}[i%2]
		for range 4 {
			assert.NoError(t, one.Ask(s, hot))
			assert.NoError(t, two.Ask(s, several))
		}
	})
	assert.Equal(t, []int64{21, 13}, []int64{one.Admitted.Load(), two.Admitted.Load()})
	require.NoError(t, everything(t.Context(), s, storecheck.FivePerHour(t, oddID)))
	assert.Equal(t, 5, storecheck.Take(t, s, storecheck.FivePerHour(t, oddID), 6), "from memory")
}

// A pooler in statement mode refuses to begin transactions. Calls that need one fail and change nothing.
func TestAPoolerOfStatementsRefusesOnlySeveralIdentifiersAndRecords(t *testing.T) {
	t.Parallel()
	bouncer := servers.PgBouncer(t, servers.Postgres(t, "-c", "fsync=off"), "pool_mode = statement", "default_pool_size = 25", "max_client_conn = 1000")
	for _, mode := range execModes {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			pool := connect(t, bouncer.URL()+"&pool_max_conns=4&default_query_exec_mode="+mode)
			stores := []*pgstore.Storage{open(t, pool, pgstore.Options{TablePrefix: mode}), open(t, pool, pgstore.Options{TablePrefix: mode})}
			s, hot, few, other := stores[0], storecheck.Hourly(t, oddID, 21), storecheck.FivePerHour(t, "few"), storecheck.FivePerHour(t, "other")
			var one storecheck.Told
			storecheck.Crowd(10, func(i int) {
				for range 4 {
					assert.NoError(t, one.Ask(stores[i%2], hot))
				}
			})
			assert.Equal(t, int64(21), one.Admitted.Load())
			require.NoError(t, charge(t.Context(), s, chargeOne(few)))
			require.NoError(t, s.Raise(t.Context(), owesOne(few)))
			assert.Equal(t, 4, storecheck.Take(t, s, few, 6))
			several := other
			several.Parts = append(several.Parts, hot.Parts...)
			_, err := storecheck.Decide(t.Context(), s, several)
			assert.NoError(t, err, "a refusal writes nothing")
			several.Parts = append(several.Parts[:1], storecheck.FivePerHour(t, "third").Parts...)
			assertPoolerRefuses(t, func() error {
				_, err := storecheck.Decide(t.Context(), s, several)
				return err
			})
			assertPoolerRefuses(t, func() error {
				_, err := s.Record(t.Context(), "o", 1, []storage.Charge{chargeOne(other)})
				return err
			})
			assert.Zero(t, storecheck.Spent(t, s, other), "and nothing has happened")
			require.NoError(t, s.Reset(t.Context(), "", "few"))
			assert.Equal(t, 5, storecheck.Take(t, s, few, 6))
			_, err = s.Sweep(t.Context())
			assert.NoError(t, err)
		})
	}
}

// As after the loss of Redis: its admissions are in the ledger, which decides from then on.
func TestTheLedgerDecidesInTheSimpleProtocol(t *testing.T) {
	t.Parallel()
	s := open(t, connect(t, servers.PostgresURL(t)+"&default_query_exec_mode=simple_protocol"), pgstore.Options{TablePrefix: "simple"})
	r := storecheck.FivePerHour(t, freshID(t))
	record(t, s, "o", time.Now().UnixNano(), chargeOne(r), chargeOne(r))
	for i := range 3 {
		assert.Equal(t, 1, storecheck.Take(t, s, r, 1), "call %d", i)
	}
	assert.Zero(t, storecheck.Take(t, s, r, 1))
}
