package servers_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/servers"
)

func client(t *testing.T, url string) *redis.Client {
	t.Helper()
	o, err := redis.ParseURL(url)
	require.NoError(t, err)
	c := redis.NewClient(o)
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	return c
}

func TestAStandaloneRedisAnswersWithItsConfiguration(t *testing.T) {
	t.Parallel()
	c := client(t, servers.Redis(t, "--maxmemory", "10mb").URL())
	assert.NoError(t, c.Set(t.Context(), "key", "value", 0).Err())
	assert.Equal(t, "value", c.Get(t.Context(), "key").Val())
	assert.Equal(t, map[string]string{"maxmemory": "10485760"}, c.ConfigGet(t.Context(), "maxmemory").Val())
	assert.Equal(t, map[string]string{"save": ""}, c.ConfigGet(t.Context(), "save").Val())
}

func TestARedisThatWantsAPasswordStarts(t *testing.T) {
	t.Parallel()
	s := servers.Redis(t, "--requirepass", "secret")
	assert.ErrorContains(t, client(t, s.URL()).Ping(t.Context()).Err(), "NOAUTH")
	assert.NoError(t, client(t, "redis://:secret@"+s.Addr()).Ping(t.Context()).Err())
}

func TestARedisThatWasStoppedOrKilledIsEmptyOnTheSameAddress(t *testing.T) {
	t.Parallel()
	s := servers.Redis(t)
	addr, c := s.Addr(), client(t, s.URL())
	for _, end := range []func() error{s.Stop, s.Kill} {
		require.NoError(t, c.Set(t.Context(), "key", "value", 0).Err())
		require.NoError(t, end())
		assertNobodyListens(t, addr)
		require.NoError(t, s.Start())
		assert.Equal(t, addr, s.Addr())
		assert.Zero(t, c.DBSize(t.Context()).Val())
	}
}

func TestAFrozenServerDoesNotAnswerUntilItIsThawed(t *testing.T) {
	t.Parallel()
	s := servers.Redis(t)
	conn := dial(t, s.Addr(), time.Minute)
	require.NoError(t, s.Freeze())
	_, err := io.WriteString(conn, "PING\r\n")
	require.NoError(t, err)
	require.NoError(t, conn.SetDeadline(time.Now().Add(100*time.Millisecond)))
	_, err = conn.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)

	require.NoError(t, conn.SetDeadline(time.Now().Add(time.Minute)))
	require.NoError(t, s.Thaw())
	answer, err := bufio.NewReader(conn).ReadString('\n')
	assert.NoError(t, err)
	assert.Equal(t, "+PONG\r\n", answer)
}

func TestAClusterServesKeysOfAllSlots(t *testing.T) {
	t.Parallel()
	cluster := servers.RedisCluster(t, 3)
	require.Len(t, cluster.Addrs(), 3)
	c := redis.NewClusterClient(&redis.ClusterOptions{Addrs: cluster.Addrs()[:1]})
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	_, err := c.Pipelined(t.Context(), func(p redis.Pipeliner) error {
		for i := range 1000 {
			p.Set(t.Context(), fmt.Sprint("key-", i), i, 0)
		}
		return nil
	})
	require.NoError(t, err)
	sum := int64(0)
	for _, s := range cluster.Nodes {
		assert.Equal(t, int64(16384), slots(t, s), "every node knows who has each slot")
		size := client(t, s.URL()).DBSize(t.Context()).Val()
		assert.InDelta(t, 333, size, 100, "the keys of a node")
		sum += size
	}
	assert.Equal(t, int64(1000), sum)
}

// slots returns how many slots are served by an address that accepts connections, as one node sees the cluster.
func slots(t *testing.T, s *servers.Server) (n int64) {
	t.Helper()
	shards, err := client(t, s.URL()).ClusterShards(t.Context()).Result()
	require.NoError(t, err)
	for _, shard := range shards {
		dial(t, fmt.Sprintf("%s:%d", shard.Nodes[0].Endpoint, shard.Nodes[0].Port), time.Minute)
		for _, r := range shard.Slots {
			n += r.End - r.Start + 1
		}
	}
	return n
}

func TestAClusterHasAtLeastOneMaster(t *testing.T) {
	t.Parallel()
	_, err := servers.StartCluster(0)
	assert.ErrorContains(t, err, "from 1 to 100")
	assert.Equal(t, int64(16384), slots(t, servers.RedisCluster(t, 1).Nodes[0]))
}

func TestASentinelReplacesAPrimaryThatWasKilled(t *testing.T) {
	t.Parallel()
	s := servers.RedisSentinel(t)
	switched := client(t, s.URL()).Subscribe(t.Context(), "+switch-master")
	t.Cleanup(func() { assert.NoError(t, switched.Close()) })
	_, err := switched.Receive(t.Context())
	require.NoError(t, err)
	c := redis.NewFailoverClient(&redis.FailoverOptions{MasterName: s.MasterName, SentinelAddrs: []string{s.Addr()}})
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	require.NoError(t, c.Set(t.Context(), "key", "value", 0).Err())
	require.Equal(t, int64(1), c.Wait(t.Context(), 1, time.Minute).Val(), "the replica has the key")

	require.NoError(t, s.Primary.Kill())
	said, err := switched.ReceiveTimeout(t.Context(), time.Minute)
	require.NoError(t, err)
	_, port, err := net.SplitHostPort(s.Replica.Addr())
	require.NoError(t, err)
	assert.Contains(t, said.(*redis.Message).Payload, "127.0.0.1 "+port)
	assert.Equal(t, "value", c.Get(t.Context(), "key").Val())
	assert.NoError(t, c.Set(t.Context(), "key", "other", 0).Err())
}

func TestAServerThatRunsIsUsedIfItIsNamed(t *testing.T) {
	t.Setenv("THROTTLER_REDIS_URL", "redis://192.0.2.1:6379/3")
	assert.Equal(t, "redis://192.0.2.1:6379/3", servers.RedisURL(t))
	t.Setenv("THROTTLER_REDIS_URL", "")
	assert.NoError(t, client(t, servers.RedisURL(t)).Ping(t.Context()).Err())
}

func TestAMissingProgramIsAnErrorThatSaysWhatToDo(t *testing.T) {
	for _, missing := range []string{"no-such-redis-server", filepath.Join(t.TempDir(), "redis-server")} {
		t.Setenv("REDIS_SERVER", missing)
		_, err := servers.StartRedis()
		assert.ErrorContains(t, err, missing)
		assert.ErrorContains(t, err, "apt-get install redis-server")
		_, err = servers.StartCluster(3)
		assert.ErrorContains(t, err, "apt-get install redis-server")
		_, err = servers.StartSentinel()
		assert.ErrorContains(t, err, "apt-get install redis-server")
	}
}

// A script stands in for the server. The first time, it says that the port is taken.
func TestAnotherPortIsTriedWhenOneIsTaken(t *testing.T) {
	name := os.Getenv("REDIS_SERVER")
	if name == "" {
		name = "redis-server"
	}
	program, err := exec.LookPath(name)
	require.NoError(t, err)
	dir := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\necho \"$2\" >>%[1]s/ports\nmkdir %[1]s/tried 2>%[1]s/errors && { echo bind: Address already in use; exit 1; }\nexec %[2]s \"$@\"\n", dir, program)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "server"), []byte(script), 0o700))
	t.Setenv("REDIS_SERVER", filepath.Join(dir, "server"))

	s := servers.Redis(t)
	tried, err := os.ReadFile(filepath.Join(dir, "ports"))
	require.NoError(t, err)
	ports := strings.Fields(string(tried))
	require.Len(t, ports, 2)
	assert.NotEqual(t, ports[0], ports[1])
	assert.Equal(t, "127.0.0.1:"+ports[1], s.Addr())
}
