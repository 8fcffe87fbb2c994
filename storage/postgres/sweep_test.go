package postgres_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
)

func TestATableStaysOfTheSizeOfTheIdentifiersThatAreNotFull(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.PostgresURL(t))
	s := open(t, pool, pgstore.Options{TablePrefix: "churn"})
	minute, faults := law.NewRule("1/1m", law.Replenish, time.Minute, 1, 0)
	require.Empty(t, faults)
	const each, minutes = 500, 30 // each is the number of new identifiers a minute
	for now := range int64(minutes) {
		var wait sync.WaitGroup
		for worker := range 50 {
			wait.Go(func() {
				for i := range each / 50 {
					r := storecheck.Request{Name: "churn", Clocked: true, Now: now * 60_000_000, Parts: []storecheck.Part{storecheck.NewPart(fmt.Sprintf("%06d", int(now)*each+worker*each/50+i), []law.Rule{minute}, 1)}}
					_, err := storecheck.Decide(context.Background(), s, r)
					assert.NoError(t, err)
				}
			})
		}
		wait.Wait()
	}
	require.NoError(t, s.Close(bg), "which waits for a sweep")
	var rows int
	require.NoError(t, pool.QueryRow(t.Context(), "SELECT count(*) FROM churn_state").Scan(&rows))
	assert.Less(t, rows, 4*each, "of %d identifiers %d are not full", each*minutes, each)
}

func TestCallsOfSeveralIdentifiersSweepToo(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.PostgresURL(t))
	s := open(t, pool, pgstore.Options{TablePrefix: "joint_churn"})
	short, faults := law.NewRule("short", law.Replenish, time.Microsecond, 1, 0)
	require.Empty(t, faults)
	const calls, each = 200, 10
	storecheck.Crowd(20, func(worker int) {
		for i := range calls / 20 {
			r := storecheck.Request{}
			for n := range each {
				r.Parts = append(r.Parts, storecheck.NewPart(fmt.Sprint(worker, "-", i, "-", n), []law.Rule{short}, 1))
			}
			_, err := storecheck.Decide(context.Background(), s, r)
			assert.NoError(t, err)
		}
	})
	require.NoError(t, s.Close(bg), "which waits for a sweep")
	var rows int
	require.NoError(t, pool.QueryRow(t.Context(), "SELECT count(*) FROM joint_churn_state").Scan(&rows))
	assert.Less(t, rows, calls*each/2, "none of the rows is needed")
}

// A sweep runs beside the calls, with the time of an earlier one. Here the clock is set back by a day whenever a
// sweep begins.
func TestASweepRemovesNothingThatIsWrittenAfterItBegan(t *testing.T) {
	t.Parallel()
	s := open(t, connect(t, servers.PostgresURL(t)), pgstore.Options{TablePrefix: "back"})
	minute, faults := law.NewRule("1/1m", law.Replenish, time.Minute, 1, 0)
	require.Empty(t, faults)
	const day = 86_400_000_000
	ask := func(now int64, id string) bool {
		v, err := storecheck.Decide(t.Context(), s, storecheck.Request{Name: "back", Clocked: true, Now: now, Parts: []storecheck.Part{storecheck.NewPart(id, []law.Rule{minute}, 1)}})
		require.NoError(t, err)
		return v.Allowed
	}
	for round := range 12 {
		for i := range 255 {
			ask(day, fmt.Sprint(round, "-", i))
		}
		ask(day, "the last one before a sweep")
		id := fmt.Sprint("back-", round)
		require.True(t, ask(0, id))
		for range 8 {
			require.False(t, ask(0, id), "it was swept, round %d", round)
		}
	}
}

func TestSweepRemovesFullRowsAndNoOthers(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.PostgresURL(t))
	s := open(t, pool, pgstore.Options{TablePrefix: "sweep"})
	for i, period := range []time.Duration{time.Microsecond, time.Hour} {
		rule, faults := law.NewRule("1", law.Replenish, period, 1, 0)
		require.Empty(t, faults)
		for n := range 40 {
			_, err := storecheck.Decide(t.Context(), s, storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart(fmt.Sprint(i, "-", n), []law.Rule{rule}, 1)}})
			require.NoError(t, err)
		}
	}
	removed, err := s.Sweep(t.Context())
	require.NoError(t, err)
	assert.Equal(t, int64(40), removed)
	removed, err = s.Sweep(t.Context())
	require.NoError(t, err)
	assert.Zero(t, removed)
	require.NoError(t, s.Close(bg))
	_, err = s.Sweep(t.Context())
	assert.ErrorIs(t, err, storage.ErrClosed)
}

func TestASweepTakesPlaceAmongCallsWhateverIsolationIsTheDefault(t *testing.T) {
	t.Parallel()
	for _, level := range []string{"repeatable read", "serializable"} {
		t.Run(level, func(t *testing.T) {
			t.Parallel()
			pool := connect(t, servers.Postgres(t, "-c", "default_transaction_isolation="+level).URL())
			s := open(t, pool, pgstore.Options{})
			short, faults := law.NewRule("short", law.Replenish, time.Millisecond, 10, 0)
			require.Empty(t, faults)
			storecheck.Crowd(20, func(i int) {
				for n := range 50 {
					if i == 0 {
						_, err := s.Sweep(t.Context())
						assert.NoError(t, err)
					}
					_, err := storecheck.Decide(t.Context(), s, storecheck.Request{Parts: []storecheck.Part{storecheck.NewPart(fmt.Sprint(n), []law.Rule{short}, 1)}})
					assert.NoError(t, err)
				}
			})
		})
	}
}

// looks counts the sweeps that a pool sends.
type looks struct {
	trips
	n atomic.Int64
}

func (l *looks) TraceBatchQuery(_ context.Context, _ *pgx.Conn, d pgx.TraceBatchQueryData) {
	if strings.Contains(d.SQL, "DELETE") {
		l.n.Add(1)
	}
}

func TestLooksThatFindNothingBecomeRareAndComeBack(t *testing.T) {
	t.Parallel()
	config, err := pgxpool.ParseConfig(servers.Postgres(t, "-c", "fsync=off").URL())
	require.NoError(t, err)
	sent := &looks{}
	config.ConnConfig.Tracer = sent
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	s := open(t, pool, pgstore.Options{})
	const ids, rounds = 500, 20
	rule := storecheck.Rule(t, "r", law.Replenish, time.Hour, 1000)
	ask := func(now int64, ids int) {
		storecheck.Crowd(20, func(worker int) {
			for i := worker; i < ids; i += 20 {
				r := storecheck.Request{Clocked: true, Now: now, Parts: []storecheck.Part{storecheck.NewPart(fmt.Sprint(i), []law.Rule{rule}, 1)}}
				_, err := storecheck.Decide(context.Background(), s, r)
				assert.NoError(t, err)
			}
		})
	}
	for range rounds {
		ask(0, ids)
	}
	assert.LessOrEqual(t, sent.n.Load(), int64(rounds*ids/256/4), "of %d at the usual rate", rounds*ids/256)
	const later = 2 * 3_600_000_000 // when all rows are full, of which a fifth is used again
	for range 3 * rounds {
		ask(later, ids/5)
	}
	require.NoError(t, s.Close(bg), "which waits for a sweep")
	assert.LessOrEqual(t, sqlGet[int](t, pool, "SELECT count(*) FROM throttler_state"), ids/4, "what is full is removed")
}
