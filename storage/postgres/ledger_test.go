package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
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

// ledger returns a storage on a server of its own.
func ledger(t testing.TB) (*pgstore.Storage, *pgxpool.Pool) {
	t.Helper()
	pool := connect(t, servers.Postgres(t).URL())
	return open(t, pool, pgstore.Options{}), pool
}

// noon is the time that entries send, so that their debts do not depend on when they are asked for.
const noon = 1_700_000_000_000_000

// entryOf returns a charge of n tokens, which come back in an hour, from the only bucket of r.
func entryOf(r storecheck.Request, n int64) storage.Charge {
	c := chargeOne(r)
	c.Clocked, c.Now, c.Amounts[0].N = true, noon, n
	return c
}

// record is a Record that must succeed.
func record(t testing.TB, s *pgstore.Storage, origin string, seq int64, batch ...storage.Charge) []replica.Debt {
	t.Helper()
	debts, err := s.Record(t.Context(), origin, seq, batch)
	require.NoError(t, err)
	require.Len(t, debts, len(batch))
	return debts
}

// owed returns the debt of the first bucket in tokens.
func owed(d replica.Debt) (n int64) {
	for _, a := range d.Amounts[0] {
		n += a.N
	}
	return n
}

// owes returns the debt of the only bucket of r at noon, in tokens.
func owes(t testing.TB, s *pgstore.Storage, r storecheck.Request) int64 {
	t.Helper()
	d, err := s.Debt(t.Context(), replica.Debt{Clocked: true, Now: noon, Identifier: r.Parts[0].Identifier, Rules: r.Parts[0].Rules})
	require.NoError(t, err)
	return owed(d)
}

func TestABatchIsChargedOnceForEachOriginAndSequenceNumber(t *testing.T) {
	t.Parallel()
	s, _ := ledger(t)
	a, b := storecheck.Hourly(t, "a", 1000), storecheck.Hourly(t, "b", 1000)
	batch := []storage.Charge{entryOf(b, 2), entryOf(a, 7)}
	first := record(t, s, "one", 5, batch...)
	assert.Equal(t, []int64{2, 7}, []int64{owed(first[0]), owed(first[1])})
	assert.Equal(t, "b", first[0].Identifier)
	assert.Equal(t, first, record(t, s, "one", 5, batch...), "again")
	assert.Equal(t, first, record(t, s, "one", 4, batch...), "an earlier one")
	assert.Equal(t, int64(4), owed(record(t, s, "one", 6, batch...)[0]), "the next")
	assert.Equal(t, int64(6), owed(record(t, s, "two", 5, batch...)[0]), "another origin")
	assert.Equal(t, int64(6), owed(record(t, s, "two", 5, batch...)[0]))
	assert.Equal(t, int64(8), owed(record(t, s, strings.Repeat("3", 64), 1<<62, batch...)[0]))
	assert.Equal(t, []int64{28, 8}, []int64{owes(t, s, a), owes(t, s, b)})
}

func TestABatchMayNameAnIdentifierSeveralTimesAndGiveBack(t *testing.T) {
	t.Parallel()
	s, _ := ledger(t)
	a, other := storecheck.Hourly(t, "a", 1000), storecheck.Hourly(t, "a", 1000)
	other.Parts[0] = storecheck.NewPart("a", []law.Rule{storecheck.Rule(t, "daily", law.FixedWindow, 24*time.Hour, 1000)}, 1)
	debts := record(t, s, "o", 1, entryOf(a, 5), entryOf(other, 20), entryOf(a, 3), entryOf(a, -2), entryOf(a, 0))
	for i, want := range []int64{6, 20, 6, 6, 6} {
		assert.Equal(t, want, owed(debts[i]), "entry %d, after all of them", i)
	}
	assert.Equal(t, int64(4), owed(record(t, s, "o", 2, entryOf(a, -2))[0]))
	assert.Nil(t, record(t, s, "o", 3, entryOf(a, -100))[0].Amounts[0], "not below nothing")
	assert.Nil(t, record(t, s, "o", 4, entryOf(storecheck.Hourly(t, "never seen", 5), -1))[0].Amounts[0])
}

// The modes of pgx send parameters in different ways.
func TestRecordIsTheModelsChargesAndThenDebts(t *testing.T) {
	t.Parallel()
	url := servers.Postgres(t, "-c", "fsync=off").URL()
	for seed, mode := range []string{"cache_statement", "cache_describe", "describe_exec", "exec", "simple_protocol"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			s, model := open(t, connect(t, url+"&default_query_exec_mode="+mode), pgstore.Options{TablePrefix: mode}), storagetest.NewModel()
			random, now := rand.New(rand.NewPCG(uint64(seed), 1)), int64(noon)
			for seq := range int64(150) {
				now += random.Int64N(1_000_000_000)
				var batch []storage.Charge
				for range 1 + random.IntN(12) {
					c := storage.Charge{Name: "model", Clocked: true, Now: now, Identifier: fmt.Sprint(random.IntN(8))}
					var rules []law.Rule
					for kind := range law.SlidingLog + 1 {
						if random.IntN(2) == 0 || kind == 0 {
							rules = append(rules, storecheck.Rule(t, fmt.Sprint(kind), kind, time.Hour, 300))
							c.Amounts = append(c.Amounts, storage.Amount{N: random.Int64N(60) - 20, In: random.Int64N(7_200_000_000)})
						}
					}
					c.Rules = law.NewRuleSet(rules...)
					batch = append(batch, c)
				}
				for _, c := range batch {
					require.NoError(t, model.Charge(t.Context(), &c))
				}
				var want []replica.Debt
				for _, c := range batch {
					d, err := model.Debt(t.Context(), replica.Debt{Name: c.Name, Clocked: true, Now: c.Now, Identifier: c.Identifier, Rules: c.Rules})
					require.NoError(t, err)
					want = append(want, d)
				}
				require.Equal(t, want, record(t, s, "o", seq+1, batch...), "batch %d", seq)
				if seq%3 == 0 {
					require.Equal(t, want, record(t, s, "o", seq+1, batch...), "batch %d again", seq)
				}
			}
		})
	}
}

func TestTheClockOfAnEntryThatSendsNoneIsTheServers(t *testing.T) {
	t.Parallel()
	s, _ := ledger(t)
	r := storecheck.FivePerHour(t, "a")
	c := chargeOne(r)
	c.Amounts[0].N = 4
	d := record(t, s, "o", 1, c)[0]
	require.Equal(t, int64(4), owed(d))
	assert.Equal(t, time.Hour.Microseconds(), d.Amounts[0][0].In)
	assert.Equal(t, 1, storecheck.Take(t, s, r, 3))
	d, err := s.Debt(t.Context(), replica.Debt{Identifier: "a", Rules: r.Parts[0].Rules})
	require.NoError(t, err)
	assert.Equal(t, int64(5), owed(d))
}

func TestEntriesThatCannotBeChargedAreLeftOutAndTheOthersAreNot(t *testing.T) {
	t.Parallel()
	s, pool := ledger(t)
	good, bad, many := storecheck.Hourly(t, "good", 100), storecheck.Hourly(t, "bad", 100), storecheck.Hourly(t, "many", 100)
	full := storage.Charge{Clocked: true, Now: noon, Identifier: "many"}
	var rules []law.Rule
	for i := range law.MaxBuckets {
		rules = append(rules, storecheck.Rule(t, fmt.Sprint(i), law.Replenish, time.Hour, 10))
		full.Amounts = append(full.Amounts, storage.Amount{N: 1, In: time.Hour.Microseconds()})
	}
	full.Rules = law.NewRuleSet(rules...)
	record(t, s, "o", 1, entryOf(bad, 1), full)
	sqlDo(t, pool, "UPDATE throttler_state SET state = 'foreign', version = version + 1 WHERE id = ':bad'")
	debts := record(t, s, "o", 2, entryOf(bad, 1), entryOf(good, 3), entryOf(many, 1), full)
	assert.Nil(t, debts[0].Amounts)
	assert.Equal(t, int64(3), owed(debts[1]))
	assert.Nil(t, debts[2].Amounts)
	assert.Equal(t, int64(2), owed(debts[3]))
	assert.Equal(t, int64(3), owed(record(t, s, "o", 2, entryOf(bad, 1), entryOf(good, 3))[1]))
	assert.Nil(t, record(t, s, "", 0, entryOf(bad, 0))[0].Amounts)
	assert.Equal(t, "foreign", string(sqlGet[[]byte](t, pool, "SELECT state FROM throttler_state WHERE id = ':bad'")))
	_, err := s.Debt(t.Context(), replica.Debt{Identifier: "bad", Rules: bad.Parts[0].Rules})
	assert.ErrorIs(t, err, storage.ErrCorruptState)
}

func TestARowOfAnOriginIsNoIdentifiersAndNothingIsChargedWhenItCannotBeRead(t *testing.T) {
	t.Parallel()
	s, pool := ledger(t)
	a, b := storecheck.FivePerHour(t, "a"), storecheck.FivePerHour(t, "b")
	require.Equal(t, 1, storecheck.Take(t, s, b, 1))
	record(t, s, "o", 77, entryOf(a, 1))
	sqlDo(t, pool, "UPDATE throttler_state SET version = version + 1, state = (SELECT state FROM throttler_state WHERE id = 'o') WHERE id = ':b'")
	_, err := storecheck.Decide(t.Context(), s, b)
	assert.ErrorIs(t, err, storage.ErrCorruptState, "the state of an origin")
	for _, state := range [][]byte{{0xff}, {0xff, 1, 0}, {0xff, 0}, {0xff, 0x80}, {1, 1}, []byte("text"), append([]byte{0xff}, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1)} {
		sqlDo(t, pool, "UPDATE throttler_state SET version = version + 1, state = $1 WHERE id = 'o'", state)
		_, err = s.Record(t.Context(), "o", 78, []storage.Charge{entryOf(a, 1)})
		assert.ErrorIs(t, err, storage.ErrCorruptState, "%x", state)
		assert.NotErrorIs(t, err, storage.ErrUnavailable)
	}
	assert.Equal(t, int64(1), owes(t, s, a))
}

func TestABatchOfManyIdentifiers(t *testing.T) {
	t.Parallel()
	s, _ := ledger(t)
	var batch, zeros []storage.Charge
	for i := range 512 {
		r := storecheck.Hourly(t, fmt.Sprint(i*7919%512), 1<<40)
		batch, zeros = append(batch, entryOf(r, int64(i+1))), append(zeros, entryOf(r, 0))
	}
	for seq := range int64(3) {
		debts, again := record(t, s, "o", seq+1, batch...), record(t, s, "", 0, zeros...)
		for i := range debts {
			assert.Equal(t, (seq+1)*int64(i+1), owed(debts[i]))
		}
		assert.Equal(t, debts, again)
	}
}

// Fewer than 256 rows are used, because a sweep would be another round trip.
func TestABatchIsTwoRoundTrips(t *testing.T) {
	t.Parallel()
	s, trips := counted(t, servers.Postgres(t).URL(), "ledger_trips")
	batch := func(first, n int64) (out []storage.Charge) {
		for i := range int64(10) {
			out = append(out, entryOf(storecheck.Hourly(t, fmt.Sprint(first+i), 100), n))
		}
		return out
	}
	seq := int64(0)
	of := func(first int64) int {
		seq++
		return trips.of(func() { record(t, s, "o", seq, batch(first, 1)...) })
	}
	assert.Equal(t, []int{2, 2, 2}, []int{of(0), of(0), of(0)}, "new rows, and others")
	assert.Equal(t, []int{4, 2, 2, 2}, []int{of(5), of(10), of(10), of(10)}, "new rows are not expected, and then they are")
	assert.Equal(t, 1, trips.of(func() { record(t, s, "", 0, batch(0, 0)...) }))
	assert.Zero(t, trips.of(func() { record(t, s, "", 0) }))
}

func TestRowsThatAreGoneAreMadeAgain(t *testing.T) {
	t.Parallel()
	s, pool := ledger(t)
	r, other := storecheck.Hourly(t, "a", 100), storecheck.Hourly(t, "b", 100)
	for seq := range int64(3) {
		record(t, s, "o", seq+1, entryOf(r, 1))
	}
	sqlDo(t, pool, "DELETE FROM throttler_state WHERE id = ':a'")
	debts := record(t, s, "o", 4, entryOf(r, 5), entryOf(other, 2))
	assert.Equal(t, []int64{5, 2}, []int64{owed(debts[0]), owed(debts[1])})
	sqlDo(t, pool, "DELETE FROM throttler_state")
	assert.Equal(t, int64(5), owed(record(t, s, "o", 5, entryOf(r, 5))[0]))
}

// Rows are deleted all the time, as sweeps delete full ones.
func TestRecordIsExactBesideDeletesOfRows(t *testing.T) {
	t.Parallel()
	s, pool := ledger(t)
	stop := make(chan struct{})
	var others sync.WaitGroup
	for range 2 {
		others.Go(func() {
			for {
				_, err := pool.Exec(t.Context(), "DELETE FROM throttler_state WHERE id > ':gone-' AND id < ':gone-5'")
				if err != nil { // this DELETE locks rows as it finds them, and not in the order of their ids
					assert.ErrorContains(t, err, "deadlock detected")
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	kept := storecheck.Hourly(t, "kept", 1<<40)
	storecheck.Crowd(4, func(i int) {
		for seq := range int64(100) {
			batch := []storage.Charge{entryOf(kept, 1)}
			for n := range 10 {
				batch = append(batch, entryOf(storecheck.Hourly(t, fmt.Sprint("gone-", n), 1<<40), 1))
			}
			_, err := s.Record(t.Context(), fmt.Sprint("o", i), seq+1, batch)
			assert.NoError(t, err)
		}
	})
	close(stop)
	others.Wait()
	assert.Equal(t, int64(400), owes(t, s, kept))
	assert.Equal(t, int64(400), owes(t, s, storecheck.Hourly(t, "gone-7", 1<<40)))
}

func TestRacingBatchesOfSeveralOriginsBesideDecisionsAreExact(t *testing.T) {
	t.Parallel()
	server := servers.Postgres(t)
	pool := connect(t, server.URL())
	stores := []*pgstore.Storage{open(t, connect(t, server.URL()), pgstore.Options{}), open(t, connect(t, server.URL()), pgstore.Options{})}
	const identifiers, origins, batches = 50, 6, 30
	var sum [identifiers]atomic.Int64
	ask := func(i int) storecheck.Request { return storecheck.Hourly(t, fmt.Sprint(i), 1<<40) }
	storecheck.Crowd(origins+24, func(worker int) {
		s, random := stores[worker%2], rand.New(rand.NewPCG(uint64(worker), 2))
		for seq := range int64(batches) {
			if worker >= origins {
				r := ask(random.IntN(identifiers))
				r.Parts = append(r.Parts, storecheck.Hourly(t, fmt.Sprint("new-", seq, "-", random.IntN(3)), 1<<40).Parts[:worker%2]...)
				if assert.NoError(t, new(storecheck.Told).Ask(s, r)) {
					n := 0
					_, _ = fmt.Sscan(r.Parts[0].Identifier, &n)
					sum[n].Add(1)
				}
				continue
			}
			var batch []storage.Charge
			for _, i := range random.Perm(identifiers) {
				c := chargeOne(ask(i))
				c.Amounts[0].N = int64(1 + i)
				sum[i].Add(c.Amounts[0].N)
				batch = append(batch, c)
			}
			batch = append(batch, chargeOne(storecheck.Hourly(t, fmt.Sprint("new-", seq, "-", random.IntN(3)), 1<<40)))
			for range 1 + random.IntN(2) {
				_, err := s.Record(t.Context(), fmt.Sprint("origin-", worker), seq+1, batch)
				assert.NoError(t, err)
			}
		}
	})
	for i := range sum {
		assert.Equal(t, sum[i].Load(), storecheck.Spent(t, stores[0], ask(i)))
	}
	assert.Empty(t, logged(t, pool, "ERROR"), "nobody was a victim of a deadlock, not even unseen")
}

func TestDecisionsFromMemorySeeWhatWasRecorded(t *testing.T) {
	t.Parallel()
	s, _ := ledger(t)
	r := storecheck.Hourly(t, "a", 10)
	for seq := range int64(3) {
		require.Equal(t, 1, storecheck.Take(t, s, r, 1), "remembered")
		record(t, s, "o", seq+1, chargeOne(r))
	}
	assert.Equal(t, 4, storecheck.Take(t, s, r, 9))
}

// An UPDATE moves a row. A Record that waited for its lock finds it in its new place.
func TestARowThatMovesWhileItIsWaitedForIsCharged(t *testing.T) {
	t.Parallel()
	s, pool := ledger(t)
	r := storecheck.Hourly(t, "a", 100)
	record(t, s, "o", 1, entryOf(r, 1))
	for seq := range int64(5) {
		held := hold(t, pool, writeIt, []byte(":a"))
		done := make(chan []replica.Debt, 1)
		go func() {
			debts, err := s.Record(t.Context(), "o", seq+2, []storage.Charge{entryOf(r, 1)})
			assert.NoError(t, err)
			done <- debts
		}()
		held.awaited(t, 1)
		held.commit(t)
		assert.Equal(t, seq+2, owed((<-done)[0]))
		assert.Equal(t, seq+2, owes(t, s, r))
	}
}

func TestRecordThatCannotLockGivesUpInTimeAndNothingHasHappened(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	s, a, b := open(t, pool, pgstore.Options{Timeout: time.Second}), storecheck.Hourly(t, "a", 100), storecheck.Hourly(t, "b", 100)
	batch := []storage.Charge{entryOf(a, 1), entryOf(b, 1)}
	record(t, s, "o", 1, batch...)
	release, before := holdRow(t, server.URL(), "b"), connected(t, pool)
	for _, took := range storecheck.Timed(2, func() {
		_, err := s.Record(t.Context(), "o", 2, batch)
		assertUnavailable(t, err)
		assert.Equal(t, lockTimeout, code(err), "%v", err)
	}) {
		assert.Greater(t, took, 750*time.Millisecond, "it gave up early")
		assert.Less(t, took, 1500*time.Millisecond, "it outlasted its timeout")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	assertBackAfter(t, 200*time.Millisecond, storecheck.Timed(1, func() {
		_, err := s.Record(ctx, "o", 2, batch)
		assert.Error(t, err)
	}))
	assert.Equal(t, int64(1), owes(t, s, a))
	release()
	assert.Equal(t, int64(2), owed(record(t, s, "o", 2, batch...)[1]))
	assert.Equal(t, before, pool.Stat().NewConnsCount(), "connections were lost")
}

func TestWhatBecameOfABatchWhoseCallerLeftIsFoundOutByTheSameNumber(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	s, r := open(t, pool, pgstore.Options{}), storecheck.Hourly(t, "a", 100)
	record(t, s, "o", 1, entryOf(r, 1))
	before := connected(t, pool)
	for seq := range int64(5) {
		release := holdRow(t, server.URL(), "a")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			_, err := s.Record(ctx, "o", seq+2, []storage.Charge{entryOf(r, 1)})
			done <- err
		}()
		storecheck.Until(t, "it does not wait", func() bool { return pool.Stat().AcquiredConns() == 1 })
		cancel()
		assert.ErrorIs(t, <-done, context.Canceled)
		release()
		assert.Equal(t, seq+2, owed(record(t, s, "o", seq+2, entryOf(r, 1))[0]))
	}
	assert.Equal(t, before, pool.Stat().NewConnsCount(), "connections were lost")
}

func TestBatchesThatAreRepeatedUntilTheyAreAnsweredAreChargedOnceThoughTheServerIsKilled(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	s := open(t, pool, prompt)
	const origins, kills = 4, 3
	var batches [origins]atomic.Int64
	var failed atomic.Int64
	batch := []storage.Charge{entryOf(storecheck.Hourly(t, "a", 1<<40), 1), entryOf(storecheck.Hourly(t, "b", 1<<40), 2)}
	stop := make(chan struct{})
	var all sync.WaitGroup
	for i := range origins {
		all.Go(func() {
			for seq := int64(1); ; seq++ {
				for {
					_, err := s.Record(context.Background(), fmt.Sprint("origin-", i), seq, batch)
					if err == nil {
						break
					}
					assertUnavailable(t, err)
					failed.Add(1)
				}
				batches[i].Add(1)
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	for range kills {
		was := batches[0].Load()
		storecheck.Until(t, "nothing is recorded", func() bool { return batches[0].Load() > was+20 })
		seen := failed.Load()
		require.NoError(t, server.Kill())
		storecheck.Until(t, "no batch fails", func() bool { return failed.Load() > seen })
		require.NoError(t, server.Start())
	}
	close(stop)
	all.Wait()
	sum := int64(0)
	for i := range batches {
		sum += batches[i].Load()
	}
	t.Log(sum, "batches,", failed.Load(), "failures")
	pool.Reset() // the connections are from before the last crash
	assert.Equal(t, []int64{sum, 2 * sum}, []int64{owes(t, s, storecheck.Hourly(t, "a", 1<<40)), owes(t, s, storecheck.Hourly(t, "b", 1<<40))})
}

func TestABatchOfZerosAndDebtWriteAndLockNothing(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.Postgres(t, "-c", "autovacuum=off").URL())
	s := open(t, pool, pgstore.Options{})
	known, unknown := storecheck.Hourly(t, "known", 10), storecheck.Hourly(t, "unknown", 10)
	record(t, s, "o", 1, entryOf(known, 3))
	hold(t, pool, lockIt, []byte(":known"))
	before := writers(t, pool)
	for range 5 {
		debts := record(t, s, "o", 2, entryOf(known, 0), entryOf(unknown, 0))
		assert.Equal(t, []int64{3, 0}, []int64{owed(debts[0]), owed(debts[1])})
		assert.Equal(t, []int64{3, 0}, []int64{owes(t, s, known), owes(t, s, unknown)})
	}
	assert.Equal(t, before, writers(t, pool))
	record(t, s, "o", 2, entryOf(unknown, 1))
	assert.Greater(t, writers(t, pool), before, "the test would see a write")
}

func TestManyDebtsShareRoundTrips(t *testing.T) {
	t.Parallel()
	s, trips := counted(t, servers.PostgresURL(t), "debts")
	r := storecheck.Hourly(t, "a", 100)
	record(t, s, "o", 1, entryOf(r, 7))
	n := trips.of(func() {
		storecheck.Crowd(200, func(int) { assert.Equal(t, int64(7), owes(t, s, r)) })
	})
	assert.Less(t, n, 150, "for 200 calls")
}

func TestRecordRefusesWhatIsInvalidBeforeItDoesAnything(t *testing.T) {
	t.Parallel()
	pool := connect(t, "postgres://nobody.invalid/")
	s := open(t, pool, pgstore.Options{NoSchema: true})
	good := entryOf(storecheck.FivePerHour(t, "a"), 1)
	for _, origin := range []string{"", "with:colon", strings.Repeat("o", 65)} {
		_, err := s.Record(t.Context(), origin, 1, []storage.Charge{good})
		assert.ErrorContains(t, err, fmt.Sprintf("origin %q", origin))
		assert.NotErrorIs(t, err, storage.ErrUnavailable)
	}
	for _, seq := range []int64{0, -1} {
		_, err := s.Record(t.Context(), "o", seq, []storage.Charge{good})
		assert.ErrorContains(t, err, fmt.Sprint("is ", seq))
		assert.NotErrorIs(t, err, storage.ErrUnavailable)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Record(ctx, "o", 1, []storage.Charge{good})
	assert.ErrorIs(t, err, context.Canceled)
	_, err = s.Debt(ctx, replica.Debt{Identifier: "a", Rules: good.Rules})
	assert.ErrorIs(t, err, context.Canceled)
	require.NoError(t, s.Close(bg))
	_, err = s.Record(t.Context(), "o", 1, []storage.Charge{good})
	assert.ErrorIs(t, err, storage.ErrClosed)
	_, err = s.Debt(t.Context(), replica.Debt{Identifier: "a", Rules: good.Rules})
	assert.ErrorIs(t, err, storage.ErrClosed)
}

func TestCloseWaitsForARecord(t *testing.T) {
	t.Parallel()
	server, pool := harmed(t)
	s, other, r := open(t, pool, pgstore.Options{}), open(t, pool, pgstore.Options{}), storecheck.Hourly(t, "a", 100)
	record(t, s, "o", 1, entryOf(r, 1))
	release := holdRow(t, server.URL(), "a")
	var recorded, closed atomic.Bool
	var all sync.WaitGroup
	all.Go(func() {
		_, err := s.Record(t.Context(), "o", 2, []storage.Charge{entryOf(r, 1)})
		assert.NoError(t, err)
		recorded.Store(true)
	})
	storecheck.Until(t, "it does not wait", func() bool { return pool.Stat().AcquiredConns() == 1 })
	all.Go(func() {
		assert.NoError(t, s.Close(bg))
		closed.Store(true)
		assert.Equal(t, int64(2), owes(t, other, r), "it has been charged by then")
	})
	storecheck.Until(t, "it is open", func() bool {
		_, err := s.Record(t.Context(), "", 0, []storage.Charge{entryOf(r, 0)})
		return errors.Is(err, storage.ErrClosed)
	})
	assert.False(t, recorded.Load() || closed.Load())
	release()
	all.Wait()
	assert.True(t, recorded.Load())
}

// The test sets the times in the row back instead of waiting.
func TestASweepRemovesTheRowOfAnOriginAnHourAfterItsLastBatch(t *testing.T) {
	t.Parallel()
	s, pool := ledger(t)
	r := storecheck.Hourly(t, "a", 1000)
	r.Parts[0].Rules.Rules[0] = storecheck.Rule(t, "daily", law.Replenish, 24*time.Hour, 1000)
	c := chargeOne(r)
	c.Amounts[0].In *= 24
	record(t, s, "o", 1, c)
	sweep := func() int64 {
		n, err := s.Sweep(t.Context())
		require.NoError(t, err)
		return n
	}
	later := func(d time.Duration) {
		sqlDo(t, pool, "UPDATE throttler_state SET version = version + 1, full_at = full_at - $1", d.Microseconds())
	}
	later(59 * time.Minute)
	assert.Zero(t, sweep())
	record(t, s, "o", 2, c)
	later(59 * time.Minute)
	assert.Zero(t, sweep(), "since the last one")
	record(t, s, "o", 2, c)
	later(time.Minute)
	assert.Equal(t, int64(1), sweep())
	assert.Equal(t, int64(2), storecheck.Spent(t, s, r))
	assert.Equal(t, 1, sqlGet[int](t, pool, "SELECT count(*) FROM throttler_state"))
}

func TestRecordSweepsToo(t *testing.T) {
	t.Parallel()
	s, pool := ledger(t)
	short := storecheck.Rule(t, "short", law.Replenish, time.Microsecond, 1)
	const batches, each = 20, 100
	for seq := range int64(batches) {
		var batch []storage.Charge
		for i := range each {
			batch = append(batch, storage.Charge{Identifier: fmt.Sprint(seq, "-", i), Rules: law.NewRuleSet([]law.Rule{short}...), Amounts: []storage.Amount{{N: 1, In: 1}}})
		}
		record(t, s, "o", seq+1, batch...)
	}
	require.NoError(t, s.Close(bg), "which waits for a sweep")
	assert.Less(t, sqlGet[int](t, pool, "SELECT count(*) FROM throttler_state"), batches*each/2, "none of the rows is needed")
}
