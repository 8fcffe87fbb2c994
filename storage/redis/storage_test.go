package redis_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	"github.com/go-throttler/throttler/storage"
	redisstore "github.com/go-throttler/throttler/storage/redis"
	"github.com/go-throttler/throttler/storage/storagetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// open returns a storage on the server of a URL. It is closed after the test. Without a Timeout it has
// storecheck.Patient.
func open(t testing.TB, url string, o redisstore.Options) *redisstore.Storage {
	t.Helper()
	if o.Timeout == 0 {
		o.Timeout = storecheck.Patient
	}
	s, err := redisstore.Open(url, &o)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close(context.Background())) })
	return s
}

// on returns a storage on a client. The test must close it.
func on(t testing.TB, c goredis.UniversalClient, o redisstore.Options) *redisstore.Storage {
	t.Helper()
	s, err := redisstore.New(c, &o)
	require.NoError(t, err)
	return s
}

// client returns a client of a server. It is closed after the test.
func client(t testing.TB, url string) *goredis.Client {
	t.Helper()
	o, err := goredis.ParseURL(url)
	require.NoError(t, err)
	c := goredis.NewClient(o)
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	return c
}

// clusterURL returns the URL of a cluster, as Open takes it.
func clusterURL(c *servers.Cluster) string {
	addrs := c.Addrs()
	return "redis://" + addrs[0] + "?addr=" + strings.Join(addrs[1:], "&addr=")
}

func TestTheStoragePassesTheSuite(t *testing.T) {
	t.Parallel()
	url := servers.RedisURL(t)
	for _, protocol := range []int{2, 3} {
		t.Run(fmt.Sprintf("RESP%d", protocol), func(t *testing.T) {
			t.Parallel()
			s := open(t, fmt.Sprintf("%s?protocol=%d", url, protocol), redisstore.Options{})
			storagetest.Run(t, func(testing.TB) storage.Storage { return s })
		})
	}
}

func TestTheStoragePassesTheSuiteOnACluster(t *testing.T) {
	t.Parallel()
	s := open(t, clusterURL(servers.RedisCluster(t, 3)), redisstore.Options{
		HashTag: func(string) string { return "one slot, so that all identifiers can be consumed together" },
	})
	storagetest.Run(t, func(testing.TB) storage.Storage { return s })
}

func TestEachIdentifierHasASlotOfItsOwnOnACluster(t *testing.T) {
	t.Parallel()
	cluster := servers.RedisCluster(t, 3)
	s := open(t, clusterURL(cluster), redisstore.Options{})
	for i := range 30 {
		assert.Equal(t, 5, storecheck.Take(t, s, storecheck.FivePerHour(t, fmt.Sprintf("{tag}%d", i)), 7))
	}
	for _, node := range cluster.Nodes {
		n, err := client(t, node.URL()).DBSize(t.Context()).Result()
		require.NoError(t, err)
		assert.NotZero(t, n, "identifiers with one tag must be spread")
	}

	apart := storecheck.FivePerHour(t, "a")
	apart.Parts = append(apart.Parts, storecheck.NewPart("b", apart.Parts[0].Rules.Rules, 1))
	_, err := storecheck.Decide(t.Context(), s, apart)
	require.ErrorIs(t, err, redisstore.ErrCrossSlot)
	require.NotErrorIs(t, err, storage.ErrUnavailable)
	assert.Equal(t, 5, storecheck.Take(t, s, storecheck.FivePerHour(t, "a"), 7), "nothing was taken")
}

func TestTheContextOfTheCallerIsNotThatOfTheFlight(t *testing.T) {
	t.Parallel()
	s := open(t, servers.RedisURL(t), redisstore.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := storecheck.Decide(ctx, s, storecheck.FivePerHour(t, "done"))
	require.ErrorIs(t, err, context.Canceled)
}
