package postgres_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
)

// trips counts the round trips of a pool.
type trips struct{ n atomic.Int64 }

func (c *trips) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	c.n.Add(1)
	return ctx
}

func (c *trips) TraceBatchStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	c.n.Add(1)
	return ctx
}

func (*trips) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
func (*trips) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {
}
func (*trips) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData) {}

// of returns how many round trips f makes.
func (c *trips) of(f func()) int {
	before := c.n.Load()
	f()
	return int(c.n.Load() - before)
}

// counted returns a storage on a pool of its own, whose round trips are counted.
func counted(t testing.TB, url, name string) (*pgstore.Storage, *trips) {
	t.Helper()
	config, err := pgxpool.ParseConfig(url)
	require.NoError(t, err)
	c := &trips{}
	config.ConnConfig.Tracer = c
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	return open(t, pool, pgstore.Options{TablePrefix: name}), c
}

// On a busy machine a round trip may be too long to set the clock of the memory, and then the next call reads. So
// only the best of many counts.
func TestRoundTrips(t *testing.T) {
	t.Parallel()
	url := servers.PostgresURL(t)
	s, trips := counted(t, url, "trips")
	other := open(t, connect(t, url), pgstore.Options{TablePrefix: "trips"})
	r, few := storecheck.Hourly(t, freshID(t), 1000), storecheck.FivePerHour(t, freshID(t)+" few")
	admitted := func() int { return trips.of(func() { assert.Equal(t, 1, storecheck.Take(t, s, r, 1)) }) }
	assert.Equal(t, 2, admitted(), "the first admission reads and writes")
	least := 3
	for range 100 {
		least = min(least, admitted())
	}
	assert.Equal(t, 1, least, "the next one knows the row")
	assert.Equal(t, 1, storecheck.Take(t, other, r, 1))
	assert.LessOrEqual(t, admitted(), 3, "what it knows is no longer true")
	assert.LessOrEqual(t, admitted(), 2)
	require.Equal(t, 5, storecheck.Take(t, s, few, 5))
	assert.Equal(t, 1, trips.of(func() { assert.Zero(t, storecheck.Take(t, s, few, 1)) }), "a refusal reads")
}

func TestWhatAnotherProcessHasDoneIsSeenInSpiteOfMemory(t *testing.T) {
	t.Parallel()
	pool := connect(t, servers.PostgresURL(t))
	s, other := open(t, pool, pgstore.Options{TablePrefix: "memory"}), open(t, pool, pgstore.Options{TablePrefix: "memory"})
	for what, do := range map[string]struct {
		do   func(storecheck.Request) error
		left int
	}{
		"a Reset": {func(r storecheck.Request) error { return other.Reset(t.Context(), "", r.Parts[0].Identifier) }, 5},
		"a DELETE of the row": {func(r storecheck.Request) error {
			_, err := pool.Exec(t.Context(), "DELETE FROM memory_state WHERE id = $1", []byte(":"+r.Parts[0].Identifier))
			return err
		}, 5},
		"a Take":   {func(r storecheck.Request) error { assert.Equal(t, 2, storecheck.Take(t, other, r, 2)); return nil }, 1},
		"a Charge": {func(r storecheck.Request) error { return charge(t.Context(), other, chargeOne(r)) }, 2},
		"a refund of all that is out": {func(r storecheck.Request) error {
			c := chargeOne(r)
			c.Amounts[0].N = -2
			return other.Charge(t.Context(), &c)
		}, 5},
	} {
		r := storecheck.FivePerHour(t, freshID(t))
		require.Equal(t, 2, storecheck.Take(t, s, r, 2), what)
		require.NoError(t, do.do(r), what)
		assert.Equal(t, do.left, storecheck.Take(t, s, r, 7), what)
	}
}

func TestARefusalOfWhatIsRememberedIsFoundOutByReading(t *testing.T) {
	t.Parallel()
	url := servers.PostgresURL(t)
	s, other := open(t, connect(t, url), pgstore.Options{TablePrefix: "refusal"}), open(t, connect(t, url), pgstore.Options{TablePrefix: "refusal"})
	r := storecheck.FivePerHour(t, freshID(t))
	require.Equal(t, 5, storecheck.Take(t, s, r, 5))
	require.NoError(t, other.Reset(t.Context(), "", r.Parts[0].Identifier))
	assert.Equal(t, 5, storecheck.Take(t, s, r, 7))
}

// The batches of the first storage mix three sorts of rows: those that it remembers, those that the other storage has
// written since, and new ones. Some calls take nothing.
func TestBatchesOfRememberedAndOtherRowsAreExact(t *testing.T) {
	t.Parallel()
	url := servers.PostgresURL(t)
	s, other := open(t, connect(t, url), pgstore.Options{TablePrefix: "mix"}), open(t, connect(t, url), pgstore.Options{TablePrefix: "mix"})
	const ids, limit = 60, 20
	base := freshID(t)
	var told [ids]storecheck.Told
	ask := func(s *pgstore.Storage, i int) {
		assert.NoError(t, told[i].Ask(s, storecheck.Hourly(t, fmt.Sprint(base, i), limit)))
	}
	storecheck.Crowd(64, func(worker int) {
		random := rand.New(rand.NewPCG(1, uint64(worker)))
		for n := range 80 {
			i := random.IntN(ids)
			switch {
			case worker%8 == 0:
				ask(other, random.IntN(ids/4))
			case n%7 == 0:
				r := storecheck.Hourly(t, fmt.Sprint(base, i), limit)
				r.Mode = storage.Peek
				_, err := storecheck.Decide(context.Background(), s, r)
				assert.NoError(t, err)
			default:
				ask(s, i)
			}
		}
	})
	for i := range told {
		assert.Equal(t, int64(limit), told[i].Admitted.Load(), i)
		assert.Equal(t, int64(limit), storecheck.Spent(t, s, storecheck.Hourly(t, fmt.Sprint(base, i), limit)))
	}
}
