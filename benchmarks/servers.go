package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	goredis "github.com/redis/go-redis/v9"

	"github.com/go-throttler/throttler/internal/servers"
)

// server is a server that was started for this run. used returns the processor time of its processes so far, or less than 0
// if that is not known.
type server struct {
	url     string
	version string
	used    func() time.Duration
	close   func()
}

func startRedis(ctx context.Context) (*server, error) {
	s, err := servers.StartRedis()
	if err != nil {
		return nil, err
	}
	client, err := redisClient(s.URL())
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	info := func(section, field string) string {
		all, _ := client.Info(ctx, section).Result()
		_, after, _ := strings.Cut("\r\n"+all, "\r\n"+field+":")
		value, _, _ := strings.Cut(after, "\r\n")
		return value
	}
	used := func() time.Duration {
		user, err1 := strconv.ParseFloat(info("cpu", "used_cpu_user"), 64)
		system, err2 := strconv.ParseFloat(info("cpu", "used_cpu_sys"), 64)
		if err1 != nil || err2 != nil {
			return -1
		}
		return time.Duration((user + system) * 1e9)
	}
	return &server{s.URL(), "Redis " + info("server", "redis_version"), used, func() { _ = client.Close(); _ = s.Close() }}, nil
}

// redisClient returns a client. Each contender gets one of its own.
func redisClient(url string) (*goredis.Client, error) {
	o, err := goredis.ParseURL(url)
	if err != nil {
		return nil, err
	}
	o.PoolSize = 256
	return goredis.NewClient(o), nil
}

func startPostgres(ctx context.Context) (*server, error) {
	s, err := servers.StartPostgres("-c", "max_connections=500") // a pool for each contender
	if err != nil {
		return nil, err
	}
	pool, err := pgxpool.New(ctx, s.URL())
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	defer pool.Close()
	var pid int
	var version string
	err = pool.QueryRow(ctx, "SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)::int, current_setting('server_version')").Scan(&pid, &version)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	// The time of a process that has ended is lost, but the pools keep their connections, and with them the processes.
	return &server{s.URL(), "Postgres " + version, func() time.Duration { return family(pid) }, func() { _ = s.Close() }}, nil
}

// postgresPool returns a pool. Each contender gets one of its own.
func postgresPool(url string) (*pgxpool.Pool, error) {
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, err
	}
	config.MaxConns, config.MaxConnIdleTime = 64, time.Hour
	return pgxpool.NewWithConfig(context.Background(), config)
}

// family returns the processor time of a process and its children, which have one thread each. It is below 0 if that is not
// known.
func family(pid int) (sum time.Duration) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	sum = -1
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // the process has ended
		}
		var state string
		var self, parent int
		_, _ = fmt.Sscan(string(stat), &self)
		_, _ = fmt.Sscan(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), &state, &parent)
		if self != pid && parent != pid {
			continue
		}
		var ran int64 // nanoseconds from schedstat, since stat counts hundredths of a second
		if scheduled, err := os.ReadFile(filepath.Join(filepath.Dir(path), "schedstat")); err == nil {
			_, _ = fmt.Sscan(string(scheduled), &ran)
			sum = max(sum, 0) + time.Duration(ran)
		}
	}
	return sum
}
