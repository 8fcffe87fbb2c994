package servers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// RedisURL returns the URL of a Redis for the test. It is the value of the environment variable THROTTLER_REDIS_URL
// if that is set; such a server may be shared with others and contain anything. Otherwise RedisURL starts a server
// for the test.
func RedisURL(t TB) string {
	t.Helper()
	if url := os.Getenv("THROTTLER_REDIS_URL"); url != "" {
		return url
	}
	return Redis(t).URL()
}

// Redis is StartRedis for tests.
func Redis(t TB, config ...string) *Server {
	t.Helper()
	s, err := StartRedis(config...)
	return hand(t, s, err)
}

// RedisCluster is StartCluster for tests.
func RedisCluster(t TB, masters int) *Cluster {
	t.Helper()
	c, err := StartCluster(masters)
	return hand(t, c, err)
}

// RedisSentinel is StartSentinel for tests.
func RedisSentinel(t TB) *Sentinel {
	t.Helper()
	s, err := StartSentinel()
	return hand(t, s, err)
}

// StartRedis starts a Redis that keeps nothing in files: after a restart it is empty. The configuration is given as
// arguments of redis-server, such as "--maxmemory", "10mb".
//
// The program is redis-server, unless the environment variable REDIS_SERVER has another name or an absolute path,
// without arguments. If that is a script, it must exec the server.
func StartRedis(config ...string) (*Server, error) {
	return launch(func(s *Server) error {
		return s.redis(append([]string{"--save", "", "--appendonly", "no"}, config...)...)
	})
}

// redis prepares a server that runs redis-server with the arguments.
func (s *Server) redis(arguments ...string) error {
	program, err := redisProgram()
	s.url, s.answers, s.ending = "redis://%s", redisAnswers, syscall.SIGTERM
	s.command = append([]string{program, "--port", strconv.Itoa(s.port), "--bind", "127.0.0.1", "--protected-mode", "no"}, arguments...)
	return err
}

// redisProgram returns the path of the program that StartRedis starts.
func redisProgram() (string, error) {
	name := os.Getenv("REDIS_SERVER")
	if name == "" {
		name = "redis-server"
	}
	path, err := find(name)
	if err != nil {
		return "", fmt.Errorf("servers: there is no Redis here: %w; run \"apt-get install redis-server\", or \"brew install redis\" on macOS, "+
			"or name the program to start in REDIS_SERVER, or the URL of a server that runs in THROTTLER_REDIS_URL", err)
	}
	return path, nil
}

// redisAnswers returns nil if this server answers, and not another one that has taken its port. A server that
// requires a password tells nothing else, so its answer is enough.
func redisAnswers(ctx context.Context, s *Server) error {
	if _, err := s.do(ctx, "ping"); err != nil {
		if strings.HasPrefix(err.Error(), "NOAUTH") {
			return nil
		}
		return err
	}
	info, err := s.do(ctx, "info", "server")
	if err != nil {
		return err
	}
	return s.has(info, "process_id:"+strconv.Itoa(s.child.process.Pid))
}

// do sends one command over a connection of its own, and returns the answer as text.
func (s *Server) do(ctx context.Context, command ...any) (string, error) {
	c := redis.NewClient(&redis.Options{
		Addr:                     s.Addr(),
		Protocol:                 2,
		MaxRetries:               -1, // none
		DialerRetries:            1,
		DisableIdentity:          true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	})
	defer func() { _ = c.Close() }()
	answer, err := c.Do(ctx, command...).Result()
	return fmt.Sprint(answer), err
}

// has returns nil if the answer to INFO has all of the lines.
func (s *Server) has(info string, lines ...string) error {
	for _, line := range lines {
		if !strings.Contains("\r\n"+info, "\r\n"+line+"\r\n") {
			return fmt.Errorf("%s does not say %q but:\n%s", s.Addr(), line, info)
		}
	}
	return nil
}

// Cluster is a Redis Cluster of masters without replicas. Its methods are safe for concurrent use.
type Cluster struct {
	// Nodes have about the same number of slots each, in ascending order. After a restart a node has its slots, but not
	// its keys. It serves the slots 2 seconds after the restart.
	Nodes []*Server

	busPorts []int
}

// slots is the number of slots of every cluster.
const slots = 16384

// StartCluster starts a cluster with the given number of masters, from 1 to 100, and returns when each master knows
// the owner of every slot. That takes 2 seconds, because a new master waits that long; with more than three masters
// it sometimes takes longer.
func StartCluster(masters int) (*Cluster, error) {
	if masters < 1 || masters > 100 {
		return nil, fmt.Errorf("servers: a cluster of %d masters; it has from 1 to 100", masters)
	}
	c := &Cluster{busPorts: make([]int, masters)}
	if err := c.start(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func (c *Cluster) start() error {
	for i := range c.busPorts {
		s, err := c.launch(i)
		if err != nil {
			return err
		}
		c.Nodes = append(c.Nodes, s)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := c.join(ctx); err != nil {
		return err
	}
	return c.await()
}

func (c *Cluster) launch(i int) (*Server, error) {
	return launch(func(s *Server) (err error) {
		if c.busPorts[i], err = freePort(); err != nil {
			return err
		}
		return s.redis("--save", "", "--appendonly", "no", "--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf",
			"--cluster-announce-ip", "127.0.0.1", "--cluster-port", strconv.Itoa(c.busPorts[i]))
	})
}

// join gives each node its slots, and makes it known to all nodes before it. It does not wait until they tell each
// other, which takes longer.
func (c *Cluster) join(ctx context.Context) error {
	n := len(c.Nodes)
	for i, s := range c.Nodes {
		if _, err := s.do(ctx, "cluster", "addslotsrange", i*slots/n, (i+1)*slots/n-1); err != nil {
			return fmt.Errorf("servers: cluster addslotsrange: %w", err)
		}
		for _, earlier := range c.Nodes[:i] {
			if _, err := earlier.do(ctx, "cluster", "meet", "127.0.0.1", s.port, c.busPorts[i]); err != nil {
				return fmt.Errorf("servers: cluster meet: %w", err)
			}
		}
	}
	return nil
}

// await waits until every node knows the others and the owners of all slots.
func (c *Cluster) await() error {
	for _, s := range c.Nodes {
		err := until(nil, func(ctx context.Context) error {
			info, err := s.do(ctx, "cluster", "info")
			if err != nil {
				return err
			}
			return s.has(info, "cluster_state:ok", fmt.Sprint("cluster_slots_ok:", slots), fmt.Sprint("cluster_known_nodes:", len(c.Nodes)))
		})
		if err != nil {
			return fmt.Errorf("servers: the cluster is not ready: %w", err)
		}
	}
	return nil
}

// Addrs returns the addresses of all nodes.
func (c *Cluster) Addrs() []string {
	addrs := make([]string, len(c.Nodes))
	for i, s := range c.Nodes {
		addrs[i] = s.Addr()
	}
	return addrs
}

// Close closes all nodes. Closing twice is harmless.
func (c *Cluster) Close() error { return closeAll(c.Nodes...) }

// Sentinel is a Redis Sentinel (the embedded Server) and the two servers that it watches.
type Sentinel struct {
	*Server

	// MasterName is the name by which the sentinel knows the primary.
	MasterName string

	// Primary and Replica are named after their roles at the start. If the primary does not answer for half a second,
	// the sentinel promotes the replica. A primary that comes back after that is a replica.
	Primary, Replica *Server
}

// StartSentinel starts a primary, a replica and a sentinel. It returns when the replica is in sync and the sentinel
// knows that, so that a failover is possible at once.
func StartSentinel() (*Sentinel, error) {
	s := &Sentinel{MasterName: "throttler"}
	if err := s.start(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Sentinel) start() (err error) {
	// With a delay of 0 the replica is in sync at once. The second setting removes the file that the synchronisation
	// makes.
	quick := []string{"--repl-diskless-sync-delay", "0", "--rdb-del-sync-files", "yes"}
	if s.Primary, err = StartRedis(quick...); err != nil {
		return err
	}
	if s.Replica, err = StartRedis(append(quick, "--replicaof", "127.0.0.1", strconv.Itoa(s.Primary.port))...); err != nil {
		return err
	}
	if err = until(nil, s.inSync); err != nil {
		return fmt.Errorf("servers: the replica is not in sync: %w", err)
	}
	if s.Server, err = launch(s.sentinel); err != nil {
		return err
	}
	if err = until(nil, s.knowsReplica); err != nil {
		return fmt.Errorf("servers: the sentinel does not know the replica: %w", err)
	}
	return nil
}

func (s *Sentinel) inSync(ctx context.Context) error {
	info, err := s.Replica.do(ctx, "info", "replication")
	if err != nil {
		return err
	}
	return s.Replica.has(info, "role:slave", "master_link_status:up")
}

// sentinel prepares the sentinel, and writes its configuration, which the sentinel rewrites later. Half a second
// without an answer is longer than a busy primary takes, and short enough for a test.
func (s *Sentinel) sentinel(server *Server) error {
	config := fmt.Sprintf("sentinel monitor %[1]s 127.0.0.1 %[2]d 1\nsentinel down-after-milliseconds %[1]s 500\nsentinel failover-timeout %[1]s 2000\n",
		s.MasterName, s.Primary.port)
	if err := os.WriteFile(filepath.Join(server.dir, "sentinel.conf"), []byte(config), 0o600); err != nil {
		return err
	}
	err := server.redis()
	server.command = append([]string{server.command[0], "sentinel.conf", "--sentinel"}, server.command[1:]...)
	return err
}

// knowsReplica returns nil if the sentinel has asked the replica itself. It promotes no replica of which it has only
// heard.
func (s *Sentinel) knowsReplica(ctx context.Context) error {
	replicas, err := s.do(ctx, "sentinel", "replicas", s.MasterName)
	if err == nil && !strings.Contains(replicas, "master-link-status ok") {
		err = fmt.Errorf("%s says: %s", s.Addr(), replicas)
	}
	return err
}

// Close closes all three servers. Closing twice is harmless.
func (s *Sentinel) Close() error { return closeAll(s.Server, s.Replica, s.Primary) }
