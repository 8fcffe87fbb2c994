package redis_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	redisstore "github.com/go-throttler/throttler/storage/redis"
	"github.com/go-throttler/throttler/throttlerhttp"
)

// routesOf returns the identifiers of a key: alone, and on some routes.
func routesOf(key string) []string {
	return []string{key, key + "\x00POST /login", key + "\x00GET /users/{id}", key + "\x00", key + "\x00\x00", key + "\x00}{"}
}

func TestAKeyAndItsRoutesAreConsumedTogetherOnACluster(t *testing.T) {
	t.Parallel()
	url := clusterURL(servers.RedisCluster(t, 3))
	keys := []string{"user:42", "ip:2001:db8::/64", "{", "}", "{}", "{a}b", "a}b{c}", "acme/{7}", "acme/7", "\u65e5\u672c", strings.Repeat("k", 900)}
	for name, o := range map[string]redisstore.Options{
		"plain":              {},
		"a prefix with tag":  {Prefix: "p{x}:"},
		"a hash tag":         {Prefix: "t:", HashTag: tenant},
		"a hash tag of some": {Prefix: "s:", HashTag: func(id string) string { return map[bool]string{true: "acme"}[strings.HasPrefix(id, "acme/")] }},
		"no tag at all":      {Prefix: "n:", HashTag: func(string) string { return "" }},
	} {
		s := open(t, url, o)
		for _, key := range keys {
			r := storecheck.FivePerHour(t, key)
			r.Name = "api"
			for _, id := range routesOf(key)[1:] {
				r.Parts = append(r.Parts, storecheck.NewPart(id, r.Parts[0].Rules.Rules, 1))
			}
			assert.Equal(t, 5, storecheck.Take(t, s, r, 7), "%s: %.20q", name, key)
		}
	}
}

func TestTheRoutesOfAKeyHaveTheSlotOfTheKey(t *testing.T) {
	t.Parallel()
	cluster := servers.RedisCluster(t, 3)
	c := client(t, cluster.Nodes[0].URL())
	s := open(t, clusterURL(cluster), redisstore.Options{Prefix: "p:"})
	slots := map[int64]bool{}
	for i := range 40 { // of one route: users do not meet in a slot
		key := fmt.Sprintf("{tag}%d", i)
		require.Equal(t, 1, storecheck.Take(t, s, storecheck.FivePerHour(t, throttlerhttp.RouteIdentifier(key, "POST /login")), 1))
		slot, err := c.ClusterKeySlot(t.Context(), "p::{}"+key).Result()
		require.NoError(t, err)
		slots[slot] = true
	}
	assert.Greater(t, len(slots), 30)
	got := 0
	for _, node := range cluster.Nodes {
		for _, key := range keysOf(t, client(t, node.URL())) {
			slot, err := c.ClusterKeySlot(t.Context(), key).Result()
			require.NoError(t, err)
			assert.True(t, slots[slot], "%q", key)
			got++
		}
	}
	assert.Equal(t, 40, got)
}

func TestTheRoutesOfNoTwoKeysShareAKey(t *testing.T) {
	t.Parallel()
	tagOf := func(id string) string { return strings.Trim(id, "ab") }
	for _, o := range []redisstore.Options{{}, {Prefix: "p{x}:"}, {HashTag: tagOf}} {
		server := servers.Redis(t)
		s, c := open(t, server.URL(), o), client(t, server.URL())
		ids := map[string]bool{}
		for _, key := range append(zoo, "{2q7}", "{2q7}a", "2q7}a", ":{2q7}a") {
			for _, id := range routesOf(key) {
				ids[id] = true
			}
		}
		for _, name := range []string{"", "a"} {
			for id := range ids {
				r := storecheck.FivePerHour(t, id)
				r.Name = name
				require.Equal(t, 1, storecheck.Take(t, s, r, 1))
			}
		}
		assert.Len(t, keysOf(t, c), 2*len(ids))
	}
}

// Another tag would make another key, and so forget what was spent.
func TestTheTagsOfSlotsNeverChange(t *testing.T) {
	t.Parallel()
	server := servers.Redis(t)
	s, c := open(t, server.URL(), redisstore.Options{}), client(t, server.URL())
	for _, id := range []string{"user:42\x00POST /login", "{a}b\x00/x"} {
		require.Equal(t, 1, storecheck.Take(t, s, storecheck.FivePerHour(t, id), 1))
	}
	assert.Equal(t, []string{"throttler::{2q7}user:42\x00POST /login", "throttler::{bxp}{a}b\x00/x"}, keysOf(t, c))
}
